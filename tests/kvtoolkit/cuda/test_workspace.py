"""How scratch memory grows, with memory that is not there."""

import pytest

from kvtoolkit.cuda import workspace as module
from kvtoolkit.cuda.workspace import Sizes, Workspace, workspace
from kvtoolkit.errors import UnsupportedError

MEBI = 1 << 20


@pytest.fixture
def made(monkeypatch):
    """The sizes of all pieces that were made, on no device."""
    found = []

    def make(sizes):
        rounded = Sizes(*(-(-max(pair) // 512) * 512 for pair in zip(sizes, module._LEAST, strict=True)))
        found.append(rounded)
        return Workspace(len(found), 0, 0, rounded, ())

    for name, empty in (("_spaces", {}), ("_spares", {}), ("_outgrown", [])):
        monkeypatch.setattr(module, name, empty)
    monkeypatch.setattr(module, "_make", make)
    monkeypatch.setattr(module, "is_capturing", lambda stream: stream < 0)
    return found


def test_a_part_that_is_large_enough_stays_as_it_is(made):
    for i in range(1, 9):
        workspace(0, 1, Sizes(5 * i * MEBI, 0, 0))
        workspace(0, 1, Sizes(0, i * MEBI, 0))
        workspace(0, 1, Sizes(0, 0, 2 * i * MEBI))
    assert all(have < 2 * want for have, want in zip(made[-1], (40 * MEBI, 8 * MEBI, 16 * MEBI), strict=True))


def test_growing_little_by_little_makes_few_pieces(made):
    for nbytes in range(MEBI, 256 * MEBI, MEBI):
        workspace(0, 1, Sizes(nbytes, nbytes, nbytes))
    assert len(made) <= 2 * 3 * 8
    assert len(module._outgrown) == len(made) // 2 - 1


def test_a_capture_gets_the_spare_or_an_error(made):
    with pytest.raises(UnsupportedError, match="run the same call once before the capture"):
        workspace(0, -1, Sizes(1, 1, 1))
    large = Sizes(9 * MEBI, 0, 0)
    first = workspace(0, 1, large)
    captured = workspace(0, -1, large)
    assert captured.partials != first.partials
    assert workspace(0, -1, large) is captured
    with pytest.raises(UnsupportedError, match="before a CUDA graph is captured"):
        workspace(0, -2, large)
    assert workspace(0, 1, large) is first
    assert workspace(0, -2, large) not in (first, captured), "a spare is made again"
