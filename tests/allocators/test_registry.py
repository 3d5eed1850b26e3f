"""Allocators are found by name, by entry point, by path and by class."""

import importlib.metadata

import pytest

import allocators
from allocators import InvalidSizeError, UnknownAllocatorError, create, find, names, register, registry
from tests.allocators.tiny import TinyAllocator


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_built_in_names():
    assert {"paged", "buddy", "slab", "lockfree"} <= set(names())
    assert find("buddy") is allocators.BuddyAllocator


def test_path_and_class_are_found():
    assert find("tests.allocators.tiny:TinyAllocator") is TinyAllocator
    assert find(TinyAllocator) is TinyAllocator
    assert create("tests.allocators.tiny:TinyAllocator", 24).num_free == 24
    assert create("tests.allocators.tiny:TinyAllocator", 24, block_sizes=(8, 64)).block_sizes == (8, 64)


def test_registered_name_is_found(clean_registry):
    register("tiny", TinyAllocator)
    assert find("tiny") is TinyAllocator
    assert "tiny" in names()
    with pytest.raises(UnknownAllocatorError, match="expected an identifier, got 'a b'"):
        register("a b", TinyAllocator)


def test_a_built_in_allocator_is_replaced_only_on_purpose(clean_registry):
    with pytest.raises(UnknownAllocatorError, match="'buddy' is a built-in allocator.*replace=True"):
        register("buddy", TinyAllocator)
    assert find("buddy") is allocators.BuddyAllocator
    register("buddy", TinyAllocator, replace=True)
    assert find("buddy") is TinyAllocator


def test_entry_point_is_found(monkeypatch):
    point = importlib.metadata.EntryPoint("tiny", "tests.allocators.tiny:TinyAllocator", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "_entry_points", lambda: [point])
    assert find("tiny") is TinyAllocator
    assert "tiny" in names()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("heap", "expected one of buddy, lockfree, paged, slab.*got 'heap'"),
        ("no.such.module:Class", "'no.such.module:Class' cannot be imported"),
        ("tests.allocators.tiny:Nobody", "'tests.allocators.tiny:Nobody' cannot be imported"),
        ("allocators:GRANULE", "expected 'allocators:GRANULE' to be a class, got int"),
        (":", "cannot be imported"),
        (7, "expected a name, a path or a class, got 7"),
    ],
)
def test_unknown_spec_is_named(spec, message):
    with pytest.raises(UnknownAllocatorError, match=message):
        find(spec)


def test_unknown_option_is_named():
    with pytest.raises(InvalidSizeError, match=r"BuddyAllocator does not take these options.*layout"):
        create("buddy", 24, layout="slab")
