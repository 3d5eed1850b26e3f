"""An allocator that keeps the last block of every call that frees more than one."""

from allocators import BuddyAllocator


class Broken(BuddyAllocator):
    def free(self, starts, sizes):
        keep = -1 if len(starts) > 1 else None
        super().free(starts[:keep], sizes[:keep])
