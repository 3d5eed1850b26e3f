// Append: copy each new token's key and value to its slot of the cache. It copies bytes, so one kernel serves every
// dtype.
//
//   key, value        [num_tokens, num_kv_heads, row_nbytes] by strides
//   k_cache, v_cache  block, kv head and slot by strides
//   slot_mapping      [num_tokens] int64, block * block_size + i; -1 = skip
//
// Launch:   one thread per KVT_VECTOR bytes of a key and of its value, CTA 256. KVT_VECTOR divides the bytes of a row
//           and every address and stride. Any architecture.
#include <kvt/ptx/cluster.cuh>

namespace kvt {

#if KVT_VECTOR == 16
using vector_t = uint4;
#elif KVT_VECTOR == 8
using vector_t = uint2;
#elif KVT_VECTOR == 4
using vector_t = unsigned;
#else
using vector_t = unsigned short;
#endif

// Packed by kvtoolkit/cuda/copy.py, field by field in this order. Strides count bytes.
struct AppendParams {
  const char* key;
  const char* value;
  char* k_cache;
  char* v_cache;
  const long long* slot_mapping;
  long long key_token, key_head, value_token, value_head;
  long long k_block, k_head, k_slot, v_block, v_head, v_slot;
  int num_tokens, num_heads, row_vectors, block_size;
};

extern "C" __global__ void __launch_bounds__(256) kvt_append(const __grid_constant__ AppendParams p) {
  ptx::wait_for_dependencies();
  ptx::launch_dependents();  // after the wait, so that the next kernel may rely on every write made before this kernel
  const long long index = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x;
  const unsigned vector = index % p.row_vectors;
  const long long row = index / p.row_vectors;
  const int head = row % p.num_heads;
  const long long token = row / p.num_heads;
  if (token >= p.num_tokens) return;
  const long long slot = p.slot_mapping[token];
  if (slot < 0) return;
  const long long block = slot / p.block_size;
  const int place = slot - block * p.block_size;
  const auto from = [&](const char* base, long long token_stride, long long head_stride) {
    return *reinterpret_cast<const vector_t*>(base + token * token_stride + head * head_stride + vector * KVT_VECTOR);
  };
  const vector_t key = from(p.key, p.key_token, p.key_head);
  const vector_t value = from(p.value, p.value_token, p.value_head);
  const long long inside = vector * KVT_VECTOR;
  *reinterpret_cast<vector_t*>(p.k_cache + block * p.k_block + head * p.k_head + place * p.k_slot + inside) = key;
  *reinterpret_cast<vector_t*>(p.v_cache + block * p.v_block + head * p.v_head + place * p.v_slot + inside) = value;
}

}  // namespace kvt
