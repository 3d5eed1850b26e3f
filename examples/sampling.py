"""Choose next tokens where the logits are, for all rows at once: the likeliest, or drawn.

A draw depends on the seed of its request and on how many tokens that request has, and on nothing else of the batch.
"""

from typing import NamedTuple

import torch

_STEPS = 24  # of the bisection: thresholds are right to a part in 16 million


class Choice(NamedTuple):
    """How the next token of each row is chosen; all ``[batch]``, on the device of the logits."""

    temperature: torch.Tensor
    """float32; 0 = the likeliest token."""
    top_p: torch.Tensor
    """float32; only the likeliest tokens that have so much of the chances together are drawn."""
    seed: torch.Tensor
    """int64, of the request."""
    count: torch.Tensor
    """int64: tokens that the request has got."""


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """``[batch]`` tokens with the largest of ``logits`` ``[batch, vocab_size]``."""
    return logits.argmax(-1)


def draw(logits: torch.Tensor, choice: Choice, nucleus: bool) -> torch.Tensor:
    """``[batch]`` tokens, each by the temperature of its row.

    The largest of the scaled logits, to each of which noise of the Gumbel distribution is added, is a draw from their
    softmax (Maddison et al. 2014, arXiv:1411.0030). It needs no sorted or summed chances.

    Args:
        nucleus: whether some row has a ``top_p`` below 1.
    """
    scores = logits.float()
    scores = scores - scores.amax(-1, keepdim=True)  # at most 0, so that a tiny temperature makes none infinite
    scaled = scores / choice.temperature.clamp(1e-30, 1e30)[:, None]
    if nucleus:
        chances = torch.softmax(scaled, -1)
        is_cut = (choice.top_p < 1)[:, None]  # other rows are as they are without such a neighbour
        scaled = scaled.masked_fill(is_cut & (chances < _threshold(chances, choice.top_p)[:, None]), -torch.inf)
    noise = -(-uniform(choice.seed, choice.count, logits.shape[-1]).log()).log()
    return torch.where(choice.temperature > 0, (scaled + noise).argmax(-1), likeliest(logits))


def _threshold(chances: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """``[batch]``: the largest chance such that tokens with that or more have ``top_p`` together."""
    low, high = torch.zeros_like(top_p), torch.ones_like(top_p)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        is_enough = torch.where(chances >= middle[:, None], chances, 0).sum(-1) >= top_p
        low, high = torch.where(is_enough, middle, low), torch.where(is_enough, high, middle)
    return low


def uniform(seed: torch.Tensor, count: torch.Tensor, size: int) -> torch.Tensor:
    """``[batch, size]`` float32 above 0 and below 1, by hashing the seed, the count and the place.

    Source of the hash: SplitMix64, Steele et al. 2014 (doi:10.1145/2660193.2660195), fig. 17.
    """
    stream = _mix(_mix(seed) ^ count)
    bits = _mix(stream[:, None] + torch.arange(size, device=seed.device))
    return ((bits & 0x7FFFFF).float() + 0.5) / 0x800000


def _mix(x: torch.Tensor) -> torch.Tensor:
    """int64 whose every bit depends on every bit of ``x``. Products wrap around."""
    x = x + -0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, count: int) -> torch.Tensor:
    """``x`` shifted right as if it had no sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)
