"""The configuration of a cache: one frozen, validated object, from Python or from a TOML file."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allocators import AllocatorError, find
from kvtoolkit.arrays.types import as_int
from kvtoolkit.config.eviction import eviction_policy
from kvtoolkit.config.fields import parse_nbytes, require_int, require_known, require_one_of, settle_int
from kvtoolkit.config.groups import (
    TYPICAL_LEN,
    LayerGroup,
    divide_memory,
    divide_tokens,
    has_own_sizes,
    parse_groups,
)  # fmt: skip
from kvtoolkit.config.growth import FIXED, GrowthPolicy, growth_policy
from kvtoolkit.config.model_config import MOST_LAYERS, read_model
from kvtoolkit.config.split import Split, as_lengths, groups_of
from kvtoolkit.config.tiers import TIER_NAMES, TierConfig, firsts_of
from kvtoolkit.errors import ConfigError, UnsupportedError
from kvtoolkit.formats.entry import MAX_GRANULES
from kvtoolkit.formats.quantized import check_head_dim

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BACKENDS = ("cpu", "cuda", "numba")
_TOKENS_PER_SUPERBLOCK = 64
_BLOCK_TABLE_NBYTES = 256 << 20
_ENTRY_NBYTES = 8  # the entry and its start
_LEAST_ENTRIES = 64


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The configuration of a `KVCache`. Checked when made; ConfigError says which field is wrong, and why.

    A configuration can name code: the module of ``"package.module:Class"`` is imported when the configuration is made.
    So read configuration files only from places from which you would run programs.

    Give either ``num_tokens`` or ``memory``; both are rounded to whole superblocks of 64 tokens (``num_tokens`` up,
    ``memory`` down).

    Attributes:
        num_layers: of the model.
        num_kv_heads: of the model.
        head_dim: of the model; a multiple of 8.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        num_tokens: token slots in the pool, all tiers together, without those in host memory.
        memory: bytes of keys and values, all layers and tiers, without host memory; or a text such as ``"512 MiB"``.
        allocator: ``paged``, ``buddy``, ``slab``, ``lockfree``, an entry point's name, or ``"package.module:Class"``.
        allocator_options: further keyword arguments of the allocator's class, such as ``{"layout": "slab"}`` of
            ``lockfree``.
        block_sizes: sizes on offer in tokens, of 8, 16, 32, 64. Default: all; of a fixed growth policy, its own; of
            ``paged``, 16.
        growth: a growth policy, see `kvtoolkit.config.growth`. Default: ``adaptive``, or if there is only one block
            size, the fixed policy of that size.
        prefix_caching: whether later prompts can find full granules.
        keep_prefix_windows: what happens, in a group of layers with a window or chunks, to tokens that no query of
            their sequence sees any more. True: prompts can find them until their memory is needed, so that a prompt may
            begin at any point of an earlier one. False: they are freed at once, and prompts find little but the
            prefixes of sequences that were no longer than the window. Has no effect without such a group.
        eviction: which cached prefix goes first when memory is needed: ``lru``, ``lfu``, a policy registered in
            `kvtoolkit.config.eviction`, or ``"package.module:Class"``.
        max_seqs: most sequences that can be open at once. Each has a row of ``max_entries`` entries in host memory.
        max_seq_len: most tokens in one sequence. Default: the whole pool, host memory included.
        max_entries: most entries in one row of the block table; a full row stalls. Default: enough for blocks of 8
            tokens, unless the block table would exceed 256 MiB. Then it has that size, but at least enough entries for
            twice a sequence's share of the pool, and for ``max_seq_len`` if that is given, in blocks of 64 tokens.
        migrate_budget: most merges in one step, and most tiles of 64 tokens that change their tier in one step while
            memory is not short.
        shared_reads: whether a decode step on ``backend="cuda"`` may read a beginning that several of its sequences
            share once for all of them: forks, beams, samples of one prompt, prompts with a cached beginning. It is done
            only where it saves more memory traffic than it costs. A row's results then may differ in the last place
            from those of a step in which it shares nothing, because parts of its softmax are merged in 16 bit. False:
            every row reads its own tokens in every step. Captured steps choose by themselves, see `GraphStep`. With
            ``tiers`` it is done only where 82 % of what a step reads are saved. Has no effect on other
            backends, and on GPUs that are not sm_90.
        tiers: quantized tiers for older tokens, and pinned host memory: a table with the fields of
            `kvtoolkit.config.tiers.TierConfig`. With ``layer_groups`` they are those of each group that keeps all
            tokens and has none of its own. Default: all tokens are hot, and on the device.
        layer_groups: for models in which some layers see only the last tokens: a list of tables, such as
            ``[{"layers": [0, 1, 2], "window": 1024}, {"layers": range(3, 12)}]``. Layers are ints, ranges or lists of
            them; each layer is in exactly one group. ``window`` is the number of tokens that a query sees, itself
            included; with ``"chunk": 8192`` a query sees what is in its own chunk of 8192 tokens, up to itself; without
            either the layers see all tokens. Each group has its own memory and block table, and one with
            a window frees tokens that no later query can see. How memory is divided is fixed here: by ``num_tokens`` in
            every group (and none for the cache); by ``share``, a part of ``memory``, in every group, which sum to 1; or
            by default so that sequences of 4096 tokens (or ``max_seq_len``, or ``num_tokens``, if that is less) fill
            all groups at the same time, if they hold ``window + 256`` or ``chunk + 256`` tokens in such a group. Then
            ``num_tokens`` is what a group that keeps all tokens has, or would have if there is none: the tokens of all
            these sequences together. One group of all layers has ``num_tokens`` slots. A group with a window or chunks
            needs ``window + 64`` or ``chunk + 64`` slots, or room for the longest sequence if that is shorter. A group
            that keeps all tokens can have ``tiers`` of its own, or has those of the cache; the others keep 16 bit.
            ``num_tokens`` and ``share`` of a group count all its tiers. Default: all layers keep all tokens.
        backend: ``cpu``; ``cuda``: memory and kernels on a GPU; ``numba``: memory on a GPU, and the readable kernels.
        device: CUDA device of the GPU backends. Default: the one that is current when the cache is made.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float16"
    num_tokens: int | None = None
    memory: int | str | None = None
    allocator: str = "buddy"
    allocator_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    block_sizes: tuple[int, ...] | None = None
    growth: str | None = None
    prefix_caching: bool = True
    keep_prefix_windows: bool = True
    eviction: str = "lru"
    max_seqs: int = 256
    max_seq_len: int | None = None
    max_entries: int | None = None
    migrate_budget: int = 64
    shared_reads: bool = True
    tiers: Mapping[str, Any] | None = field(default=None, hash=False)
    layer_groups: Sequence[Mapping[str, Any]] | None = field(default=None, hash=False)
    backend: str = "cpu"
    device: int | None = None

    def __post_init__(self) -> None:
        settle_int(self, "num_layers", 1, MOST_LAYERS)
        for name in ("num_kv_heads", "head_dim"):
            settle_int(self, name, 1, 1 << 16)
        settle_int(self, "max_seqs", 1, 1 << 20)
        settle_int(self, "migrate_budget", 0)
        for name in ("max_seq_len", "max_entries", "num_tokens"):
            if getattr(self, name) is not None:
                settle_int(self, name, 1, 8 * MAX_GRANULES)
        if self.device is not None:
            settle_int(self, "device", 0)
        if (nbytes := as_int(self.memory)) is not None:
            object.__setattr__(self, "memory", nbytes)
        if self.head_dim % 8:
            raise ConfigError(f"head_dim: expected a multiple of 8, got {self.head_dim}")
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        require_one_of("backend", self.backend, _BACKENDS)
        for name in ("prefix_caching", "keep_prefix_windows", "shared_reads"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        options = self.allocator_options
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise ConfigError(f"allocator_options: expected a table with names as keys, got {options!r}")
        for name in ("num_granules", "block_sizes"):
            if name in options:
                raise ConfigError(f"allocator_options: expected no {name!r}, which the cache gives itself")
        eviction_policy(self.eviction)
        if self.tiers is not None:
            tiers = TierConfig.from_dict(self.tiers)
            object.__setattr__(self, "tiers", tiers.to_dict())
            if tiers.quantized:
                check_head_dim(self.head_dim)
        if self.backend != "cpu":
            if self.dtype not in ("float16", "bfloat16"):
                raise UnsupportedError(
                    f"dtype: expected float16 or bfloat16 with backend {self.backend!r}, got {self.dtype}"
                )
            if self.head_dim % 16 or self.head_dim > 256:
                raise UnsupportedError(
                    f"head_dim: expected a multiple of 16 up to 256 with backend {self.backend!r}, got {self.head_dim}"
                )
        elif self.device is not None:
            raise ConfigError(f"device: expected none with backend 'cpu', got {self.device}")
        if not self._settle_groups() and (self.num_tokens is None) == (self.memory is None):
            raise ConfigError(
                f"expected exactly one of num_tokens and memory, got {self.num_tokens!r} and {self.memory!r}"
            )
        if not isinstance(self.allocator, str):
            raise ConfigError(f"allocator: expected a name or 'package.module:Class', got {self.allocator!r}")
        try:
            find(self.allocator)
        except AllocatorError as error:
            raise ConfigError(str(error)) from error
        self._settle_sizes()
        if not 0 < self.num_granules <= MAX_GRANULES:
            raise ConfigError(
                f"num_tokens or memory: expected a pool of {_TOKENS_PER_SUPERBLOCK} to {MAX_GRANULES * 8} tokens, "
                f"got {self.num_granules * 8}"
            )
        if self.is_grouped:
            self._check_groups()
        else:
            self._check_tiers()

    def _check_tiers(self) -> None:
        """ConfigError unless each tier has room for what it must hold."""
        for name, count in zip(TIER_NAMES, self.tier_granules, strict=True):
            if count <= 0 and (name == "hot" or name in (self.quantization.quantized if self.quantization else ())):
                raise ConfigError(f"num_tokens or memory: expected room for 64 tokens in the {name} tier, got none")
        if self.tier_config is not None and self.tier_config.host is not None:
            names = ("hot", *(self.tier_config.host_memory or {}))
            assert self.block_sizes is not None
            if 64 not in self.block_sizes:
                raise ConfigError(
                    "tiers.host: expected 64 among block_sizes, because tokens move in blocks of 64, got "
                    f"{self.block_sizes}"
                )
            if any(
                count == 0 and name in names for name, count in zip(("hot", "cold"), self.host_granules, strict=True)
            ):
                raise ConfigError(
                    f"tiers.host: expected room for 64 tokens of each tier that it is for, got {self.tier_config.host} "
                    "bytes"
                )
        needed = self.quantization.hot + self.quantization.pinned_tokens + 64 if self.quantization else 0
        if needed > 8 * self.tier_granules[0]:
            raise ConfigError(
                f"tiers: expected room for hot + pinned_tokens + 64 = {needed} tokens of a sequence in the hot tier, "
                f"got {8 * self.tier_granules[0]} of {8 * self.num_granules}; raise num_tokens, memory or "
                "tier_memory['hot'], or lower hot"
            )

    def _settle_groups(self) -> bool:
        """Check `layer_groups`, and write it in one form; returns whether the groups say what memory they have."""
        if self.layer_groups is None:
            return False
        groups = parse_groups(self.layer_groups, self.num_layers)
        object.__setattr__(self, "layer_groups", [group.to_dict() for group in groups])
        has_sizes = has_own_sizes(groups, self.memory)
        if has_sizes and (self.num_tokens, self.memory) != (None, None):
            raise ConfigError(
                "layer_groups: expected num_tokens in the groups, or num_tokens or memory of the cache, got both"
            )
        if self.tiers is not None and all(group.span for group in groups):
            raise UnsupportedError(
                "tiers: expected a group of layers that keep all tokens, because the others let go of tokens that are "
                "old enough for a quantized tier, got none in layer_groups"
            )
        if len(groups) == 1 and groups[0].tiers is not None:
            object.__setattr__(self, "tiers", groups[0].tiers)
        if any(group.tiers for group in groups):
            check_head_dim(self.head_dim)
        return has_sizes

    def _check_groups(self) -> None:
        """ConfigError unless each group has room for one sequence; UnsupportedError where one has host memory."""
        if any((self._tiers_of(group) or {}).get("host") is not None for group in self.groups):
            raise UnsupportedError("tiers.host: expected none with groups of layers that have a window or differ")
        for i, (group, config) in enumerate(zip(self.groups, self.group_configs, strict=True)):
            least = min(abs(group.span) + _TOKENS_PER_SUPERBLOCK, self.seq_len_limit) if group.span else 1
            if 8 * config.num_granules < least:
                raise ConfigError(
                    f"layer_groups[{i}]: expected room for {least} tokens, a window or chunk and a block of 64, got "
                    f"{8 * config.num_granules}; raise num_tokens, memory or share"
                )

    def _settle_sizes(self) -> None:
        """Fill in `block_sizes` and `growth` from each other; ConfigError if they do not fit each other."""
        sizes, growth = self.block_sizes, self.growth
        only_size = growth_policy(growth).only_size if growth is not None else None
        if sizes is None:
            sizes = (only_size,) if only_size else (16,) if self.allocator == "paged" else (8, 16, 32, 64)
        try:
            found = {as_int(size) for size in sizes}
        except TypeError:
            raise ConfigError(f"block_sizes: expected some of 8, 16, 32, 64, got {sizes!r}") from None
        sizes = tuple(size for size in (8, 16, 32, 64) if size in found)
        if not sizes or len(sizes) != len(found):
            raise ConfigError(f"block_sizes: expected some of 8, 16, 32, 64, got {self.block_sizes!r}")
        if self.allocator == "paged" and len(sizes) != 1:
            raise ConfigError(f"block_sizes: expected one size for the paged allocator, got {sizes}")
        if growth is None:
            growth = f"fixed{sizes[0]}" if len(sizes) == 1 else "adaptive"
        policy = growth_policy(growth)
        if policy.only_size and policy.only_size not in sizes:
            raise ConfigError(f"growth: expected a fixed size among block_sizes {sizes}, got {growth!r}")
        if policy.rule == FIXED and 8 * policy.tail not in sizes:
            raise ConfigError(f"growth: {growth!r} needs {8 * policy.tail} among block_sizes, got {sizes}")
        if 8 * policy.largest < sizes[0]:
            raise ConfigError(f"growth: {growth!r} needs blocks of {8 * policy.largest} tokens or less, got {sizes}")
        if policy.merges and 64 not in sizes:
            raise ConfigError(f"growth: {growth!r} needs 64 among block_sizes, got {sizes}")
        object.__setattr__(self, "block_sizes", sizes)
        object.__setattr__(self, "growth", growth)
        object.__setattr__(self, "allocator_options", dict(self.allocator_options))

    # -- what follows from the fields --------------------------------------------------------------------------------

    @functools.cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """`layer_groups`, checked; one group of all layers by default."""
        if self.layer_groups is None:
            return (LayerGroup(layers=tuple(range(self.num_layers))),)
        return parse_groups(self.layer_groups, self.num_layers)

    @property
    def is_grouped(self) -> bool:
        """Whether there are several groups of layers, or layers with a window."""
        return len(self.groups) > 1 or self.groups[0].span != 0

    @property
    def has_tiers(self) -> bool:
        """Whether there are quantized tiers, in any group of layers."""
        tables = (self._tiers_of(group) for group in self.groups)
        return any(TierConfig.from_dict(table).quantized for table in tables if table is not None)

    def _tiers_of(self, group: LayerGroup) -> Mapping[str, Any] | None:
        """The tiers of a group: its own, or those of the cache if it keeps all tokens."""
        return group.tiers if group.tiers is not None or group.span else self.tiers

    @functools.cached_property
    def group_configs(self) -> tuple["CacheConfig", ...]:
        """A configuration of one group for each group: its number of layers, its pool and its tiers."""
        if len(self.groups) == 1 and self.groups[0].num_tokens is None:
            return (self,)
        sizes = zip(self.groups, self._group_blocks(), strict=True)
        return tuple(self._group_config(i, group, count) for i, (group, count) in enumerate(sizes))

    def _group_config(self, index: int, group: LayerGroup, count: int) -> "CacheConfig":
        """The configuration of a group with so many blocks of 64 tokens."""
        try:
            return dataclasses.replace(
                self, num_layers=len(group.layers), num_tokens=_TOKENS_PER_SUPERBLOCK * count, memory=None,
                layer_groups=None, tiers=self._tiers_of(group),
            )  # fmt: skip
        except ConfigError as error:
            raise ConfigError(f"layer_groups[{index}]: {error}") from error

    def _group_blocks(self) -> list[int]:
        """Blocks of 64 tokens in the pool of each group."""
        groups = self.groups
        if groups[0].num_tokens is not None:
            blocks = [-(-(group.num_tokens or 0) // _TOKENS_PER_SUPERBLOCK) for group in groups]
        elif self.num_tokens is not None:
            blocks = divide_tokens(groups, self.num_tokens, self.max_seq_len)
        else:
            assert self.memory is not None
            blocks = divide_memory(groups, parse_nbytes(self.memory), self._nbytes_of_blocks, self.max_seq_len)
        if min(blocks) < 1:
            raise ConfigError("num_tokens or memory: expected room for 64 tokens in every group of layers, got none")
        return blocks

    def _nbytes_of_blocks(self, group: LayerGroup, count: int) -> int:
        """Bytes of so many blocks of 64 tokens of a group, all its layers and tiers."""
        table, shares = self._tiers_of(group), (count, 0, 0)
        tiers = None if table is None else TierConfig.from_dict(table)
        nbytes = self._block_nbytes(tiers, len(group.layers))
        if tiers is not None:
            shares = tiers.blocks_of_tokens(count, nbytes)
        return sum(number * nbytes.get(name, 0) for name, number in zip(TIER_NAMES, shares, strict=True))

    @property
    def num_granules(self) -> int:
        """Granules (8 token slots) in the pool, all tiers, host memory too; with several groups, of the largest."""
        return sum(self.tier_granules) + sum(self.host_granules)

    @functools.cached_property
    def tier_granules(self) -> tuple[int, int, int]:
        """Granules of the hot, the warm and the cold tier, in whole superblocks; of several groups the largest."""
        if len(self.groups) > 1:
            return 8 * max(self._group_blocks()), 0, 0
        if self.groups[0].num_tokens is not None:
            return self.group_configs[0].tier_granules
        blocks = self.block_nbytes
        if self.num_tokens is not None:
            count = -(-self.num_tokens // _TOKENS_PER_SUPERBLOCK)
            shares = self.quantization.blocks_of_tokens(count, blocks) if self.quantization else (count, 0, 0)
        else:
            assert self.memory is not None
            memory = parse_nbytes(self.memory)
            hot_only = (memory // blocks["hot"], 0, 0)
            shares = self.quantization.blocks_of_memory(memory, blocks) if self.quantization else hot_only
        return shares[0] * 8, shares[1] * 8, shares[2] * 8

    @functools.cached_property
    def host_granules(self) -> tuple[int, int]:
        """Granules of the hot and of the cold tier in host memory, see ``host`` of `TierConfig`."""
        if self.tier_config is None:
            return 0, 0
        hot, cold = self.tier_config.host_blocks(self.block_nbytes)
        return 8 * hot, 8 * cold

    @property
    def staged_granules(self) -> int:
        """Granules of `TierConfig.staging`."""
        return 0 if self.tier_config is None else self.tier_config.staging // 8

    @property
    def first_granules(self) -> tuple[int, int, int]:
        """The first granule of each tier. Those in host memory are the last ones of their tier."""
        return self.pool_firsts[:3]

    @property
    def pool_granules(self) -> tuple[int, int, int, int, int]:
        """Granules of each pool, in the order of `kvtoolkit.config.tiers.POOL_NAMES`."""
        return (*self.tier_granules, *self.host_granules)

    @property
    def pool_firsts(self) -> tuple[int, int, int, int, int]:
        """The first granule of each pool, in the order of `kvtoolkit.config.tiers.POOL_NAMES`."""
        return firsts_of(self.pool_granules)

    @functools.cached_property
    def tier_config(self) -> TierConfig | None:
        """`tiers`, checked and filled in."""
        return None if self.tiers is None else TierConfig.from_dict(self.tiers)

    @property
    def quantization(self) -> TierConfig | None:
        """`tier_config` if there are quantized tiers."""
        return self.tier_config if self.tier_config is not None and self.tier_config.quantized else None

    @property
    def nbytes_per_token(self) -> int:
        """Bytes of keys and values of one hot token, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPES[self.dtype]

    @property
    def block_nbytes(self) -> dict[str, int]:
        """Bytes of 64 tokens in each tier, all layers; of several groups see `group_configs`."""
        return self._block_nbytes(self.tier_config, self.num_layers)

    def _block_nbytes(self, tiers: TierConfig | None, num_layers: int) -> dict[str, int]:
        nbytes = {"hot": _TOKENS_PER_SUPERBLOCK * self.nbytes_per_token // self.num_layers * num_layers}
        for name, kind in zip(TIER_NAMES[1:], tiers.formats if tiers else (None, None), strict=True):
            if kind is not None:
                nbytes[name] = num_layers * self.num_kv_heads * kind.nbytes(self.head_dim)
        return nbytes

    @property
    def growth_policy(self) -> GrowthPolicy:
        """The policy that `growth` names."""
        assert self.growth is not None
        return growth_policy(self.growth)

    @property
    def seq_len_limit(self) -> int:
        """`max_seq_len`, or the whole pool; a group with a window sets no limit."""
        limit = self._pool_limit
        if self.is_grouped:
            pools = zip(self.groups, self.group_configs, strict=True)
            limit = min((8 * one.num_granules for group, one in pools if not group.span), default=8 * MAX_GRANULES)
        return min(self.max_seq_len or limit, limit)

    @property
    def _pool_limit(self) -> int:
        """`max_seq_len`, or the whole pool: most tokens that a row can hold."""
        return min(self.max_seq_len or self.num_granules * 8, self.num_granules * 8)

    @property
    def entries_limit(self) -> int:
        """`max_entries`, or its default."""
        if self.max_entries is not None:
            return self.max_entries
        share = 2 * self.num_granules * 8 // self.max_seqs
        promised = self._pool_limit if self.max_seq_len else 0
        least = max(_LEAST_ENTRIES, math.ceil(max(share, promised) / _TOKENS_PER_SUPERBLOCK))
        bound = max(least, _BLOCK_TABLE_NBYTES // (_ENTRY_NBYTES * self.max_seqs))
        return min(math.ceil(self._pool_limit / 8), bound)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, all groups of layers and all tiers, without those in pinned host memory."""
        return sum(
            granules // 8 * one.block_nbytes.get(name, 0)
            for one in self.group_configs
            for name, granules in zip(TIER_NAMES, one.tier_granules, strict=True)
        )

    # -- models ------------------------------------------------------------------------------------------------------

    @classmethod
    def for_model(
        cls, model_config: Any, *, lengths: int | Sequence[int] = TYPICAL_LEN, step_tokens: int = 512, **options: Any
    ) -> "CacheConfig":
        """A configuration for a model, with groups of layers if some have a window or chunks.

        Args:
            model_config: the configuration object of a model of transformers, or the dict of its config.json, of which
                a ``text_config`` counts if there is one. It says the shape, the dtype and ``layer_groups``. A dict must
                have the common names (``num_hidden_layers``); for GPT-2, T5 and others give the object.
            lengths: how many tokens sequences have while they are in the cache: one number, or a sample. Memory is
                divided so that such sequences fill all groups at the same time.
            step_tokens: most new tokens in a step, all sequences together. Groups with a window or chunks have room
                for so many beside what sequences hold.
            options: other fields, of which ``num_tokens`` or ``memory`` must be there; they take precedence over what
                the model says. With several groups ``num_tokens`` is what one that keeps all tokens has or would have.
                ``layer_groups=None``: all layers keep all tokens.

        Raises:
            ConfigError: something is missing, or makes no sense.
            UnsupportedError: layers of a kind for which there is no cache, or groups with an option that excludes them.
        """
        shape = read_model(model_config)
        found = {name: value for name, value in shape._asdict().items() if name != "spans" and value is not None}
        return cls.for_spans(shape.spans, lengths, step_tokens, **{**found, **options})

    @classmethod
    def for_spans(
        cls, spans: Sequence[int], lengths: int | Sequence[int], step_tokens: int, **fields: Any
    ) -> "CacheConfig":
        """`for_model` for layers with these windows, chunks (as minus ``chunk``), or 0, in order."""
        lengths, step_tokens = as_lengths(lengths), require_int("step_tokens", step_tokens, 0)
        if "layer_groups" in fields or not any(spans):
            return cls.from_dict(fields)
        groups = groups_of(spans)
        if len(groups) == 1:
            return cls.from_dict({**fields, "layer_groups": groups})
        num_tokens, memory = fields.pop("num_tokens", None), fields.pop("memory", None)
        if (num_tokens is None) == (memory is None):
            raise ConfigError(f"expected exactly one of num_tokens and memory, got {num_tokens!r} and {memory!r}")
        split = Split([spans[group["layers"][0]] for group in groups], lengths, step_tokens)
        if memory is None:
            counts = split.of_tokens(require_int("num_tokens", num_tokens, 1))
        else:
            # any size will do: what blocks of one layer take
            layer = cls.from_dict({**fields, "num_layers": 1, "num_tokens": 8 * MAX_GRANULES})
            kinds = [LayerGroup(**{**group, "layers": tuple(group["layers"])}) for group in groups]
            counts = split.of_memory(
                parse_nbytes(memory), lambda counts: sum(map(layer._nbytes_of_blocks, kinds, counts))
            )
            if not any(counts):
                raise ConfigError(
                    f"memory: expected room for step_tokens = {step_tokens} in the groups with a window, and for 64 "
                    f"tokens in the others, got {memory!r}"
                )
        for group, count in zip(groups, counts, strict=True):
            group["num_tokens"] = _TOKENS_PER_SUPERBLOCK * count
        return cls.from_dict({**fields, "layer_groups": groups})

    # -- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CacheConfig":
        """A configuration from a mapping of field names, as `to_dict` gives it."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"expected a mapping of field names, got {values!r}")
        known = tuple(f.name for f in dataclasses.fields(cls))
        require_known(values, known)
        missing = [name for name in ("num_layers", "num_kv_heads", "head_dim") if name not in values]
        if missing:
            raise ConfigError(f"expected {', '.join(missing)} to be given")
        values = dict(values)
        if isinstance(values.get("block_sizes"), list):
            values["block_sizes"] = tuple(values["block_sizes"])
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> "CacheConfig":
        """Read a TOML file. Its keys, or those of its table ``[cache]``, are the fields; ``overrides`` take precedence.

        The file can name code, see `CacheConfig`.

        Raises:
            ConfigError: the file is not there, is not TOML, or a field is wrong.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path!s}: cannot be read: {error}") from error
        import tomllib  # here, and others where they are used, because importing kvtoolkit should be quick

        try:
            document = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: expected TOML, got a syntax error: {error}") from error
        table = document.get("cache", document)
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: expected [cache] to be a table, got {table!r}")
        try:
            return cls.from_dict({**table, **overrides})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None, as `from_dict` and a TOML file take them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["block_sizes"] = list(values["block_sizes"])
        return {name: value for name, value in values.items() if value is not None}
