"""The paged problems of `attention_cases` on a GPU."""

from typing import Any

import numpy as np

from kvtoolkit import reference
from kvtoolkit.attention.calls import paged_attention, variable_block_attention
from tests.kvtoolkit.attention.attention_cases import EPSILON, RELATIVE_L2, Case, nan_filled


def to_device(array: np.ndarray, dtype: str) -> Any:
    """A torch tensor on the GPU; 16-bit words become the dtype that they are."""
    import torch

    if dtype == "bfloat16" and array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


def to_host(tensor: Any) -> np.ndarray:
    """A tensor as NumPy has it; bfloat16 as its bits."""
    import torch

    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(np.uint16)
    return tensor.cpu().numpy()


def run(case: Case, arrays: tuple[np.ndarray, ...], layout: str = "NHD", backend: str = "cuda", **options: Any) -> Any:
    """``out, lse`` of the GPU kernels, written over NaN; see `Case.run`."""
    options.setdefault("cu_seqlens_q", case.cu_seqlens_q)
    for name in ("cu_seqlens_q", "sinks", "alibi_slopes"):
        if options.get(name) is not None:
            options[name] = to_device(options[name], "")
    out = to_device(nan_filled(case.q.shape, case.dtype), case.dtype)
    q, lengths = to_device(case.q, case.dtype), to_device(case.lengths, "")
    k_cache, v_cache = (to_device(cache, case.dtype) for cache in arrays[:2])
    tables = [to_device(table, "") for table in arrays[2:]]
    common = {"out": out, "return_lse": True, "backend": backend, **options}
    if len(arrays) == 4:
        result = variable_block_attention(q, k_cache, v_cache, *tables, lengths, **common)
    else:
        result = paged_attention(q, k_cache, v_cache, *tables, lengths, layout=layout, **common)
    assert result[0] is out
    return to_host(result[0]), to_host(result[1])


def check(
    case: Case, arrays: tuple[np.ndarray, ...], layout: str = "NHD", backend: str = "cuda", **options: Any
) -> None:
    """The kernels agree with the reference."""
    out, lse = run(case, arrays, layout, backend, **options)
    assert_close(out, lse, *case.expected(arrays, layout, **options), case.dtype)


def assert_close(
    out: np.ndarray, lse: np.ndarray, good: np.ndarray, good_lse: np.ndarray, dtype: str, lse_tolerance: float = 1e-4
) -> None:
    """Compare as `attention_cases.assert_close` does; here the softmax weights are rounded to the dtype as well."""
    found = reference.to_float64(out, dtype)
    assert np.array_equal(np.isneginf(lse), np.isneginf(good_lse))
    visible = ~np.isneginf(good_lse)
    np.testing.assert_allclose(lse[visible], good_lse[visible], rtol=1e-5, atol=lse_tolerance)
    assert np.isfinite(found).all()
    assert (found[~visible] == 0).all()
    # a weight is off by half a rounding, so an output by that much of the largest value that goes into it
    scale = np.abs(good).max(initial=0.0)
    np.testing.assert_array_less(np.abs(found - good), EPSILON[dtype] * (np.abs(good) + scale) + 1e-30)
    assert np.linalg.norm(found - good) <= RELATIVE_L2[dtype] * np.linalg.norm(good)
