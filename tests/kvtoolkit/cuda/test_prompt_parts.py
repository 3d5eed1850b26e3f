"""The batches of the prompt kernel's tests are cut as these say, on a GPU of 132 SMs. The plan runs on the host."""

import numpy as np
import pytest

from kvtoolkit.cuda import prompt
from tests.kvtoolkit.attention.prompt_parts import RAGGED, last_wave, ragged
from tests.kvtoolkit.attention.test_gpu_prompt import SHAPES, SHORT, TWO_HEADS
from tests.kvtoolkit.cuda.host_kernels import needs_compiler, on_the_host
from tests.kvtoolkit.cuda.test_mixtures import items_of

pytestmark = needs_compiler


@pytest.fixture
def host(monkeypatch):
    """Plans are made on the host."""
    on_the_host(monkeypatch, prompt)


def parts_of(case):
    """Parts of each row's items."""
    heads, head_dim = case.caches[0].shape[1], case.q.shape[2]
    group = case.q.shape[1] // heads
    items, _ = items_of(case.new, case.lengths, group, heads=heads, sms=132, head_dim=head_dim)
    return [np.unique(items[items[:, 3] == row, 6] >> 16).tolist() for row in range(len(case.rows))]


def test_ragged_batches_are_cut_by_length(host):
    assert parts_of(ragged()) == [[parts] for parts in RAGGED.values()]


@pytest.mark.parametrize("shape", [{}, TWO_HEADS, *SHAPES], ids=str)
def test_short_batches_are_cut_too(host, shape):
    assert parts_of(ragged(SHORT, **shape)) == [[RAGGED[tiles]] for tiles in SHORT]


def test_the_sanitizers_batch_is_cut(host):
    assert parts_of(ragged((36, 20, 1), (9, 5, 6))) == [[9], [5], [1]]


@pytest.mark.parametrize(("tiles", "parts"), [(36, 9), (16, 4)])
def test_of_even_rows_the_last_wave_is_cut(host, tiles, parts):
    assert parts_of(last_wave(tiles)) == [[parts], *[[1]] * 66]
