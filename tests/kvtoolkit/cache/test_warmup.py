"""What `warmup` runs on the CPU: after it nothing of a cache's own is compiled."""

import subprocess
import sys

import pytest

from kvtoolkit import CacheConfig, ConfigError, KVCache, warmup
from kvtoolkit.cache import rehearsal
from kvtoolkit.cache.group_steps import GroupSteps
from kvtoolkit.commands import cli
from kvtoolkit.cuda import specs
from kvtoolkit.cuda.warmup import kernels_of

TIERS = {"warm": "int8", "cold": "int4", "demote": "mass"}
SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "num_tokens": 4096}

# In a process of its own, because other tests have compiled what they needed.
PROGRAM = """
import contextlib, sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from kvtoolkit import ArgumentError, CacheConfig, CacheFullError, KVCache, warmup

def compiled():
    return {{
        (value.py_func.__module__, value.py_func.__qualname__, signature)
        for name, module in list(sys.modules.items()) if name.split(".")[0] in ("allocators", "kvtoolkit")
        for value in vars(module).values() if isinstance(value, Dispatcher)
        for signature in value.overloads
    }}

config = CacheConfig(num_layers=2, num_kv_heads=2, head_dim=64, num_tokens={num_tokens}, dtype={dtype!r}, **{options!r})
warmup(config, 4)
before = compiled()
cache, draw = KVCache(config), np.random.default_rng(3)
windows = {{layer: (group.window - 1, 0 if group.window else -1) for group in config.groups for layer in group.layers}}
held = []
for step_number in range(150):
    if len(held) < 6:
        ids, cached = cache.open([draw.integers(0, 3, draw.integers(1, 90))], salt=["a", None][step_number % 2])
        held += ids.tolist()
    ids = draw.permutation(held)[: draw.integers(1, 7)]
    counts = draw.integers(1, 40, len(ids)) if step_number % 3 else np.ones(len(ids), np.int64)
    with cache.begin_step(ids, counts) as step:
        for layer in range(2):
            new = np.zeros((counts.sum(), 2, 64), {array!r})
            step.append(layer, new, new)
            step.attend(layer, np.zeros((counts.sum(), 4, 64), {array!r}), window_size=windows[layer])
        cache.end_step(step, draw.integers(0, 3, counts.sum()))
        stalled = ids[~step.ok]
    if step_number % 20 == 0:
        with contextlib.suppress(CacheFullError, ArgumentError):
            copies = cache.fork(ids[:1], 1).ravel()
            cache.truncate(copies, cache.lengths(copies) // 2)
        cache.end_orphans(held)
        cache.preempt(ids[:1], to="host" if step_number % 40 else "drop")
        if not cache.restore(ids[:1]).all():
            cache.close(ids[:1])
            held.remove(int(ids[0]))
        cache.compact(256)
        with contextlib.suppress(CacheFullError):
            cache.pin(held[:2]).abort()
    for one in stalled.tolist():
        if one in held and len(held) > 1:
            cache.close([one])
            held.remove(one)
new = sorted(f"{{module}}.{{name}}{{signature}}" for module, name, signature in compiled() - before)
print("evicted", cache.stats().num_evicted, "new", new)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "array", "num_tokens", "options"),
    [
        ("float32", "float32", 1024, {}),
        ("bfloat16", "uint16", 4096, {"tiers": TIERS, "growth": "proportional"}),
        ("float16", "float16", 1024, {"allocator": "paged", "eviction": "lfu"}),
        ("float32", "float32", 1024, {"layer_groups": [{"layers": 0}, {"layers": 1, "window": 40}]}),
        ("float32", "float32", 1024, {"layer_groups": [{"layers": 0}, {"layers": 1, "chunk": 40}]}),
    ],
    ids=["buddy", "tiers", "paged", "windows", "chunks"],
)
def test_after_warmup_a_load_compiles_nothing(dtype, array, num_tokens, options):
    program = PROGRAM.format(dtype=dtype, array=array, num_tokens=num_tokens, options=options)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("new []\n"), done.stdout
    assert int(done.stdout.split()[1]) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"allocator": "lockfree", "allocator_options": {"layout": "slab"}},
        {"memory": "64 MiB", "num_tokens": None, "max_seq_len": 4096, "max_entries": 300},
        {"tiers": TIERS | {"hot": 1024, "pinned_tokens": 128, "tier_memory": {"hot": 0.8, "warm": 0.1, "cold": 0.1}}},
        {"growth": "fixed16"},
        {"layer_groups": [{"layers": 0}, {"layers": 1, "window": 1024}]},
    ],
    ids=str,
)
def test_the_small_cache_is_of_the_same_kind(options):
    config = CacheConfig(**SHAPE | options)
    small = rehearsal.small_config(config)
    assert small.num_granules <= 5 * rehearsal._NUM_TOKENS // 8
    for name in ("allocator", "allocator_options", "block_sizes", "dtype", "num_kv_heads", "head_dim"):
        assert getattr(small, name) == getattr(config, name)
    assert small.growth_policy.merges == config.growth_policy.merges
    assert (small.tiers is None) == (config.tiers is None)
    assert KVCache(small).stats().used == 0


def test_a_cache_on_a_gpu_rehearses_the_hosts_code_alone():
    config = CacheConfig(**SHAPE, backend="cuda", allocator="lockfree", allocator_options={"layout": "slab"}, device=0)
    small = rehearsal.small_config(config)
    assert (small.backend, small.device, small.allocator, small.allocator_options) == ("cpu", None, "buddy", {})
    assert not rehearsal.parts_of(config, 4)[0][1].__self__.with_kernels


def test_a_cache_on_a_gpu_rehearses_the_search_for_common_beginnings(monkeypatch):
    parts, searched = dict(rehearsal.parts_of(CacheConfig(**SHAPE, backend="cuda"), 4)), []
    parts["pool and tables"]()
    monkeypatch.setattr(rehearsal.SharedReads, "find", lambda self, ids, arrays: searched.append(len(ids)))
    parts["forks"]()
    assert searched == [2]


@pytest.mark.parametrize("kind", ["chunk", "window"])
def test_a_cache_on_a_gpu_rehearses_the_tables_of_each_group(monkeypatch, kind):
    config = CacheConfig(**SHAPE, backend="cuda", layer_groups=[{"layers": 0}, {"layers": 1, kind: 64}])
    parts, cut = dict(rehearsal.parts_of(config, 4)), []
    parts["pool and tables"]()
    cut_chunks = GroupSteps.cut_chunks
    monkeypatch.setattr(GroupSteps, "cut_chunks", lambda *given: (cut.append(given), cut_chunks(*given))[1])
    parts["prompts and steps"]()
    assert bool(cut) == (kind == "chunk")
    parts["forks"]()


def test_layers_with_a_window_alone_are_rehearsed():
    parts = dict(rehearsal.parts_of(CacheConfig(**SHAPE, layer_groups=[{"layers": range(2), "window": 64}]), 4))
    for name in ("pool and tables", "forks", "preemption"):
        parts[name]()


def test_tiers_in_groups_are_rehearsed(monkeypatch):
    groups = [{"layers": 0}, {"layers": 1, "window": 64}]
    parts = dict(rehearsal.parts_of(CacheConfig(**SHAPE, tiers=TIERS, layer_groups=groups), 4))
    for name in ("pool and tables", "compaction", "quantized tiers"):
        parts[name]()
    stats = parts["forks"].__self__.cache.stats()
    assert min(stats.num_demoted_warm, stats.num_demoted_cold, stats.num_dequantized) > 0


@pytest.mark.parametrize("groups", [[{"tiers": TIERS}, {}], [{"tiers": {"warm": "int8"}}, {"tiers": TIERS}]])
def test_tiers_of_a_group_are_rehearsed(groups):
    groups = [{"layers": i, **group} for i, group in enumerate(groups)]
    parts = dict(rehearsal.parts_of(CacheConfig(**SHAPE, layer_groups=groups), 4))
    for name in ("pool and tables", "compaction", "quantized tiers"):
        parts[name]()
    cache = parts["forks"].__self__.cache
    stats = cache.stats()
    assert min(stats.num_demoted_warm, stats.num_demoted_cold, stats.num_dequantized) > 0
    assert [group.collects_mass for group in cache._state.groups] == [True, False]


def test_kernels_are_those_of_groups_with_tiers_and_without():
    def kernels(**fields):
        return set(kernels_of(CacheConfig(**SHAPE, **fields), 4, 90, specs.SMEM_LIMITS["90"]))

    groups = [{"layers": 0}, {"layers": 1, "window": 64}]
    plain, tiered = kernels(), kernels(tiers=TIERS)
    assert kernels(layer_groups=groups) == plain
    assert kernels(layer_groups=groups, tiers=TIERS) == plain | tiered
    own = [{"layers": 0, "tiers": TIERS}, {"layers": 1}]
    assert kernels(layer_groups=own) == plain | tiered
    assert plain - tiered
    assert tiered - plain


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigError, match="backend: expected 'cpu' or 'cuda', got 'numba'"):
        warmup(CacheConfig(**SHAPE, backend="numba"), 4)
    with pytest.raises(ConfigError, match="num_q_heads: expected a multiple of num_kv_heads 2, got 3"):
        warmup(CacheConfig(**SHAPE), 3)


def test_progress_names_every_part(monkeypatch):
    told = []
    monkeypatch.setattr("kvtoolkit.cache.warmup.parts_of", lambda config, heads: [("one", int), ("two", int)])
    warmup(CacheConfig(**SHAPE), 4, progress=lambda *given: told.append(given))
    assert told == [("one", 0, 2), ("two", 1, 2)]


def test_compile_for_the_cpu_prints_and_writes_a_table(capsys, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    monkeypatch.setattr("kvtoolkit.commands.compile_cpu.parts_of", lambda config, num_q_heads: [("forks", int)])
    arguments = ["compile", "--backend", "cpu", "--allocator", "buddy", "slab", "--json", str(path)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "slab        forks" in out
    assert "0 functions compiled" in out
    assert '"part": "forks"' in path.read_text()
    assert cli.main(["compile", "--backend", "cpu", "--allocator", "budy"]) == 2
