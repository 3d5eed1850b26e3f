"""The compiled moves that change the tier of tiles (64 consecutive tokens of a row, from a multiple of 64 on).

A tile in a quantized tier is one entry of 8 granules. Rows that hold the same 8 granules at a tile are its
sharers; their entries change together. A row that shares only some of the 8 is its only sharer, and gets a copy.
"""

from typing import Any

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CLOSED,
    IN_STEP,
    LAST_MARK,
    LENGTH,
    NUM_ENTRIES,
    OPEN,
    OWNER,
    PREEMPTED,
    STATE,
    BlockTable,
    find_entry,
    granule_at,
    touch,
)
from kvtoolkit.cache.state.prefix_index import HELD, NEXT, GranuleState, Holdings, hand_over, note_let_go, pool_of
from kvtoolkit.cache.state.step_passes import StepArrays
from kvtoolkit.cache.tiering.rules import Rule, wanted_tier
from kvtoolkit.formats.entry import TIER_HOT, TIER_WARM, entry_granule, entry_length, entry_tier, pack_entry

# columns of what `list_due` finds
ROW, TILE, AGE, IS_HOT = range(4)


@jit
def any_due(info: Int64Array, scanned: Int32Array) -> Any:
    """Whether the number of full tiles of an open row has changed since `list_due` last looked at it."""
    for row in range(len(info)):
        if scanned[row] != info[row, LENGTH] >> 6 and (info[row, STATE] == OPEN or info[row, STATE] == IN_STEP):
            return True
    return False


@jit
def list_changed(table: BlockTable, everything: bool, out: Int32Array) -> Any:
    """Write the rows that `list_due` will look at to ``out``; returns how many."""
    count = 0
    for row in range(len(table.info)):
        if _may_change(table, row) and (table.scanned[row] != table.info[row, LENGTH] >> 6 or everything):
            out[count] = row
            count += 1
    return count


@jit
def count_missing(table: BlockTable, step: StepArrays, num_need: int) -> Any:
    """Granules that the rows in ``step.work[0]`` lack for their new tokens."""
    missing = 0
    for i in range(num_need):
        b = step.work[0, i]
        row = step.rows[b]
        missing += (table.info[row, LENGTH] + step.counts[b] + 7) // 8 - table.info[row, CAPACITY]
    return missing


@jit
def _may_change(table: BlockTable, row: int) -> Any:
    """Whether a row is open, or in the step that begins just now, whose table nobody has read yet."""
    state = table.info[row, STATE]
    return state == OPEN or (state == IN_STEP and table.marks[row, OWNER] == table.clock[LAST_MARK])


@jit
def list_due(table: BlockTable, rule: Rule, everything: bool, found: Int64Array) -> Any:
    """List the tiles that belong in a colder tier; columns above. Returns how many there are, even if not all fit.

    Unless ``everything``, this looks only at rows whose number of full tiles has changed since the last time. Rows
    without such tiles are marked as looked at.
    """
    count = 0
    for row in range(len(table.info)):
        length = table.info[row, LENGTH]
        if not _may_change(table, row) or (table.scanned[row] == length >> 6 and not everything):
            continue
        before, e = count, 0
        for tile in range(rule.pinned >> 6, length >> 6):
            tier = wanted_tier(table, rule, row, tile)
            if tier == TIER_HOT:
                break
            while e + 1 < table.info[row, NUM_ENTRIES] and table.starts[row, e + 1] <= 8 * tile:
                e += 1
            held = entry_tier(table.entries[row, e])
            if held < tier:
                if count < len(found):
                    found[count, ROW], found[count, TILE] = row, tile
                    found[count, AGE], found[count, IS_HOT] = length - 64 * tile, held == TIER_HOT
                count += 1
        if count == before:
            table.scanned[row] = length >> 6
    return count


@jit
def find_sharers(
    table: BlockTable, granules: GranuleState, rule: Rule, row: int, tile: int, members: Int32Array, sources: Int32Array
) -> Any:
    """Find the sharers of a tile of ``row``.

    Args:
        members: receives the sharers, ``row`` included.
        sources: receives the 8 granules.

    Returns:
        ``(count, held, wanted)``: the number of sharers, or 0 if one of them may not change or has too few entries; the
        present tier of the tile; the hottest tier that any sharer wants it in.
    """
    private = True
    for k in range(8):
        sources[k] = granule_at(table, row, 8 * tile + k)
        private = private and granules.refs[sources[k]] == 1
    held = entry_tier(table.entries[row, find_entry(table, row, 8 * tile)])
    members[0] = row
    count, wanted = 1, wanted_tier(table, rule, row, tile)
    if not private:
        for other in range(len(table.info)):
            if other == row or not _holds(table, other, tile, sources):
                continue
            if not _may_change(table, other):
                return 0, held, held
            members[count] = other
            count += 1
            wanted = min(wanted, wanted_tier(table, rule, other, tile))
    for i in range(count):
        if table.info[members[i], NUM_ENTRIES] + more_entries(table, members[i], tile) > table.entries.shape[1]:
            return 0, held, held
    return count, held, wanted


@jit
def _holds(table: BlockTable, row: int, tile: int, sources: Int32Array) -> Any:
    """Whether a row holds these 8 granules at a tile."""
    state = table.info[row, STATE]
    if state in (CLOSED, PREEMPTED) or table.info[row, CAPACITY] < 8 * (tile + 1):
        return False
    same = True
    for k in range(8):
        same = same and granule_at(table, row, 8 * tile + k) == sources[k]
    return same


@jit
def first_to_cool(table: BlockTable, rule: Rule, row: int) -> Any:
    """The warm tile of a row that is next to go cold: the oldest, or the one of least mass. -1 if none is warm."""
    best = -1
    for e in range(table.info[row, NUM_ENTRIES]):
        if entry_tier(table.entries[row, e]) == TIER_WARM:
            tile = table.starts[row, e] >> 3
            if best < 0 or (rule.by_mass and table.masses[row, tile] < table.masses[row, best]):
                best = tile
    return best


@jit
def change_tier(
    table: BlockTable,
    members: Int32Array,
    tile: int,
    block: int,
    tier: int,
    sources: Int32Array,
    holdings: Holdings,
    num_freed: int,
) -> Any:
    """Replace the granules that the sharers hold at a tile by a fresh block; the caller has converted the tokens.

    If nobody else holds a granule, its node goes to the new block. Returns the new length of ``freed``.
    """
    nodes, granules, freed = holdings
    count = len(members)
    granules.cached[HELD + pool_of(granules, block)] += 8
    for k in range(8):
        old, new = sources[k], block + k
        granules.refs[new], granules.copy[new] = count, 0
        if granules.refs[old] == count and granules.links[old, NEXT] != old:
            hand_over(nodes, granules, old)  # a twin must be hot, so this granule's place goes to another one
        node = granules.node[old]
        if node >= 0 and granules.refs[old] == count:
            granules.node[new], granules.node[old] = node, -1
            nodes.granule[node] = new
        granules.refs[old] -= count
        if granules.refs[old] == 0:
            granules.cached[HELD + pool_of(granules, old)] -= 1
            note_let_go(granules, old)
            freed[num_freed] = old
            num_freed += 1
    for row in members:
        _put_block(table, row, tile, block, tier)
    return num_freed


@jit
def more_entries(table: BlockTable, row: int, tile: int) -> Any:
    """How many entries a row gains when a tile becomes an entry of its own; may be negative."""
    first, last = find_entry(table, row, 8 * tile), find_entry(table, row, 8 * tile + 7)
    begins_before = table.starts[row, first] < 8 * tile
    ends_after = table.starts[row, last] + entry_length(table.entries[row, last]) > 8 * tile + 8
    return first - last + (1 if begins_before else 0) + (1 if ends_after else 0)


@jit
def _put_block(table: BlockTable, row: int, tile: int, block: int, tier: int) -> None:
    """Make a tile an entry of its own; entries that reach into it are cut."""
    begin, end = 8 * tile, 8 * tile + 8
    first, last = find_entry(table, row, begin), find_entry(table, row, end - 1)
    more, count = more_entries(table, row, tile), table.info[row, NUM_ENTRIES]
    before, after = table.entries[row, first], table.entries[row, last]
    left = begin - table.starts[row, first]
    right = table.starts[row, last] + entry_length(after) - end
    if more > 0:
        for e in range(count - 1, last, -1):
            table.entries[row, e + more], table.starts[row, e + more] = table.entries[row, e], table.starts[row, e]
    elif more < 0:
        for e in range(last + 1, count):
            table.entries[row, e + more], table.starts[row, e + more] = table.entries[row, e], table.starts[row, e]
        for e in range(count + more, count):
            table.entries[row, e] = table.starts[row, e] = -1
    e = first
    if left > 0:
        table.entries[row, e] = pack_entry(entry_granule(before), left, entry_tier(before))
        e += 1
    table.entries[row, e], table.starts[row, e] = pack_entry(block, 8, tier), begin
    if right > 0:
        granule = entry_granule(after) + entry_length(after) - right
        table.entries[row, e + 1], table.starts[row, e + 1] = pack_entry(granule, right, entry_tier(after)), end
    table.info[row, NUM_ENTRIES] = count + more
    touch(table, row)
