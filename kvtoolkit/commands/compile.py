"""Compile ahead: the GPU kernels for any architecture, without a GPU, or all that a cache on the CPU runs."""

import argparse
from typing import Any

from allocators._command_line import integer
from allocators._jit import cache_folder
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.cuda import specs
from kvtoolkit.errors import ArgumentError, UnsupportedError
from kvtoolkit.formats.quantized import HEAD_DIMS
from kvtoolkit.runtime import build

_SM_SMEM = {"80": 164, "86": 100, "89": 100, "90": 228, "100": 228, "120": 100}  # KiB of an SM
_SM_REGISTERS = 65536
_DEFAULTS: dict[str, dict[str, list[Any]]] = {
    "cpu": {"allocator": ["paged", "buddy", "slab", "lockfree"]},
    "cuda": {"arch": ["90"], "head_dim": [128], "heads": [(32, 8)], "dtype": ["float16", "bfloat16"]},
}
"""The options that belong to one backend."""
_SM_THREADS = {"80": 2048, "86": 1536, "89": 1536, "90": 2048, "100": 2048, "120": 1536}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit compile``."""
    parser.add_argument(
        "--backend", choices=["cuda", "cpu"], default="cuda", help="whose code to compile (default %(default)s)"
    )
    parser.add_argument(
        "--tiers",
        action="store_true",
        help="also the code of quantized tiers and of attention masses; GPU kernels for it have head_dim 64 or 128",
    )
    add_json(parser, "table")
    cpu = parser.add_argument_group("with --backend cpu")
    cpu.add_argument(
        "--allocator",
        nargs="+",
        metavar="NAME",
        help="allocators of the caches, one of your own as package.module:Class (default: all of ours)",
    )
    gpu = parser.add_argument_group("with --backend cuda")
    gpu.add_argument("--arch", nargs="+", metavar="CC", help="compute capabilities such as 90, or all (default 90)")
    gpu.add_argument(
        "--head-dim", type=integer(1), nargs="+", metavar="N", help="multiples of 16 up to 256 (default 128)"
    )
    gpu.add_argument("--heads", type=heads, nargs="+", metavar="Q/KV", help="query and kv heads (default 32/8)")
    gpu.add_argument(
        "--dtype", nargs="+", choices=["float16", "bfloat16"],
        metavar="TYPE", help="float16, bfloat16 (default both)",
    )  # fmt: skip


def heads(text: str) -> tuple[int, int]:
    """Parse numbers of query and kv heads, such as ``32/8``."""
    q_heads, _, kv_heads = text.partition("/")
    if not (q_heads.isdecimal() and kv_heads.isdecimal() and int(kv_heads) and int(q_heads)):
        raise argparse.ArgumentTypeError(f"expected query and kv heads such as 32/8, got {text!r}")
    if int(q_heads) % int(kv_heads):
        raise argparse.ArgumentTypeError(f"expected the query heads to be a multiple of the kv heads, got {text!r}")
    return int(q_heads), int(kv_heads)


def main(options: argparse.Namespace) -> int:
    """Compile and print a table."""
    _settle(options)
    if options.backend == "cpu":
        from kvtoolkit.commands import compile_cpu

        return compile_cpu.main(options)
    archs = list(specs.SMEM_LIMITS) if options.arch == ["all"] else [name.removeprefix("sm_") for name in options.arch]
    for arch in archs:
        if arch not in specs.SMEM_LIMITS:
            raise UnsupportedError(f"--arch: expected some of {', '.join(specs.SMEM_LIMITS)} or all, got {arch!r}")
    for head_dim in options.head_dim:
        specs.check_head_dim(head_dim, "float16")
    print(f"{'kernel':<18}{'arch':>6}  {'macros':<104}{'regs':>5}{'spills':>8}{'smem KiB':>10}{'CTAs/SM':>9}{'s':>7}")
    rows: list[dict[str, Any]] = []
    for arch in archs:
        for spec in _specs(arch, options):
            rows.append(row_of(spec, arch))
            print(line_of(rows[-1]), flush=True)
    folder = cache_folder("cubin")
    where = f"kept in {folder}" if folder else "not kept: no folder can be used, see `kvtoolkit doctor`"
    print(f"{len(rows)} kernels, {sum(row['seconds'] for row in rows):.1f} s (0.00 = from the cache), {where}")
    write_json(options.json, rows)
    return 0


def _settle(options: argparse.Namespace) -> None:
    """Fill in what was not given; ArgumentError for an option that the backend would ignore."""
    for backend, defaults in _DEFAULTS.items():
        for name, default in defaults.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
            elif backend != options.backend:
                option = name.replace("_", "-")
                raise ArgumentError(f"--{option}: expected only with --backend {backend}, got {options.backend}")


def _specs(arch: str, options: argparse.Namespace) -> list[specs.Spec]:
    found: dict[specs.Spec, None] = {}
    for head_dim in options.head_dim:
        for dtype in options.dtype:
            for num_heads in options.heads:
                limit = specs.SMEM_LIMITS[arch]
                q_heads, kv_heads = num_heads
                tiers = options.tiers and head_dim in HEAD_DIMS
                kernels = specs.of_model(
                    head_dim, dtype, q_heads, kv_heads, int(arch), limit, tiers=tiers, masses=tiers
                )
                found |= dict.fromkeys(kernels)
    return list(found)


def row_of(spec: specs.Spec, arch: str) -> dict[str, Any]:
    """Compile one kernel. Returns what it needs of an SM."""
    built = build(spec.source, dict(spec.defines), arch + spec.feature)
    (usage,) = (usage for usage in built.usage if usage.name == spec.name)
    smem = spec.smem_nbytes + usage.smem_nbytes
    by_registers = _SM_REGISTERS // (-(-usage.registers // 8) * 8 * spec.threads)
    by_smem = (_SM_SMEM[arch] << 10) // (smem + 1024)  # the driver takes 1 KiB of each CTA
    return {
        "kernel": spec.name,
        "arch": f"sm_{arch}",
        "macros": dict(spec.defines),
        "registers": usage.registers,
        "spill_nbytes": usage.spill_nbytes,
        "smem_nbytes": smem,
        "threads": spec.threads,
        "ctas_per_sm": min(by_registers, by_smem, _SM_THREADS[arch] // spec.threads, 32),
        "seconds": built.seconds,
    }


def line_of(row: dict[str, Any]) -> str:
    """Format a row as a line of the table."""
    macros = " ".join(f"{name.removeprefix('KVT_').lower()}={value}" for name, value in row["macros"].items())
    return (
        f"{row['kernel']:<18}{row['arch']:>6}  {macros:<104}{row['registers']:>5}{row['spill_nbytes']:>8}"
        f"{row['smem_nbytes'] / 1024:>10.1f}{row['ctas_per_sm']:>9}{row['seconds']:>7.2f}"
    )
