"""Batches for shared reads, one of each kind that the drawn ones of `test_shared` seldom or never are."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.kvtoolkit.attention.pooled_cases import Pooled

BLOCK = 16


class Kind:
    """A pooled batch with an order that brings rows with a common beginning together.

    Args:
        rows: the blocks of each row; rows with a common beginning side by side.
        new: new tokens of each row; None = one.
        is_mixed: the rows are in any order, and ``order`` sorts them; else they are side by side and it is None.
        shape: of heads.
    """

    def __init__(self, rows: list[list[int]], new: list[int] | None = None, *, is_mixed: bool, **shape: int) -> None:
        rng = np.random.default_rng(len(rows))
        counts = np.ones(len(rows), int) if new is None else np.array(new)
        lengths = np.array([len(row) * BLOCK for row in rows]) - rng.integers(0, BLOCK, len(rows))
        lengths = np.where(counts == 0, 0, np.maximum(lengths, counts))
        # blocks that a row may share, in the order of the units
        self.seen = [
            row[: (length - count) // BLOCK] if 1 <= count <= 8 else []
            for row, count, length in zip(rows, counts, lengths, strict=True)
        ]
        self.order = None
        if is_mixed:
            places = rng.permutation(len(rows))
            rows, lengths, counts = [rows[i] for i in places], lengths[places], counts[places]
            self.order = np.argsort(places).astype(np.int32)
        self.pooled = Pooled(
            rows, lengths.tolist(), None if new is None else counts.tolist(), block_size=BLOCK, **shape
        )  # fmt: skip


def numbers() -> Iterator[int]:
    """Block ids that no other row has."""
    return itertools.count()


def family(ids: Iterator[int], common: int, members: int, own: int = 2) -> list[list[int]]:
    """Rows that begin with ``common`` blocks, and go on with one to ``own`` of their own."""
    shared = list(itertools.islice(ids, common))
    return [shared + list(itertools.islice(ids, 1 + i % own)) for i in range(members)]


def nested(ids: Iterator[int], segments: list[int], beginning: tuple[int, ...] = ()) -> list[list[int]]:
    """A binary tree with as many levels as segments, each so many blocks long, and two rows at each of its leaves."""
    if not segments:
        return [[*beginning, next(ids)]]
    longer = (*beginning, *itertools.islice(ids, segments[0]))
    return [row for _ in range(2) for row in nested(ids, segments[1:], longer)]


def rows_40() -> tuple[list[list[int]], list[int] | None]:
    """A unit of 37 tiles of 128 keys, whose items are cut into 9 parts."""
    return family(numbers(), 37 * 8, 40), None


def rows_1023() -> tuple[list[list[int]], list[int] | None]:
    """Families, of which some are large and some too small to pay."""
    ids = numbers()
    return [row for members in (500, 2, 400, 1, 100, 3, 17) for row in family(ids, 8, members)], None


def rows_1024() -> tuple[list[list[int]], list[int] | None]:
    """A row at every position that there is, and one unit of all of them around another."""
    ids = numbers()
    first = list(itertools.islice(ids, 4))
    return [first + row for row in [*family(ids, 6, 100), *family(ids, 1, 924)]], None


def levels_5() -> tuple[list[list[int]], list[int] | None]:
    """More levels than units may have; what the last two share stays in the rests."""
    rows = nested(numbers(), [9, 8, 10, 8, 33])
    return rows, [1 + i % 8 for i in range(len(rows))]


def many_units() -> tuple[list[list[int]], list[int] | None]:
    """Units of which some are cut into parts, with rows between them that share nothing."""
    ids = numbers()
    rows, new = [], []
    families = ((16, 9), (90, 8), (40, 20), (12, 12), (200, 9), (60, 40), (8, 9))
    for number, (common, members) in enumerate(families):
        rows += [*family(ids, common, members), [next(ids), next(ids)]]
        new += [1 + i % 3 for i in range(members)] + [9 * (number % 2)]
    return rows, new


KINDS: dict[str, Callable[[], tuple[list[list[int]], list[int] | None]]] = {
    function.__name__: function for function in (rows_40, rows_1023, rows_1024, levels_5, many_units)
}


def make(name: str, **options: Any) -> Kind:
    """A kind by its name."""
    rows, new = KINDS[name]()
    return Kind(rows, new, **{"is_mixed": False, **options})
