"""Sessions of a trace of agents: which prefix blocks each request has, and how long the session sleeps after it.

A trace is JSON lines, ``.gz`` or not. A session is a line ``{"trace": name, "block_size": 64}`` and, after it, one line
``[stream, t, in, out, think_s, api_s, keep, new]`` for each request. Stream 0 is the session itself, the others are its
sub-agents. ``t`` is in seconds since the stream began. The ids of the full blocks of a prompt are the first ``keep``
ids of the stream's previous prompt, and then ``new``, a list of a first id, a count, and so on. Equal ids in one
session are the same block with the same prefix; ids of different sessions say nothing of each other.
"""

import gzip
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtoolkit.arrays.types import Int32Array
from kvtoolkit.errors import ArgumentError

BLOCK = 64
"""Tokens of a block of a trace."""
_NUM_FIELDS = 8
_MOST_ID = 1 << 30


@dataclass(frozen=True)
class Request:
    """One request of a session.

    Attributes:
        stream: 0, or the number of a sub-agent.
        time: when it arrives, in seconds since its stream began.
        num_in, num_out: tokens of the prompt and of the answer.
        answer_seconds: from the arrival to the end of the answer.
        keep: how many blocks of the stream's previous prompt it begins with.
        new: ``(first id, count)`` of the blocks after these.
    """

    stream: int
    time: float
    num_in: int
    num_out: int
    answer_seconds: float
    keep: int
    new: tuple[tuple[int, int], ...]

    @property
    def num_blocks(self) -> int:
        """Full blocks of the prompt."""
        return self.num_in // BLOCK


@dataclass
class Session:
    """One session, with its requests in the order of the trace."""

    name: str
    requests: list[Request] = field(default_factory=list)

    @property
    def num_ids(self) -> int:
        """All ids are below this number."""
        return max((first + count for one in self.requests for first, count in one.new), default=0)

    def blocks(self) -> Iterator[Int32Array]:
        """The ids of the full blocks of each prompt."""
        previous: dict[int, Int32Array] = {}
        for one in self.requests:
            runs = [np.arange(first, first + count, dtype=np.int32) for first, count in one.new]
            kept = previous.get(one.stream, np.empty(0, np.int32))[: one.keep]
            previous[one.stream] = ids = np.concatenate([kept, *runs])
            yield ids


def read_sessions(path: str) -> list[Session]:
    """Read all sessions of a trace.

    Raises:
        ArgumentError: the file cannot be read, or a line is not as above; the text has the number of the line.
    """
    opener: Any = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            sessions = list(_sessions(path, file))
    except (OSError, EOFError, UnicodeDecodeError) as error:  # one of gzip, too
        raise ArgumentError(f"--trace: {path} cannot be read: {error}") from error
    if not sessions:
        raise ArgumentError(f"--trace: {path}: expected sessions, got an empty file")
    return sessions


def _sessions(path: str, lines: Iterable[str]) -> Iterator[Session]:
    session: Session | None = None
    last: dict[int, Request] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if isinstance(row, dict):
                if session is not None:
                    yield _complete(session)
                session, last = _begin(row), {}
                continue
            if session is None:
                raise ValueError("expected the line of a session first, got a request")
            request = _request(row)
            _require_follows(request, last.get(request.stream))
        except json.JSONDecodeError as error:
            raise ArgumentError(f"--trace: {path}: line {number}: expected JSON, got {line.strip()!r:.60}") from error
        except ValueError as error:
            raise ArgumentError(f"--trace: {path}: line {number}: {error}") from error
        session.requests.append(request)
        last[request.stream] = request
    if session is not None:
        try:
            yield _complete(session)
        except ValueError as error:
            raise ArgumentError(f"--trace: {path}: at its end: {error}") from error


def _begin(row: dict[str, Any]) -> Session:
    if not isinstance(row.get("trace"), str) or row.get("block_size") != BLOCK:
        raise ValueError(f"expected a session's name as 'trace' and a 'block_size' of {BLOCK}, got {row!r:.80}")
    return Session(row["trace"])


def _complete(session: Session) -> Session:
    if not session.requests:
        raise ValueError(f"expected requests of session {session.name}, got none")
    return session


def _request(row: Any) -> Request:
    if not isinstance(row, list) or len(row) != _NUM_FIELDS:
        raise ValueError(f"expected [stream, t, in, out, think_s, api_s, keep, new], got {row!r:.80}")
    stream, time, num_in, num_out, think, answer, keep, new = row
    if not all(_is_count(value) for value in (stream, num_in, num_out, keep)):
        raise ValueError(f"expected stream, in, out and keep to be numbers from 0 to 2**30, got {row!r:.80}")
    if not all(_is_seconds(value) for value in (time, think, answer)):
        raise ValueError(f"expected t, think_s and api_s to be seconds, got {row!r:.80}")
    if not isinstance(new, list) or len(new) % 2 or not all(_is_count(value) for value in new):
        raise ValueError(f"expected new to be pairs of a first id and a count, got {new!r:.80}")
    pairs = tuple(zip(new[::2], new[1::2], strict=True))
    return Request(stream, float(time), num_in, num_out, float(answer), keep, pairs)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_ID


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _require_follows(request: Request, previous: Request | None) -> None:
    """ValueError unless a request may come after the previous one of its stream."""
    if previous is not None and request.time < previous.time:
        raise ValueError(f"expected t of stream {request.stream} not to fall, got {request.time} after {previous.time}")
    most = previous.num_blocks if previous is not None else 0
    if request.keep > most:
        raise ValueError(f"expected keep to be at most {most}, the blocks before it, got {request.keep}")
    total = request.keep + sum(count for _, count in request.new)
    if total != request.num_blocks:
        raise ValueError(f"expected {request.num_blocks} ids for {request.num_in} tokens, got {total}")
