"""Sessions that sleep: traces are read as they are, and what is found of a prompt is what was worked out by hand."""

import gzip
import json

import numpy as np
import pytest

from kvtoolkit import ArgumentError
from kvtoolkit.bench.session_blocks import belady, known_pauses, lru
from kvtoolkit.bench.session_replay import POLICIES, Costs, Policy, Replay
from kvtoolkit.bench.session_schedule import LAST, Arrival, Schedule, schedule
from kvtoolkit.bench.session_traces import Request, Session, read_sessions
from kvtoolkit.bench.sessions import Row, with_gains
from kvtoolkit.commands import cli

HEAD = {"trace": "a", "block_size": 64}
COSTS = Costs(token_nbytes=1, link=64.0 * 8, prefill=64.0)  # 8 blocks a second move, and one is computed


def in_turns(turns, length=2, num_out=0):
    """Sessions that send a prompt of the same ``length`` blocks whenever it is their turn, one in every 10 s."""
    arrivals = []
    for i, which in enumerate(turns):
        blocks = np.arange(length, dtype=np.int32) + length * which
        later = [j for j in range(i + 1, len(turns)) if turns[j] == which]
        arrivals.append(Arrival(10.0 * i, which, blocks, num_out, 0.0, later[0] if later else LAST))
    return Schedule(tuple(arrivals), length * (max(turns) + 1), 0)


def random_sessions(num_sessions, num_requests, seed):
    """Sessions whose prompts grow, and sometimes begin anew after some of their blocks."""
    random, rows, first_id = np.random.default_rng(seed), [], 0
    for which in range(num_sessions):
        blocks = np.empty(0, np.int32)
        for _ in range(num_requests):
            keep, new = random.integers(len(blocks) // 2, len(blocks) + 1), random.integers(1, 9)
            blocks = np.concatenate([blocks[:keep][:40], np.arange(first_id, first_id + new, dtype=np.int32)])
            first_id += int(new)
            rows.append((float(random.random() * 1000), which, blocks, int(random.integers(0, 3)), 1.0))
    rows.sort(key=lambda row: row[0])
    return Schedule(tuple(Arrival(*row, following=LAST) for row in rows), first_id, 0)


# -- reading -----------------------------------------------------------------------------------------------------------


def write(path, rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_trace_is_read_as_it_is(name, tmp_path):
    rows = [HEAD, [0, 0.0, 200, 70, 0, 2.5, 0, [1, 2, 9, 1]], [0, 8, 150, 5, 1, 1, 1, [4, 1]], HEAD | {"trace": "b"}]
    path = write(tmp_path / name, [*rows, [3, 1.5, 63, 1, 0, 0, 0, []]])
    first, second = read_sessions(path)
    assert (first.name, second.name, first.num_ids, second.num_ids) == ("a", "b", 10, 0)
    assert [ids.tolist() for ids in first.blocks()] == [[1, 2, 9], [1, 4]]
    assert [ids.tolist() for ids in second.blocks()] == [[]]
    assert first.requests[0] == Request(0, 0.0, 200, 70, 2.5, 0, ((1, 2), (9, 1)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected sessions, got an empty file"),
        ([HEAD], "at its end: expected requests of session a, got none"),
        ([HEAD, HEAD], "line 2: expected requests of session a, got none"),
        ([[0, 0, 64, 1, 0, 0, 0, [1, 1]]], "line 1: expected the line of a session first"),
        ([HEAD, "[0, 1"], "line 2: expected JSON, got '.0, 1'"),
        ([HEAD, "7"], "line 2: expected .stream"),
        ([{"trace": "a", "block_size": 16}], "line 1: expected .* 'block_size' of 64"),
        ([HEAD, [0, 0, 64, 1, 0, 0, 0]], "line 2: expected .stream"),
        ([HEAD, [0, 0, -64, 1, 0, 0, 0, [1, 1]]], "line 2: expected stream, in, out and keep"),
        ([HEAD, [0, "now", 64, 1, 0, 0, 0, [1, 1]]], "line 2: expected t, think_s and api_s"),
        ([HEAD, "[0, NaN, 64, 1, 0, 0, 0, [1, 1]]"], "line 2: expected t, think_s and api_s"),
        ([HEAD, "[0, Infinity, 64, 1, 0, 0, 0, [1, 1]]"], "line 2: expected t, think_s and api_s"),
        ([HEAD, [0, 0, 64, 1, 0, 0, 0, [1]]], "line 2: expected new to be pairs"),
        ([HEAD, [0, 0, 64, 1, 0, 0, 0, [1, 2]]], "line 2: expected 1 ids for 64 tokens, got 2"),
        ([HEAD, [0, 0, 64, 1, 0, 0, 1, []]], "line 2: expected keep to be at most 0"),
        (
            [HEAD, [0, 5, 64, 1, 0, 0, 0, [1, 1]], [1, 0, 64, 1, 0, 0, 0, [9, 1]], [0, 4, 64, 1, 0, 0, 1, []]],
            "line 4: expected t of stream 0 not to fall, got 4.0 after 5.0",
        ),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_named_with_its_line(rows, message, tmp_path):
    path = write(tmp_path / "trace.jsonl", rows) if rows else str(tmp_path / "trace.jsonl")
    if not rows:
        (tmp_path / "trace.jsonl").write_bytes(b"")
    with pytest.raises(ArgumentError, match=f"^--trace: {path}: {message}") as caught:
        read_sessions(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    broken = tmp_path / "trace.jsonl.gz"
    broken.write_bytes(gzip.compress(json.dumps(HEAD).encode(), mtime=0)[:-9])
    for path in (broken, tmp_path / "gone"):
        with pytest.raises(ArgumentError, match=f"^--trace: {path} cannot be read: "):
            read_sessions(str(path))


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_sub_agents_begin_when_the_answer_before_them_is_complete():
    requests = [
        Request(0, 0.0, 64, 0, 3.0, 0, ((0, 1),)),
        Request(1, 0.0, 64, 0, 1.0, 0, ((7, 1),)),
        Request(1, 5.0, 64, 0, 1.0, 0, ((8, 1),)),
        Request(0, 6.0, 64, 0, 1.0, 1, ()),
    ]
    plan = schedule([Session("a", requests)], 1, 100.0, 100)
    begin = plan.arrivals[0].time
    assert [one.time - begin for one in plan.arrivals] == pytest.approx([0.0, 3.0, 6.0, 8.0])
    assert [one.stream for one in plan.arrivals] == [0, 1, 0, 1]
    assert [one.following for one in plan.arrivals] == [2, 3, LAST, LAST]


def test_sessions_share_no_ids_and_long_requests_are_left_out():
    one = Session("a", [Request(0, 0.0, 192, 0, 0.0, 0, ((0, 3),)), Request(0, 1.0, 320, 64, 0.0, 3, ((3, 2),))])
    plan = schedule([one, one], 2, 10.0, 6)
    assert (len(plan.arrivals), plan.num_left_out, plan.num_ids) == (2, 2, 10)
    assert not set(plan.arrivals[0].blocks.tolist()) & set(plan.arrivals[1].blocks.tolist())
    assert schedule([one, one], 2, 10.0, 7).num_left_out == 0


# -- blocks, by hand ---------------------------------------------------------------------------------------------------


def test_in_turns_lru_finds_nothing_and_the_optimum_every_second_prompt():
    plan = in_turns([0, 1, 2, 0, 1, 2])  # room for two of the three
    assert lru(plan, 5).tolist() == [0, 0, 0, 0, 0, 0]
    # session 1 makes way for 2 because it comes back last, then 0 for 1 because it never does
    assert belady(plan, 5).tolist() == known_pauses(plan, 5).tolist() == [0, 0, 0, 2, 0, 2]


def test_the_end_of_a_prompt_goes_before_its_beginning():
    plan = in_turns([0, 1, 2, 0, 1, 2])  # one block too few for all
    assert lru(plan, 6).tolist() == [0, 0, 0, 1, 1, 1]
    assert belady(plan, 6).tolist() == [0, 0, 0, 2, 1, 2]
    assert lru(plan, 7).tolist() == [0, 0, 0, 2, 2, 2]


def test_answers_take_room_until_something_else_needs_it():
    plan = in_turns([0, 1, 0, 1], num_out=1)
    assert lru(plan, 6).tolist() == [0, 0, 2, 2]  # the other's two blocks, and two, an answer and one for the tail
    assert lru(plan, 5).tolist() == [0, 0, 1, 1]


def test_what_a_session_does_not_use_again_goes_first_if_pauses_are_known():
    whole, beginning, other = (np.array(ids, np.int32) for ids in ([0, 1, 2], [0], [3, 4]))
    arrivals = [
        Arrival(1.0, 0, whole, 0, 0.0, 1),
        Arrival(3.0, 0, beginning, 0, 0.0, 4),
        Arrival(4.0, 1, other, 0, 0.0, 3),
        Arrival(5.0, 1, other, 0, 0.0, LAST),
        Arrival(6.0, 0, beginning, 0, 0.0, LAST),
    ]
    assert known_pauses(Schedule(tuple(arrivals), 5, 0), 4).tolist() == [0, 1, 0, 2, 1]


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_cache_finds_what_lru_does(seed):
    plan = random_sessions(6, 20, seed)
    for capacity in (56, 96, 160):
        replay = Replay(plan, POLICIES["device only"], capacity, 0, COSTS, allocator="paged", growth="fixed8")
        missing = replay.run().missing
        replay.cache.check_integrity()
        expected = lru(plan, capacity)
        assert [len(one.blocks) - n for one, n in zip(plan.arrivals, missing, strict=True)] == expected.tolist()
        assert 0 < expected.sum() < plan.num_blocks


def replayed(policy, turns=(0, 1, 0, 1), host_blocks=16):
    """Prompts of 8 blocks on a device that has room for one of them and its tail."""
    replay = Replay(in_turns(list(turns), length=8), policy, 16, host_blocks, COSTS)
    found = replay.run()
    replay.cache.check_integrity()
    return found


def test_what_the_device_has_no_room_for_waits_in_host_memory():
    found = replayed(POLICIES["host"])
    assert found.missing == [8, 8, 0, 0]
    assert found.in_host == [0, 0, 8, 8]
    assert found.waits == pytest.approx([8, 8, 1, 1])


def test_a_prefetch_in_time_leaves_nothing_to_wait_for():
    found = replayed(POLICIES["prefetch in time"])
    assert (found.on_device, found.in_host) == ([0, 0, 8, 8], [0, 0, 0, 0])
    assert found.waits == pytest.approx([8, 8, 0, 0])


def test_a_late_prefetch_counts_for_what_has_arrived():
    found = replayed(Policy(prefetch_at=lambda pause: None if pause.ends is None else pause.ends - 0.25))
    assert found.on_device == pytest.approx([0, 0, 2, 2])
    assert found.waits == pytest.approx([8, 8, 0.75, 0.75])


def test_an_early_prefetch_makes_way_again():
    found = replayed(Policy(prefetch_at=lambda pause: pause.began + 5))  # before the other session's turn
    assert found.in_host == [0, 0, 8, 8]


def test_offloaded_sessions_leave_the_device_though_it_has_room():
    found = replayed(POLICIES["offload"], turns=(0, 0))
    assert (found.in_host, found.num_offloaded) == ([0, 8], 2)
    assert replayed(POLICIES["host"], turns=(0, 0)).in_host == [0, 0]
    assert replayed(POLICIES["offload, prefetch in time"], turns=(0, 0)).on_device == [0, 8]


def test_retained_prompts_stay_longer():
    plan, first = (
        in_turns([0, 1, 2, 0], length=8),
        Policy(has_host=False, retain=lambda pause: 1e4 * (pause.began == 0)),
    )
    expected = {"device only": [0, 0, 0, 7], "retained": [0, 0, 0, 8]}  # the third needs a block of another
    for name, policy in (("device only", POLICIES["device only"]), ("retained", first)):
        found = Replay(plan, policy, 24, 0, COSTS, allocator="paged", growth="fixed8").run()
        assert found.on_device == expected[name]


def test_a_request_that_does_not_fit_is_counted():
    found = Replay(in_turns([0], length=16), POLICIES["device only"], 16, 0, COSTS).run()
    assert found.num_refused == 1


# -- the command -------------------------------------------------------------------------------------------------------


def test_gains_are_shares_of_the_best_gain():
    least, most = Row("least", 0.4, 0.0, 0.6, 6.0, 9.0), Row("most", 0.8, 0.0, 0.2, 2.0, 3.0)
    row = with_gains(Row("one", 0.5, 0.2, 0.3, 3.0, 4.0), least, most)
    assert (row.gain_found, row.gain_wait) == pytest.approx((0.25, 0.75))
    assert with_gains(least, least, least).gain_wait is None


def test_the_command_prints_and_writes(tmp_path, capsys):
    rows = []
    for name in "abc":
        rows += [{"trace": name, "block_size": 64}]
        rows += [[0, 60.0 * i, 8192 + 640 * i, 70, 50, 2, 128 + 10 * (i - 1) if i else 0,
                  [1, 128] if not i else [200 + 10 * i, 10]] for i in range(8)]  # fmt: skip
    path, found = write(tmp_path / "trace.jsonl.gz", rows), tmp_path / "found.json"
    arguments = [
        "--trace",
        path,
        "--spread",
        "0.1",
        "--capacity",
        "0.02",
        "--policy",
        "device only",
        "prefetch in time",
    ]
    assert cli.main(["bench", "sessions", *arguments, "--json", str(found)]) == 0
    assert "device 0.02" in capsys.readouterr().out
    by_name = {row["name"]: row for row in json.loads(found.read_text())["rows"]}
    assert by_name["Belady"]["gain_found"] == 1.0
    assert by_name["device only"]["on_device"] <= by_name["Belady"]["on_device"]
    assert by_name["device only"]["missing"] > by_name["prefetch in time"]["missing"]


def test_a_device_without_room_for_any_request_is_refused(tmp_path, capsys):
    path = write(tmp_path / "trace.jsonl", [HEAD, [0, 0, 6400, 1, 0, 0, 0, [1, 100]]])
    assert cli.main(["bench", "sessions", "--trace", path, "--capacity", "0.001"]) == 2
    assert "--capacity: expected room for some request" in capsys.readouterr().err
