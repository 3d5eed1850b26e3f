"""The compiled moves on tiles: 64 tokens of rows at a multiple of 64, that change their tier.

A tile in a quantized tier is one entry of 8 granules. Rows that hold the same 8 granules at a tile are a group: their
entries change together. A row that shares only some of the 8 is a group by itself, and gets a copy of its own.
"""

from typing import Any

from allocators._jit import jit
from kvtoolkit.arrays.types import Int32Array, Int64Array
from kvtoolkit.cache.state.block_table import (
    CAPACITY,
    CLOSED,
    IN_STEP,
    LENGTH,
    NUM_ENTRIES,
    OPEN,
    OWNER,
    PREEMPTED,
    STATE,
    Rows,
    find_entry,
    granule_at,
    touch,
)
from kvtoolkit.cache.state.prefix_index import HELD, NEXT, Granules, Nodes, hand_over, note_let_go, tier_of
from kvtoolkit.cache.state.step_passes import StepArrays
from kvtoolkit.cache.tiering.rules import Rule, wanted_tier
from kvtoolkit.formats.entry import TIER_HOT, TIER_WARM, entry_granule, entry_length, entry_tier, pack_entry

# columns of what `list_due` finds
ROW, TILE, AGE, IS_HOT = range(4)


@jit
def any_due(info: Int64Array, scanned: Int32Array) -> Any:
    """Whether some open row has got another number of full tiles since it was looked at last."""
    for row in range(len(info)):
        if scanned[row] != info[row, LENGTH] >> 6 and (info[row, STATE] == OPEN or info[row, STATE] == IN_STEP):
            return True
    return False


@jit
def list_changed(rows: Rows, everything: bool, out: Int32Array) -> Any:
    """The rows that `list_due` will look at; returns how many."""
    count = 0
    for row in range(len(rows.info)):
        if _may_change(rows, row) and (rows.scanned[row] != rows.info[row, LENGTH] >> 6 or everything):
            out[count] = row
            count += 1
    return count


@jit
def count_missing(rows: Rows, step: StepArrays, num_need: int) -> Any:
    """Granules that the rows in ``step.work[0]`` lack for their new tokens."""
    missing = 0
    for i in range(num_need):
        b = step.work[0, i]
        row = step.rows[b]
        missing += (rows.info[row, LENGTH] + step.counts[b] + 7) // 8 - rows.info[row, CAPACITY]
    return missing


@jit
def _may_change(rows: Rows, row: int) -> Any:
    """Whether a row is open, or in the step that is just being begun, whose table is not read yet."""
    state = rows.info[row, STATE]
    return state == OPEN or (state == IN_STEP and rows.marks[row, OWNER] == rows.clock[1])


@jit
def list_due(rows: Rows, rule: Rule, everything: bool, found: Int64Array) -> Any:
    """List the tiles that belong in a colder tier; columns above. Returns how many there are, even if not all fit.

    Only of rows whose number of full tiles is another than when they were looked at last, unless ``everything``. Rows
    that have none are noted as looked at.
    """
    count = 0
    for row in range(len(rows.info)):
        length = rows.info[row, LENGTH]
        if not _may_change(rows, row) or (rows.scanned[row] == length >> 6 and not everything):
            continue
        before, e = count, 0
        for tile in range(rule.pinned >> 6, length >> 6):
            tier = wanted_tier(rows, rule, row, tile)
            if tier == TIER_HOT:
                break
            while e + 1 < rows.info[row, NUM_ENTRIES] and rows.starts[row, e + 1] <= 8 * tile:
                e += 1
            held = entry_tier(rows.entries[row, e])
            if held < tier:
                if count < len(found):
                    found[count, ROW], found[count, TILE] = row, tile
                    found[count, AGE], found[count, IS_HOT] = length - 64 * tile, held == TIER_HOT
                count += 1
        if count == before:
            rows.scanned[row] = length >> 6
    return count


@jit
def find_group(
    rows: Rows, granules: Granules, rule: Rule, row: int, tile: int, members: Int32Array, sources: Int32Array
) -> Any:
    """The rows that hold a tile as ``row`` does.

    Args:
        members: receives the rows.
        sources: receives the 8 granules.

    Returns:
        ``(count, held, wanted)``: how many rows, 0 if one of them must keep what it holds or has too few entries; the
        tier of the tile; the hottest tier that it belongs in for any of them.
    """
    private = True
    for k in range(8):
        sources[k] = granule_at(rows, row, 8 * tile + k)
        private = private and granules.refs[sources[k]] == 1
    held = entry_tier(rows.entries[row, find_entry(rows, row, 8 * tile)])
    members[0] = row
    count, wanted = 1, wanted_tier(rows, rule, row, tile)
    if not private:
        for other in range(len(rows.info)):
            if other == row or not _holds(rows, other, tile, sources):
                continue
            if not _may_change(rows, other):
                return 0, held, held
            members[count] = other
            count += 1
            wanted = min(wanted, wanted_tier(rows, rule, other, tile))
    for i in range(count):
        if rows.info[members[i], NUM_ENTRIES] + _more_entries(rows, members[i], tile) > rows.entries.shape[1]:
            return 0, held, held
    return count, held, wanted


@jit
def _holds(rows: Rows, row: int, tile: int, sources: Int32Array) -> Any:
    """Whether a row holds these 8 granules at a tile."""
    state = rows.info[row, STATE]
    if state in (CLOSED, PREEMPTED) or rows.info[row, CAPACITY] < 8 * (tile + 1):
        return False
    same = True
    for k in range(8):
        same = same and granule_at(rows, row, 8 * tile + k) == sources[k]
    return same


@jit
def first_to_cool(rows: Rows, rule: Rule, row: int) -> Any:
    """The warm tile of a row that goes to the cold tier next: the oldest, or that of least mass; -1: none is warm."""
    best = -1
    for e in range(rows.info[row, NUM_ENTRIES]):
        if entry_tier(rows.entries[row, e]) == TIER_WARM:
            tile = rows.starts[row, e] >> 3
            if best < 0 or (rule.by_mass and rows.masses[row, tile] < rows.masses[row, best]):
                best = tile
    return best


@jit
def change_tier(
    rows: Rows,
    members: Int32Array,
    tile: int,
    block: int,
    tier: int,
    nodes: Nodes,
    granules: Granules,
    sources: Int32Array,
    freed: Int32Array,
    num_freed: int,
) -> Any:
    """Put a fresh block in place of the granules that a group holds at a tile; the caller converts the tokens.

    The index follows where nobody else holds a granule. Returns the new number of ``freed`` granules.
    """
    count = len(members)
    granules.cached[HELD + tier] += 8
    for k in range(8):
        old, new = sources[k], block + k
        granules.refs[new], granules.copy[new] = count, 0
        if granules.refs[old] == count and granules.links[old, NEXT] != old:
            hand_over(nodes, granules, old)  # twins are hot
        node = granules.node[old]
        if node >= 0 and granules.refs[old] == count:
            granules.node[new], granules.node[old] = node, -1
            nodes.granule[node] = new
        granules.refs[old] -= count
        if granules.refs[old] == 0:
            granules.cached[HELD + tier_of(granules, old)] -= 1
            note_let_go(granules, old)
            freed[num_freed] = old
            num_freed += 1
    for row in members:
        _put_block(rows, row, tile, block, tier)
    return num_freed


@jit
def _more_entries(rows: Rows, row: int, tile: int) -> Any:
    """How many entries more a row has once a tile is an entry of its own."""
    first, last = find_entry(rows, row, 8 * tile), find_entry(rows, row, 8 * tile + 7)
    begins_before = rows.starts[row, first] < 8 * tile
    ends_after = rows.starts[row, last] + entry_length(rows.entries[row, last]) > 8 * tile + 8
    return first - last + (1 if begins_before else 0) + (1 if ends_after else 0)


@jit
def _put_block(rows: Rows, row: int, tile: int, block: int, tier: int) -> None:
    """Make a tile an entry of its own; those that reach into it from before and after are cut."""
    begin, end = 8 * tile, 8 * tile + 8
    first, last = find_entry(rows, row, begin), find_entry(rows, row, end - 1)
    more, count = _more_entries(rows, row, tile), rows.info[row, NUM_ENTRIES]
    before, after = rows.entries[row, first], rows.entries[row, last]
    left = begin - rows.starts[row, first]
    right = rows.starts[row, last] + entry_length(after) - end
    if more > 0:
        for e in range(count - 1, last, -1):
            rows.entries[row, e + more], rows.starts[row, e + more] = rows.entries[row, e], rows.starts[row, e]
    elif more < 0:
        for e in range(last + 1, count):
            rows.entries[row, e + more], rows.starts[row, e + more] = rows.entries[row, e], rows.starts[row, e]
        for e in range(count + more, count):
            rows.entries[row, e] = rows.starts[row, e] = -1
    e = first
    if left > 0:
        rows.entries[row, e] = pack_entry(entry_granule(before), left, entry_tier(before))
        e += 1
    rows.entries[row, e], rows.starts[row, e] = pack_entry(block, 8, tier), begin
    if right > 0:
        granule = entry_granule(after) + entry_length(after) - right
        rows.entries[row, e + 1], rows.starts[row, e + 1] = pack_entry(granule, right, entry_tier(after)), end
    rows.info[row, NUM_ENTRIES] = count + more
    touch(rows, row)
