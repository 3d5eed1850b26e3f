"""The conformance machine of an `EpochPool`: the same rules, and those of limbo, streams and leases."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition

from allocators.epochs import EpochPool, Lease
from allocators.errors import AllocatorError, LeaseError, OutOfBlocksError
from allocators.testing.failure import difference, expect, fail
from allocators.testing.machine import (
    FEW_PICKS,
    PICK,
    PICKS,
    SHUFFLE,
    SOME_PICKS,
    AllocatorMachine,
    call,
    call_of,
    columns,
    free_set,
)
from allocators.testing.model import Run
from allocators.testing.recording import literal
from allocators.testing.recording import recorded_invariant as invariant
from allocators.testing.recording import recorded_rule as rule

_MAX_STREAMS = 3


@dataclass(eq=False)
class _Future:
    """A lease and what it must hold."""

    name: str
    """In the script."""
    lease: Lease
    runs: list[Run]
    parent: "_Future | None"
    children: list["_Future"] = field(default_factory=list)

    def with_children(self) -> list["_Future"]:
        return [self, *(inner for child in self.children for inner in child.with_children())]


class EpochMachine(AllocatorMachine):
    """No granule is granted while a kernel may still read it, and a future that does not come leaves no trace."""

    pool: EpochPool

    def __init__(self) -> None:
        super().__init__()
        self.epoch = self.pool.epoch
        self.completed = dict.fromkeys(self.pool.streams, self.epoch - 1)
        self.futures: list[_Future] = []
        self.num_leases = 0
        self.ended: list[Lease] = []
        self.order_free = _is_order_free(self)

    # -- epochs ------------------------------------------------------------------------------------------------------

    @rule(picks=SOME_PICKS)
    def retire(self, picks: list[int]) -> None:
        """Blocks that a kernel may still read."""
        self.retire_runs(self.pick_pieces(picks))

    @rule(pick=PICK, first=st.integers(0, 40), count=st.integers(1, 60))
    def retire_run(self, pick: int, first: int, count: int) -> None:
        """A run that may begin and end inside blocks and span several."""
        runs = self.model.live_runs()
        if runs:
            start, size = runs[pick % len(runs)]
            first %= size
            self.retire_runs([(start + first, min(count, size - first))])

    def retire_runs(self, runs: list[Run]) -> None:
        for start, size in runs:
            self.model.retire(start, size, self.epoch)
        action = lambda: self.must("retire", lambda: self.pool.retire(*columns(runs, "int32")))  # noqa: E731
        epoch = self.recorder.call(call_of("retire", runs), action)
        expect(epoch == self.epoch, "epochs", f"retired into epoch {epoch}, expected {self.epoch}")
        self.note("retire", columns(runs, "list"), epoch)

    @rule()
    def advance(self) -> None:
        """The next step is launched."""
        self.epoch += 1
        began = self.recorder.call("pool.advance()", self.pool.advance)
        expect(began == self.epoch, "epochs", f"expected epoch {self.epoch} to begin, got {began}")
        self.note("advance", (), self.epoch)

    @rule(back=st.integers(0, 3), pick=st.none() | PICK)
    def complete(self, back: int, pick: int | None) -> None:
        """One stream, or all, have finished an epoch."""
        epoch = max(0, self.epoch - back)
        streams = list(self.completed)
        stream = None if pick is None else streams[pick % len(streams)]
        self.complete_epoch(epoch, stream)

    def complete_epoch(self, epoch: int, stream: Any = None) -> None:
        for name in self.completed if stream is None else (stream,):
            self.completed[name] = max(self.completed[name], epoch)
        line = f"pool.complete({epoch}{'' if stream is None else f', {stream!r}'})"
        self.recorder.call(line, lambda: self.must("complete", lambda: self.pool.complete(epoch, stream)))
        self.epoch = max(self.epoch, epoch + 1)
        self.model.complete(min(self.completed.values()))
        self.note("complete", (epoch, stream), None)

    @precondition(lambda self: len(self.completed) < _MAX_STREAMS)
    @rule()
    def register_stream(self) -> None:
        """Another stream reads the pool from now on."""
        name = f"stream {len(self.completed)}"
        self.recorder.call(f"pool.register_stream({name!r})", lambda: self.pool.register_stream(name))
        self.completed[name] = self.epoch - 1
        self.saved = None  # a snapshot belongs to a pool with as many streams

    # -- leases ------------------------------------------------------------------------------------------------------

    @rule(picks=FEW_PICKS, within=st.none() | PICK)
    def lease(self, picks: list[int], within: int | None) -> None:
        """Blocks for a future, maybe inside another."""
        parent = None if within is None or not self.futures else self.futures[within % len(self.futures)]
        self.open_lease([self.sizes[pick % len(self.sizes)] for pick in picks], parent)

    def open_lease(self, sizes: list[int], parent: _Future | None) -> _Future | None:
        before, name = self.fingerprint(), f"lease{self.num_leases}"
        line = f"{name} = {parent.name if parent else 'pool'}.lease({literal(sizes)})"
        try:
            lease = self.recorder.call(line, lambda: call((parent.lease if parent else self.pool).lease, sizes))
        except OutOfBlocksError as error:
            self.refused(before, f"lease({sizes})")
            self.check_exhausted(sizes, error)
            return None
        self.check_starts(lease.starts, sizes, partial=False)
        runs = list(zip(lease.starts.tolist(), sizes, strict=True))
        for start, size in runs:
            self.model.take(start, size, into="leased")
        self.num_leases += 1
        future = _Future(name, lease, runs, parent)
        self.futures.append(future)
        if parent:
            parent.children.append(future)
        self.saved = None  # what a lease did cannot be replayed
        return future

    @precondition(lambda self: self.futures)
    @rule(pick=PICK)
    def commit(self, pick: int) -> None:
        """The future came; refused while a future inside it is open."""
        future = self.futures[pick % len(self.futures)]
        if future.children:
            self.must_refuse("commit of a lease with open ones inside", future.lease.commit, f"{future.name}.commit()")
            return
        self.recorder.call(f"{future.name}.commit()", lambda: self.must("commit", future.lease.commit))
        if future.parent:
            future.parent.runs += future.runs
            inside = future.parent.lease
            held = sorted(zip(inside.starts.tolist(), inside.sizes.tolist(), strict=True))
            expect(held == sorted(future.parent.runs), "leases", f"an outer lease holds {held} after a commit inside")
        else:
            self.model.keep(future.runs)
        self.end(future)

    @precondition(lambda self: self.futures)
    @rule(pick=PICK)
    def abort(self, pick: int) -> None:
        """The future did not come, nor those inside it."""
        self.abort_future(self.futures[pick % len(self.futures)])

    def abort_future(self, future: _Future) -> None:
        self.recorder.call(f"{future.name}.abort()", lambda: self.must("abort", future.lease.abort))
        for inner in future.with_children():
            self.model.drop(inner.runs)
        self.end(future)

    def end(self, future: _Future) -> None:
        for inner in future.with_children():
            self.futures.remove(inner)
            self.ended.append(inner.lease)
        if future.parent:
            future.parent.children.remove(future)

    @rule(picks=FEW_PICKS, inner_picks=FEW_PICKS, commit_inside=st.booleans())
    def speculate(self, picks: list[int], inner_picks: list[int], commit_inside: bool) -> None:
        """A future and one inside it, then abort: the pool is exactly as before."""
        before, free_before = self.fingerprint(), self.free_set()
        outer = self.open_lease([self.sizes[pick % len(self.sizes)] for pick in picks], None)
        if outer is None:
            return
        inner = self.open_lease([self.sizes[pick % len(self.sizes)] for pick in inner_picks], outer)
        if inner is not None:
            self.must_refuse("commit of a lease with an open one inside", outer.lease.commit, f"{outer.name}.commit()")
            if commit_inside:
                self.commit(self.futures.index(inner))
        self.abort_future(outer)
        skip = () if self.order_free else ("snapshot()", "epoch snapshot")
        for name, now in self.fingerprint().items():
            same = name in skip or before[name] == now
            expect(same, "speculation", f"after an abort, {name}: {difference(before[name], now)}")
        expect(self.free_set() == free_before, "speculation", "after an abort other blocks are free than before")

    # -- misuse ------------------------------------------------------------------------------------------------------

    @rule(pick=PICK, good=PICKS, what=st.sampled_from(["limbo", "leased"]), how=st.sampled_from(["free", "retire"]))
    def take_back_what_is_held(self, pick: int, good: list[int], what: str, how: str) -> None:
        """A granule in limbo or in a lease is nobody's to free."""
        held = sorted(self.model.limbo if what == "limbo" else self.model.leased)
        if held:
            runs = [*self.pick_pieces(good), (held[pick % len(held)], 1)]
            action = self.pool.free if how == "free" else self.pool.retire
            said = f"{how} of a granule in {what}"
            self.must_refuse(said, lambda: action(*columns(runs, "list")), call_of(how, runs))

    @rule(pick=PICK, good=PICKS)
    def retire_twice(self, pick: int, good: list[int]) -> None:
        """A granule that is not live, or twice in one call."""
        runs, dead = self.pick_pieces(good), self.model.not_live()
        if runs and pick % 2:
            runs.append(runs[pick % len(runs)])
        elif dead:
            runs.append((dead[pick % len(dead)], 1))
        else:
            return
        said = "retire of a granule that is not live, or twice"
        self.must_refuse(said, lambda: self.pool.retire(*columns(runs, "list")), call_of("retire", runs))

    @rule(epoch=st.sampled_from([-1, 1, 10, 1.5, None, True]))
    def complete_wrongly(self, epoch: Any) -> None:
        """An epoch that has not begun, or is none; a stream that nobody registered."""
        future = self.epoch + epoch if isinstance(epoch, int) and not isinstance(epoch, bool) and epoch > 0 else epoch
        line = f"pool.complete({future!r})"
        self.must_refuse("complete of what is no epoch", lambda: self.pool.complete(future), line)
        line = f"pool.complete({self.epoch}, 'nobody')"
        self.must_refuse("complete of an unknown stream", lambda: self.pool.complete(self.epoch, "nobody"), line)

    @precondition(lambda self: self.ended)
    @rule(pick=PICK, how=st.sampled_from(["commit", "abort", "lease"]))
    def use_ended_lease(self, pick: int, how: str) -> None:
        """What has ended stays so."""
        lease = self.ended[pick % len(self.ended)]
        action = {"commit": lease.commit, "abort": lease.abort, "lease": lambda: lease.lease([self.sizes[0]])}[how]
        self.must_refuse(
            f"{how} of an ended lease", action, f"ended_lease.{how}({self.sizes[:1] if how == 'lease' else ''})"
        )

    @precondition(lambda self: self.futures)
    @rule()
    def save_with_open_lease(self) -> None:
        """A journal cannot outlive its object."""
        try:
            call(self.pool.snapshot)
        except LeaseError:
            return
        except AllocatorError as error:
            fail("misuse is refused", f"snapshot with an open lease raised {error!r}")
        fail("misuse is refused", "snapshot with an open lease: no error")

    # -- what the base machine asks for ------------------------------------------------------------------------------

    def may_save(self) -> bool:
        return not self.futures

    def extra(self) -> Any:
        return self.epoch, dict(self.completed)

    def set_extra(self, extra: Any) -> None:
        self.epoch, self.completed = extra[0], dict(extra[1])
        self.ended += [future.lease for future in self.futures]
        self.futures.clear()

    @rule(shuffle=SHUFFLE, one_call=st.booleans())
    def recover(self, shuffle: int, one_call: bool) -> None:
        """Everything is freed, after every future and every epoch has ended."""
        for future in [future for future in self.futures if future.parent is None]:
            self.abort_future(future)
        self.complete_epoch(self.epoch)
        super().recover(shuffle, one_call)

    @invariant()
    def counted(self) -> None:
        """Limbo and leases hold what the model says."""
        limbo, leased = self.pool.num_in_limbo, self.pool.num_leased
        expect(
            limbo == len(self.model.limbo),
            "no reuse before the epoch ends",
            f"{len(self.model.limbo)} granules must wait, {limbo} are in limbo",
        )
        expect(leased == len(self.model.leased), "leases", f"expected {len(self.model.leased)} leased, got {leased}")
        expect(self.pool.epoch == self.epoch, "epochs", f"expected epoch {self.epoch}, got {self.pool.epoch}")

    def fingerprint(self) -> dict[str, Any]:
        pool = self.pool
        more: dict[str, Any] = {"epoch": pool.epoch, "num_in_limbo": pool.num_in_limbo, "num_leased": pool.num_leased}
        if self.is_deterministic and not self.futures:
            more["epoch snapshot"] = pool.snapshot()
        return {**super().fingerprint(), **more}

    def free_set(self) -> tuple[frozenset[int], ...]:
        self.twins[0].restore(self.base.snapshot())
        return free_set(self.twins[0])


def _is_order_free(machine: EpochMachine) -> bool:
    """Whether the snapshot of the inner allocator tells nothing of the order of past calls."""
    snapshots = []
    for twin, step in zip(machine.twins, (1, -1), strict=True):
        size = machine.sizes[0]
        starts = twin.allocate([size] * min(4, twin.num_granules // size))
        for start in starts[::step]:
            twin.free([start], [size])
        snapshots.append(twin.snapshot())
    return snapshots[0] == snapshots[1]
