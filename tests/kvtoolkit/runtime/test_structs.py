"""The reader of parameter structs agrees with a C++ compiler on every struct."""

import re
import shutil
import subprocess

import pytest

from kvtoolkit.cuda import copy, grow
from kvtoolkit.runtime.compiler import read_source
from kvtoolkit.runtime.sources import source_folder
from kvtoolkit.runtime.structs import ParameterStruct

KERNEL = re.compile(r"(kvt_\w+)\(const __grid_constant__ \w+")
KERNELS = [
    (str(path.relative_to(source_folder())), name)
    for path in sorted(source_folder().rglob("*.cu"))
    for name in KERNEL.findall(path.read_text())
]


def test_every_kernel_takes_a_struct_that_can_be_read():
    kernels = sum(path.read_text().count('extern "C" __global__') for path in source_folder().rglob("*.cu"))
    assert len(KERNELS) == kernels >= 20
    assert len({ParameterStruct(*kernel).name for kernel in KERNELS}) == 31


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_sizes_and_offsets_are_those_of_a_compiler(tmp_path):
    """One program with all structs, as their text has them, asserts what the reader has found."""
    structs, constants, checks = {}, {}, []
    for source, kernel in KERNELS:
        read = ParameterStruct(source, kernel)
        text = "\n".join([read_source(source)[0], *read_source(source)[1].values()])
        if read.name in structs:
            continue
        base = re.search(rf"struct {read.name} : (\w+) ", text)
        for name in [*([base[1]] if base else []), read.name]:
            structs.setdefault(name, re.search(rf"struct (?:alignas\(\d+\) )?{name}\b.*?\n}};", text, re.DOTALL)[0])
        for name, number in re.findall(r"constexpr int (kMaxMoves|kMaxGroups) = (\d+);", text):
            if name in structs[read.name]:
                structs[read.name] = structs[read.name].replace(name, number)
                constants[read.name] = int(number)
        checks.append(f"static_assert(sizeof({read.name}) == {read.nbytes});")
        for field in read.fields.values():
            of = f"{read.name}, {field.name}"
            checks.append(f"static_assert(__builtin_offsetof({of}) == {field.offset});")
            size = {"q": 8, "Q": 8, "i": 4, "I": 4, "f": 4}[field.code] * (field.length or 1)
            checks.append(f"static_assert(sizeof({read.name}::{field.name}) == {size});")
    most = {"MoveParams": copy.MAX_MOVES, "ConvertParams": copy.MAX_CONVERSIONS, "GrowParams": grow.MAX_GROUPS}
    most |= {"ReorderParams": grow.MAX_GROUPS, "TransferParams": copy.MAX_MOVES}
    assert constants == most
    head = "struct int2 { int x, y; }; struct alignas(16) int4 { int x, y, z, w; }; struct uint4 {};\n"
    head += "using Word = unsigned long long;\n"
    program = tmp_path / "structs.cpp"
    program.write_text(head + "\n".join([*structs.values(), *checks]))
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", str(program)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_what_is_packed_comes_back_by_name():
    struct = ParameterStruct("attention/units.cu", "kvt_units")
    values = struct.unpack(struct.pack(*range(1, 12), 12, 13, 14, -1, 0, 3, 4, 5))
    assert list(values)[:3] == ["block_table", "block_starts", "seq_lens"]
    assert (values["block_table"], values["starts_row"], values["left"]) == (1, 11, -1)
    assert values["first_granules"] == (3, 4, 5)


def test_part_of_a_struct_is_packed_where_the_caller_packs_the_rest():
    whole = ParameterStruct("attention/tiered.cu", "kvt_tiered")
    rest = ParameterStruct("attention/tiered.cu", "kvt_tiered", since="warm")
    base = ParameterStruct("attention/decode.cu", "kvt_decode")
    packed = base.pack(*range(46), *(0.5, 1.5, 2.5)) + rest.pack(*range(100, 106))
    assert len(packed) == whole.nbytes
    values = whole.unpack(packed)
    assert (values["q"], values["cap_outer"], values["warm"], values["max_units"]) == (0, 2.5, 100, 105)
    assert rest.word("warm") == whole.word("warm") == base.nbytes // 8


def test_a_struct_is_read_at_its_first_use(monkeypatch):
    monkeypatch.setattr("kvtoolkit.runtime.structs.read_source", None)
    struct = ParameterStruct("cache/move.cu", "kvt_move")
    with pytest.raises(TypeError):
        struct.pack()


def test_a_kernel_that_is_not_there_is_named():
    with pytest.raises(LookupError, match=r"cache/move.cu: expected a kernel kvt_none"):
        ParameterStruct("cache/move.cu", "kvt_none").pack()
    with pytest.raises(AttributeError):
        ParameterStruct("cache/move.cu", "kvt_move").nothing  # noqa: B018
