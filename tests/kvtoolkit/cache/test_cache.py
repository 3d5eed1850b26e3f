"""What a cache promises, one promise a test. `test_cache_machine.py` checks them in all orders."""

import numpy as np
import pytest

from kvtoolkit import CacheConfig, KVCache
from kvtoolkit.config.eviction import CachedGranules
from kvtoolkit.formats.entry import unpack_entries


def make(**fields):
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32", "num_tokens": 1024, "max_seqs": 16}
    return KVCache(CacheConfig(**{**shape, **fields}))


def feed(cache, seq_ids, chunks):
    """Append tokens; keys and values are the token's number."""
    with cache.begin_step(seq_ids, [len(chunk) for chunk in chunks]) as step:
        tokens = np.concatenate([np.asarray(chunk, np.int64) for chunk in chunks])
        key = np.broadcast_to(tokens[:, None, None], (len(tokens), 2, 16)).astype(np.float32)
        for layer in range(2):
            step.append(layer, key, -key)
        ok = step.ok.copy()
        cache.end_step(step, tokens)
    return ok


def read(cache, seq_id):
    """The tokens a sequence holds, as its keys tell them."""
    with cache.begin_step([seq_id], 0) as step:
        granules, sizes, _ = unpack_entries(step.block_table[0])
        held = np.concatenate(
            [cache.key_cache(0)[g : g + n, 0, :, 0].ravel() for g, n in zip(granules, sizes, strict=True) if n]
        )
        return held[: step.seq_lens[0]].astype(int).tolist()


def test_a_prompt_reuses_the_longest_prefix_in_whole_granules():
    cache = make()
    prompt = list(range(100))
    (first,), cached = cache.open([prompt])
    assert cached.tolist() == [0]
    feed(cache, [first], [prompt])
    for other, hit in ((prompt, 96), (prompt[:96], 88), (prompt[:97], 96), (prompt[:50] + [7] * 50, 48), ([7] * 9, 0)):
        _, cached = cache.open([other])
        assert cached.tolist() == [hit], other
    assert cache.stats().reused_tokens == 96 + 88 + 96 + 48


def test_a_closed_prefix_stays_findable_until_its_memory_is_needed():
    cache = make(num_tokens=256)
    (first,), _ = cache.open([[1] * 129])
    feed(cache, [first], [[1] * 129])
    cache.close([first])
    assert cache.stats().cached == 128
    (again,), cached = cache.open([[1] * 129])
    assert cached.tolist() == [128]
    cache.close([again])
    (big,), _ = cache.open([[2]])
    assert feed(cache, [big], [[2] * 256]).all()
    assert cache.stats().cached == 0
    _, cached = cache.open([[1] * 129])
    assert cached.tolist() == [0]


def test_the_least_recently_used_prefix_is_evicted_first():
    cache = make(num_tokens=192, growth="append")
    for token in (1, 2):
        (seq,), _ = cache.open([[token] * 65])
        feed(cache, [seq], [[token] * 64])
        cache.close([seq])
    (seq,), _ = cache.open([[1] * 65])  # touches 1
    cache.close([seq])
    (seq,), _ = cache.open([[3]])
    feed(cache, [seq], [[3] * 100])
    assert cache.open([[1] * 65])[1].tolist() == [64]
    assert cache.open([[2] * 65])[1][0] < 64


class NewestFirst:
    """The contrary of LRU."""

    def score(self, granules: CachedGranules):
        return -granules.last_used.astype(float)


def test_the_eviction_policy_is_a_plug_in():
    cache = make(num_tokens=192, growth="append", eviction="tests.kvtoolkit.cache.test_cache:NewestFirst")
    for token in (1, 2):
        (seq,), _ = cache.open([[token] * 65])
        feed(cache, [seq], [[token] * 64])
        cache.close([seq])
    (seq,), _ = cache.open([[3]])
    feed(cache, [seq], [[3] * 100])
    assert cache.open([[1] * 65])[1].tolist() == [64]
    assert cache.open([[2] * 65])[1][0] < 64


def test_nothing_is_published_without_token_ids_or_with_prefix_caching_off():
    for cache, tokens in ((make(), None), (make(prefix_caching=False), [1] * 80)):
        (seq,), _ = cache.open([[1] * 80])
        cache.end_step(cache.begin_step([seq], 80), tokens)
        cache.close([seq])
        assert cache.stats().cached == 0
        assert cache.open([[1] * 80])[1].tolist() == [0]


def test_forks_share_full_granules_and_copy_the_tail():
    cache = make(growth="append")
    (seq,), _ = cache.open([[1]])
    feed(cache, [seq], [range(20)])
    used = cache.stats().used
    children = cache.fork([seq], 3)[0]
    assert cache.stats().used - used == 3 * 8
    assert cache.stats().copied_tokens == 3 * 4
    for number, child in enumerate(children):
        feed(cache, [child], [[100 + number] * 10])
    feed(cache, [seq], [[99] * 10])
    assert read(cache, seq) == [*range(20), *[99] * 10]
    for number, child in enumerate(children):
        assert read(cache, child) == [*range(20), *[100 + number] * 10]


def test_reorder_makes_beams_continue_their_parents():
    cache = make()
    (seq,), _ = cache.open([[1]])
    feed(cache, [seq], [range(13)])
    beams = [seq, *cache.fork([seq], 2)[0].tolist()]
    feed(cache, beams, [[10], [11], [12]])
    cache.reorder(beams, [2, 0, 0])
    feed(cache, beams, [[20], [21], [22]])
    assert [read(cache, beam)[13:] for beam in beams] == [[12, 20], [10, 21], [10, 22]]


def test_truncating_forgets_and_spares_what_others_hold():
    cache = make()
    (seq,), _ = cache.open([[1]])
    feed(cache, [seq], [range(40)])
    (fork,) = cache.fork([seq], 1)[0]
    cache.truncate([seq], [21])
    feed(cache, [seq], [[77] * 30])
    assert read(cache, seq) == [*range(21), *[77] * 30]
    assert read(cache, fork) == list(range(40))
    assert cache.open([[*range(40), 1]])[1].tolist() == [40]
    assert cache.open([[*range(21), *[77] * 30]])[1].tolist() == [48]


def test_a_rejected_draft_leaves_its_room_to_the_next_tokens():
    cache = make()
    (seq,), _ = cache.open([[1]])
    cache.end_step(cache.begin_step([seq], 30))
    used = cache.stats().used
    for _ in range(5):
        cache.end_step(cache.begin_step([seq], 8))
        cache.truncate([seq], [30])
        assert cache.stats().used == used


def test_preempted_to_host_comes_back_whole_and_dropped_with_what_is_still_cached():
    cache = make(num_tokens=256)
    seq_ids, _ = cache.open([[1], [2]])
    feed(cache, seq_ids, [range(50), range(100, 150)])
    cache.preempt(seq_ids[:1], "host")
    cache.preempt(seq_ids[1:], "drop")
    assert cache.stats().num_preempted_seqs == 2
    assert cache.restore(seq_ids).tolist() == [True, True]
    assert cache.lengths(seq_ids).tolist() == [50, 48]
    assert read(cache, seq_ids[0]) == list(range(50))
    assert read(cache, seq_ids[1]) == list(range(100, 148))


def test_restoring_without_memory_says_no_and_keeps_the_sequence():
    cache = make(num_tokens=128)
    (seq,), _ = cache.open([[1]])
    feed(cache, [seq], [range(100)])
    cache.preempt([seq], "host")
    (other,), _ = cache.open([[2]])
    feed(cache, [other], [[2] * 100])
    assert cache.restore([seq]).tolist() == [False]
    cache.close([other])
    assert cache.restore([seq]).tolist() == [True]
    assert read(cache, seq) == list(range(100))


def test_a_lease_keeps_what_it_holds_whatever_the_sequence_does():
    cache = make()
    (seq,), _ = cache.open([[1]])
    feed(cache, [seq], [range(20)])
    lease = cache.pin([seq])
    where = np.concatenate([np.arange(s, s + n) for s, n in zip(lease.starts, lease.sizes, strict=True)])
    cache.truncate([seq], [3])
    feed(cache, [seq], [[9] * 40])
    cache.close([seq])
    cache.compact(10_000)
    held = cache.key_cache(0)[where, 0, :, 0].ravel()[:20]
    assert held.tolist() == list(range(20))
    (kept,) = lease.commit()
    assert read(cache, kept) == list(range(20))


def entries(cache, seq_id):
    with cache.begin_step([seq_id], 0) as step:
        return (unpack_entries(step.block_table[0])[1] * 8)[: step._arrays.filled[0]].tolist()


def decode(cache, seq_ids, count):
    for _ in range(count):
        assert feed(cache, seq_ids, [[1]] * len(seq_ids)).all()


@pytest.mark.parametrize(
    ("growth", "expected"),
    [("fixed16", 16 * 9), ("fixed64", 64 * 3), ("append", 8 * 17), ("adaptive", 64 * 3), ("proportional", 8 * 17)],
)
def test_growth_policies_hold_the_room_they_say(growth, expected):
    cache = make(growth=growth, num_tokens=4096)
    (seq,), _ = cache.open([[1]])
    decode(cache, [seq], 129 if growth != "proportional" else 127)
    assert sum(entries(cache, seq)) == expected if growth != "proportional" else 128


def test_lazy_merge_turns_eight_blocks_into_one_of_64():
    cache = make(growth="lazy_merge", num_tokens=4096)
    seq_ids, _ = cache.open([[1], [1]])  # two of them, so that their blocks are not neighbours
    decode(cache, seq_ids, 130)
    stats = cache.stats()
    assert (stats.num_merges, stats.copied_tokens) == (4, 256)
    for seq in seq_ids:
        assert entries(cache, seq)[:2] == [64, 64]


def test_adaptive_takes_small_blocks_when_memory_is_scarce():
    cache = make(num_tokens=64 * 64)
    (big, small), _ = cache.open([[1], [2]])
    feed(cache, [big], [[1] * 64 * 61])  # leaves 4.7 %
    decode(cache, [small], 1)
    assert sum(entries(cache, small)) == 16


def test_adaptive_keeps_one_percent_back_for_merging():
    cache = make(num_tokens=64 * 200)
    assert cache.stats().kept_back == 2 * 64


def test_compaction_merges_what_growth_could_not():
    cache = make(growth="append", num_tokens=4096)
    seq_ids, _ = cache.open([[1], [1]])
    decode(cache, seq_ids, 128)
    before = [read(cache, seq) for seq in seq_ids]
    assert cache.stats().entries_per_seq > 4
    assert cache.compact(100) == 64
    cache.compact(10_000)
    assert cache.stats().entries_per_seq == 2
    assert [read(cache, seq) for seq in seq_ids] == before


def test_compaction_makes_room_for_blocks_of_64():
    cache = make(growth="append", num_tokens=512, prefix_caching=False)
    seq_ids, _ = cache.open([[]] * 8)
    for _ in range(8):
        for seq in seq_ids:
            cache.end_step(cache.begin_step([seq], 8))
    cache.close(seq_ids[1:6])
    assert cache.allocator.largest_free < 8
    cache.compact(1_000)
    cache.check_integrity()
    assert cache.allocator.largest_free >= 8


@pytest.mark.parametrize("allocator", ["paged", "buddy", "slab", "lockfree"])
def test_the_same_calls_give_the_same_tables(allocator):
    def run():
        cache = make(allocator=allocator)
        seq_ids, _ = cache.open([[1], [2], [3]])
        feed(cache, seq_ids, [range(30), range(70), range(5)])
        cache.close(seq_ids[:1])
        decode(cache, seq_ids[1:], 40)
        with cache.begin_step(seq_ids[1:], 1) as step:
            return step.block_table.tolist(), step.slot_mapping.tolist()

    assert run() == run()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_attends_like_the_reference(dtype):
    from kvtoolkit import reference

    random = np.random.default_rng(0)
    cache = make(dtype=dtype)
    seq_ids, _ = cache.open([[1], [2]])
    for counts in ([70, 9], [1, 1], [4, 1]):
        step = cache.begin_step(seq_ids, counts)
        key, value = random.standard_normal((2, sum(counts), 2, 16)).astype(dtype)
        q = random.standard_normal((sum(counts), 6, 16)).astype(dtype)
        step.append(0, -key, -value)
        step.append(1, key, value)
        out, lse = step.attend(1, q, return_lse=True)
        expected, expected_lse = reference.variable_block_attention(
            q,
            cache.key_cache(1),
            cache.value_cache(1),
            step.block_table,
            step.block_starts,
            step.seq_lens,
            cu_seqlens_q=step.cu_seqlens_q,
            return_lse=True,
        )
        tolerance = 4 * np.finfo(dtype).eps
        np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
        cache.end_step(step)


def test_threads_may_share_a_cache():
    import threading

    cache = make(num_tokens=8192, max_seqs=64)
    failures = []

    def work(number):
        try:
            for round_number in range(10):
                tokens = [number * 100 + round_number] * 30
                (seq,), (hit,) = cache.open([tokens])
                feed(cache, [seq], [tokens[hit:]])
                decode_tokens = list(range(40))
                for token in decode_tokens:
                    feed(cache, [seq], [[token]])
                assert read(cache, seq) == tokens + decode_tokens
                cache.close([seq])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    cache.check_integrity()
    assert cache.stats().used == 0
