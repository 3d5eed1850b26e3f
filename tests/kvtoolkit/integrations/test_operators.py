"""The library in compiled torch programs: results and caches are those of the same program as it is."""

import copy
import gc
import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvtoolkit  # noqa: E402
from kvtoolkit import ArgumentError, CacheConfig, GraphStep, KVCache, Step, StepError, plan_attention  # noqa: E402
from kvtoolkit.handles import handle_of, owner_of  # noqa: E402
from kvtoolkit.integrations.operators import _OPERATORS, define  # noqa: E402
from tests.kvtoolkit.attention.bad_input_calls import CALLS, with_tensors  # noqa: E402
from tests.kvtoolkit.integrations.operator_cases import (  # noqa: E402
    DIM,
    KV_HEADS,
    Q_HEADS,
    Session,
    make_cache,
    make_decoder,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TIERS = {"hot": 64, "pinned_tokens": 0, "warm": "int8", "warm_tokens": 64, "cold": "int4"}
GROUPS = [{"layers": [0, 2], "window": 40, "num_tokens": 2048}, {"layers": [1], "num_tokens": 4096}]


@pytest.fixture(autouse=True)
def compiler() -> Any:
    """A compiler without anything compiled, in which no test compiles without end."""
    define()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=3), torch.no_grad():
        yield


def compile_whole(function: Any, backend: str, **options: Any) -> Any:
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def assert_same(one: Any, other: Any, backend: str) -> None:
    """To the bit, unless the compiler fuses what the model does between the calls."""
    if backend == "inductor":
        torch.testing.assert_close(one, other, rtol=2e-2 if one.dtype == torch.bfloat16 else 1e-4, atol=2e-2)
    else:
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("inductor", {}),
        ("aot_eager", {"tiers": TIERS}),
        ("eager", {"layer_groups": GROUPS}),
        ("aot_eager", {"layer_groups": GROUPS}),
    ],
    ids=["inductor", "tiers", "groups", "groups, functional"],
)
def test_a_decoder_is_compiled_whole(device, backend, options):
    """One graph serves all steps: steps of other sizes, and other steps, are not compiled anew."""
    model = make_decoder(device, window=40 if "layer_groups" in options else 0)
    compiled = compile_whole(model, backend, dynamic=True)
    sessions = [Session(make_cache(device, **options), one, device, 3) for one in (model, compiled)]
    for seed, counts in enumerate([[90, 3, 70], [1, 1, 1], [1, 0, 5], *[[1, 1, 1]] * 70, [2, 2, 2]]):
        with torch.compiler.set_stance("default" if seed < 2 else "fail_on_recompile"):
            good, made = (session.step(counts, seed) for session in sessions)
        assert_same(made, good, backend)
    if options.get("tiers") and device == "cpu":
        assert sessions[1].cache.stats().tiers["warm"].used
    if backend != "inductor":
        for one, other in zip(*(session.held() for session in sessions), strict=True):
            assert (one == other).all()


def test_no_call_is_dropped_or_swapped():
    """Appends whose results nobody uses, the same slots twice, and reads between them."""
    cache = make_cache("cpu")
    ids, _ = cache.open([[]])

    def run(x: Any, step: Any) -> Any:
        seen = []
        for factor in (1.0, 2.0):
            step.append(0, x * factor, x * factor)
            seen.append(step.attend(0, x.repeat(1, Q_HEADS // KV_HEADS, 1)))
        step.append(0, x * 3, x * 3)
        step.append(1, x * 4, x * 4)
        step.append(2, x * 5, x * 5)
        return seen

    x = torch.randn(8, KV_HEADS, DIM)
    found = []
    for one in (run, *(compile_whole(run, backend) for backend in ("eager", "aot_eager", "inductor"))):
        with cache.begin_step(ids, 8) as step:
            slots = step.slot_mapping.copy()
            seen = one(x, step)
            held = [
                cache.key_cache(layer).reshape(-1, KV_HEADS, 8, DIM)[slots // 8, :, slots % 8] for layer in (0, 1, 2)
            ]
        for layer, factor in enumerate((3, 4, 5)):
            np.testing.assert_array_equal(held[layer], (x * factor).numpy())
        found.append(torch.stack(seen))
    assert not torch.equal(found[0][0], found[0][1])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_the_compiler_makes_no_copy_of_a_cache():
    from torch._inductor.utils import run_and_get_code

    cache = make_cache("cpu")
    ids, _ = cache.open([[]])
    whole = cache._graph_names.of(cache)[1][0]
    flat = torch.zeros(64, KV_HEADS, 8, DIM), torch.zeros(64, KV_HEADS, 8, DIM)
    slots, table = torch.arange(8), torch.zeros(8, 1, dtype=torch.int32)

    def run(x: Any, step: Any) -> Any:
        for layer in range(2):
            step.append(layer, x, x)
            x = x + step.attend(layer, x)
        kvtoolkit.append(x, x, *flat, slots, layout="HND")
        return kvtoolkit.paged_attention(x, *flat, table, torch.full((8,), 8, dtype=torch.int32), layout="HND")

    with cache.begin_step(ids, 8) as step:
        _, code = run_and_get_code(compile_whole(run, "inductor"), torch.randn(8, KV_HEADS, DIM), step)
    (code,) = code
    assert "kvtoolkit.step_append" in code
    made = [line for line in code.splitlines() if "empty_strided" in line and " = " in line]
    assert made
    for array in (whole, *flat):
        shape = ", ".join(map(str, array.shape))
        assert not [line for line in made if shape in line]


@pytest.mark.parametrize(
    "call", [call for call in CALLS if not (call.torch_only or call.numpy_only)][:5], ids=lambda call: call.name
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_call_is_an_operator(call, backend):
    """With all its options, whole, and in what it writes to."""
    arguments, function = call.make()
    good, given = with_tensors(arguments), with_tensors(arguments)
    written = [name for name in call.written if name in arguments]
    expected = function(**good)
    made = compile_whole(lambda **tensors: function(**tensors), backend)(**given)
    pairs = [(good[name], given[name]) for name in written]
    for one, other in [*zip(_flat(expected), _flat(made), strict=True), *pairs]:
        assert torch.equal(one, other)
    if expected is not None and "out" in written:
        assert _flat(made)[0] is given["out"]


def _flat(made: Any) -> list[Any]:
    return [one for one in (made if isinstance(made, tuple) else (made,)) if one is not None]


def test_operators_are_what_torch_expects_of_them():
    """Schemas say what is written, fakes agree, and nothing aliases."""
    calls = torch.ops.kvtoolkit
    q, cache = torch.randn(2, Q_HEADS, DIM), torch.randn(4, KV_HEADS, 8, DIM)
    new, table = torch.randn(2, KV_HEADS, DIM), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    starts, lengths = torch.tensor([[0, 1]] * 2, dtype=torch.int32), torch.tensor([9, 16], dtype=torch.int32)
    held = make_cache("cpu")
    step = held.begin_step(held.open([[], []])[0], 1)
    handle, arenas = step._in_graphs
    out, lse, mass = torch.zeros_like(q), torch.zeros(2, Q_HEADS), torch.zeros(2, 2, KV_HEADS)
    caches = (q, cache, cache)
    paged, variable = (*caches, table, lengths, "HND"), (*caches, table, starts, lengths)
    tiered = (*caches, None, None, [0, 8, 8], table, starts, lengths)
    layer = (arenas[0], handle, 0, q)
    common, others, rows = (0.5, [4, 0]), (True, 1.0, None, None, 0, None), (None, 1, None)
    cases = [
        (calls.append, (new, new, cache.clone(), cache.clone(), torch.tensor([1, 9]), "HND", None)),
        (calls.merge_states, (out.clone(), lse.clone(), q, lse, q + 1, lse, None)),
        (calls.step_append, (arenas[0], handle, 0, new, new)),
        (calls.step_attend, (out, *layer, None, None)),
        (calls.step_attend_with_options, (out, lse.clone(), *layer, *common, *others)),
        (calls.paged_attention, (out, *paged, *common)),
        (calls.paged_attention_of_rows, (out, *paged, *common, *rows)),
        (calls.paged_attention_with_options, (out, lse.clone(), *paged, *common, *others, *rows)),
        (calls.variable_block_attention, (out, *variable, *common)),
        (calls.variable_block_attention_of_rows, (out, *variable, *common, *rows)),
        (calls.variable_block_attention_with_options, (out, lse.clone(), mass, *variable, *common, *others, *rows)),
        (calls.tiered_attention, (out, *tiered, *common)),
        (calls.tiered_attention_of_rows, (out, *tiered, *common, *rows)),
        (calls.tiered_attention_with_options, (out, None, mass, *tiered, *common, *others, *rows)),
    ]
    assert {operator.__name__ for operator, _ in cases} == set(_OPERATORS)
    for operator, arguments in cases:
        done = torch.library.opcheck(operator.default, arguments)
        assert set(done.values()) == {"SUCCESS"}, (operator, done)


def test_a_plan_serves_compiled_layers():
    case, function = next(call for call in CALLS if call.name == "paged_attention").make()
    tensors = with_tensors(case)
    plan = plan_attention(tensors["block_table"], tensors["seq_lens"], cu_seqlens_q=tensors["cu_seqlens_q"])
    del tensors["max_seqlen_q"]
    expected = function(**tensors)[0].clone()
    compiled = compile_whole(lambda q, plan: function(**{**tensors, "q": q, "plan": plan})[0], "aot_eager")
    for _ in range(3):
        assert torch.equal(compiled(tensors["q"], plan), expected)
    prepared = len(plan._prepared)
    plain = compile_whole(lambda q, plan: function(**{**tensors, "q": q, "plan": plan, "return_lse": False}), "eager")
    plain(tensors["q"], plan)
    assert len(plan._prepared) == prepared + 1


@pytest.mark.parametrize(
    "options",
    [
        {"sofcap": 4.0}, {"scale": 2.0}, {"block_starts": None}, {"layout": "XYZ"}, {"causal": None}, {"plan": 7},
        {"num_splits": 1.0}, {"window_size": (7, 0, 3)}, {"window_size": (True, 0)}, {"return_lse": None},
        {"softcap": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_is_refused_or_counts_as_outside(options):
    """A schema would drop some of these, or take them for something else."""
    arguments, function = CALLS[0].make()
    tensors = with_tensors({name: arguments[name] for name in ("q", "k_cache", "v_cache", "block_table", "seq_lens")})
    given = tensors | {"layout": "NHD", "cu_seqlens_q": with_tensors(arguments)["cu_seqlens_q"]} | options
    with pytest.raises(Exception) as outside:  # noqa: PT011 - whatever it is
        function(**given)
    for backend in ("eager", "aot_eager"):
        with pytest.raises(type(outside.value)) as inside:
            torch.compile(lambda **arrays: function(**arrays), backend=backend)(**given)
        assert str(inside.value).split("\n")[0] == str(outside.value).split("\n")[0]
        with pytest.raises((torch._dynamo.exc.Unsupported, kvtoolkit.ShapeError)):
            compile_whole(lambda **arrays: function(**arrays), backend)(**given)


@pytest.mark.parametrize("options", [{"windowsize": (0, 0)}, {"plan": None}, {"max_seqlen_q": 3}], ids=str)
def test_a_step_refuses_unknown_options_as_outside(options):
    cache = make_cache("cpu")
    ids, _ = cache.open([[]])
    x = torch.randn(4, KV_HEADS, DIM)
    with cache.begin_step(ids, 4) as step:
        step.append(0, x, x)
        with pytest.raises(TypeError, match=next(iter(options))):
            torch.compile(lambda x, step: step.attend(0, x, **options), backend="eager")(x, step)
        for layer in (False, -1, 3, 0.5):
            with pytest.raises(ArgumentError, match="layer: expected 0 to 2"):
                torch.compile(lambda x, step, layer=layer: step.append(layer, x, x), backend="eager")(x, step)


def test_numbers_of_numpy_count_as_outside():
    cache = make_cache("cpu")
    ids, _ = cache.open([[]])
    x = torch.randn(4, KV_HEADS, DIM)
    options = {"softmax_scale": 1 / np.sqrt(DIM), "window_size": (np.int64(2), 0), "num_splits": np.int64(2)}
    with cache.begin_step(ids, 4) as step:
        step.append(0, x, x)
        for name, value in options.items():
            run = torch.compile(lambda x, step, given: step.attend(0, x, **given), backend="eager")
            assert torch.equal(run(x, step, {name: value}), step.attend(0, x, **{name: value}))


def test_what_graphs_name_is_not_copied():
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    cache = make_cache("cpu")
    for one in (plan_attention(table, lengths), cache.begin_step(cache.open([[]])[0], 1)):
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="expected no copy"):
                make(one)


def test_a_step_begun_in_inference_mode_can_be_written_outside_of_it():
    cache = make_cache("cpu")
    ids, _ = cache.open([[]])
    x = torch.randn(4, KV_HEADS, DIM)
    with torch.inference_mode():
        step = cache.begin_step(ids, 4)
    compile_whole(lambda x, step: step.append(0, x, x), "aot_eager")(x, step)
    assert torch.equal(step.attend(0, x), compile_whole(lambda x, step: step.attend(0, x), "aot_eager")(x, step))
    cache.abort_step(step)


def test_operators_refuse_what_names_no_step():
    step = (cache := make_cache("cpu")).begin_step(cache.open([[]])[0], 1)
    plan = plan_attention(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    new, (handle, arenas) = torch.randn(1, KV_HEADS, DIM), step._in_graphs
    append = torch.ops.kvtoolkit.step_append
    for arena, given, message in (
        (arenas[0], plan._handle, "step: expected the handle of a Step or GraphRun, got that of a AttentionPlan"),
        (arenas[0], torch.zeros(2, dtype=torch.int64), "step: expected a handle, one integer"),
        (arenas[0], torch.tensor(1.5), "step: expected a handle, one integer"),
        (arenas[0].half(), handle, "arena: expected that of the step"),
    ):
        with pytest.raises(ArgumentError, match=message):
            append(arena, given, 0, new, new)
    assert not cache.key_cache(0).any()


def test_bad_input_is_refused_as_outside():
    cache = make_cache("cpu")
    ids, _ = cache.open([[]])
    x = torch.randn(4, KV_HEADS, DIM)
    compiled = compile_whole(lambda key, step: step.append(0, key, key), "eager")
    with cache.begin_step(ids, 4) as step:
        with pytest.raises(kvtoolkit.ShapeError, match=r"key: expected \[num_tokens"):
            compiled(x[:, :1], step)
        compiled(x, step)
    with pytest.raises(StepError, match="ended"):
        compiled(x, step)


def test_a_handle_outlives_nothing():
    step = (cache := make_cache("cpu")).begin_step(cache.open([[]])[0], 1)
    handle = step._in_graphs[0]
    assert owner_of(handle, "step", Step) is step
    assert int(handle_of(step)) != int(handle)
    del step
    gc.collect()
    with pytest.raises(ArgumentError, match="step: expected one that is still in use"):
        owner_of(handle, "step", Step)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_a_captured_decoder_serves_every_step(backend):
    """Compiled or not: a graph captured once gives what eager steps give."""
    model = make_decoder("cuda")
    run = model if backend is None else compile_whole(model, backend)
    caches = [make_cache("cuda") for _ in range(2)]
    ids = [cache.open([[]] * 3)[0] for cache in caches]
    fixed = GraphStep(caches[1], 3)
    tokens, positions = (torch.zeros(3, dtype=torch.int64, device="cuda") for _ in range(2))
    graph, out = torch.cuda.CUDAGraph(), None
    for turn in range(30):
        tokens.random_(100)
        positions.fill_(turn)
        with caches[0].begin_step(ids[0], 1) as step:
            good = model(tokens, positions, step)
            caches[0].end_step(step)
        step = caches[1].begin_step(ids[1], 1)
        fixed.load(step)
        if out is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(tokens, positions, fixed.begin())
            torch.cuda.synchronize()
            captured = fixed.begin()
            with torch.cuda.graph(graph, stream=stream):
                out = run(tokens, positions, captured)
        graph.replay()
        assert_same(out, good, backend or "eager")
        caches[1].end_step(step)


@pytest.mark.gpu
def test_calls_on_a_gpu_are_operators():
    config = CacheConfig(num_layers=1, num_kv_heads=2, head_dim=64, dtype="float16", num_tokens=512, backend="cuda")
    cache = KVCache(config)
    ids, _ = cache.open([[]] * 2)
    q, new = (torch.randn(40, heads, 64, device="cuda", dtype=torch.float16) for heads in (4, 2))
    with cache.begin_step(ids, 20) as step:
        compile_whole(lambda new, step: step.append(0, new, new), "inductor")(new, step)
        good, good_lse = step.attend(0, q, return_lse=True)
        for backend in ("eager", "aot_eager", "inductor"):
            made, lse = compile_whole(lambda q, step: step.attend(0, q, return_lse=True), backend)(q, step)
            assert torch.equal(made, good)
            assert torch.equal(lse, good_lse)
