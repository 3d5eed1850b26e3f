"""Groups of layers in a configuration: what is filled in, what is refused, and how memory is divided."""

import pytest

from kvtoolkit import CacheConfig, ConfigError, UnsupportedError

SHAPE = {"num_layers": 6, "num_kv_heads": 2, "head_dim": 16}


def make(groups, **fields):
    return CacheConfig(**{**SHAPE, "num_tokens": 8192, **fields}, layer_groups=groups)


def test_layers_are_ints_ranges_or_lists():
    config = make([{"layers": 5}, {"layers": [range(0, 4, 2), [1]], "window": 64}, {"layers": range(3, 5)}])
    assert [group.layers for group in config.groups] == [(5,), (0, 1, 2), (3, 4)]
    assert [group.window for group in config.groups] == [0, 64, 0]


def test_a_configuration_with_groups_travels_through_its_dict():
    config = make([{"layers": range(3), "window": 1024}, {"layers": range(3, 5)}, {"layers": 5, "chunk": 512}])
    values = config.to_dict()
    groups = [{"layers": [0, 1, 2], "window": 1024}, {"layers": [3, 4]}, {"layers": [5], "chunk": 512}]
    assert values["layer_groups"] == groups
    assert CacheConfig.from_dict(values) == config
    assert "layer_groups" not in CacheConfig(**SHAPE, num_tokens=64).to_dict()


def test_one_group_without_a_window_changes_nothing():
    plain, config = CacheConfig(**SHAPE, num_tokens=1000), make([{"layers": range(6)}], num_tokens=1000)
    assert not config.is_grouped
    for name in ("tier_granules", "seq_len_limit", "entries_limit", "nbytes_per_token", "block_nbytes"):
        assert getattr(config, name) == getattr(plain, name)


HALVES = [{"layers": range(3), "window": 64}, {"layers": range(3, 6)}]


@pytest.mark.parametrize(
    ("groups", "fields", "message"),
    [
        (5, {}, r"layer_groups: expected a list of tables, got 5"),
        ([], {}, r"layer_groups: expected a list of tables, got \[\]"),
        ([range(6)], {}, r"layer_groups\[0\]: expected a table with layers, got range"),
        ([{"layers": range(6), "windw": 3}], {}, r"layer_groups\[0\]: 'windw': .*did you mean 'window'"),
        ([{"layers": range(5)}], {}, r"layer_groups: expected all 6 layers of the model, got none with layer 5"),
        ([{"layers": range(7)}], {}, r"layer_groups\[0\].layers: expected layers from 0 to 5, .*got 6"),
        ([{"layers": [0, True]}], {}, r"layer_groups\[0\].layers: expected layers from 0 to 5, .*got True"),
        ([{"window": 8}], {}, r"layer_groups\[0\].layers: expected layers from 0 to 5, .*got None"),
        ([{"layers": []}], {}, r"layer_groups\[0\].layers: expected different layers, at least one, got \[\]"),
        ([{"layers": [1, 1]}], {}, r"layer_groups\[0\].layers: expected different layers"),
        ([{"layers": range(6)}, {"layers": 2}], {}, r"layer_groups\[1\].layers: .*got 2, which is in"),
        ([{"layers": range(6), "window": 0}], {}, r"layer_groups\[0\].window: expected an int from 1 to .*, got 0"),
        ([{"layers": range(6), "window": 1.5}], {}, r"layer_groups\[0\].window: expected an int .*, got 1.5"),
        ([{"layers": range(6), "chunk": 4}], {}, r"layer_groups\[0\].chunk: expected an int from 8 to .*, got 4"),
        ([{"layers": range(6), "chunk": 12}], {}, r"chunk: expected a multiple of 8, and no window .*, got 12"),
        ([{"layers": range(6), "chunk": 64, "window": 3}], {}, r"and no window beside it, got 64 and a window"),
        ([{"layers": range(6), "num_tokens": 0}], {}, r"layer_groups\[0\].num_tokens: expected an int from 1"),
        ([{"layers": range(6), "share": 1}], {}, r"layer_groups\[0\].share: expected a number .* below 1, got 1"),
        ([{**HALVES[0], "num_tokens": 640}, HALVES[1]], {}, "num_tokens in every group or in none, got it in 1"),
        ([{**one, "num_tokens": 640} for one in HALVES], {}, "num_tokens in the groups, or num_tokens or memory"),
        ([{**one, "share": 0.5} for one in HALVES], {}, "expected shares only with memory, .*, got memory None"),
        (
            [{**one, "share": 0.5, "num_tokens": 640} for one in HALVES], {"num_tokens": None, "memory": "1 GB"},
            "expected shares only with memory, .*, got num_tokens beside them",
        ),
        ([{**one, "share": 0.4} for one in HALVES], {"num_tokens": None, "memory": "1 MiB"}, "sum to 1, got 0.8"),
        ([{**one, "num_tokens": n} for one, n in zip(HALVES, (64, 640), strict=True)], {"num_tokens": None},
         r"layer_groups\[0\]: expected room for 128 tokens, a window or chunk and a block .*, got 64"),
        (HALVES, {"num_tokens": None}, "expected exactly one of num_tokens and memory, got None and None"),
        (HALVES, {"num_tokens": None, "memory": 9000}, "room for 64 tokens in every group of layers, got none"),
    ],
)  # fmt: skip
def test_a_wrong_group_is_refused_and_the_message_says_why(groups, fields, message):
    with pytest.raises(ConfigError, match=message):
        make(groups, **fields)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "numba"])
def test_every_backend_has_groups(backend):
    fields = {"backend": backend, "dtype": "float16", "head_dim": 64}
    assert [one.backend for one in make(HALVES, **fields).group_configs] == [backend] * 2


def test_tiers_are_those_of_groups_that_keep_all_tokens():
    tiers = {"warm": "int8", "cold": "int4", "hot": 128}
    fields = {"head_dim": 64, "tiers": tiers}
    window, full = make(HALVES, **fields).group_configs
    assert window.tiers is None
    assert full.tiers == make(None, **fields).tiers
    assert full.tier_granules == make(None, **fields, num_layers=3).tier_granules
    assert sum(window.tier_granules) == window.num_granules
    with pytest.raises(UnsupportedError, match="tiers: expected a group of layers that keep all tokens, because"):
        make([{"layers": range(3), "window": 64}, {"layers": range(3, 6), "chunk": 64}], **fields)
    with pytest.raises(ConfigError, match=r"layer_groups\[1\]: tiers: .* for hot . pinned_tokens . 64 = 256 tokens"):
        make([{**HALVES[0], "num_tokens": 640}, {**HALVES[1], "num_tokens": 320}], **fields, num_tokens=None)
    alone = make([{"layers": range(6), "num_tokens": 8192}], **fields, num_tokens=None)
    assert alone.tier_granules == make(None, **fields).tier_granules


WARM, COLD = {"warm": "int8", "hot": 64, "pinned_tokens": 0}, {"cold": "int4", "hot": 128}
THIRDS = [{"layers": [0, 1], "tiers": WARM}, {"layers": [2, 3], "window": 64}, {"layers": [4, 5]}]


def test_a_group_has_tiers_of_its_own_or_those_of_the_cache():
    config = make(THIRDS, head_dim=64, tiers=COLD)
    own, window, given = config.group_configs
    assert [own.tiers, window.tiers, given.tiers] == [config.groups[0].tiers, None, config.tiers]
    for one, tiers in ((own, WARM), (given, COLD)):
        alone = make(None, num_layers=2, head_dim=64, tiers=tiers)
        assert (one.tiers, one.tier_granules, one.nbytes) == (alone.tiers, alone.tier_granules, alone.nbytes)
    assert CacheConfig.from_dict(config.to_dict()) == config
    assert [one.tiers is not None for one in make(THIRDS, head_dim=64).group_configs] == [True, False, False]


def test_whether_there_are_tiers_at_all():
    assert make(THIRDS, head_dim=64).has_tiers
    assert make(HALVES, head_dim=64, tiers=COLD).has_tiers
    assert make(None, head_dim=64, tiers=COLD).has_tiers
    assert not make(HALVES).has_tiers
    assert not make(None).has_tiers


@pytest.mark.parametrize("size", [{"num_tokens": 8192}, {"memory": "4 MiB"}])
def test_tiers_of_a_single_group_are_those_of_the_cache(size):
    fields = {"num_tokens": None, "head_dim": 64, **size}
    config, plain = make([{"layers": range(6), "tiers": WARM}], **fields), make(None, **fields, tiers=WARM)
    assert not config.is_grouped
    for name in ("tiers", "tier_granules", "nbytes", "block_nbytes"):
        assert getattr(config, name) == getattr(plain, name)
    sized = make([{"layers": range(6), "tiers": WARM, "num_tokens": 8192}], head_dim=64, num_tokens=None)
    assert sized.tier_granules == make(None, head_dim=64, tiers=WARM).tier_granules


@pytest.mark.parametrize(
    ("group", "fields", "message"),
    [
        ({"tiers": WARM, "window": 64}, {}, r"layer_groups\[0\].tiers: expected none in a group with a window"),
        ({"tiers": WARM, "chunk": 64}, {}, r"layer_groups\[0\].tiers: expected none in a group with a window"),
        ({"tiers": 5}, {}, r"layer_groups\[0\].tiers: expected a table, got 5"),
        ({"tiers": {"hot": 64}}, {}, r"layer_groups\[0\].tiers: expected some of warm = 'int8', cold = "),
        ({"tiers": {**WARM, "hot": 65}}, {}, r"layer_groups\[0\].tiers.hot: expected a multiple of 64, got 65"),
        ({"tiers": {**WARM, "wrm": 1}}, {}, r"layer_groups\[0\].tiers: 'wrm': .*did you mean 'warm'"),
        ({"tiers": {**WARM, "hot": 8192}}, {}, r"layer_groups\[0\]: tiers: expected room for hot .* = 8256 tokens"),
    ],
)
def test_wrong_tiers_of_a_group_are_refused_and_the_message_says_why(group, fields, message):
    with pytest.raises(ConfigError, match=message):
        make([{"layers": range(3), **group}, HALVES[1]], head_dim=64, **fields)


@pytest.mark.parametrize("tiers", [None, COLD])
def test_memory_is_divided_by_the_bytes_of_each_groups_tiers(tiers):
    for memory in (1 << 24, 123_456_789):
        config = make(THIRDS, head_dim=64, tiers=tiers, num_tokens=None, memory=memory)
        assert 0.98 * memory < config.nbytes <= memory
        own, _, full = (one.num_granules for one in config.group_configs)
        assert own == full
    shares = [{**one, "share": share} for one, share in zip(THIRDS, (0.3, 0.2, 0.5), strict=True)]
    config = make(shares, head_dim=64, tiers=tiers, num_tokens=None, memory=1 << 24)
    for one, share in zip(config.group_configs, (0.3, 0.2, 0.5), strict=True):
        assert 0.95 * share * (1 << 24) < one.nbytes <= share * (1 << 24)


@pytest.mark.parametrize("share", [None, 0.5])
def test_memory_of_groups_with_tiers_is_that_of_all_their_tiers(share):
    fields = {"head_dim": 64, "tiers": {"warm": "int8", "hot": 64, "pinned_tokens": 0}, "num_tokens": None}
    groups = [{**one, **({} if share is None else {"share": share})} for one in HALVES]
    for memory in (1 << 22, 1 << 26, 123_456_789):
        window, full = make(groups, **fields, memory=memory).group_configs

        def nbytes_of(config):
            nbytes = config.block_nbytes.values()
            return sum(count // 8 * size for count, size in zip(config.tier_granules, nbytes, strict=False))

        found = [nbytes_of(window), nbytes_of(full)]
        if share is None:
            assert 0.97 * memory < sum(found) <= memory
        else:
            assert all(0.95 * memory / 2 < one <= memory / 2 for one in found)


def test_by_default_sequences_of_a_typical_length_fill_all_groups_at_the_same_time():
    def blocks(**fields):
        return [config.num_granules // 8 for config in make(HALVES, **fields).group_configs]

    assert blocks(num_tokens=64 * 4096) == [64 * (64 + 256) // 64, 4096]  # 64 sequences of 4096
    assert blocks(num_tokens=64 * 4096, max_seq_len=1024) == [256 * (64 + 256) // 64, 4096]
    assert blocks(num_tokens=640) == [5, 10]  # one sequence, which is shorter
    assert blocks(num_tokens=64) == [1, 1]  # and shorter than the window


def test_memory_is_used_up_by_all_groups_together():
    per_block = make(HALVES).block_nbytes["hot"] // 2  # of three layers
    for memory in (per_block * 24, per_block * 1000, per_block * 100_000 + 1):
        config = make(HALVES, num_tokens=None, memory=memory)
        window, full = (one.num_granules // 8 for one in config.group_configs)
        assert memory - 4 * per_block < (window + full) * per_block <= memory
        again = make(HALVES, num_tokens=64 * full)
        assert [one.num_granules for one in again.group_configs] == [8 * window, 8 * full]
    shared = [{**one, "share": share} for one, share in zip(HALVES, (0.25, 0.75), strict=True)]
    config = make(shared, num_tokens=None, memory=per_block * 100)
    assert [one.num_granules // 8 for one in config.group_configs] == [25, 75]


def test_each_group_is_configured_as_a_cache_of_its_layers():
    own = [{**one, "num_tokens": n} for one, n in zip(HALVES, (640, 6400), strict=True)]
    config = make(own, num_tokens=None, growth="append", max_seqs=3)
    window, full = config.group_configs
    assert (window.num_layers, window.num_granules, window.growth, window.max_seqs) == (3, 80, "append", 3)
    assert (full.num_layers, full.num_granules) == (3, 800)
    assert config.seq_len_limit == 6400


def test_a_cache_in_which_all_layers_have_a_window_takes_sequences_longer_than_its_pool():
    config = make([{"layers": range(6), "window": 64}], num_tokens=640)
    assert config.seq_len_limit > 1 << 20
    assert config.entries_limit == 80
    assert make([{"layers": range(6), "window": 64}], num_tokens=640, max_seq_len=9000).seq_len_limit == 9000
