"""The rules of demotion: the tier that a tile (64 tokens) of a sequence belongs in, by its age or by attention mass.

Both rules keep the same tiles hot, and equally many tiles warm. By age these are the newest, by mass those that
received most attention recently.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import Int64Array
from kvtoolkit.cache.state.block_table import LENGTH, NUM_ENTRIES, BlockTable
from kvtoolkit.cache.state.step_passes import OK, StepArrays
from kvtoolkit.config.tiers import TierConfig
from kvtoolkit.formats.entry import TIER_COLD, TIER_HOT, TIER_WARM, unpack_entries

DEVICE_PERIOD = 16
"""On a GPU, masses are collected every this many steps, because collecting them synchronizes with the device."""
MOST_QUERIES = 8
"""On a GPU, steps with more new tokens in a row collect no masses: prefill says little about what decoding reads."""

_DECAY = 0.95  # weight that the old masses keep at each step


class Rule(NamedTuple):
    """The figures of a `TierConfig` that compiled code needs; the first three in tokens."""

    hot: int
    pinned: int
    warm: int
    """0 if there is no warm tier; larger than any length if there is no cold one."""
    by_mass: bool


def make_rule(config: TierConfig) -> Rule:
    """The rule that a configuration asks for."""
    warm = 0 if config.warm is None else config.warm_tokens if config.cold is not None else 1 << 40
    return Rule(config.hot, config.pinned_tokens, warm, config.demote == "mass")


@jit
def wanted_tier(table: BlockTable, rule: Rule, row: int, tile: int) -> Any:
    """The tier that a tile of a row belongs in. By mass, `set_bar` has decided how much a warm tile needs."""
    length = table.info[row, LENGTH]
    if 64 * tile < rule.pinned or 64 * (tile + 1) > length - rule.hot:
        return TIER_HOT
    if rule.by_mass:
        mass, bar = table.masses[row, tile], table.bar[row, 0]
        return TIER_WARM if mass > bar or (mass == bar and tile >= table.bar[row, 1]) else TIER_COLD
    return TIER_WARM if 64 * (tile + 1) > length - rule.hot - rule.warm else TIER_COLD


def set_bar(table: BlockTable, rule: Rule, row: int) -> None:
    """Set the least mass of tiles that stay warm in a row, and among tiles of just this mass the first that does."""
    length = int(table.info[row, LENGTH])
    first, end = rule.pinned // 64, (length - rule.hot) // 64
    num_warm = end - max(first, (length - rule.hot - rule.warm) // 64)
    entries = table.entries[row, : table.info[row, NUM_ENTRIES]]
    _, _, tiers = unpack_entries(entries)
    cold = table.starts[row, : len(entries)][tiers == TIER_COLD] // 8
    tiles = np.setdiff1d(np.arange(first, end), cold)  # cold tiles stay cold
    if num_warm >= len(tiles):
        table.bar[row] = -1.0, 0
        return
    order = np.lexsort((tiles, table.masses[row, tiles]))[::-1]
    last = tiles[order[num_warm - 1]] if num_warm > 0 else end
    table.bar[row] = (table.masses[row, last], last) if num_warm > 0 else (np.inf, last)


def note_masses(table: BlockTable, step: StepArrays, batch: int, masses: NDArray[np.float64], num_steps: int) -> None:
    """Update the masses of rows by those of a step that has ended.

    Args:
        masses: ``[batch, num_tiles]``, mean over layers and kv heads.
        num_steps: steps since masses were last noted.
    """
    took = np.flatnonzero((step.status[:batch] == OK) & (step.counts[:batch] > 0))
    which: Int64Array = step.rows[took].astype(np.int64)
    num_tiles = masses.shape[1]
    before = table.masses[which, :num_tiles]
    kept = _DECAY**num_steps
    # a broken model can give NaN, which would never decay
    table.masses[which, :num_tiles] = kept * before + (1 - kept) * np.nan_to_num(masses[took])
