"""The prefix index cannot be filled so that its nodes share a bucket, and finds all of them after a change of key."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, KVCache
from kvtoolkit.cache.state import prefix_index
from kvtoolkit.cache.state.prefix_index import (
    NO_EXTRA,
    ROOT,
    ROOT_UID,
    find_node,
    make_granule_state,
    make_nodes,
    publish,
    rehash,
)

NUM_NODES = 4096
FAMILIES = {
    "one token counts": lambda i: [i, 0, 0, 0, 0, 0, 0, 0],
    "the last token counts": lambda i: [7, 7, 7, 7, 7, 7, 7, i],
    "multiples of a power of two": lambda i: [i << 20, 0, 0, 0, 0, 0, 0, 0],
    "only high halves": lambda i: [0, i << 32, 0, 0, 0, 0, 0, 0],
    "sums that stay the same": lambda i: [i, NUM_NODES - i, 0, 0, 0, 0, 0, 0],
    "two tokens exchanged": lambda i: [i // 64, i % 64, i % 64, i // 64, 0, 0, 0, 0],
    "negative tokens": lambda i: [-i, 0, 0, 0, 0, 0, 0, -1],
}


def tokens_of(family):
    return np.array([FAMILIES[family](i) for i in range(NUM_NODES)], np.int64)


def index_of(tokens):
    """An index with one node for each row of tokens, all at the root."""
    nodes, granules = make_nodes(NUM_NODES), make_granule_state(NUM_NODES, (0, NUM_NODES, NUM_NODES))
    for granule, row in enumerate(tokens):
        publish(nodes, granules, ROOT, ROOT_UID, NO_EXTRA, 0, row, granule)
    return nodes


def chain_lengths(nodes):
    lengths = []
    for node in nodes.buckets.tolist():
        lengths.append(0)
        while node >= 0:
            lengths[-1] += 1
            node = int(nodes.next_in_bucket[node])
    return lengths


def buckets_of(nodes, tokens):
    return np.array([prefix_index._bucket_of(nodes, ROOT_UID, NO_EXTRA, row, 0) for row in tokens])


@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_spread_over_the_buckets_whatever_their_tokens(family):
    nodes = index_of(tokens_of(family))
    # at random the longest of 8192 chains for 4096 nodes has 6; 20 does not happen once in 10**14 keys
    assert max(chain_lengths(nodes)) < 20


def test_tokens_that_share_a_bucket_under_one_key_spread_under_another():
    """What an attacker finds out about one process, or about the constants, is of no use against the next."""
    tokens = np.random.default_rng(1).integers(0, 1 << 17, (200_000, 8))
    first, second = make_nodes(64), make_nodes(64)
    buckets = buckets_of(first, tokens[:20_000])
    aimed = tokens[:20_000][buckets == 5]
    assert len(aimed) > 50
    assert len(np.unique(buckets_of(second, aimed))) > 20


def test_every_word_and_the_key_count():
    tokens, nodes = np.arange(8) + (np.arange(8) << 32), make_nodes(64)
    found = {
        int(prefix_index._hash(nodes.key, 1, tokens, 0)),
        int(prefix_index._hash(nodes.key, 1 + (1 << 32), tokens, 0)),
    }
    for i in range(8):
        for change in (1, 1 << 32):
            other = tokens.copy()
            other[i] += change
            found.add(int(prefix_index._hash(nodes.key, 1, other, 0)))
    for i in range(len(nodes.key)):
        key = nodes.key.copy()
        key[i] ^= np.uint64(1 << 50)
        found.add(int(prefix_index._hash(key, 1, tokens, 0)))
    assert len(found) == 1 + 1 + 16 + 19


def test_each_index_has_a_key_of_its_own():
    assert len({make_nodes(64).key.tobytes() for _ in range(10)}) == 10


def test_all_is_found_after_rehashing_for_another_key():
    tokens = tokens_of("sums that stay the same")
    nodes = index_of(tokens)
    nodes.uid[100] = 0  # a node that is not in use is in no bucket
    nodes.key[:] = make_nodes(64).key
    nodes.buckets[:] = 17  # as lists would be that came with a snapshot
    nodes.next_in_bucket[:] = 17
    rehash(nodes)
    found = [find_node(nodes, ROOT_UID, NO_EXTRA, row, 0) for row in tokens]
    expected = np.arange(NUM_NODES)
    expected[100] = -1
    assert np.array_equal(found, expected)
    assert sum(chain_lengths(nodes)) == NUM_NODES - 1


def test_a_snapshot_is_found_again_in_a_cache_with_another_key():
    config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_tokens=1024, dtype="float32")
    cache = KVCache(config)
    prompt = list(range(200))
    seq_ids, _ = cache.open([prompt])
    cache.end_step(cache.begin_step(seq_ids, 200), prompt)
    again = KVCache.from_snapshot(config, cache.snapshot())
    again.check_integrity()
    assert again.open([prompt])[1].tolist() == [192]
    again.close(again.open([[1]])[0])
    again.end_step(again.begin_step(again.open([list(range(1000, 1700))])[0], 700), list(range(1000, 1700)))
    again.check_integrity()
