"""What takes an integer takes those of every kind, and no bool."""

import dataclasses
import json

import numpy as np
import pytest

from kvtoolkit import CacheConfig, KVCache, KVToolkitError, TierCaches, growth, paged_attention, tiered_attention
from kvtoolkit.arrays.types import as_int
from kvtoolkit.config.tiers import TierConfig
from tests.kvtoolkit.attention.attention_cases import Case


class Index:
    """An integer of no known kind."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


KINDS = [int, np.int8, np.int64, np.uint8, Index]
SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "num_tokens": 8192, "dtype": "float32"}
FIELDS = {"max_seqs": 4, "migrate_budget": 1, "max_seq_len": 64, "max_entries": 64, **SHAPE}
del FIELDS["dtype"]


def paged(**options):
    case = Case([20, 9])
    return paged_attention(case.q, *case.paged(8, "NHD"), case.lengths, **options)


def tiered(first_granules):
    case = Case([20, 9])
    k_cache, v_cache, table, starts = case.variable()
    caches = TierCaches(k_cache, v_cache, None, None, first_granules)
    return tiered_attention(case.q, caches, table, starts, case.lengths)


def append(layer, **options):
    cache = KVCache(CacheConfig(**SHAPE, **options))
    new = np.zeros((1, 2, 64), np.float32)
    with cache.begin_step(cache.open([[1]])[0], 1) as step:
        step.append(layer, new, new)
        step.attend(layer, new)
        step.tables_of(layer)
    for taken_by in (cache.key_cache, cache.value_cache, cache.tier_caches):
        taken_by(layer)


TAKERS = {
    "num_splits": (lambda n: paged(num_splits=n), 1),
    "window_size left": (lambda n: paged(window_size=(n, 1)), 1),
    "window_size right": (lambda n: paged(window_size=(1, n), causal=False), 1),
    "first_granules": (lambda n: tiered((n, 64, 64)), 0),
    "layer": (append, 1),
    "layer of a group": (lambda n: append(n, layer_groups=[{"layers": 0}, {"layers": 1, "chunk": 64}]), 1),
    "memory": (lambda n: CacheConfig(**{**SHAPE, "num_tokens": None, "memory": as_large(n)}), 1),
    "device": (lambda n: CacheConfig(**{**SHAPE, "dtype": "float16", "backend": "cuda", "device": n}), 1),
    "tiers.warm_tokens": (lambda n: TierConfig(warm="int8", warm_tokens=n), 0),
    "growth rule": (lambda n: growth.GrowthPolicy("mine", n), growth.BY_LENGTH),
    "growth tail": (lambda n: growth.GrowthPolicy("mine", growth.FIXED, tail=n), 1),
    "growth largest": (lambda n: growth.GrowthPolicy("mine", growth.FIXED, largest=n), 1),
}


def as_large(n):
    """A number of bytes that is of the kind of ``n``, if that kind holds so many."""
    return n if isinstance(n, bool | np.bool_) else np.int64(1 << 24) if isinstance(n, np.integer) else type(n)(1 << 24)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TAKERS)
def test_every_kind_of_integer_is_taken(name, kind):
    take, value = TAKERS[name]
    take(kind(value))


@pytest.mark.parametrize("kind", [bool, np.bool_, float, str])
@pytest.mark.parametrize("name", TAKERS)
def test_nothing_else_is(name, kind):
    take, value = TAKERS[name]
    if (name, kind) == ("memory", str):
        pytest.skip("a text may be a number of bytes")
    with pytest.raises(KVToolkitError, match=name.split()[0].partition(".")[2] or name.split()[0]):
        take(kind(value))


@pytest.mark.parametrize("name", FIELDS)
def test_a_configuration_holds_plain_integers(name):
    fields = {**SHAPE, name: np.int32(FIELDS[name])}
    config = CacheConfig(**fields)
    assert type(getattr(config, name)) is int
    assert config == CacheConfig(**{**SHAPE, name: FIELDS[name]})
    assert config == CacheConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    with pytest.raises(KVToolkitError, match=f"{name}: expected an int .*, got True"):
        CacheConfig(**{**SHAPE, name: True})


def test_block_sizes_tiers_and_policies_hold_plain_integers():
    config = CacheConfig(**SHAPE, block_sizes=tuple(np.array([64, 8])), tiers={"hot": np.int64(64), "warm": "int8"})
    assert config.block_sizes == (8, 64)
    json.dumps(config.to_dict())
    policy = growth.GrowthPolicy("mine", np.int64(growth.FIXED), tail=np.int8(1))
    assert {type(getattr(policy, field)) for field in ("rule", "tail", "largest")} == {int}
    assert dataclasses.replace(policy, tail=2).tail == 2
    for sizes in ((8, True), (8, 16.0), (8, 8.5), ("8",), (8, None)):
        with pytest.raises(KVToolkitError, match="block_sizes: expected some of 8, 16, 32, 64"):
            CacheConfig(**SHAPE, block_sizes=sizes)


def test_tensors_are_integers_where_they_hold_one():
    torch = pytest.importorskip("torch")
    assert as_int(torch.tensor(3)) == 3
    for other in (torch.tensor(True), torch.tensor(3.0), torch.tensor([1, 2]), torch.tensor(3, device="meta"), None):
        assert as_int(other) is None
