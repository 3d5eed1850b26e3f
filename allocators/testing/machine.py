"""The conformance machine: random calls of an allocator beside a set model, every promise of the protocol a check."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial as bound
from typing import Any, ClassVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition

from allocators.errors import AllocatorError, ContendedError, IntegrityError, OutOfBlocksError, SnapshotError
from allocators.protocol import GRANULE, SUPERBLOCK, AllocatorStats, BlockAllocator
from allocators.testing.failure import difference, expect, fail
from allocators.testing.model import PoolModel, Run
from allocators.testing.recording import Recorder, literal
from allocators.testing.recording import recorded_invariant as invariant
from allocators.testing.recording import recorded_rule as rule

Make = Callable[[], BlockAllocator]
"""Makes a fresh pool. Every call must return a new object of the same kind."""

PICKS = st.lists(st.integers(0, 99), max_size=10)
SOME_PICKS = st.lists(st.integers(0, 99), min_size=1, max_size=10)
FEW_PICKS = st.lists(st.integers(0, 99), max_size=4)
PICK = st.integers(0, 99)
SHUFFLE = st.integers(0, 999)

_FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "int32": lambda values: np.array(values, np.int32),
    "int64": lambda values: np.array(values, np.int64),
    "strided": lambda values: np.repeat(np.array(values, np.int32), 2)[::2],
}
FORM = st.sampled_from(sorted(_FORMS))

_BAD_SIZES: dict[str, Any] = {
    "zero": [0],
    "negative": [-1],
    "three": [3],
    "wraps to 8": np.array([(1 << 32) + 8], np.int64),
    "wraps to 1": np.array([(1 << 32) + 1], np.int64),
    "minus 8": [-8],
    "nine": [9],
    "floats": [1.0],
    "NaN": [float("nan")],
    "booleans": [True],
    "text": ["8"],
    "two-dimensional": [[8]],
    "a scalar": 8,
    "ragged": [[8], [8, 8]],
}


@dataclass
class _Saved:
    """A snapshot, the model at that moment, and the calls that have succeeded since."""

    data: bytes
    model: PoolModel
    extra: Any
    figures: dict[str, Any]
    calls: list[tuple[str, tuple[Any, ...], Any]] = field(default_factory=list)


class AllocatorMachine(RuleBasedStateMachine):
    """No granule ever has two owners, and the rest of the protocol. `conformance_machine` fills in ``make``."""

    make: ClassVar[Make]
    is_deterministic: ClassVar[bool] = True
    """Whether equal histories must lead to equal pools: what the classes of this project promise."""
    recorder: ClassVar[Recorder] = Recorder()

    def __init__(self) -> None:
        super().__init__()
        self.recorder.begin()
        self.pool = self.make_pool()
        self.base = base_of(self.pool)
        # Probes run on twins, so that a restore cannot mend what is derived from the state of the pool under test.
        self.twins = (base_of(self.make_pool()), base_of(self.make_pool()))
        self.model = PoolModel(self.pool.num_granules)
        self.fresh = self.pool.stats()
        self.sizes = sizes_on_offer(self.pool)
        self.saved: _Saved | None = None
        expect(self.fresh.num_free == self.pool.num_granules, "conserved", "a fresh pool is not wholly free")

    @classmethod
    def make_pool(cls) -> BlockAllocator:
        return cls.make()

    # -- allocate ----------------------------------------------------------------------------------------------------

    @rule(picks=PICKS, partial=st.booleans(), form=FORM)
    def allocate(self, picks: list[int], partial: bool, form: str) -> None:
        """A batch of mixed sizes."""
        self.grant([self.sizes[pick % len(self.sizes)] for pick in picks], partial, form)

    @rule(pick=PICK, sixteenths=st.integers(0, 17), partial=st.booleans())
    def allocate_many(self, pick: int, sixteenths: int, partial: bool) -> None:
        """A share of the pool in blocks of one size, up to more than all of it."""
        size = self.sizes[pick % len(self.sizes)]
        count = self.pool.num_granules // size * sixteenths // 16 + 1
        self.grant([size] * count, partial, "int32")

    def grant(self, sizes: list[int], partial: bool, form: str) -> None:
        before = self.fingerprint()
        line = f"pool.allocate({literal(sizes)}{', partial=True' if partial else ''})"
        try:
            starts = self.recorder.call(line, lambda: call(self.pool.allocate, _FORMS[form](sizes), partial=partial))
        except OutOfBlocksError as error:
            expect(not partial, "partial", f"a partial call for {sizes} raised {error!r}")
            self.refused(before, f"allocate({sizes})")
            self.check_exhausted(sizes, error)
            return
        granted = self.check_starts(starts, sizes, partial)
        for start, size in zip(starts[:granted].tolist(), sizes, strict=False):
            self.model.take(start, size)
        self.note("allocate", (list(sizes), partial), starts.tolist())
        if granted < len(sizes):
            rest = sizes[granted]
            expect(not self.fits([rest]), "partial", f"stopped before size {rest} of {sizes}, which fits")

    def check_starts(self, starts: Any, sizes: list[int], partial: bool) -> int:
        """Number of blocks granted, the form of the answer being right."""
        expect(isinstance(starts, np.ndarray), "exact counts", f"expected an array, got {type(starts).__name__}")
        expect(
            starts.shape == (len(sizes),) and starts.dtype == np.int32,
            "exact counts",
            f"expected {len(sizes)} int32 starts, got {starts.shape} {starts.dtype}",
        )
        refused = np.flatnonzero(starts == -1)
        granted = int(refused[0]) if len(refused) else len(sizes)
        expect(partial or granted == len(sizes), "exact counts", f"{granted} of {len(sizes)} granted without an error")
        expect(len(refused) == len(sizes) - granted, "partial", f"a start follows the first -1: {starts.tolist()}")
        return granted

    def check_exhausted(self, sizes: list[int], error: OutOfBlocksError) -> None:
        """The error was right if the sizes, one by one and largest first, do not fit either."""
        expect(not isinstance(error, ContendedError), "exact exhaustion", f"one thread alone got {error!r}")
        expect(not self.fits(sizes), "exact exhaustion", f"{sizes} fit one by one, largest first, but: {error}")

    def fits(self, sizes: list[int]) -> bool:
        """Whether a twin in the state of the pool grants the sizes one by one, largest first."""
        twin = self.twins[0]
        twin.restore(self.base.snapshot())
        return all(len(grant_up_to(twin, size, 1)) for size in sorted(sizes, reverse=True))

    # -- free --------------------------------------------------------------------------------------------------------

    @rule(picks=SOME_PICKS, form=FORM)
    def free_blocks(self, picks: list[int], form: str) -> None:
        """Whole blocks, or what is left of them, in drawn order."""
        self.release(self.pick_pieces(picks), form)

    @rule(pick=PICK, first=st.integers(0, 7), count=st.integers(1, 8))
    def free_part(self, pick: int, first: int, count: int) -> None:
        """Part of a block."""
        for start, size in self.pick_pieces([pick]):
            first %= size
            self.release([(start + first, min(count, size - first))], "list")

    @rule(pick=PICK, first=st.integers(0, 40), count=st.integers(1, 60))
    def free_run(self, pick: int, first: int, count: int) -> None:
        """A run that may begin and end inside blocks and span several."""
        runs = self.model.live_runs()
        if runs:
            start, size = runs[pick % len(runs)]
            first %= size
            self.release([(start + first, min(count, size - first))], "int64")

    @rule(picks=SOME_PICKS, shuffle=SHUFFLE)
    def free_shards(self, picks: list[int], shuffle: int) -> None:
        """Blocks cut into granules, all in one call, in any order."""
        shards = [(granule, 1) for start, size in self.pick_pieces(picks) for granule in range(start, start + size)]
        random.Random(shuffle).shuffle(shards)
        self.release(shards, "int32")

    @rule(offset=st.integers(0, 3), stride=st.integers(1, 4), shuffle=SHUFFLE)
    def free_many(self, offset: int, stride: int, shuffle: int) -> None:
        """Every so many blocks."""
        runs = self.model.pieces()[offset::stride]
        random.Random(shuffle).shuffle(runs)
        self.release(runs, "strided")

    def pick_pieces(self, picks: list[int]) -> list[Run]:
        pieces = self.model.pieces()
        return [pieces.pop(pick % len(pieces)) for pick in picks[: len(pieces)]]

    def release(self, runs: list[Run], form: str) -> None:
        for start, size in runs:
            self.model.give(start, size)
        line = call_of("free", runs)
        self.recorder.call(line, lambda: self.must("free", lambda: self.pool.free(*columns(runs, form))))
        self.note("free", columns(runs, "list"), None)

    # -- misuse ------------------------------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(sorted(_BAD_SIZES)), partial=st.booleans())
    def allocate_wrongly(self, kind: str, partial: bool) -> None:
        """A size that is not on offer, or no vector of integers."""
        sizes = _BAD_SIZES[kind]
        line = f"pool.allocate({sizes!r}{', partial=True' if partial else ''})"
        self.must_refuse(f"allocate, {kind}", lambda: self.pool.allocate(sizes, partial=partial), line)

    @rule(pick=PICK, good=PICKS)
    def allocate_size_not_on_offer(self, pick: int, good: list[int]) -> None:
        """One wrong size among right ones."""
        wrong = [size for size in range(1, SUPERBLOCK + 8) if size not in self.sizes and size != 2 * SUPERBLOCK]
        sizes = [*(self.sizes[i % len(self.sizes)] for i in good), wrong[pick % len(wrong)]]
        line = f"pool.allocate({literal(sizes)})"
        self.must_refuse("allocate, a size not on offer", lambda: self.pool.allocate(sizes), line)

    @rule(pick=PICK, good=PICKS, after=st.booleans(), one_call=st.booleans())
    def free_twice(self, pick: int, good: list[int], after: bool, one_call: bool) -> None:
        """A granule that is free already or was never handed out; or, in one call, the same granule twice."""
        runs = self.pick_pieces(good)
        if one_call and runs:
            start, size = runs[pick % len(runs)]
            wrong = (start + pick % size, 1)
        elif not one_call and self.model.not_live():
            dead = self.model.not_live()
            wrong = (dead[pick % len(dead)], 1)
        else:
            return
        self.must_refuse_free([*runs, wrong] if after else [wrong, *runs], "a granule that is not live")

    @rule(pick=PICK, good=PICKS)
    def free_beyond_a_run(self, pick: int, good: list[int]) -> None:
        """A live run and one granule more."""
        runs = self.model.live_runs()
        if runs:
            start, size = runs[pick % len(runs)]
            longer = (start, size + 1) if pick % 2 else (start - 1, size + 1)
            others = [run for run in self.pick_pieces(good) if not start <= run[0] < start + size]
            self.must_refuse_free([*others, longer], "a run longer than what is live")

    @rule(
        wrong=st.sampled_from(["beyond", "across the end", "negative", "no granule", "negative size", "huge", "wraps"]),
        good=PICKS,
    )
    def free_out_of_range(self, wrong: str, good: list[int]) -> None:
        """A run that is none of the pool's."""
        n = self.pool.num_granules
        first = self.model.live_runs()[0][0] if self.model.live else 0
        run = {
            "beyond": (n, 1),
            "across the end": (n - 1, 2),
            "negative": (-1, 1),
            "no granule": (first, 0),
            "negative size": (first, -1),
            "huge": (first, 1 << 30),
            "wraps": (first + (1 << 32), 1),
        }[wrong]
        self.must_refuse_free([*self.pick_pieces(good), run], wrong, "int64")

    @rule(kind=st.sampled_from(["floats", "two-dimensional", "more starts", "more sizes", "a scalar", "text"]))
    def free_wrongly(self, kind: str) -> None:
        """Starts and sizes that are no two vectors of integers of one length."""
        if not self.model.live:
            return
        start, size = self.model.pieces()[0]
        starts, sizes = {
            "floats": ([float(start)], [size]),
            "two-dimensional": ([[start]], [[size]]),
            "more starts": ([start, start], [size]),
            "more sizes": ([start], [size, size]),
            "a scalar": (start, size),
            "text": ([str(start)], [size]),
        }[kind]
        line = f"pool.free({starts!r}, {sizes!r})"
        self.must_refuse(f"free, {kind}", lambda: self.pool.free(starts, sizes), line)  # type: ignore[arg-type]

    def must_refuse_free(self, runs: list[Run], what: str, form: str = "list") -> None:
        starts, sizes = columns(runs, form)
        self.must_refuse(f"free, {what}", lambda: self.pool.free(starts, sizes), call_of("free", runs))

    def must_refuse(self, what: str, action: Callable[[], Any], line: str) -> None:
        """The call, ``line`` in the script, raises an AllocatorError, and nothing has changed."""
        before = self.fingerprint()
        try:
            self.recorder.call(line, lambda: call(action))
        except AllocatorError:
            self.refused(before, what)
        else:
            fail("misuse is refused", f"{what}: no error")

    def refused(self, before: dict[str, Any], what: str) -> None:
        for name, now in self.fingerprint().items():
            same = before[name] == now
            expect(same, "a refused call changes nothing", f"{what}: {name}: {difference(before[name], now)}")

    # -- snapshots ---------------------------------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        """Keep a snapshot for `replay` and `rewind`."""
        if self.may_save():
            data = self.must("snapshot", self.pool.snapshot)
            self.recorder.call("saved = pool.snapshot()", lambda: None)
            self.saved = _Saved(data, self.model.copy(), self.extra(), self.figures(self.pool))

    @precondition(lambda self: self.saved is not None)
    @rule()
    def rewind(self) -> None:
        """Return to the snapshot."""
        assert self.saved is not None
        saved = self.saved
        self.recorder.call("pool.restore(saved)", lambda: self.must("restore", lambda: self.pool.restore(saved.data)))
        self.model = saved.model.copy()
        self.set_extra(saved.extra)
        saved.calls.clear()
        changed = difference(saved.figures, self.figures(self.pool))
        expect(not changed, "snapshot and restore", f"a restored pool has other figures: {changed}")
        if self.is_deterministic:
            changed = difference(saved.data, self.pool.snapshot())
            expect(not changed, "snapshot and restore", f"the snapshot of a restored pool differs: {changed}")

    @precondition(lambda self: self.saved is not None and self.is_deterministic)
    @rule()
    def replay(self) -> None:
        """Return to the snapshot and repeat the calls since: the same grants, the same state."""
        assert self.saved is not None
        if not self.may_save():
            return
        saved, now = self.saved, self.pool.snapshot()
        self.recorder.call("pool.restore(saved)  # and the same calls as after it", lambda: None)
        self.must("restore", lambda: self.pool.restore(saved.data))
        for name, arguments, outcome in saved.calls:
            self.check_replayed(name, arguments, outcome)
        changed = difference(now, self.pool.snapshot())
        expect(not changed, "deterministic", f"the same calls led to another state: snapshot(): {changed}")

    def check_replayed(self, name: str, arguments: tuple[Any, ...], outcome: Any) -> None:
        if name == "allocate":
            sizes, partial = arguments
            try:
                again = self.pool.allocate(sizes, partial=partial).tolist()
            except OutOfBlocksError as error:
                again = repr(error)
        else:
            try:
                again = getattr(self.pool, name)(*arguments)
            except AllocatorError as error:
                again = repr(error)
        expect(again == outcome, "deterministic", f"{name}{arguments} gave {outcome}, and {again} when replayed")

    @rule(cut=st.integers(0, 10_000), flip=st.integers(1, 255), truncate=st.booleans())
    def restore_damaged(self, cut: int, flip: int, truncate: bool) -> None:
        """A snapshot with a wrong byte, or a part of one."""
        if not self.may_save():
            return
        data = bytearray(self.pool.snapshot())
        cut %= len(data)
        if truncate:
            del data[cut:]
        else:
            data[cut] ^= flip
        self.must_refuse_snapshot(bytes(data), f"damaged at byte {cut} of a snapshot")

    @rule(data=st.sampled_from([b"", b"a snapshot of something else", None, "text", 7]))
    def restore_foreign(self, data: Any) -> None:
        """Something that is no snapshot."""
        self.must_refuse_snapshot(data, "foreign")

    def must_refuse_snapshot(self, data: Any, what: str) -> None:
        def restore() -> None:
            try:
                self.pool.restore(data)
            except AllocatorError as error:
                expect(isinstance(error, SnapshotError), "misuse is refused", f"restore raised {error!r}")
                raise

        self.must_refuse(f"restore, {what}", restore, f"pool.restore(...)  # {what}")

    def may_save(self) -> bool:
        """Whether the pool can be saved now."""
        return True

    def extra(self) -> Any:
        """What belongs to the model beside its granules."""
        return None

    def set_extra(self, extra: Any) -> None: ...

    def note(self, name: str, arguments: tuple[Any, ...], outcome: Any) -> None:
        if self.saved is not None:
            self.saved.calls.append((name, arguments, outcome))

    # -- recovery, order, truth --------------------------------------------------------------------------------------

    @rule(shuffle=SHUFFLE, one_call=st.booleans())
    def recover(self, shuffle: int, one_call: bool) -> None:
        """Everything is freed: all of the pool can be granted in every size, as by a fresh one."""
        runs = self.model.pieces()
        random.Random(shuffle).shuffle(runs)
        for batch in [runs] if one_call else [[run] for run in runs]:
            self.release(batch, "list")
        check_as_fresh(self.pool.stats(), self.fresh, self.is_deterministic)
        for tokens, count in self.fresh.free_blocks.items():
            size = tokens // GRANULE
            expect(count == self.pool.num_granules // size, "recovery", f"fresh: {count} blocks of {size}")
            self.grant([size] * count, False, "list")
            expect(
                len(self.model.live) == count * size, "recovery", f"{count} blocks of {size} granules were not granted"
            )
            expect(self.pool.num_free == self.pool.num_granules - count * size, "conserved", "a full pool has room")
            self.release(self.model.pieces(), "list")
        self.sound()

    @rule(picks=SOME_PICKS, shuffle=SHUFFLE)
    def free_in_another_order(self, picks: list[int], shuffle: int) -> None:
        """On two twins: the order in which blocks are freed does not matter for what is free then."""
        runs = self.pick_pieces(picks)
        state = self.base.snapshot()
        for twin in self.twins:
            twin.restore(state)
        self.must("free", bound(self.twins[0].free, *columns(runs, "list")))
        random.Random(shuffle).shuffle(runs)
        for run in runs:
            self.must("free", bound(self.twins[1].free, *columns([run], "list")))
        figures = [{**self.figures(twin), "what can be granted": free_set(twin)} for twin in self.twins]
        changed = difference(*figures)
        expect(not changed, "order independence", f"freeing {runs} one by one instead of together: {changed}")

    @rule()
    def tell_the_truth(self) -> None:
        """On a twin: `largest_free` is granted and nothing larger, `free_blocks` are granted and not one more."""
        twin, state, stats = self.twins[0], self.base.snapshot(), self.pool.stats()
        twin.restore(state)
        changed = difference(self.figures(self.base), self.figures(twin))
        expect(not changed, "snapshot and restore", f"another pool, restored, has other figures: {changed}")
        largest = stats.largest_free
        expect(largest == self.pool.largest_free, "truthful figures", "stats() and largest_free disagree")
        if largest:
            expect(len(grant_up_to(twin, largest, 1)) == 1, "truthful figures", f"largest_free {largest} not granted")
            twin.restore(state)
        for size in (*self.sizes, largest + SUPERBLOCK):
            on_offer = size in self.sizes or self.fresh.largest_free > SUPERBLOCK
            if size > largest and on_offer and size % min(size, SUPERBLOCK) == 0:
                refused = not len(grant_up_to(twin, size, 1))
                expect(refused, "truthful figures", f"largest_free is {largest}, and {size} was granted")
        expect(
            sorted(stats.free_blocks) == sorted(self.pool.block_sizes), "truthful figures", "free_blocks: wrong keys"
        )
        for tokens, count in stats.free_blocks.items():
            got = len(grant_up_to(twin, tokens // GRANULE, count + 1))
            expect(got == count, "truthful figures", f"free_blocks[{tokens}] is {count}, {got} were granted")
            twin.restore(state)

    # -- after every rule --------------------------------------------------------------------------------------------

    @invariant()
    def sound(self) -> None:
        """Counts agree with the model, and the allocator finds nothing wrong with itself."""
        stats = self.pool.stats()
        expect(
            stats.num_granules == self.pool.num_granules == self.model.num_granules, "conserved", "the pool has resized"
        )
        expect(
            stats.num_live == self.model.num_owned,
            "conserved",
            f"{self.model.num_owned} granules are handed out, {stats.num_live} by stats()",
        )
        expect(
            stats.num_free == self.pool.num_free, "conserved", f"num_free {self.pool.num_free}, stats {stats.num_free}"
        )
        expect(
            stats.pinned >= 0 and stats.num_free + self.model.num_owned + stats.pinned == stats.num_granules,
            "conserved",
            f"free {stats.num_free} + handed out {self.model.num_owned} + pinned {stats.pinned} "
            f"is not {stats.num_granules}",
        )
        try:
            call(self.pool.check_integrity)
        except IntegrityError as error:
            fail("integrity", str(error))

    def figures(self, pool: BlockAllocator) -> dict[str, Any]:
        """What a pool says of itself; how large its books are is a plug-in's own affair."""
        found = dict(vars(pool.stats()))
        if not self.is_deterministic:
            del found["metadata_nbytes"]
        return found

    def fingerprint(self) -> dict[str, Any]:
        """What a refused call must not change, by name."""
        pool = self.pool
        seen = {"num_free": pool.num_free, "largest_free": pool.largest_free, "stats()": self.figures(pool)}
        return {**seen, "snapshot()": self.base.snapshot()} if self.is_deterministic else seen

    def must(self, what: str, action: Callable[[], Any]) -> Any:
        """The outcome of a call that may not fail."""
        try:
            return call(action)
        except AllocatorError as error:
            fail("proper use is granted", f"{what} raised {error!r}")


def base_of(pool: BlockAllocator) -> BlockAllocator:
    """The allocator inside an epoch pool, or the pool itself."""
    inner: BlockAllocator = pool.inner if is_epoch_pool(pool) else pool  # type: ignore[attr-defined]
    return inner


def is_own(pool: BlockAllocator) -> bool:
    """Whether a pool is of a class of this project, which promises more than the protocol asks for."""
    return type(base_of(pool)).__module__.partition(".")[0] in ("allocators", "kvtoolkit")


def check_as_fresh(stats: AllocatorStats, fresh: AllocatorStats, is_deterministic: bool) -> None:
    """With all freed, nothing is in use; and of our own allocators every figure is as it was."""
    expected = vars(fresh) if is_deterministic else {"num_free": fresh.num_free, "num_live": 0, "pinned": 0}
    changed = difference(expected, {name: getattr(stats, name) for name in expected})
    expect(not changed, "recovery", f"all is free, but not as in a fresh pool: {changed}")


def is_epoch_pool(pool: BlockAllocator) -> bool:
    """Whether the pool has limbo and leases around an inner allocator, as `EpochPool`."""
    return all(hasattr(pool, name) for name in ("inner", "streams", "retire", "complete", "lease"))


def sizes_on_offer(pool: BlockAllocator) -> tuple[int, ...]:
    """Sizes in granules; of long runs, which a fresh pool shows by ``largest_free``, two examples."""
    sizes = tuple(size // GRANULE for size in pool.block_sizes)
    return (*sizes, 2 * SUPERBLOCK, 3 * SUPERBLOCK) if pool.largest_free > SUPERBLOCK else sizes


def columns(runs: list[Run], form: str) -> tuple[Any, Any]:
    """Runs as starts and sizes."""
    return _FORMS[form]([start for start, _ in runs]), _FORMS[form]([size for _, size in runs])


def call_of(name: str, runs: list[Run]) -> str:
    """A call with runs, as Python."""
    starts, sizes = ([run[i] for run in runs] for i in (0, 1))
    return f"pool.{name}({literal(starts)}, {literal(sizes)})"


def grant_up_to(pool: BlockAllocator, size: int, count: int) -> list[int]:
    """Starts of up to ``count`` blocks, taken one by one."""
    starts: list[int] = []
    for _ in range(count):
        try:
            starts += pool.allocate([size]).tolist()
        except OutOfBlocksError:
            break
    return starts


def free_set(pool: BlockAllocator) -> tuple[frozenset[int], ...]:
    """What is granted of each size until nothing is left, small sizes first."""
    return tuple(frozenset(grant_up_to(pool, size // GRANULE, pool.num_granules)) for size in pool.block_sizes)


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call, and let no exception pass but `AllocatorError`."""
    try:
        return function(*arguments, **options)
    except (AllocatorError, AssertionError):
        raise
    except Exception as error:
        fail("only AllocatorErrors", f"{type(error).__name__}: {error}")
