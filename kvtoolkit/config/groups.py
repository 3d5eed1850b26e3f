"""Groups of layers: which layers keep the same tokens, and how memory is divided among the groups."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtoolkit.arrays.types import as_int
from kvtoolkit.config.fields import require_int, require_known
from kvtoolkit.config.tiers import TierConfig
from kvtoolkit.errors import ConfigError
from kvtoolkit.formats.entry import MAX_GRANULES

TYPICAL_LEN = 4096
"""Tokens of the sequence for which memory is divided where the configuration does not say how."""
ROOM = 256
"""Tokens beside its window that such a sequence holds in a group with one: new tokens, and room at its ends."""

_FIELDS = ("layers", "window", "chunk", "num_tokens", "share", "tiers")
_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """One entry of `CacheConfig.layer_groups`, checked.

    Attributes:
        layers: numbers of its layers, ascending.
        window: tokens that a query of these layers sees at most, itself included; 0 = all.
        chunk: a query sees what is in its own chunk of so many tokens, up to itself; 0 = there are no chunks.
        num_tokens: slots of its pool; None = the cache's memory is divided.
        share: of the cache's ``memory``; None = it is divided by default.
        tiers: quantized tiers of its own, as `CacheConfig.tiers`; None = those of the cache, if it keeps all tokens.
    """

    layers: tuple[int, ...]
    window: int = 0
    chunk: int = 0
    num_tokens: int | None = None
    share: float | None = None
    tiers: Mapping[str, Any] | None = field(default=None, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """What `parse_groups` takes."""
        given = {
            "window": self.window or None,
            "chunk": self.chunk or None,
            "num_tokens": self.num_tokens,
            "share": self.share,
            "tiers": self.tiers,
        }
        return {"layers": list(self.layers), **{name: value for name, value in given.items() if value is not None}}

    @property
    def span(self) -> int:
        """`window`, or minus `chunk`, or 0: what compiled code takes, see `step_passes.first_seen`."""
        return self.window or -self.chunk

    def held_of(self, length: int) -> int:
        """Tokens that a sequence of this length is taken to hold in the group."""
        return min(length, abs(self.span) + ROOM) if self.span else length

    def __str__(self) -> str:
        if not self.span:
            return "all tokens"
        return f"a window of {self.window}" if self.window else f"chunks of {self.chunk}"


def parse_groups(values: Any, num_layers: int) -> tuple[LayerGroup, ...]:
    """The groups of a configuration; ConfigError unless they are well formed and each layer is in exactly one."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not values:
        raise ConfigError(f"layer_groups: expected a list of tables, got {values!r:.80}")
    groups = tuple(_parse(value, f"layer_groups[{i}]", num_layers) for i, value in enumerate(values))
    owner: dict[int, int] = {}
    for i, group in enumerate(groups):
        for layer in group.layers:
            if layer in owner:
                raise ConfigError(
                    f"layer_groups[{i}].layers: expected every layer in one group, got {layer}, which is in "
                    f"layer_groups[{owner[layer]}] too"
                )
            owner[layer] = i
    missing = [layer for layer in range(num_layers) if layer not in owner]
    if missing:
        raise ConfigError(
            f"layer_groups: expected all {num_layers} layers of the model, got none with layer "
            f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}"
        )
    return groups


def lead_of(groups: Sequence[LayerGroup]) -> int:
    """Which group's granules name prefixes: the first that keeps all tokens, or else the one that keeps most."""
    kept = [abs(group.span) or 9 * MAX_GRANULES for group in groups]
    return kept.index(max(kept))


def _parse(value: Any, name: str, num_layers: int) -> LayerGroup:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected a table with layers, got {value!r:.80}")
    require_known(value, _FIELDS, f"{name}: ")
    layers = tuple(_layers_of(value.get("layers"), f"{name}.layers", num_layers))
    if not layers or len(set(layers)) != len(layers):
        raise ConfigError(f"{name}.layers: expected different layers, at least one, got {value.get('layers')!r:.80}")
    window, chunk, num_tokens, share, tiers = (value.get(one) for one in _FIELDS[1:])
    if window is not None:
        window = require_int(f"{name}.window", window, 1, 8 * MAX_GRANULES)
    if chunk is not None:
        chunk = require_int(f"{name}.chunk", chunk, 8, 8 * MAX_GRANULES)
        if chunk % 8 or window:
            got = f"{chunk} and a window" if window else chunk
            raise ConfigError(f"{name}.chunk: expected a multiple of 8, and no window beside it, got {got}")
    if num_tokens is not None:
        num_tokens = require_int(f"{name}.num_tokens", num_tokens, 1, 8 * MAX_GRANULES)
    if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1):
        raise ConfigError(f"{name}.share: expected a number above 0 and below 1, got {share!r}")
    return LayerGroup(
        layers=tuple(sorted(layers)), window=window or 0,
        chunk=chunk or 0, num_tokens=num_tokens,
        share=None if share is None else float(share),
        tiers=None if tiers is None else _parse_tiers(tiers, name, bool(window or chunk)),
    )  # fmt: skip


def _parse_tiers(given: Any, name: str, lets_go: bool) -> dict[str, Any]:
    """The tiers of a group, checked; ConfigError if it lets go of its past."""
    if lets_go:
        raise ConfigError(
            f"{name}.tiers: expected none in a group with a window or chunks, because it lets go of tokens that are "
            f"old enough for a quantized tier, got {given!r:.80}"
        )
    try:
        return TierConfig.from_dict(given).to_dict()
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from error


def _layers_of(given: Any, name: str, num_layers: int) -> Iterator[int]:
    """The layers that an int, a range, or a list of these names."""
    if isinstance(given, range | list | tuple):
        for one in given:
            yield from _layers_of(one, name, num_layers)
        return
    layer = as_int(given)
    if layer is None or not 0 <= layer < num_layers:
        raise ConfigError(
            f"{name}: expected layers from 0 to {num_layers - 1}, as ints, ranges or lists, got {given!r:.80}"
        )
    yield layer


def has_own_sizes(groups: tuple[LayerGroup, ...], memory: Any) -> bool:
    """Whether each group says how many tokens it has; ConfigError unless all groups say the same kind of size."""
    for name in ("num_tokens", "share"):
        count = sum(getattr(group, name) is not None for group in groups)
        if count not in (0, len(groups)):
            raise ConfigError(f"layer_groups: expected {name} in every group or in none, got it in {count}")
    shares = [group.share for group in groups if group.share is not None]
    has_tokens = groups[0].num_tokens is not None
    if shares and (has_tokens or memory is None):
        got = "num_tokens beside them" if has_tokens else f"memory {memory!r}"
        raise ConfigError(
            f"layer_groups: expected shares only with memory, and without num_tokens in the groups, got {got}"
        )
    if shares and abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"layer_groups: expected shares that sum to 1, got {sum(shares):g}")
    return has_tokens


def divide_tokens(groups: tuple[LayerGroup, ...], num_tokens: int, max_seq_len: int | None) -> list[int]:
    """The blocks of 64 tokens of each group, where one that keeps all tokens has ``num_tokens`` slots.

    A group with a window has as many slots as sequences of a typical length, which fill ``num_tokens``, hold there.
    """
    length = min(TYPICAL_LEN, num_tokens, max_seq_len or num_tokens)
    return [-(-num_tokens * group.held_of(length) // (length * _BLOCK)) for group in groups]


def divide_memory(
    groups: tuple[LayerGroup, ...], memory: int, nbytes_of: Callable[[LayerGroup, int], int], max_seq_len: int | None
) -> list[int]:
    """The blocks of 64 tokens of each group that ``memory`` bytes hold.

    Args:
        nbytes_of: bytes of so many blocks of a group.
    """
    if groups[0].share is not None:
        shares = [(group, int(memory * (group.share or 0))) for group in groups]
        return [count for group, share in shares for count in _fill(lambda count: [count], share, (group,), nbytes_of)]
    return _fill(lambda count: divide_tokens(groups, _BLOCK * count, max_seq_len), memory, groups, nbytes_of)


def _fill(
    blocks_of: Callable[[int], list[int]], memory: int, groups: tuple[LayerGroup, ...],
    nbytes_of: Callable[[LayerGroup, int], int],
) -> list[int]:  # fmt: skip
    """`fill_memory`, where ``nbytes_of`` takes one group."""
    return fill_memory(blocks_of, memory, lambda counts: sum(map(nbytes_of, groups, counts)))


def fill_memory(blocks_of: Callable[[int], list[int]], memory: int, nbytes_of: Callable[[list[int]], int]) -> list[int]:
    """The most blocks of each group in ``memory`` bytes; all 0 if nothing fits.

    Args:
        blocks_of: blocks of each group, by how many a group that keeps all tokens has.
        memory: bytes.
        nbytes_of: bytes of so many blocks of each group.
    """
    high = 1
    while nbytes_of(blocks_of(high)) <= memory:
        high *= 2
    low = high // 2
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if nbytes_of(blocks_of(middle)) <= memory else (low, middle)
    return blocks_of(low) if low else [0] * len(blocks_of(1))
