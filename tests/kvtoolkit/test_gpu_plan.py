"""The plan of a decode step, made on a GPU: where ranges begin and end."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtoolkit import cuda
from kvtoolkit.cuda.plan import make_plan, plan_nbytes
from tests.kvtoolkit.gpu_cases import to_device

pytestmark = pytest.mark.gpu

MIN_STEPS = 8


def plan_of(lengths, num_ranges, num_late=0, num_even=None, only_ragged=True, counts=None, left=-1):
    """``ranges, sequences`` as the kernel wrote them; with ``counts`` of queries prompts are another kernel's."""
    import torch

    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    bounds = None
    if counts is not None:
        bounds = cuda.device_operand(to_device(np.cumsum([0, *counts]).astype(np.int32), ""), "cu_seqlens_q")
    memory = torch.full((plan_nbytes(len(lengths), num_ranges),), 0x55, dtype=torch.uint8, device="cuda")
    even = num_ranges - num_late if num_even is None else num_even
    made = make_plan(
        memory.data_ptr(), cuda.device_operand(seq_lens, "seq_lens"), bounds, num_ranges, num_late, even, only_ragged,
        left, 0, counts is not None,
    )  # fmt: skip
    made.launch.run(torch.cuda.current_stream().cuda_stream)
    words = memory.cpu().numpy().view(np.int32)
    ranges, sequences = np.split(words, [4 * (num_ranges + 1)])
    return ranges.reshape(-1, 4), sequences.reshape(-1, 2)


def steps_of(lengths, counts=None, left=-1):
    """Steps of 16 tokens that each sequence has for the kernel that the plan is for."""
    steps = []
    for b, n in enumerate(lengths):
        queries = 1 if counts is None else counts[b]
        begin = 0 if left < 0 else max(0, n - queries - left) // 16
        steps.append(max(0, -(-n // 16) - begin) if 0 < queries <= 8 else 0)
    return np.array(steps)


def check(lengths, ranges, sequences, steps=None):
    """Every step of every sequence is in one range, no piece is too short, and the sequences' pieces are told right."""
    steps = steps_of(lengths) if steps is None else steps
    places = [(int(sequence), int(step)) for sequence, step in ranges[:, :2]]
    assert places[0] == (0, 0)
    assert places[-1] == (len(lengths), 0)
    assert places == sorted(places)
    for (sequence, step), length in zip(places, ranges[:, 2], strict=True):
        assert length == (lengths[sequence] if sequence < len(lengths) else 0)
        if step:
            assert MIN_STEPS <= step <= steps[sequence] - MIN_STEPS
    cuts = Counter(sequence for sequence, step in places if step > 0)
    for b, (first, count) in enumerate(sequences):
        assert count == cuts[b] + 1
        assert places[first] <= (b, 0)
        assert places[first + 1] > (b, 0)


def used(ranges):
    """Which ranges hold something."""
    return [i for i in range(len(ranges) - 1) if tuple(ranges[i, :2]) != tuple(ranges[i + 1, :2])]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=80),
    num_early=st.integers(1, 200),
    has_late=st.booleans(),
    only_ragged=st.booleans(),
)
def test_every_step_is_in_one_range(lengths, num_early, has_late, only_ragged):
    num_late = num_early if has_late else 0
    check(lengths, *plan_of(lengths, num_early + num_late, num_late, only_ragged=only_ragged))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.sampled_from([1, 5, 70, 1025, 2600]),
    left=st.sampled_from([-1, 0, 700]),
    has_late=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_windows_prompts_and_more_sequences_than_threads(batch, left, has_late, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 3000, batch).tolist()
    counts = rng.choice([0, 1, 1, 1, 8, 9, 500], batch).tolist()
    num_late = 50 if has_late else 0
    steps = steps_of(lengths, counts, left)
    check(lengths, *plan_of(lengths, 50 + num_late, num_late, counts=counts, left=left), steps)


def test_equal_sequences_beside_prompts_are_not_ragged():
    counts = [1] * 32 + [100] * 96
    ranges, sequences = plan_of([8192] * 128, 66, 33, 32, counts=counts)
    check([8192] * 128, ranges, sequences, steps_of([8192] * 128, counts))
    assert max(used(ranges)) < 33


def test_equal_sequences_are_not_cut_and_leave_late_ranges_empty():
    for num_late in (0, 33):
        ranges, sequences = plan_of([2048] * 64, 33 + num_late, num_late, 32)
        check([2048] * 64, ranges, sequences)
        assert used(ranges) == list(range(32))
        assert (sequences[:, 1] == 1).all()


def test_equal_sequences_have_late_ranges_where_they_may_be_cut():
    ranges, sequences = plan_of([4096] * 64, 66, 33, only_ragged=False)
    check([4096] * 64, ranges, sequences)
    assert used(ranges) == list(range(66))


def test_equal_long_sequences_use_every_range():
    ranges, sequences = plan_of([32768] * 32, 66, 33, 32)
    check([32768] * 32, ranges, sequences)
    assert used(ranges) == list(range(33))


def test_a_ragged_batch_has_its_last_eighth_in_late_ranges():
    lengths = [16384, 1000, 3000, 500, 8192, 64, 5000, 2000] * 8
    ranges, sequences = plan_of(lengths, 66, 33)
    check(lengths, ranges, sequences)
    assert used(ranges) == list(range(66))
    costs = -(-np.array(lengths) // 16) + 12
    sequence, step = ranges[33, :2]
    before = costs[:sequence].sum() + (step + 12 if step else 0)
    assert abs(before / costs.sum() - 7 / 8) < 0.01


def test_a_ragged_batch_too_small_for_late_ranges_has_none():
    lengths = [900, 10, 200, 30] * 8
    ranges, sequences = plan_of(lengths, 66, 33)
    check(lengths, ranges, sequences)
    assert max(used(ranges)) < 33
