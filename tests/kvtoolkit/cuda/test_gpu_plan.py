"""The plan of a decode step, made on a GPU: where ranges begin and end."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtoolkit import cuda
from kvtoolkit.cuda.plan import make_plan, plan_nbytes

pytestmark = pytest.mark.gpu

MIN_STEPS = 8


def plan_of(lengths, num_ranges, num_late=0, num_even=None, only_ragged=True):
    """``ranges, sequences`` as the kernel wrote them."""
    import torch

    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    memory = torch.full((plan_nbytes(len(lengths), num_ranges),), 0x55, dtype=torch.uint8, device="cuda")
    even = num_ranges - num_late if num_even is None else num_even
    operand = cuda.device_operand(seq_lens, "seq_lens")
    stream = torch.cuda.current_stream().cuda_stream
    made = make_plan(memory.data_ptr(), operand, None, num_ranges, num_late, even, only_ragged, -1, 0, 8, False)
    made.launch.run(stream)
    words = memory.cpu().numpy().view(np.int32)
    ranges, sequences = np.split(words, [4 * (num_ranges + 1)])
    return ranges.reshape(-1, 4), sequences.reshape(-1, 2)


def check(lengths, ranges, sequences):
    """Every step of every sequence is in one range, no piece is too short, and the sequences' pieces are told right."""
    steps = -(-np.asarray(lengths) // 16)
    places = [(int(sequence), int(step)) for sequence, step in ranges[:, :2]]
    assert places[0] == (0, 0)
    assert places[-1] == (len(lengths), 0)
    assert places == sorted(places)
    for (sequence, step), length in zip(places, ranges[:, 2], strict=True):
        assert length == (lengths[sequence] if sequence < len(lengths) else 0)
        if step:
            assert MIN_STEPS <= step <= steps[sequence] - MIN_STEPS
    for b, (first, count) in enumerate(sequences):
        cuts = sum(sequence == b and step > 0 for sequence, step in places)
        assert count == cuts + 1
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
