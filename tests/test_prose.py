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


def test_a_phrase_may_be_broken_over_the_end_of_a_line():
    assert found("a.py", '"""A thing for\n    ever, and what a row\n    holds is so."""\n') == ["1", "2"]
    assert found("a.py", "# for\n# ever\nx = 1  # for\n") == ["1"]
    assert found("a.cuh", "// one for\n// ever\nint a;  // for\nint b;\n// ever\n") == ["1"]
    assert found("a.md", "it is\nfor\n ever\n\n> for\n> ever\n\nx stands\nfor y\n") == ["2", "5"]
    assert found("a.md", "for\n\never") == []


def test_fences_of_either_kind_hold_code():
    assert found("a.md", "~~~python\nalike\n```\nalike\n~~~\nalike\n````\n```\nalike\n````\n") == ["6"]


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
