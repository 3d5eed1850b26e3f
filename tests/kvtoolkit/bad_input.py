"""Call every public call with damaged arguments: ``python -m tests.kvtoolkit.bad_input --cases 20000``.

A case is a number: with the seed it says which call, which argument and which damage. A case may be refused, with an
error of the library and with every array as it was, or accepted, where the damage does no harm. Any other error, a
write by a refused call, or the death of the child process that ran it is a finding. Arrays end at a page that cannot be
read, so a call that reads past the end of one dies at once. Prints a table, and the findings.
"""

import argparse
import ctypes
import faulthandler
import mmap
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from allocators import AllocatorError
from kvtoolkit import KVToolkitError, UnsupportedError
from tests.kvtoolkit.attention.bad_input_calls import CALLS, Call, with_tensors

OUTCOMES = ("refused", "accepted", "wrong error", "written", "crashed")
_LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy that ends, up to 8 bytes, where an unreadable page begins."""
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    view = np.frombuffer(memory, np.uint8)
    assert _LIBC.mprotect(ctypes.c_void_p(view.ctypes.data + size), ctypes.c_size_t(page), 0) == 0
    begin = (size - array.nbytes) & ~7
    copied = view[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copied[...] = array
    return copied


# -- damages: of an array, a number, or anything; each takes a random generator, the value and the call's arguments ----


class Wrapper(torch.Tensor):
    """A tensor that has a shape but keeps its elements in another one, as DTensor does."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapper":
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*[one.inner if isinstance(one, Wrapper) else one for one in args], **(kwargs or {}))


def _negated(_: Any, x: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(x.clone())


def _fake(_: Any, x: torch.Tensor) -> torch.Tensor:
    return FakeTensorMode().from_tensor(x)


def _resized(fraction: float) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def resize(_: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.untyped_storage().resize_(int(x.untyped_storage().nbytes() * fraction))
        return x

    return resize


def _tail_of_freed(_: Any, x: torch.Tensor) -> torch.Tensor:
    both = torch.cat([x, x])
    tail = both[len(x) :]
    both.untyped_storage().resize_(0)
    return tail


def _overlapping(_: Any, x: torch.Tensor) -> torch.Tensor:
    strides = [max(stride // 2, 1) for stride in x.stride()]
    return torch.as_strided(x.clone(), x.shape, strides)


TENSOR_DAMAGES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "freed": _resized(0), "shrunk": _resized(0.5), "tail of a freed one": _tail_of_freed, "fake": _fake,
    "meta": lambda _, x: x.to("meta"), "wrapper": lambda _, x: Wrapper(x), "negated": _negated,
    "sparse": lambda _, x: x.to_sparse(), "conjugate": lambda _, x: x.to(torch.complex64).conj(),
    "nested": lambda _, x: torch.nested.nested_tensor([x.float()]), "overlapping": _overlapping,
    "expanded": lambda _, x: x[:1].expand(x.shape), "zero tensor": lambda _, x: torch._efficientzerotensor(x.shape),
    "uninitialized": lambda _, x: torch.nn.UninitializedParameter(),
    "parameter": lambda _, x: torch.nn.Parameter(x.float()),
}  # fmt: skip


def _read_only(_: Any, x: np.ndarray) -> np.ndarray:
    x = x.view()
    x.flags.writeable = False
    return x


def _unaligned(_: Any, x: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)


NUMPY_DAMAGES: dict[str, Callable[[Any, np.ndarray], Any]] = {
    "read-only": _read_only, "objects": lambda _, x: x.astype(object), "unaligned": _unaligned,
    "byte-swapped": lambda _, x: x.astype(x.dtype.newbyteorder()), "reversed": lambda _, x: x[::-1],
    "strings": lambda _, x: x.astype(str), "records": lambda _, x: np.zeros(x.shape, [("a", "i2"), ("b", "u1")]),
    "broadcast": lambda _, x: np.broadcast_to(x[:1], x.shape), "masked": lambda _, x: np.ma.masked_array(x),
    "overlapping": lambda _, x: np.lib.stride_tricks.as_strided(x, x.shape, [s // 2 for s in x.strides]),
}  # fmt: skip

DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool", "complex64")


def _cast(rng: Any, x: np.ndarray) -> np.ndarray:
    return x.astype(rng.choice(DTYPES))


def _cut(rng: Any, x: np.ndarray) -> np.ndarray:
    axis = int(rng.integers(x.ndim))
    return np.ascontiguousarray(np.take(x, np.arange(rng.integers(x.shape[axis] + 1)), axis))


def _longer(rng: Any, x: np.ndarray) -> np.ndarray:
    return np.repeat(x, 2, int(rng.integers(x.ndim)))


def _every_second(rng: Any, x: np.ndarray) -> np.ndarray:
    axis = int(rng.integers(x.ndim))
    return np.repeat(x, 2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]


def _wrong_value(rng: Any, x: np.ndarray) -> np.ndarray:
    x = x.copy()
    if x.dtype.kind in "iu" and x.size:
        limits = np.iinfo(x.dtype)
        near = int(x.flat[0]) + int(rng.integers(-3, 200))
        values = [limits.min, limits.min + 1, -2, -1, 0, near, 2**20, 2**24, limits.max - 7, limits.max]
        value = values[int(rng.integers(len(values)))]
        x.flat[int(rng.integers(x.size))] = min(max(value, limits.min), limits.max)
    elif x.size:
        x.flat[int(rng.integers(x.size))] = rng.choice([np.nan, np.inf, -np.inf, 1e30])
    return x


SHAPE_DAMAGES: dict[str, Callable[[Any, np.ndarray], Any]] = {
    "dtype": _cast, "cut": _cut, "longer": _longer, "every second": _every_second, "an axis less": lambda _, x: x[0],
    "an axis more": lambda _, x: x[None], "transposed": lambda _, x: x.T, "a value": _wrong_value,
    "a value again": _wrong_value, "two values": lambda rng, x: _wrong_value(rng, _wrong_value(rng, x)),
}  # fmt: skip

THINGS = (
    None, "x", 3, -1, 2.5, float("nan"), float("inf"), 2**70, [1, 2], [[1], [2, 3]], (), {}, object(), b"abc", True,
    (-1, 10**30), (1.5, 0), 1e300, np.float64("nan"), np.ones(3), slice(2),
)  # fmt: skip


class Case:
    """One damaged call, ready to be made."""

    def __init__(self, seed: int, number: int) -> None:
        rng = np.random.default_rng([seed, number])
        self.call: Call = CALLS[int(rng.integers(len(CALLS)))]
        self.use_torch = bool(self.call.torch_only or (not self.call.numpy_only and rng.integers(2)))
        self.arguments, self.function = self.call.make()
        arrays = {name: guarded(x) for name, x in self.arguments.items() if isinstance(x, np.ndarray)}
        self.arguments |= arrays
        names = list(self.arguments)
        self.name = names[int(rng.integers(len(names)))]
        value = self.arguments[self.name]
        self.damage, damaged = self._damage(rng, value, arrays)
        self.kept = {name: (arrays[name], arrays[name].copy()) for name in self.call.written if name in arrays}
        if self.use_torch:
            self.arguments |= {name: torch.from_numpy(x) for name, x in arrays.items()}
        self.arguments[self.name] = damaged

    def _damage(self, rng: Any, value: Any, arrays: dict[str, np.ndarray]) -> tuple[str, Any]:
        if not isinstance(value, np.ndarray) or rng.integers(12) == 0:
            return "another thing", THINGS[int(rng.integers(len(THINGS)))]
        if rng.integers(10) == 0:
            other = list(arrays)[int(rng.integers(len(arrays)))]
            there = arrays[other].view(np.uint8).reshape(-1)[: value.nbytes]
            if len(there) == value.nbytes and other != self.name:
                alias = there.view(value.dtype).reshape(value.shape)
                return f"memory of {other}", torch.from_numpy(alias) if self.use_torch else alias
        own = TENSOR_DAMAGES if self.use_torch else NUMPY_DAMAGES
        if rng.integers(2):
            name = list(own)[int(rng.integers(len(own)))]
            try:
                return name, own[name](rng, torch.from_numpy(value) if self.use_torch else value)
            except (RuntimeError, ValueError, TypeError, NotImplementedError):  # not for this dtype
                return "another thing", None
        name = list(SHAPE_DAMAGES)[int(rng.integers(len(SHAPE_DAMAGES)))]
        changed = SHAPE_DAMAGES[name](rng, value)
        changed = guarded(changed) if isinstance(changed, np.ndarray) and changed.flags.c_contiguous else changed
        return name, torch.from_numpy(changed) if self.use_torch and isinstance(changed, np.ndarray) else changed

    def run(self) -> tuple[str, str]:
        """The outcome and, where it is a finding, what happened."""
        try:
            self.function(**self.arguments)
        except (KVToolkitError, AllocatorError):
            written = [name for name, (now, before) in self.kept.items() if now.tobytes() != before.tobytes()]
            return ("written", ", ".join(written)) if written else ("refused", "")
        except Exception as error:
            return "wrong error", f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        return "accepted", ""


MEMORY = ("freed", "shrunk", "tail of a freed one", "fake", "meta", "wrapper", "negated", "sparse", "zero tensor")


def check_memory() -> int:
    """Every tensor argument of every call without memory of its own: UnsupportedError, and nothing written."""
    count = 0
    for call in CALLS:
        arrays = [name for name, x in call.make()[0].items() if isinstance(x, np.ndarray)]
        for name in [] if call.numpy_only else arrays:
            for damage in MEMORY:
                arguments, function = call.make()
                arguments = with_tensors(arguments)
                before = {one: arguments[one].clone() for one in call.written}
                damaged = arguments[name] = TENSOR_DAMAGES[damage](None, arguments[name])
                print("memory", call.name, name, damage, sep="\t", flush=True)
                # the methods of a cache have their own errors for what is no list of integers
                expected = KVToolkitError if call.name.startswith("KVCache") else UnsupportedError
                with pytest.raises(expected):
                    function(**arguments)
                count += 1
                for one, held in before.items():
                    assert arguments[one] is damaged or torch.equal(arguments[one].nan_to_num(), held.nan_to_num())
    return count


# -- child and parent --------------------------------------------------------------------------------------------------


def run_child(seed: int, first: int, end: int) -> None:
    """Run cases, with a line before and after each one, so that the parent knows where a child died."""
    faulthandler.enable()
    np.seterr(all="ignore")
    for number in range(first, end):
        case = Case(seed, number)
        print("case", number, case.call.name, case.name, case.damage, sep="\t", flush=True)
        print("done", *case.run(), sep="\t", flush=True)


def run_cases(seed: int, first: int, num_cases: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """``(counts by call and outcome, findings)``; a child that dies is replaced by one that goes on behind its case."""
    counts: Counter[tuple[str, str]] = Counter()
    findings: list[str] = []
    number, end = first, first + num_cases
    while number < end:
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name if __spec__ else __name__, "--seed", str(seed)]
        done = subprocess.run([*command, "--child", str(number), str(end)], capture_output=True, text=True, check=False)
        what: list[str] = []
        before = number
        for line in done.stdout.splitlines():
            kind, *rest = line.split("\t")
            if kind == "case":
                what, number = rest, int(rest[0]) + 1
            elif kind == "done":
                counts[what[1], rest[0]] += 1
                if rest[0] not in OUTCOMES[:2]:
                    findings.append(f"case {' / '.join(what)}: {rest[0]}: {rest[1]}")
                what = []
        if what:
            counts[what[1], "crashed"] += 1
            findings.append(f"case {' / '.join(what)}: the child ended with {done.returncode}")
        elif number == before:
            raise RuntimeError(f"no case was run: {done.stderr[-2000:]}")
        elif number < end:
            findings.append(f"before case {number}: the child ended with {done.returncode}: {done.stderr[-300:]}")
            number += 1
    return counts, findings


def table(counts: Counter[tuple[str, str]]) -> str:
    """The counts in Markdown."""
    lines = ["| call | tried | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 2) + "|"]
    calls = [call.name for call in CALLS]
    for name in [*calls, "all"]:
        row = [sum(n for (call, got), n in counts.items() if got == outcome and name in (call, "all"))
               for outcome in OUTCOMES]  # fmt: skip
        lines.append(f"| {name} | {sum(row)} | " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--child", type=int, nargs=2, metavar=("FIRST", "END"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help="only tensors without memory, for every argument")
    options = parser.parse_args()
    if options.memory:
        print(f"{check_memory()} tensors refused")
        return 0
    if options.child:
        run_child(options.seed, *options.child)
        return 0
    counts, findings = run_cases(options.seed, options.first, options.cases)
    print(table(counts))
    print(*findings, sep="\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
