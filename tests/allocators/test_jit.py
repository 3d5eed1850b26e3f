"""The compile wrapper: edits in imported files are seen, the disk cache serves, and no cache place is no failure."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from allocators import _jit
from allocators._jit import source_stamp

ROOT = Path(_jit.__file__).parents[1]

PROGRAM = """
    import sys
    from allocators import PagedAllocator, _jit
    from allocators.paged import _pop

    PagedAllocator(16).allocate([2, 2])
    print(sum(_pop.stats.cache_hits.values()), sum(_pop.stats.cache_misses.values()), _jit.cache_folder() is not None)
"""


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that counts as ours: `top` imports `middle`, which imports `bottom`."""
    folder = tmp_path / "stamped"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "top.py").write_text("from stamped import middle\n")
    (folder / "middle.py").write_text("import os\nfrom stamped.bottom import value\n")
    (folder / "bottom.py").write_text("value = 1\n")
    (folder / "other.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "stamped"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(_jit, "_OUR_PACKAGES", frozenset({"stamped"}))
    return folder


def stamp(path):
    for cached in (source_stamp, _jit._direct_imports, _jit._digest, _jit._origin, _jit._folder_of):
        cached.cache_clear()
    return source_stamp(str(path))


@pytest.mark.parametrize("edited", ["top", "middle", "bottom"])
def test_stamp_changes_with_every_file_imported(package, edited):
    before = stamp(package / "top.py")
    with (package / f"{edited}.py").open("a") as file:
        file.write("# edited\n")
    assert stamp(package / "top.py") != before


def test_stamp_does_not_change_with_other_files(package):
    before = stamp(package / "top.py")
    (package / "other.py").write_text("value = 2\n")
    assert stamp(package / "top.py") == before


def test_cyclic_imports_are_stamped(package):
    (package / "bottom.py").write_text("import stamped.top\n")
    assert stamp(package / "top.py") == stamp(package / "top.py")


def test_second_process_finds_what_the_first_compiled(tmp_path):
    assert run(PROGRAM, KVTOOLKIT_CACHE_DIR=str(tmp_path)) == ["0", "1", "True"]
    assert run(PROGRAM, KVTOOLKIT_CACHE_DIR=str(tmp_path)) == ["1", "0", "True"]


def test_cache_can_be_switched_off(tmp_path):
    assert run(PROGRAM, KVTOOLKIT_CACHE_DIR="off", XDG_CACHE_HOME=str(tmp_path))[2] == "False"
    assert not list(tmp_path.iterdir())


def test_place_that_cannot_be_written_is_no_failure(tmp_path):
    # a file where a folder would have to be: not even root can write below it
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run(PROGRAM, KVTOOLKIT_CACHE_DIR=str(blocked / "cache"))[2] == "False"


def test_hypothesis_is_not_imported_by_the_package():
    program = "import sys, allocators; print('hypothesis' in sys.modules, 'kvtoolkit' in sys.modules)"
    assert run(program) == ["False", "False"]
