// The lock-free pool: running kernels take blocks of granules from it and give them back. No thread ever waits.
//
// Each granule has a free bit, and that bit is its whole state. A block of 1, 2, 4 or 8 aligned granules is inside one
// word. One atomic on that word claims it, another one frees it; buddies coalesce by themselves, and there is no list
// and no ABA problem. Freeing a bit that is already set reveals a double free. There are two layouts, with a type each,
// because a kernel knows its pool:
//
//   Pool      buddy: a word has 64 granules, and sizes mix.
//   SlabPool  a word has 32 granules, which serve one order until all of them are free. The order is in the same word,
//             so the compare-and-swap of a claim checks it. A block that is freed in part becomes free again only as a
//             whole, once the rest of it is freed.
//
// When is the pool exhausted? Not when one pass over the words finds nothing, because a block may move behind it. Every
// free is followed by an increment of the version. If a pass found nothing, and the version is the same before and
// after it, then there was no such block when it ended: without frees, free runs only shrink. The proof is stored, so
// that later calls at the same version return at once. After kMaxPasses passes with a moving version the answer is
// kContended.
//
// The version is a sum over shards, so two threads that have each missed a different free can compute the same sum. A
// reader therefore acquires the stored proof before it reads the version; every shard it then sees is at least as new
// as the one the prover saw.
//
//   memory  uint64, made by kvtoolkit.DevicePool: granules and words of a Pool, epoch, unused, granules and words of a
//           SlabPool
//           | kHints    [4], by order: the version at which no block was left, plus 1
//           | kVersions [kShards], a cache line each; the version is their sum
//           | free words, an even number | limbo words of kEpochs epochs | marks of a batch that is being freed
//           | slabs only: [words / 32 + 1, 4 orders] the word, plus 1, where a search last found a block, or 0
//
// Use free for blocks that no other thread can still read, and retire for all others: they wait in the limbo of the
// epoch that memory holds, until the host completes that epoch. A kernel that takes blocks must not read their contents
// by the non-coherent path (__ldg), and bulk copies of a block that has been reused need a proxy fence. A granule is 8
// token slots.
//
// Source: this project's; the nearest published design claims by bitmap word, Pham et al. 2025 (ACM TOPC 12, 1).
#pragma once

#include <kvt/pool/lease.cuh>
#include <kvt/pool/pool.cuh>
#include <kvt/pool/warp.cuh>
