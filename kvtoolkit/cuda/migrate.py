"""The launch that chooses which tiles move in a step of the device, and changes the rows that have them."""

from typing import NamedTuple

from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.runtime.structs import ParameterStruct

_params = ParameterStruct("cache/migrate.cu", "kvt_migrate")
_FAR = 1 << 30  # tokens; longer than any sequence


class MigrationArrays(NamedTuple):
    """Addresses; see ``MigrateParams``."""

    finished: int
    kept: int
    pending: int
    max_lens: int
    lengths: int
    num_new: int
    block_table: int
    block_starts: int
    tails: int
    marks: int
    targets: int
    held: int
    taken: int
    journal: int
    grants: int
    gone: int
    edits: int
    num_moves: int
    demotions: int
    merges: int


def make_migration(
    arrays: MigrationArrays, batch: int, width: int, most_targets: int, most: int, most_new: int, max_steps: int,
    ages: tuple[int, int], demotes: bool, merges: bool, window: int, device: int,
) -> Launch:  # fmt: skip
    """The launch for a group of layers; nothing is launched yet.

    Args:
        batch: rows.
        width: entries of a row.
        most_targets: blocks of each list.
        most: tiles of either kind that move, at most.
        most_new: new tokens of a row.
        max_steps: tokens of a row in a turn.
        ages: tokens that are hot and warm, see `kvtoolkit.cache.tiering.rules.Rule`.
        demotes, merges: whether tiles go to colder tiers, and small blocks into one.
        window: tokens that a query sees, itself included; 0 = all.
        device: the current one.
    """
    parameters = _params.pack(
        *arrays, batch, width, most_targets, most, most_new, max_steps, *(min(age, _FAR) for age in ages), demotes,
        merges, window,
    )  # fmt: skip
    threads = min(1024, max(128, -(-batch // 32) * 32))
    return Launch(load_spec(specs.MIGRATE, device), (1,), threads, 0, parameters)
