"""Evictions: by the policy, by whole blocks, of what helps, and never in vain; and twins, which stay findable."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, CacheFullError, KVCache
from kvtoolkit.cache.state.block_manager import BlockManager

HERE = "tests.kvtoolkit.cache.test_eviction"
WHOLE = {
    "slab": {"allocator": "slab"},
    "paged": {"allocator": "paged", "block_sizes": (64,)},
    "lockfree slab": {"allocator": "lockfree", "allocator_options": {"layout": "slab"}},
    "buddy, 64 alone": {"growth": "fixed64"},
}
ALL = {**WHOLE, "buddy": {}, "lockfree buddy": {"allocator": "lockfree"}}


def make(**fields):
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_tokens": 1024, "max_seqs": 64}
    return KVCache(CacheConfig(**{**shape, **fields}))


def feed(cache, seq_ids, chunks):
    """Append tokens, and have them published; whether all rows got memory."""
    with cache.begin_step(seq_ids, [len(chunk) for chunk in chunks]) as step:
        ok = step.ok.all()
        cache.end_step(step, np.concatenate([np.asarray(chunk, np.int64) for chunk in chunks]))
    return bool(ok)


def put(cache, tokens):
    """Have a prompt cached."""
    seq_ids, lengths = cache.open([tokens])
    assert feed(cache, seq_ids, [tokens[lengths[0] :]])
    cache.close(seq_ids)


def hits(cache, tokens):
    """How many of these tokens a prompt would find."""
    seq_ids, lengths = cache.open([[*tokens, 1]])
    cache.close(seq_ids)
    return int(lengths[0])


# -- policies, each beside a model -----------------------------------------------------------------------------------


class Shallow:
    """What is deepest in its sequence goes first."""

    def score(self, granules):
        return -granules.depth.astype(float)


class Newest:
    """What was used last goes first, but only with all that follows it."""

    def score(self, granules):
        return -granules.last_used.astype(float)


POLICIES = {
    "lru": lambda nodes, n: (nodes.last_used[n],),
    "lfu": lambda nodes, n: (nodes.num_uses[n], nodes.last_used[n]),
    f"{HERE}:Shallow": lambda nodes, n: (-nodes.depth[n],),
    f"{HERE}:Newest": lambda nodes, n: (-nodes.last_used[n],),
}


class Model:
    """The cached nodes as dictionaries: a node is worth what the best that follows it is worth."""

    def __init__(self, pool, score):
        nodes, granules = pool.nodes, pool.granules
        used = [n for n in np.flatnonzero(nodes.uid).tolist() if granules.refs[nodes.granule[n]] == 0]
        self.parents = {int(nodes.uid[n]): int(nodes.parent_uid[n]) for n in used}
        self.keys = {int(nodes.uid[n]): score(nodes, n) for n in used}
        for n in sorted(used, key=lambda n: -nodes.depth[n]):
            uid, parent = int(nodes.uid[n]), int(nodes.parent_uid[n])
            if parent in self.keys:
                self.keys[parent] = max(self.keys[parent], self.keys[uid])

    def require(self, left, wanted):
        """The nodes that are not ``left`` any more are the lowest, and no others."""
        gone = self.keys.keys() - left
        assert len(gone) == wanted
        assert not [uid for uid in left if self.parents.get(uid) in gone], "a prefix went before what follows it"
        if gone and left:
            assert max(self.keys[uid] for uid in gone) <= min(self.keys[uid] for uid in left if uid in self.keys)


@pytest.mark.parametrize("policy", POLICIES)
def test_evictions_follow_the_policy(policy, monkeypatch):
    evicted = []
    evict = BlockManager.evict

    def checked(pool, wanted, tier=0):
        model, most = Model(pool, POLICIES[policy]), pool.num_cached
        done = evict(pool, wanted, tier)
        model.require(set(Model(pool, POLICIES[policy]).keys), wanted if wanted <= most else 0)
        evicted.append(wanted if done else 0)
        return done

    monkeypatch.setattr(BlockManager, "evict", checked)
    cache = make(growth="append", eviction=policy)
    random = np.random.default_rng(7)
    prompts = [random.integers(0, 3, size).repeat(8).tolist() for size in random.integers(1, 12, 40)]
    open_ids = []
    for _ in range(250):
        prompt = prompts[random.zipf(1.3) % 40]
        ids, lengths = cache.open([prompt])
        if feed(cache, ids, [prompt[lengths[0] :] + random.integers(0, 3, 16).tolist()]):
            open_ids.append(ids)
        else:
            cache.close(ids)
        while len(open_ids) > 5 or (len(open_ids) > 3 and random.integers(3) == 0):  # several before the next eviction
            cache.close(open_ids.pop(int(random.integers(len(open_ids)))))
    cache.check_integrity()
    assert sum(evicted) > 300


def test_a_prefix_found_often_outlives_prompts_that_nobody_asks_for_again():
    cache = make(growth="append", eviction="lfu")
    often = list(range(500, 564))
    put(cache, often)
    for _ in range(5):
        assert hits(cache, often) == 64
    for prompt in range(40):
        put(cache, [prompt] * 64)
    assert cache.stats().num_evicted > 0
    assert hits(cache, often) == 64


class Counting:
    """Counts what it is asked."""

    num_asked = 0

    def score(self, granules):
        Counting.num_asked += len(granules.depth)
        return granules.last_used.astype(float)


def test_a_granule_is_scored_once_however_many_requests_come():
    cache = make(growth="append", eviction=f"{HERE}:Counting")
    for prompt in range(16):
        put(cache, [prompt] * 64)
    Counting.num_asked = 0
    seq_ids, _ = cache.open([[]])
    for _ in range(50):
        assert feed(cache, seq_ids, [[7] * 8])
    assert not feed(cache, seq_ids, [[7] * 1024])
    assert 0 < Counting.num_asked <= 16 * 8


# -- blocks that are freed as a whole --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_memory_that_only_cached_granules_pin_is_granted(kind):
    cache = make(**ALL[kind], num_tokens=4096)
    seq_ids, _ = cache.open([[]] * 64)
    assert feed(cache, seq_ids, [[i] * 9 for i in range(64)])
    cache.close(seq_ids)
    stats = cache.stats()
    assert (stats.used, stats.cached + stats.free + stats.kept_back) == (0, stats.capacity)
    seq_ids, _ = cache.open([[]])
    assert feed(cache, seq_ids, [[1] * 4096])
    cache.check_integrity()


@pytest.mark.parametrize("kind", ALL)
def test_one_token_evicts_no_more_than_a_block(kind):
    cache = make(**ALL[kind])
    seq_ids, _ = cache.open([[]] * 16)
    assert feed(cache, seq_ids, [[i] * 64 for i in range(16)])
    cache.close(seq_ids)
    seq_ids, _ = cache.open([[]])
    assert feed(cache, seq_ids, [[77]])
    assert 1 <= cache.stats().num_evicted <= 8
    assert sum(hits(cache, [i] * 64) == 64 for i in range(16)) == 15


@pytest.mark.parametrize("kind", WHOLE)
def test_blocks_that_a_row_holds_a_part_of_are_left_alone(kind):
    cache = make(**WHOLE[kind], num_tokens=512)
    holders = []
    for prompt in range(7):
        seq_ids, _ = cache.open([[prompt] * 64])
        assert feed(cache, seq_ids, [[prompt] * 64])
        holders.append(cache.open([[prompt] * 9])[0])  # holds 8 tokens of the block
        cache.close(seq_ids)
    last, _ = cache.open([[]])
    assert feed(cache, last, [[7] * 64])
    before = cache.stats()
    for _ in range(3):
        assert not feed(cache, last, [[1]])
    assert cache.stats().num_evicted == before.num_evicted
    assert cache.stats().cached == before.cached
    cache.close(holders[0])  # now one of the blocks is wholly cached
    assert feed(cache, last, [[1]])
    assert [hits(cache, [prompt] * 64) for prompt in range(7)] == [0] + [64] * 6


# -- requests that cannot be granted ---------------------------------------------------------------------------------


def refused_step(cache, running, saved):
    assert not feed(cache, running, [[3] * 1024])


def refused_fork(cache, running, saved):
    with pytest.raises(CacheFullError):
        cache.fork(running, 200)


def refused_restore(cache, running, saved):
    assert not cache.restore(saved).any()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("call", [refused_step, refused_fork, refused_restore])
def test_what_cannot_be_granted_evicts_nothing(call, kind):
    cache = make(**ALL[kind], num_tokens=1024, max_seqs=300)
    saved, _ = cache.open([[]])
    assert feed(cache, saved, [[1] * 640])
    cache.preempt(saved, "host")
    running, _ = cache.open([[]])
    assert feed(cache, running, [[2] * 509])
    put(cache, list(range(900, 1028)))
    before = cache.stats().num_evicted
    for _ in range(3):
        call(cache, running, saved)
    assert cache.stats().num_evicted == before
    assert hits(cache, list(range(900, 1028))) == 128
    cache.check_integrity()


# -- twins -----------------------------------------------------------------------------------------------------------

PROMPT = list(range(100, 164))
ENDS = {
    "close": lambda cache, seq_ids: cache.close(seq_ids),
    "drop": lambda cache, seq_ids: cache.preempt(seq_ids, "drop"),
    "host": lambda cache, seq_ids: cache.preempt(seq_ids, "host"),
    "truncate": lambda cache, seq_ids: cache.truncate(seq_ids, [0]),
    "truncate inside": lambda cache, seq_ids: (cache.truncate(seq_ids, [3]), feed(cache, seq_ids, [[9] * 61])),
}
BETWEEN = {
    "nothing": lambda cache: cache,
    "repair": lambda cache: (cache.repair(), cache)[1],
    "snapshot": lambda cache: KVCache.from_snapshot(cache.config, cache.snapshot()),
    "compact": lambda cache: (cache.compact(10**6), cache)[1],
}


def twins(**fields):
    """Three sequences that were given the same tokens at the same time."""
    cache = make(**fields)
    seq_ids, _ = cache.open([PROMPT] * 3)
    for first in range(0, 64, 16):
        assert feed(cache, seq_ids, [PROMPT[first : first + 16]] * 3)
    return cache, seq_ids


@pytest.mark.parametrize("growth", ["append", "lazy_merge", "fixed16"])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("end", ENDS)
def test_a_sequence_stays_findable_when_the_one_that_published_the_same_ends(end, between, growth):
    cache, seq_ids = twins(growth=growth)
    cache = BETWEEN[between](cache)
    for seq_id in seq_ids[:2]:
        ENDS[end](cache, [seq_id])
        cache.check_integrity()
        assert cache.stats().cached == 0, "what is held twice need not be cached"
    other, _ = cache.open([[]])
    while feed(cache, other, [[7] * 8]):
        pass
    assert hits(cache, PROMPT) == 64
    cache.close([seq_ids[2]])
    assert hits(cache, PROMPT) == 64
    cache.check_integrity()


def test_a_sequence_that_returns_from_the_host_is_found_in_what_it_holds():
    cache, seq_ids = twins(growth="append")
    cache.close(seq_ids[1:])
    cache.preempt(seq_ids[:1], "host")
    assert cache.restore(seq_ids[:1]).all()
    cache.check_integrity()
    assert cache.stats().cached == 0
    other, _ = cache.open([[]])
    while feed(cache, other, [[7] * 8]):
        pass
    assert hits(cache, PROMPT) == 64


def test_tokens_cached_already_are_not_kept_twice():
    cache = make(growth="append")
    seq_ids, _ = cache.open([[], []])
    assert feed(cache, seq_ids[:1], [PROMPT])
    cache.close(seq_ids[:1])
    assert feed(cache, seq_ids[1:], [PROMPT])
    assert (cache.stats().used, cache.stats().cached) == (64, 0)
    assert hits(cache, PROMPT) == 64
    cache.check_integrity()
