"""Launch the attention kernels on device arrays that are known to be right."""

from typing import NamedTuple

from kvtoolkit.cpu.arrays import Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.cuda.workspace import workspace
from kvtoolkit.runtime import smem_limit
from kvtoolkit.runtime.kernels import num_sms, packer

MAX_DECODE_QUERIES = 8  # as in attention.cuh
MAX_SPLITS = 128  # as in decode.cu
_UNBOUNDED = 1 << 30  # a window as wide as any sequence; sums with positions stay in 32 bits
_LOG2E = 1.4426950408889634
_params = packer("13q12q11i3f")
_Q, _OUT, _KEYS, _VALUES = 0, 1, 3, 4  # words of AttentionParams


class Attention(NamedTuple):
    """A call of `attend` made ready."""

    launches: tuple[Launch, ...]


def attend(
    q: Operand, k_cache: Operand, v_cache: Operand, block_table: Operand, block_starts: Operand | None,
    seq_lens: Operand, *, out: Operand, lse: Operand | None = None, cu_seqlens_q: Operand | None = None,
    softmax_scale: float | None = None, causal: bool = True, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, sinks: Operand | None = None, alibi_slopes: Operand | None = None, num_splits: int = 0,
    layout: str = "HND", query_counts: tuple[int, int] | None = None, stream: int = 0,
) -> Attention:  # fmt: skip
    """Attend, writing to ``out`` and ``lse``, asynchronously on ``stream``.

    The arguments are those of `kvtoolkit.cpu.attend`, on the device. Rows of ``q``, ``out`` and the caches begin at
    multiples of 16 bytes.

    Args:
        query_counts: fewest and most query tokens of the rows, where the host knows them: it spares a launch.
        stream: a CUDA stream's address.

    Returns:
        What `attend_alike` takes.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    head_axis, slot_axis = (1, 2) if layout == "HND" else (2, 1)
    num_kv_heads, block_size = k_cache.shape[head_axis], k_cache.shape[slot_axis]
    batch, max_entries = block_table.shape
    group_size = num_q_heads // num_kv_heads
    device, has_entries = q.device, block_starts is not None
    if num_tokens == 0:
        return Attention(())
    if cu_seqlens_q is None:
        fewest = most = 1
    else:
        fewest, most = query_counts or (0, num_tokens)
    decodes, prefills = fewest <= MAX_DECODE_QUERIES, most > MAX_DECODE_QUERIES
    left, right = window_size
    if causal:
        right = 0
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale

    spec = specs.decode(
        head_dim, k_cache.dtype, has_entries, group_size * min(most, MAX_DECODE_QUERIES), smem_limit(device)
    )
    rows = spec.rows
    if cu_seqlens_q is None:
        num_blocks = batch * -(-group_size // rows)
    else:
        num_blocks = num_tokens * group_size // rows + batch
    splits, is_fixed = min(num_splits, MAX_SPLITS), 1
    if not num_splits:
        is_fixed = 0
        per_sm = 1 if head_dim >= 128 else 2
        busy = max(1, min(num_blocks, batch * -(-group_size * min(most, MAX_DECODE_QUERIES) // rows))) * num_kv_heads
        # not by the width of the table, which growth policies differ in: CTAs that find nothing to do end at once
        splits = max(1, min(per_sm * num_sms(device) // busy, MAX_SPLITS))
    partials = counters = 0
    if decodes and splits > 1:
        groups = num_blocks * num_kv_heads
        scratch = workspace(device, stream, groups * splits * rows * (head_dim + 2) * 4, groups)
        partials, counters = scratch.partials, scratch.counters
    parameters = _params.pack(
        q.address, out.address, lse.address if lse else 0, k_cache.address, v_cache.address, block_table.address,
        block_starts.address if block_starts else 0, seq_lens.address, cu_seqlens_q.address if cu_seqlens_q else 0,
        alibi_slopes.address if alibi_slopes else 0, sinks.address if sinks else 0, partials, counters,
        *q.strides[:2], *out.strides[:2],
        k_cache.strides[0], k_cache.strides[head_axis], k_cache.strides[slot_axis],
        v_cache.strides[0], v_cache.strides[head_axis], v_cache.strides[slot_axis],
        block_table.strides[0], block_starts.strides[0] if block_starts else 0,
        batch, num_tokens, num_kv_heads, group_size, block_size, max_entries,
        min(left, _UNBOUNDED), min(right, _UNBOUNDED), splits, is_fixed, int(prefills),
        scale * _LOG2E, scale / softcap if softcap else 0.0, softcap * _LOG2E,
    )  # fmt: skip
    launches: list[Launch] = []
    if decodes:
        kernel = load_spec(spec, device)
        launches.append(
            Launch(kernel, (num_blocks * splits * num_kv_heads,), spec.threads, spec.smem_nbytes, parameters)
        )
    if prefills:
        spec = specs.prefill(head_dim, k_cache.dtype, has_entries)
        kernel = load_spec(spec, device)
        grid = (num_tokens * group_size // spec.rows + batch, num_kv_heads)
        launches.append(Launch(kernel, grid, spec.threads, spec.smem_nbytes, parameters))
    for launch in launches:
        launch.run(stream)
    return Attention(tuple(launches))


def attend_alike(prepared: Attention, q: int, k_cache: int, v_cache: int, out: int, *, stream: int = 0) -> None:
    """Attend once more where only the addresses of these four arrays differ; see `kvtoolkit.cpu.attend_alike`."""
    addresses = {_Q: q, _OUT: out, _KEYS: k_cache, _VALUES: v_cache}
    for launch in prepared.launches:
        launch.with_addresses(addresses).run(stream)
