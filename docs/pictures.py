"""Draw the pictures of the documentation from runs with fixed seeds: ``python -m docs.pictures``.

A picture carries a digest of the data that it shows, so a test can tell whether the library still gives that data
without drawing it. The background is transparent and every colour has enough contrast on white and on dark grey.
"""

import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvtoolkit import CacheConfig, KVCache
from kvtoolkit.bench.load_cases import LOADS, Load, Request
from kvtoolkit.bench.loads import CHOICES, Simulation, simulate
from kvtoolkit.tables import TIER_COLD, TIER_HOT, TIER_WARM, unpack_entries

FOLDER = Path(__file__).resolve().parent / "pictures"
TEXT = "#77808c"
COLOURS = ("#2f81c4", "#d0662b", "#3a9a5b", "#b8518f", "#8a72c9", "#a5832b", "#1f95a3", "#c9525c")
SHARED = "#77808c"


# -- data ------------------------------------------------------------------------------------------------------------


def pool_data() -> dict[str, Any]:
    """Who holds each granule of a small pool in each step, and what the pool is used for."""
    random, instructions = np.random.default_rng(0), np.arange(100, 148)
    requests = []
    for i in range(24):
        own = random.integers(1000, 1 << 30, int(random.integers(16, 120)))
        prompt = np.concatenate([instructions, own]) if i % 2 else own
        requests.append(Request(5 * i, prompt, int(random.integers(16, 90))))
    simulation = Simulation(
        Load("picture", tuple(requests), max_batch=8, step_tokens=64), 1024, CHOICES["buddy adaptive"]
    )
    holders, places = [], []
    numbers: dict[int, int] = {}
    for cache in simulation.run():
        ids = [one.seq_id for one in simulation.running]
        row = np.full(cache.config.num_granules, -1)
        if ids:
            with cache.begin_step(ids, 0) as step:  # to read the tables
                for seq_id, entries in zip(ids, step.block_table, strict=True):
                    number = numbers.setdefault(seq_id, len(numbers))
                    for granule, length, _ in zip(*unpack_entries(entries[entries >= 0]), strict=True):
                        run = row[granule : granule + length]
                        run[:] = np.where(run == -1, number, -2)
        stats = cache.stats()
        tokens = round(stats.used * (1 - stats.waste))
        holders.append(row.tolist())
        places.append([tokens, stats.used - tokens, stats.cached])
    return {"holders": holders, "places": places, "capacity": simulation.cache.stats().capacity}


def tiers_data() -> dict[str, Any]:
    """The tier of each tile of a sequence while it grows."""
    tiers = {"hot": 256, "warm": "int8", "warm_tokens": 512, "cold": "int4", "pinned_tokens": 64}
    cache = KVCache(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=64, num_tokens=8192, tiers=tiers))
    (seq_id,), _ = cache.open([[]])
    zeros = np.zeros((8, 1, 64), np.float16)
    found = []
    for _ in range(256):
        with cache.begin_step([seq_id], 8) as step:
            step.append(0, zeros, zeros)
            _, lengths, kinds = unpack_entries(step.block_table[0])
            tiles = np.full(32, -1)
            of_granule = np.repeat(kinds, np.maximum(lengths, 0))[: 8 * 32 : 8]
            tiles[: len(of_granule)] = of_granule
            found.append(tiles.tolist())
            cache.end_step(step)
    return {"tiers": found, "tokens_a_step": 8}


def waste_data() -> dict[str, Any]:
    """Mean share of the held memory that holds no token, by load and choice, while memory is plentiful."""
    names = [
        "paged fixed16",
        "paged fixed64",
        "buddy append",
        "buddy proportional",
        "buddy lazy_merge",
        "buddy adaptive",
    ]
    shown = {}
    for load_name in ("short", "mixed", "long"):
        load = LOADS[load_name]()
        shown[load_name] = {
            name: round(simulate(load, load.pools["plentiful"], CHOICES[name]).waste, 5) for name in names
        }
    return {"waste": shown}


def digest(data: dict[str, Any]) -> str:
    """A short name of some data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


# -- drawing ---------------------------------------------------------------------------------------------------------


def draw_pool(data: dict[str, Any], plt: Any) -> Any:
    """Granules over steps, one colour a sequence; below, a stack of what the slots are used for."""
    holders = np.array(data["holders"])
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, height_ratios=(3, 1), figsize=(8, 5), layout="constrained")
    for number in np.unique(holders):
        if number != -1:
            colour = SHARED if number == -2 else COLOURS[number % len(COLOURS)]
            _fill(top, number == holders.T, colour)
    top.set(xlim=(0, len(holders)), ylim=(0, holders.shape[1]), ylabel="granule (8 tokens)")
    top.set_title("memory of a small pool; one colour a sequence, grey: shared by several", loc="left")
    places = np.repeat(np.array(data["places"]), 2, axis=0).T
    steps = np.repeat(np.arange(len(holders) + 1), 2)[1:-1]
    labels, colours = ("tokens", "room at the ends", "cached prefixes"), (COLOURS[0], COLOURS[7], COLOURS[5])
    bottom.stackplot(steps, places, labels=labels, colors=colours, linewidth=0)
    bottom.set(ylim=(0, data["capacity"]), xlabel="step", ylabel="slots")
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=3, frameon=False, labelcolor=TEXT)
    return figure


def draw_tiers(data: dict[str, Any], plt: Any) -> Any:
    """Positions over the length of the sequence, one colour a tier."""
    tiers = np.array(data["tiers"])
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    step = data["tokens_a_step"]
    names = {TIER_HOT: ("16 bit", COLOURS[7]), TIER_WARM: ("int8", COLOURS[5]), TIER_COLD: ("int4", COLOURS[0])}
    for tier, (name, colour) in names.items():
        _fill(axes, tier == tiers.T, colour, width=step, height=64, label=name)
    axes.set(xlim=(0, step * len(tiers)), ylim=(0, 64 * tiers.shape[1]))
    axes.set(xlabel="tokens of the sequence", ylabel="position")
    axes.set_title("where the tokens of a growing sequence are kept", loc="left")
    axes.legend(loc="upper left", frameon=False, labelcolor=TEXT)
    return figure


def draw_waste(data: dict[str, Any], plt: Any) -> Any:
    """Bars: waste by load and choice."""
    shown = data["waste"]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = list(next(iter(shown.values())))
    for i, name in enumerate(names):
        places = np.arange(len(shown)) + (i - (len(names) - 1) / 2) * 0.14
        heights = [100 * figures[name] for figures in shown.values()]
        bars = axes.bar(places, heights, 0.12, color=COLOURS[i], label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, color=TEXT, padding=2)
    axes.set_xticks(range(len(shown)), [f"{name} requests" for name in shown])
    axes.set_ylabel("% of held slots")
    axes.set_title("room at the ends of sequences while memory is plentiful", loc="left")
    axes.legend(frameon=False, labelcolor=TEXT, ncols=2)
    return figure


def _fill(axes: Any, where: np.ndarray, colour: str, width: int = 1, height: int = 1, label: str | None = None) -> None:
    """Fill the cells of a grid ``[rows, columns]`` as one path: a rectangle for each run of equal columns."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Shape

    open_runs: dict[tuple[int, int], int] = {}
    shapes = []
    for column in range(where.shape[1] + 1):
        edges = np.diff(np.pad(where[:, column] if column < where.shape[1] else where[:, 0] & False, 1).astype(int))
        runs = set(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))
        for low, high in sorted(set(open_runs) - runs):
            left, right = open_runs.pop((low, high)) * width, column * width
            low, high = low * height, high * height
            shapes.append(Shape([(left, low), (right, low), (right, high), (left, high), (left, low)], closed=True))
        for run in runs - set(open_runs):
            open_runs[run] = column
    if shapes:
        path = Shape.make_compound_path(*shapes)
        axes.add_patch(PathPatch(path, facecolor=colour, edgecolor="none", linewidth=0, label=label))


PICTURES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any], Any], Any]]] = {
    "pool": (pool_data, draw_pool),
    "tiers": (tiers_data, draw_tiers),
    "waste": (waste_data, draw_waste),
}


def to_svg(figure: Any, data: dict[str, Any]) -> str:
    """The text of a picture, without dates, versions and more digits than a screen has dots."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<\?xml.*?\?>\s*|<!DOCTYPE.*?>\s*|<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", buffer.getvalue(),
                  flags=re.DOTALL)  # fmt: skip
    text = re.sub(r"\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), text)
    return f"<!-- data {digest(data)} -->\n{re.sub(r'[ ]+$', '', text, flags=re.MULTILINE)}"


def main() -> int:
    """Draw all."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plain = {"axes.edgecolor": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT}
    sizes = {"font.size": 11, "axes.titlesize": 11, "axes.titlecolor": TEXT, "svg.fonttype": "none"}
    frame = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "kvtoolkit"}
    with plt.rc_context({**plain, **sizes, **frame, "font.family": "sans-serif"}):
        for name, (collect, draw) in PICTURES.items():
            data = collect()
            text = to_svg(draw(data, plt), data)
            (FOLDER / f"{name}.svg").write_text(text)
            print(f"{name}.svg: {len(text) / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
