"""The prefill kernel: what the prompt kernel of sm_90 does, on any architecture and for any cache.

It copies keys, values and queries row by row, so blocks may have any size and any strides. Its work list is that of the
prompt kernel: items of 128 query rows, of which long ones are cut into parts of their keys.
"""

import functools
from typing import Any, NamedTuple

from kvtoolkit.arrays.call import AttentionCall, Hints
from kvtoolkit.cuda import prompt, specs
from kvtoolkit.cuda.expand import list_width, make_granules
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.memory import aligned, keep
from kvtoolkit.cuda.prompt import PromptSizes
from kvtoolkit.cuda.workspace import Sizes, workspace
from kvtoolkit.formats.entry import GRANULE
from kvtoolkit.runtime import smem_limit
from kvtoolkit.runtime.kernels import num_sms
from kvtoolkit.runtime.structs import ParameterStruct

_LOG2E = 1.4426950408889634
_UNBOUNDED = 1 << 30
_LEAST_SCALE = 1e-30  # a smaller factor is 0 in float32, which is no factor for -inf
MAX_PARTS = 64
_MAX_PLANNED_TILES = 65535  # of a sequence, as the items count them
_LONG = 64  # tiles that items of longer sequences count as one
_LIST_AT = 256  # offset of the items; their number comes first

PARAMS = ParameterStruct("attention/prefill.cu", "kvt_prefill")


class PrefillAttention(NamedTuple):
    """A call of `attend` made ready for other layers."""

    device: int
    launch: Launch
    memory: Any
    """What the launch reads and nobody else keeps alive."""


def suits(call: AttentionCall, most_queries: int) -> bool:
    """Whether the prefill kernel takes all rows of a call: by its shapes and options, and what the host knows.

    Args:
        most_queries: most query tokens of a row, as far as the host knows.
    """
    _, num_q_heads, head_dim = call.q.shape
    return (
        call.tiers is None
        and call.block_mass is None
        and call.num_splits == 0
        and most_queries * (num_q_heads // call.k_cache.shape[1]) > specs.decode_rows(head_dim)
        and call.block_table.shape[0] <= specs.MAX_PLANNED
    )


@functools.lru_cache(4096)
def _sizes(num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, batch: int, ctas: int) -> PromptSizes:
    sizes = prompt.sizes_of(num_tokens, num_q_heads, num_kv_heads, head_dim, batch, ctas)
    return sizes._replace(partials_nbytes=sizes.slots * num_kv_heads * specs.prefill_partial_nbytes(head_dim))


def attend(
    call: AttentionCall, hints: Hints, *, stream: int, min_queries: int = 1, max_parts: int = MAX_PARTS
) -> PrefillAttention | None:
    """Attend, as `kvtoolkit.cuda.attention.attend`.

    Args:
        min_queries: rows with fewer query tokens are another kernel's.
        max_parts: most parts of an item; at 1 a row's bits do not depend on its batch.
    """
    num_tokens, num_q_heads, head_dim = call.q.shape
    num_kv_heads, block_size = call.k_cache.shape[1:3]
    batch, max_entries = call.block_table.shape
    device = call.q.device
    slopes, softcap = call.alibi_slopes, call.softcap
    has_rules = bool(softcap) or slopes is not None or call.scale < _LEAST_SCALE
    spec = specs.prefill(head_dim, call.q.dtype, smem_limit(device), has_rules=has_rules)
    sizes = _sizes(num_tokens, num_q_heads, num_kv_heads, head_dim, batch, spec.per_sm * num_sms(device))
    width = list_width(max_entries, hints.max_seq_len)
    list_at = 0 if call.block_starts is None else aligned(4 * batch * width)
    step_nbytes = list_at + sizes.list_nbytes
    owner = None
    if hints.kept is not None:
        key = ("prefill", width, sizes, call.left, call.right, min_queries, max_parts)
        owner = keep(hints.kept, key, step_nbytes, stream)
    scratch = workspace(
        device, stream, Sizes(sizes.partials_nbytes, sizes.counters_nbytes, 0 if owner is not None else step_nbytes)
    )
    step = scratch.step if owner is None else owner.data.ptr
    ids, longest = call.block_table, max_entries * block_size
    if call.block_starts is not None:
        granules = make_granules(step, call.block_table, call.block_starts, call.seq_lens, width)
        granules.launch.run(stream)
        ids, longest = granules.table, width * GRANULE
    keys = dict(spec.defines)["KVT_KEYS"]
    tiles_per_planned = 1 if min(longest, hints.max_seq_len or longest) <= keys * _MAX_PLANNED_TILES else _LONG
    work = step + list_at
    prompt.plan_launch(
        call, sizes, work, keys=keys * tiles_per_planned, min_queries=min_queries, max_parts=max_parts
    ).run(stream)
    shift = (block_size - 1).bit_length()
    parameters = PARAMS.pack(
        call.q.address, call.out.address, call.k_cache.address, call.v_cache.address,
        call.lse.address if call.lse else 0, ids.address, slopes.address if slopes else 0,
        call.sinks.address if call.sinks else 0, work + _LIST_AT, work,
        scratch.counters, scratch.counters + 4, scratch.partials,
        *call.q.strides[:2], *call.out.strides[:2], *call.k_cache.strides[:3], *call.v_cache.strides[:3],
        ids.strides[0], *sizes.halves, num_kv_heads, block_size, -(-(1 << 31 + shift) // block_size), shift,
        tiles_per_planned, min(call.left, _UNBOUNDED), min(call.right, _UNBOUNDED),
        call.scale * _LOG2E, call.scale / softcap if softcap else 0.0, softcap * _LOG2E,
    )  # fmt: skip
    launch = Launch(load_spec(spec, device), (sizes.ctas,), spec.threads, spec.smem_nbytes, parameters)
    launch.run(stream)
    return None if owner is None else PrefillAttention(device, launch, owner)


def attend_prepared(prepared: PrefillAttention, q: int, k_cache: int, v_cache: int, out: int, *, stream: int) -> None:
    """Attend once more where only these addresses differ; see `kvtoolkit.cuda.attention.attend_prepared`."""
    prepared.launch.set_addresses(PARAMS.word("q"), q, out, k_cache, v_cache)
    prepared.launch.run(stream)
