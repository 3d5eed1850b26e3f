"""Attention on a GPU, ours beside other people's kernels on the same tensors in the same run.

Every figure is a replay of a CUDA graph with one call for each of many sets of blocks, so that the second-level cache
is cold. Outputs are compared with float64 before anything is timed. The share is that of the bytes of keys and values,
read once, over a streaming read of the same run.
"""

import argparse
import math
from functools import partial
from typing import Any

from allocators._command_line import integer
from kvtoolkit.bench.attention_cases import KINDS, SHAPES, Case, Contender
from kvtoolkit.bench.peers import PEERS, peers_of
from kvtoolkit.bench.timing import add_sustained, device_line, read_ceiling, require_device, time_graph
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.errors import ConfigError, UnsupportedError

_MAX_ERROR = 4e-3  # relative L2; bfloat16's rounding alone is 1.7e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench attention``."""
    parser.add_argument(
        "--kind", choices=list(KINDS), default="decode", metavar="KIND",
        help=f"of batches, where no shape is named: {', '.join(KINDS)}",
    )  # fmt: skip
    parser.add_argument("--shape", nargs="+", default=[], help="by name; all: every one but those of the sweep")
    parser.add_argument("--peer", action="append", default=[], help=f"one of {', '.join(PEERS)}; repeat it for several")
    parser.add_argument("--block-size", type=integer(1), default=16, help="tokens to a block")
    parser.add_argument("--layout", choices=["HND", "NHD"], default="HND", help="of the blocks, for all kernels")
    parser.add_argument("--replays", type=integer(1), default=40)
    add_sustained(parser)
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    require_device("attention")
    everything = [name for name in SHAPES if name not in KINDS["sweep"]]
    names = everything if options.shape == ["all"] else options.shape or list(KINDS[options.kind])
    for name in names:
        if name not in SHAPES:
            raise ConfigError(f"--shape: expected some of {', '.join(SHAPES)} or all, got {name!r}")
    ceiling = read_ceiling()
    print(device_line())
    print(f"bfloat16, {options.layout} blocks of {options.block_size}; a large read: {ceiling:.0f} GB/s\n")
    print(
        f"{'shape':<22}{'kernel':<24}{'us':>9}{'p10':>9}{'p90':>9}{'of read':>9}{'TFLOP/s':>9}{'error':>10}"
        f"{'MHz':>6}{'W':>5}{'ratio':>8}"
    )
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += _measure(Case(SHAPES[name], options.block_size, options.layout), options, ceiling)
        torch.cuda.empty_cache()
    for line in summary(rows):
        print(line)
    write_json(options.json, {"read_gbps": ceiling, "rows": rows})
    return 0


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """What is said of all shapes together: the geometric mean of each kernel of ours, and where it is worst."""
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows if row["ratio"]):
        ratios = {row["shape"]: row["ratio"] for row in rows if row["kernel"] == kernel and row["ratio"]}
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        worst = min(ratios, key=lambda shape: ratios[shape])
        lines.append(f"{kernel}: {len(ratios)} shapes, geometric mean {mean:.3f}, lowest {ratios[worst]:.3f} ({worst})")
    return lines


def _measure(case: Case, options: argparse.Namespace, ceiling: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    best = None
    for contender in [*peers_of(case, options.peer), *ours(case)]:
        try:
            row = _time(case, contender, options, ceiling)
        except Exception as error:  # a peer without a kernel for this shape
            if contender.name.startswith("kvtoolkit"):
                raise
            print(f"{case.shape.name:<22}{contender.name:<24}{type(error).__name__}: {error!s:.60}", flush=True)
            continue
        is_ours = contender.name.startswith("kvtoolkit")
        if not is_ours and row["error"] <= _MAX_ERROR:
            best = min(best or row["us"], row["us"])
        row["ratio"] = best / row["us"] if is_ours and best else None
        found.append(row)
        ratio = f"{row['ratio']:>8.3f}" if row["ratio"] else ""
        print(
            f"{row['shape']:<22}{row['kernel']:<24}{row['us']:>9.2f}{row['p10']:>9.2f}{row['p90']:>9.2f}"
            f"{row['share_of_read']:>9.1%}{row['tflops']:>9.0f}{row['error']:>10.1e}{row['mhz']:>6}{row['watts']:>5.0f}{ratio}"
            f"{'  clock moved' if row['clock_moved'] else ''}",
            flush=True,
        )
    return found


def ours(case: Case) -> list[Contender]:
    """kvtoolkit on the peers' tensors, as the layers of a step run it: the plan is made once and shared.

    ``dependent`` lets a kernel begin while the one before it still runs, as a step does on sm_90. ``shared reads``
    reads what sequences have in common once.
    """
    import torch

    from kvtoolkit import cuda
    from kvtoolkit.arrays.call import Hints, Sharing, attention_call
    from kvtoolkit.cuda.shared import SharedAttention

    shape = case.shape
    most = max(shape.new_tokens)
    outs = [torch.empty_like(case.q) for _ in range(case.num_sets)]
    names = ("q", "k_cache", "v_cache", "seq_lens", "cu_seqlens_q")
    q, keys, values, lengths, bounds = (cuda.device_operand(getattr(case, name), name) for name in names)

    def prepare(sharing: Sharing | None) -> list[Any]:
        return [
            cuda.attend(
                attention_call(
                    q, keys, values, cuda.device_operand(table, "table"), None, lengths,
                    out=cuda.device_operand(out, "out"), cu_seqlens_q=None if most == 1 else bounds,
                    layout="NHD",
                ),
                Hints((min(shape.new_tokens), most), max(shape.lengths), {}, sharing),
                stream=torch.cuda.current_stream().cuda_stream,
            )
            for table, out in zip(case.tables, outs, strict=True)
        ]  # fmt: skip

    def call(prepared: list[Any], which: int, dependent: bool) -> Any:
        stream = torch.cuda.current_stream().cuda_stream
        addresses = (q.address, keys.address, values.address, outs[which].data_ptr())
        cuda.attend_prepared(prepared[which], *addresses, stream=stream, overlaps=dependent)
        return outs[which]

    plain = prepare(None)
    kinds = [("kvtoolkit", plain, False), ("kvtoolkit, dependent", plain, True)]
    if shape.beginnings:
        kinds[1] = ("kvtoolkit, shared reads", prepare(Sharing()), False)
        if not isinstance(kinds[1][1][0], SharedAttention):
            raise UnsupportedError("--kind shared: expected sm_90 and blocks of a multiple of 8 tokens")
    sets = range(case.num_sets)
    return [
        Contender(name, [partial(call, prepared, which, dependent) for which in sets])
        for name, prepared, dependent in kinds
    ]


def _time(case: Case, contender: Contender, options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    import torch

    error = 0.0
    for which in (0, case.num_sets - 1):
        error = max(error, case.error(which, contender.calls[which]()))
    if contender.name.startswith("kvtoolkit") and not error <= _MAX_ERROR:
        raise AssertionError(f"{case.shape.name}: kvtoolkit is off by {error:.1e}")
    torch.cuda.synchronize()
    timing = time_graph(contender.calls, options.replays, options.sustained)
    return {
        "shape": case.shape.name,
        "kernel": contender.name,
        **timing._asdict(),
        "gbps": case.shape.kv_nbytes / timing.us / 1e3,
        "tflops": case.shape.flops / timing.us / 1e6,
        "share_of_read": case.shape.kv_nbytes / timing.us / 1e3 / ceiling,
        "error": error,
    }
