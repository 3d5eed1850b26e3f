"""The rule of demotion by age: in which tier a tile (64 tokens) of a sequence belongs."""

from typing import Any, NamedTuple

from allocators._jit import jit
from kvtoolkit.tables import TIER_COLD, TIER_HOT, TIER_WARM
from kvtoolkit.tier_config import TierConfig


class AgeRule(NamedTuple):
    """Figures that compiled code can read, in tokens."""

    hot: int
    pinned: int
    warm: int
    """0 where there is no warm tier; far beyond any length where there is no cold one."""


def age_rule(config: TierConfig) -> AgeRule:
    """The rule that a configuration asks for."""
    warm = 0 if config.warm is None else config.warm_tokens if config.cold is not None else 1 << 40
    return AgeRule(config.hot, config.pinned_tokens, warm)


@jit
def tier_by_age(rule: AgeRule, length: int, tile: int) -> Any:
    """The tier that a tile of a sequence of ``length`` tokens belongs in."""
    if 64 * tile < rule.pinned or 64 * (tile + 1) > length - rule.hot:
        return TIER_HOT
    return TIER_WARM if 64 * (tile + 1) > length - rule.hot - rule.warm else TIER_COLD
