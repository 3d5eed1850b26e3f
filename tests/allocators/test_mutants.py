"""The kit kills every planted defect, and says which promise it broke."""

import os

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


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_kit_kills(mutant):
    if mutant.is_race and (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    # whether threads meet at the wrong moment is a matter of chance, and of what else the machine does
    attempts = (killed_by(mutant) for _ in range(5 if mutant.is_race else 1))
    invariant = next((found for found in attempts if found is not None), None)
    assert invariant is not None, f"survived: {mutant.defect}"
    assert invariant in _EXPECTED.get(mutant.name, {invariant})


def test_there_are_enough_mutants_and_their_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
    assert {mutant.name for mutant in MUTANTS} >= _EXPECTED.keys()


def test_an_edit_that_no_longer_fits_the_source_is_an_error():
    with pytest.raises(LookupError, match="once, found it 0 times"):
        edited("paged", ("no such line", ""))
