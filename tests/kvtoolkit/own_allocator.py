"""An allocator of a user's own, named by path in the tests."""

from allocators import BuddyAllocator


class CountingBuddy(BuddyAllocator):
    """Counts its calls."""

    num_calls = 0

    def allocate(self, sizes, *, partial=False):
        self.num_calls += 1
        return super().allocate(sizes, partial=partial)
