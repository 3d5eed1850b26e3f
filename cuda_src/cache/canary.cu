// Canary: check that the slots of rows hold what was stored for them, then note what is stored now. For KVTOOLKIT_CHECK.
//
// Beside each slot there is a record: the token, its position, a hash of the first 16 bytes of its key in the first layer,
// and a chain, which is a hash of the last 8 tokens. So a slot that was written for somebody else, or an entry that leads
// elsewhere, has another position or breaks the chain, and a key that was written over has another hash. The chain has
// nothing of keys, because rows with equal tokens may share one of two slots whose keys differ in their last bits; and no
// more than a granule of tokens, because what is before may be quantized, and so have no records.
//
//   keys, records    [num_granules] by granule_nbytes, of which slot i begins at i * slot_nbytes
//   block_table, block_starts  [batch, max_entries], as attention takes them;  seq_lens [batch] int32, new tokens included
//   cu_seqlens_q     [batch + 1] int32 or null = one new token each;  tokens  [num_tokens] int64 or null = not known
//   report           [6]: row + 1, position, what is wrong, granule, found, expected; written by the first thread that finds
//                    a fault; report[0] is 0 before
//
// Tokens in quantized tiers, and slots whose record has no position (kUnknown), are not looked at; what follows one has
// nothing before it to be compared with.
//
// Launch:   grid (batch), CTA 256. Any architecture.
#include <kvt/base/warp.cuh>
#include <kvt/entry.cuh>
#include <kvt/ptx/cluster.cuh>

namespace kvt {

constexpr int kThreads = 256;
constexpr unsigned kUnknown = 0xFFFFFFFFu;
constexpr int kWrongPosition = 1;
constexpr int kWrongChain = 2;
constexpr int kWrongKey = 3;
constexpr int kNoSlot = 4;

struct CanaryParams {
  const unsigned* keys;
  unsigned* records;
  const int* block_table;
  const int* block_starts;
  const int* seq_lens;
  const int* cu_seqlens_q;
  const long long* tokens;
  unsigned* report;
  long long granule_nbytes, slot_nbytes, table_row, starts_row;
  int max_entries;
};

__device__ __forceinline__ unsigned mix(unsigned x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// The chain with one token more. Each shifts those before it by 4 bits, so after 8 others it is gone.
__device__ __forceinline__ unsigned next_chain(unsigned chain, unsigned token) { return chain << 4 ^ mix(token); }

// A row of the batch: its entries, and where its tokens are.
struct CanaryRow {
  const int* entries;
  const int* starts;
  int num_entries, first;  // first: logical granule

  __device__ __forceinline__ CanaryRow(const CanaryParams& p, int row)
      : entries(p.block_table + row * p.table_row), starts(p.block_starts + row * p.starts_row) {
    int low = 0;  // entries that are in use come first
    int high = p.max_entries;
    while (low < high) {
      const int middle = (low + high) >> 1;
      if (entries[middle] >= 0) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    num_entries = low;
    first = low > 0 ? starts[0] : 0;
  }

  // The place of a token in 4-byte words, in keys and in records; -1 if it is not held in 16 bits, -2 if not at all.
  __device__ __forceinline__ long long place(const CanaryParams& p, int token) const {
    const int granule = token / kGranule;
    if (token < 0 || granule < first) return -1;
    if (num_entries == 0) return -2;
    const int e = find_entry(starts, num_entries, granule);
    const Entry entry{entries[e]};
    if (granule - starts[e] >= entry.num_granules()) return -2;
    if (entry.tier() != Tier::kHot) return -1;
    return ((entry.granule() + granule - starts[e]) * p.granule_nbytes + token % kGranule * p.slot_nbytes) / 4;
  }
};

__device__ __forceinline__ unsigned hash_of_key(const unsigned* key) {
  unsigned hash = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) hash = mix(hash ^ key[i]);
  return hash;
}

__device__ __forceinline__ void report(
    const CanaryParams& p, int row, int token, int fault, long long place, unsigned found, unsigned expected) {
  if (atomicCAS(&p.report[0], 0u, static_cast<unsigned>(row + 1)) != 0) return;
  p.report[1] = token;
  p.report[2] = fault;
  p.report[3] = static_cast<unsigned>(place * 4 / p.granule_nbytes);
  p.report[4] = found;
  p.report[5] = expected;
}

extern "C" __global__ void __launch_bounds__(kThreads) kvt_canary(const __grid_constant__ CanaryParams p) {
  ptx::wait_for_dependencies();
  const int row = blockIdx.x;
  const int length = p.seq_lens[row];
  const int first_token = p.cu_seqlens_q == nullptr ? row : p.cu_seqlens_q[row];
  const int num_new = min(length, p.cu_seqlens_q == nullptr ? 1 : p.cu_seqlens_q[row + 1] - first_token);
  const CanaryRow tokens(p, row);
  // the record of a token; null if it has none
  const auto record_of = [&](int token) -> unsigned* {
    const long long place = tokens.place(p, token);
    return place < 0 || p.records[place + 1] == kUnknown ? nullptr : p.records + place;
  };
  for (int token = tokens.first * kGranule + static_cast<int>(threadIdx.x); token < length - num_new;
       token += kThreads) {
    if (tokens.place(p, token) == -2) report(p, row, token, kNoSlot, 0, 0, 0);
    const unsigned* const record = record_of(token);
    if (record == nullptr) continue;
    const long long place = record - p.records;
    const unsigned key = hash_of_key(p.keys + place);
    const unsigned* const before = record_of(token - 1);
    const unsigned chain = next_chain(before == nullptr ? 0 : before[3], record[0]);
    if (record[1] != static_cast<unsigned>(token)) {
      report(p, row, token, kWrongPosition, place, record[1], token);
    } else if (record[2] != key) {
      report(p, row, token, kWrongKey, place, key, record[2]);
    } else if ((before != nullptr || token == 0) && record[3] != chain) {
      report(p, row, token, kWrongChain, place, record[3], chain);
    }
  }
  const auto id_of = [&](int i) { return p.tokens == nullptr ? 0 : static_cast<unsigned>(p.tokens[first_token + i]); };
  for (int i = threadIdx.x; i < num_new; i += kThreads) {
    const int token = length - num_new + i;
    const long long place = tokens.place(p, token);
    if (place < 0) continue;
    const unsigned* const before = i < kGranule ? record_of(length - num_new - 1) : nullptr;
    unsigned chain = before == nullptr ? 0 : before[3];
    for (int k = max(0, i - kGranule + 1); k <= i; ++k) chain = next_chain(chain, id_of(k));
    unsigned* const record = p.records + place;
    record[0] = id_of(i);
    record[1] = token;
    record[2] = hash_of_key(p.keys + place);
    record[3] = chain;
  }
}

}  // namespace kvt
