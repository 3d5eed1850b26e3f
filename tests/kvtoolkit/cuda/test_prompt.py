"""The prompt kernel's host side: what its maps say, how queries are cut, and that its lists have room. Needs no GPU."""

import itertools

import numpy as np
import pytest

from kvtoolkit.arrays.call import Hints, attention_call
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import attention, prompt, specs
from tests.kvtoolkit.cuda.test_launches import array, fake

__all__ = ["fake"]  # a fixture
_STREAM = 0x5000


def strided(shape, order, gap=0):
    """Strides in elements of an array whose axes are in memory in this order, the first slowest; rows ``gap`` apart."""
    strides, step = {}, 1
    for place, axis in enumerate(reversed(order)):
        strides[axis] = step
        step *= shape[axis] + (gap if place == 0 else 0)
    return tuple(strides[axis] for axis in range(len(shape)))


LAYOUTS = {
    "granules": ((5, 3, 8), (0, 1, 2, 3), 0),
    "NHD": ((5, 3, 32), (0, 2, 1, 3), 0),
    "HND": ((5, 3, 32), (0, 1, 2, 3), 0),
    "HND of 24": ((5, 3, 24), (0, 1, 2, 3), 0),
    "heads first": ((5, 3, 16), (1, 0, 2, 3), 0),
    "rows apart": ((5, 3, 16), (0, 2, 1, 3), 8),
    "one block": ((1, 3, 48), (0, 2, 1, 3), 0),
    "one head": ((5, 1, 16), (0, 2, 1, 3), 0),
}


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_and_coordinates_lead_to_every_granule(layout, head_dim):
    (blocks, heads, slots), order, gap = LAYOUTS[layout]
    shape = (blocks, heads, slots, head_dim)
    strides = strided(shape, order, gap)
    maps = prompt._maps((4, 6, head_dim), (6 * head_dim, head_dim, 1), shape, strides, strides)
    sizes, steps, box = maps.key
    steps = (2, *steps)
    assert len(sizes) == len(steps) == len(box) == 5
    assert all(step % 16 == 0 for step in steps[1:])
    per_block = slots // 8
    for block, number, head, slot, dim in itertools.product(
        range(blocks), range(per_block), range(heads), (0, 7), {0, head_dim - 1, min(64, head_dim - 1)}
    ):
        coordinates = block * maps.block_pitch + number
        map_block = coordinates >> maps.coordinate_shift
        first_slot = (coordinates - (map_block << maps.coordinate_shift)) * 8
        place = (dim % 64, first_slot + slot, dim // 64, head, map_block)
        if head_dim % 64:
            place = (dim, first_slot + slot, 0, head, map_block)
        assert all(at < size for at, size in zip(place, sizes, strict=True))
        found = sum(at * step for at, step in zip(place, steps, strict=True))
        assert found == 2 * np.dot((block, head, 8 * number + slot, dim), strides)
    # what is behind a sequence's end is outside of the array
    assert maps.num_blocks == sizes[4]


@pytest.mark.parametrize("group_size", [*range(1, 20), 32, 63, 64, 65, 71, 96, 128, 200])
def test_halves_hold_every_query_row_once(group_size):
    _, heads, queries, per_query, inverse = prompt._halves(group_size)
    for num_queries in (1, 2, 7, 33):
        count = num_queries * per_query if per_query > 1 else -(-num_queries // queries)
        seen = []
        for half, row in itertools.product(range(count), range(64)):
            in_half = row * inverse >> 16
            query = (half // per_query if per_query > 1 else half * queries) + in_half
            head = (half % per_query * 64 if per_query > 1 else 0) + row - in_half * heads
            if in_half < queries and query < num_queries and head < group_size:
                seen.append((query, head))
        assert sorted(seen) == list(itertools.product(range(num_queries), range(group_size)))


def cut(new, lengths, halves, num_kv_heads, ctas, keys):
    """The items of a batch and the parts of those that are cut, as plan_prompts.cu makes them."""
    _, _, queries, per_query, _ = halves
    tiles = []
    for count, length in zip(new, lengths, strict=True):
        num_halves = count * per_query if per_query > 1 else -(-count // queries)
        for block in range(-(-num_halves // 2)):
            last = min(count, 2 * (block + 1) * queries) if per_query == 1 else min(count, block + 1)
            tiles.append(max(1, -(-(length - count + last) // keys)))
    longest = max(tiles, default=1)
    if 4 * longest * len(tiles) <= 5 * sum(tiles):
        blocks = -(-(len(tiles) * num_kv_heads % ctas) // num_kv_heads)
        costs = {1: 8 * longest if blocks else 0}
        for count in range(2, 65):
            items, of_part = blocks * num_kv_heads * count, -(-longest // count)
            if of_part >= 4 and items <= 4 * ctas:
                costs[count] = 8 * -(-items // ctas) * of_part + 16 + count
        late = min(costs, key=costs.get)
        parts = [max(1, min(late, n // 4)) if i < blocks else 1 for i, n in enumerate(tiles)]
    else:
        share = max(4, -(-sum(tiles) * num_kv_heads // ctas))
        parts = [1 if 4 * n <= 5 * share else min(64, (2 * n + share) // (2 * share)) for n in tiles]
    return sum(parts), sum(part for part in parts if part > 1)


def test_lists_have_room_for_every_batch():
    rng = np.random.default_rng(7)
    for _ in range(600):
        heads, group_size = int(rng.choice([1, 2, 8, 32])), int(rng.choice([1, 3, 4, 7, 16, 71, 128]))
        batch, sms = int(rng.integers(1, 40)), int(rng.choice([8, 78, 132]))
        new = rng.integers(0, rng.choice([2, 20, 700]), batch)
        new[0] = max(1, new[0])
        lengths = new + rng.integers(0, rng.choice([10, 5000, 200000]), batch)
        head_dim = int(rng.choice([64, 128, 256]))
        sizes = prompt.sizes_of(int(new.sum()), heads * group_size, heads, head_dim, batch, sms)
        items, parts = cut(new, lengths, sizes.halves, heads, sizes.ctas, specs.prompt_keys(head_dim))
        assert items < sizes.max_items  # the kernel reads one past the last before it knows how many there are
        assert parts <= sizes.slots
        assert sizes.partials_nbytes <= (4 * sms + 2 * heads) * specs.prompt_partial_nbytes(head_dim)  # as docs say
        assert sizes.max_items * heads >= sizes.ctas  # each CTA reads the words of an item before it knows how many are


def prompt_call(new=(40, 7), **options):
    num_tokens = sum(new)
    heads = {"q": (num_tokens, 8, 128), "out": (num_tokens, 8, 128)}
    arrays = {name: array(*shape, dtype="bfloat16", gap=64) for name, shape in heads.items()}
    caches = [array(40, 2, 8, 128, dtype="bfloat16") for _ in range(2)]
    return attention_call(
        arrays["q"], *caches, array(2, 5), array(2, 5), array(2), out=arrays["out"], cu_seqlens_q=array(3), **options
    )


@pytest.fixture
def maps(monkeypatch):
    """Maps that show what they were made of."""
    monkeypatch.setattr(prompt, "tensor_map", lambda address, *_: (address, *range(15)))


def test_a_prompt_has_one_list_one_plan_and_one_kernel(fake, maps):
    call = prompt_call()
    assert attention.attend(call, stream=_STREAM) is None  # its memory is scratch
    expand, plan, kernel = fake.taken
    assert [taken.kernel for taken in fake.taken] == ["kvt_expand", "kvt_plan_prompts", "kvt_prompt"]
    assert (kernel.grid, kernel.block) == ((132, 1, 1), 384)
    planned, given = plan.parameters, kernel.parameters
    assert given["block_table"] == expand.parameters["granules"]
    assert (given["items"], given["num_items"]) == (planned["items"], planned["num_items"])
    assert given["query_map"][0] == call.q.address
    assert (given["key_map"][0], given["value_map"][0]) == (call.k_cache.address, call.v_cache.address)
    assert planned["half_sizes"] == given["half_sizes"] == (4, 4, 16, 1, 16384)
    expected = {
        "out": call.out.address, "lse": 0, "sinks": 0, "alibi_slopes": 0, "num_kv_heads": 2, "granules_per_block": 1,
        "block_shift": 0, "block_pitch": 1, "coordinate_shift": 0, "num_map_blocks": 40, "left": -1, "right": 0,
        "out_token": 8 * 128 + 64, "out_head": 128, "cap_outer": 0.0, "table_row": 40,
    }  # fmt: skip
    assert {name: given[name] for name in expected} == expected


def test_further_layers_get_maps_of_their_arrays(fake, maps, monkeypatch):
    owner = type("Owner", (), {"data": type("Data", (), {"ptr": 0xD0000})})
    monkeypatch.setattr(prompt, "keep", lambda *_: owner)
    prepared = attention.attend(prompt_call(), Hints((7, 40), 40, {}), stream=_STREAM)
    attention.attend_prepared(prepared, 16, 32, 48, 64, stream=_STREAM)
    first, second = (taken.parameters for taken in fake.taken[-2:])
    assert [second[name][0] for name in ("query_map", "key_map", "value_map")] == [16, 32, 48]
    assert second == first | {name: second[name] for name in ("query_map", "key_map", "value_map")} | {"out": 64}


@pytest.mark.parametrize(
    ("new", "hints", "options", "takes"),
    [
        ((40, 7), None, {}, True),
        ((1, 1), (1, 1), {}, False),  # 4 query rows of a kv head
        ((4, 4), (4, 4), {}, False),  # 16
        ((5, 4), (4, 5), {}, True),
        ((40, 7), None, {"num_splits": 2}, False),
    ],
)
def test_which_calls_it_takes(fake, maps, new, hints, options, takes):
    attention.attend(prompt_call(new, **options), Hints(hints), stream=_STREAM)
    assert ("kvt_prompt" in [taken.kernel for taken in fake.taken]) is takes


@pytest.mark.parametrize(("max_seq_len", "takes"), [(None, False), (4096, True)])
def test_what_the_host_knows_of_lengths_counts_more_than_the_table(fake, maps, max_seq_len, takes):
    """A captured step has room for entries of 8 tokens; if all were of 64, it would hold eight times as many."""
    table = array(2, 1 << 18)
    call = prompt_call()._replace(block_table=table, block_starts=table)
    attention.attend(call, Hints((7, 40), max_seq_len), stream=_STREAM)
    assert ("kvt_prompt" in [taken.kernel for taken in fake.taken]) is takes


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-31])
def test_a_scale_that_is_no_factor_has_the_kernel_with_rules(fake, maps, scale, monkeypatch):
    found, spec_of = [], specs.prompt

    def noted(*shape, rules, **more):
        found.append(rules)
        return spec_of(*shape, rules=rules, **more)

    monkeypatch.setattr(specs, "prompt", noted)
    attention.attend(prompt_call(softmax_scale=scale), stream=_STREAM)
    attention.attend(prompt_call(), stream=_STREAM)
    assert found == [1, 0]


def test_arrays_that_no_map_describes_have_the_other_kernels(fake, monkeypatch):
    monkeypatch.setattr(prompt, "tensor_map", lambda *_: None)
    attention.attend(prompt_call(), stream=_STREAM)
    assert {taken.kernel for taken in fake.taken} >= {"kvt_prefill", "kvt_decode"}


def test_blocks_that_are_not_granules_have_the_other_kernels(fake, maps):
    call = prompt_call()
    cache = Operand(1 << 30, (40, 2, 12, 128), (2 * 12 * 128, 12 * 128, 128, 1), "bfloat16", None, True, 0)
    attention.attend(call._replace(k_cache=cache, v_cache=cache, block_starts=None), stream=_STREAM)
    assert "kvt_prompt" not in [taken.kernel for taken in fake.taken]
