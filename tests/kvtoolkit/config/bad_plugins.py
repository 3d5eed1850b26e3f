"""Plug-ins that misbehave, named by path in the tests."""

import numpy as np

from allocators import BuddyAllocator
from kvtoolkit.config.eviction import LRU


class Answers(BuddyAllocator):
    """Answers as it should until ``distort`` is set: a function of the starts and sizes of a grant."""

    distort = None

    def allocate(self, sizes, *, partial=False):
        starts = super().allocate(sizes, partial=partial)
        return starts if self.distort is None or not len(starts) else self.distort(starts.copy(), np.array(sizes))


class Sorts(BuddyAllocator):
    """Sorts the sizes it is given where they are, and grants in that order."""

    def allocate(self, sizes, *, partial=False):
        sizes.sort()
        return super().allocate(sizes, partial=partial)


class OneArray(BuddyAllocator):
    """Answers with one array again and again."""

    def allocate(self, sizes, *, partial=False):
        if not hasattr(self, "answer"):
            self.answer = np.zeros(4096, np.int32)
        starts = self.answer[: len(sizes)]
        starts[:] = super().allocate(sizes, partial=partial)
        return starts


class WrongSize(BuddyAllocator):
    def __init__(self, num_granules, **options):
        super().__init__(2 * num_granules, **options)


class WrongSizes(BuddyAllocator):
    def __init__(self, num_granules, **options):
        super().__init__(num_granules, **options)
        self.block_sizes = (8, 128)


class NotFresh(BuddyAllocator):
    num_free = 8


class ExitsWhenMade(BuddyAllocator):
    def __init__(self, num_granules, **options):
        raise SystemExit("no licence")


class NoAllocator:
    """Two methods of six."""

    def allocate(self, sizes, *, partial=False): ...
    def free(self, starts, sizes): ...


class PolicyThatExits(LRU):
    def __init__(self):
        raise SystemExit(3)


class NeedsArguments(LRU):
    def __init__(self, decay):
        self.decay = decay


called = []


def factory(*arguments, **options):
    called.append(arguments)
    return LRU()


policy = LRU()
