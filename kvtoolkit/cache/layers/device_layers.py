"""What the layers of a step do with a cache on a device; see `kvtoolkit.cache.layers.layers`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtoolkit import cuda
from kvtoolkit.arrays.device import check_alignment, check_devices, empty
from kvtoolkit.arrays.host import Operand
from kvtoolkit.attention.device import kernels_of, using
from kvtoolkit.cache.layers.device_masses import DeviceMassSum
from kvtoolkit.cache.layers.layers import Arenas, StepAccess
from kvtoolkit.cache.storage.upload import DeviceTables
from kvtoolkit.runtime import current_stream, is_capturing
from kvtoolkit.runtime.kernels import arch_of


class DeviceStepAccess(StepAccess):
    """`StepAccess` with the kernels of a device, on the stream that is current at each call."""

    __slots__ = ("_appended_layer", "_is_dependent", "_is_fixed", "_kept", "_kernels", "_max_seq_len", "_query_counts")

    def __init__(
        self, arenas: Arenas, tables: DeviceTables, num_new_tokens: NDArray[np.int32], max_seq_len: int,
        *, kept: dict[Any, Any] | None = None, mass: DeviceMassSum | None = None,
    ) -> None:  # fmt: skip
        fewest, most = (int(num_new_tokens.min()), int(num_new_tokens.max())) if len(num_new_tokens) else (1, 1)
        one_each = fewest == most == 1
        super().__init__(
            arenas, tables.block_table, tables.block_starts, tables.seq_lens, None if one_each else tables.cu_seqlens_q,
            tables.slot_mapping, mass=mass,
        )  # fmt: skip
        self._query_counts = fewest, most
        self._max_seq_len = max_seq_len
        self._is_fixed = kept is not None  # whether no length will ever be above it
        self._kept = {} if kept is None else kept  # the plan and the list of granules, for all layers
        self._kernels = kernels_of(arenas.backend)
        # a kernel may begin before the one in front of it has ended, where the device can do that
        self._is_dependent = arenas.backend == "cuda" and arch_of(arenas.device) >= 90
        self._appended_layer = 0  # address of the keys that were appended to last

    def _append(  # type: ignore[override]
        self, key: Operand, value: Operand, k_cache: Operand, v_cache: Operand, slots: Operand
    ) -> Any:
        self._appended_layer = k_cache.address
        device = check_devices({"k_cache": k_cache, "key": key, "value": value})
        with using(device):
            return self._kernels.append(
                key, value, k_cache, v_cache, slots, layout="HND", stream=current_stream(device)
            )

    def _append_alike(self, prepared: Any, key: int, value: int, k_cache: int, v_cache: int) -> None:
        self._appended_layer = k_cache
        with using(self._arenas.device):
            stream = current_stream(self._arenas.device)
            cuda.append_alike(prepared, key, value, k_cache, v_cache, stream=stream, dependent=self._is_dependent)

    def _attend(self, q: Operand, k_cache: Operand, v_cache: Operand, *tables: Operand, **options: Any) -> Any:
        names = ("out", "sinks", "alibi_slopes")
        device = check_devices({"k_cache": k_cache, "q": q} | {name: options[name] for name in names})
        if self._arenas.backend == "cuda":
            check_alignment({"q": q, "out": options["out"]})
            options["query_counts"] = self._query_counts
        with using(device):
            stream = current_stream(device)
            if self._arenas.backend == "cuda":
                options["kept"] = self._kept
                if self._is_fixed or not is_capturing(stream):  # a captured graph will meet longer sequences than now
                    options["max_seq_len"] = self._max_seq_len
            return self._kernels.attend(q, k_cache, v_cache, *tables, stream=stream, **options)

    def _attend_alike(self, prepared: Any, q: int, k_cache: int, v_cache: int, out: int, **tiers: int) -> None:
        # after the append of this layer everything older has been written
        dependent = self._is_dependent and self._appended_layer == k_cache
        with using(self._arenas.device):
            stream = current_stream(self._arenas.device)
            cuda.attend_alike(prepared, q, k_cache, v_cache, out, stream=stream, dependent=dependent, **tiers)

    @staticmethod
    def _empty(like: Any, described: Operand, shape: tuple[int, ...], dtype: str) -> tuple[Any, Operand]:
        return empty(shape, dtype, like, described.device)
