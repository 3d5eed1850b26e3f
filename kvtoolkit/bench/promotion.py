"""What promotion inside device memory costs and brings: quantized tiles written back to 16 bit.

A promoted tile holds the numbers that its codes stand for, so no accuracy comes back. What may be gained is time, where
attention reads 16 bit faster than codes. Each shape is a batch in which the newest tokens are 16 bit and all older ones
are in one tier, or half of them in int8 and half in int4. Its reads are the attention of one layer, launched as the
layers of a step are. A promotion converts all old tiles of all layers, and counts for one layer. It has paid after so
many reads as save the time that it took; never, if reading 16 bit is not faster by more than the two times scatter.

On a GPU every time is a replay of a CUDA graph over layers that are larger together than the second-level cache. All
tiers hold the same random tokens, and before anything is timed, outputs are compared: 16 bit with float64, codes with
16 bit, and promoted tiles with the codes that they were made of.
"""

import argparse
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._command_line import integer
from kvtoolkit.arrays.call import Hints, attention_call
from kvtoolkit.backends import BACKENDS
from kvtoolkit.bench.attention_cases import Shape
from kvtoolkit.bench.timing import Timing, copy_ceiling, device_line, require_device, time_graph
from kvtoolkit.cache.storage.storage import make_storage
from kvtoolkit.commands.json_file import add_json, write_json
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.formats.entry import TIER_COLD, TIER_HOT, TIER_WARM
from kvtoolkit.formats.quantized import BLOCK, INT4, INT8

_SHAPES = ("1x1024", "1x8192", "16x8192", "64x1024", "64x8192", "64x8192+8", "1x8192+512", "1x8192+2048")
_QUICK = ("1x8192", "16x8192")
_MIN_HOT = 256  # newest tokens that are 16 bit in any case
_CODE_NBYTES = 1 << 29  # the int4 tiles of all layers have at least so much, many times the second-level cache
_MIN_LAYERS, _MAX_LAYERS = 8, 128
_MAX_ERROR = 1e-2  # relative L2; in the prompt kernel keys and values of codes become 16 bits, as they do when promoted
_TIERS = {"int8": (TIER_WARM,), "int4": (TIER_COLD,), "half of each": (TIER_WARM, TIER_COLD)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``kvtoolkit bench promotion``."""
    parser.add_argument(
        "--shape", nargs="+", type=parse_shape, metavar="BxL",
        help=f"sequences x cached tokens, then + new tokens of each, default 1; default {' '.join(_SHAPES)}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=f"only {' '.join(_QUICK)}, a quarter of the replays")
    parser.add_argument("--backend", choices=("cuda", "cpu"), default="cuda", help="default cuda; cpu to try it out")
    parser.add_argument("--layers", type=integer(1), help="default: 8 or more, so that no cache holds what they read")
    parser.add_argument("--replays", type=integer(1), default=20)
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    on_device = options.backend == "cuda"
    replays = max(1, options.replays // 4) if options.quick else options.replays
    shapes = options.shape or [parse_shape(text) for text in (_QUICK if options.quick else _SHAPES)]
    if on_device:
        require_device("promotion")
    ceiling = copy_ceiling() if on_device else None
    print(device_line() if on_device else "on the CPU")
    print("bfloat16, 32 query and 8 kv heads of 128; us and MiB of one layer" + _told_ceiling(ceiling))
    rows = []
    for shape in shapes:
        rows += _measure(shape, options.backend, options.layers, replays)
        if on_device:
            _free()
    print(f"\n{reads_table(rows)}\n\n{promotions_table(rows, ceiling)}\n\n{_clocks(rows)}")
    write_json(options.json, {"copy_gbps": ceiling, "rows": rows})
    return 0


def _told_ceiling(ceiling: float | None) -> str:
    return "" if ceiling is None else f"; a large copy: {ceiling:.0f} GB/s, read and written"


def parse_shape(text: str) -> Shape:
    """The shape that ``BxL`` or ``BxL+N`` names; ArgumentTypeError if there is none.

    Sequences hold L tokens before the step. One new token is the last of these, as in the other benches; more are added
    to them.
    """
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,5})(?:\+([1-9]\d{0,4}))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected sequences x tokens, as 64x8192 or 64x8192+8, got {text!r:.80}")
    batch, cached, new = (int(one or 1) for one in found.groups())
    length = cached + new if new > 1 else cached
    if cached < _MIN_HOT + 2 * BLOCK:
        raise argparse.ArgumentTypeError(f"expected {_MIN_HOT + 2 * BLOCK} cached tokens or more, got {text!r:.80}")
    return Shape(text, (length,) * batch, new=(new,) * batch)


# -- one shape -------------------------------------------------------------------------------------------------------


class PromotionCase:
    """A batch whose old tiles are in every tier at once, in several layers, each tile at a random place.

    Attributes:
        storage: the arrays of a cache, all tiers with room for all tiles.
        num_old: old tiles of a sequence, its first ones; the others are 16 bit.
    """

    def __init__(self, shape: Shape, backend: str, num_layers: int | None = None) -> None:
        import torch

        self.shape, self.backend = shape, BACKENDS[backend]
        tiles = -(-shape.lengths[0] // BLOCK)
        self.num_old = (shape.lengths[0] - max(_MIN_HOT, shape.new_tokens[0])) // BLOCK
        count = shape.batch * tiles
        nbytes = dict(zip(("hot", "warm", "cold"), _tile_nbytes(shape), strict=True))
        of_layer = shape.batch * self.num_old * nbytes["cold"]
        self.num_layers = num_layers or min(_MAX_LAYERS, max(_MIN_LAYERS, -(-_CODE_NBYTES // of_layer)))
        total = sum(nbytes.values())
        shares = {name: size / total for name, size in nbytes.items()}  # so each tier has room for as many tiles
        config = CacheConfig(
            num_layers=self.num_layers, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, dtype="bfloat16",
            backend=backend, num_tokens=3 * count * BLOCK, prefix_caching=False,
            tiers={"hot": BLOCK, "warm": "int8", "cold": "int4", "pinned_tokens": 0, "tier_memory": shares},
        )  # fmt: skip
        if min(config.tier_granules) < 8 * count:
            raise AssertionError(f"bench promotion: {shape.name}: {config.tier_granules} granules for {count} tiles")
        self.storage = make_storage(config)
        rng = np.random.default_rng(1)
        self._granules = {
            tier: config.first_granules[tier] + 8 * rng.permutation(count).reshape(shape.batch, tiles).astype(np.int32)
            for tier in (TIER_HOT, TIER_WARM, TIER_COLD)
        }
        device = "cpu" if backend == "cpu" else "cuda"
        torch.manual_seed(1)
        for layer in range(self.num_layers):  # the whole may have more elements than a call takes
            torch.from_dlpack(self.storage.key_values[layer]).view(torch.bfloat16).normal_()
        if device == "cuda":
            torch.cuda.synchronize()
        bounds = np.cumsum((0, *shape.new_tokens), dtype=np.int32)
        self.q = torch.randn(int(bounds[-1]), shape.num_q_heads, shape.head_dim, device=device).bfloat16()
        self.outs = [torch.empty_like(self.q) for _ in range(self.num_layers)]
        self._to_device = partial(torch.as_tensor, device=device)
        self._seq_lens = self._to_device(np.array(shape.lengths, np.int32))
        self._bounds = self._to_device(bounds) if shape.new_tokens[0] > 1 else None
        starts = np.broadcast_to(8 * np.arange(tiles, dtype=np.int32), (shape.batch, tiles))
        self._starts = self._to_device(starts.copy())
        self._tables: list[Any] = []
        for tier in (TIER_WARM, TIER_COLD):
            self.storage.convert_tiles(self._tiles((TIER_HOT,)), self._tiles((tier,)))

    def _tiles(self, tiers: Sequence[int]) -> NDArray[np.int32]:
        """The 8 granules of each old tile, ``[n, 8]``, in tiers that take turns along a sequence."""
        old = self._in_turn(tiers).reshape(-1, 1)
        found: NDArray[np.int32] = (old + np.arange(8)).astype(np.int32)
        return found

    def _in_turn(self, tiers: Sequence[int]) -> NDArray[np.int32]:
        which = np.arange(self.num_old) % len(tiers)
        return np.stack([self._granules[tier][:, : self.num_old] for tier in tiers])[
            which, :, np.arange(self.num_old)
        ].T

    def promotions(self, tiers: Sequence[int]) -> Callable[[], None]:
        """The call that writes the old tiles, which are in these tiers, to 16 bit in all layers."""
        return partial(self.storage.convert_tiles, self._tiles(tiers), self._tiles((TIER_HOT,)))

    def promoted_nbytes(self, tiers: Sequence[int]) -> tuple[int, int]:
        """Bytes that a layer's old tiles have in these tiers, and in 16 bit."""
        sizes = _tile_nbytes(self.shape)
        here = sum(sizes[tiers[i % len(tiers)]] for i in range(self.num_old))
        return self.shape.batch * here, self.shape.batch * self.num_old * sizes[TIER_HOT]

    def reads(self, tiers: Sequence[int], *, only_hot: bool = False) -> list[Callable[[], Any]]:
        """Attention with the old tiles in these tiers, one call for each layer; each returns its output.

        ``only_hot``: by the kernel for 16 bit alone, if no old tile is quantized.
        """
        storage, describe = self.storage, self.backend.describe
        entries = self._granules[TIER_HOT] | (7 << 24)
        which = np.array(tiers)[np.arange(self.num_old) % len(tiers)]
        entries[:, : self.num_old] = self._in_turn(tiers) | (7 << 24) | (which << 27).astype(np.int32)
        table = self._to_device(entries)
        self._tables.append(table)  # a prepared call has its address
        quantized = storage.quantized
        assert quantized is not None
        new = self.shape.new_tokens[0]
        hints = Hints((new, new), max(self.shape.lengths), {})
        first = attention_call(
            describe(self.q, "q"), storage.keys[0], storage.values[0], describe(table, "block_table"),
            describe(self._starts, "block_starts"), describe(self._seq_lens, "seq_lens"),
            out=describe(self.outs[0], "out"), tiers=None if only_hot else quantized[0],
            cu_seqlens_q=None if self._bounds is None else describe(self._bounds, "cu_seqlens_q"),
        )  # fmt: skip
        prepared = self.backend.attend(first, hints)

        def read(layer: int) -> Any:
            addresses = {} if only_hot else quantized[layer].addresses()
            self.backend.attend_prepared(
                prepared, self.q.data_ptr(), storage.keys[layer].address, storage.values[layer].address,
                self.outs[layer].data_ptr(), overlaps=True, **addresses,
            )  # fmt: skip
            return self.outs[layer]

        return [partial(read, layer) for layer in range(self.num_layers)]

    def exact(self, row: int, head: int) -> Any:
        """float64 attention of a query head's last token over the 16-bit tiles of the last layer."""
        import torch

        held = torch.from_dlpack(self.storage.key_values[self.num_layers - 1])
        where = (self._granules[TIER_HOT][row][:, None] + np.arange(8)).reshape(-1)
        group = self.shape.num_q_heads // self.shape.num_kv_heads
        tokens = held.view(torch.bfloat16)[:, self._to_device(where).long(), head // group]
        keys, values = tokens.double().flatten(1, 2)[:, : self.shape.lengths[row]]
        at = sum(self.shape.new_tokens[: row + 1]) - 1
        scores = keys @ self.q[at, head].double() * self.shape.head_dim**-0.5
        return scores.softmax(0) @ values


def _tile_nbytes(shape: Shape) -> tuple[int, int, int]:
    """Bytes of keys and values of a tile, all heads of a layer: hot, warm, cold."""
    heads, dims = shape.num_kv_heads, shape.head_dim
    return heads * BLOCK * dims * 4, heads * INT8.nbytes(dims), heads * INT4.nbytes(dims)


def _relative(found: Any, wanted: Any) -> float:
    return math.sqrt(float((found.double() - wanted.double()).square().sum() / wanted.double().square().sum()))


def _measure(shape: Shape, backend: str, num_layers: int | None, replays: int) -> list[dict[str, Any]]:
    """A row for each mixture of tiers; see `reads_table` and `promotions_table`."""
    case = PromotionCase(shape, backend, num_layers)
    time_calls = partial(time_graph, replays=replays) if backend == "cuda" else partial(_time_on_cpu, replays=replays)
    hot, alone = case.reads((TIER_HOT,)), case.reads((TIER_HOT,), only_hot=True)
    for calls in (alone, hot):
        out = calls[-1]()
        _require_close(shape, "16 bit", _relative(out[-1, -1], case.exact(shape.batch - 1, shape.num_q_heads - 1)))
    original = out.clone()
    found = {}
    for name, tiers in _TIERS.items():
        read = case.reads(tiers)
        found[name] = read, case.promotions(tiers), read[-1]().clone()
    errors = {}
    for name, (_, promote, quantized) in found.items():
        promote()
        promoted = hot[-1]()
        _require_close(shape, f"promoted from {name}", _relative(promoted, quantized))
        errors[name] = _relative(quantized, original), _relative(promoted, original)
    hot_timing, alone_timing = time_calls(hot), time_calls(alone)
    rows = []
    for name, (read, promote, _) in found.items():
        read_timing, promotion = time_calls(read), _for_layer(time_calls([promote]), case.num_layers)
        before, after = case.promoted_nbytes(_TIERS[name])
        rows.append(
            {
                "shape": shape.name, "tiers": name, "layers": case.num_layers, "old_tokens": case.num_old * BLOCK,
                "read": read_timing._asdict(), "hot_read": hot_timing._asdict(), "hot_alone": alone_timing._asdict(),
                "promotion": promotion._asdict(), "nbytes_before": before, "nbytes_after": after,
                "gbps": (before + after) / promotion.us / 1e3, "error": errors[name][0],
                "error_promoted": errors[name][1], "pays_after": pays_after(promotion, read_timing, hot_timing),
            }
        )  # fmt: skip
    return rows


def _require_close(shape: Shape, what: str, error: float) -> None:
    if not error <= _MAX_ERROR:
        raise AssertionError(f"bench promotion: {shape.name}, {what}: off by {error:.1e}")


def _for_layer(timing: Timing, num_layers: int) -> Timing:
    return timing._replace(us=timing.us / num_layers, p10=timing.p10 / num_layers, p90=timing.p90 / num_layers)


def _time_on_cpu(calls: Sequence[Callable[[], Any]], replays: int) -> Timing:
    """The same figures as `time_graph`, by a clock of the host; what calls read may be in a cache."""
    times = []
    for _ in range(replays + 1):
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - begin) / len(calls) * 1e6)
    p10, median, p90 = np.percentile(times[1:], [10, 50, 90])
    return Timing(float(median), float(p10), float(p90), 0, 0.0, False)


def _free() -> None:
    """Give the memory of the last case back."""
    import gc

    import cupy
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    cupy.get_default_memory_pool().free_all_blocks()


# -- what it comes to ------------------------------------------------------------------------------------------------


def pays_after(promotion: Timing, read: Timing, hot_read: Timing) -> int | None:
    """Reads until a promotion has saved the time that it took; None: never.

    Args:
        promotion: of the tiles that a read reads.
        read: with these tiles quantized.
        hot_read: with them in 16 bit. It saves nothing unless nine of ten are faster than nine of ten quantized ones.
    """
    if hot_read.p90 >= read.p10:
        return None
    return max(1, math.ceil(promotion.us / (read.us - hot_read.us)))


def reads_table(rows: Sequence[dict[str, Any]]) -> str:
    """Microseconds of a read of each shape, by where its old tokens are.

    "16 bit alone" is the kernel of caches without tiers.
    """
    lines = ["| batch x cached + new tokens | layers | 16 bit alone | 16 bit | int8 | int4 | half of each |"]
    lines.append("|---" * 7 + "|")
    for name in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == name]
        times = [own[0]["hot_alone"], own[0]["hot_read"], *(row["read"] for row in own)]
        lines.append(_line([_spaced(name), str(own[0]["layers"]), *(f"{one['us']:.1f}" for one in times)]))
    return "\n".join(lines)


def promotions_table(rows: Sequence[dict[str, Any]], ceiling: float | None) -> str:
    """What each promotion takes and changes.

    "Error" is that of the attention against 16 bit, before and after.
    """
    lines = [
        "| batch x cached + new tokens | from | us | GB/s | of a copy | a read, us | pays after | MiB more | error |"
    ]
    lines.append("|---" * 9 + "|")
    for row in rows:
        paid = "never" if row["pays_after"] is None else f"{row['pays_after']} reads"
        cells = [
            _spaced(row["shape"]), row["tiers"], f"{row['promotion']['us']:.1f}", f"{row['gbps']:.0f}",
            "" if ceiling is None else f"{row['gbps'] / ceiling:.0%}",
            f"{row['hot_read']['us'] - row['read']['us']:+.1f}", paid,
            f"{(row['nbytes_after'] - row['nbytes_before']) / (1 << 20):.1f}",
            f"{row['error']:.1e}, {row['error_promoted']:.1e}",
        ]  # fmt: skip
        lines.append(_line(cells))
    return "\n".join(lines)


def _spaced(shape: str) -> str:
    return shape.replace("x", " x ").replace("+", " + ")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _clocks(rows: Sequence[dict[str, Any]]) -> str:
    """The clocks of all timings, and how many had no steady one."""
    timings = [row[key] for row in rows for key in ("read", "hot_read", "hot_alone", "promotion")]
    clocks = [one["mhz"] for one in timings]
    moved = sum(one["clock_moved"] for one in timings)
    return (
        f"SM clock {min(clocks)} to {max(clocks)} MHz; it moved by more than 2 % in {moved} of {len(timings)} timings"
    )
