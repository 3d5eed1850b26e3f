"""The launch that begins a step on the device: lengths, blocks from a supply, entries and slots of all rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvtoolkit.config.growth import GrowthPolicy
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.launching import Launch, load_spec
from kvtoolkit.runtime.structs import ParameterStruct

MAX_GROUPS = 4  # as in grow.cu

_params = ParameterStruct("cache/grow.cu", "kvt_grow")


class GrowingRows(NamedTuple):
    """Addresses of what there is of each row, whatever the groups of layers; see ``GrowParams``."""

    finished: int
    tokens: int
    kept: int
    pending: int
    max_lens: int
    lengths: int
    num_new: int
    status: int
    positions: int
    history: int


class GrowingGroup(NamedTuple):
    """What a group of layers has, and how it grows; see ``GrowParams``."""

    addresses: Sequence[int]
    """From ``block_table`` to ``gone``, which may be 0."""
    width: int
    """Entries of a row."""
    num_granules: int
    """Granules in the group's pool."""
    policy: GrowthPolicy
    offered: Sequence[int]
    """Sizes of blocks in granules."""
    most_supply: int
    """Blocks of each size in the supply."""


def make_growth(
    rows: GrowingRows, groups: Sequence[GrowingGroup], batch: int, max_steps: int, most_grants: int, most_new: int,
    beams: int, device: int,
) -> Launch:  # fmt: skip
    """The launch that gives each row places for its next tokens; nothing is launched yet.

    Args:
        groups: of layers, up to `MAX_GROUPS`.
        batch: rows.
        max_steps: tokens of a row in the history.
        most_grants: blocks of a row that are noted.
        most_new: new tokens of a row.
        beams: rows of a family, of which all get a token or none.
        device: the current one.
    """
    columns = list(zip(*(_fields(group) for group in groups), strict=True))
    by_group = [value for column in columns for value in (*column, *[0] * (MAX_GROUPS - len(groups)))]
    parameters = _params.pack(*rows, *by_group, batch, len(groups), max_steps, most_grants, most_new, beams)
    spec = specs.grow(batch)
    threads = min(spec.threads, -(-batch // 32) * 32)
    return Launch(load_spec(spec, device), (1,), threads, 0, parameters)


def _fields(group: GrowingGroup) -> list[Any]:
    """The values of a group, in the order of ``GrowParams``."""
    policy = group.policy
    sizes = (policy.rule, policy.tail, policy.largest, sum(group.offered), group.most_supply)
    return [*group.addresses, group.width, group.num_granules, *sizes]
