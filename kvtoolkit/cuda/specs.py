"""Which kernels there are: the source, the macros and the shared memory that a shape and a device call for."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

from kvtoolkit.errors import UnsupportedError

SMEM_LIMITS = {"80": 166912, "86": 101376, "89": 101376, "90": 232448, "100": 232448, "120": 101376}
"""Shared memory of one CTA by compute capability, for compiling where no device tells."""

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
"""What models have; any multiple of 16 up to 256 compiles."""

MAX_PLANNED = 10000
"""Sequences that a plan may have: their costs fit into 48 KiB of shared memory, beside the ranges."""

MAX_DECODE_QUERIES = 8
"""New tokens of a row that is no prompt."""

_RESERVED = 256  # static shared memory
_CODE_SLOTS = 7  # as in prompt/shape.cuh
_SHORT_SHAPES = {2: (4, 2), 8: (1, 2)}
"""Warps and stages of the decode kernel for many short sequences, by how many CTAs are to share an SM."""

TIERED_SHAPES = ((8, 2, 1), (4, 1, 2), (4, 2, 1), (2, 2, 1), (2, 1, 1))
"""Warps, stages and CTAs of an SM for the tiered kernel; the first that fits."""
TIERED_ROWS = 8
"""Query rows of a CTA of the tiered kernel."""
SHARED_SM_SHAPES = ((4, 2, 2), *TIERED_SHAPES)
"""The same where nearly every CTA has a sequence and kv head: while one begins or ends a sequence, the other one of
its SM keeps the memory busy."""


class Spec(NamedTuple):
    """One kernel."""

    source: str
    name: str
    defines: tuple[tuple[str, int], ...]
    threads: int
    """Of a CTA."""
    smem_nbytes: int = 0
    """Dynamic shared memory of a CTA."""
    rows: int = 1
    """Query rows of a CTA."""
    per_sm: int = 1
    """CTAs that an SM holds."""
    feature: str = ""
    """``"a"`` where it needs what only its own architecture has."""

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return dict(self.defines)["KVT_KEYS"]

    def with_masses(self) -> "Spec":
        """An attention kernel that also tells what share of the attention each tile got."""
        return self._replace(defines=(*self.defines, ("KVT_MASSES", 1)))


def check_head_dim(head_dim: int, dtype: str) -> None:
    """UnsupportedError where there is no attention kernel for these tokens."""
    if dtype not in ("float16", "bfloat16"):
        raise UnsupportedError(f"q: the CUDA attention kernels take float16 and bfloat16, got {dtype}")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise UnsupportedError(f"q: no CUDA kernel for head_dim {head_dim}; expected a multiple of 16 up to 256")


def row_bytes(head_dim: int) -> int:
    """Shared memory of one token's keys or values: rows begin at multiples of 128 bytes."""
    return -(-head_dim // 64) * 128


def _share_of_sm(smem_limit: int, per_sm: int) -> int:
    """All of an SM's shared memory, so that CTAs of the next kernel do not crowd in."""
    return ((smem_limit + 1024) // per_sm - 1024 - _RESERVED) // 128 * 128


def decode(
    head_dim: int, dtype: str, most_rows: int, smem_limit: int, *, planned: bool = True, cluster: int = 1,
    sharers: int = 1,
) -> Spec:  # fmt: skip
    """The decode kernel for blocks of up to ``most_rows`` query rows.

    Args:
        sharers: CTAs that are to share an SM, 2 or 8, where there are many short sequences: while some begin or end a
            sequence, the others keep the memory busy. With 8 each is one warp, which merges with no other.
    """
    row_tiles = 2 if most_rows > 8 and head_dim <= 128 else 1
    step = 2 * 16 * row_bytes(head_dim)
    shapes = {
        64: ((4, 3), (4, 2), (2, 2)),
        128: ((8, 2), (4, 3), (4, 2), (2, 3), (2, 2)),
        256: ((4, 3), (4, 2), (2, 3), (2, 2)),
    }

    def nbytes(shape: tuple[int, int], row_tiles: int) -> int:
        warps, stages = shape
        # FIFOs, then what warps or CTAs merge
        results = 48 * row_tiles * head_dim + 16 if cluster > 1 else warps * 32 * row_tiles * (head_dim + 4 + 2)
        return warps * stages * step + results

    # the first that fits; more bytes under way than 64 KiB of an SM gain nothing, and cost at a sequence's end
    widths = next(shapes[most] for most in shapes if head_dim <= most)
    if sharers > 1:
        widths = (_SHORT_SHAPES[sharers], *widths)
    # by the most rows there may be, so that a sequence's bits do not depend on who has how many beside it
    widest = 2 if head_dim <= 128 else 1
    shape = next((shape for shape in widths if nbytes(shape, widest) + _RESERVED <= smem_limit), None)
    if shape is None:
        raise UnsupportedError(
            f"no decode kernel for head_dim {head_dim} in {smem_limit} bytes of shared memory; expected a device of "
            "compute capability 8.0 or later"
        )
    fitting = (smem_limit + 1024) // (nbytes(shape, row_tiles) + 1024)  # the driver takes 1 KiB of each CTA
    per_sm = min(max(3, sharers), fitting)
    defines = (
        ("KVT_HEAD_DIM", head_dim), ("KVT_BF16", int(dtype == "bfloat16")), ("KVT_ROW_TILES", row_tiles),
        ("KVT_WARPS", shape[0]), ("KVT_STAGES", shape[1]),
        ("KVT_PLANNED", int(planned)), ("KVT_CLUSTER", cluster), ("KVT_PER_SM", per_sm),
    )  # fmt: skip
    smem = max(nbytes(shape, row_tiles), _share_of_sm(smem_limit, per_sm))
    return Spec("attention/decode.cu", "kvt_decode", defines, 32 * shape[0], smem, 8 * row_tiles, per_sm)


def _tiered_stage_nbytes(head_dim: int) -> int:
    """A block of int4, which is the largest unit of codes."""
    return 64 * head_dim + 4 * head_dim + 256


def tiered(
    head_dim: int, dtype: str, most_rows: int, smem_limit: int, *, planned: bool = True, shares_sm: bool = False
) -> Spec:
    """The decode kernel for sequences in tiers, for blocks of up to 8 query rows; head_dim 64 or 128."""
    stage = _tiered_stage_nbytes(head_dim)

    def nbytes(shape: tuple[int, int, int]) -> int:
        warps, stages, _ = shape
        return warps * (stages * stage + 32 * (head_dim + 4 + 2))

    shapes = SHARED_SM_SHAPES if shares_sm else TIERED_SHAPES
    fits = (shape for shape in shapes if shape[2] * (nbytes(shape) + 1024 + _RESERVED) <= smem_limit + 1024)
    warps, stages, per_sm = next(fits)
    defines = (
        ("KVT_HEAD_DIM", head_dim), ("KVT_BF16", int(dtype == "bfloat16")), ("KVT_ROW_TILES", 1),
        ("KVT_WARPS", warps), ("KVT_STAGES", stages), ("KVT_PLANNED", int(planned)), ("KVT_PER_SM", per_sm),
        ("KVT_SPLIT_ROWS", int(most_rows <= 4)),
    )  # fmt: skip
    smem = max(nbytes((warps, stages, per_sm)), _share_of_sm(smem_limit, per_sm))
    return Spec("attention/tiered.cu", "kvt_tiered", defines, 32 * warps, smem, TIERED_ROWS, per_sm)


def convert(head_dim: int, dtype: str) -> Spec:
    """The kernel that converts between tiers."""
    defines = (("KVT_HEAD_DIM", head_dim), ("KVT_BF16", int(dtype == "bfloat16")))
    smem = 4 * (64 * (head_dim + 1) + 2 * max(64, head_dim)) + 2 * 64
    return Spec("cache/convert.cu", "kvt_convert", defines, 256, smem)


def plan(batch: int) -> Spec:
    """The kernel that cuts a batch into ranges."""
    return Spec("attention/plan.cu", "kvt_plan", (), 1024, 4 * batch)


@functools.lru_cache(1024)
def prefill(head_dim: int, dtype: str, smem_limit: int, *, has_rules: bool) -> Spec:
    """The prefill kernel; ``has_rules``: softcap, ALiBi or a scale that is not above 0."""
    # keys of a tile, tiles of keys and of values in shared memory, CTAs of an SM; the first that fits
    shapes = {
        64: ((64, 1, 3),),
        128: ((64, 1, 2), (32, 1, 2)),
        256: ((64, 2, 1), (64, 1, 1), (32, 1, 1)),
    }

    def nbytes(shape: tuple[int, int, int]) -> int:
        keys, stages, _ = shape
        return (128 + 2 * keys * stages) * row_bytes(head_dim) + 2 * 64 + 16

    of_dims = next(shapes[most] for most in shapes if head_dim <= most)
    shape = next(shape for shape in of_dims if shape[2] * (nbytes(shape) + 1024) <= smem_limit + 1024)
    keys, stages, per_sm = shape
    defines = (
        ("KVT_HEAD_DIM", head_dim), ("KVT_BF16", int(dtype == "bfloat16")), ("KVT_RULES", int(has_rules)),
        ("KVT_KEYS", keys), ("KVT_STAGES", stages), ("KVT_PER_SM", per_sm),
    )  # fmt: skip
    threads = 128 if head_dim <= 128 else 256
    return Spec("attention/prefill.cu", "kvt_prefill", defines, threads, nbytes(shape), 128, per_sm)


def prefill_partial_nbytes(head_dim: int) -> int:
    """Memory of a part of an item: sums, row_max and row_sum of its rows."""
    return 4 * 128 * (head_dim + 8)


def decode_rows(head_dim: int) -> int:
    """Query rows of a kv head for which the decode kernel reads keys and values once."""
    return 16 if head_dim <= 128 else 8


def decode_queries(head_dim: int, group_size: int, *, tiers: bool = False) -> int:
    """New tokens of each row up to which a batch is the decode kernel's, where there is the prompt kernel."""
    if tiers:  # from codes, decode is the faster one even where it reads twice
        return max(1, min(MAX_DECODE_QUERIES, 4 * TIERED_ROWS // group_size))
    return min(MAX_DECODE_QUERIES, decode_rows(head_dim) // group_size)


def queries_beside_prompts(group_size: int) -> int:
    """New tokens of a row up to which it is the decode kernel's where others are the prompt kernel's, over tiers."""
    return max(1, TIERED_ROWS // group_size)


def prompt_keys(head_dim: int) -> int:
    """Keys of a tile of the prompt kernel."""
    return 128 if head_dim <= 128 else 96 if head_dim <= 192 else 64


def _prompt_dims(head_dim: int) -> int:
    """Columns that its products have."""
    return next(dims for dims in (64, 96, 128, 192, 256) if head_dim <= dims)


def prompt_partial_nbytes(head_dim: int) -> int:
    """Memory of a part of an item: sums, row_max and row_sum of its rows."""
    return 4 * 2 * 128 * 4 * (_prompt_dims(head_dim) // 8 + 1)


@functools.lru_cache(1024)
def prompt(head_dim: int, dtype: str, *, rules: int, tiers: bool = False) -> Spec:
    """The prompt kernel of sm_90.

    Args:
        rules: 1 for ALiBi or a scale that is not above 0; 2 for softcap, too.
        tiers: some tokens are codes; head_dim 64 or 128.
    """
    buffers = 2 if head_dim <= 128 and not tiers else 1
    row = row_bytes(head_dim)
    codes = _CODE_SLOTS * _tiered_stage_nbytes(head_dim) if tiers else 0
    smem = (128 * buffers + 4 * prompt_keys(head_dim)) * row + codes + 256 + 4 * 64 + 16
    defines = (
        ("KVT_HEAD_DIM", head_dim), ("KVT_BF16", int(dtype == "bfloat16")), ("KVT_RULES", rules),
        ("KVT_TIERS", int(tiers)),
    )  # fmt: skip
    return Spec("attention/prompt.cu", "kvt_prompt", defines, 512 if tiers else 384, smem, 128, feature="a")


def plan_prompts(keys: int) -> Spec:
    """The kernel that makes the work list of the prompt kernel or the prefill kernel, with so many keys to a tile."""
    return Spec("attention/plan_prompts.cu", "kvt_plan_prompts", (("KVT_KEYS", keys),), 1024)


def append(vector: int) -> Spec:
    """The append kernel that moves ``vector`` bytes at a time: 16, 8, 4 or 2."""
    return Spec("cache/append.cu", "kvt_append", (("KVT_VECTOR", vector),), 256)


def merge_shared(dtype: str) -> Spec:
    """The kernel that merges attention to what rows share with attention to the rest of them."""
    return Spec("attention/merge_shared.cu", "kvt_merge_shared", (("KVT_BF16", int(dtype == "bfloat16")),), 256)


FIND_SHARED = Spec("attention/shared.cu", "kvt_find_shared", (), 128)
PLAN_SHARED = Spec("attention/shared.cu", "kvt_plan_shared", (), 1024)
GATHER = Spec("attention/shared.cu", "kvt_gather", (), 256)
EXPAND = Spec("attention/expand.cu", "kvt_expand", (), 256)
UNITS = Spec("attention/units.cu", "kvt_units", (), 256)
MOVE = Spec("cache/move.cu", "kvt_move", (), 256)
MOVE_LISTED = MOVE._replace(name="kvt_move_listed")
TRANSFER = MOVE._replace(name="kvt_transfer", threads=1024)
TRANSFER_LISTED = TRANSFER._replace(name="kvt_transfer_listed")
MIGRATE = Spec("cache/migrate.cu", "kvt_migrate", (), 1024)
CHECK = Spec("cache/check.cu", "kvt_check", (), 256)
CANARY = Spec("cache/canary.cu", "kvt_canary", (), 256)


def grow(batch: int) -> Spec:
    """The kernel that begins a step of ``batch`` rows on the device."""
    threads, each = (1024, 1) if batch <= 1024 else (512, 8)  # registers for more rows of a thread
    return Spec("cache/grow.cu", "kvt_grow", (("KVT_THREADS", threads), ("KVT_EACH", each)), threads)


def reorder(beams: int) -> Spec:
    """The kernel that reorders rows in families of so many."""
    return Spec("cache/reorder.cu", "kvt_reorder", (("KVT_BEAMS", beams),), 1024)


def merge_states(dtype: str) -> Spec:
    """The kernel that merges states of a dtype."""
    code = {"float32": 0, "float16": 1, "bfloat16": 2}[dtype]
    return Spec("attention/merge_states.cu", "kvt_merge_states", (("KVT_DTYPE", code),), 256)


def cluster_size(arch: int, num_heads: int) -> int:
    """CTAs that share the only sequence of a batch: 64 in all, in clusters, where there are clusters; 1 = none."""
    if arch < 90 or num_heads < 8:
        return 1
    return max(size for size in (1, 2, 4, 8) if size * num_heads <= 64 or size == 1)


def of_model(
    head_dim: int, dtype: str, num_q_heads: int, num_kv_heads: int, arch: int, smem_limit: int, *,
    tiers: bool = False, masses: bool = False,
) -> Iterator[Spec]:  # fmt: skip
    """Every kernel that the cache of a model needs, with quantized tiers or without, and with masses or without.

    But for prompts with softcap, ALiBi or a scale that is not above 0: their kernel compiles when it is first used.
    """
    group_size = num_q_heads // num_kv_heads
    found: dict[Spec, None] = {}
    for rows in range(group_size, 9 * group_size, group_size):  # decode, and verify with up to 8 tokens
        kernel = decode(head_dim, dtype, rows, smem_limit)
        cluster = cluster_size(arch, num_kv_heads * -(-rows // kernel.rows))
        found[kernel] = None
        found[decode(head_dim, dtype, rows, smem_limit, planned=False)] = None
        found[decode(head_dim, dtype, rows, smem_limit, planned=False, cluster=cluster)] = None
        if tiers:
            for planned in (True, False):
                found[tiered(head_dim, dtype, rows, smem_limit, planned=planned)] = None
            found[tiered(head_dim, dtype, rows, smem_limit, shares_sm=True)] = None
    yield from found
    if masses:
        yield from (spec.with_masses() for spec in found)
    if tiers:
        yield from (UNITS, convert(head_dim, dtype), convert(head_dim, dtype)._replace(name="kvt_convert_listed"))
    if arch == 90:
        kernel = prompt(head_dim, dtype, rules=0, tiers=tiers)
        yield from (kernel, plan_prompts(prompt_keys(head_dim)), merge_shared(dtype))
        yield from (FIND_SHARED, PLAN_SHARED, GATHER)
    kernel = prefill(head_dim, dtype, smem_limit, has_rules=False)
    yield from (kernel, plan_prompts(kernel.keys))
    yield from (
        plan(1),
        EXPAND,
        append(16),
        MOVE,
        MOVE_LISTED,
        TRANSFER,
        TRANSFER_LISTED,
        MIGRATE,
        CHECK,
        CANARY,
        grow(1),
    )
    yield from (reorder(8), reorder(8)._replace(name="kvt_reorder_copy", threads=256), merge_states(dtype))
