"""Sessions on the real cache, without keys and values: an engine that knows something of their pauses and says it.

One granule (8 slots) of the simulated cache is one block of 64 tokens of the trace. Blocks are found or not found as a
whole either way, but the unit that moves between device and host memory, 8 granules, is 512 tokens of the trace.

The engine closes a sequence when its pause begins, so that what it leaves can be evicted. Before that it may say
`offload` or `retain`. To `prefetch`, it opens the prompt that it has seen last and closes it again.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.bench.session_schedule import LAST, Arrival, Schedule
from kvtoolkit.bench.session_traces import BLOCK
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.cache.state.block_table import NUM_ENTRIES, OPEN
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.formats.entry import GRANULE, TIER_HOT, unpack_entries

_EWMA = 0.5
"""Weight of the last pause in the mean of a session's pauses."""
_FIRST_GUESS = 20.0
"""Seconds: the guess for a session that has not paused yet."""


@dataclass(frozen=True)
class Costs:
    """What it costs to have a token where it is needed.

    Attributes:
        token_nbytes: bytes of a token's keys and values.
        link: bytes per second between host memory and the device.
        prefill: tokens per second that are computed.
    """

    token_nbytes: int = 128 << 10
    link: float = 50e9
    prefill: float = 10_000.0

    def transfer_seconds(self, num_blocks: float) -> float:
        """Time to move blocks of the trace over the link."""
        return num_blocks * BLOCK * self.token_nbytes / self.link

    def compute_seconds(self, num_blocks: float) -> float:
        """Time to compute blocks of the trace."""
        return num_blocks * BLOCK / self.prefill


@dataclass(frozen=True)
class Pause:
    """A pause, as an engine with perfect knowledge would see it.

    Attributes:
        began: when the request was served, in seconds.
        answer_seconds: until the answer is complete; the session waits for nothing else before that.
        ends: when the next request comes, or None if there is none.
        guess: mean of the earlier pauses of the session after their answers, in seconds.
        transfer_seconds: what moving the session takes.
    """

    began: float
    answer_seconds: float
    ends: float | None
    guess: float
    transfer_seconds: float


@dataclass(frozen=True)
class Policy:
    """What an engine says at a pause.

    Attributes:
        has_host: whether the cache has host memory.
        offloads: whether the sequence is offloaded, or None.
        prefetch_at: when its prefetch begins, in seconds, or None for never.
        retain: for how many seconds to retain it.
    """

    has_host: bool = True
    offloads: Callable[[Pause], bool] | None = None
    prefetch_at: Callable[[Pause], float | None] | None = None
    retain: Callable[[Pause], float] | None = None


def _always(pause: Pause) -> bool:
    return True


def _in_time(pause: Pause) -> float | None:
    return None if pause.ends is None else max(pause.began, pause.ends - pause.transfer_seconds)


def _soon(pause: Pause) -> float | None:
    return None if pause.ends is None else max(pause.began, pause.ends - 5)


def _early(pause: Pause) -> float | None:
    return None if pause.ends is None else max(pause.began, pause.ends - 60)


def _after_ten(pause: Pause) -> float | None:
    return pause.began + pause.answer_seconds + 10


def _by_mean(pause: Pause) -> float | None:
    return pause.began + pause.answer_seconds + max(0.0, pause.guess - pause.transfer_seconds)


def _is_long(pause: Pause) -> bool:
    return pause.ends is None or pause.ends - pause.began > 60


def _if_short(pause: Pause) -> float:
    return 600.0 if pause.ends is not None and pause.ends - pause.began <= 30 else 0.0


def _until_end(pause: Pause) -> float:
    return 0.0 if pause.ends is None else pause.ends - pause.began


POLICIES: dict[str, Policy] = {
    "device only": Policy(has_host=False),
    "device only, retain 300 s": Policy(has_host=False, retain=lambda pause: 300.0),
    "device only, retain if short": Policy(has_host=False, retain=_if_short),
    "device only, retain the pause": Policy(has_host=False, retain=_until_end),
    "host": Policy(),
    "prefetch in time": Policy(prefetch_at=_in_time),
    "prefetch in time, retain if short": Policy(prefetch_at=_in_time, retain=_if_short),
    "prefetch 5 s ahead": Policy(prefetch_at=_soon),
    "prefetch 60 s ahead": Policy(prefetch_at=_early),
    "prefetch after 10 s": Policy(prefetch_at=_after_ten),
    "prefetch by mean": Policy(prefetch_at=_by_mean),
    "offload": Policy(offloads=_always),
    "offload, prefetch in time": Policy(offloads=_always, prefetch_at=_in_time),
    "offload, prefetch by mean": Policy(offloads=_always, prefetch_at=_by_mean),
    "offload long, prefetch in time": Policy(offloads=_is_long, prefetch_at=_in_time),
}
"""What is compared. "In time", "ahead", "long", "short" and "the pause" know when the next request comes."""


@dataclass
class Found:
    """What each arrival found, in blocks, and how long it waited, in seconds."""

    on_device: list[float] = field(default_factory=list)
    in_host: list[float] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    num_refused: int = 0
    num_offloaded: int = 0
    num_prefetched: int = 0


class Replay:
    """Serves a schedule with a policy. ``run`` goes through it once."""

    def __init__(
        self, schedule: Schedule, policy: Policy, device_blocks: int, host_blocks: int, costs: Costs, **choice: Any
    ) -> None:
        """Make the cache.

        Args:
            schedule: of sessions.
            policy: what the engine says.
            device_blocks: capacity of the device, a multiple of 8.
            host_blocks: capacity of host memory, if the policy has any.
            costs: see there.
            choice: other fields of the cache's configuration.
        """
        shape: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "max_seqs": 4}
        shape |= {"num_tokens": GRANULE * device_blocks, **choice}
        if policy.has_host:
            shape["tiers"] = {"host": host_blocks * _granule_nbytes(shape)}
        self.cache = KVCache(CacheConfig(**shape), storage=False)
        self.now = 0.0
        state = self.cache._state
        state.now, state.made_at = lambda: self.now, 0.0
        self.found = Found()
        self._schedule, self._policy, self._costs = schedule, policy, costs
        self._next_answer = schedule.num_ids
        self._guesses: dict[int, float] = {}
        self._arriving: dict[int, tuple[float, int]] = {}
        """By stream: when its last prefetch began, and how many blocks it moved."""
        self._prefetches: list[tuple[float, int]] = []
        """A heap of ``(time, arrival that was served last)``."""

    def run(self) -> Found:
        """Serve all arrivals."""
        for index, one in enumerate(self._schedule.arrivals):
            while self._prefetches and self._prefetches[0][0] < one.time:
                self._prefetch(*heapq.heappop(self._prefetches))
            self.now = one.time
            self._serve(index, one)
        stats = self.cache.stats()
        self.found.num_offloaded, self.found.num_prefetched = stats.num_offloaded, stats.num_prefetched
        return self.found

    def _serve(self, index: int, one: Arrival) -> None:
        cache, prompt = self.cache, _prompt(one.blocks)
        (seq_id,), (cached_len,) = cache.open([prompt])
        ids, held = np.array([seq_id]), int(cached_len) // GRANULE
        away = self._num_away(int(seq_id)) if self._policy.has_host else 0
        self._note(one, held, away)
        if away:
            cache.prefetch(ids)
        answer = np.arange(self._next_answer, self._next_answer + one.num_out)
        self._next_answer += one.num_out
        is_served = self._append(ids, prompt[cached_len:])
        is_served = is_served and self._append(ids, _tokens(answer))
        self.found.num_refused += not is_served
        self._pause(index, one, ids)

    def _append(self, ids: Int64Array, tokens: Int64Array) -> bool:
        step = self.cache.begin_step(ids, len(tokens))
        if not step.ok[0]:
            self.cache.abort_step(step)
            return False
        self.cache.end_step(step, tokens)
        return True

    def _note(self, one: Arrival, held: int, away: int) -> None:
        """Note where the prompt was found. What its prefetch has not moved yet counts as in host memory."""
        began, num_moved = self._arriving.pop(one.stream, (0.0, 0))
        late = 0.0
        if num_moved:
            time_left = began + self._costs.transfer_seconds(num_moved) - self.now
            late = max(0.0, time_left / self._costs.transfer_seconds(1))
        in_host = min(float(held), away + late)
        missing = len(one.blocks) - held
        self.found.on_device.append(held - in_host)
        self.found.in_host.append(in_host)
        self.found.missing.append(missing)
        self.found.waits.append(self._costs.transfer_seconds(in_host) + self._costs.compute_seconds(missing))

    def _pause(self, index: int, one: Arrival, ids: Int64Array) -> None:
        """Say what the policy says, and close the sequence."""
        policy, ends = self._policy, None
        if one.following != LAST:
            ends = self._schedule.arrivals[one.following].time
        guess = self._guesses.get(one.stream, _FIRST_GUESS)
        pause = Pause(one.time, one.answer_seconds, ends, guess, self._costs.transfer_seconds(len(one.blocks)))
        if ends is not None:
            length = max(0.0, ends - one.time - one.answer_seconds)
            known = one.stream in self._guesses
            self._guesses[one.stream] = _EWMA * length + (1 - _EWMA) * guess if known else length
        if policy.retain is not None:
            self.cache.retain(ids, policy.retain(pause))
        if policy.offloads is not None and policy.offloads(pause):
            self.cache.offload(ids)
        self.cache.close(ids)
        self._let_others_step()
        at = None if policy.prefetch_at is None else policy.prefetch_at(pause)
        if at is not None and (ends is None or at < ends):
            heapq.heappush(self._prefetches, (at, index))

    def _prefetch(self, time: float, index: int) -> None:
        self.now, one = time, self._schedule.arrivals[index]
        (seq_id,), _ = self.cache.open([_prompt(one.blocks)])
        num_away = self._num_away(int(seq_id))
        if num_away:
            self.cache.prefetch([seq_id])
            self._arriving[one.stream] = time, num_away
        self.cache.close([seq_id])
        self._let_others_step()

    def _let_others_step(self) -> None:
        """Begin a step, as an engine does all the time; it finishes the moves whose copies are done."""
        self.cache.abort_step(self.cache.begin_step([], 0))

    def _num_away(self, seq_id: int) -> int:
        """Granules of a sequence that are in host memory."""
        state = self.cache._state
        table, (row,) = state.group.table, state.rows_of([seq_id], (OPEN,))
        granules, lengths, _ = unpack_entries(table.entries[row, : table.info[row, NUM_ENTRIES]])
        return int(lengths[granules >= self.cache.config.tier_granules[TIER_HOT]].sum())


def _granule_nbytes(shape: dict[str, Any]) -> int:
    return int(2 * 2 * shape["num_layers"] * shape["num_kv_heads"] * shape["head_dim"] * GRANULE)


def _tokens(blocks: Int64Array | Int32Array) -> Int64Array:
    """The token ids that stand for blocks: one granule for each."""
    tokens: Int64Array = (blocks.astype(np.int64)[:, None] * GRANULE + np.arange(GRANULE)).ravel()
    return tokens


def _prompt(blocks: Int32Array) -> Int64Array:
    """The tokens of a prompt, and one token after its last block, because a cache never finds a whole prompt."""
    return np.append(_tokens(blocks), -1)
