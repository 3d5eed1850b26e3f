"""Check tables, lengths and slots on the device before a launch, and wait for the answer: ``KVTOOLKIT_CHECK=1``."""

import os

import numpy as np

from kvtoolkit.arrays.call import AttentionCall, Hints, QuantizedTiers, check_hints
from kvtoolkit.arrays.host import Operand
from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.errors import ConfigError
from kvtoolkit.findings import Finding, raise_finding
from kvtoolkit.runtime import is_capturing
from kvtoolkit.runtime.streams import on_stream
from kvtoolkit.runtime.structs import ParameterStruct

_wanted = os.environ.get("KVTOOLKIT_CHECK", "")
if _wanted not in ("", "0", "1", "canary"):
    raise ConfigError(f"KVTOOLKIT_CHECK: expected 0, 1 or canary, got {_wanted!r}")
ENABLED = _wanted in ("1", "canary")
"""Whether every launch is preceded by a check. Read from the environment at import."""
CANARY = _wanted == "canary"
"""Whether caches keep a record beside each slot, see `kvtoolkit.cache.layers.canary`."""

_params = ParameterStruct("cache/check.cu", "kvt_check")


def check_tables(call: AttentionCall, stream: int) -> None:
    """Raise as the CPU kernels do if a length or an entry is wrong; synchronizes. Does nothing during a capture."""
    table, starts, bounds = call.block_table, call.block_starts, call.cu_seqlens_q
    batch, max_entries = table.shape
    if is_capturing(stream) or batch == 0:
        return
    num_tokens, (num_blocks, _, block_size, _) = call.q.shape[0], call.k_cache.shape
    code, row, value = _run(
        (table.address, starts.address if starts else 0, call.seq_lens.address, bounds.address if bounds else 0, 0),
        (table.strides[0], starts.strides[0] if starts else 0, 0),
        (batch, num_tokens, block_size, num_blocks, max_entries), table.device, stream, call.tiers,
    )  # fmt: skip
    if code != Finding.OK:
        raise_finding(
            code,
            row,
            value,
            num_tokens=num_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            max_entries=max_entries,
        )


def check_hints_on_device(call: AttentionCall, hints: Hints, stream: int) -> None:
    """ShapeError if a row is longer than the hints say; synchronizes. Does nothing during a capture."""
    if (hints.query_counts is None and hints.max_seq_len is None) or is_capturing(stream):
        return
    bounds = call.cu_seqlens_q
    check_hints(hints, _to_host(call.seq_lens, stream), None if bounds is None else _to_host(bounds, stream))


def _to_host(array: Operand, stream: int) -> Int32Array:
    """A copy of a contiguous int32 vector."""
    import cupy

    copy = np.empty(array.shape, np.int32)
    if copy.size:
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(copy.ctypes.data, array.address, copy.nbytes, runtime.memcpyDeviceToHost, stream)
        runtime.streamSynchronize(stream)
    return copy


def check_slots(slot_mapping: Operand, block_size: int, num_blocks: int, stream: int) -> None:
    """Raise ShapeError if a slot is out of range; synchronizes. Does nothing during a capture."""
    (num_tokens,) = slot_mapping.shape
    if is_capturing(stream) or num_tokens == 0:
        return
    code, row, value = _run(
        (0, 0, 0, 0, slot_mapping.address), (0, 0, block_size * num_blocks), (0, num_tokens, block_size, num_blocks, 0),
        slot_mapping.device, stream,
    )  # fmt: skip
    if code != Finding.OK:
        raise_finding(code, row, value, block_size=block_size, num_blocks=num_blocks)


def _run(
    addresses: tuple[int, ...],
    sizes: tuple[int, ...],
    counts: tuple[int, ...],
    device: int,
    stream: int,
    tiers: QuantizedTiers | None = None,
) -> list[int]:
    import cupy

    kernel = load_spec(specs.CHECK, device)
    with on_stream(stream):
        finding = cupy.zeros(3, np.int32)
        blocks = (0, 0) if tiers is None else tuple(tier.shape[0] if tier else 0 for tier in (tiers.warm, tiers.cold))
        first = (0, 0, 0) if tiers is None else tiers.first_granules
        parameters = _params.pack(
            finding.data.ptr, *addresses, *sizes, *counts, int(tiers is not None), *first, *blocks
        )
        Launch(kernel, (1,), specs.CHECK.threads, 0, parameters).run(stream)
        found: list[int] = finding.get().tolist()
    return found
