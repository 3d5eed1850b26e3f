"""Log every kernel launch with its parameters by name: ``KVTOOLKIT_LOG=1``, read from the environment at import.

Lines go to the logger ``kvtoolkit`` of the module `logging`, at level INFO, and from there to stderr. Without the
variable nothing of this runs: launches are then of the class `kvtoolkit.runtime.driver.PreparedLaunch` alone.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

from kvtoolkit.runtime.driver import PreparedLaunch
from kvtoolkit.runtime.structs import ParameterStruct

ENABLED = os.environ.get("KVTOOLKIT_LOG", "") not in ("", "0")
"""Whether launches are logged."""

_logger = logging.getLogger("kvtoolkit")
_MOST_ELEMENTS = 8  # of an array

if ENABLED:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    _logger.addHandler(_handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def log_launch(name: str, grid: tuple[int, ...], block: int, stream: int, parameters: Mapping[str, Any]) -> None:
    """Log one launch.

    Args:
        name: the kernel's.
        grid: CTAs, up to three axes.
        block: threads of a CTA.
        stream: a CUDA stream's address; 0 is the default stream.
        parameters: by name, as they are to be shown.
    """
    shown = " ".join(f"{key}={_shown(value)}" for key, value in parameters.items())
    _logger.info("%s grid=%s block=%d stream=%#x %s", name, "x".join(map(str, grid)), block, stream, shown)


class Pointer(int):
    """An address, shown in hexadecimal."""

    def __str__(self) -> str:
        return f"{self:#x}" if self else "null"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        more = ",..." if len(value) > _MOST_ELEMENTS else ""
        return f"[{','.join(map(_shown, value[:_MOST_ELEMENTS]))}{more}]"
    return str(value)


class LoggedLaunch(PreparedLaunch):
    """A prepared launch that is logged each time before it runs."""

    __slots__ = ("_grid", "_name", "_struct", "_threads")

    def __init__(
        self, function: int, grid: tuple[int, ...], threads: int, smem_nbytes: int, parameters: bytes, *, source: str,
        name: str,
    ) -> None:  # fmt: skip
        super().__init__(function, grid, threads, smem_nbytes, parameters)
        self._grid, self._threads, self._name = grid, threads, name
        self._struct = ParameterStruct(source, name)

    def run(self, stream: int, dependent: bool) -> None:
        """Log the launch with the parameters as they are now, and launch."""
        fields = self._struct.fields
        values = self._struct.unpack(bytes(self.words))
        shown = {name: Pointer(value) if fields[name].is_pointer else value for name, value in values.items()}
        log_launch(self._name, self._grid, self._threads, stream, shown)
        super().run(stream, dependent)
