"""Batches in which tokens that some queries do not see are no numbers, and what must come of it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kvtoolkit import reference
from tests.kvtoolkit.attention.attention_cases import Case
from tests.kvtoolkit.attention.tiered_cases import TieredCase

POISONS = (np.nan, np.inf)
PARTS = ("keys", "values")
SLOPES = np.array([0.5, 0.25, 0.1, 0.0, 1.0, 0.03, 0.2, 0.7] * 2, np.float32)
SINKS = np.array([-2.0, 0.0, 3.0, 30.0, -np.inf, 1.0, 0.5, 2.0] * 2, np.float32)

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window_size": (20, 0)},
    "wide": {"window_size": (70, 0), "num_splits": 3},
    "both": {"window_size": (20, 1), "causal": False, "softcap": 20.0},
    "right": {"window_size": (-1, 1), "causal": False, "alibi_slopes": True, "sinks": True},
    "acausal": {"causal": False},
}

Run = Callable[..., tuple[np.ndarray, np.ndarray]]


def options_of(name: str, num_q_heads: int) -> dict[str, Any]:
    """Options by name, arrays for this many heads among them."""
    options = dict(OPTIONS[name])
    for key, array in (("alibi_slopes", SLOPES), ("sinks", SINKS)):
        if key in options:
            options[key] = array[:num_q_heads]
    return options


def seen_by(position: int, seq_len: int, window_size: tuple[int, int] = (-1, -1), *, causal: bool = True) -> range:
    """The positions that the query at ``position`` sees."""
    left, right = window_size
    first = max(0, position - left) if left >= 0 else 0
    end = seq_len
    if causal or right >= 0:
        end = min(end, position + (0 if causal else right) + 1)
    return range(first, end)


def poison(case: Case, part: str, value: float, options: dict[str, Any]) -> np.ndarray:
    """Put ``value`` into an element of tokens at both edges of what queries see; which query tokens see one of them.

    Of a row with n new tokens: in front of what all but the first n // 3 queries see, and behind what all but the last
    n // 3 do. Where there are fewer than 3, no query sees any of them.
    """
    rng = np.random.default_rng(1)
    bounds = np.arange(len(case.seq_lens) + 1) if case.cu_seqlens_q is None else case.cu_seqlens_q
    visible = {name: options[name] for name in ("window_size", "causal") if name in options}
    affected = np.zeros(len(case.q), bool)
    for row, seq_len in enumerate(case.seq_lens):
        if seq_len == 0:
            continue
        count = int(bounds[row + 1] - bounds[row])
        seen = [seen_by(seq_len - count + i, seq_len, **visible) for i in range(count)]
        spared = seen[count // 3 : count - count // 3]
        chosen = [p for p in range(seq_len) if spared and not any(p in one for one in spared)]
        tokens = getattr(case, part)[row]
        for p in chosen:
            for head in range(case.num_kv_heads):
                bits = np.array(value, np.float32).view(np.uint32) >> 16
                tokens[p, head, rng.integers(case.head_dim)] = bits if case.dtype == "bfloat16" else value
        for i, one in enumerate(seen):
            affected[bounds[row] + i] = any(p in one for p in chosen)
    return affected


def check(make: Callable[[], Case], arrays_of: Callable[[Any], Any], run: Run, **options: Any) -> int:
    """What no query sees changes no bit; what one sees reaches it as it does in the reference.

    Args:
        make: a case, the same one in every call.
        arrays_of: lays it out.
        run: ``run(case, arrays, **options)`` gives ``out, lse`` of the kernels.

    Returns:
        How many queries saw what is no number.
    """
    clean = make()
    clean_arrays = arrays_of(clean)
    expected = run(clean, clean_arrays, **options)
    assert np.isfinite(reference.to_float64(expected[0], clean.dtype)).all()
    num_affected = 0
    for part in PARTS:
        for value in POISONS:
            case = make()
            affected = poison(case, part, value, options)
            arrays = arrays_of(case)
            out, lse = run(case, arrays, **options)
            num_affected += int(affected.sum())
            is_quantized = isinstance(case, TieredCase)  # then a key that is no number may change the scales of others
            if not is_quantized:
                for now, before in zip((out, lse), expected, strict=True):
                    assert np.array_equal(now[~affected], before[~affected]), (part, value)
            if not is_quantized and not affected.any():
                continue
            with np.errstate(all="ignore"):
                good, good_lse = case.expected(arrays, **{**options, "block_mass": None})
            found = reference.to_float64(out, case.dtype)
            assert np.array_equal(np.isfinite(found), np.isfinite(good)), (part, value)
            assert np.array_equal(np.isnan(lse), np.isnan(good_lse)), (part, value)
            if is_quantized:
                good, found = good[~affected], found[~affected]
                np.testing.assert_allclose(found, good, rtol=2e-2, atol=5e-3 * np.abs(good).max(initial=0.0))
    return num_affected
