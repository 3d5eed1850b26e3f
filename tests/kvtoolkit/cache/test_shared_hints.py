"""The hint that rows have a beginning in common reaches the backend of a device. Needs no GPU: the device is faked."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from kvtoolkit import CacheConfig, GraphStep, KVCache
from kvtoolkit.arrays import host
from kvtoolkit.arrays.call import Sharing
from kvtoolkit.cache import graph
from kvtoolkit.cache import step as step_module
from kvtoolkit.cache.layers import layers
from kvtoolkit.cache.state import shared_reads
from kvtoolkit.cache.state.cache_group import make_shared_reads
from kvtoolkit.cache.storage.upload import DeviceTables
from kvtoolkit.runtime import streams
from tests.kvtoolkit.cache.test_tiers_cache import TIERS

HEADS, DIM = 8, 128
SHAPE = {"num_layers": 2, "num_kv_heads": HEADS, "head_dim": DIM, "dtype": "float16", "num_tokens": 4096}
NEEDED = shared_reads.LEAST_NBYTES // (2 * 2 * HEADS * DIM)  # tokens, about


class FakeBackend:
    """Takes calls instead of a GPU, whose arrays are NumPy's."""

    name = "cuda"
    describe = staticmethod(host.operand)

    def __init__(self):
        self.hints = []

    def can_overlap(self, device):
        return False

    def empty(self, shape, dtype, like, device):
        return host.empty(shape, dtype, like)

    def append(self, *arguments):
        return None

    def attend(self, call, hints):
        self.hints.append(hints)


class FakeUpload:
    """Copies to the fake device, and remembers what."""

    def __init__(self):
        self.orders = []

    def all(self, tables):
        return [DeviceTables(*(array.copy() for array in one)) for one in tables]

    def one(self, array):
        self.orders.append(array.copy())
        return self.orders[-1]


@pytest.fixture
def device(monkeypatch):
    """The current stream of the fake device, and whether it is being captured."""
    state = SimpleNamespace(stream=1, is_capturing=False, copies=[])
    for module in (step_module, layers):
        monkeypatch.setattr(module, "current_stream", lambda device: state.stream)
        monkeypatch.setattr(module, "is_capturing", lambda stream: state.is_capturing)

    @contextlib.contextmanager
    def cupy(device):
        yield np

    def copy(ring, cupy, moves):
        state.copies.append(len(moves))
        for source, target in moves:
            target[tuple(map(slice, source.shape))] = source

    monkeypatch.setattr(streams, "cupy_on_current_stream", cupy)
    monkeypatch.setattr(graph.PinnedRing, "copy", copy)
    return state


def make(**fields):
    """A cache whose keys and values are on the host, and that takes them to be on device 0."""
    cache = KVCache(CacheConfig(**{**SHAPE, **fields}))
    object.__setattr__(cache.config, "backend", "cuda")
    cache._group.shared_reads = make_shared_reads(cache.config, cache._group.table)
    cache._arenas.backend, cache._arenas.device, cache._upload = FakeBackend(), 0, FakeUpload()
    return cache


def families(cache, count=2, members=8, length=600):
    """``[count, members]`` sequences; those of a family begin with the same tokens."""
    parents, _ = cache.open([[]] * count)
    cache.end_step(cache.begin_step(parents, length))
    return np.concatenate([parents[:, None], cache.fork(parents, members - 1)], axis=1)


def sharing_of(cache, ids, count=1):
    """What a step of these sequences says to the backend."""
    with cache.begin_step(ids, count) as step:
        run(step, len(step.slot_mapping))
        cache.end_step(step)
    return cache._arenas.backend.hints[-1].sharing


def run(step, num_tokens):
    new = np.zeros((num_tokens, HEADS, DIM), np.float16)
    for layer in range(2):
        step.append(layer, new, new)
        step.attend(layer, new)


def test_rows_side_by_side_need_no_order(device):
    cache = make()
    ids = families(cache)
    assert NEEDED < 14 * 600
    assert sharing_of(cache, ids.ravel()) == Sharing()
    assert cache._upload.orders == []


def test_interleaved_rows_get_an_order(device):
    cache = make()
    ids = families(cache)
    order = np.asarray(sharing_of(cache, ids.T.ravel()).order.owner)
    assert order.tolist() == [*range(0, 16, 2), *range(1, 16, 2)]
    assert order.dtype == np.int32


def test_an_order_is_uploaded_once_on_every_stream(device):
    cache = make()
    ids = families(cache).T.ravel()
    orders = [sharing_of(cache, ids).order for _ in range(20)]
    assert len(cache._upload.orders) == 1
    assert {order.address for order in orders} == {orders[0].address}
    device.stream = 2  # which does not wait for the other one
    second = sharing_of(cache, ids).order
    assert second.address != orders[0].address
    for device.stream, first in ((1, orders[0]), (2, second)):
        assert sharing_of(cache, ids).order.address == first.address
    assert len(cache._upload.orders) == 2
    cache.reorder(ids, np.r_[2, 1:16])
    assert sharing_of(cache, ids).order.address not in (orders[0].address, second.address)


def test_several_new_tokens_a_row_get_the_hint_too(device):
    cache = make()
    ids = families(cache).ravel()
    assert sharing_of(cache, ids, 5) == Sharing()


@pytest.mark.parametrize("count", [0, 9])
def test_rows_that_share_nothing_are_set_apart(device, count):
    cache = make()
    ids = families(cache, length=640).ravel()
    counts = np.ones(16, int)
    counts[3] = count
    order = np.asarray(sharing_of(cache, ids, counts).order.owner)
    assert order.tolist() == [0, 1, 2, 4, 5, 6, 7, 3, *range(8, 16)]
    assert sharing_of(cache, ids) == Sharing()


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"shared_reads": False}, {}),
        ({"tiers": TIERS, "num_tokens": 1 << 14}, {"count": 8, "members": 3}),
        ({}, {"members": 4}),
        ({}, {"count": 16, "members": 1, "length": 200}),
    ],
    ids=["off", "two thirds of tiers", "too little", "nothing"],
)
def test_no_hint_where_it_is_not_wanted_or_does_not_pay(device, fields, shape):
    cache = make(**fields)
    assert sharing_of(cache, families(cache, **shape).ravel()) is None


@pytest.mark.parametrize(("members", "least", "hint"), [(5, 1, None), (7, 1, Sharing()), (7, 1 << 30, None)])
def test_tiers_get_the_hint_where_more_is_saved(device, monkeypatch, members, least, hint):
    monkeypatch.setattr(shared_reads, "LEAST_NBYTES_OF_CODES", least)
    cache = make(tiers=TIERS, num_tokens=1 << 15)
    ids = families(cache, count=4, members=members, length=800).ravel()
    assert 4 * (members - 1) * 800 > NEEDED
    assert sharing_of(cache, ids) == hint


def test_no_hint_for_very_many_rows(device, monkeypatch):
    cache = make()
    ids = families(cache).ravel()
    monkeypatch.setattr(step_module, "MAX_ROWS", 15)
    assert sharing_of(cache, ids) is None
    monkeypatch.setattr(step_module, "MAX_ROWS", 16)
    assert sharing_of(cache, ids) is not None


@pytest.mark.parametrize("fields", [{"backend": "cpu"}, {"backend": "numba"}])
def test_other_backends_never_look(fields):
    cache = KVCache(CacheConfig(**SHAPE))
    object.__setattr__(cache.config, "backend", fields["backend"])
    assert make_shared_reads(cache.config, cache._group.table) is None


@pytest.mark.parametrize("is_known", [False, True])
def test_no_hint_while_a_graph_is_captured(device, is_known):
    cache = make()
    ids = families(cache)
    for rows in (ids.ravel(), ids.T.ravel()):
        device.is_capturing = False
        if is_known:
            assert sharing_of(cache, rows) is not None
        uploads = len(cache._upload.orders)
        device.is_capturing = True
        assert sharing_of(cache, rows) is None
        assert len(cache._upload.orders) == uploads


def test_a_step_begun_before_a_capture_gives_no_hint_in_it(device):
    cache = make()
    ids = families(cache).ravel()
    with cache.begin_step(ids, 1) as step:
        run(step, 16)
        assert cache._arenas.backend.hints[-1].sharing == Sharing()
        device.is_capturing = True
        step.attend(0, np.zeros((16, HEADS, DIM), np.float16))
        assert cache._arenas.backend.hints[-1].sharing is None


# -- captured steps --------------------------------------------------------------------------------------------------


def load(cache, fixed, ids):
    with cache.begin_step(ids, 1) as step:
        fixed.load(step)


def test_a_graph_step_has_its_order_at_a_fixed_place(device):
    cache = make()
    ids = families(cache)
    fixed = GraphStep(cache, 20, shared_reads=True)
    load(cache, fixed, ids.T.ravel())
    with cache.begin_step(ids.T.ravel(), 1) as step:
        fixed.load(step)
        run(fixed.begin(), 20)
    sharing = cache._arenas.backend.hints[-1].sharing
    order = np.asarray(sharing.order.owner)
    assert order.tolist() == [*range(0, 16, 2), *range(1, 16, 2), 16, 17, 18, 19]
    assert device.copies == [5, 4]  # the second time the order is there already
    load(cache, fixed, ids.ravel()[:5])
    assert order.tolist() == list(range(20))
    load(cache, fixed, ids.T.ravel()[:3])
    assert order.tolist() == [0, 2, 1, *range(3, 20)]
    cache.reorder(ids.T.ravel()[:3], [0, 0, 1])
    load(cache, fixed, ids.T.ravel()[:3])
    assert order.tolist() == list(range(20))


def test_an_order_that_was_not_copied_is_copied_by_the_next_load(device, monkeypatch):
    cache = make()
    ids = families(cache).T.ravel()
    fixed = GraphStep(cache, 16, shared_reads=True)
    load(cache, fixed, ids[:5])

    def fail(*_):
        raise RuntimeError("no copy")

    with monkeypatch.context() as patched:
        patched.setattr(graph.PinnedRing, "copy", fail)
        with pytest.raises(RuntimeError, match="no copy"):
            load(cache, fixed, ids)
    load(cache, fixed, ids[:5])
    assert device.copies == [5, 5]


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({}, {"shared_reads": False}),
        ({"shared_reads": False}, {"shared_reads": True}),
    ],
)
def test_a_graph_step_looks_for_nothing_unless_told_to(device, fields, options):
    cache = make(**fields)
    ids = families(cache).ravel()
    fixed = GraphStep(cache, 16, **options)
    with cache.begin_step(ids, 1) as step:
        fixed.load(step)
        run(fixed.begin(), 16)
    assert device.copies == [4]
    assert cache._arenas.backend.hints[-1].sharing is None


def test_a_graph_step_of_very_many_rows_looks_for_nothing(device):
    cache = make()
    assert GraphStep(cache, 1025, shared_reads=True).begin()._calls._hints.sharing is None
    assert GraphStep(cache, 1024, shared_reads=True).begin()._calls._hints.sharing is not None
