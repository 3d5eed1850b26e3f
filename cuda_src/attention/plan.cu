// Plan: cut the batch into ranges of about equal cost, on the device, once a step for all layers.
//
//   seq_lens     [batch] int32;   cu_seqlens_q  [batch + 1] int32 or null = one query each
//   ranges       [num_ranges + 1] (sequence, steps of it that belong to the range before, its length, 0)
//   sequences    [batch] (first range, number of ranges) that hold a part of each sequence
//
// All sequences are laid out in one row of steps. In front of each sequence is an overhead: what it costs to begin and
// to end it. A range ends when its share of the total cost is reached, but a cut leaves at least min_steps of a
// sequence on either side. If there is not enough work for all ranges, the last ones are empty. The same happens if
// num_even, a smaller number of ranges, cuts sequences of equal lengths evenly or not at all, unless the ranges are so
// long that an idle SM would cost more than the cuts.
//
// Sequences with more than most_queries queries are another kernel's and cost nothing here. With all_or_none, if there
// is one, all sequences are that kernel's, and every range is empty.
//
// SMs are not equally fast, and costs are only estimates. If an SM holds several CTAs, the last eighth of the cost is
// therefore cut into as many ranges again, the late ones. Their CTAs begin wherever an earlier one has ended, while its
// neighbours keep the memory busy. For the tiered kernel, where cuts of equal sequences are worth avoiding, this is
// done for ragged batches only.
//
// Launch:   CTA 1024, grid = CTAs that share the sequences, each of which computes all ranges; dynamic shared memory
//           4 * batch. sm_80 and later.
// Source:   equal ranges with an overhead, as in FlashMLA's scheduler (deepseek-ai), but without a serial loop.
#include <kvt/attention/keys.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kThreads = 1024;
constexpr int kMaxRanges = 1024;

// Packed by kvtoolkit/cuda/plan.py, field by field in this order.
struct PlanParams {
  const int* seq_lens;
  const int* cu_seqlens_q;
  int4* ranges;
  int2* sequences;
  int batch, num_ranges;
  int num_late;             // of the ranges
  int num_even, long_cost;  // ranges; the cost from which a range counts as long
  int left, right;
  int overhead, min_steps;  // steps
  int min_cost, min_late;   // of a range, of a late one
  int ragged_percent;       // a batch is ragged if its longest sequence has more steps than this share of the mean cost
  int most_queries;         // sequences with more are another kernel's
  int all_or_none;          // 1: then so are all others
};

__device__ __forceinline__ int num_queries(const PlanParams& p, int sequence) {
  return p.cu_seqlens_q == nullptr ? 1 : p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence];
}

__device__ __forceinline__ int num_steps(const PlanParams& p, int sequence, int queries) {
  if (queries == 0 || queries > p.most_queries) return 0;
  const StepRange steps = visible_steps(p.left, p.right, p.seq_lens[sequence], queries);
  return steps.end - steps.begin;
}

// How many of `count` places in ascending order are not above `key`.
__device__ __forceinline__ int count_up_to(const int2* places, int count, int2 key) {
  int low = 0;
  int high = count;
  while (low < high) {
    const int middle = (low + high) >> 1;
    const int2 place = places[middle];
    if (place.x < key.x || (place.x == key.x && place.y <= key.y)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Where a range begins that has `cost` in front of it: a sequence and steps of it; `ends` has the cost up to the end of each.
__device__ __forceinline__ int2 place_of_cost(const PlanParams& p, const int* ends, int cost) {
  int low = 0;
  int high = p.batch - 1;
  while (low < high) {  // find the first sequence that ends above the cost
    const int middle = (low + high) >> 1;
    if (ends[middle] > cost) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int start = low > 0 ? ends[low - 1] : 0;
  const int steps = ends[low] - start - p.overhead;  // 0 or less: nothing to cut
  const int inside = cost - start - p.overhead;
  if (inside < p.min_steps) return {low, 0};
  if (steps - inside < p.min_steps) return {low + 1, 0};
  return {low, inside};
}

extern "C" __global__ void __launch_bounds__(kThreads) kvt_plan(const __grid_constant__ PlanParams p) {
  extern __shared__ int ends[];  // [batch] cost of all sequences up to and including each
  __shared__ int2 ranges[kMaxRanges + 1];
  __shared__ int warp_sums[32];
  __shared__ int warp_longest[32];
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const int each = (p.batch + kThreads - 1) / kThreads;
  const int first = threadIdx.x * each;
  const int last = min(p.batch, first + each);

  int longest = 0;  // steps of a sequence
  int sum = 0;
  bool is_left = false;  // to another kernel
  for (int b = first; b < last; ++b) {
    const int queries = num_queries(p, b);
    const int steps = num_steps(p, b, queries);
    is_left = is_left || queries > p.most_queries;
    sum += steps > 0 ? steps + p.overhead : 1;
    longest = max(longest, steps);
    ends[b] = sum;
  }
  // prefix sums over threads: first within the warp, then over warps
  const int lane = lane_id();
  const int inclusive = sum_up_to_lane(sum);
  longest = __reduce_max_sync(kAllLanes, longest);
  if (lane == 31) {
    warp_sums[threadIdx.x >> 5] = inclusive;
    warp_longest[threadIdx.x >> 5] = longest;
  }
  const bool is_empty = __syncthreads_or(is_left) && p.all_or_none;
  longest = __reduce_max_sync(kAllLanes, warp_longest[lane]);
  const int of_warps = sum_up_to_lane(warp_sums[lane]);
  const int total = __shfl_sync(kAllLanes, of_warps, 31);
  const int warp = threadIdx.x >> 5;
  const int before_warp = __shfl_sync(kAllLanes, of_warps, max(0, warp - 1));
  const int before = (warp > 0 ? before_warp : 0) + inclusive - sum;
  for (int b = first; b < last; ++b) ends[b] += before;
  __syncthreads();

  const int num_early = p.num_ranges - p.num_late;
  const int eighth = total >> 3;
  const bool is_ragged = 100LL * longest * p.batch > static_cast<long long>(p.ragged_percent) * total;
  // the cost that the late ranges share
  const int late = p.num_late > 0 && is_ragged && eighth / p.num_late >= p.min_late && !is_empty ? eighth : 0;
  const int most = total / num_early >= p.long_cost ? num_early : p.num_even;
  const int used = is_empty ? 0 : late > 0 ? num_early : max(1, min(most, total / p.min_cost));
  for (int i = threadIdx.x; i <= p.num_ranges; i += kThreads) {
    int2 place{p.batch, 0};
    if (i < used || (late > 0 && i < p.num_ranges)) {
      const int cost = i < used ? static_cast<long long>(total - late) * i / used
                                : total - late + static_cast<long long>(late) * (i - used) / p.num_late;
      place = place_of_cost(p, ends, cost);
    }
    ranges[i] = place;
    if (blockIdx.x == 0) p.ranges[i] = {place.x, place.y, place.x < p.batch ? p.seq_lens[place.x] : 0, 0};
  }
  __syncthreads();
  for (int b = blockIdx.x * kThreads + threadIdx.x; b < p.batch; b += gridDim.x * kThreads) {
    // ranges that begin at or before the sequence's first step, then those that begin inside it
    const int begins = count_up_to(ranges, p.num_ranges + 1, {b, 0});
    const int inside = count_up_to(ranges, p.num_ranges + 1, {b, 0x7FFFFFFF}) - begins;
    p.sequences[b] = {begins - 1, inside + 1};
  }
}

}  // namespace kvt
