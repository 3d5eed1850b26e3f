"""Rotary position embedding with tables of cosines and sines, in torch.

Source: Su et al. 2021 (arXiv:2104.09864), sec. 3.4; the two pairings are those of GPT-J and GPT-NeoX.
"""

import torch

from kvtoolkit.errors import ShapeError
from kvtoolkit.integrations.flash_attn.arguments import check_tensor, rows_of

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_tables(
    cos: torch.Tensor, sin: torch.Tensor, head_dim: int, num_positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables, last axis contiguous.

    Args:
        cos: ``[seqlen_ro, rotary_dim / 2]`` float32, float16 or bfloat16; ``sin`` has its shape and dtype.
        head_dim: at least ``rotary_dim``.
        num_positions: ``seqlen_ro`` must be at least that.

    Raises:
        ShapeError: they are not as above.
    """
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_tensor(name, table, 2, device)
        if table.dtype not in _FLOATS:
            raise ShapeError(f"{name}: expected float32, float16 or bfloat16, got {table.dtype}")
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ShapeError(
            f"rotary_sin: expected as rotary_cos, {tuple(cos.shape)} {cos.dtype}, got {tuple(sin.shape)} {sin.dtype}"
        )
    if not 0 < 2 * cos.shape[1] <= head_dim:
        raise ShapeError(f"rotary_cos: expected 1 to head_dim / 2 = {head_dim // 2} columns, got {cos.shape[1]}")
    if cos.shape[0] < num_positions:
        raise ShapeError(
            f"rotary_cos: expected at least {num_positions} positions, which is what a row of the cache can hold, "
            f"got {cos.shape[0]}"
        )
    return rows_of(cos), rows_of(sin)


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """Rotate pairs of the first ``rotary_dim`` channels by their position's angles; computed in float32.

    Args:
        states: ``[..., num_heads, head_dim]``.
        cos: as `check_tables` returns it, ``sin`` too.
        positions: ``[...]`` integers.
        interleaved: the pairs are channels 0 and 1, 2 and 3, ...; else 0 and ``rotary_dim / 2``, and so on.

    Returns:
        A new tensor, shaped and typed as ``states``.
    """
    half = cos.shape[1]
    rows = positions.long()
    cosines, sines = (table[rows].float().unsqueeze(-2) for table in (cos, sin))
    turned = states[..., : 2 * half].float()
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.split(half, -1)
    pairs = (first * cosines - second * sines, first * sines + second * cosines)
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((turned.to(states.dtype), states[..., 2 * half :]), -1)
