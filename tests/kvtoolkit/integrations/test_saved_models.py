"""Folders of converted weights: written whole, checked when read, and rebuilt when they are damaged."""

import os
from pathlib import Path

import pytest

from allocators import _disk
from kvtoolkit.integrations import saved_models


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for weights, and a source file that is half a kilobyte long."""
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(saved_models, "find_place", lambda kind: _disk.Place(tmp_path / kind))
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"gguf" * 128)
    return tmp_path / "weights", source


def write(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))


def test_what_was_kept_is_found(place):
    folder, _ = place
    assert saved_models.find("tiny") is None
    assert saved_models.keep("tiny", write) == folder / "tiny"
    assert saved_models.find("tiny") == folder / "tiny"
    assert [path.name for path in folder.iterdir()] == ["tiny"]


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "no digests"])
def test_a_damaged_folder_is_absent_and_is_replaced(place, damage):
    folder, _ = place
    saved_models.keep("tiny", write)
    weights = folder / "tiny" / "model.safetensors"
    if damage == "changed":
        weights.write_bytes(bytes(255) + b"x")
    elif damage == "truncated":
        weights.write_bytes(b"")
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / "tiny" / "digests.json").write_text("{")
    assert saved_models.find("tiny") is None
    assert saved_models.keep("tiny", write) == folder / "tiny"
    assert weights.read_bytes() == bytes(range(256))


def test_a_writer_that_fails_leaves_nothing(place):
    folder, _ = place

    def full(target):
        write(target)
        raise RuntimeError("no space left on device")

    assert saved_models.keep("tiny", full) is None
    assert list(folder.iterdir()) == []


def test_another_process_that_was_faster_wins(place):
    folder, _ = place

    def slow(target):
        write(target)
        saved_models.keep("tiny", write)

    assert saved_models.keep("tiny", slow) == folder / "tiny"
    assert [path.name for path in folder.iterdir()] == ["tiny"]


def test_without_a_folder_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(saved_models, "find_place", lambda kind: _disk.Place(None, "switched off"))
    assert saved_models.find("tiny") is None
    assert saved_models.keep("tiny", write) is None


def test_the_name_changes_with_the_source_and_what_is_made_of_it(place):
    _, source = place
    names = {saved_models.name_of(source, "float32"), saved_models.name_of(source, "float16")}
    assert saved_models.name_of(source, "float32") in names
    os.utime(source, ns=(1, 1))
    names.add(saved_models.name_of(source, "float32"))
    source.write_bytes(b"gguf" * 129)
    os.utime(source, ns=(1, 1))
    names.add(saved_models.name_of(source, "float32"))
    assert len(names) == 4
    assert all(name.startswith("tiny-") for name in names)
