"""Launch the append kernel on device arrays that are known to be right."""

from kvtoolkit.cpu.arrays import ITEMSIZES, Operand
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.runtime.kernels import packer

_params = packer("5q10q4i")
_KEY, _VALUE, _KEYS, _VALUES = range(4)  # words of AppendParams


def append(
    key: Operand, value: Operand, k_cache: Operand, v_cache: Operand, slot_mapping: Operand, *, layout: str = "HND",
    stream: int = 0,
) -> Launch | None:  # fmt: skip
    """Append, asynchronously on ``stream``; see `kvtoolkit.cpu.append`. Returns what `append_alike` takes."""
    num_tokens, num_heads, head_dim = key.shape
    if num_tokens == 0:
        return None
    size = ITEMSIZES[key.dtype]
    head_axis, slot_axis = (1, 2) if layout == "HND" else (2, 1)
    strides = [s * size for one in (key, value) for s in one.strides[:2]] + [
        cache.strides[axis] * size for cache in (k_cache, v_cache) for axis in (0, head_axis, slot_axis)
    ]
    addresses = (key.address, value.address, k_cache.address, v_cache.address)
    row_nbytes = head_dim * size
    vector = _widest(row_nbytes, *addresses, *strides)
    parameters = _params.pack(
        *addresses,
        slot_mapping.address,
        *strides,
        num_tokens,
        num_heads,
        row_nbytes // vector,
        k_cache.shape[slot_axis],
    )
    spec = specs.append(vector)
    grid = (-(-num_tokens * num_heads * (row_nbytes // vector) // spec.threads),)
    launch = Launch(load_spec(spec, key.device), grid, spec.threads, 0, parameters)
    launch.run(stream)
    return launch


def append_alike(prepared: Launch | None, key: int, value: int, k_cache: int, v_cache: int, *, stream: int = 0) -> None:
    """Append once more where only the addresses of these four arrays differ, by multiples of 16 bytes."""
    if prepared is not None:
        prepared.with_addresses({_KEY: key, _VALUE: value, _KEYS: k_cache, _VALUES: v_cache}).run(stream)


def _widest(*numbers: int) -> int:
    """The widest vector, 16 bytes at most, that divides all of them."""
    together = 0
    for number in numbers:
        together |= number
    return min(16, together & -together)
