"""A short run of the fuzzer of steps that the device drives. It would find blocks that change hands too early."""

import numpy as np
import pytest

from allocators import IntegrityError
from fuzz import device_steps
from kvtoolkit.cache.supply import Supply
from kvtoolkit.cuda import check
from tests.kvtoolkit.cache.host_device import use_host
from tests.kvtoolkit.cuda.host_kernels import needs_compiler

PLACES = [pytest.param(True, marks=needs_compiler), pytest.param(False, marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES, ids=["host", "gpu"])
def on_host(request, monkeypatch):
    monkeypatch.setattr(check, "CANARY", True)
    if request.param:
        use_host(monkeypatch)
    return request.param


@pytest.mark.parametrize("config", device_steps.CONFIGS, ids=str)
def test_nothing_is_lost_or_read_that_is_another_ones(config, on_host):
    program = device_steps.run(config, 600, 3, on_host)
    assert program.num_stalls
    assert program.num_finished


@pytest.mark.parametrize("config", device_steps.CONFIGS[:2], ids=str)
def test_blocks_that_are_granted_before_they_are_free_are_found(config, on_host, monkeypatch):
    """The control: a block that the device may take is still that of a sequence."""
    program = device_steps.Program(config, np.random.default_rng(5), on_host)
    lists = Supply.lists

    def too_early(supply):
        listed, counts = lists(supply)
        table = supply._group.table
        for size in range(4):
            held = table.entries[(table.info[:, 1] > 0) & (table.entries[:, 0] >= 0), 0]
            if counts[size] and len(held):
                listed[size, 0] = int(held[-1]) & 0xFFFFFF
        return listed, counts

    monkeypatch.setattr(Supply, "lists", too_early)
    with pytest.raises(IntegrityError, match="canary: row"):
        many_turns(program)


def many_turns(program):
    for _ in range(200):
        program.open_some()
        program.turn()
