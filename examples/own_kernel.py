"""A kernel of your own reads a live cache through its block table: `python -m examples.own_kernel`.

It computes the mean key of every sequence and head, as one would to rank sequences or blocks. All it needs of kvtoolkit
is one header without dependencies, the tables of a step on the device, and the keys of a layer in place.
"""

import sys

import numpy as np

from kvtoolkit import CacheConfig, KVCache, Step, UnsupportedError, get_include
from kvtoolkit.formats.entry import unpack_entries

SOURCE = r"""
// The mean key of each sequence and kv head. Grid (batch, num_kv_heads), CTA head_dim threads, one dim each.
//
//   keys         [num_granules, num_kv_heads, 8, head_dim] float16
//   block_table  [batch, max_entries] int32 entries, in the order of the positions that they hold
//   seq_lens     [batch] int32, tokens
//   means        [batch, num_kv_heads, head_dim] float32
#include <kvt/entry.cuh>

__device__ float to_float(unsigned short half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

extern "C" __global__ void mean_key(
    const unsigned short* keys, const int* block_table, const int* seq_lens, int max_entries, float* means) {
  const int sequence = blockIdx.x, head = blockIdx.y, dim = threadIdx.x;
  const int num_heads = gridDim.y, head_dim = blockDim.x, seq_len = seq_lens[sequence];
  float sum = 0.0f;
  int position = 0;
  for (int e = 0; position < seq_len; ++e) {  // for one position alone there is kvt::find_entry
    const kvt::Entry entry{block_table[sequence * max_entries + e]};
    const int end = min(seq_len, position + entry.num_granules() * kvt::kGranule);
    for (int slot = 0; position < end; ++slot, ++position) {
      const long long granule = entry.granule() + slot / kvt::kGranule;  // the granules of an entry are neighbours
      const long long row = (granule * num_heads + head) * kvt::kGranule + slot % kvt::kGranule;
      sum += to_float(keys[row * head_dim + dim]);
    }
  }
  means[(sequence * num_heads + head) * head_dim + dim] = seq_len == 0 ? 0.0f : sum / seq_len;
}
"""


def mean_keys(cache: KVCache, step: Step, layer: int):
    """``[batch, num_kv_heads, head_dim]`` float32 on the device: the mean over all that the step's sequences hold."""
    import cupy

    kernel = cupy.RawKernel(SOURCE, "mean_key", options=("-std=c++17", f"-I{get_include()}"))
    tables, keys = step.on_device, cache.key_cache(layer)
    batch, max_entries = tables.block_table.shape
    _, num_heads, _, head_dim = keys.shape
    means = cupy.empty((batch, num_heads, head_dim), np.float32)
    arguments = (keys, tables.block_table, tables.seq_lens, np.int32(max_entries), means)
    kernel((batch, num_heads), (head_dim,), arguments)
    return means


def mean_keys_on_host(keys: np.ndarray, step: Step) -> np.ndarray:
    """The same in NumPy, from a copy of the keys and the step's tables on the host."""
    means = []
    granules, lengths, _ = unpack_entries(step.block_table)
    for row, seq_len in enumerate(step.seq_lens):
        runs = [np.arange(g, g + n) for g, n in zip(granules[row], lengths[row], strict=True)]
        held = keys[np.concatenate(runs)].swapaxes(1, 2)  # [granules, 8, num_kv_heads, head_dim]
        means.append(held.reshape(-1, *held.shape[2:])[:seq_len].astype(np.float64).mean(axis=0))
    return np.stack(means)


def main() -> int:
    config = CacheConfig(num_layers=1, num_kv_heads=4, head_dim=64, num_tokens=4096, growth="append", backend="cuda")
    try:
        cache = KVCache(config)
    except UnsupportedError as error:
        print(f"own_kernel needs a CUDA device: {error}", file=sys.stderr)
        return 1
    import cupy

    lengths = [5, 64, 100, 700]
    random = np.random.default_rng(0).standard_normal((2, sum(lengths), 4, 64))
    keys, values = cupy.asarray(random.astype(np.float16))
    seq_ids, _ = cache.open([range(n) for n in lengths])
    with cache.begin_step(seq_ids, lengths) as step:
        step.append(0, keys, values)
        found = mean_keys(cache, step, layer=0).get()
        expected = mean_keys_on_host(cache.key_cache(0).get(), step)
        for n, entries, mean in zip(lengths, step.block_table, found, strict=True):
            sizes = 8 * unpack_entries(entries[entries >= 0])[1]
            norm = np.linalg.norm(mean[0])
            print(f"{n:3} tokens in blocks of {sizes.tolist()}: the mean key of head 0 is {norm:.3f} long")
        cache.end_step(step)
    error = np.abs(found - expected).max()
    print(f"largest difference from NumPy: {error:.1e}")
    return int(error > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
