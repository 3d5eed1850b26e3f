"""The prompt kernel of sm_90: any batch whose rows have many query rows for each kv head, with its work list.

It reads keys, values and queries of 16 bits through tensor maps, so it takes caches that these can describe: blocks
of a multiple of 8 tokens. Codes of quantized tiers become 16 bits on their way. Other calls, and other architectures,
have the kernels that `kvtoolkit.cuda.schedule` chooses.
"""

import functools
from typing import Any, NamedTuple

from kvtoolkit.arrays.call import AttentionCall, Hints, QuantizedTiers
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.expand import list_width, make_granules
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.memory import aligned, keep
from kvtoolkit.cuda.params import LOG2E, UNBOUNDED
from kvtoolkit.cuda.workspace import Sizes, Workspace, workspace
from kvtoolkit.formats.entry import GRANULE
from kvtoolkit.runtime.kernels import arch_of, num_sms
from kvtoolkit.runtime.structs import ParameterStruct
from kvtoolkit.runtime.tensor_map import tensor_map

_HALF_ROWS = 64  # as in prompt/item.cuh
MAX_PARTS = 64
LEAST_SCALE = 1e-30  # a smaller factor is 0 in float32, which is no factor for -inf
_MOST_LATE_ITEMS = 4  # of a CTA, as in plan_prompts.cu
MAX_TILES = 65535  # of a sequence, as items count them
_ITEM_NBYTES = 32
_ANY_STRIDE = 16
LIST_AT = 256  # offset of the items; their number comes first
MAX_TOKENS = 1 << 24  # kLevelShift of prompt/item.cuh

PARAMS = ParameterStruct("attention/prompt.cu", "kvt_prompt")
PLAN_PARAMS = ParameterStruct("attention/plan_prompts.cu", "kvt_plan_prompts")


class Maps(NamedTuple):
    """How the tensor maps of a call's arrays are made, whatever their addresses."""

    query: tuple[Any, ...]
    """Sizes, strides and box of `tensor_map`."""
    key: tuple[Any, ...]
    value: tuple[Any, ...]
    block_pitch: int
    """Coordinates of a granule are block * block_pitch + its number in the block."""
    coordinate_shift: int
    num_blocks: int

    def words(self, q: int, k_cache: int, v_cache: int) -> tuple[int, ...] | None:
        """The three maps for arrays at these addresses; None if the driver cannot describe one of them."""
        query, key, value = tensor_map(q, *self.query), tensor_map(k_cache, *self.key), tensor_map(v_cache, *self.value)
        return None if query is None or key is None or value is None else (*query, *key, *value)


class PromptAttention(NamedTuple):
    """A call of `attend` made ready for other layers."""

    device: int
    launch: Launch
    maps: Maps
    memory: Any
    """What the launch reads and nobody else keeps alive."""


class PromptSizes(NamedTuple):
    """What follows from the shapes of a call."""

    halves: tuple[int, int, int, int, int]
    """``Halves`` of prompt/item.cuh."""
    ctas: int
    blocks: int
    """Blocks of 128 query rows for each kv head, at most."""
    max_items: int
    slots: int
    """Parts of items, at most, for each kv head."""
    partials_nbytes: int
    counters_nbytes: int

    @property
    def list_nbytes(self) -> int:
        """Memory of the work list."""
        return LIST_AT + _ITEM_NBYTES * self.max_items


class UnitLists(NamedTuple):
    """Sequences besides the rows of a call, see shared.cu: addresses of what it makes."""

    units: int
    num_units: int
    begins: int
    places: int
    """0 = queries are where the rows have them."""
    ids_row: int
    """Elements from one row of the table to the next."""
    out: int
    lse: int


_NO_TIERS = QuantizedTiers(None, None, (0, 0, 0))
_NO_UNITS = UnitLists(0, 0, 0, 0, 0, 0, 0)


def suits(call: AttentionCall, most_queries: int, max_seq_len: int | None = None) -> bool:
    """Whether the prompt kernel takes a call: by its shapes and options, and what the host knows.

    Args:
        most_queries: most query tokens of a row, as far as the host knows.
        max_seq_len: no row is longer; None = as long as the table.
    """
    _, num_q_heads, head_dim = call.q.shape
    blocks, num_kv_heads, block_size, _ = call.k_cache.shape
    batch, max_entries = call.block_table.shape
    length = max_entries * (block_size if call.block_starts is None else 8 * GRANULE)
    if max_seq_len is not None:
        length = min(length, max_seq_len)
    return (
        call.block_mass is None
        and call.num_splits == 0
        and block_size % GRANULE == 0
        and most_queries > specs.decode_queries(head_dim, num_q_heads // num_kv_heads, tiers=call.tiers is not None)
        and batch <= specs.MAX_PLANNED
        and call.q.shape[0] < MAX_TOKENS
        and blocks * block_size < 1 << 31
        and length <= MAX_TILES * specs.prompt_keys(head_dim)
        and arch_of(call.q.device) == 90
    )


def maps_of(call: AttentionCall) -> Maps:
    """How the tensor maps of a call are made."""
    return _maps(call.q.shape, call.q.strides, call.k_cache.shape, call.k_cache.strides, call.v_cache.strides)


@functools.lru_cache(1024)
def _maps(
    q_shape: tuple[int, ...], q_strides: tuple[int, ...], shape: tuple[int, ...], key: tuple[int, ...],
    value: tuple[int, ...],
) -> Maps:  # fmt: skip
    num_tokens, num_q_heads, head_dim = q_shape
    blocks, num_kv_heads, block_size, _ = shape
    per_block = block_size // GRANULE
    _, heads, queries, _, _ = _halves(num_q_heads // num_kv_heads)
    token = 2 * q_strides[0] if num_tokens > 1 else _ANY_STRIDE
    head = 2 * q_strides[1] if num_q_heads > 1 else _ANY_STRIDE
    query_map = (head_dim, num_q_heads, num_tokens, 1, 1), (head, token, token, token), (64, heads, queries, 1, 1)
    # where granules follow each other from block to block, they are the map's blocks
    are_granules = per_block == 1 or all(one[0] == block_size * one[2] for one in (key, value))
    shift = 0 if are_granules else (per_block - 1).bit_length()
    pitch = per_block if are_granules else 1 << shift
    if are_granules:
        blocks, block_size = blocks * per_block, GRANULE

    def cache_map(strides: tuple[int, ...]) -> tuple[Any, ...]:
        # the stride of an axis of one may be anything, and the driver does not take anything
        block, kv_head, slot = (
            2 * stride if size > 1 else _ANY_STRIDE for stride, size in zip(strides, shape[:3], strict=False)
        )
        if are_granules and per_block > 1:
            block = GRANULE * slot
        if head_dim % 64 == 0:
            chunks = head_dim // 64
            sizes = 64, block_size, chunks, num_kv_heads, blocks
            return sizes, (slot, 128, kv_head, block), (64, GRANULE, chunks, 1, 1)
        return (head_dim, block_size, 1, num_kv_heads, blocks), (slot, slot, kv_head, block), (64, GRANULE, 1, 1, 1)

    return Maps(query_map, cache_map(key), cache_map(value), pitch, shift, blocks)


def _halves(group_size: int) -> tuple[int, int, int, int, int]:
    if group_size <= _HALF_ROWS:
        heads, queries, per_query = group_size, _HALF_ROWS // group_size, 1
    else:
        heads, queries, per_query = _HALF_ROWS, 1, -(-group_size // _HALF_ROWS)
    return group_size, heads, queries, per_query, -(-(1 << 16) // heads)


@functools.lru_cache(4096)
def sizes_of(num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, batch: int, sms: int) -> PromptSizes:
    """The sizes for ``batch`` sequences that have ``num_tokens`` query tokens."""
    halves = _halves(num_q_heads // num_kv_heads)
    _, _, queries, per_query, _ = halves
    # a sequence's last item may have one half, and its last half some of the queries
    blocks = num_tokens * per_query // (2 * queries) + batch
    # Ragged batches: an item longer than 1.25 shares of a CTA becomes round(length / share) parts, at most 1.34 for
    # each CTA. Even batches: those of the last wave become at most `_MOST_LATE_ITEMS` for each CTA.
    slots = -(-_MOST_LATE_ITEMS * sms // num_kv_heads) + 1
    max_items = max(blocks + slots, -(-sms // num_kv_heads) + 1)
    ctas = min(sms, max_items * num_kv_heads)
    partials = slots * num_kv_heads * specs.prompt_partial_nbytes(head_dim)
    return PromptSizes(halves, ctas, blocks, max_items, slots, partials, 4 * (1 + slots * num_kv_heads))


def sizes_of_call(call: AttentionCall) -> PromptSizes:
    """The sizes for the rows of a call."""
    num_tokens, num_q_heads, head_dim = call.q.shape
    batch, num_kv_heads = call.block_table.shape[0], call.k_cache.shape[1]
    return sizes_of(num_tokens, num_q_heads, num_kv_heads, head_dim, batch, num_sms(call.q.device))


def attend(
    call: AttentionCall, hints: Hints, maps: Maps, words: tuple[int, ...], *, stream: int
) -> PromptAttention | None:
    """Attend, as `kvtoolkit.cuda.attention.attend`.

    Args:
        words: the maps of the call's arrays.
    """
    batch, max_entries = call.block_table.shape
    device = call.q.device
    sizes = sizes_of_call(call)
    width = list_width(max_entries, hints.max_seq_len)
    list_at = 0 if call.block_starts is None else aligned(4 * batch * width)
    step_nbytes = list_at + sizes.list_nbytes
    owner = None
    if hints.kept is not None:
        key = ("prompt", width, sizes, call.left, call.right)
        owner = keep(hints.kept, key, step_nbytes, stream)
    scratch = workspace(
        device, stream, Sizes(sizes.partials_nbytes, sizes.counters_nbytes, 0 if owner is not None else step_nbytes)
    )
    step = scratch.step if owner is None else owner.data.ptr
    ids = call.block_table
    if call.block_starts is not None:
        granules = make_granules(step, call.block_table, call.block_starts, call.seq_lens, width, call.tiers)
        granules.launch.run(stream)
        ids = granules.table
    plan_launch(call, sizes, step + list_at).run(stream)
    launch = attention_launch(call, sizes, maps, words, ids, step + list_at, scratch)
    launch.run(stream)
    return None if owner is None else PromptAttention(device, launch, maps, owner)


def attend_prepared(
    prepared: PromptAttention, q: int, k_cache: int, v_cache: int, out: int, *, warm: int = 0, cold: int = 0,
    stream: int, dependent: bool = False,
) -> None:  # fmt: skip
    """Attend once more where only these addresses differ; see `kvtoolkit.cuda.attention.attend_prepared`."""
    words = prepared.maps.words(q, k_cache, v_cache)
    assert words is not None  # arrays that differ in their addresses alone are described as well
    prepared.launch.set_addresses(PARAMS.word("query_map"), *words, out)
    if warm or cold:
        prepared.launch.set_addresses(PARAMS.word("warm"), warm, cold)
    prepared.launch.run(stream, dependent=dependent)


def plan_launch(
    call: AttentionCall, sizes: PromptSizes, work: int, units: UnitLists = _NO_UNITS, *, most_decoded: int = 0,
    by_row: bool = False, max_parts: int = MAX_PARTS, keys: int = 0, rows: tuple[int, int] | None = None,
) -> Launch:  # fmt: skip
    """The launch that makes the work list at the address ``work``; nothing is launched yet.

    Args:
        most_decoded: where no row has more query tokens, the list is empty.
        by_row: leave out the rows that have no more; otherwise the list has all rows, or none.
        max_parts: most parts of an item; at 1 a row's bits do not depend on its batch.
        keys: of a tile; 0 = as the prompt kernel has them.
        rows: the first and the number of those to plan; None = all.
    """
    first_row, batch = rows or (0, call.block_table.shape[0])
    num_kv_heads, block_size = call.k_cache.shape[1:3]
    parameters = PLAN_PARAMS.pack(
        call.seq_lens.address, call.cu_seqlens_q.address if call.cu_seqlens_q else 0, *units[:4],
        work + LIST_AT, work, units.ids_row, block_size, *sizes.halves, first_row, batch,
        num_kv_heads, min(call.left, UNBOUNDED), min(call.right, UNBOUNDED), sizes.ctas, most_decoded, int(by_row),
        max_parts,
    )  # fmt: skip
    spec = specs.plan_prompts(keys or specs.prompt_keys(call.q.shape[2]))
    smem_nbytes = 8 * batch if units.units else 4 * batch
    return Launch(load_spec(spec, call.q.device), (1,), spec.threads, smem_nbytes, parameters)


def attention_launch(
    call: AttentionCall, sizes: PromptSizes, maps: Maps, words: tuple[int, ...], ids: Operand, work: int,
    scratch: Workspace, units: UnitLists = _NO_UNITS, *, list_is_old: bool = False,
) -> Launch:  # fmt: skip
    """The launch that attends; nothing is launched yet.

    Args:
        words: the maps of the call's arrays, see `Maps.words`.
        ids: the blocks of each row.
        work: address of the work list.
        list_is_old: a kernel that runs before this one has waited for the list; the kernel reads it at once.
    """
    slopes, sinks, scale, softcap = call.alibi_slopes, call.sinks, call.scale, call.softcap
    num_kv_heads, block_size = call.k_cache.shape[1:3]
    per_block = block_size // GRANULE
    shift = per_block.bit_length() - 1 if per_block & (per_block - 1) == 0 else -1
    parameters = PARAMS.pack(
        *words, call.out.address, call.lse.address if call.lse else 0, units.out, units.lse, ids.address,
        slopes.address if slopes else 0, sinks.address if sinks else 0,
        work + LIST_AT, work, scratch.counters, scratch.counters + 4, scratch.partials,
        *call.out.strides[:2], 1 if units.units else ids.strides[0], *sizes.halves, num_kv_heads, per_block, shift,
        maps.block_pitch, maps.coordinate_shift, maps.num_blocks, call.q.shape[0],
        min(call.left, UNBOUNDED), min(call.right, UNBOUNDED), int(list_is_old),
        scale * LOG2E, scale / softcap if softcap else 0.0, softcap * LOG2E,
        *(tier.address if tier else 0 for tier in (call.tiers or _NO_TIERS)[:2]),
    )  # fmt: skip
    rules = 2 if softcap else int(slopes is not None or scale < LEAST_SCALE)
    spec = specs.prompt(call.q.shape[2], call.q.dtype, rules=rules, tiers=call.tiers is not None)
    return Launch(load_spec(spec, call.q.device), (sizes.ctas,), spec.threads, spec.smem_nbytes, parameters)
