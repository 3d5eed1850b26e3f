"""What a pool of blocks finds of each prompt, in a few lines that share nothing with the cache: LRU and the optimum.

The optimum evicts the block that is needed again last (Belady 1966, "A study of replacement algorithms", the rule MIN).
Whenever a block is needed, so is the prefix before it. So among blocks with equal times the deepest goes first, and
what remains is always whole prefixes. All blocks of a request are in the pool while it is served, whatever the rule.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.bench.session_schedule import LAST, Arrival, Schedule

NEVER = (1 << 31) - 1
"""Instead of the number of an arrival: there is none."""
_DEEPER = 1 << 24
Rank = Callable[[int], tuple[Int32Array | int, int]]
"""When the blocks of an arrival's prompt go, and when those of its answer do; the highest rank goes first."""


def lru(schedule: Schedule, capacity: int) -> Int32Array:
    """``[arrivals]`` blocks found of each prompt in a pool of ``capacity`` blocks, if the least recently used go."""
    return _replay(schedule, capacity, lambda index: (NEVER - index, NEVER - index))


def belady(schedule: Schedule, capacity: int, following: Sequence[Int32Array] | None = None) -> Int32Array:
    """``[arrivals]`` blocks found of each prompt if the blocks that are needed again last go.

    Args:
        schedule: of sessions.
        capacity: of the pool, in blocks.
        following: what `next_uses` returns, where it is at hand.
    """
    later = next_uses(schedule.arrivals, schedule.num_ids) if following is None else following
    return _replay(schedule, capacity, lambda index: (later[index], NEVER))


def known_pauses(schedule: Schedule, capacity: int) -> Int32Array:
    """``[arrivals]`` blocks found of each prompt if an engine says at each pause when it ends, and the cache obeys.

    What the session that comes back last has used goes first, and before that what a session has not used again when it
    came back. Unlike `belady`, this knows nothing of what prompts will have in common.
    """
    arrivals = schedule.arrivals
    return _replay(
        schedule, capacity, lambda index: (_or_never(arrivals[index]), _or_never(arrivals[index])), forgets=True
    )


def _or_never(one: Arrival) -> int:
    return NEVER if one.following == LAST else one.following


def next_uses(arrivals: Sequence[Arrival], num_ids: int) -> list[Int32Array]:
    """For each arrival, ``[n]`` the next arrival that has each of its blocks, or `NEVER`."""
    soonest = np.full(num_ids, NEVER, np.int32)
    found = []
    for index in range(len(arrivals) - 1, -1, -1):
        blocks = arrivals[index].blocks
        found.append(soonest[blocks])
        soonest[blocks] = index
    return found[::-1]


def _replay(schedule: Schedule, capacity: int, rank: Rank, *, forgets: bool = False) -> Int32Array:
    """Serve all arrivals.

    Args:
        schedule: of sessions.
        capacity: of the pool, in blocks.
        rank: see there.
        forgets: whether what an arrival does not use of what its stream used before goes first from then on.
    """
    before: dict[int, Int64Array] = {}
    next_answer = schedule.num_ids
    ranks: Int64Array = np.zeros(next_answer + sum(one.num_out for one in schedule.arrivals), np.int64)
    is_cached: NDArray[np.bool_] = np.zeros(len(ranks), np.bool_)
    found = np.zeros(len(schedule.arrivals), np.int32)
    for index, one in enumerate(schedule.arrivals):
        missing = np.flatnonzero(~is_cached[one.blocks])
        found[index] = missing[0] if len(missing) else len(one.blocks)
        is_cached[one.blocks] = False
        others = np.flatnonzero(is_cached)
        # one block is for the tokens after the last full one
        surplus = len(others) + len(one.blocks) + one.num_out + 1 - capacity
        if surplus > 0:
            is_cached[others[np.argpartition(ranks[others], len(others) - surplus)[len(others) - surplus :]]] = False
        if forgets and one.stream in before:
            stale = before[one.stream]
            ranks[stale] = NEVER * _DEEPER + ranks[stale] % _DEEPER
        answers = np.arange(next_answer, next_answer + one.num_out)
        next_answer += one.num_out
        is_cached[one.blocks] = is_cached[answers] = True
        of_prompt, of_answer = rank(index)
        depth = np.arange(len(one.blocks) + one.num_out)
        ranks[one.blocks] = np.int64(of_prompt) * _DEEPER + depth[: len(one.blocks)]
        ranks[answers] = of_answer * _DEEPER + depth[len(one.blocks) :]
        if forgets:
            before[one.stream] = np.concatenate([one.blocks, answers])
    return found
