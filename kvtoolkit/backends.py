"""The backends: one object for each name, all of them `kvtoolkit.arrays.call.Backend`.

| backend | attention, append, merge | granule copies, conversion between tiers |
|---|---|---|
| ``cpu`` | `kvtoolkit.cpu` | `kvtoolkit.cpu` |
| ``cuda`` | `kvtoolkit.cuda` | `kvtoolkit.cuda` |
| ``numba`` | `kvtoolkit.numba` | `kvtoolkit.cuda`: a cache with this backend copies and converts as one with ``cuda`` |

Neither CuPy nor Numba's CUDA target is imported before the first array on a device comes.
"""

from collections.abc import Callable
from typing import Any

from kvtoolkit import cpu, cuda
from kvtoolkit import numba as numba_kernels
from kvtoolkit.arrays import device as device_arrays
from kvtoolkit.arrays import host
from kvtoolkit.arrays.call import NO_HINTS, AttentionCall, Backend, Hints
from kvtoolkit.arrays.device import check_alignment, check_devices
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import check as device_check
from kvtoolkit.cuda.specs import check_head_dim
from kvtoolkit.errors import ShapeError
from kvtoolkit.runtime import current_stream
from kvtoolkit.runtime.devices import using
from kvtoolkit.runtime.kernels import arch_of

_Arrays = tuple[Operand, Operand, Operand, Operand, Operand]
"""``key, value, k_cache, v_cache, slot_mapping``"""


class CpuBackend:
    """The CPU kernels. They are synchronous and may be called from several threads at once."""

    name = "cpu"
    describe = staticmethod(host.operand)
    attend = staticmethod(cpu.attend)
    attend_prepared = staticmethod(cpu.attend_prepared)
    append = staticmethod(cpu.append)
    append_prepared = staticmethod(cpu.append_prepared)
    merge_states = staticmethod(cpu.merge_states)
    copy_granules = staticmethod(cpu.copy_granules)
    convert = staticmethod(cpu.convert)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any, device: int) -> tuple[Any, Operand]:
        """See `Backend.empty`; ``device`` is ignored."""
        return host.empty(shape, dtype, like)

    def can_overlap(self, device: int) -> bool:
        """False: a call returns when it is done."""
        return False


# -- what the backends of a device share -------------------------------------------------------------------------------


def _copy_granules(arena: Operand, sources: Any, targets: Any) -> None:
    with using(arena.device):
        cuda.copy_granules(arena, sources, targets, stream=current_stream(arena.device))


def _convert(
    hot: Operand, warm: Operand | None, cold: Operand | None, first_granules: tuple[int, int, int], sources: Any,
    targets: Any,
) -> None:  # fmt: skip
    with using(hot.device):
        cuda.convert(hot, warm, cold, first_granules, sources, targets, stream=current_stream(hot.device))


def _device_of(call: AttentionCall, check: bool) -> int:
    """The device of a call; ShapeError if its arrays are on several. Without ``check`` the tables are not looked at."""
    if not check:
        return check_devices(
            {
                "k_cache": call.k_cache, "q": call.q, "out": call.out, "sinks": call.sinks,
                "alibi_slopes": call.alibi_slopes,
            }
        )  # fmt: skip
    arrays = {
        "q": call.q, "k_cache": call.k_cache, "v_cache": call.v_cache, "out": call.out, "block_table": call.block_table,
        "block_starts": call.block_starts, "seq_lens": call.seq_lens, "cu_seqlens_q": call.cu_seqlens_q,
        "sinks": call.sinks, "alibi_slopes": call.alibi_slopes, "lse": call.lse, "block_mass": call.block_mass,
    }  # fmt: skip
    if call.tiers is not None:
        arrays |= {"warm": call.tiers.warm, "cold": call.tiers.cold}
    return check_devices(arrays)


def _device_of_append(arrays: _Arrays, check: bool) -> int:
    key, value, k_cache, v_cache, slots = arrays
    if not check:
        return check_devices({"k_cache": k_cache, "key": key, "value": value})
    return check_devices({"key": key, "value": value, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots})


def _merge_states(merge: Callable[..., None], states: tuple[Operand, ...], from_torch: bool | None) -> None:
    device = check_devices(
        dict(zip(("out_a", "lse_a", "out_b", "lse_b", "out", "lse"), states[2:] + states[:2], strict=True))
    )
    with using(device):
        merge(*states, stream=current_stream(device, from_torch))


def _check_tables(call: AttentionCall, hints: Hints, stream: int) -> None:
    """Check tables, lengths and what hints say of them on the device, if ``KVTOOLKIT_CHECK`` is set."""
    if device_check.ENABLED:
        device_check.check_tables(call, stream)
        device_check.check_hints_on_device(call, hints, stream)


def _check_slots(slot_mapping: Operand, k_cache: Operand, stream: int) -> None:
    """Check slots on the device, if ``KVTOOLKIT_CHECK`` is set."""
    if device_check.ENABLED:
        num_blocks, _, block_size, _ = k_cache.shape
        device_check.check_slots(slot_mapping, block_size, num_blocks, stream)


class CudaBackend:
    """The raw CUDA kernels."""

    name = "cuda"
    describe = staticmethod(device_arrays.device_operand)
    empty = staticmethod(device_arrays.empty)
    copy_granules = staticmethod(_copy_granules)
    convert = staticmethod(_convert)

    def can_overlap(self, device: int) -> bool:
        """Whether the device knows dependent launches."""
        return arch_of(device) >= 90

    def attend(
        self, call: AttentionCall, hints: Hints = NO_HINTS, *, check: bool = False,
        before: Callable[[], None] | None = None,
    ) -> "cuda.Prepared | None":  # fmt: skip
        """See `Backend.attend`."""
        if check:
            check_head_dim(call.q.shape[2], call.q.dtype)
            check_alignment({"q": call.q, "k_cache": call.k_cache, "v_cache": call.v_cache, "out": call.out})
            _check_tier_alignment(call)
        else:
            check_alignment({"q": call.q, "out": call.out})
        device = _device_of(call, check)
        with using(device):
            stream = current_stream(device, hints.from_torch)
            if check:
                _check_tables(call, hints, stream)
            if before is not None:
                before()
            return cuda.attend(call, hints, stream=stream)

    def attend_prepared(
        self, prepared: "cuda.Prepared", q: int, k_cache: int, v_cache: int, out: int, *, warm: int = 0, cold: int = 0,
        block_mass: int = 0, overlaps: bool = False, from_torch: Any = None,
    ) -> None:  # fmt: skip
        """See `Backend.attend_prepared`."""
        device = prepared.device
        with using(device):
            cuda.attend_prepared(
                prepared, q, k_cache, v_cache, out, warm=warm, cold=cold, block_mass=block_mass,
                stream=current_stream(device, from_torch), overlaps=overlaps,
            )  # fmt: skip

    def append(
        self, key: Operand, value: Operand, k_cache: Operand, v_cache: Operand, slot_mapping: Operand, *,
        check: bool = False, from_torch: bool | None = None,
    ) -> "cuda.Append | None":  # fmt: skip
        """See `Backend.append`."""
        arrays = (key, value, k_cache, v_cache, slot_mapping)
        device = _device_of_append(arrays, check)
        with using(device):
            stream = current_stream(device, from_torch)
            if check:
                _check_slots(slot_mapping, k_cache, stream)
            return cuda.append(*arrays, stream=stream)

    def append_prepared(
        self, prepared: "cuda.Append", key: int, value: int, k_cache: int, v_cache: int, *, overlaps: bool = False
    ) -> None:
        """See `Backend.append_prepared`."""
        device = prepared.device
        with using(device):
            stream = current_stream(device)
            cuda.append_prepared(prepared, key, value, k_cache, v_cache, stream=stream, overlaps=overlaps)

    def merge_states(
        self, out: Operand, lse: Operand, out_a: Operand, lse_a: Operand, out_b: Operand, lse_b: Operand, *,
        from_torch: bool | None = None,
    ) -> None:  # fmt: skip
        """See `Backend.merge_states`."""
        _merge_states(cuda.merge_states, (out, lse, out_a, lse_a, out_b, lse_b), from_torch)


def _check_tier_alignment(call: AttentionCall) -> None:
    if call.tiers is None:
        return
    for name, one in (("warm", call.tiers.warm), ("cold", call.tiers.cold)):
        if one is not None and one.address % 16:
            raise ShapeError(f"{name}: expected blocks that begin at multiples of 16 bytes, got {one.address:#x}")


class NumbaBackend:
    """The Numba CUDA kernels, for reading; granules are copied and tiers converted by the raw CUDA kernels.

    A prepared call is the call itself, launched again with other addresses.
    """

    name = "numba"
    describe = staticmethod(device_arrays.device_operand)
    empty = staticmethod(device_arrays.empty)
    copy_granules = staticmethod(_copy_granules)
    convert = staticmethod(_convert)

    def can_overlap(self, device: int) -> bool:
        """False: Numba launches kernels one after the other."""
        return False

    def attend(
        self, call: AttentionCall, hints: Hints = NO_HINTS, *, check: bool = False,
        before: Callable[[], None] | None = None,
    ) -> AttentionCall:  # fmt: skip
        """See `Backend.attend`; of the hints only ``from_torch`` is used."""
        device = _device_of(call, check)
        with using(device):
            stream = current_stream(device, hints.from_torch)
            if check:
                _check_tables(call, hints, stream)
            if before is not None:
                before()
            numba_kernels.attend(call, stream=stream)
        return call

    def attend_prepared(
        self, prepared: AttentionCall, q: int, k_cache: int, v_cache: int, out: int, *, warm: int = 0, cold: int = 0,
        block_mass: int = 0, overlaps: bool = False, from_torch: Any = None,
    ) -> None:  # fmt: skip
        """See `Backend.attend_prepared`; ``overlaps`` is ignored."""
        tiers, masses = prepared.tiers, prepared.block_mass
        if tiers is not None:
            tiers = tiers._replace(warm=_moved(tiers.warm, warm), cold=_moved(tiers.cold, cold))
        device = prepared.q.device
        call = prepared._replace(
            q=prepared.q._replace(address=q), k_cache=prepared.k_cache._replace(address=k_cache),
            v_cache=prepared.v_cache._replace(address=v_cache), out=prepared.out._replace(address=out), tiers=tiers,
            block_mass=_moved(masses, block_mass) if block_mass else None,
        )  # fmt: skip
        with using(device):
            numba_kernels.attend(call, stream=current_stream(device, from_torch))

    def append(
        self, key: Operand, value: Operand, k_cache: Operand, v_cache: Operand, slot_mapping: Operand, *,
        check: bool = False, from_torch: bool | None = None,
    ) -> _Arrays:  # fmt: skip
        """See `Backend.append`."""
        arrays = (key, value, k_cache, v_cache, slot_mapping)
        device = _device_of_append(arrays, check)
        with using(device):
            stream = current_stream(device, from_torch)
            if check:
                _check_slots(slot_mapping, k_cache, stream)
            numba_kernels.append(*arrays, stream=stream)
        return arrays

    def append_prepared(
        self, prepared: _Arrays, key: int, value: int, k_cache: int, v_cache: int, *, overlaps: bool = False
    ) -> None:
        """See `Backend.append_prepared`; ``overlaps`` is ignored."""
        new_keys, new_values, keys, values, slots = prepared
        with using(slots.device):
            numba_kernels.append(
                new_keys._replace(address=key), new_values._replace(address=value), keys._replace(address=k_cache),
                values._replace(address=v_cache), slots, stream=current_stream(slots.device),
            )  # fmt: skip

    def merge_states(
        self, out: Operand, lse: Operand, out_a: Operand, lse_a: Operand, out_b: Operand, lse_b: Operand, *,
        from_torch: bool | None = None,
    ) -> None:  # fmt: skip
        """See `Backend.merge_states`."""
        _merge_states(numba_kernels.merge_states, (out, lse, out_a, lse_a, out_b, lse_b), from_torch)


def _moved(array: Operand | None, address: int) -> Operand | None:
    """The same array at another address."""
    return None if array is None else array._replace(address=address)


BACKENDS: dict[str, Backend] = {one.name: one for one in (CpuBackend(), CudaBackend(), NumbaBackend())}
