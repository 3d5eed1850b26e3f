"""Other people's paged attention on the tensors of a `Case`. Each needs its own package."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvtoolkit.bench.attention_cases import Case, Contender
from kvtoolkit.errors import ConfigError

PEERS = ("flashinfer", "xqa", "xqa-fp8", "fa3")

_workspace: Any = None


def peers_of(case: Case, peers: Sequence[str]) -> list[Contender]:
    """The kernels of these peers that take a case. The error of any other is printed.

    Each is made by itself, because one that refuses a shape must not hide the others.

    Raises:
        ConfigError: there is no such peer.
    """
    for peer in peers:
        if peer not in PEERS:
            raise ConfigError(f"--peer: expected some of {', '.join(PEERS)}, got {peer!r}")
    made: list[Contender] = []
    kernels = _KERNELS if max(case.shape.new_tokens) == 1 else _KERNELS_FOR_MORE
    shared = _KERNELS_FOR_SHARED if case.shape.beginnings else {}
    for peer in peers:
        for name, make in (kernels.get(peer, {}) | shared.get(peer, {})).items():
            try:
                made.append(make(case, name))
            except Exception as error:  # not installed, or no kernel for this shape
                print(f"{case.shape.name:<22}{name:<24}{type(error).__name__}: {error!s:.60}", flush=True)
    return made


def _scratch() -> Any:
    import torch

    global _workspace
    if _workspace is None:
        _workspace = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")
    return _workspace


_FLASHINFER = {
    "FlashInfer cuda cores": (False, "auto"),
    "FlashInfer fa2": (True, "fa2"),
    "FlashInfer cudnn": (False, "cudnn"),
}
"""Whether a kernel uses tensor cores, and FlashInfer's name of its backend."""


def _flashinfer(case: Case, name: str) -> Contender:
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape = case.shape
    tensor_cores, backend = _FLASHINFER[name]
    starts = torch.tensor([0, *case.counts]).cumsum(0).int().cuda()
    last = torch.tensor([(n - 1) % case.block_size + 1 for n in shape.lengths], dtype=torch.int32, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _scratch(), case.layout, use_tensor_cores=tensor_cores, backend=backend
    )
    options = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, "o_data_type": torch.bfloat16}
    if backend == "cudnn":
        options["block_tables"] = case.tables[0]
    wrapper.plan(
        starts,
        case.indices[0],
        last,
        shape.num_q_heads,
        shape.num_kv_heads,
        shape.head_dim,
        case.block_size,
        **options,
    )

    def run(which: int) -> Any:
        # the same plan serves every set: only the ids of its blocks differ
        wrapper._paged_kv_indices_buf = case.indices[which]
        if backend == "cudnn":
            wrapper._block_tables = case.tables[which]
        return wrapper.run(case.q, case.storage)

    return Contender(name, [partial(run, which) for which in range(case.num_sets)])


def _flashinfer_more(case: Case, name: str) -> Contender:
    import torch
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    shape = case.shape
    wrapper = BatchPrefillWithPagedKVCacheWrapper(_scratch(), case.layout, backend="fa2")
    wrapper.plan(
        case.cu_seqlens_q, *_pages(case, range(shape.batch), 0, max(shape.lengths)), shape.num_q_heads,
        shape.num_kv_heads, shape.head_dim, case.block_size, causal=True, q_data_type=torch.bfloat16,
    )  # fmt: skip

    def run(which: int) -> Any:
        wrapper._paged_kv_indices_buf = case.indices[which]
        return wrapper.run(case.q, case.storage)

    return Contender(name, [partial(run, which) for which in range(case.num_sets)])


def _cascade(case: Case, name: str) -> Contender:
    """What sequences have in common, level by level, then what is their own; all levels are merged."""
    import torch
    from flashinfer import MultiLevelCascadeAttentionWrapper

    shape = case.shape
    levels = [*shape.beginnings, (1, max(shape.lengths))]
    wrapper = MultiLevelCascadeAttentionWrapper(len(levels), _scratch(), case.layout)
    starts, pages, first = [], [], 0
    for one, (rows, tokens) in zip(wrapper._batch_prefill_wrappers, levels, strict=True):
        one._backend = "fa2"
        heads = range(0, shape.batch, rows)
        starts.append(torch.tensor([*heads, shape.batch], dtype=torch.int32, device="cuda"))
        pages.append([_pages(case, heads, first, tokens, which) for which in range(case.num_sets)])
        first += tokens
    wrapper.plan(
        starts, *([of_level[0][part] for of_level in pages] for part in range(3)), shape.num_q_heads,
        shape.num_kv_heads, shape.head_dim, case.block_size, q_data_type=torch.bfloat16,
    )  # fmt: skip

    def run(which: int) -> Any:
        for one, of_level in zip(wrapper._batch_prefill_wrappers, pages, strict=True):
            one._paged_kv_indices_buf = of_level[which][1]
        return wrapper.run(case.q, case.storage)

    return Contender(name, [partial(run, which) for which in range(case.num_sets)])


def _pages(case: Case, rows: Sequence[int], first: int, tokens: int, which: int = 0) -> tuple[Any, Any, Any]:
    """At most so many tokens of some rows as FlashInfer has them: starts, ids of blocks, tokens in the last block."""
    import torch

    found, starts, last = [], [0], []
    for row in rows:
        held = min(tokens, case.shape.lengths[row] - first)
        blocks = -(-held // case.block_size)
        begin = first // case.block_size
        found.append(case.tables[which][row, begin : begin + blocks])
        starts.append(starts[-1] + blocks)
        last.append(held - (blocks - 1) * case.block_size)
    bounds, ends = (torch.tensor(one, dtype=torch.int32, device="cuda") for one in (starts, last))
    return bounds, torch.cat(found), ends


def _xqa(case: Case, name: str) -> Contender:
    import torch
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    scratch = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")  # its own: it must be zero
    width = max(case.counts) * case.block_size

    def run(which: int) -> Any:
        return xqa_batch_decode_with_kv_cache(
            case.q, case.storage, scratch, case.tables[which], case.seq_lens.view(torch.uint32), width,
            bmm1_scale=case.shape.head_dim**-0.5, bmm2_scale=1.0, kv_layout=case.layout,
        )  # fmt: skip

    return Contender(name, [partial(run, which) for which in range(case.num_sets)])


def _xqa_fp8(case: Case, name: str) -> Contender:
    import torch
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    scratch = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    storage = tuple(one.to(torch.float8_e4m3fn) for one in case.storage)
    width = max(case.counts) * case.block_size

    def run(which: int) -> Any:
        return xqa_batch_decode_with_kv_cache(
            case.q, storage, scratch, case.tables[which], case.seq_lens.view(torch.uint32), width,
            bmm1_scale=case.shape.head_dim**-0.5, bmm2_scale=1.0, kv_layout=case.layout,
        )  # fmt: skip

    return Contender(name, [partial(run, which) for which in range(case.num_sets)])


def _fa3(case: Case, name: str) -> Contender:
    import torch
    from flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata

    shape = case.shape
    plan = get_scheduler_metadata(
        shape.batch, 1, max(case.counts) * case.block_size, shape.num_q_heads, shape.num_kv_heads, shape.head_dim,
        case.seq_lens, qkv_dtype=torch.bfloat16, page_size=case.block_size, causal=False,
    )  # fmt: skip

    def run(which: int) -> Any:
        out = flash_attn_with_kvcache(
            case.q[:, None], case.k_cache, case.v_cache, cache_seqlens=case.seq_lens, page_table=case.tables[which],
            softmax_scale=shape.head_dim**-0.5, causal=False, scheduler_metadata=plan, num_splits=0,
        )  # fmt: skip
        return (out[0] if isinstance(out, tuple) else out)[:, 0]

    return Contender(name, [partial(run, which) for which in range(case.num_sets)])


def _fa3_more(case: Case, name: str) -> Contender:
    from flash_attn_interface import flash_attn_with_kvcache

    options = {"pack_gqa": False} if name.endswith("unpacked") else {}

    def run(which: int) -> Any:
        out = flash_attn_with_kvcache(
            case.q, case.k_cache, case.v_cache, cache_seqlens=case.seq_lens, page_table=case.tables[which],
            cu_seqlens_q=case.cu_seqlens_q, max_seqlen_q=max(case.shape.new_tokens),
            softmax_scale=case.shape.head_dim**-0.5, causal=True, **options,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return Contender(name, [partial(run, which) for which in range(case.num_sets)])


_KERNELS_FOR_MORE: dict[str, dict[str, Callable[[Case, str], Contender]]] = {
    "flashinfer": {"FlashInfer fa2": _flashinfer_more},
    "fa3": {"FA3": _fa3_more, "FA3, unpacked": _fa3_more},
}
"""For batches with more than one query token in a row."""

_KERNELS_FOR_SHARED: dict[str, dict[str, Callable[[Case, str], Contender]]] = {
    "flashinfer": {"FlashInfer cascade": _cascade},
}
"""For sequences that begin with the same blocks, besides those of any batch."""

_KERNELS: dict[str, dict[str, Callable[[Case, str], Contender]]] = {
    "flashinfer": dict.fromkeys(_FLASHINFER, _flashinfer),
    "xqa": {"FlashInfer XQA": _xqa},
    "xqa-fp8": {"FlashInfer XQA fp8": _xqa_fp8},
    "fa3": {"FA3, scheduled": _fa3},
}
