"""Bit counting, atomics and sets of integers do in compiled code what Python's integers say."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocators import _bits, _bitset
from allocators._jit import jit

WORDS = st.integers(0, 2**64 - 1)


@jit
def zeros_and_ones(word):
    return _bits.count_trailing_zeros(word), _bits.popcount(word)


@jit
def call_all(words, operand):
    """Every atomic once, on words 0-3; what each returned."""
    return (
        _bits.load_acquire(words, 0),
        _bits.load_relaxed(words, 1),
        _bits.fetch_or_release(words, 0, operand),
        _bits.fetch_and_acquire(words, 1, operand),
        _bits.fetch_add_acq_rel(words, 2, operand),
        _bits.cas_acq_rel(words, 3, words[3], operand),
        _bits.cas_acq_rel(words, 3, ~operand, np.uint64(1)),
    )


@jit
def add_many(words, count):
    for _ in range(count):
        _bits.fetch_add_acq_rel(words, 0, np.uint64(1))
        seen = _bits.load_relaxed(words, 8)
        while True:
            before = _bits.cas_acq_rel(words, 8, seen, seen + np.uint64(1))
            if before == seen:
                break
            seen = before


@jit
def publish(words, value):
    _bits.store_release(words, 0, value)


@settings(deadline=None)
@given(word=WORDS)
def test_counting(word):
    zeros, ones = zeros_and_ones(np.uint64(word))
    assert zeros == (64 if word == 0 else (word & -word).bit_length() - 1)
    assert ones == word.bit_count()


@settings(deadline=None)
@given(values=st.lists(WORDS, min_size=4, max_size=4), operand=WORDS)
def test_atomics_return_what_was_there_and_leave_what_they_say(values, operand):
    words = np.array(values, np.uint64)
    a, b, c, d = values
    returned = call_all(words, np.uint64(operand))
    assert [int(value) for value in returned] == [a, b, a, b, c, d, operand]
    assert words.tolist() == [a | operand, b & operand, (c + operand) % 2**64, operand]


def test_store():
    words = np.zeros(2, np.uint64)
    publish(words, np.uint64(2**64 - 1))
    assert words.tolist() == [2**64 - 1, 0]


def test_nothing_is_lost_between_threads():
    words = np.zeros(16, np.uint64)
    threads = [threading.Thread(target=add_many, args=(words, 50_000)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (words[0], words[8]) == (200_000, 200_000)


@settings(max_examples=50, deadline=None)  # the first call compiles
@given(
    size=st.sampled_from([1, 64, 65, 5000, 300_000]),
    calls=st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 299_999)), max_size=30),
)
def test_bitsets_are_sets(size, calls):
    sets, model = _bitset.make_bitsets(2, size), (set(), set())
    for add, s, i in calls:
        (_bitset.add if add else _bitset.discard)(sets, s, i % size)
        (model[s].add if add else model[s].discard)(i % size)
        assert _bitset.lowest(sets, s) == min(model[s], default=-1)
        assert _bitset.is_empty(sets, s) == (not model[s])
    _bitset.clear(sets)
    assert _bitset.is_empty(sets, 0)


@pytest.mark.parametrize("size", [1, 64, 300_000])
def test_nbytes_of_bitsets_is_what_they_occupy(size):
    sets = _bitset.make_bitsets(3, size)
    assert _bitset.nbytes(sets) == sum(level.nbytes for level in sets) >= 3 * size / 8
