"""Growth policies: which block sizes a sequence gets as it grows, and whether small blocks are merged later.

| name | block at the tail | merge |
|---|---|---|
| ``fixed8`` ... ``fixed64`` | that size, also for prompts | no |
| ``append`` | always 8 tokens | no |
| ``proportional`` | 64 from 512 tokens on, 32 from 256, 16 from 128, else 8; wastes at most an eighth | no |
| ``lazy_merge`` | 8 tokens | one copy into a 64 when 64 tokens are full |
| ``adaptive`` | 64 while over 10 % of the pool is free, 32 over 6 %, 16 over 3.5 %, else 8 | as ``lazy_merge`` |

Except with the fixed policies, prompts get the largest blocks first. ``adaptive`` reserves 1 % of the superblocks for
merging, so that merging goes on when memory is short.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocators._jit import jit
from kvtoolkit.arrays.types import as_int
from kvtoolkit.config.fields import require_one_of
from kvtoolkit.errors import ConfigError

FIXED, BY_LENGTH, BY_FREE_MEMORY = range(3)


@dataclass(frozen=True)
class GrowthPolicy:
    """A growth policy, as figures that compiled code can read. Sizes are in granules.

    Checked when made; ConfigError names the field.
    """

    name: str
    """An identifier."""
    rule: int
    """What decides the size of tail blocks. FIXED: `tail`; BY_LENGTH, BY_FREE_MEMORY: the thresholds of `tail_size`."""
    tail: int = 1
    """With the rule FIXED, the size of the block at the tail of a sequence."""
    largest: int = 8
    """Largest block of a prompt, at least `tail`."""
    merges: bool = False
    """Whether small blocks are merged into one of 64 tokens when 64 tokens are full."""
    reserve: float = 0.0
    """Share of the superblocks that is reserved as targets of merges, from 0 to 1; only for policies that merge."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ConfigError(f"growth policy: expected an identifier as name, got {self.name!r}")
        for field in ("rule", "tail", "largest"):
            if (number := as_int(getattr(self, field))) is not None:
                object.__setattr__(self, field, number)
        if type(self.rule) is not int or self.rule not in (FIXED, BY_LENGTH, BY_FREE_MEMORY):
            raise ConfigError(f"growth policy {self.name}: expected a rule of this module, got {self.rule!r}")
        for field in ("tail", "largest"):
            value = getattr(self, field)
            if type(value) is not int or value not in (1, 2, 4, 8):
                raise ConfigError(
                    f"growth policy {self.name}: expected {field} to be 1, 2, 4 or 8 granules, got {value!r}"
                )
        if self.largest < self.tail:
            raise ConfigError(
                f"growth policy {self.name}: expected largest to be at least tail, {self.tail}, got {self.largest}"
            )
        if not isinstance(self.merges, bool):
            raise ConfigError(f"growth policy {self.name}: expected merges to be true or false, got {self.merges!r}")
        reserve = self.reserve
        if isinstance(reserve, bool) or not isinstance(reserve, int | float) or not 0 <= reserve <= 1:
            raise ConfigError(f"growth policy {self.name}: expected a reserve from 0 to 1, got {reserve!r}")
        if reserve and not self.merges:
            raise ConfigError(f"growth policy {self.name}: expected no reserve without merges, got {reserve}")

    @property
    def only_size(self) -> int | None:
        """The only block size that the policy asks for, in tokens; None if there are several."""
        return 8 * self.tail if self.rule == FIXED and self.tail == self.largest else None


_POLICIES = {
    policy.name: policy
    for policy in (
        *(GrowthPolicy(f"fixed{8 * n}", FIXED, tail=n, largest=n) for n in (1, 2, 4, 8)),
        GrowthPolicy("append", FIXED),
        GrowthPolicy("proportional", BY_LENGTH),
        GrowthPolicy("lazy_merge", FIXED, merges=True),
        GrowthPolicy("adaptive", BY_FREE_MEMORY, merges=True, reserve=0.01),
    )
}
_BUILT_IN = frozenset(_POLICIES)


def register(policy: GrowthPolicy, *, replace: bool = False) -> None:
    """Make a policy available under its name, as ``growth`` of a `CacheConfig`.

    Args:
        policy: the policy. One that was registered under the same name before is replaced.
        replace: whether the name may be that of a built-in policy.

    Raises:
        ConfigError: ``policy`` is no `GrowthPolicy`, or has the name of a built-in one without ``replace``.
    """
    if not isinstance(policy, GrowthPolicy):
        raise ConfigError(f"policy: expected a GrowthPolicy, got {policy!r:.80}")
    if policy.name in _BUILT_IN and not replace:
        raise ConfigError(
            f"policy: {policy.name!r} is a built-in policy; choose another name, or replace it by replace=True"
        )
    _POLICIES[policy.name] = policy


def names() -> tuple[str, ...]:
    """The registered policies."""
    return tuple(_POLICIES)


def growth_policy(name: str) -> GrowthPolicy:
    """The policy called ``name``; ConfigError if there is none."""
    require_one_of("growth", name, names())
    return _POLICIES[name]


@jit
def tail_size(rule: int, tail: int, length: int, free_share: float) -> Any:
    """Size in granules of the next block of a sequence of ``length`` tokens while ``free_share`` of memory is free."""
    if rule == BY_LENGTH:
        return 8 if length >= 512 else 4 if length >= 256 else 2 if length >= 128 else 1
    if rule == BY_FREE_MEMORY:
        return 8 if free_share > 0.10 else 4 if free_share > 0.06 else 2 if free_share > 0.035 else 1
    return tail


@jit
def split_into_blocks(
    needed: int, tail: int, largest: int, offered: NDArray[np.int32], out: NDArray[np.int32], first: int
) -> Any:
    """Write block sizes that cover ``needed`` granules to ``out[first:]``, largest first; returns the new end.

    ``offered`` lists the sizes on offer, descending. The sum is ``needed`` rounded up to a multiple of ``tail``.
    """
    rest = (needed + tail - 1) // tail * tail
    end = first
    for size in offered:
        if size > largest:
            continue
        while rest >= size:
            out[end] = size
            end += 1
            rest -= size
    if rest > 0:  # smaller than anything on offer
        out[end] = offered[-1]
        end += 1
    return end
