// Read-only streaming: measures how fast this GPU can read, so that other kernels can be compared with it.
//
// Launch:   CTA 512, 16 bytes per load, 8 loads under way per thread. Any architecture.
namespace kvt {

struct ReadParams {
  const uint4* from;
  unsigned* sum;  // keeps the compiler from leaving loads out
  long long count;
};

extern "C" __global__ void __launch_bounds__(512) kvt_read(const __grid_constant__ ReadParams p) {
  constexpr int kUnroll = 8;
  const long long stride = static_cast<long long>(gridDim.x) * 512;
  unsigned sum = 0;
  for (long long i = static_cast<long long>(blockIdx.x) * 512 + threadIdx.x; i + (kUnroll - 1) * stride < p.count;
       i += kUnroll * stride) {
    uint4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) words[u] = __ldcs(p.from + i + u * stride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum ^= words[u].x ^ words[u].y ^ words[u].z ^ words[u].w;
  }
  if (sum == 0x9E3779B9u) atomicXor(p.sum, sum);
}

}  // namespace kvt
