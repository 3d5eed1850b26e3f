"""Compiled code on disk: what is damaged or foreign is not used, and no state of the disk stops a program."""

import os
import pickle
import random
import stat
import time

import pytest

from allocators import _disk
from allocators._disk import MAGIC, find_place, foreign_writer, payload_of, read_entry, survey, write_entry
from fuzz import disk_caches
from fuzz.disk_caches import DAMAGES, PLACES


def test_an_entry_comes_back_as_it_was_and_is_the_users_alone(tmp_path):
    path = tmp_path / "one.entry"
    old = os.umask(0)
    try:
        assert write_entry(path, b"payload")
    finally:
        os.umask(old)
    assert read_entry(path) == b"payload"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert write_entry(path, b"")
    assert read_entry(path) == b""
    assert [found.name for found in tmp_path.iterdir()] == ["one.entry"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_none_wherever_the_damage_is(tmp_path, damage):
    path, draw = tmp_path / "one.entry", random.Random(damage)
    write_entry(path, draw.randbytes(9000))
    whole = path.read_bytes()
    tried = 0
    for _ in range(100):
        damaged = DAMAGES[damage](whole, draw)
        if damaged != whole:
            tried += 1
            path.write_bytes(damaged)
            assert read_entry(path) is None
    assert tried > 50
    places = [*range(len(MAGIC) + 80), len(whole) - 1]
    assert all(payload_of(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]) is None for i in places)
    assert all(payload_of(whole[:i]) is None for i in places)


def test_what_is_no_plain_file_of_the_user_is_no_entry(tmp_path):
    path, other = tmp_path / "one.entry", tmp_path / "other.entry"
    assert read_entry(path) is None
    write_entry(other, b"payload")
    path.symlink_to(other)
    assert read_entry(path) is None
    path.unlink()
    path.mkdir()
    assert read_entry(path) is None
    path.rmdir()
    os.mkfifo(path)
    assert read_entry(path) is None  # and does not wait for a writer
    for mode in (0o620, 0o602, 0o666):
        other.chmod(mode)
        assert read_entry(other) is None
    if os.geteuid() == 0:
        other.chmod(0o600)
        os.chown(other, 12345, 0)
        assert read_entry(other) is None


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "denied"), KeyboardInterrupt()]
)
def test_writing_that_fails_leaves_the_old_entry_and_nothing_else(tmp_path, monkeypatch, error):
    path = tmp_path / "one.entry"
    write_entry(path, b"old")

    def refuse(*_):
        raise error

    monkeypatch.setattr(os, "replace", refuse)
    if isinstance(error, OSError):
        assert not write_entry(path, b"new")
    else:
        with pytest.raises(KeyboardInterrupt):
            write_entry(path, b"new")
    assert read_entry(path) == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["one.entry"]


def test_a_folder_that_is_gone_or_full_keeps_nothing(tmp_path):
    assert not write_entry(tmp_path / "gone" / "one.entry", b"payload")
    assert disk_caches.use_full_disk(tmp_path / "full").problems == []


def test_temporary_files_of_killed_processes_are_removed_when_they_are_old(tmp_path):
    old, new = tmp_path / "old.tmp", tmp_path / "new.tmp"
    for path in (old, new):
        path.write_bytes(b"half of an ent")
    os.utime(old, (time.time() - 7200,) * 2)
    write_entry(tmp_path / "one.entry", b"payload")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["new.tmp", "one.entry"]


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Finds the place anew, in an environment, as a process does that has not complained yet."""
    monkeypatch.setattr(_disk, "_has_complained", False)

    def find(**environment):
        for name in ("KVTOOLKIT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return find_place.__wrapped__("numba")

    return find


def test_the_place_is_where_the_environment_says(place, tmp_path, monkeypatch):
    assert place(KVTOOLKIT_CACHE_DIR=tmp_path / "a").folder == tmp_path / "a" / "numba"
    assert place(XDG_CACHE_HOME=tmp_path / "b").folder == tmp_path / "b" / "kvtoolkit" / "numba"
    assert place(HOME=tmp_path / "c").folder == tmp_path / "c" / ".cache" / "kvtoolkit" / "numba"
    assert place(HOME=tmp_path / "c", XDG_CACHE_HOME="relative").folder == tmp_path / "c/.cache/kvtoolkit/numba"
    assert place(KVTOOLKIT_CACHE_DIR="Off").problem == "switched off by KVTOOLKIT_CACHE_DIR"
    monkeypatch.chdir(tmp_path)
    assert place(KVTOOLKIT_CACHE_DIR="here").folder == tmp_path / "here" / "numba"
    assert stat.S_IMODE((tmp_path / "here").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "here" / "numba").stat().st_mode) == 0o700
    for home in ("", "relative"):
        assert place(HOME=home).problem == "there is no home folder"
    assert (
        place(KVTOOLKIT_CACHE_DIR=" ", HOME=tmp_path / "c").folder == tmp_path / "c" / ".cache" / "kvtoolkit" / "numba"
    )
    assert place(KVTOOLKIT_CACHE_DIR="~/d", HOME=tmp_path / "c").folder == tmp_path / "c" / "d" / "numba"
    assert "home directory" in place(KVTOOLKIT_CACHE_DIR="~nobody-of-that-name/d").problem


@pytest.mark.parametrize("is_quiet", [False, True])
@pytest.mark.parametrize("chosen", ["/dev/null", "/proc/nothing", "~nobody-of-that-name", None, "off"])
def test_a_place_that_cannot_be_used_is_named_once(place, capsys, monkeypatch, chosen, is_quiet):
    monkeypatch.setenv("KVTOOLKIT_QUIET", "1" if is_quiet else "")
    for _ in range(3):
        found = place(**{"HOME": ""} if chosen is None else {"KVTOOLKIT_CACHE_DIR": chosen})
        assert found.folder is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (not is_quiet and chosen != "off")
    assert all(line.startswith(f"kvtoolkit: {found.problem}, so ") for line in said)
    assert all(line.endswith("is not used; see `kvtoolkit doctor`") for line in said)


@pytest.mark.parametrize(
    ("mode", "which", "is_foreign"),
    [
        (0o700, "numba", False),
        (0o755, "numba", False),
        (0o775, "numba", True),
        (0o702, "numba", True),
        (0o777, "a", True),
        (0o1777, "a", False),  # sticky, as /tmp
        (0o777, ".", True),
    ],
)
def test_a_folder_is_not_used_if_others_could_put_code_there(
    place, tmp_path, capsys, monkeypatch, mode, which, is_foreign
):
    monkeypatch.delenv("KVTOOLKIT_QUIET", raising=False)
    where = {"numba": tmp_path / "base/a/numba", "a": tmp_path / "base/a", ".": tmp_path / "base"}[which]
    (tmp_path / "base/a/numba").mkdir(parents=True)
    for made in (tmp_path / "base/a/numba", tmp_path / "base/a", tmp_path / "base"):
        made.chmod(0o700)
    where.chmod(mode)
    found = place(KVTOOLKIT_CACHE_DIR=tmp_path / "base/a")
    assert (found.folder is None, found.is_foreign) == (is_foreign, is_foreign)
    said = capsys.readouterr().err
    assert said == (f"kvtoolkit: {where} can be written by others, so {tmp_path}/base/a/numba is not used; see "
                    "`kvtoolkit doctor`\n" if is_foreign else "")  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_folder_of_somebody_else_is_not_used_nor_one_that_his_group_can_replace(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 0)
    assert "belongs to user 12345" in foreign_writer(folder)
    os.chown(folder, 0, 0)
    tmp_path.chmod(0o770)
    assert foreign_writer(folder) == ""
    os.chown(tmp_path, 0, 12345)
    assert f"{tmp_path} can be written by others" in foreign_writer(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("caches") / "cache"


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_used_stops_no_program_and_nothing_in_it_is_run(cache, name):
    assert disk_caches.use_bad_place(cache, name).problems == []


def test_an_entry_that_leaves_a_mark_does_so_where_the_place_is_good(tmp_path):
    """Otherwise the marks that are missing above would prove nothing."""
    folder, marker = tmp_path / "cache" / "numba", tmp_path / "marker"
    disk_caches.run(disk_caches.PROGRAM, KVTOOLKIT_CACHE_DIR=str(folder.parent))
    disk_caches.plant(folder, marker)
    child = disk_caches.run(disk_caches.PROGRAM, KVTOOLKIT_CACHE_DIR=str(folder.parent))
    assert (child.returncode, child.stdout) == (0, "0 1 True\n")  # no use as an entry, and no reason to stop
    assert marker.exists()


def test_damaged_entries_are_compiled_again_and_kept(tmp_path):
    outcome = disk_caches.use_damaged_entries(tmp_path / "cache", random.Random(1))
    assert (outcome.problems, outcome.survived) == ([], outcome.tried)
    assert outcome.tried >= 3


def test_a_survey_names_what_is_damaged_and_what_is_foreign(tmp_path):
    sound, damaged, foreign = (tmp_path / f"{name}.entry" for name in ("sound", "damaged", "foreign"))
    for path in (sound, damaged, foreign):
        write_entry(path, pickle.dumps(path))
    damaged.write_bytes(b"damaged")
    foreign.chmod(0o666)
    (tmp_path / "half.tmp").touch()
    (tmp_path / "of an earlier release.nbc").touch()
    found = survey(tmp_path)
    assert (found.num_sound, found.damaged, found.foreign) == (1, (damaged,), (foreign,))
    assert found.nbytes == sound.stat().st_size
