"""The calls that `tests.kvtoolkit.bad_input` damages, each with arguments that are good."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from kvtoolkit import CacheConfig, KVCache, TierCaches, plan_attention
from kvtoolkit.attention.calls import append, merge_states, paged_attention, tiered_attention, variable_block_attention
from kvtoolkit.cpu import copy_granules
from kvtoolkit.formats.quantized import INT4, INT8
from kvtoolkit.integrations.flash_attn.calls import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from tests.kvtoolkit.attention.attention_cases import Case
from tests.kvtoolkit.attention.tiered_cases import TieredCase

Arguments = dict[str, Any]


class Call(NamedTuple):
    name: str
    make: Callable[[], tuple[Arguments, Callable[..., Any]]]
    """New good arguments, and what takes them by name."""
    written: tuple[str, ...] = ()
    """Arguments that the call writes to; a refused call must not."""
    torch_only: bool = False
    numpy_only: bool = False


@functools.cache
def _case() -> Case:
    return Case([20, 9, 0], [4, 1, 0])


def _options(case: Case) -> Arguments:
    heads = np.linspace(0, 1, case.num_q_heads, dtype=np.float32)
    return {
        "seq_lens": case.lengths, "cu_seqlens_q": case.cu_seqlens_q, "softmax_scale": 0.5, "causal": True,
        "window_size": (30, 0), "softcap": 5.0, "sinks": heads, "alibi_slopes": heads, "out": np.zeros_like(case.q),
        "return_lse": True, "num_splits": 2, "max_seqlen_q": 4,
        "backend": "cpu",
    }  # fmt: skip


def _paged() -> tuple[Arguments, Callable[..., Any]]:
    case = _case()
    k_cache, v_cache, block_table = case.paged(8, "NHD")
    arrays = {"q": case.q, "k_cache": k_cache, "v_cache": v_cache, "block_table": block_table}
    return arrays | _options(case) | {"layout": "NHD"}, paged_attention


def _planned() -> tuple[Arguments, Callable[..., Any]]:
    """A layer whose plan is that of the layer before, which was right."""
    case = Case([20, 9, 0])
    k_cache, v_cache, block_table = map(np.nan_to_num, case.paged(8, "NHD"))

    def call(block_table: Any, seq_lens: Any, **layer: Any) -> Any:
        plan = plan_attention(block_table, seq_lens)
        for one in ({"q": case.q, "k_cache": k_cache, "v_cache": v_cache}, layer):
            out = paged_attention(block_table=block_table, seq_lens=seq_lens, plan=plan, **one)
        return out

    arrays = {"q": case.q, "k_cache": k_cache, "v_cache": v_cache, "block_table": block_table, "seq_lens": case.lengths}
    options = {"window_size": (-1, -1), "softcap": 0.0, "softmax_scale": None, "num_splits": 0, "max_seqlen_q": None}
    return arrays | options | {"layout": "NHD", "out": np.zeros_like(case.q)}, call


def _variable() -> tuple[Arguments, Callable[..., Any]]:
    case = _case()
    k_cache, v_cache, block_table, block_starts = case.variable((1, 2))
    mass = np.zeros((3, block_table.shape[1], case.num_kv_heads), np.float32)
    arrays = {"q": case.q, "k_cache": k_cache, "v_cache": v_cache, "block_table": block_table}
    return arrays | {"block_starts": block_starts, "block_mass": mass} | _options(case), variable_block_attention


@functools.cache
def _tiers() -> tuple[TieredCase, tuple[Any, ...]]:
    case = TieredCase([200, 70], [2, 1], patterns=["wchh", "ch"])
    return case, case.tiered()


def _tiered() -> tuple[Arguments, Callable[..., Any]]:
    case, (tiers, block_table, block_starts) = _tiers()
    arrays = {"q": case.q, "block_table": block_table, "block_starts": block_starts}
    held = dict(zip(("k_cache", "v_cache", "warm", "cold", "first_granules"), tiers, strict=True))
    mass = np.zeros((2, block_table.shape[1] + 4, case.num_kv_heads), np.float32)

    def call(k_cache: Any, v_cache: Any, warm: Any, cold: Any, first_granules: Any, **options: Any) -> Any:
        return tiered_attention(tier_caches=TierCaches(k_cache, v_cache, warm, cold, first_granules), **options)

    return arrays | held | {"block_mass": mass} | _options(case), call


def _append() -> tuple[Arguments, Callable[..., Any]]:
    new, cache = np.ones((3, 2, 16), np.float32), np.zeros((4, 2, 8, 16), np.float32)
    return {
        "key": new, "value": new, "k_cache": cache, "v_cache": cache, "slot_mapping": np.array([1, -1, 31]),
        "layout": "HND", "backend": "cpu",
    }, append  # fmt: skip


def _merge() -> tuple[Arguments, Callable[..., Any]]:
    out, lse = np.ones((3, 2, 16), np.float32), np.zeros((3, 2), np.float32)
    return {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}, merge_states


@functools.cache
def _cache() -> tuple[KVCache, Any]:
    cache = KVCache(CacheConfig(num_layers=2, num_kv_heads=2, head_dim=32, dtype="float32", num_tokens=512))
    seq_ids, _ = cache.open([[1], [2]])
    return cache, seq_ids


def _step() -> tuple[Arguments, Callable[..., Any]]:
    """Both calls of a step, twice, so that the second layer takes the short way."""
    cache, seq_ids = _cache()

    def call(layer: Any, key: Any, value: Any, q: Any, out: Any, **options: Any) -> None:
        with cache.begin_step(seq_ids, [2, 1]) as step:
            good = np.ones((3, 2, 32), np.float32)
            step.append(0, good, good)
            step.attend(0, np.ones((3, 6, 32), np.float32), out=np.zeros((3, 6, 32), np.float32))
            step.append(layer, key, value)
            step.attend(layer, q, out=out, **options)

    new, q = np.ones((3, 2, 32), np.float32), np.ones((3, 6, 32), np.float32)
    options = {"window_size": (-1, -1), "softcap": 0.0, "softmax_scale": None, "return_lse": False, "num_splits": 0}
    return {"layer": 1, "key": new, "value": new, "q": q, "out": np.zeros_like(q)} | options, call


def _copies() -> tuple[Arguments, Callable[..., Any]]:
    arena = np.ones((2, 6, 2, 8, 16), np.float32)
    return {"arenas": arena, "src": np.array([0, 2]), "dst": np.array([1, 5])}, copy_granules


def _with_kvcache() -> tuple[Arguments, Callable[..., Any]]:
    case = Case([20, 9], [1, 1])
    k_cache, v_cache, block_table = case.paged(8, "NHD")
    k = np.ones((2, 1, 2, 32), np.float32)
    return {
        "q": case.q[:, None], "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": k,
        "cache_seqlens": case.lengths - np.int32(1), "block_table": block_table, "softmax_scale": 0.5, "causal": True,
        "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": np.zeros(6, np.float32), "num_splits": 0,
        "return_softmax_lse": True, "rotary_cos": None, "rotary_interleaved": True, "cache_leftpad": None,
        "attention_chunk": 0,
    }, flash_attn_with_kvcache  # fmt: skip


def _with_rows() -> tuple[Arguments, Callable[..., Any]]:
    case = Case([20, 9], [1, 1])
    cache = np.ones((4, 24, 2, 32), np.float32)
    return {
        "q": case.q[:, None], "k_cache": cache, "v_cache": cache, "cache_seqlens": case.lengths,
        "cache_batch_idx": np.array([3, 1], np.int32), "causal": True,
    }, flash_attn_with_kvcache  # fmt: skip


def _packed() -> tuple[Arguments, Callable[..., Any]]:
    case, keys = Case([20, 9], [4, 1]), np.ones((29, 2, 32), np.float32)
    return {
        "q": case.q, "k": keys, "v": keys, "cu_seqlens_q": case.cu_seqlens_q,
        "cu_seqlens_k": np.array([0, 20, 29], np.int32), "max_seqlen_q": 4, "max_seqlen_k": 20, "causal": True,
        "window_size": (-1, -1), "dropout_p": 0.0, "return_attn_probs": True, "attention_chunk": 0,
        "return_softmax_lse": False,
    }, flash_attn_varlen_func  # fmt: skip


def _dense() -> tuple[Arguments, Callable[..., Any]]:
    q, k = np.ones((2, 4, 6, 32), np.float32), np.ones((2, 9, 2, 32), np.float32)
    return {
        "q": q, "k": k, "v": k, "dropout_p": 0.0, "softmax_scale": 0.5, "causal": True, "window_size": (-1, -1),
        "softcap": 0.0, "alibi_slopes": np.zeros(6, np.float32), "return_attn_probs": True, "attention_chunk": 0,
        "num_splits": 0,
    }, flash_attn_func  # fmt: skip


def _format() -> tuple[Arguments, Callable[..., Any]]:
    x = np.ones((2, 64, 64), np.float32)

    def call(keys: Any, values: Any, blocks: Any, head_dim: Any) -> None:
        INT8.encode(keys, values)
        INT4.decode(blocks, head_dim)

    return {"keys": x, "values": x, "blocks": INT4.encode(x, x), "head_dim": 64}, call


def _sequences() -> tuple[Arguments, Callable[..., Any]]:
    """A sequence's life, in a cache of its own."""

    def call(prompt: Any, counts: Any, tokens: Any, parents: Any, lengths: Any) -> None:
        cache = KVCache(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", num_tokens=256))
        seq_ids, _ = cache.open([prompt, [5, 6]])
        cache.end_step(cache.begin_step(seq_ids, counts), tokens)
        cache.reorder(seq_ids, parents)
        cache.truncate(seq_ids, lengths)
        cache.check_integrity()

    return {
        "prompt": np.array([1, 2, 3]), "counts": np.array([3, 2]), "tokens": np.array([1, 2, 3, 5, 6]),
        "parents": np.array([0, 0]), "lengths": np.array([1, 1]),
    }, call  # fmt: skip


def _ids() -> tuple[Arguments, Callable[..., Any]]:
    cache = KVCache(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", num_tokens=256))
    opened, _ = cache.open([[1, 2, 3], [4]])

    def call(seq_ids: Any, n: Any) -> None:
        cache.lengths(seq_ids)
        cache.pin(seq_ids).abort()
        cache.fork(seq_ids, n)
        cache.close(seq_ids)
        cache.check_integrity()

    return {"seq_ids": opened, "n": 2}, call


CALLS = (
    Call("paged_attention", _paged, ("out",)),
    Call("variable_block_attention", _variable, ("out", "block_mass")),
    Call("tiered_attention", _tiered, ("out", "block_mass")),
    Call("append", _append, ("k_cache", "v_cache")),
    Call("merge_states", _merge),
    Call("Step.append, Step.attend", _step, ("out",)),
    Call("copy_granules", _copies, ("arenas",), numpy_only=True),
    Call("flash_attn_with_kvcache", _with_kvcache, torch_only=True),
    Call("flash_attn_with_kvcache, no table", _with_rows, torch_only=True),
    Call("flash_attn_func", _dense, torch_only=True),
    Call("flash_attn_varlen_func", _packed, torch_only=True),
    Call("Format.encode, Format.decode", _format),
    Call("KVCache: lives of sequences", _sequences),
    Call("KVCache: ids", _ids),
    Call("paged_attention with a plan", _planned, ("out",)),
)


def with_tensors(arguments: Arguments) -> Arguments:
    """The arguments with a tensor of its own for every array."""
    return {name: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
