"""Which kernels a call on a GPU launches and in which order: host code, so no GPU is needed."""

from typing import Any

import pytest

from kvtoolkit import cuda
from kvtoolkit.arrays.call import Hints, QuantizedTiers, attention_call
from kvtoolkit.arrays.host import Operand
from kvtoolkit.cuda import attention, expand, launching, memory, plan, prefill, prompt, schedule, units
from kvtoolkit.cuda.params import PARAMS, TIERED_PARAMS
from kvtoolkit.cuda.workspace import Workspace

Q_WORD, KEYS_WORD, MASSES_WORD = map(PARAMS.word, ("q", "k_cache", "masses"))
TIERS_WORD = TIERED_PARAMS.word("warm")


class Recorded:
    """Stands for a kernel and for its launches."""

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self._log = name, log

    def prepare(self, grid: Any, threads: int, parameters: bytes, smem_nbytes: int) -> Any:
        launch = Recorded(self.name, self._log)
        launch.words = [int.from_bytes(parameters[i : i + 8], "little") for i in range(0, len(parameters), 8)]
        return launch

    def run(self, stream: int, dependent: bool) -> None:
        self._log.append((self.name, stream, dependent, list(self.words)))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches, on a device like an H200."""
    launches: list[Any] = []
    for module in (attention, expand, plan, prefill, prompt, units):
        monkeypatch.setattr(module, "load_spec", lambda spec, device: Recorded(spec.name, launches))
    for module in (schedule, prefill):
        monkeypatch.setattr(module, "smem_limit", lambda device: 232448)
        monkeypatch.setattr(module, "num_sms", lambda device: 132)
    monkeypatch.setattr(schedule, "arch_of", lambda device: 90)
    monkeypatch.setattr(prompt, "arch_of", lambda device: 80)  # its calls have tests of their own
    scratch = Workspace(1 << 30, 2 << 30, 3 << 30, None, ())
    for module in (memory, prefill):
        monkeypatch.setattr(module, "workspace", lambda device, stream, sizes: scratch)
    monkeypatch.setattr(attention, "_clear", lambda masses, stream: launches.append(("clear", stream)))
    schedule._schedule.cache_clear()
    launching.load_spec.cache_clear()
    return launches


_next_address = iter(range(1 << 20, 1 << 40, 1 << 20))


def array(*shape: int, dtype: str = "float16") -> Operand:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return Operand(next(_next_address), shape, tuple(strides), dtype, None, True, 0)


def make(batch: int = 4, num_queries: int = 1, entries: bool = True, tiers: bool = False, **options: Any) -> Any:
    q, cache = array(batch * num_queries, 8, 128), array(99, 2, 8, 128)
    table, starts, lengths = (
        array(batch, 12, dtype="int32"),
        array(batch, 12, dtype="int32"),
        array(batch, dtype="int32"),
    )
    if num_queries > 1:
        options["cu_seqlens_q"] = array(batch + 1, dtype="int32")
    if tiers:
        options["tiers"] = QuantizedTiers(array(4, 2, 9, dtype="uint8"), array(4, 2, 9, dtype="uint8"), (0, 64, 128))
    return attention_call(
        q, cache, array(99, 2, 8, 128), table, starts if entries else None, lengths, out=array(*q.shape), **options
    )


def names(log: list[Any]) -> list[str]:
    return [launch[0] for launch in log]


@pytest.mark.parametrize(
    ("call", "hints", "kernels"),
    [
        ({"entries": False}, Hints(), ["kvt_plan", "kvt_decode"]),
        ({}, Hints(), ["kvt_expand", "kvt_plan", "kvt_decode"]),
        ({"num_splits": 3}, Hints(), ["kvt_expand", "kvt_decode"]),
        ({"batch": 1, "entries": False}, Hints(), ["kvt_decode"]),
        ({"tiers": True}, Hints(), ["kvt_units", "kvt_plan", "kvt_tiered"]),
        ({"num_queries": 9}, Hints(), ["kvt_plan_prompts", "kvt_expand", "kvt_plan", "kvt_decode", "kvt_prefill"]),
        ({"num_queries": 9}, Hints((9, 9)), ["kvt_plan_prompts", "kvt_expand", "kvt_prefill"]),
        ({"num_queries": 5}, Hints((5, 5)), ["kvt_plan_prompts", "kvt_expand", "kvt_prefill"]),
        ({"num_queries": 5, "num_splits": 2}, Hints((5, 5)), ["kvt_expand", "kvt_decode"]),
        ({"num_queries": 9, "num_splits": 2}, Hints((9, 9)), ["kvt_plan_prompts", "kvt_expand", "kvt_prefill"]),
        ({"num_queries": 3}, Hints((3, 3)), ["kvt_expand", "kvt_plan", "kvt_decode"]),
        ({"num_queries": 9, "tiers": True}, Hints((9, 9)), ["kvt_units", "kvt_plan", "kvt_tiered"]),
        ({"batch": 1, "num_queries": 20, "entries": False}, Hints(), ["kvt_plan_prompts", "kvt_prefill"]),
    ],
)
def test_a_call_takes_the_kernels_that_its_rows_need(log, call, hints, kernels):
    cuda.attend(make(**call), hints, stream=7)
    assert names(log) == kernels
    assert {launch[1] for launch in log} == {7}


@pytest.mark.parametrize("counts", [None, (0, 1), (1, 1)])
def test_bounds_of_a_decode_batch_cost_nothing_where_the_host_knows(log, counts):
    call = make(batch=16)
    cuda.attend(call)
    plain = log[:]
    log.clear()
    cuda.attend(call._replace(cu_seqlens_q=array(17, dtype="int32")), Hints(counts))
    decode = ["kvt_expand", "kvt_plan", "kvt_decode"]
    assert names(log) == (decode if counts else ["kvt_plan_prompts", *decode, "kvt_prefill"])
    assert (log == plain) == (counts == (1, 1))


def test_masses_are_cleared_where_a_row_may_have_no_query(log):
    call = make(num_queries=2, tiers=True, block_mass=array(4, 16, 2, dtype="float32"))
    cuda.attend(call, Hints((2, 2)))
    assert "clear" not in names(log)
    cuda.attend(call, Hints((0, 2)))
    assert names(log)[3:] == ["clear", "kvt_units", "kvt_plan", "kvt_tiered"]


def test_a_batch_without_tokens_launches_nothing(log):
    prepared = cuda.attend(make(batch=0))
    assert prepared is not None
    cuda.attend_prepared(prepared, 1, 2, 3, 4)
    assert log == []


def test_nothing_is_prepared_where_the_plan_is_in_scratch_memory(log):
    assert cuda.attend(make()) is None
    assert cuda.attend(make(batch=1, entries=False)) is not None


def test_a_prepared_call_changes_addresses_and_nothing_else(log):
    call = make(batch=1, entries=False)
    prepared = cuda.attend(call, stream=7)
    cuda.attend_prepared(prepared, 111, 222, 333, 444, stream=8, overlaps=True)
    (_, _, _, first), (name, stream, dependent, second) = log
    assert (name, stream, dependent) == ("kvt_decode", 8, True)
    assert first[Q_WORD : Q_WORD + 2] == [call.q.address, call.out.address]
    assert first[KEYS_WORD : KEYS_WORD + 2] == [call.k_cache.address, call.v_cache.address]
    assert second[Q_WORD : Q_WORD + 2] == [111, 444]
    assert second[KEYS_WORD : KEYS_WORD + 2] == [222, 333]
    changed = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
    assert changed == [Q_WORD, Q_WORD + 1, KEYS_WORD, KEYS_WORD + 1]


def test_tiers_and_masses_are_where_a_prepared_call_changes_them(log):
    call = make(tiers=True, block_mass=array(4, 16, 2, dtype="float32"))
    cuda.attend(call)
    words = log[-1][3]
    assert words[MASSES_WORD] == call.block_mass.address
    assert words[TIERS_WORD : TIERS_WORD + 2] == [call.tiers.warm.address, call.tiers.cold.address]
