"""What a user might write: the whole protocol in pure Python."""

import json
import threading
import zlib

import numpy as np

from allocators import AllocatorStats, BlockAllocator, IntegrityError, InvalidFreeError, OutOfBlocksError, SnapshotError
from allocators.errors import InvalidSizeError
from allocators.protocol import as_counts, check_num_granules


class TinyAllocator(BlockAllocator):
    """First fit over a set of free granules."""

    def __init__(self, num_granules, *, block_sizes=(8, 16, 32, 64)):
        self.num_granules = check_num_granules(num_granules)
        self.block_sizes = tuple(block_sizes)
        self._free = set(range(num_granules))
        self._lock = threading.RLock()

    @property
    def num_free(self):
        return len(self._free)

    @property
    def largest_free(self):
        return max((size for size in (1, 2, 4, 8) if self._places(size)), default=0)

    def _places(self, size):
        return [s for s in range(0, self.num_granules, size) if self._free.issuperset(range(s, s + size))]

    def allocate(self, sizes, *, partial=False):
        sizes = as_counts(sizes, "sizes").tolist()
        if not {1, 2, 4, 8}.issuperset(sizes):
            raise InvalidSizeError(f"sizes: expected 1, 2, 4 or 8 granules, got {sizes}")
        with self._lock:
            starts, before = np.full(len(sizes), -1, np.int32), set(self._free)
            for i in range(len(sizes)) if partial else sorted(range(len(sizes)), key=lambda i: -sizes[i]):
                if not (places := self._places(sizes[i])):
                    if partial:
                        break
                    self._free = before
                    raise OutOfBlocksError(f"asked for {sizes}, {self.num_free} granules free")
                starts[i] = places[0]
                self._free -= set(range(places[0], places[0] + sizes[i]))
            return starts

    def free(self, starts, sizes):
        starts, sizes = as_counts(starts, "starts").tolist(), as_counts(sizes, "sizes").tolist()
        if len(starts) != len(sizes) or any(not 1 <= size <= self.num_granules for size in sizes):
            raise InvalidFreeError(f"expected sizes of at least 1 granule, one for each start, got {sizes}")
        runs = [granule for s, n in zip(starts, sizes, strict=True) for granule in range(s, s + n)]
        with self._lock:
            if len(set(runs)) < len(runs) or not set(range(self.num_granules)) - self._free >= set(runs):
                raise InvalidFreeError(f"expected live granules, each once, got {runs}")
            self._free |= set(runs)

    def stats(self):
        blocks = {8 * size: len(self._places(size)) for size in (1, 2, 4, 8)}
        live = self.num_granules - len(self._free)
        return AllocatorStats(self.num_granules, self.num_free, live, 0, self.largest_free, 0, blocks)

    def check_integrity(self):
        if not self._free <= set(range(self.num_granules)):
            raise IntegrityError("a granule beyond the pool is free")

    def snapshot(self):
        body = json.dumps([self.num_granules, sorted(self._free)]).encode()
        return zlib.crc32(body).to_bytes(4, "little") + body

    def restore(self, data):
        if not isinstance(data, bytes) or zlib.crc32(data[4:]).to_bytes(4, "little") != data[:4]:
            raise SnapshotError("the checksum does not match")
        num_granules, free = json.loads(data[4:])
        if num_granules != self.num_granules:
            raise SnapshotError(f"expected a pool of {self.num_granules}, got {num_granules}")
        self._free = set(free)
