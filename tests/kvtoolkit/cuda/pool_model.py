"""kvt/pool.cuh as generators that stop before every atomic, so that a test can draw the order in which threads go on.

Words have 8 bits here and there are 2 shards of the version: small enough for schedules to be found and shrunk. In the
slab layout a word that is not wholly free serves one order, which stands beside its bits. Names and order of steps are
those of the header; sequentially consistent, so memory orders are tested elsewhere.
"""

from collections.abc import Generator
from typing import Any

WIDTH, SHARDS, EPOCHS, MAX_PASSES, AHEAD = 8, 2, 4, 4, 2
EXHAUSTED, FRAGMENTED, CONTENDED, INVALID = -2, -3, -4, -5

Steps = Generator[None, None, Any]


def fold_runs(word: int, order: int) -> int:
    """A bit at the start of every aligned run of ``2**order`` set bits."""
    run = (1 << (1 << order)) - 1
    return sum(1 << at for at in range(0, WIDTH, 1 << order) if word >> at & run == run)


def spread_runs(starts: int, order: int) -> int:
    run = (1 << (1 << order)) - 1
    return sum(run << at for at in range(WIDTH) if starts >> at & 1)


def lowest_bits(word: int, count: int) -> int:
    kept = 0
    while word and count:
        kept |= word & -word
        word &= word - 1
        count -= 1
    return kept


def bits_of(start: int, count: int) -> int:
    return ((1 << count) - 1) << start % WIDTH


class PoolModel:
    """A pool, and what each granule's owner would say of it.

    Args:
        free: the free words.
        orders: of slabs, what each word serves; None: sizes mix.
        fault: what to do wrong, for the test of the test.
    """

    def __init__(self, free: list[int], orders: list[int] | None = None, fault: str = "") -> None:
        self.free, self.orders, self.fault = list(free), orders and list(orders), fault
        self.limbo = [[0] * len(free) for _ in range(EPOCHS)]
        self.versions, self.hints, self.epoch = [0] * SHARDS, [0] * 4, 0
        # free for certain: set, and the call that set it has returned
        self.settled = list(free)
        self.owners: dict[int, int] = {}

    # -- what threads do: `yield` comes before each atomic --------------------------------------------------------

    def code_of(self, order: int) -> int:
        return EXHAUSTED if order == 0 and not self.orders else FRAGMENTED

    def version(self) -> Steps:
        total = 0
        for shard in range(SHARDS):
            yield
            total += self.versions[shard]
        return total

    def bump_version(self, seed: int) -> Steps:
        yield
        if self.fault != "the version stands still":
            self.versions[seed % SHARDS] += 1

    def word(self, w: int) -> tuple[int, int]:
        """Free bits, and the order served, which one load sees together."""
        return self.free[w], self.orders[w] if self.orders else 0

    def runs(self, seen: tuple[int, int], order: int) -> int:
        free, serves = seen
        if self.orders and free != (1 << WIDTH) - 1 and serves != order:
            return 0
        return fold_runs(free, order)

    def claim_runs(self, w: int, seen: tuple[int, int], order: int, count: int) -> Steps:
        won = 0
        while True:
            runs, whole = self.runs(seen, order), spread_runs(fold_runs(seen[0], 3), 3)
            missing = count - won.bit_count()
            broken = lowest_bits(runs & ~whole, missing)
            starts = broken | lowest_bits(runs & whole, missing - broken.bit_count())
            if not starts:
                return won
            bits = spread_runs(starts, order)
            yield
            old = self.free[w]
            if self.orders:
                is_same = old == seen[0] if self.fault == "the exchange is of the bits alone" else self.word(w) == seen
                if is_same:
                    self._take(w, bits)
                    self.orders[w] = order
                    return starts
                seen = self.word(w)
            elif order == 0:
                self._take(w, old & bits)
                won |= old & bits
                seen = old & ~bits, 0
                if won.bit_count() == count:
                    return won
                if won and self.fault == "a claim that lost a part gives up":
                    return won
            elif self.fault == "a run is claimed by fetch_and":
                self._take(w, old & bits)
                return starts
            elif old == seen[0]:
                self._take(w, bits)
                return starts
            elif self.fault == "a lost exchange is not noticed":
                return starts
            else:
                seen = old, 0

    def allocate(self, order: int, home: int) -> Steps:
        """Returns a granule or a code."""
        yield
        start = yield from self.claim_runs(home, self.word(home), order, 1)
        if start:
            return home * WIDTH + start.bit_length() - 1
        for _ in range(MAX_PASSES):
            yield
            proved = self.hints[order]
            before = yield from self.version()
            if proved == before + 1:
                return self.code_of(order)
            for i in range(len(self.free)):
                w = (home + i) % len(self.free)
                yield
                start = yield from self.claim_runs(w, self.word(w), order, 1)
                if start:
                    return w * WIDTH + start.bit_length() - 1
            after = yield from self.version()
            if after == before or self.fault == "one pass decides":
                yield
                self.hints[order] = before + 1
                return self.code_of(order)
        return CONTENDED

    def allocate_warp(self, order: int, home: int, wanted: int) -> Steps:
        """Returns ``wanted`` granules, or fewer and a code."""
        granted: list[int] = []

        def scan(place: int) -> Steps:
            seen = {}
            for rank in range(wanted):
                if place + rank < len(self.free):
                    w = (home + place + rank) % len(self.free)
                    yield
                    seen[w] = self.word(w)
            for w, word in seen.items():
                if len(granted) < wanted and self.runs(word, order):
                    starts = yield from self.claim_runs(w, word, order, wanted - len(granted))
                    granted.extend(w * WIDTH + at for at in range(WIDTH) if starts >> at & 1)

        yield from scan(0)
        for _ in range(MAX_PASSES):
            if len(granted) == wanted:
                return granted
            yield
            proved = self.hints[order]
            before = yield from self.version()
            if proved == before + 1:
                return [*granted, self.code_of(order)]
            for i in range(0, len(self.free), AHEAD * wanted):
                sees_runs = False
                for place in range(i, min(i + AHEAD * wanted, len(self.free))):
                    yield
                    sees_runs |= self.runs(self.word((home + place) % len(self.free)), order) != 0
                for ahead in range(AHEAD if sees_runs else 0):
                    if len(granted) < wanted:
                        yield from scan(i + ahead * wanted)
            if len(granted) == wanted:
                return granted
            after = yield from self.version()
            if after == before:
                yield
                self.hints[order] = before + 1
                return [*granted, self.code_of(order)]
        return granted if len(granted) == wanted else [*granted, CONTENDED]

    def in_limbo(self, w: int) -> Steps:
        bits = 0
        for epoch in range(EPOCHS):
            yield
            bits |= self.limbo[epoch][w]
        return bits

    def give_back(self, start: int, count: int) -> Steps:
        """``Pool::free``."""
        w, bits = start // WIDTH, bits_of(start, count)
        taken = 0
        if self.fault != "limbo is not looked at":
            taken = (yield from self.in_limbo(w)) & bits
        if self.fault == "the version comes before the bit":
            yield from self.bump_version(w)
        yield
        old = self.free[w] & bits
        self.free[w] |= bits & ~taken
        if self.fault != "the version comes before the bit":
            yield from self.bump_version(w)
        if self.fault == "a double free goes through":
            old = 0
        return INVALID if old | taken else 0

    def retire(self, start: int, count: int) -> Steps:
        w, bits = start // WIDTH, bits_of(start, count)
        taken = yield from self.in_limbo(w)
        yield
        taken = (taken | self.free[w]) & bits
        yield
        epoch = self.epoch
        yield
        old = self.limbo[epoch % EPOCHS][w] & bits
        self.limbo[epoch % EPOCHS][w] |= bits & ~taken
        return INVALID if old | taken else 0

    def free_all(self, bitmap: list[int]) -> Steps:
        """What was freed, for the one who asks."""
        freed = []
        for w in range(len(self.free)):
            yield
            if not bitmap[w]:
                continue
            yield
            bits, bitmap[w] = bitmap[w], 0
            yield
            self.free[w] |= bits
            freed += [w * WIDTH + at for at in range(WIDTH) if bits >> at & 1]
        if freed:
            yield from self.bump_version(0)
        return freed

    # -- what the test knows ------------------------------------------------------------------------------------------

    def _take(self, w: int, bits: int) -> None:
        self.free[w] &= ~bits
        self.settled[w] &= ~bits

    def settle(self, granules: list[int]) -> None:
        """The call that freed them has returned."""
        for granule in granules:
            self.settled[granule // WIDTH] |= self.free[granule // WIDTH] & 1 << granule % WIDTH

    def has_settled_run(self, order: int) -> bool:
        serves = (self.orders or [0] * len(self.free))[: len(self.free)]
        return any(self.runs(word, order) for word in zip(self.settled, serves, strict=True))
