"""`kvtoolkit fuzz --allocator lockfree` on a GPU: nothing is found in our pool, and what is planted is."""

import random

import numpy as np
import pytest

from allocators.testing import ConformanceFailure
from kvtoolkit import DevicePool, create
from kvtoolkit.commands.cli import main
from kvtoolkit.commands.fuzz_kernels import attack, run_kernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layout", ["buddy", "slab"])
@pytest.mark.parametrize("num_granules", [8, 72, 4096, 1 << 17])
def test_random_kernels_find_nothing(layout, num_granules):
    draw = random.Random(num_granules)
    pool = DevicePool(num_granules, layout=layout)
    operations = sum(attack(pool, draw) for _ in range(12))
    assert operations > 12 * 2
    assert pool.stats().num_free == num_granules


class TwoOwners(DevicePool):
    """One of the granules that the host holds is free, too."""

    def journals(self, count):
        words = self._free_words()
        words[0] = words[0] | np.uint64(1)
        self._reset(words)
        return super().journals(count)


class Refuses(DevicePool):
    """One granule is in limbo although it is free: freeing it is refused."""

    def journals(self, count):
        limbo = np.zeros((4, self.num_words), np.uint64)
        limbo[:, :] = self._free_words()
        self._reset(self._free_words(), limbo)
        return super().journals(count)


class Leaks(DevicePool):
    """A granule is gone."""

    def journals(self, count):
        words = self._free_words()
        words[words.nonzero()[0][-1]] = 0
        self._reset(words)
        return super().journals(count)


@pytest.mark.parametrize(
    ("planted", "promises"),
    [
        (TwoOwners, {"disjoint"}),
        (Refuses, {"proper use is granted"}),
        (Leaks, {"recovery", "exact exhaustion"}),
    ],
)
def test_what_is_planted_is_found(planted, promises):
    found = set()
    for seed in range(20):
        try:
            attack(planted(64), random.Random(seed))
        except ConformanceFailure as failure:
            found.add(failure.invariant)
    assert found & promises, found


def test_other_allocators_have_no_kernels():
    assert run_kernels(lambda: create("buddy", 64), 0) == 0


def test_the_command_runs_on_the_gpu(capsys):
    line = ["fuzz", "--allocator", "lockfree", "--seconds", "0", "--seed", "3", "--num-granules", "4096"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "seed 3" in out
    assert "operations of kernels, nothing found" in out
