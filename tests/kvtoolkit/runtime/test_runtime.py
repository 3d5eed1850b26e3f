"""Compiling without a GPU: the disk cache, what changes its key, and every kernel for every architecture."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("cupy")

from kvtoolkit import CompileError, UnsupportedError
from kvtoolkit.commands.cli import main
from kvtoolkit.commands.compile import row_of
from kvtoolkit.cuda import plan, specs
from kvtoolkit.cuda import schedule as scheduling
from kvtoolkit.errors import DeviceError
from kvtoolkit.formats import quantized
from kvtoolkit.runtime import build, compiler, sources, streams, toolchain
from tests.kvtoolkit.runtime.covering import covering, pairs_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def own_sources(tmp_path, monkeypatch):
    """A copy of the device code that a test may change, and a cache of its own."""
    folder = tmp_path / "cuda_src"
    shutil.copytree(sources.source_folder(), folder)
    monkeypatch.setattr(compiler, "source_folder", lambda: folder)
    (tmp_path / "cubin").mkdir()
    monkeypatch.setattr(compiler, "cache_folder", lambda kind: tmp_path / kind)
    return folder


def test_a_source_is_compiled_once(own_sources):
    first, second = build("cache/move.cu", {}, "90"), build("cache/move.cu", {}, "90")
    assert first.seconds > 0
    assert second.seconds == 0
    assert (first.cubin, first.usage, first.path) == (second.cubin, second.usage, second.path)
    assert first.cubin[:4] == b"\x7fELF"
    names = {"kvt_move", "kvt_move_listed", "kvt_transfer", "kvt_transfer_listed"}
    assert {usage.name for usage in first.usage} == names
    assert first.usage[0].registers > 0


def test_source_headers_macros_and_architecture_are_all_in_the_key(own_sources):
    paths = {build("cache/check.cu", {}, "90").path, build("cache/check.cu", {}, "80").path}
    paths.add(build("cache/check.cu", {"UNUSED": 1}, "90").path)
    header = own_sources / "include" / "kvt" / "entry.cuh"
    header.write_text(header.read_text() + "// a change\n")
    paths.add(build("cache/check.cu", {}, "90").path)
    source = own_sources / "cache" / "check.cu"
    source.write_text(source.read_text() + "// a change\n")
    paths.add(build("cache/check.cu", {}, "90").path)
    assert len(paths) == 5
    # a header that an included header includes
    prefill = specs.prefill(64, "float16", specs.SMEM_LIMITS["90"], has_rules=False)
    before = build(prefill.source, dict(prefill.defines), "90").path
    warp = own_sources / "include" / "kvt" / "base" / "warp.cuh"
    warp.write_text(warp.read_text() + "// a change\n")
    assert build(prefill.source, dict(prefill.defines), "90").path != before


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:200] + b"x" + data[201:]]
)
def test_a_damaged_file_is_compiled_again(own_sources, damage):
    good = build("cache/move.cu", {}, "90")
    good.path.write_bytes(damage(good.path.read_bytes()))
    again = build("cache/move.cu", {}, "90")
    assert again.seconds > 0
    assert again.cubin == good.cubin
    assert build("cache/move.cu", {}, "90").seconds == 0


def test_a_full_disk_costs_the_cache_and_nothing_else(own_sources, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    built = build("cache/move.cu", {}, "90")
    assert built.path is None
    assert built.cubin[:4] == b"\x7fELF"
    assert not list((own_sources.parent / "cubin").iterdir())


def test_a_file_that_others_can_write_is_compiled_again(own_sources):
    good = build("cache/move.cu", {}, "90")
    good.path.chmod(0o666)
    assert build("cache/move.cu", {}, "90").seconds > 0
    assert build("cache/move.cu", {}, "90").seconds == 0


def test_where_nothing_is_writable_it_compiles_every_time(own_sources, monkeypatch):
    monkeypatch.setattr(compiler, "cache_folder", lambda kind: None)
    assert build("cache/move.cu", {}, "90").path is None
    assert build("cache/move.cu", {}, "90").seconds > 0


def test_a_source_that_does_not_compile_shows_options_and_log(own_sources):
    source = own_sources / "cache" / "move.cu"
    source.write_text(source.read_text().replace("uint4 words", "unit4 words"))
    with pytest.raises(CompileError, match=r'(?s)cache/move.cu: .*options: .*-arch=sm_90.*"unit4" is undefined'):
        build("cache/move.cu", {}, "90")
    assert not list((own_sources.parent / "cubin").iterdir())


def test_the_first_use_says_what_it_does(own_sources, capsys, monkeypatch):
    build("cache/move.cu", {"KVT_X": 1}, "90", announce=True)
    build("cache/move.cu", {"KVT_X": 1}, "90", announce=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("kvtoolkit: compiling cache/move.cu for sm_90 (x=1), first use; kept in ")
    monkeypatch.setenv("KVTOOLKIT_QUIET", "1")
    build("cache/move.cu", {"KVT_X": 2}, "90", announce=True)
    assert not capsys.readouterr().err


PROGRAM = """
from kvtoolkit.runtime import build
built = build("cache/append.cu", {"KVT_VECTOR": 16}, "90")
print(len(built.cubin), built.path.name)
"""


def test_processes_at_once_agree_and_leave_one_file(tmp_path):
    environment = {**os.environ, "KVTOOLKIT_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert len(said) == 1
    assert len(list((tmp_path / "cubin").iterdir())) == 1


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    toolchain.nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", None)
    with pytest.raises(UnsupportedError, match="pip install 'kvtoolkit\\[cuda13\\]'"):
        toolchain.nvrtc()
    toolchain.nvrtc.cache_clear()


def every_kernel():
    """Every head_dim and group size for sm_90, the dtypes in turns; one head_dim for each other architecture."""
    found, dtypes = {}, itertools.cycle(("float16", "bfloat16", "bfloat16", "float16"))
    for (head_dim, num_heads), dtype in zip(itertools.product(specs.HEAD_DIMS, (32, 128)), dtypes, strict=False):
        kernels = specs.of_model(head_dim, dtype, num_heads, 8, 90, specs.SMEM_LIMITS["90"])
        found |= {(spec, "90"): None for spec in kernels}
    for head_dim, dtype, rules in ((96, "bfloat16", 1), (128, "float16", 2), (192, "bfloat16", 2), (256, "float16", 1)):
        found[specs.prompt(head_dim, dtype, rules=rules), "90"] = None
    for head_dim, rules in itertools.product(quantized.HEAD_DIMS, (1, 2)):
        dtype = "bfloat16" if head_dim == 64 else "float16"
        found[specs.prompt(head_dim, dtype, rules=rules, tiers=True), "90"] = None
    for head_dim, dtype in zip(quantized.HEAD_DIMS, dtypes, strict=False):
        kernels = specs.of_model(head_dim, dtype, 32, 8, 90, specs.SMEM_LIMITS["90"], tiers=True, masses=True)
        found |= {(spec, "90"): None for spec in kernels}
    for arch, limit in specs.SMEM_LIMITS.items():
        kernels = specs.of_model(128, "bfloat16", 32, 8, int(arch), limit, tiers=True, masses=True)
        found |= {(spec, arch): None for spec in kernels}
    for arch in ("80", "86", "90", "120"):
        limit = specs.SMEM_LIMITS[arch]
        wide = (specs.prefill(head_dim, "bfloat16", limit, has_rules=False) for head_dim in (64, 256))
        found |= {(spec, arch): None for spec in (*wide, specs.prefill(128, "float16", limit, has_rules=True))}
    return list(found)


def needed_tiered_smem(defines):
    """FIFOs of the largest unit, then what warps merge, as tiered.cu lays them out."""
    head_dim = defines["KVT_HEAD_DIM"]
    unit = quantized.INT4.nbytes(head_dim)
    return defines["KVT_WARPS"] * (defines["KVT_STAGES"] * unit + 4 * 8 * (head_dim + 4 + 2))


def needed_smem(defines):
    """FIFOs, then what warps merge, or the inbox of a cluster, as decode.cu lays them out."""
    head_dim, rows = defines["KVT_HEAD_DIM"], 8 * defines["KVT_ROW_TILES"]
    pitch = -(-head_dim // 64) * 128
    fifos = defines["KVT_WARPS"] * defines["KVT_STAGES"] * 2 * 16 * pitch
    if defines["KVT_CLUSTER"] == 1:
        return fifos + 4 * defines["KVT_WARPS"] * rows * (head_dim + 4 + 2)
    cluster = defines["KVT_CLUSTER"]
    owned = -(-rows * head_dim // 4 // cluster)
    return fifos + cluster * owned * 24 + 8


def test_every_shape_has_its_kernels_on_every_architecture():
    for (arch, limit), head_dim in itertools.product(specs.SMEM_LIMITS.items(), range(16, 257, 16)):
        for q_heads, kv_heads in ((8, 8), (32, 8), (9, 3), (64, 8), (32, 32), (128, 1), (128, 128)):
            found = list(specs.of_model(head_dim, "float16", q_heads, kv_heads, int(arch), limit))
            for spec in found:
                assert spec.smem_nbytes >= (needed_smem(dict(spec.defines)) if spec.name == "kvt_decode" else 0), spec
            assert all(spec.smem_nbytes <= limit for spec in found)


def test_the_tiered_kernels_have_room_on_every_architecture():
    for (arch, limit), head_dim in itertools.product(specs.SMEM_LIMITS.items(), quantized.HEAD_DIMS):
        found = list(specs.of_model(head_dim, "float16", 32, 8, int(arch), limit, tiers=True))
        tiered = [spec for spec in found if spec.name == "kvt_tiered"]
        assert {dict(spec.defines)["KVT_SPLIT_ROWS"] for spec in tiered} == {0, 1}
        for spec in tiered:
            assert needed_tiered_smem(dict(spec.defines)) <= spec.smem_nbytes <= limit
            # as many CTAs as an SM is said to hold; the driver takes 1 KiB of each
            assert spec.per_sm * (spec.smem_nbytes + 1024) <= limit + 1024
        assert {"kvt_units", "kvt_convert"} <= {spec.name for spec in found}


def test_ranges_cut_equal_sequences_evenly_where_that_costs_few_of_them():
    assert scheduling.whole_sequences(33, 64) == 32
    assert scheduling.whole_sequences(66, 32) == 64
    assert scheduling.whole_sequences(33, 32) == 32
    assert scheduling.whole_sequences(16, 256) == 16
    assert scheduling.whole_sequences(33, 48) == 33  # 24 would leave a quarter idle
    assert scheduling.whole_sequences(5, 3) == 5
    assert scheduling.whole_sequences(1, 7) == 1


def test_kernels_with_masses_are_asked_for_only_where_they_are_wanted():
    plain, masses = (
        list(specs.of_model(128, "float16", 32, 8, 90, specs.SMEM_LIMITS["90"], tiers=True, masses=masses))
        for masses in (False, True)
    )
    assert not any("KVT_MASSES" in dict(spec.defines) for spec in plain)
    more = [spec for spec in masses if spec not in plain]
    assert more == [spec.with_masses() for spec in plain if spec.name in ("kvt_decode", "kvt_tiered")]


def test_a_choice_of_kernels_has_every_two_settings_that_one_of_them_has():
    every = every_kernel()
    chosen = covering(every)
    assert len(chosen) < 0.6 * len(set(every))
    assert set(chosen) <= set(every)
    assert {(spec.name, arch) for spec, arch in chosen} == {(spec.name, arch) for spec, arch in every}
    assert {(spec.name, pair) for spec, arch in chosen for pair in pairs_of((spec, arch))} == {
        (spec.name, pair) for spec, arch in every for pair in pairs_of((spec, arch))
    }


# minutes for all of them; in most runs, those that have every two settings
@pytest.mark.parametrize(
    "choose", [covering, pytest.param(list, marks=pytest.mark.sweep)], ids=["every two settings", "all"]
)
def test_every_kernel_compiles_for_every_architecture_and_spills_nothing(choose):
    often = specs.prompt(128, "bfloat16", rules=0, tiers=True), "90"  # used most of those over tiers
    wanted = list(dict.fromkeys([*choose(every_kernel()), often]))
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(row_of, *zip(*wanted, strict=True), chunksize=4))
    assert {row["arch"] for row in rows} == {f"sm_{arch}" for arch in specs.SMEM_LIMITS}
    for row in rows:
        assert row["ctas_per_sm"] >= 1, row
        macros = row["macros"]
        head_dim = macros.get("KVT_HEAD_DIM", 0)
        most = 0
        if row["kernel"] == "kvt_prompt" and head_dim > 128:  # what is needed once an item does not fit beside the sums
            most = 384
        elif row["kernel"] == "kvt_prompt" and macros["KVT_TIERS"]:
            # warps that convert codes have registers that those that compute would need
            most = (16 if macros["KVT_RULES"] else 0) if head_dim == 64 else (288 if macros["KVT_RULES"] else 184)
        if row["kernel"] == "kvt_prefill":  # a warp has 32 rows, whose sums leave few registers
            most = 384 if head_dim <= 64 else 64
        if row["kernel"] == "kvt_plan_prompts":  # once a step, in one CTA of 1024 threads
            most = 32
        assert row["spill_nbytes"] <= most, row


@pytest.mark.parametrize("arch", specs.SMEM_LIMITS)
def test_the_pools_kernels_compile_and_spill_nothing(arch):
    # in turns: each source in both layouts, and both sources and layouts on each architecture
    slab = list(specs.SMEM_LIMITS).index(arch) % 2
    for source, layout in (("pool/batch.cu", slab), ("bench/alloc.cu", 1 - slab)):
        usage = compiler.build(source, {"KVT_SLAB": layout}, arch).usage
        assert len(usage) >= 3
        for kernel in usage:
            assert kernel.spill_nbytes == 0
            assert kernel.registers <= (96 if kernel.name == "kvt_pool_allocate" else 64)  # that one is a single warp


def test_the_command_prints_registers_and_spills(capsys, tmp_path):
    options = ["--arch", "80", "--head-dim", "64", "--dtype", "float16", "--json", str(tmp_path / "table.json")]
    assert main(["compile", *options]) == 0
    out = capsys.readouterr().out
    assert "kvt_decode" in out
    assert "regs  spills" in out
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {row["kernel"] for row in rows} >= {"kvt_decode", "kvt_prefill", "kvt_plan", "kvt_append", "kvt_move"}
    for arguments, message in (
        (["--arch", "70"], "--arch: expected some of 80, 86, 89, 90, 100, 120 or all, got '70'"),
        (["--head-dim", "40"], "no CUDA kernel for head_dim 40"),
    ):
        assert main(["compile", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def an_h100(monkeypatch):
    """What the launch code asks of a device."""
    monkeypatch.setattr(scheduling, "smem_limit", lambda device: specs.SMEM_LIMITS["90"])
    monkeypatch.setattr(scheduling, "num_sms", lambda device: 132)
    monkeypatch.setattr(scheduling, "arch_of", lambda device: 90)
    scheduling._schedule.cache_clear()
    yield
    scheduling._schedule.cache_clear()


def schedule(
    batch, most_rows=4, *, num_heads=32, num_kv_heads=8, num_splits=0, is_tiered=True, tokens=None, longest=1 << 20,
    head_dim=128,
):  # fmt: skip
    shape, most_late = (tokens or batch, num_heads, head_dim), plan.most_late(batch, longest)
    return scheduling._schedule(
        shape, "float16", 0, num_kv_heads, batch, tokens is not None, most_rows, num_splits, is_tiered, most_late,
        8 if longest <= 256 else 2 if longest <= 320 else 1, longest <= scheduling._MAX_CLUSTERED,
    )  # fmt: skip


@pytest.mark.usefixtures("an_h100")
def test_ctas_share_an_sm_where_sequences_are_many_and_short():
    def shape(batch, longest, head_dim=128):
        found = schedule(batch, is_tiered=False, longest=longest, head_dim=head_dim)
        return dict(found.spec.defines)["KVT_WARPS"], found.spec.per_sm

    assert shape(384, 256) == shape(116, 256) == (1, 8)
    assert shape(384, 257) == shape(64, 320) == shape(115, 256) == (4, 2)
    assert shape(384, 321) == shape(32, 256) == (8, 1)  # too long, too few
    assert shape(384, 256, 64) == shape(384, 4096, 64)  # these share an SM anyway


@pytest.mark.usefixtures("an_h100")
def test_a_long_sequence_is_split_over_all_sms_instead_of_clusters():
    near, far = (schedule(1, is_tiered=False, longest=longest) for longest in (12288, 12289))
    assert (dict(near.spec.defines)["KVT_CLUSTER"], near.grid) == (8, (8, 8, 1))
    assert (dict(far.spec.defines)["KVT_CLUSTER"], far.grid) == (1, (8, 16, 1))


@pytest.mark.usefixtures("an_h100")
def test_more_sequences_than_can_be_planned_are_split_evenly():
    for is_tiered in (False, True):
        found = schedule(specs.MAX_PLANNED + 1, is_tiered=is_tiered)
        assert (found.num_ranges, found.splits, found.is_fixed) == (0, 1, False)
        assert min(found.grid) >= 1


@pytest.mark.usefixtures("an_h100")
def test_two_ctas_share_an_sm_where_there_are_sequences_for_them():
    assert [schedule(batch).spec.per_sm for batch in (1, 24, 32, 64, 256)] == [1, 1, 2, 2, 2]
    assert schedule(64).num_even == 32
    assert (schedule(64).num_ranges, schedule(64).num_late) == (66, 33)


@pytest.mark.usefixtures("an_h100")
def test_there_are_no_late_ranges_where_none_can_be_worth_it():
    assert schedule(64, longest=512).num_late == 0
    assert schedule(64, longest=1024).num_late == 33
    assert schedule(64, longest=512).num_ranges == 33
    assert schedule(24).num_late == 0  # one CTA to an SM


@pytest.mark.usefixtures("an_h100")
def test_a_single_range_needs_no_memory_for_pieces():
    found = schedule(1, 8 * 8192, num_heads=64, tokens=8192)
    assert found.num_ranges == 1
    assert found.partials_nbytes == 0
    assert schedule(64).partials_nbytes > 0


@pytest.mark.usefixtures("an_h100")
@pytest.mark.parametrize("is_tiered", [False, True])
def test_memory_for_pieces_does_not_depend_on_the_longest_length(is_tiered):
    for head_dim in (64, 128):
        found = [
            schedule(64, head_dim=head_dim, longest=n, is_tiered=is_tiered) for n in (64, 512, 1024, 1 << 20)
        ]  # fmt: skip
        assert len({one.partials_nbytes for one in found}) == 1
        partial = found[-1].spec.rows * (head_dim + 2) * 4
        needed = max(2 * one.num_ranges * 8 * partial for one in found)
        assert needed <= found[-1].partials_nbytes <= 2 * needed


@pytest.mark.usefixtures("an_h100")
def test_more_query_rows_than_a_grid_holds_are_refused():
    with pytest.raises(UnsupportedError, match="expected at most 524280 query rows of a kv head .*, got 581632; feed"):
        schedule(1, 71 * 8192, num_heads=71, num_kv_heads=1, tokens=8192)


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 41), (2, 41)])
def test_the_number_of_a_capture_is_what_the_driver_says(monkeypatch, status, expected):
    def answer(stream, state, number, *others):
        assert (stream, others) == (0x70000000000, (None, None, None))
        state._obj.value, number._obj.value = status, 41
        return 0

    monkeypatch.setattr(streams, "library", lambda: SimpleNamespace(cuStreamGetCaptureInfo_v2=answer))
    assert streams.capture_id(0x70000000000) == expected
    assert streams.capture_id(0) == 0, "the legacy stream cannot be captured"
    monkeypatch.setattr(streams, "library", lambda: SimpleNamespace(cuStreamGetCaptureInfo_v2=lambda *_: 901))
    with pytest.raises(DeviceError, match="got error 901"):
        streams.capture_id(0x70000000000)
