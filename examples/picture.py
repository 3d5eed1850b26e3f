"""A picture of an engine at work, 80 columns wide: who holds what in the pool, and what is being written."""

from collections import Counter

import numpy as np
from rich.console import Group
from rich.text import Text

from examples.engine import Engine, Request
from kvtoolkit.tables import unpack_entries

COLORS = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green", "bright_blue")
WIDTH = 78
_PER_LINE = 64
_MOST_LINES = 6
_TIERS = ("16 bit", "int8", "int4")


def draw(engine: Engine, requests: list[Request], texts: list[str]) -> Group:
    """The pool, its figures, and a line for each request, ``texts`` being what each has written so far."""
    tables = held_entries(engine)
    owners = owners_of(engine, requests, tables)
    lines = [*pool_lines(engine, owners), figures(engine), Text()]
    for index, (request, text) in enumerate(zip(requests, texts, strict=True)):
        lines.append(request_line(index, request, text, tables.get(request.seq_id, [])))
    return Group(*lines)


def held_entries(engine: Engine) -> dict[int, list[tuple[int, int]]]:
    """For each running sequence the entries of its block table, as (first granule, length in granules)."""
    tables = {}
    for request in engine.running:
        starts, lengths, _ = unpack_entries(engine.block_tables.get(request.seq_id, np.empty(0, np.int32)))
        tables[request.seq_id] = [(start, n) for start, n in zip(starts.tolist(), lengths.tolist(), strict=True) if n]
    return tables


def owners_of(engine: Engine, requests: list[Request], tables: dict[int, list[tuple[int, int]]]) -> np.ndarray:
    """For each granule of the pool the number of the request that holds it; -1 if none does, -2 if several do.

    With several groups of layers it is the pool of the first one.
    """
    owners = np.full(engine.cache.config.group_configs[0].num_granules, -1)
    for index, request in enumerate(requests):
        for start, length in tables.get(request.seq_id, []):
            run = owners[start : start + length]
            run[:] = np.where(run == -1, index, -2)
    return owners


def pool_lines(engine: Engine, owners: np.ndarray) -> list[Text]:
    """Draw the granules of each tier in groups of eight, the largest block. In a large pool a cell is several."""
    config = engine.cache.config.group_configs[0]
    scale = max(1, -(-len(owners) // (_PER_LINE * _MOST_LINES)))
    lines = []
    for tier, (first, count) in enumerate(zip(config.first_granules, config.tier_granules, strict=True)):
        cells = owners[first : first + count : scale]
        for begin in range(0, len(cells), _PER_LINE):
            name = (_TIERS[tier] if config.tiers else "pool") if begin == 0 else ""
            line = Text(f"{name:<7}")
            for place, owner in enumerate(cells[begin : begin + _PER_LINE]):
                line.append(" " if place and place % 8 == 0 else "")
                line.append(*cell(owner))
            lines.append(line)
    each = f"a cell is {8 * scale} tokens: colored = one request's, white = shared, · = nobody's"
    return [*lines, Text(f"{'':<7}{each}", style="dim")]


def cell(owner: int) -> tuple[str, str]:
    """One cell and its style."""
    if owner == -1:
        return "·", "dim"
    return "■", "bold white" if owner == -2 else COLORS[owner % len(COLORS)]


def figures(engine: Engine) -> Text:
    """Where the slots are, and what has happened so far."""
    stats = engine.cache.stats()
    text = Text(f"{'slots':<7}{stats.used} held, {stats.cached} cached for later prompts, {stats.free} free")
    text.append(f"; waste {stats.waste:.0%}\n")
    text.append(
        f"{'so far':<7}{stats.reused_tokens} tokens reused, {stats.num_merges} merges, {stats.num_evicted} evictions, "
        f"{stats.num_preempted} preemptions"
    )
    return text


def request_line(index: int, request: Request, text: str, entries: list[tuple[int, int]]) -> Text:
    """Number, state, block sizes, and the end of what was written."""
    line = Text(no_wrap=True)
    line.append(f"{index + 1:>2} ", style=COLORS[index % len(COLORS)])
    line.append(f"{state_of(request, entries):<16}", style="dim")
    line.append(tail(text, WIDTH - len(line)))
    return line


def state_of(request: Request, entries: list[tuple[int, int]]) -> str:
    """What a request is doing; if it runs, the sizes of its blocks in tokens."""
    if request.preempted:
        return "in host memory"
    if request.seq_id is None:
        return "finished" if request.output else "waiting"
    sizes = Counter(8 * length for _, length in entries)
    return " ".join(f"{count}x{size}" for size, count in sorted(sizes.items(), reverse=True))[:15]


def tail(text: str, width: int) -> str:
    """The end of a text, in one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else "…" + flat[len(flat) - width + 1 :]
