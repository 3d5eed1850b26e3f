"""Our allocators with one defect planted in each, and without `check_integrity`: the kit must kill every one.

``python -m allocators.testing.mutants`` prints which check kills which.
"""

import importlib
import inspect
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from allocators.buddy import BuddyAllocator
from allocators.epochs import EpochPool
from allocators.errors import InvalidFreeError
from allocators.lockfree import LockFreeAllocator
from allocators.paged import PagedAllocator
from allocators.protocol import BlockAllocator, as_counts
from allocators.slab import SlabAllocator
from allocators.testing.conformance import run_conformance
from allocators.testing.failure import ConformanceFailure
from allocators.testing.threads import frequent_switches, hammer, race_to_free, run_threads, stay_within_quotas


@dataclass(frozen=True)
class Mutant:
    """An allocator with one defect."""

    name: str
    defect: str
    make: Callable[[], BlockAllocator]
    kill: Callable[[Callable[[], BlockAllocator]], None]
    """Runs the part of the kit that must fail."""

    @property
    def is_race(self) -> bool:
        """Whether only threads that run at the same time can kill it."""
        return self.kill is not _calls


def killed_by(mutant: Mutant) -> str | None:
    """The invariant that the kit found broken, or None if the mutant survived."""
    try:
        with frequent_switches():
            mutant.kill(mutant.make)
    except ConformanceFailure as failure:
        return failure.invariant
    return None


def edited(module: str, *edits: tuple[str, str]) -> ModuleType:
    """A copy of a module of `allocators` with pieces of its source replaced, each of which must occur once."""
    name = f"allocators.{module}"
    source = inspect.getsource(importlib.import_module(name))
    for old, new in edits:
        if source.count(old) != 1:
            raise LookupError(f"{name}: expected {old!r} once, found it {source.count(old)} times")
        source = source.replace(old, new)
    mutated = ModuleType(name)
    # no file of this name exists, so that nothing of it goes into the cache of compiled functions
    exec(compile(source, f"<mutant of {name}>", "exec"), mutated.__dict__)
    return mutated


def _edit(
    name: str,
    defect: str,
    where: str,
    edit: tuple[str, str],
    *,
    kill: Any = None,
    num_granules: int = 64,
    **options: Any,
) -> Mutant:
    """A mutant by one edit of the source of the allocator, compiled when it is first made."""
    made: list[Any] = []
    module, _, cls = where.partition(":")

    def make() -> BlockAllocator:
        if not made:
            made.append(getattr(edited(module, edit), cls))
        if cls == "EpochPool":
            pool: BlockAllocator = made[0](BuddyAllocator(num_granules), **options)
        else:
            pool = made[0](num_granules, **options)
        return _blind(pool)

    return Mutant(name, defect, make, kill or _calls)


def _blind(pool: Any) -> BlockAllocator:
    """Let the pool find nothing wrong with itself: what a caller sees must be enough to kill it."""
    pool.check_integrity = lambda: None
    blind: BlockAllocator = pool
    return blind


def _calls(make: Callable[[], BlockAllocator]) -> None:
    run_conformance(make, max_examples=400, num_steps=40, seed=1, shrink=False)


def _many_threads(make: Callable[[], BlockAllocator]) -> None:
    for seed in range(10):
        run_threads(make, max_examples=10, num_ops=4000, seed=seed)


def _loops(make: Callable[[], BlockAllocator]) -> None:
    for seed in range(20):
        hammer(make, num_ops=4000, seed=seed)


def _quotas(make: Callable[[], BlockAllocator]) -> None:
    for seed in range(60):
        stay_within_quotas(make, num_threads=3, num_ops=1000, seed=seed)


def _races(make: Callable[[], BlockAllocator]) -> None:
    for seed in range(30):
        race_to_free(make, num_threads=2, num_rounds=3, seed=seed)


# -- defects that a subclass can plant ---------------------------------------------------------------------------------


class _NoLock:
    """Looks like a lock."""

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


def _without_lock(pool: Any) -> Any:
    pool._lock = _NoLock()
    return _blind(pool)


class _AllowsOverlap(BuddyAllocator):
    def _free(self, starts: Any, sizes: Any) -> int:
        _, first = np.unique(starts, return_index=True)
        return super()._free(starts[first], sizes[first])


class _WrapsStarts(BuddyAllocator):
    def free(self, starts: Any, sizes: Any) -> None:
        array = np.asarray(starts)
        super().free(array.astype(np.int32) if array.dtype == np.int64 else starts, sizes)


class _RoundsFloats(SlabAllocator):
    def allocate(self, sizes: Any, *, partial: bool = False) -> Any:
        if isinstance(sizes, list) and any(isinstance(size, float) and size == 1 for size in sizes):
            sizes = [int(size) for size in sizes]
        return super().allocate(sizes, partial=partial)


class _ForgetsReturned(SlabAllocator):
    def _state(self) -> dict[str, Any]:
        return {name: array for name, array in super()._state().items() if name != "returned"}


class _SortsOnRestore(PagedAllocator):
    def _after_restore(self) -> None:
        depth = self._pages.depth[0]
        self._pages.stack[:depth] = np.sort(self._pages.stack[:depth])


class _Boasts(SlabAllocator):
    def _largest_free_unlocked(self) -> int:
        return min(8, self._num_free_unlocked())


class _ReadsThenTakes(BuddyAllocator):
    """Looks for a place and takes it in two steps, each of them under the lock."""

    def allocate(self, sizes: Any, *, partial: bool = False) -> Any:
        starts = super().allocate(sizes, partial=partial)
        if len(starts) == 1 and starts[0] >= 0:
            self.free(starts, sizes)
            with self._lock:
                super()._allocate(np.asarray(sizes, np.int32), starts.copy(), partial)
        return starts


class _ChecksThenFrees(LockFreeAllocator):
    def free(self, starts: Any, sizes: Any) -> None:
        for start, size in zip(np.atleast_1d(starts), np.atleast_1d(sizes), strict=True):
            if not all(self._is_live(granule) for granule in range(int(start), int(start + size))):
                raise InvalidFreeError("free already")
        time.sleep(0)
        with self._lock:
            self._free(as_counts(starts, "starts"), as_counts(sizes, "sizes"))


class _Hangs(PagedAllocator):
    """Waits for a free block instead of saying that there is none."""

    def __init__(self, num_granules: int) -> None:
        super().__init__(num_granules, block_sizes=(8,))
        self._never = threading.Event()

    def allocate(self, sizes: Any, *, partial: bool = False) -> Any:
        if not partial and self.num_free < len(np.asarray(sizes)):
            self._never.wait(60)
        return super().allocate(sizes, partial=partial)


class _FreesLimboOnAdvance(EpochPool):
    def advance(self) -> int:
        epoch = super().advance()
        if epoch >= 2:
            self.complete(epoch - 2)
        return epoch


MUTANTS: tuple[Mutant, ...] = (
    # frees
    _edit(
        "paged-double-free",
        "a block that is free may be freed again",
        "paged:PagedAllocator",
        ("if not (live[granule // block] >> (granule % block)) & 1:", "if granule < 0:"),
    ),
    Mutant(
        "buddy-overlap-in-call",
        "a run that stands twice in a call counts once",
        lambda: _blind(_AllowsOverlap(24)),
        _calls,
    ),
    Mutant("buddy-wrapping-starts", "starts are cut to 32 bits unchecked", lambda: _blind(_WrapsStarts(24)), _calls),
    _edit(
        "paged-leaks-parts",
        "a block freed in parts is never free again",
        "paged:PagedAllocator",
        ("if pages.live[page] == 0 and not", "if pages.live[page] == 0 and sizes[i] >= block and not"),
    ),
    _edit(
        "paged-error-changes-state",
        "a refused call keeps the runs before the bad one freed",
        "paged:PagedAllocator",
        ("            for j in range(i):\n", "            for j in range(0):\n"),
    ),
    _edit(
        "slab-never-unowned",
        "an empty slab stays with its size: nothing coalesces",
        "slab:SlabAllocator",
        ("if slabs.free[i] == slabs.valid[i]:", "if slabs.free[i] == 0:"),
        num_granules=200,
    ),
    # grants
    _edit(
        "paged-partial-short",
        "a partial call stops one block early",
        "paged:PagedAllocator",
        ("granted = min(len(starts), pages.depth[0])", "granted = min(len(starts), pages.depth[0] - int(partial))"),
    ),
    _edit(
        "paged-misaligned",
        "blocks start half a block late",
        "paged:PagedAllocator",
        ("starts[i] = taken * block\n", "starts[i] = taken * block + block // 2\n"),
    ),
    _edit(
        "buddy-no-rollback",
        "a batch that does not fit keeps what it took",
        "buddy:BuddyAllocator",
        ("if granted < len(sizes):", "if granted < 0:"),
    ),
    _edit(
        "buddy-one-short",
        "the last granule is never granted",
        "buddy:BuddyAllocator",
        ("if wanted <= pool.num_free[0]:", "if wanted < pool.num_free[0]:"),
    ),
    _edit(
        "buddy-mask-off-by-one",
        "taking a block clears one bit too few",
        "buddy:BuddyAllocator",
        ("run = ((1 << (1 << order)) - 1) << start", "run = ((1 << (1 << order)) - (2 if order == 3 else 1)) << start"),
    ),
    Mutant("slab-rounds-floats", "sizes of 1.0 are taken for 1", lambda: _blind(_RoundsFloats(64)), _calls),
    # figures
    _edit(
        "buddy-num-free-drifts",
        "the count misses what fills a superblock",
        "buddy:BuddyAllocator",
        (
            "pool.num_free[0] += _POPCOUNT[mask] - _POPCOUNT[old]",
            "pool.num_free[0] += (_POPCOUNT[mask] or 1) - _POPCOUNT[old]",
        ),
    ),
    Mutant("slab-boasts", "largest_free ignores which size owns a slab", lambda: _blind(_Boasts(64)), _calls),
    # snapshots
    Mutant(
        "slab-forgets-returned",
        "a snapshot leaves out the granules held back",
        lambda: _blind(_ForgetsReturned(64)),
        _calls,
    ),
    Mutant(
        "paged-sorts-on-restore", "a restored pool grants in another order", lambda: _blind(_SortsOnRestore(24)), _calls
    ),
    # epochs and leases
    _edit(
        "epochs-step-early",
        "limbo is freed one epoch too early",
        "epochs:EpochPool",
        ("for past in self._limbo if past <= done)", "for past in self._limbo if past <= done + 1)"),
    ),
    _edit(
        "epochs-first-stream",
        "an epoch ends when the first stream has finished it",
        "epochs:EpochPool",
        ("return min(self._completed.values())", "return max(self._completed.values())"),
        streams=("compute", "copy"),
    ),
    Mutant(
        "epochs-advance-frees",
        "the launch of a step counts as the end of the one before the last",
        lambda: _blind(_FreesLimboOnAdvance(BuddyAllocator(24))),
        _calls,
    ),
    _edit(
        "lease-abort-leaks",
        "an aborted lease does not give its blocks back",
        "epochs:EpochPool",
        ("        self._give_back(journal.runs)\n", "        _mark(self._states, *journal.runs, _NONE)\n"),
    ),
    _edit(
        "lease-nested-lost",
        "aborting a lease forgets what a lease inside it committed",
        "epochs:EpochPool",
        (
            "                parent.runs = np.concatenate([starts, more_starts]), ",
            "                _ = np.concatenate([starts, more_starts]), ",
        ),
    ),
    _edit(
        "lease-commits-over-inner",
        "a lease commits while one inside it is open",
        "epochs:EpochPool",
        ("        if children := self._pool._children_of(self._number):\n", "        if children := []:\n"),
    ),
    # threads
    Mutant("paged-no-lock", "no lock", lambda: _without_lock(PagedAllocator(4096, block_sizes=(8,))), _loops),
    Mutant("buddy-no-lock", "no lock", lambda: _without_lock(BuddyAllocator(4096)), _loops),
    Mutant("slab-no-lock", "no lock", lambda: _without_lock(SlabAllocator(4096)), _loops),
    Mutant(
        "lockfree-checks-then-frees",
        "a free looks first and acts later",
        lambda: _blind(_ChecksThenFrees(1 << 12)),
        _races,
    ),
    Mutant("buddy-look-then-take", "two threads may be given one place", lambda: _blind(_ReadsThenTakes(256)), _loops),
    Mutant(
        "paged-waits",
        "an exhausted pool waits",
        lambda: _blind(_Hangs(24)),
        lambda make: run_threads(make, timeout_s=2),
    ),
    _edit(
        "lockfree-plain-store",
        "a claim is stored instead of compared and swapped",
        "lockfree:LockFreeAllocator",
        (
            "        seen = cas_acq_rel(pool.free, w, word, word & ~_run_mask(start, order))\n        if",
            "        seen = word\n        pool.free[w] = word & ~_run_mask(start, order)\n        if",
        ),
        kill=_loops,
        num_granules=64,
    ),
    _edit(
        "lockfree-no-undoers",
        "a pass does not mind calls that may give back what they took",
        "lockfree:LockFreeAllocator",
        ("        quiet = undoers == own_undoers and", "        quiet = undoers >= 0 or"),
        kill=_quotas,
        num_granules=1024,
    ),
    _edit(
        "lockfree-no-version",
        "one pass that found nothing proves exhaustion",
        "lockfree:LockFreeAllocator",
        ("        if quiet and load_acquire(pool.control, _VERSION) == version:\n", "        if True:\n"),
        kill=_quotas,
        num_granules=1024,
    ),
)
"""One of each. Those under "threads" need a second core."""


def main() -> int:
    """Print the table; 1 if a mutant survived."""
    survivors = 0
    print(f"{'mutant':28} {'killed by':34} defect")
    for mutant in MUTANTS:
        invariant = killed_by(mutant)
        survivors += invariant is None
        print(f"{mutant.name:28} {invariant or 'SURVIVED':34} {mutant.defect}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
