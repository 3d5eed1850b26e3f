"""Sessions on one clock: which request arrives when, and which one its stream sends next.

Sessions begin at random times. A sub-agent begins when the answer to its session's last request before it is complete.
A request is served at once when it arrives, so a pause lasts from one arrival of a stream to the next, and answers are
a part of it. Everything is counted in blocks of 64 tokens. Tokens of a prompt after its last full block are computed in
any case, so they are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.bench.session_traces import BLOCK, Session

LAST = -1
"""`Arrival.following` of the last request of a stream."""


@dataclass(frozen=True)
class Arrival:
    """A request on the clock of the simulation.

    Attributes:
        time: in seconds.
        stream: a number of the session or sub-agent that no other one has.
        blocks: ``[n]`` ids of the blocks of its prompt; blocks of different sessions have different ids.
        num_out: full blocks of its answer, which no later prompt is taken to have.
        answer_seconds: from the arrival to the end of the answer.
        following: index of the next arrival of the stream, or `LAST`.
    """

    time: float
    stream: int
    blocks: Int32Array
    num_out: int
    answer_seconds: float
    following: int


@dataclass(frozen=True)
class Schedule:
    """Arrivals in order of time.

    Attributes:
        arrivals: see there.
        num_ids: all ids of blocks are below this number.
        num_left_out: requests that are not among the arrivals because they are too long.
    """

    arrivals: tuple[Arrival, ...]
    num_ids: int
    num_left_out: int

    @property
    def num_blocks(self) -> int:
        """Blocks of all prompts together."""
        return sum(len(one.blocks) for one in self.arrivals)


def schedule(sessions: Sequence[Session], num_sessions: int, spread_seconds: float, most_blocks: int) -> Schedule:
    """Choose sessions by a fixed seed, and let them begin at random times.

    Args:
        sessions: of a trace.
        num_sessions: how many to choose; all if there are fewer.
        spread_seconds: they begin within this time.
        most_blocks: requests with more blocks than this, prompt and answer, are left out.
    """
    random = np.random.default_rng(11)
    chosen = random.permutation(len(sessions))[:num_sessions]
    begins = random.random(len(sessions))[: len(chosen)] * spread_seconds
    rows: list[tuple[float, int, Int32Array, int, float]] = []
    first_id, num_streams, num_left_out = 0, 0, 0
    for which, begin in zip(chosen.tolist(), begins.tolist(), strict=True):
        session, streams, end = sessions[which], dict[int, int](), begin
        began: dict[int, float] = {0: begin}
        for request, ids in zip(session.requests, session.blocks(), strict=True):
            stream = streams.setdefault(request.stream, num_streams + len(streams))
            time = began.setdefault(request.stream, end) + request.time
            if request.stream == 0:
                end = time + request.answer_seconds
            num_out = request.num_out // BLOCK
            if len(ids) + num_out + 1 > most_blocks:
                num_left_out += 1
                continue
            rows.append((time, stream, ids + np.int32(first_id), num_out, request.answer_seconds))
        first_id += session.num_ids
        num_streams += len(streams)
    rows.sort(key=lambda row: row[:2])
    following, later = [LAST] * len(rows), dict[int, int]()
    for i in range(len(rows) - 1, -1, -1):
        following[i] = later.get(rows[i][1], LAST)
        later[rows[i][1]] = i
    arrivals = tuple(Arrival(*row, following=index) for row, index in zip(rows, following, strict=True))
    return Schedule(arrivals, first_id, num_left_out)
