"""The quick judge of pooled batches says what the reference says."""

import numpy as np
import pytest

from kvtoolkit import reference
from tests.kvtoolkit.attention.pooled_cases import Pooled

SLOPES, SINKS = np.array([0.5, 0.1, 0.0, 1.0]), np.array([-2.0, 3.0, -np.inf, 1.0])


@pytest.mark.parametrize(
    "options",
    [
        {}, {"causal": False}, {"window_size": (9, 0)}, {"window_size": (9, 2), "causal": False},
        {"window_size": (-1, 2), "causal": False, "softcap": 3.0}, {"softmax_scale": 0.0, "sinks": SINKS},
        {"softmax_scale": -0.3, "alibi_slopes": SLOPES},
    ],
    ids=str,
)  # fmt: skip
def test_it_agrees_with_the_reference(options):
    case = Pooled([[0, 1, 2], [3], [0, 4], []], [37, 5, 20, 0], [6, 5, 1, 2], num_q_heads=4, num_kv_heads=2, head_dim=8)
    found = case.expected(**options)
    good = reference.paged_attention(
        case.q, *case.arrays, case.lengths, layout="HND", cu_seqlens_q=case.bounds, **options
    )
    for one, other in zip(found, good, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_numbers_that_are_none_spread_as_in_the_reference():
    for part, value in ((0, np.nan), (1, np.nan), (1, -np.inf)):
        case = Pooled([[0, 1], [0, 2]], [20, 30], head_dim=8)
        case.caches[part][0, 0, 3, 2] = value
        good = reference.paged_attention(case.q, *case.arrays, case.lengths, layout="HND")
        for one, other in zip(case.expected(), good, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
