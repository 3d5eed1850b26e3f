"""Rules that `make lint` holds beside ruff's: how long files and functions may be, and phrases that have to be decoded.

``python -m tests.prose`` prints each violation as ``file:line: what`` and exits with 1 if there is one.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("allocators", "kvtoolkit", "cuda_src")
EVERYTHING = (*LIBRARY, "docs", "examples", "fuzz", "tests")
MAX_FILE = 600
MAX_FUNCTION = 80
CODE = (".cu", ".cuh", ".cpp", ".h")

# phrase -> what to write instead
# a space in a phrase matches any white space, because a line may end within the phrase
PHRASES = {
    r"\balike\b": "say what is the same",
    r"\bfor ever\b": "forever, or until when",
    r"\blikewise\b": "say it, or refer to where it is said",
    r"\blies?\b|\blying\b": "is, or where it is",
    r"\bstands?\b(?! for\b| beside\b| alone\b|-in)": "is",
    r"\bwhat [\w\s]{1,40} is so\b": "name the thing",
    r"\bmay be had\b": "say who can get it, and how",
}
FIRST_WORDS = re.compile(r"\s*(Of|As|Likewise)\b")


class Line(NamedTuple):
    """A line of text, and whether a docstring begins with it."""

    number: int
    text: str
    is_first: bool = False


def python_prose(source: str) -> Iterator[Line]:
    """The comments of Python source and its docstrings, those of attributes included."""
    tree = ast.parse(source)
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and type(node.value.value) is str:
            for offset, text in enumerate(node.value.value.split("\n")):
                yield Line(node.lineno + offset, text, offset == 0 and node.value in docstrings)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Line(token.start[0], token.string)


def device_prose(source: str) -> Iterator[Line]:
    """The ``//`` comments of C++ source."""
    for number, text in enumerate(source.split("\n"), 1):
        if "//" in text:
            yield Line(number, text.partition("//")[2])


def page_prose(source: str) -> Iterator[Line]:
    """The text of a Markdown page outside its code blocks."""
    fence = ""
    for number, text in enumerate(source.split("\n"), 1):
        found = re.match(r"[\s>]*(```+|~~~+)", text)
        if found and (not fence or found[1].startswith(fence)):
            fence = "" if fence else found[1]
        elif not fence:
            yield Line(number, re.sub(r"`[^`]*`", "", text))


def prose_of(path: Path, source: str) -> Iterator[Line]:
    if path.suffix == ".py":
        return python_prose(source)
    return device_prose(source) if path.suffix in CODE else page_prose(source)


def passages(lines: list[Line]) -> Iterator[tuple[int, str]]:
    """The number of the first of each run of consecutive lines, and their text without the signs of comments."""
    run: list[str] = []
    begin = 0
    for line in lines:
        if run and (line.is_first or line.number != begin + len(run) or not line.text.strip()):
            yield begin, "\n".join(run)
            run = []
        begin = begin if run else line.number
        run.append(re.sub(r"^\s*(#|//|>)+", "", line.text))
    yield begin, "\n".join(run)


def phrases(path: Path, source: str) -> Iterator[str]:
    """Each phrase of the list that a file contains."""
    lines = list(prose_of(path, source))
    for line in lines:
        if line.is_first and (found := FIRST_WORDS.match(line.text)):
            yield f"{path}:{line.number}: a docstring that begins with {found[1]!r}: say what it does, or is"
    for begin, text in passages(lines):
        for pattern, instead in PHRASES.items():
            for found in re.finditer(pattern.replace(" ", r"\s+"), text, re.IGNORECASE):
                number = begin + text.count("\n", 0, found.start())
                yield f"{path}:{number}: {' '.join(found[0].split())!r}: {instead}"


def sizes(path: Path, source: str) -> Iterator[str]:
    """A file of the library that is too long, and each such function in it."""
    count = len(source.splitlines())
    if count > MAX_FILE:
        yield f"{path}:1: {count} lines; at most {MAX_FILE}"
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines; at most {MAX_FUNCTION}"


def files() -> Iterator[Path]:
    """Every file with text of ours, relative to the root."""
    found = [*ROOT.glob("*.md"), *(path for folder in EVERYTHING for path in (ROOT / folder).rglob("*"))]
    for path in sorted(found):
        if path.suffix in (".py", ".md", *CODE) and path != Path(__file__):
            yield path.relative_to(ROOT)


def violations() -> Iterator[str]:
    for path in files():
        source = (ROOT / path).read_text()
        yield from phrases(path, source)
        if path.parts[0] in LIBRARY:
            yield from sizes(path, source)


def main() -> int:
    found = list(violations())
    print("\n".join(found) or "prose: fine")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
