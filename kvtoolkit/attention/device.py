"""The device side of the attention calls: what is checked there, the stream, the device, and which kernels run."""

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

from kvtoolkit.arrays.device import check_alignment, check_devices, device_operand, empty
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import check
from kvtoolkit.cuda.specs import check_head_dim
from kvtoolkit.errors import ShapeError
from kvtoolkit.runtime import current_stream

_as_it_is: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

__all__ = ["append_checked", "attend_checked", "device_operand", "empty", "kernels_of", "merge_checked", "using"]


@functools.cache
def kernels_of(backend: str) -> Any:
    """The package of a device backend's kernels, ``"cuda"`` or ``"numba"``."""
    return importlib.import_module(f"kvtoolkit.{backend}")


def using(device: int) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one."""
    if _num_devices() == 1:
        return _as_it_is
    import cupy

    return _as_it_is if cupy.cuda.runtime.getDevice() == device else cupy.cuda.Device(device)


@functools.cache
def _num_devices() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def attend_checked(
    backend: str, queries: Operand, keys: Operand, values: Operand, table: Operand, starts: Operand | None,
    lengths: Operand, *, from_torch: bool, query_counts: tuple[int, int] | None,
    before: Callable[[], None] | None = None, **options: Any,
) -> None:  # fmt: skip
    """Attend with arguments whose shapes and dtypes are known to be right. ``before`` is called after all checks."""
    arrays = {"q": queries, "k_cache": keys, "v_cache": values, "out": options["out"]}
    if backend == "cuda":
        check_head_dim(queries.shape[2], queries.dtype)
        check_alignment(arrays)
        options["query_counts"] = query_counts
    tiers, block_mass = options.get("tiers"), options.get("block_mass")
    if backend == "cuda" and tiers is not None:
        for name, one in (("warm", tiers.warm), ("cold", tiers.cold)):
            if one is not None and one.address % 16:
                raise ShapeError(f"{name}: expected blocks that begin at multiples of 16 bytes, got {one.address:#x}")
    names = ("cu_seqlens_q", "sinks", "alibi_slopes")
    others = {"block_table": table, "block_starts": starts, "seq_lens": lengths} | {n: options[n] for n in names}
    others |= {"lse": options["lse"], "block_mass": block_mass}
    if tiers is not None:
        others |= {"warm": tiers.warm, "cold": tiers.cold}
    device = check_devices(arrays | others)
    with using(device):
        stream = current_stream(device, from_torch)
        if check.ENABLED:
            slot_axis = 2 if options["layout"] == "HND" else 1
            check.check_tables(
                table, starts, lengths, options["cu_seqlens_q"], queries.shape[0], keys.shape[slot_axis], keys.shape[0],
                stream, tiers,
            )  # fmt: skip
        if before is not None:
            before()
        kernels_of(backend).attend(queries, keys, values, table, starts, lengths, stream=stream, **options)


def append_checked(
    backend: str, key: Operand, value: Operand, k_cache: Operand, v_cache: Operand, slots: Operand, *, layout: str,
    from_torch: bool,
) -> None:  # fmt: skip
    """Append with arguments whose shapes and dtypes are known to be right."""
    device = check_devices({"key": key, "value": value, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots})
    with using(device):
        stream = current_stream(device, from_torch)
        if check.ENABLED:
            check.check_slots(slots, k_cache.shape[2 if layout == "HND" else 1], k_cache.shape[0], stream)
        kernels_of(backend).append(key, value, k_cache, v_cache, slots, layout=layout, stream=stream)


def merge_checked(
    backend: str, out: Operand, lse: Operand, out_a: Operand, lse_a: Operand, out_b: Operand, lse_b: Operand, *,
    from_torch: bool,
) -> None:  # fmt: skip
    """Merge states whose shapes and dtypes are known to be right."""
    device = check_devices({"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b, "out": out, "lse": lse})
    with using(device):
        stream = current_stream(device, from_torch)
        kernels_of(backend).merge_states(out, lse, out_a, lse_a, out_b, lse_b, stream=stream)
