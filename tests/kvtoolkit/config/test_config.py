"""Configurations: what is filled in, what is refused, and how they travel through files."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, ConfigError, KVCache, UnsupportedError
from kvtoolkit.config.fields import parse_nbytes
from kvtoolkit.config.tiers import TierConfig

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}


def make(**fields):
    return CacheConfig(**{**SHAPE, "num_tokens": 512, **fields})


def test_sizes_are_rounded_to_whole_superblocks():
    assert make(num_tokens=65).num_granules == 16
    per_superblock = 64 * make().nbytes_per_token
    assert make(num_tokens=None, memory=3 * per_superblock - 1).num_granules == 16


@pytest.mark.parametrize(
    ("fields", "sizes", "growth"),
    [
        ({}, (8, 16, 32, 64), "adaptive"),
        ({"allocator": "paged"}, (16,), "fixed16"),
        ({"allocator": "paged", "growth": "fixed64"}, (64,), "fixed64"),
        ({"growth": "fixed32"}, (32,), "fixed32"),
        ({"block_sizes": (32,)}, (32,), "fixed32"),
        ({"block_sizes": (64, 8)}, (8, 64), "adaptive"),
    ],
)
def test_block_sizes_and_growth_follow_from_each_other(fields, sizes, growth):
    config = make(**fields)
    assert (config.block_sizes, config.growth) == (sizes, growth)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected an int from 1 to 65536, got 0"),
        ({"num_kv_heads": True}, "num_kv_heads: expected an int from 1 to 65536, got True"),
        ({"head_dim": 12}, "head_dim: expected a multiple of 8, got 12"),
        ({"dtype": "float64"}, "dtype: expected one of float32, float16, bfloat16, got 'float64'"),
        ({"dtype": "flaot16"}, "did you mean 'float16'"),
        ({"num_tokens": -5}, "num_tokens: expected an int from 1 to 134217728, got -5"),
        ({"num_tokens": 1 << 40}, "num_tokens: expected an int from 1 to 134217728"),
        ({"memory": "1 GiB"}, "expected exactly one of num_tokens and memory"),
        ({"num_tokens": None}, "expected exactly one of num_tokens and memory"),
        ({"num_tokens": None, "memory": "lots"}, "memory: expected bytes or a text such as '512 MiB', got 'lots'"),
        ({"num_tokens": None, "memory": 10}, "expected a pool of 64"),
        ({"allocator": "budy"}, "expected one of buddy, lockfree, paged, slab, or 'package.module:Class', got 'budy'"),
        ({"allocator": "no.such.module:Class"}, "'no.such.module:Class' cannot be imported"),
        ({"growth": "lazy"}, "growth: expected one of fixed8"),
        ({"growth": "append", "allocator": "paged"}, "growth: 'append' needs 8 among block_sizes, got \\(16,\\)"),
        ({"growth": "fixed8", "block_sizes": (16,)}, "growth: expected a fixed size among block_sizes"),
        ({"growth": "adaptive", "block_sizes": (8, 16)}, "growth: 'adaptive' needs 64"),
        ({"block_sizes": (24,)}, "block_sizes: expected some of 8, 16, 32, 64, got \\(24,\\)"),
        ({"block_sizes": (8, 16), "allocator": "paged"}, "expected one size for the paged allocator"),
        ({"prefix_caching": 1}, "prefix_caching: expected true or false, got 1"),
        ({"shared_reads": "no"}, "shared_reads: expected true or false, got 'no'"),
        ({"max_seqs": 1 << 30}, "max_seqs: expected an int from 1 to 1048576"),
        ({"migrate_budget": -1}, "migrate_budget: expected an int of at least 0"),
        ({"allocator_options": 3}, "allocator_options: expected a table with names as keys, got 3"),
        ({"backend": "gpu"}, "backend: expected one of cpu, cuda, numba, got 'gpu'"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(fields, message):
    with pytest.raises(ConfigError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ({}, "tiers: expected some of warm = 'int8', cold = 'int4' and host = bytes, got none of them"),
        ([], r"tiers: expected a table, got \[\]"),
        ({"warm": "int4"}, "tiers.warm: expected 'int8' or nothing, got 'int4'"),
        ({"warn": "int8"}, "tiers: 'warn': expected one of hot, warm, .*did you mean 'warm'"),
        ({"cold": "int4", "hot": 0}, "tiers.hot: expected an int from 64 to 1099511627776, got 0"),
        ({"cold": "int4", "hot": 100}, "tiers.hot: expected a multiple of 64, got 100"),
        ({"cold": "int4", "pinned_tokens": 8}, "tiers.pinned_tokens: expected a multiple of 64, got 8"),
        ({"cold": "int4", "warm_tokens": -64}, "tiers.warm_tokens: expected an int from 0 to 1099511627776, got -64"),
        ({"cold": "int4", "demote": "aeg"}, "tiers.demote: expected one of age, mass, got 'aeg'; did you mean 'age'"),
        ({"cold": "int4", "demote": "mass"}, "tiers.demote: 'mass' chooses between warm and cold, expected both"),
        ({"cold": "int4", "prefix_reuse_tiers": "cold"}, "tiers.prefix_reuse_tiers: expected one of hot, all"),
        ({"cold": "int4", "cold_allocator": "budy"}, "tiers.cold_allocator: .*got 'budy'"),
        ({"cold": "int4", "warm_allocator": 3}, "tiers.warm_allocator: expected a name or .*, got 3"),
        ({"cold": "int4", "warm_allocator": "slab"}, "tiers.warm_allocator: expected nothing without a warm tier"),
        ({"cold": "int4", "hot": 2048}, r"hot \+ pinned_tokens \+ 64 = 2176 tokens .*, got \d+ of 512; raise"),
        ({"cold": "int4", "tier_memory": {"hot": 1.0}}, "tiers.tier_memory: expected a table with hot, cold, got"),
        ({"cold": "int4", "tier_memory": {"hot": 0.5, "cold": 0.4}}, "tiers.tier_memory: .* sum to 1, got 0.9"),
        (
            {"cold": "int4", "tier_memory": {"hot": 2, "cold": -1}},
            "tiers.tier_memory.hot: expected a number above 0 and below 1",
        ),
    ],
)
def test_a_wrong_field_of_the_tiers_is_named_with_what_was_expected(tiers, message):
    with pytest.raises(ConfigError, match=message):
        make(head_dim=64, tiers=tiers)


def test_tiers_may_come_as_their_own_class():
    tiers = TierConfig(hot=128, cold="int4")
    both = [make(head_dim=64, num_tokens=4096, tiers=one) for one in (tiers, tiers.to_dict())]
    assert both[0] == both[1]


def test_tiers_share_the_bytes():
    tiers = {"warm": "int8", "cold": "int4", "tier_memory": {"hot": 0.5, "warm": 0.3, "cold": 0.2}}
    by_memory = make(head_dim=64, num_tokens=None, memory="8 MiB", tiers=tiers)
    by_tokens = make(head_dim=64, num_tokens=8 * by_memory.num_granules, tiers=tiers)
    assert by_memory.num_granules == by_tokens.num_granules
    for config in (by_memory, by_tokens):
        for name, granules in zip(("hot", "warm", "cold"), config.tier_granules, strict=True):
            used = granules // 8 * config.block_nbytes[name]
            assert abs(used - tiers["tier_memory"][name] * (8 << 20)) <= config.block_nbytes["hot"]
    assert by_memory.block_nbytes["warm"] == 2 * 2 * 64 * 132
    assert CacheConfig.from_dict(by_memory.to_dict()) == by_memory


def test_a_toml_file_gives_the_tiers(tmp_path):
    path = tmp_path / "cache.toml"
    path.write_text(
        "num_layers = 2\nnum_kv_heads = 2\nhead_dim = 64\nnum_tokens = 6400\n"
        '[tiers]\nhot = 128\ncold = "int4"\ntier_memory = {hot = 0.25, cold = 0.75}\n'
    )
    config = CacheConfig.load(path)
    assert (config.tier_config.hot, config.tier_config.quantized) == (128, ("cold",))
    assert config.tier_granules[1] == 0


def test_what_tiers_cannot_do_is_refused():
    tiers = {"cold": "int4"}
    with pytest.raises(UnsupportedError, match="head_dim: quantized tiers expect 64 or 128, got 16"):
        make(tiers=tiers)
    with pytest.raises(ConfigError, match="expected room for 64 tokens in the hot tier, got none"):
        make(head_dim=64, num_tokens=64, tiers=tiers)


@pytest.mark.parametrize("backend", ["cuda", "numba"])
def test_what_the_gpu_backends_cannot_do_is_refused_when_the_config_is_made(backend):
    with pytest.raises(UnsupportedError, match=f"dtype: .*'{backend}', got float32"):
        make(backend=backend, dtype="float32")
    with pytest.raises(UnsupportedError, match="head_dim: expected a multiple of 16 up to 256 .*, got 40"):
        make(backend=backend, dtype="float16", head_dim=40)
    with pytest.raises(ConfigError, match="device: expected none with backend 'cpu', got 0"):
        make(device=0)
    assert make(backend=backend, dtype="float16", head_dim=64, device=1).device == 1


def test_an_unknown_eviction_policy_is_refused_when_the_cache_is_made():
    with pytest.raises(ConfigError, match="eviction: expected one of lru, lfu.* or 'package.module:Class', got 'fifo'"):
        KVCache(make(eviction="fifo"))


def test_options_of_the_allocator_are_refused_by_name():
    with pytest.raises(ConfigError, match="allocator_options: lockfree does not take these options: .*color"):
        KVCache(make(allocator="lockfree", allocator_options={"color": "red"}))


@pytest.mark.parametrize(
    ("text", "nbytes"), [("512 MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("64k", 64_000), ("7", 7), (4096, 4096)]
)
def test_sizes_may_carry_units(text, nbytes):
    assert parse_nbytes(text) == nbytes


def test_equal_configurations_have_equal_hashes():
    fields = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "num_tokens": 4096}
    tiers = {"hot": 64, "warm": "int8"}
    first, second = (CacheConfig(**fields, tiers=dict(tiers), allocator_options={}) for _ in range(2))
    assert len({first, second, CacheConfig(**fields)}) == 2


def test_a_configuration_survives_its_dictionary():
    config = make(allocator="lockfree", allocator_options={"layout": "slab"}, growth="lazy_merge")
    assert CacheConfig.from_dict(config.to_dict()) == config


def test_a_toml_file_gives_the_fields_and_overrides_win(tmp_path):
    path = tmp_path / "cache.toml"
    path.write_text('[cache]\nnum_layers = 2\nnum_kv_heads = 2\nhead_dim = 16\nnum_tokens = 640\nallocator = "slab"\n')
    config = CacheConfig.load(path, growth="append")
    assert (config.num_tokens, config.allocator, config.growth) == (640, "slab", "append")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cache]\nnum_layers = ", "expected TOML, got a syntax error"),
        ('[cache]\nallocator = "bud', "expected TOML, got a syntax error"),
        ("cache = 3\n", r"expected \[cache\] to be a table, got 3"),
        ("[cache]\nnum_layer = 2\n", "'num_layer': expected one of .*did you mean 'num_layers'"),
        ("[cache]\nnum_layers = 2\n", "expected num_kv_heads, head_dim to be given"),
        ("[cache]\nnum_layers = 2\nnum_kv_heads = 2\nhead_dim = nan\nnum_tokens = 64\n", "head_dim: expected an int"),
        ("\xff", "expected TOML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.toml: .*{message}"):
        CacheConfig.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        CacheConfig.load(tmp_path / "absent.toml")


def test_an_allocator_of_ones_own_serves_a_cache():
    config = make(allocator="tests.kvtoolkit.own_allocator:CountingBuddy")
    cache = KVCache(config)
    seq_ids, _ = cache.open([[1, 2, 3]])
    step = cache.begin_step(seq_ids, 3)
    key = np.ones((3, 2, 16), np.float16)
    for layer in range(2):
        step.append(layer, key, key)
    cache.end_step(step, [1, 2, 3])
    assert cache.allocator.num_calls > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_sizes": (16.0,)}, "block_sizes: expected some of 8, 16, 32, 64"),
        ({"num_tokens": None, "memory": 1 << 62}, "expected a pool of 64 to"),
        ({"num_layers": 10**30}, "num_layers: expected an int from 1 to 65536"),
        ({"max_entries": 10**20}, "max_entries: expected an int from 1 to"),
        ({"device": "banana"}, "device: expected an int of at least 0, got 'banana'"),
        ({"eviction": None}, "eviction: expected a name or 'package.module:Class', got None"),
        ({"eviction": "nope"}, "eviction: expected one of lru, lfu"),
        ({"allocator_options": {"block_sizes": [8]}}, "allocator_options: expected no 'block_sizes'"),
        ({"allocator_options": {1: 2}}, "allocator_options: expected a table with names as keys"),
        ({"allocator": ".x:y"}, "'.x:y' cannot be imported"),
    ],
)
def test_odd_values_are_refused_when_the_configuration_is_made(fields, message):
    with pytest.raises(ConfigError, match=message):
        make(**fields)


@pytest.mark.parametrize("memory", [1 << 63, 10**400, 10**5000, "9" * 400, "9223373 TB", "9" * 5000], ids=range(6))
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tiers": {"warm": "int8"}, "head_dim": 64},
        {"layer_groups": [{"layers": 0, "share": 0.5}, {"layers": 1, "share": 0.5}]},
        {"layer_groups": [{"layers": 0, "window": 64}, {"layers": 1}]},
    ],
)
def test_more_memory_than_there_can_be_is_refused_by_name(fields, memory):
    with pytest.raises(ConfigError, match=r"^memory: expected .*, got"):
        make(**{"num_tokens": None, "memory": memory, **fields})


@pytest.mark.parametrize("path", [None, 5, "a\0b"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ConfigError, match="cannot be read"):
        CacheConfig.load(path)


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "num_layers = " + "9" * 5000])
def test_a_file_that_no_parser_likes_is_refused(tmp_path, text):
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.toml"):
        CacheConfig.load(path)


def test_other_things_than_configurations_are_refused():
    with pytest.raises(ConfigError, match="expected a mapping of field names, got None"):
        CacheConfig.from_dict(None)
    with pytest.raises(ConfigError, match="config: expected a CacheConfig, got dict"):
        KVCache({})
