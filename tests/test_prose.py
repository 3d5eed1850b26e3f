"""`tests.prose` finds what it is for, where it looks, and nothing in code."""

from pathlib import Path

from tests.prose import LIBRARY, MAX_FILE, MAX_FUNCTION, files, phrases, sizes


def found(name, source):
    return [line.split(":")[1] for line in phrases(Path(name), source)]


def test_python_comments_and_docstrings_are_read_and_code_is_not():
    source = '"""Of rows.\n\nThese are alike.\n"""\nalike = "alike"  # alike\n'
    assert found("a.py", source) == ["1", "3", "5"]


def test_docstrings_of_attributes_are_read_too():
    assert found("a.py", 'class A:\n    """A class."""\n\n    a: int\n    """Where it lies."""\n') == ["5"]


def test_a_docstring_that_only_mentions_such_a_word_is_fine():
    assert found("a.py", 'def f():\n    """Return the rows, as given."""\n') == []


def test_device_comments_are_read_and_code_is_not():
    assert found("a.cuh", "int alike;\nint b;  // for ever\n") == ["2"]


def test_pages_are_read_outside_their_code():
    assert found("a.md", "likewise\n```\nalike\n```\n`alike`\nstands for x\nit stands here\n") == ["1", "7"]


def test_long_files_and_functions_are_found():
    body = "    pass\n"
    fits, too_long = f"def f():\n{body * (MAX_FUNCTION - 1)}", f"def f():\n{body * MAX_FUNCTION}"
    assert not list(sizes(Path("a.py"), fits))
    assert ["f has" in line for line in sizes(Path("a.py"), too_long)] == [True]
    assert not list(sizes(Path("a.cu"), "x\n" * MAX_FILE))
    assert len(list(sizes(Path("a.cu"), "x\n" * (MAX_FILE + 1)))) == 1


def test_every_folder_is_looked_at():
    seen = {path.parts[0] for path in files()}
    assert seen >= {*LIBRARY, "docs", "examples", "fuzz", "tests", "README.md"}
    assert {path.suffix for path in files()} >= {".py", ".md", ".cu", ".cuh"}
