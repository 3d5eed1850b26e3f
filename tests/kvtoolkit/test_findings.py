"""The findings of Python and of the CUDA kernels are the same."""

import re
from pathlib import Path

from kvtoolkit.findings import Finding
from kvtoolkit.runtime.sources import get_include


def test_the_codes_of_the_cuda_check_are_those_of_python():
    source = (Path(get_include()).parent / "cache" / "check.cu").read_text()
    names = re.search(r"enum Finding : int \{([^}]*)\}", source)[1].replace(",", " ").split()
    expected = ["k" + "".join(part.capitalize() for part in finding.name.split("_")) for finding in Finding]
    assert names == ["kFine", *expected[1:]]
    assert [finding.value for finding in Finding] == list(range(len(names)))
