"""Attention over quantized tiers on a GPU, beside our 16-bit kernel and other people's 16-bit and fp8 ones.

Every figure is a replay of a CUDA graph with one call for each of many sets of blocks, so that the second-level cache
is cold. Outputs are compared with float64 on the same codes before anything is timed. The gain is over our 16-bit
kernel in the same run; the share is that of all bytes read, scales included, over a streaming read of the same run.
"""

import argparse
from functools import partial
from typing import Any

from allocators._command_line import integer
from kvtoolkit.bench.attention import ours
from kvtoolkit.bench.attention_cases import Case, Contender
from kvtoolkit.bench.peers import PEERS, peers_of
from kvtoolkit.bench.tier_cases import MIXES, TIER_SHAPES, TierCase
from kvtoolkit.bench.timing import add_sustained, device_line, read_ceiling, require_device, time_graph
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.errors import ConfigError, UnsupportedError

_MAX_ERROR = 4e-3  # relative L2; bfloat16's rounding alone is 1.7e-3
_MAX_PROMPT_ERROR = 8e-3  # in the prompt kernel keys and values become 16 bits again
_PLAIN, _DEPENDENT, _MASS = "kvtoolkit", "kvtoolkit, dependent", "kvtoolkit, with mass"
_SHARED = "kvtoolkit, shared reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench tiers``."""
    parser.add_argument(
        "--shape", nargs="+", default=list(TIER_SHAPES), metavar="NAME", help=f"of {', '.join(TIER_SHAPES)}"
    )
    parser.add_argument("--mix", nargs="+", default=list(MIXES), help=f"of {', '.join(MIXES)}")
    parser.add_argument("--peer", action="append", default=[], help=f"one of {', '.join(PEERS)}; repeat it for several")
    parser.add_argument("--replays", type=integer(1), default=20)
    add_sustained(parser)
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    require_device("tiers")
    for given, known, name in ((options.shape, TIER_SHAPES, "--shape"), (options.mix, MIXES, "--mix")):
        for one in given:
            if one not in known:
                raise ConfigError(f"{name}: expected some of {', '.join(known)}, got {one!r}")
    ceiling = read_ceiling()
    print(device_line())
    print(f"bfloat16; a large read: {ceiling:.0f} GB/s\n")
    print(
        f"{'shape':<14}{'tiers':<20}{'kernel':<24}{'us':>9}{'p10':>9}{'p90':>9}{'of read':>9}{'error':>10}"
        f"{'MHz':>6}{'W':>5}{'gain':>8}"
    )
    rows: list[dict[str, Any]] = []
    for name in options.shape:
        base = Case(TIER_SHAPES[name], 16, "HND")
        found = peers_of(base, options.peer)
        reference: dict[str, float] = {}
        for contender in [*ours(base), *found]:
            row = _time(base, contender, base.shape.kv_nbytes, "16 bit, paged", options, ceiling)
            if row is not None:
                reference[contender.name] = row["us"]
                rows.append(_told(row, reference))
        del base, found
        torch.cuda.empty_cache()
        for mix in options.mix:
            case = TierCase(TIER_SHAPES[name], MIXES[mix])
            for contender in tiered(case):
                row = _time(case, contender, case.nbytes, mix, options, ceiling)
                assert row is not None
                rows.append(_told(row, reference))
            del case
            torch.cuda.empty_cache()
    write_json(options.json, {"read_gbps": ceiling, "rows": rows})
    return 0


def tiered(case: TierCase) -> list[Contender]:
    """The tiered kernel as the layers of a step run it: lists and plan are made once and shared.

    Where sequences begin with the same tiles, ``shared reads`` reads these once.
    """
    import torch

    from kvtoolkit import cuda
    from kvtoolkit.arrays.call import Hints, QuantizedTiers, Sharing, attention_call
    from kvtoolkit.cuda.shared import SharedAttention

    shape = case.shape
    outs = [torch.empty_like(case.q) for _ in range(case.num_sets)]
    is_decode = set(shape.new_tokens) == {1}
    mass = torch.empty(shape.batch, case.starts.shape[1], shape.num_kv_heads, device="cuda")
    q, keys, values, lengths, starts, masses = (
        cuda.device_operand(one, "array")
        for one in (case.q, case.k_cache, case.v_cache, case.seq_lens, case.starts, mass)
    )
    warm, cold = (None if one is None else cuda.device_operand(one, "tier") for one in case.quantized)
    bounds = None if is_decode else cuda.device_operand(case.cu_seqlens_q, "cu_seqlens_q")
    counts = min(shape.new_tokens), max(shape.new_tokens)
    stream = torch.cuda.current_stream().cuda_stream

    def prepare(block_mass: Any = None, sharing: Sharing | None = None) -> list[Any]:
        return [
            cuda.attend(
                attention_call(
                    q, keys, values, cuda.device_operand(table, "table"), starts, lengths,
                    out=cuda.device_operand(out, "out"), cu_seqlens_q=bounds,
                    tiers=QuantizedTiers(warm, cold, (0, 0, 0)),
                    block_mass=block_mass,
                ),
                Hints(counts, max(shape.lengths), {}, sharing), stream=stream,
            )
            for table, out in zip(case.tables, outs, strict=True)
        ]  # fmt: skip

    addresses = {"warm": warm.address if warm else 0, "cold": cold.address if cold else 0}

    def call(prepared: Any, which: int, dependent: bool, mass: Any) -> Any:
        cuda.attend_prepared(
            prepared[which], q.address, keys.address, values.address, outs[which].data_ptr(),
            block_mass=0 if mass is None else mass.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream, overlaps=dependent, **addresses,
        )  # fmt: skip
        return outs[which]

    plain = prepare()
    kinds: list[tuple[str, list[Any], bool, Any]] = [(_PLAIN, plain, False, None)]
    if shape.beginnings:
        kinds.append((_SHARED, prepare(sharing=Sharing()), False, None))
        if not isinstance(kinds[1][1][0], SharedAttention):
            raise UnsupportedError("shapes that share: expected sm_90")
    else:
        kinds.append((_DEPENDENT, plain, True, None))
        if is_decode:
            kinds.append((_MASS, prepare(masses), False, mass))
    sets = range(case.num_sets)
    return [
        Contender(name, [partial(call, prepared, which, dependent, mass) for which in sets])
        for name, prepared, dependent, mass in kinds
    ]


def _time(
    case: Any, contender: Contender, nbytes: int, tiers: str, options: argparse.Namespace, ceiling: float
) -> dict[str, Any] | None:
    import torch

    is_ours = contender.name.startswith("kvtoolkit")
    try:
        error = max(case.error(which, contender.calls[which]()) for which in {0, case.num_sets - 1})
        by_decode = set(case.shape.new_tokens) == {1} and contender.name != _SHARED
        most = _MAX_ERROR if by_decode else _MAX_PROMPT_ERROR
        if is_ours and not error <= most:
            raise AssertionError(f"{case.shape.name}, {tiers}: {contender.name} is off by {error:.1e}")
        torch.cuda.synchronize()
        timing = time_graph(contender.calls, options.replays, options.sustained)
    except Exception as failure:  # a peer without a kernel for this shape
        if is_ours:
            raise
        print(f"{case.shape.name:<14}{tiers:<20}{contender.name:<24}{failure!s:.60}", flush=True)
        return None
    if "fp8" in contender.name:
        nbytes //= 2
        tiers = "fp8, paged"
    share = nbytes / timing.us / 1e3 / ceiling
    return {
        "shape": case.shape.name,
        "tiers": tiers,
        "kernel": contender.name,
        **timing._asdict(),
        "share_of_read": share,
        "error": error,
    }


def _told(row: dict[str, Any], reference: dict[str, float]) -> dict[str, Any]:
    """Print a row, with its gain over our 16-bit kernel, launched in the same way."""
    base = reference[row["kernel"] if row["kernel"] in (_DEPENDENT, _SHARED) else _PLAIN]
    row["gain"] = base / row["us"]
    print(
        f"{row['shape']:<14}{row['tiers']:<20}{row['kernel']:<24}{row['us']:>9.2f}{row['p10']:>9.2f}{row['p90']:>9.2f}"
        f"{row['share_of_read']:>9.1%}{row['error']:>10.1e}{row['mhz']:>6}{row['watts']:>5.0f}{row['gain']:>8.3f}"
        f"{'  clock moved' if row['clock_moved'] else ''}",
        flush=True,
    )
    return row
