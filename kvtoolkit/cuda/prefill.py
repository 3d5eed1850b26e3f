"""The prefill kernel: what the prompt kernel of sm_90 does, on any architecture and for any cache without tiers.

It copies keys, values and queries row by row, so blocks may have any size and any strides. Its work list is that of the
prompt kernel: items of 128 query rows, of which long ones are cut into parts of their keys.
"""

import functools
from typing import NamedTuple

from kvtoolkit.arrays.call import AttentionCall
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import prompt, specs
from kvtoolkit.cuda.expand import longest_row
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.memory import aligned
from kvtoolkit.cuda.params import LOG2E, UNBOUNDED
from kvtoolkit.cuda.prompt import LIST_AT, PromptSizes
from kvtoolkit.cuda.workspace import Sizes, workspace
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import smem_limit
from kvtoolkit.runtime.kernels import num_sms
from kvtoolkit.runtime.structs import ParameterStruct

_LONG = 64  # tiles that items of longer sequences count as one

PARAMS = ParameterStruct("attention/prefill.cu", "kvt_prefill")


class PrefillAttention(NamedTuple):
    """The launches of the prefill kernel for a call, ready for other layers."""

    launches: tuple[Launch, ...]


class PrefillWork(NamedTuple):
    """What follows from the shapes of a call."""

    spec: specs.Spec
    sizes: PromptSizes
    """For the most rows that are planned at once."""
    batch: int
    max_parts: int
    tiles_per_planned: int
    """Tiles that items count as one."""

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Rows that are planned at once: the first and the number of them."""
        return [(i, min(specs.MAX_PLANNED, self.batch - i)) for i in range(0, self.batch, specs.MAX_PLANNED)]

    @property
    def list_nbytes(self) -> int:
        """Memory of the work lists."""
        return len(self.rows) * aligned(self.sizes.list_nbytes)

    def lists(self, address: int) -> list[int]:
        """The address of each list."""
        return [address + i * aligned(self.sizes.list_nbytes) for i in range(len(self.rows))]


def work_of(call: AttentionCall, max_seq_len: int | None) -> PrefillWork:
    """What a call needs.

    Args:
        max_seq_len: no row is longer; None = as long as the table.
    """
    num_tokens, num_q_heads, head_dim = call.q.shape
    num_kv_heads, block_size = call.k_cache.shape[1:3]
    batch = call.block_table.shape[0]
    if num_tokens >= prompt.MAX_TOKENS:
        raise UnsupportedError(
            f"q: expected fewer than {prompt.MAX_TOKENS} new tokens, got {num_tokens}; feed the prompt in chunks"
        )
    has_rules = bool(call.softcap) or call.alibi_slopes is not None or call.scale < prompt.LEAST_SCALE
    spec = specs.prefill(head_dim, call.q.dtype, smem_limit(call.q.device), has_rules=has_rules)
    max_parts = 1 if call.num_splits else prompt.MAX_PARTS
    rows = min(batch, specs.MAX_PLANNED)
    ctas = spec.per_sm * num_sms(call.q.device)
    sizes = _sizes(num_tokens, num_q_heads, num_kv_heads, head_dim, rows, ctas, max_parts)
    longest = longest_row(call.block_table, call.block_starts, block_size, max_seq_len)
    return PrefillWork(spec, sizes, batch, max_parts, 1 if longest <= spec.keys * prompt.MAX_TILES else _LONG)


@functools.lru_cache(4096)
def _sizes(
    num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, rows: int, ctas: int, max_parts: int
) -> PromptSizes:
    sizes = prompt.sizes_of(num_tokens, num_q_heads, num_kv_heads, head_dim, rows, ctas)
    slots = min(sizes.slots, sizes.blocks * max_parts) if max_parts > 1 else 0
    partials_nbytes = slots * num_kv_heads * specs.prefill_partial_nbytes(head_dim)
    return sizes._replace(slots=slots, partials_nbytes=partials_nbytes, counters_nbytes=4 * (1 + slots * num_kv_heads))


def plan(call: AttentionCall, work: PrefillWork, address: int, most_decoded: int, stream: int) -> None:
    """Launch what makes the work lists at an address: of rows with more than ``most_decoded`` query tokens."""
    for rows, at in zip(work.rows, work.lists(address), strict=True):
        prompt.plan_launch(
            call, work.sizes, at, most_decoded=most_decoded, by_row=True, max_parts=work.max_parts,
            keys=work.spec.keys * work.tiles_per_planned, rows=rows,
        ).run(stream)  # fmt: skip


def attend(call: AttentionCall, work: PrefillWork, ids: Operand, address: int, stream: int) -> PrefillAttention:
    """Launch the attention of what is in the work lists, after another kernel of the library.

    Args:
        ids: the blocks of each row.
        address: of the work lists.
    """
    device = call.q.device
    kernel = load_spec(work.spec, device)
    sizes, spec = work.sizes, work.spec
    scratch = workspace(device, stream, Sizes(sizes.partials_nbytes, sizes.counters_nbytes, 0))
    num_kv_heads, block_size = call.k_cache.shape[1:3]
    shift = (block_size - 1).bit_length()
    slopes, softcap = call.alibi_slopes, call.softcap

    def parameters(at: int) -> bytes:
        return PARAMS.pack(
            call.q.address, call.out.address, call.k_cache.address, call.v_cache.address,
            call.lse.address if call.lse else 0, ids.address, slopes.address if slopes else 0,
            call.sinks.address if call.sinks else 0, at + LIST_AT, at,
            scratch.counters, scratch.counters + 4, scratch.partials,
            *call.q.strides[:2], *call.out.strides[:2], *call.k_cache.strides[:3], *call.v_cache.strides[:3],
            ids.strides[0], *sizes.halves, num_kv_heads, block_size, -(-(1 << 31 + shift) // block_size), shift,
            work.tiles_per_planned, min(call.left, UNBOUNDED), min(call.right, UNBOUNDED),
            call.scale * LOG2E, call.scale / softcap if softcap else 0.0, softcap * LOG2E,
        )  # fmt: skip

    lists = work.lists(address)
    launches = tuple(Launch(kernel, (sizes.ctas,), spec.threads, spec.smem_nbytes, parameters(at)) for at in lists)
    for launch in launches:
        launch.run(stream, dependent=True)
    return PrefillAttention(launches)


def attend_prepared(
    prepared: PrefillAttention, q: int, k_cache: int, v_cache: int, out: int, *, stream: int, dependent: bool
) -> None:
    """Attend once more where only these addresses differ; see `kvtoolkit.cuda.attention.attend_prepared`.

    Args:
        dependent: whether it follows another kernel of the library, and may begin while that one ends.
    """
    for launch in prepared.launches:
        launch.set_addresses(PARAMS.word("q"), q, out, k_cache, v_cache)
        launch.run(stream, dependent=dependent)
