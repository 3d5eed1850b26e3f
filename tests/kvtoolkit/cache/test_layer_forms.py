"""When a layer of a step repeats the prepared call of one before it. Needs no GPU: the device is faked."""

import numpy as np
import pytest

from kvtoolkit import ArgumentError
from tests.kvtoolkit.cache.test_shared_hints import DIM, HEADS, FakeBackend, device, make

__all__ = ["device"]  # a fixture


class PreparingBackend(FakeBackend):
    """Prepares a call for each layer that it attends to in full, and remembers which calls were repeated."""

    def __init__(self):
        super().__init__()
        self.repeated = []

    def attend(self, call, hints):
        super().attend(call, hints)
        return len(self.hints)

    def attend_prepared(self, prepared, q, k_cache, v_cache, out, **others):
        self.repeated.append(prepared)


@pytest.fixture
def step(device):
    cache = make(num_layers=6)
    cache._arenas.backend = PreparingBackend()
    ids, _ = cache.open([[]] * 3)
    with cache.begin_step(ids, 1) as step:
        new = np.zeros((3, HEADS, DIM), np.float16)
        for layer in range(6):
            step.append(layer, new, new)
        yield step


def attend(step, layer, **options):
    return step.attend(layer, np.zeros((3, HEADS, DIM), np.float16), **options)


def test_each_of_several_kinds_of_layers_is_prepared_once(step):
    backend = step._cache._arenas.backend
    for layer in range(6):
        attend(step, layer, window_size=(64, 0) if layer % 2 else (-1, -1))
    assert len(backend.hints) == 2
    assert backend.repeated == [1, 2, 1, 2]


def test_an_output_in_place_of_the_queries_is_a_form_of_its_own(step):
    backend = step._cache._arenas.backend
    q, out = np.zeros((2, 3, HEADS, DIM), np.float16)
    step.attend(0, q, out=out)
    step.attend(1, q, out=q)
    step.attend(2, q, out=out)
    step.attend(3, q, out=q)
    assert len(backend.hints) == 2
    assert backend.repeated == [1, 2]


def test_a_run_that_is_captured_repeats_nothing_of_an_eager_one(step, device):
    backend = step._cache._arenas.backend
    for layer in range(3):
        attend(step, layer)
    assert (len(backend.hints), backend.repeated) == (1, [1, 1])
    attend(step, 0)  # once more, eagerly
    assert backend.repeated == [1, 1, 1]
    device.is_capturing = True
    for layer in range(3):
        attend(step, layer)
    assert len(backend.hints) == 2
    assert backend.hints[-1].max_seq_len is None
    assert backend.repeated == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("layer", [-1, 6, 1.5])
def test_a_layer_that_is_not_there_is_named_whichever_way_it_is_asked_for(step, layer):
    step._cache._arenas.backend.append = lambda *_: "prepared"
    new = np.zeros((3, HEADS, DIM), np.float16)
    step.append(0, new, new)
    attend(step, 0)
    with pytest.raises(ArgumentError, match="layer: expected 0 to 5"):
        step.attend_prepared(layer, 0, 0, 0, 64)
