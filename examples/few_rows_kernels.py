"""Triton kernels of `examples.few_rows`: the products of a layer for up to 16 rows, with what is before and after each.

A step of few rows reads all weights once and computes little, so most of its time goes into starting kernels one after
the other. Here a kernel does all that is between two products. Each program computes some columns for all rows; where
the rows are normalized, each program does that for itself, because it costs less than another kernel. Its warps divide
the inputs into ``PARTS`` of ``SIZE``. A kernel begins while the one before it runs, loads its weights, which nobody
writes, and only then waits.

All kernels take ``x`` ``[num_rows, K]`` and ``weight`` ``[N, K]``, contiguous and of the same 16-bit dtype; ``ROWS`` is
a power of two, not below ``num_rows``. Sums are float32. Results are rounded where the layer of transformers rounds
them, but rotary embedding and SiLU only once, at the end.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_EARLY_ROWS = tl.constexpr(4)  # up to which the next kernel begins at once; with more rows that is slower


@triton.jit
def _start(ROWS: tl.constexpr, OVERLAPS: tl.constexpr):
    """What a kernel does first."""
    if OVERLAPS and ROWS <= _EARLY_ROWS:
        gdc_launch_dependents()


@triton.jit
def _wait(ROWS: tl.constexpr, OVERLAPS: tl.constexpr):
    """Wait for the kernels before this one; what they have written may be read, and anything may be written."""
    if OVERLAPS:
        gdc_wait()
    if OVERLAPS and ROWS > _EARLY_ROWS:
        gdc_launch_dependents()


@triton.jit
def _inputs(K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """``[PARTS, 1, SIZE]``: the number of each input; those from ``K`` on do not exist."""
    inputs = tl.arange(0, PARTS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.expand_dims(inputs, 1)


@triton.jit
def _load(matrix, rows, num_rows, K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """``[PARTS, len(rows), SIZE]``: rows of a matrix; 0 where there is nothing."""
    inputs, rows = _inputs(K, PARTS, SIZE), rows[None, :, None]
    return tl.load(matrix + rows * K + inputs, (inputs < K) & (rows < num_rows), 0.0)


@triton.jit
def _load_factors(norm, K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """``[PARTS, 1, SIZE]``: the weight of a norm."""
    inputs = _inputs(K, PARTS, SIZE)
    return tl.load(norm + inputs, inputs < K, 0.0)


@triton.jit
def _normalize(x, factors, eps, K: tl.constexpr):
    """``x`` divided by its root mean square, times ``factors``."""
    exact = x.to(tl.float32)
    squares = tl.sum(tl.sum(exact * exact, 2), 0)
    scaled = exact * tl.rsqrt(squares / K + eps)[None, :, None]
    return (scaled.to(x.dtype).to(tl.float32) * factors.to(tl.float32)).to(x.dtype)


@triton.jit
def _product(weights, x):
    """``[columns, ROWS]`` float32, rounded to the dtype of ``x``."""
    return tl.sum(tl.dot(weights, tl.permute(x, (0, 2, 1))), 0).to(x.dtype).to(tl.float32)


@triton.jit
def _columns_of_pairs(HALF: tl.constexpr, PAIRS: tl.constexpr):
    """``[2 * PAIRS]``: the first columns of the program's pairs, then the second ones, ``HALF`` columns after them."""
    i = tl.arange(0, 2 * PAIRS)
    pairs = tl.program_id(0) * PAIRS + i % PAIRS
    return pairs // HALF * (2 * HALF) + pairs % HALF + i // PAIRS * HALF


@triton.jit
def _split_pairs(product, PAIRS: tl.constexpr, ROWS: tl.constexpr):
    """``[PAIRS, ROWS]`` twice: the first columns, and the second ones."""
    return tl.split(tl.permute(tl.reshape(product, (2, PAIRS, ROWS)), (1, 2, 0)))


@triton.jit(do_not_specialize=["num_rows"])
def norm_project_rotate(
    x, norm, weight, cos, sin, out, num_rows, eps, NUM_ROTATED: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """RMS norm, queries, keys and values, and rotary embedding of the first ``NUM_ROTATED`` heads.

    A pair is the two dims of a head that are rotated together, ``HALF`` of a head apart. The grid has one program for
    ``PAIRS`` of them. cos and sin are ``[num_rows, 2 * HALF]``, out is ``[num_rows, N]``.
    """
    _start(ROWS, OVERLAPS)
    weights = _load(weight, _columns_of_pairs(HALF, PAIRS), N, K, PARTS, SIZE)
    factors = _load_factors(norm, K, PARTS, SIZE)
    rows, pairs = tl.arange(0, ROWS), tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]
    heads, dims = pairs // HALF, pairs % HALF
    exists = (rows < num_rows)[None, :] & (pairs < N // 2)
    angles = rows[None, :] * (2 * HALF) + dims
    _wait(ROWS, OVERLAPS)
    x = _load(x, rows, num_rows, K, PARTS, SIZE)
    c = tl.load(cos + angles, exists & (heads < NUM_ROTATED), 1.0).to(tl.float32)
    s = tl.load(sin + angles, exists & (heads < NUM_ROTATED), 0.0).to(tl.float32)
    low, high = _split_pairs(_product(weights, _normalize(x, factors, eps, K)), PAIRS, ROWS)
    columns = rows[None, :] * N + heads * (2 * HALF) + dims
    tl.store(out + columns, low * c - high * s, exists)
    tl.store(out + columns + HALF, high * c + low * s, exists)


@triton.jit(do_not_specialize=["num_rows"])
def norm_gate_up(
    x, norm, weight, out, num_rows, eps, HALF: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """RMS norm, gate and up, and SiLU of the gate times up.

    A pair is a gate and its up, ``HALF`` columns apart. The grid has one program for ``PAIRS`` of them. out is
    ``[num_rows, HALF]``.
    """
    _start(ROWS, OVERLAPS)
    weights = _load(weight, _columns_of_pairs(HALF, PAIRS), N, K, PARTS, SIZE)
    factors = _load_factors(norm, K, PARTS, SIZE)
    rows, pairs = tl.arange(0, ROWS), tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]
    exists = (rows < num_rows)[None, :] & (pairs < HALF)
    _wait(ROWS, OVERLAPS)
    x = _normalize(_load(x, rows, num_rows, K, PARTS, SIZE), factors, eps, K)
    gate, up = _split_pairs(_product(weights, x), PAIRS, ROWS)
    tl.store(out + rows[None, :] * HALF + pairs, gate * tl.sigmoid(gate) * up, exists)


@triton.jit(do_not_specialize=["num_rows"])
def product_add(
    x, weight, residual, out, num_rows, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, SIZE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The product added to ``residual``, both ``[num_rows, N]``. The grid has one program for ``COLUMNS`` of them."""
    _start(ROWS, OVERLAPS)
    rows, columns = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weights = _load(weight, columns, N, K, PARTS, SIZE)
    places = rows[None, :] * N + columns[:, None]
    exists = (rows < num_rows)[None, :] & (columns < N)[:, None]
    _wait(ROWS, OVERLAPS)
    before = tl.load(residual + places, exists, 0.0).to(tl.float32)
    tl.store(out + places, before + _product(weights, _load(x, rows, num_rows, K, PARTS, SIZE)), exists)
