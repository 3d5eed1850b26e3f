"""What documents, docstrings and comments name exists: modules, what is in them, and files."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import allocators
import kvtoolkit

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("allocators", "kvtoolkit", "cuda_src", "docs", "examples", "fuzz", "tests")
SOURCES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(found for folder in FOLDERS for found in (ROOT / folder).rglob("*")))
    if path.suffix in (".py", ".md", ".cu", ".cuh", ".cpp", ".h") and "results" not in path.parts
)
GROUP = "kvtoolkit.allocators"  # of entry points, and no module
CLASSES = [
    (name, found)
    for module in (allocators, kvtoolkit)
    for name in module.__all__
    if isinstance(found := getattr(module, name), type)
]
MEMBERS = re.compile(rf"`((?:{'|'.join(name for name, _ in CLASSES)})\.[a-z_]\w*)")
TELLS_OF_OTHERS = ("CHANGELOG.md", "tests/test_documents.py")
"""What is gone, and what never was."""
LINKS = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)[^)]*\)")
NAMES = re.compile(r"`((?:kvtoolkit|allocators)(?:\.\w+)+)")
FILES = re.compile(r"(?<![\w./*-])((?:[\w-]+/)+[\w-]+\.(?:py|md|cuh?|toml))\b|`([\w-]+\.(?:py|md|cuh?|toml))`")


def found_in(pattern, besides=()):
    """Every name that a pattern finds, and one place where it is, beside files that are not looked at."""
    names = {}
    for path in SOURCES:
        if str(path.relative_to(ROOT)) in besides:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in pattern.finditer(line):
                names.setdefault(next(filter(None, match.groups())), f"{path.relative_to(ROOT)}:{number}")
    return names


def exists(name):
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] not in ("kvtoolkit", "allocators"):
                pytest.skip(f"{error.name} is not installed")
            continue
        for part in parts[end:]:
            fields = (*getattr(found, "__dataclass_fields__", ()), *getattr(found, "__annotations__", ()))
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


def test_every_name_of_ours_exists():
    missing = {name: place for name, place in found_in(NAMES).items() if name != GROUP and not exists(name)}
    assert not missing


def has(cls, member):
    """Whether instances of a class have a member, as far as its sources tell."""
    fields = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", ())}
    if hasattr(cls, member) or member in fields:
        return True
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] in ("kvtoolkit", "allocators")]
    return any(re.search(rf"self\.{member}\b", inspect.getsource(base)) for base in ours)


def test_every_member_of_a_public_class_exists():
    places = found_in(MEMBERS, TELLS_OF_OTHERS)
    missing = {}
    for name, place in places.items():
        owner, member = name.split(".")
        if not any(has(cls, member) for known, cls in CLASSES if known == owner):
            missing[name] = place
    assert len(places) > 20
    assert not missing


def test_a_member_that_is_not_there_is_missed():
    assert MEMBERS.findall("`KVCache.nope` and `KVCache.nope()`") == ["KVCache.nope"] * 2
    assert not has(kvtoolkit.KVCache, "nope")
    assert has(kvtoolkit.KVCache, "config")


def test_every_relative_link_of_a_page_leads_somewhere():
    assert LINKS.findall("[a](b.md) [c](d/e#f) [g](https://h) [i](#j)") == ["b.md", "d/e"]
    pages = [path for path in SOURCES if path.suffix == ".md"]
    links = [(page, link) for page in pages for link in LINKS.findall(page.read_text())]
    assert links
    assert not [f"{page.relative_to(ROOT)}: {link}" for page, link in links if not (page.parent / link).exists()]


def test_every_file_that_is_named_exists():
    ours = [str(path.relative_to(ROOT)) for path in SOURCES] + ["examples/cache.toml"]
    missing = {
        name: place
        for name, place in found_in(FILES).items()
        if not any(path == name or path.endswith(f"/{name}") for path in ours)
        and not any((base / name).exists() for base in (ROOT, (ROOT / place.partition(":")[0]).parent))
    }
    assert not missing
