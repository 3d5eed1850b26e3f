"""How the attention kernels share the work of a call among CTAs: decided by what the host knows, never by tables.

A captured CUDA graph meets other tables and lengths when it is replayed, and its grid must be right for them, too.
"""

import functools
from typing import NamedTuple

from kvtoolkit.arrays.call import AttentionCall, Hints
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.plan import MAX_RANGES, most_late
from kvtoolkit.errors import UnsupportedError
from kvtoolkit.runtime import smem_limit
from kvtoolkit.runtime.kernels import arch_of, num_sms

MAX_SPLITS = 128
_UNLIMITED = 0x7FFFFFFF
_MAX_ROW_BLOCKS = 65535  # CTAs along the second axis of a grid
# the bounds below are numbers of tokens, found by measurement
_MAX_CLUSTERED = 12288  # longer sequences need more CTAs than clusters have
# up to here two CTAs share an SM, or eight, since beginning and ending a sequence takes as long as reading it
_MAX_SHORT, _MAX_SHORTEST = 320, 256


class Route(NamedTuple):
    """Which kernels take the rows of a call, by their numbers of query tokens."""

    fewest: int
    """Query tokens of a row, as far as the host knows."""
    most: int
    most_decoded: int
    """Query tokens of a row that the decode kernel takes; rows with more are another kernel's."""

    @property
    def decodes(self) -> bool:
        """Whether there may be rows for the decode kernel."""
        return max(1, self.fewest) <= self.most_decoded

    @property
    def prefills(self) -> bool:
        """Whether there may be rows for the prefill kernel."""
        return self.most > self.most_decoded


class Schedule(NamedTuple):
    """How the decode kernel shares its work among CTAs."""

    spec: specs.Spec
    grid: tuple[int, ...]
    splits: int
    is_fixed: bool
    row_blocks: int
    num_ranges: int
    """0 = even, not planned."""
    num_late: int
    """Of the ranges: those that begin when others have ended."""
    num_even: int
    """As many ranges, or fewer, so that they cut sequences of equal lengths evenly or not at all."""
    partials_nbytes: int
    counters_nbytes: int
    group_counters_nbytes: int


def choose_route(call: AttentionCall, query_counts: tuple[int, int] | None) -> Route:
    """Choose between the decode and the prefill kernel, or both where each row decides on the device.

    Args:
        call: with at least one query token.
        query_counts: fewest and most query tokens of the rows, where the host knows.
    """
    num_tokens = call.q.shape[0]
    if call.cu_seqlens_q is None:
        fewest = most = 1
    elif query_counts is not None:
        fewest, most = query_counts
    elif call.block_table.shape[0] == 1:
        fewest = most = num_tokens
    else:
        fewest, most = 0, num_tokens
    if call.tiers is not None or call.block_mass is not None:  # the prefill kernel takes neither
        return Route(fewest, most, _UNLIMITED)
    if call.num_splits:  # as many tokens for any number of heads
        return Route(fewest, most, specs.MAX_DECODE_QUERIES)
    _, num_q_heads, head_dim = call.q.shape
    return Route(fewest, most, specs.decode_queries(head_dim, num_q_heads // call.k_cache.shape[1]))


def choose_schedule(call: AttentionCall, route: Route, hints: Hints) -> Schedule | None:
    """The schedule of the decode kernel; None if no row can go there."""
    if not route.decodes:
        return None
    _, num_kv_heads, block_size, _ = call.k_cache.shape
    batch, max_entries = call.block_table.shape
    most = min(route.most, route.most_decoded)
    longest = hints.max_seq_len or max_entries * (block_size if call.block_starts is None else 64)
    q = call.q
    num_tokens, num_q_heads, head_dim = q.shape
    if not route.prefills:  # beside the prompt kernel a row may have more, but then it is the only one, or planned
        num_tokens = min(num_tokens, batch * most)
    return _schedule(
        (num_tokens, num_q_heads, head_dim), q.dtype, q.device, num_kv_heads, batch, call.cu_seqlens_q is not None,
        num_q_heads // num_kv_heads * most, call.num_splits, call.tiers is not None, most_late(batch, longest),
        8 if longest <= _MAX_SHORTEST else 2 if longest <= _MAX_SHORT else 1, longest <= _MAX_CLUSTERED,
    )  # fmt: skip


@functools.lru_cache(4096)
def _schedule(
    shape: tuple[int, int, int], dtype: str, device: int, num_kv_heads: int, batch: int, has_bounds: bool,
    most_rows: int, num_splits: int, is_tiered: bool, most_late: int, sharers: int, may_cluster: bool,
) -> Schedule:  # fmt: skip
    if num_splits == 0 and (batch > 1 or is_tiered) and batch <= specs.MAX_PLANNED:
        return _planned(shape, dtype, device, num_kv_heads, batch, most_rows, is_tiered, most_late, sharers)
    return _even(shape, dtype, device, num_kv_heads, batch, has_bounds, most_rows, num_splits, is_tiered, may_cluster)


def _planned(
    shape: tuple[int, int, int], dtype: str, device: int, num_kv_heads: int, batch: int, most_rows: int,
    is_tiered: bool, most_late: int, sharers: int,
) -> Schedule:  # fmt: skip
    """Ranges of about equal cost, which a plan made on the device cuts; see `kvtoolkit.cuda.plan`."""
    head_dim, limit = shape[2], smem_limit(device)
    if is_tiered:
        pairs = batch * num_kv_heads * -(-most_rows // specs.TIERED_ROWS)
        # whether there is a whole sequence for nearly every CTA of two to an SM
        spec = specs.tiered(head_dim, dtype, most_rows, limit, shares_sm=10 * pairs >= 18 * num_sms(device))
    else:
        most_sharers = _most_sharers(head_dim, batch * num_kv_heads, num_sms(device))
        spec = specs.decode(head_dim, dtype, most_rows, limit, sharers=min(sharers, most_sharers))
    row_blocks = -(-most_rows // spec.rows)
    if row_blocks > _MAX_ROW_BLOCKS:
        raise UnsupportedError(
            f"q: expected at most {_MAX_ROW_BLOCKS * spec.rows} query rows of a kv head (new tokens times heads of its "
            f"group), got {most_rows}; feed the prompt in chunks"
        )
    heads = num_kv_heads * row_blocks
    ranges = max(1, spec.per_sm * num_sms(device) // heads)
    may_be_late = spec.per_sm > 1 and 1 < ranges <= MAX_RANGES // 2
    late = ranges if may_be_late and ranges <= most_late else 0
    even = whole_sequences(ranges, batch) if is_tiered else ranges
    # a single range cuts nothing; others as if with late ones, so that a call on short sequences can be captured
    slots = 2 * ranges * (1 + may_be_late) if ranges > 1 else 0
    if not is_tiered and most_sharers > 1:  # and as if so many CTAs shared an SM, so that shorter ones can be, too
        slots = max(slots, 4 * (most_sharers * num_sms(device) // heads))
    ranges += late
    grid = (num_kv_heads, row_blocks, ranges)
    partials = slots * heads * _partial_nbytes(spec, head_dim)
    counters = 4 * batch * heads, 4 * slots * heads
    return Schedule(spec, grid, 1, False, row_blocks, ranges, late, even, partials, *counters)


def _most_sharers(head_dim: int, pairs: int, num_sms: int) -> int:
    """CTAs that may share an SM where sequences are short: as many as have a sequence and kv head each, or nearly."""
    if head_dim <= 64 or pairs < 2 * num_sms:
        return 1
    return 8 if pairs >= 7 * num_sms else 2


def _even(
    shape: tuple[int, int, int], dtype: str, device: int, num_kv_heads: int, batch: int, has_bounds: bool,
    most_rows: int, num_splits: int, is_tiered: bool, may_cluster: bool,
) -> Schedule:  # fmt: skip
    """Every sequence in the same number of splits; a CTA finds its block of query rows by number."""
    num_tokens, num_q_heads, head_dim = shape
    group_size, limit = num_q_heads // num_kv_heads, smem_limit(device)
    spec = (specs.tiered if is_tiered else specs.decode)(head_dim, dtype, most_rows, limit, planned=False)
    rows = spec.rows
    row_blocks = -(-most_rows // rows)
    num_blocks = num_tokens * group_size // rows + batch if has_bounds else batch * -(-group_size // rows)
    cluster, splits = 1, min(num_splits, MAX_SPLITS)
    if num_splits == 0:
        alone = batch == 1 and not is_tiered and may_cluster
        cluster = specs.cluster_size(arch_of(device), row_blocks * num_kv_heads) if alone else 1
        splits = cluster
        if cluster == 1:
            splits = max(1, min(MAX_SPLITS, spec.per_sm * num_sms(device) // (batch * row_blocks * num_kv_heads)))
    if cluster > 1:
        spec = specs.decode(head_dim, dtype, most_rows, limit, planned=False, cluster=cluster)
    groups = num_blocks * num_kv_heads
    partials = groups * splits if cluster == 1 and splits > 1 else 0
    nbytes = partials * _partial_nbytes(spec, head_dim)
    grid = (groups, splits, 1) if cluster == 1 else (cluster, num_kv_heads, num_blocks)
    return Schedule(spec, grid, splits, num_splits > 0, row_blocks, 0, 0, 0, nbytes, 4 * groups, 4 * partials)


def _partial_nbytes(spec: specs.Spec, head_dim: int) -> int:
    """Memory of the partial result of a CTA: sums, row_max and row_sum of its query rows."""
    return spec.rows * (head_dim + 2) * 4


def whole_sequences(ranges: int, batch: int) -> int:
    """``ranges``, or up to a tenth fewer, if so many cut ``batch`` sequences of equal lengths evenly or not at all."""
    good = (count for count in range(ranges, 0, -1) if count % batch == 0 or batch % count == 0)
    best = next(good)
    return best if 10 * best >= 9 * ranges else ranges
