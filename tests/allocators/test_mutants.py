"""The kit kills every planted defect, and says which promise it broke."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from allocators.testing.mutants import MUTANTS, edited, killed_by

# Where the first broken promise that shows depends on chance, any of several names will do.
_EXPECTED = {
    "paged-double-free": {"misuse is refused"},
    "buddy-overlap-in-call": {"misuse is refused"},
    "buddy-wrapping-starts": {"misuse is refused"},
    "slab-rounds-floats": {"misuse is refused"},
    "paged-misaligned": {"aligned"},
    "paged-partial-short": {"partial"},
    "paged-sorts-on-restore": {"deterministic"},
    "epochs-step-early": {"no reuse before the epoch ends"},
    "epochs-first-stream": {"no reuse before the epoch ends"},
    "epochs-advance-frees": {"no reuse before the epoch ends"},
    "lease-commits-over-inner": {"misuse is refused"},
    "lockfree-no-undoers": {"exact exhaustion"},
    "lockfree-checks-then-frees": {"misuse is refused"},
    "paged-waits": {"bounded time"},
}


# whether threads meet at the wrong moment is a matter of chance, and of what else the machine does
ATTEMPTS = """
import sys
from allocators.testing.mutants import MUTANTS, killed_by
mutant = next(one for one in MUTANTS if one.name == sys.argv[1])
print(next((found for _ in range(5) if (found := killed_by(mutant)) is not None), ""))
"""


def killed_in_a_child(mutant):
    """`killed_by` in a child process, because compiled code without a lock may write anywhere and crash it."""
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, mutant.name],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    if done.returncode < 0:
        return "the process died"
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() or None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_kit_kills(mutant):
    if mutant.is_race and (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    invariant = (killed_in_a_child if mutant.is_race else killed_by)(mutant)
    assert invariant is not None, f"survived: {mutant.defect}"
    assert invariant in _EXPECTED.get(mutant.name, {invariant})


def test_there_are_enough_mutants_and_their_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
    assert {mutant.name for mutant in MUTANTS} >= _EXPECTED.keys()


def test_an_edit_that_no_longer_fits_the_source_is_an_error():
    with pytest.raises(LookupError, match="once, found it 0 times"):
        edited("paged", ("no such line", ""))
