"""The rules of demotion: in which tier a tile (64 tokens) of a sequence belongs, by its age or by attention mass.

By mass a sequence keeps as many warm tiles as by age, but those that got most attention of late. What is hot is the
same by either rule.
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
"""Steps of a cache on a GPU from one that collects masses to the next: it notes them, and waits for the device."""
MOST_QUERIES = 8
"""New tokens of a row in a step that collects on a GPU: prefill tells little of what decoding reads."""

_DECAY = 0.95  # what an old mass counts a step later, against one of now


class Rule(NamedTuple):
    """Figures that compiled code can read, in tokens."""

    hot: int
    pinned: int
    warm: int
    """0 where there is no warm tier; far beyond any length where there is no cold one."""
    by_mass: bool


def make_rule(config: TierConfig) -> Rule:
    """The rule that a configuration asks for."""
    warm = 0 if config.warm is None else config.warm_tokens if config.cold is not None else 1 << 40
    return Rule(config.hot, config.pinned_tokens, warm, config.demote == "mass")


@jit
def wanted_tier(table: BlockTable, rule: Rule, row: int, tile: int) -> Any:
    """The tier that a tile of a row belongs in; by mass as of the last `set_bar`."""
    length = table.info[row, LENGTH]
    if 64 * tile < rule.pinned or 64 * (tile + 1) > length - rule.hot:
        return TIER_HOT
    if rule.by_mass:
        mass, bar = table.masses[row, tile], table.bar[row, 0]
        return TIER_WARM if mass > bar or (mass == bar and tile >= table.bar[row, 1]) else TIER_COLD
    return TIER_WARM if 64 * (tile + 1) > length - rule.hot - rule.warm else TIER_COLD


def set_bar(table: BlockTable, rule: Rule, row: int) -> None:
    """Find the mass, and the tile among those of equal mass, from which on the tiles of a row may stay warm."""
    length = int(table.info[row, LENGTH])
    first, end = rule.pinned // 64, (length - rule.hot) // 64
    num_warm = end - max(first, (length - rule.hot - rule.warm) // 64)
    entries = table.entries[row, : table.info[row, NUM_ENTRIES]]
    _, _, tiers = unpack_entries(entries)
    cold = table.starts[row, : len(entries)][tiers == TIER_COLD] // 8
    tiles = np.setdiff1d(np.arange(first, end), cold)  # what is cold does not come back
    if num_warm >= len(tiles):
        table.bar[row] = -1.0, 0
        return
    order = np.lexsort((tiles, table.masses[row, tiles]))[::-1]
    last = tiles[order[num_warm - 1]] if num_warm > 0 else end
    table.bar[row] = (table.masses[row, last], last) if num_warm > 0 else (np.inf, last)


def note_masses(table: BlockTable, step: StepArrays, batch: int, masses: NDArray[np.float64], num_steps: int) -> None:
    """Let the masses of a step that has ended count in those of its rows.

    Args:
        masses: ``[batch, num_tiles]``, mean over layers and kv heads.
        num_steps: from one step whose masses are noted to the next.
    """
    took = np.flatnonzero((step.status[:batch] == OK) & (step.counts[:batch] > 0))
    which: Int64Array = step.rows[took].astype(np.int64)
    num_tiles = masses.shape[1]
    before = table.masses[which, :num_tiles]
    kept = _DECAY**num_steps
    # what is not a number, as a broken model's attention is, must not stay for ever
    table.masses[which, :num_tiles] = kept * before + (1 - kept) * np.nan_to_num(masses[took])
