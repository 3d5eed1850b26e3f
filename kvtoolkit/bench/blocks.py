"""What block sizes and planning cost: attention over blocks of 8 to 64 tokens, and the small kernels of a step.

The blocks of a sequence are anywhere in the pool, of one size or of all sizes mixed; the attention is the same, so the
times tell what the block size costs, the reading of the tables included. The kernels that are run once a step for all
layers - the plan, the list of granules - are timed apart, as is what calls cost the host.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np

from allocators._command_line import integer
from kvtoolkit import cuda
from kvtoolkit.arrays.call import Hints, attention_call
from kvtoolkit.bench.attention_cases import Case, Shape
from kvtoolkit.bench.timing import device_line, host_us, read_ceiling, require_device, time_graph
from kvtoolkit.cache.kv_cache import KVCache
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.cuda.expand import make_granules
from kvtoolkit.cuda.plan import make_plan, plan_nbytes

_PATTERNS: dict[str, list[tuple[int, ...]]] = {
    "8": [(1,) * 8],
    "16": [(2,) * 4],
    "32": [(4,) * 2],
    "64": [(8,)],
    "mixed": [(8,), (4, 4), (4, 2, 1, 1), (2, 2, 2, 2), (1, 1, 2, 4), (1,) * 8],
}
"""Blocks, in granules, of 64 consecutive tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench blocks``."""
    parser.add_argument(
        "--batch", type=integer(1), nargs="+", default=[64, 256, 1024, 4096], help="sequences to plan for"
    )
    parser.add_argument("--replays", type=integer(1), default=40)
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    require_device("blocks")
    ceiling = read_ceiling()
    print(f"{device_line()}\nbfloat16, 32/8 heads of 128; a large read: {ceiling:.0f} GB/s\n")
    print(f"{'shape':<12}{'blocks of':<12}{'us':>10}{'p10':>10}{'p90':>10}{'of read':>9}{'of fastest':>12}")
    rows: list[dict[str, Any]] = []
    for shape in (Shape("b64_2k", (2048,) * 64), Shape("b64_8k", (8192,) * 64)):
        rows += _block_sizes(shape, options.replays, ceiling)
        torch.cuda.empty_cache()
    print(f"\n{'once a step, us':<24}" + "".join(f"{batch:>10}" for batch in options.batch) + "   sequences of 1024")
    planning = _planning(options.batch)
    print()
    host = _host()
    write_json(options.json, {"read_gbps": ceiling, "blocks": rows, "planning": planning, "host": host})
    return 0


def _block_sizes(shape: Shape, replays: int, ceiling: float) -> list[dict[str, Any]]:
    import torch

    case = Case(shape, 8)
    outs = [torch.empty_like(case.q) for _ in range(case.num_sets)]
    rows = []
    for name in _PATTERNS:
        prepared = [_prepare(case, which, name, outs[which]) for which in range(case.num_sets)]
        error = max(case.error(which, outs[which]) for which in (0, case.num_sets - 1))
        if not error <= 4e-3:
            raise AssertionError(f"{shape.name}, blocks of {name}: off by {error:.1e}")
        timing = time_graph([partial(_again, case, one, out) for one, out in zip(prepared, outs, strict=True)], replays)
        share = shape.kv_nbytes / timing.us / 1e3 / ceiling
        rows.append({"shape": shape.name, "blocks": name, **timing._asdict(), "share_of_read": share, "error": error})
    fastest = min(row["us"] for row in rows)
    for row in rows:
        print(
            f"{row['shape']:<12}{row['blocks']:<12}{row['us']:>10.2f}{row['p10']:>10.2f}{row['p90']:>10.2f}"
            f"{row['share_of_read']:>8.1%}{row['us'] / fastest:>12.4f}",
            flush=True,
        )
    return rows


def _prepare(case: Case, which: int, name: str, out: Any) -> Any:
    """Lay a set out in blocks of one kind anywhere in the pool, and attend to it once."""
    import torch

    rng = np.random.default_rng(which)
    num_supers = case.storage[0].shape[0] // 8
    count = num_supers // case.num_sets
    drawn = [_PATTERNS[name][int(i)] for i in rng.integers(0, len(_PATTERNS[name]), count)]
    # the memory is cut by the same patterns in another order
    pieces: dict[int, list[int]] = {}
    for place, i in zip(rng.permutation(num_supers).tolist(), rng.permutation(count).tolist(), strict=False):
        start = 8 * place
        for size in drawn[i]:
            pieces.setdefault(size, []).append(start)
            start += size
    for free in pieces.values():
        rng.shuffle(free)
    shape, per_row = case.shape, len(drawn) // case.shape.batch
    entries = np.full((shape.batch, 8 * per_row), -1, np.int32)
    starts_of = entries.copy()
    granules = np.empty((shape.batch, 8 * per_row), np.int32)
    for row in range(shape.batch):
        filled = used = 0
        for pattern in drawn[row * per_row : (row + 1) * per_row]:
            for size in pattern:
                start = pieces[size].pop()
                entries[row, used], starts_of[row, used] = start | (size - 1) << 24, filled
                granules[row, filled : filled + size] = np.arange(start, start + size)
                filled += size
                used += 1
    case.tables[which] = torch.from_numpy(granules).cuda()
    names = ("q", "k_cache", "v_cache", "seq_lens")
    q, keys, values, lengths = (cuda.device_operand(getattr(case, one), one) for one in names)
    table, starts = (cuda.device_operand(torch.from_numpy(array).cuda(), "table") for array in (entries, starts_of))
    call = attention_call(
        q, keys, values, table, starts, lengths, out=cuda.device_operand(out, "out"), layout="NHD"
    )  # fmt: skip
    return cuda.attend(call, Hints(kept={}), stream=torch.cuda.current_stream().cuda_stream)


def _again(case: Case, prepared: Any, out: Any) -> None:
    import torch

    addresses = (case.q.data_ptr(), case.k_cache.data_ptr(), case.v_cache.data_ptr(), out.data_ptr())
    cuda.attend_prepared(prepared, *addresses, stream=torch.cuda.current_stream().cuda_stream)


def _planning(batches: list[int]) -> dict[str, list[float]]:
    import torch

    found: dict[str, list[float]] = {"plan": [], "list of granules": []}
    for batch in batches:
        lengths = torch.randint(1, 2048, (batch,), dtype=torch.int32, device="cuda")
        entries = torch.randint(0, 1 << 20, (batch, 256), dtype=torch.int32, device="cuda")
        starts = torch.arange(256, dtype=torch.int32, device="cuda").expand(batch, 256).contiguous()
        tables = [cuda.device_operand(array, "table") for array in (entries, starts, lengths)]
        memory = torch.empty(batch * 2048 + plan_nbytes(batch, 16), dtype=torch.uint8, device="cuda")
        plan = make_plan(memory.data_ptr(), tables[2], None, 16, 0, 16, False, -1, 0, 8, False).launch
        granules = make_granules(memory.data_ptr(), tables[0], tables[1], tables[2], 256).launch
        for name, launch in (("plan", plan), ("list of granules", granules)):

            def run(launch: Any = launch) -> None:
                launch.run(torch.cuda.current_stream().cuda_stream)

            found[name].append(time_graph([run] * 20).us)
    for name, times in found.items():
        print(f"{name:<24}" + "".join(f"{us:>10.2f}" for us in times))
    return found


def _host() -> dict[str, float]:
    """What calls cost the host, checks included."""
    import torch
    import torch._dynamo  # so that steps can be named in graphs

    from kvtoolkit.attention.calls import variable_block_attention

    operators = torch.ops.kvtoolkit
    plain = (None, None)  # scale and window
    shape: dict[str, Any] = {"num_layers": 4, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    cache = KVCache(CacheConfig(**shape, num_tokens=1 << 15, backend="cuda"))
    ids, _ = cache.open([[]] * 64)
    q = torch.randn(64, 32, 128, dtype=torch.bfloat16, device="cuda")
    new = torch.randn(64, 8, 128, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    found: dict[str, float] = {}
    with cache.begin_step(ids, 1) as step:
        there = step.on_device
        step.append(0, new, new)
        step.attend(0, q, out=out)
        found["Step.append, a further layer"] = host_us(lambda: step.append(1, new, new))
        found["Step.attend, a further layer"] = host_us(lambda: step.attend(1, q, out=out))
        arrays = (cache.key_cache(0), cache.value_cache(0), there.block_table, there.block_starts, there.seq_lens)
        keys, values, *tables = (torch.from_dlpack(array) for array in arrays)
        keys, values = keys.view(torch.bfloat16), values.view(torch.bfloat16)
        found["variable_block_attention"] = host_us(lambda: variable_block_attention(q, keys, values, *tables, out=out))
        assert step._in_graphs is not None
        handle, arenas = step._in_graphs
        found["operator step_append"] = host_us(lambda: operators.step_append.default(arenas[1], handle, 1, new, new))
        found["operator step_attend"] = host_us(
            lambda: operators.step_attend.default(out, arenas[1], handle, 1, q, *plain)
        )
        found["operator variable_block_attention"] = host_us(
            lambda: operators.variable_block_attention.default(out, q, keys, values, *tables, *plain)
        )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(4):
                step.append(layer, new, new)
                step.attend(layer, q, out=out)
        found["replay of a graph of 4 layers"] = host_us(graph.replay)
    for name, us in found.items():
        print(f"host, {name:<34}{us:>8.2f} us")
    return found
