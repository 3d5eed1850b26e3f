"""Compile ahead everything that a cache runs: `kvtoolkit.warmup`."""

from collections.abc import Callable

from kvtoolkit.cache.rehearsal import parts_of
from kvtoolkit.config.cache import CacheConfig
from kvtoolkit.errors import ConfigError


def warmup(
    config: CacheConfig, num_q_heads: int, *, progress: Callable[[str, int, int], None] | None = None
) -> None:  # fmt: skip
    """Compile and load everything that a cache and its attention need, so that no later call waits for a compiler.

    For the CPU a small cache of the same kind runs every operation once. For a GPU the kernels are loaded on the
    cache's device, so that none is loaded inside a captured CUDA graph, and the host's code is compiled as for the CPU.
    What was compiled is kept on disk (``KVTOOLKIT_CACHE_DIR``): the next process only loads it, which takes seconds.
    (On a GPU scratch memory for the splits is taken at the first attention call of a stream; run a step once before
    capturing it.)

    Args:
        config: of the cache; its backend must be ``"cpu"`` or ``"cuda"``.
        num_q_heads: query heads of the model.
        progress: called before each part with its name, and how many parts of how many are done.

    Raises:
        ConfigError: the backend is another, or ``num_q_heads`` is not a multiple of ``num_kv_heads``.
        UnsupportedError: the backend is ``"cuda"``, and there is no CuPy or no such device.
        CompileError: a GPU kernel does not compile here.
    """
    if config.backend not in ("cpu", "cuda"):
        raise ConfigError(f"backend: expected 'cpu' or 'cuda', got {config.backend!r}")
    if num_q_heads < 1 or num_q_heads % config.num_kv_heads:
        raise ConfigError(f"num_q_heads: expected a multiple of num_kv_heads {config.num_kv_heads}, got {num_q_heads}")
    if config.backend == "cuda":
        from kvtoolkit.cuda.warmup import load_kernels

        load_kernels(config, num_q_heads, progress)
    parts = parts_of(config, num_q_heads)
    for number, (name, run) in enumerate(parts):
        if progress is not None:
            progress(name, number, len(parts))
        run()
