"""The entry format is one thing in Python and in the device header."""

import shutil
import subprocess

import numpy as np
import pytest

from kvtoolkit import get_include
from kvtoolkit.formats.entry import (
    EMPTY_ENTRY,
    MAX_GRANULES,
    entry_granule,
    entry_length,
    entry_tier,
    pack_entry,
    unpack_entries,
)

CASES = [(g, n, t) for g in (0, 1, 12345, MAX_GRANULES - 1) for n in range(1, 9) for t in range(5)]


def test_packing_and_unpacking_are_inverse():
    packed = np.array([pack_entry(*case) for case in CASES], np.int32)
    assert (packed >= 0).all()
    assert list(zip(*(part.tolist() for part in unpack_entries(packed)), strict=True)) == CASES
    assert [(entry_granule(e), entry_length(e), entry_tier(e)) for e in packed.tolist()] == CASES


def test_an_empty_entry_has_no_granules():
    assert [part.tolist() for part in unpack_entries(np.array([EMPTY_ENTRY], np.int32))] == [[-1], [0], [-1]]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_device_header_agrees(tmp_path):
    (tmp_path / "main.cpp").write_text(
        """
        #include <cstdio>
        #include <kvt/entry.cuh>
        int main() {
          int granule, length, tier;
          while (std::scanf("%d %d %d", &granule, &length, &tier) == 3) {
            const auto entry = kvt::Entry::pack(granule, length, static_cast<kvt::Tier>(tier));
            std::printf("%d %d %d %d %d\\n", entry.bits, entry.granule(), entry.num_granules(),
                        static_cast<int>(entry.tier()), entry.empty());
          }
          const int starts[] = {0, 8, 9, 11};
          for (int granule = 0; granule < 13; ++granule) std::printf("%d ", kvt::find_entry(starts, 4, granule));
        }
        """
    )
    program = tmp_path / "main"
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Werror", f"-I{get_include()}", str(tmp_path / "main.cpp"), "-o", str(program)],
        check=True,
    )
    given = "\n".join(" ".join(map(str, case)) for case in CASES)
    *lines, found = subprocess.run([program], input=given, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert lines == [f"{pack_entry(*case)} {case[0]} {case[1]} {case[2]} 0" for case in CASES]
    assert found.split() == ["0"] * 8 + ["1"] + ["2"] * 2 + ["3"] * 2
