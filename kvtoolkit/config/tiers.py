"""The configuration of tiers: what is kept in which precision and where, for how long, and in how much memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocators import AllocatorError, find
from kvtoolkit.config.fields import parse_nbytes, require_known, require_one_of, settle_int
from kvtoolkit.config.prediction import predictor
from kvtoolkit.errors import ConfigError
from kvtoolkit.formats.quantized import BLOCK, FORMATS, Format

TIER_NAMES = ("hot", "warm", "cold")
POOL_NAMES = (*TIER_NAMES, "host16", "host_cold")
"""A pool is the memory of one tier in one place. The last two are in host memory: of the hot and of the cold tier."""
TIER_OF_POOL = (0, 1, 2, 0, 2)
HOST_POOL_OF = {0: 3, 2: 4}
"""The pools in host memory, by their tier."""


def firsts_of(pool_granules: Sequence[int]) -> tuple[int, int, int, int, int]:
    """The first granule of each pool: a tier's granules in host memory follow those that it has on the device."""
    hot, warm, cold, host16, _ = pool_granules
    return 0, hot + host16, hot + host16 + warm, hot, hot + host16 + warm + cold


_SHARES: dict[tuple[str, ...], dict[str, float]] = {
    ("warm", "cold"): {"hot": 0.5, "warm": 0.25, "cold": 0.25},
    ("warm",): {"hot": 0.5, "warm": 0.5},
    ("cold",): {"hot": 0.5, "cold": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """The table ``tiers`` of a `CacheConfig`. Checked when made; ConfigError names the field.

    A tile (64 tokens) of a sequence is hot (16 bit) while it is pinned, not full, or among the last ``hot`` tokens.
    Older tiles go to the warm tier, and later to the cold one.

    Attributes:
        hot: tokens kept hot at the end of a sequence, a multiple of 64. With ``host``, and the first ``pinned_tokens``,
            also what does not move to host memory while the sequence is awake. The device should have room for these,
            and 64 more, of every running sequence; otherwise new tokens are written to host memory.
        warm: ``int8``; None: no warm tier.
        warm_tokens: tokens kept warm before they go to the cold tier, a multiple of 64. Used only if both tiers exist.
        cold: ``int4``; None: no cold tier.
        demote: which tiles go to the cold tier first. ``age``: the oldest; ``mass``: those that receive least attention
            in `Step.attend`. On a GPU, attention masses are collected in every 16th step, unless a row has more than 8
            new tokens or the step is a replayed graph.
        pinned_tokens: tokens kept hot at the beginning of a sequence, a multiple of 64.
        tier_memory: share of the bytes for each tier. Default: half is hot, and the other tiers share the rest equally.
            The shares decide how many tokens of each kind the pool holds, see `CacheConfig.tier_granules`. The hot tier
            should have room for ``hot + pinned_tokens + 64`` tokens of every running sequence, and for the largest step
            of a prompt.
        prefix_reuse_tiers: what later prompts, and sequences dropped by `KVCache.preempt`, may find. ``hot``: what
            comes before a sequence's first quantized tile, which in a long sequence is its pinned tokens; ``all``:
            quantized tiles too, which changes answers a little. Choose ``all`` for chats of many turns.
        warm_allocator: allocator of the warm tier, in the form of the cache's ``allocator``, which is the default.
        cold_allocator: allocator of the cold tier.
        host: bytes of pinned host memory, or a text such as ``"64 GiB"``, for blocks that the device has no room for;
            None: none. Kernels read and write such blocks in place. They keep their format, so where a block is changes
            no result. ``num_tokens`` and ``memory`` of the cache do not count them.
        staging: tokens of host memory for which there is room on the device, a multiple of 64. A step copies what its
            rows hold in host memory there, as much as there is room for, one layer ahead and beside the kernels of the
            layers before. Kernels read the rest in place. It takes the memory of so many tokens of two layers, besides
            ``memory``. Only on a GPU (a cache on the CPU ignores it) and without quantized tiers; steps that the device
            drives read in place.
        sparse: tokens in host memory that a decode step reads of each sequence, a multiple of 64; None: all of them.
            With a number, steps leave out the rest: faster, and approximate. Every 16th step still reads everything, as
            does a step with more than 8 new tokens in a row, from which nothing is learned, and a sequence until its
            first full step. It costs little where attention is on few and the same tokens, and much where an answer
            needs many places of the context, or one that nothing has asked for before; see
            ``CacheStats.skipped_mass``. Only without quantized tiers.
        prefetch: which of them: a predictor of `kvtoolkit.config.prediction` that needs no queries, or
            ``"package.module:Class"``; default ``mass``. Only with ``sparse``.
        host_memory: share of ``host`` for the hot and for the cold tier. Default: all of it is for the hot tier, or
            half for each if there is a cold tier.
    """

    hot: int = 256
    warm: str | None = None
    warm_tokens: int = 2048
    cold: str | None = None
    demote: str = "age"
    pinned_tokens: int = 64
    tier_memory: Mapping[str, float] | None = None
    prefix_reuse_tiers: str = "hot"
    warm_allocator: str | None = None
    cold_allocator: str | None = None
    host: int | str | None = None
    staging: int = 0
    sparse: int | None = None
    prefetch: str | None = None
    host_memory: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, low in (("hot", BLOCK), ("warm_tokens", 0), ("pinned_tokens", 0), ("staging", 0)):
            settle_int(self, name, low, 1 << 40, prefix="tiers.")
            if getattr(self, name) % BLOCK:
                raise ConfigError(f"tiers.{name}: expected a multiple of {BLOCK}, got {getattr(self, name)}")
        for name, expected in (("warm", "int8"), ("cold", "int4")):
            if getattr(self, name) not in (None, expected):
                raise ConfigError(f"tiers.{name}: expected {expected!r} or nothing, got {getattr(self, name)!r}")
        if not self.quantized and self.host is None:
            raise ConfigError("tiers: expected some of warm = 'int8', cold = 'int4' and host = bytes, got none of them")
        require_one_of("tiers.demote", self.demote, ("age", "mass"))
        if self.demote == "mass" and len(self.quantized) < 2:
            raise ConfigError("tiers.demote: 'mass' chooses between warm and cold, expected both tiers")
        require_one_of("tiers.prefix_reuse_tiers", self.prefix_reuse_tiers, ("hot", "all"))
        for name in ("warm", "cold"):
            _check_allocator(f"tiers.{name}_allocator", getattr(self, f"{name}_allocator"))
            if getattr(self, name) is None and getattr(self, f"{name}_allocator") is not None:
                raise ConfigError(f"tiers.{name}_allocator: expected nothing without a {name} tier")
        if self.quantized:
            object.__setattr__(
                self, "tier_memory", _as_shares("tier_memory", self.tier_memory, _SHARES[self.quantized])
            )
        elif self.tier_memory is not None:
            raise ConfigError("tiers.tier_memory: expected nothing without a warm or cold tier")
        self._settle_host()

    def _settle_host(self) -> None:
        if self.host is None:
            for name in ("host_memory", "staging", "sparse", "prefetch"):
                if getattr(self, name):
                    raise ConfigError(f"tiers.{name}: expected nothing without host")
            return
        if self.prefetch is not None and self.sparse is None:
            raise ConfigError(
                "tiers.prefetch: expected nothing without sparse, which leaves out what it does not choose"
            )
        for name in ("staging", "sparse"):
            if getattr(self, name) and self.quantized:
                raise ConfigError(f"tiers.{name}: expected nothing with a warm or cold tier")
        if self.sparse is not None:
            settle_int(self, "sparse", BLOCK, 1 << 40, prefix="tiers.")
            object.__setattr__(self, "prefetch", "mass" if self.prefetch is None else self.prefetch)
            if self.sparse % BLOCK:
                raise ConfigError(f"tiers.sparse: expected a multiple of {BLOCK}, got {self.sparse}")
            try:
                needs_keys = predictor(self.prefetch or "mass").needs_keys
            except ConfigError as error:
                raise ConfigError(f"tiers.prefetch: {error}") from error
            if needs_keys:
                raise ConfigError(f"tiers.prefetch: expected a predictor that needs no queries, got {self.prefetch!r}")
        object.__setattr__(self, "host", parse_nbytes(self.host, "tiers.host"))
        if self.cold is not None:
            halves = {"hot": 0.5, "cold": 0.5}
            object.__setattr__(self, "host_memory", _as_shares("host_memory", self.host_memory, halves))
        elif self.host_memory is not None:
            raise ConfigError("tiers.host_memory: expected nothing without a cold tier")

    @property
    def quantized(self) -> tuple[str, ...]:
        """Which of the tiers ``warm`` and ``cold`` exist."""
        return tuple(name for name in TIER_NAMES[1:] if getattr(self, name) is not None)

    @property
    def formats(self) -> tuple[Format | None, Format | None]:
        """The formats of the warm and the cold tier."""
        warm, cold = (None if name is None else FORMATS[name] for name in (self.warm, self.cold))
        return warm, cold

    def blocks_of_tokens(self, num_blocks: int, nbytes: Mapping[str, int]) -> tuple[int, int, int]:
        """Divide blocks of 64 tokens among the tiers, so that their bytes have the shares of ``tier_memory``.

        Args:
            num_blocks: blocks of all tiers together.
            nbytes: bytes of a block of each tier.
        """
        assert self.tier_memory is not None
        weights = {name: share / nbytes[name] for name, share in self.tier_memory.items()}
        total = sum(weights.values())
        blocks = {name: max(1, round(num_blocks * weights[name] / total)) for name in self.quantized}
        return num_blocks - sum(blocks.values()), blocks.get("warm", 0), blocks.get("cold", 0)

    def host_blocks(self, nbytes: Mapping[str, int]) -> tuple[int, int]:
        """Blocks of 64 tokens in host memory, of the hot and of the cold tier; ``nbytes``: of a block of each tier."""
        if self.host is None:
            return 0, 0
        total, shares = int(self.host), self.host_memory or {"hot": 1.0}
        hot, cold = (int(total * shares.get(name, 0.0)) for name in ("hot", "cold"))
        return hot // nbytes["hot"], cold // nbytes["cold"] if cold else 0

    def blocks_of_memory(self, memory: int, nbytes: Mapping[str, int]) -> tuple[int, int, int]:
        """Divide bytes among the tiers by ``tier_memory``; returns the blocks of each."""
        assert self.tier_memory is not None
        blocks = {name: int(memory * share) // nbytes[name] for name, share in self.tier_memory.items()}
        return blocks["hot"], blocks.get("warm", 0), blocks.get("cold", 0)

    @classmethod
    def from_dict(cls, values: Any) -> "TierConfig":
        """A configuration from a table of a configuration file; a `TierConfig` is returned as it is."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, Mapping):
            raise ConfigError(f"tiers: expected a table, got {values!r}")
        require_known(values, tuple(field.name for field in dataclasses.fields(cls)), "tiers: ")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None, as `from_dict` takes them."""
        return {name: value for name, value in vars(self).items() if value is not None}


def _as_shares(name: str, shares: Any, default: Mapping[str, float]) -> dict[str, float]:
    """Checked shares of memory, for the tiers that ``default`` has; ConfigError if they are none."""
    if shares is None:
        return dict(default)
    if not isinstance(shares, Mapping) or set(shares) != set(default):
        raise ConfigError(f"tiers.{name}: expected a table with {', '.join(default)}, got {shares!r}")
    for tier in default:
        share = shares[tier]
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ConfigError(f"tiers.{name}.{tier}: expected a number above 0 and below 1, got {share!r}")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(f"tiers.{name}: expected shares that sum to 1, got {sum(shares.values()):g}")
    return {tier: float(shares[tier]) for tier in default}


def _check_allocator(name: str, spec: Any) -> None:
    if spec is None:
        return
    if not isinstance(spec, str):
        raise ConfigError(f"{name}: expected a name or 'package.module:Class', got {spec!r}")
    try:
        find(spec)
    except AllocatorError as error:
        raise ConfigError(f"{name}: {error}") from error
