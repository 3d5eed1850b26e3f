"""What a turn of the device has done, as `DeviceSteps.finish` and `DeviceSteps.poll` say it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int32Array, Int64Array

STATUS_NAMES = ("ok", "out of blocks", "row full", "at max_len", "finished", "out of steps")


class DeviceTurn(NamedTuple):
    """What the device has done between two turns of the host; see `DeviceSteps.finish`."""

    num_new: Int32Array
    """``[n]`` tokens that each of the sequences that were loaded has got; from `poll` without those of the last step,
    if it had several."""
    history: Int64Array
    """``[n, most]`` int64 these tokens, from the left; ``most`` is the largest of ``num_new``."""
    next_tokens: Int64Array
    """``[n]`` int64 the first token of each row in `DeviceSteps.tokens`: what the graph has chosen last, and in no
    sequence yet, if it writes there after `DeviceSteps.begin`."""
    finished: NDArray[np.bool_]
    """``[n]`` the caller's mask."""
    status: Int32Array
    """``[n]`` of the last step, see `kvtoolkit.cache.device_turn.STATUS_NAMES`."""
