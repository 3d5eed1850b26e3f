"""The engine of the examples: whatever memory it has, every request gets the same tokens."""

import copy
import random
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from examples import generate  # noqa: E402
from examples.engine import Engine, Request  # noqa: E402
from examples.llama import PackedLlama  # noqa: E402
from kvtoolkit import CacheConfig, CacheFullError  # noqa: E402
from kvtoolkit.integrations.smollm2 import missing_packages  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.2,  # large weights: the likeliest token leads by more than rounding
    )
    return transformers.LlamaForCausalLM(config).float().eval()


def requests(temperature=0.0):
    draw = random.Random(1)
    shared = [draw.randrange(500) for _ in range(50)]
    return [
        Request(
            shared + [draw.randrange(500) for _ in range(draw.randint(1, 90))], draw.randint(1, 60), temperature, seed=i
        )
        for i in range(12)
    ]


def run(model, *, temperature=0.0, max_batch=8, **options):
    packed = PackedLlama(model)
    engine = Engine(packed, packed.cache_config(**options), max_batch=max_batch)
    wanted = requests(temperature)
    for request in wanted:
        engine.add(request)
    engine.run()
    engine.cache.check_integrity()
    assert engine.cache.stats().used == 0
    return [request.output for request in wanted], engine


@pytest.fixture(scope="module")
def plenty(model):
    return run(model, num_tokens=4096)[0]


def test_tokens_equal_those_of_transformers(model, plenty):
    for request, output in zip(requests(), plenty, strict=True):
        prompt = torch.tensor([request.prompt])
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output == expected[0, prompt.shape[1] :].tolist()


SCARCE = [
    {"prefix_caching": False},
    {"prefix_caching": False, "allocator": "lockfree", "allocator_options": {"layout": "slab"}},
    {"allocator": "slab", "growth": "lazy_merge"},
    {"allocator": "lockfree", "growth": "append"},
    {"allocator": "paged"},
    {"allocator": "buddy", "growth": "proportional"},
]


def run_in_a_quarter(model, options):
    """Run in a quarter of the memory that eight requests need."""
    needed = sum(sorted(len(r.prompt) + r.max_new_tokens for r in requests())[-8:])
    outputs, engine = run(model, num_tokens=needed // 4, **options)
    stats = engine.cache.stats()
    # without a shared beginning to save memory, requests have to give theirs up
    assert stats.num_evicted if engine.cache.config.prefix_caching else stats.num_preempted
    return outputs


@pytest.mark.parametrize("options", SCARCE, ids=str)
def test_a_quarter_of_the_memory_gives_the_same_tokens(model, plenty, options):
    assert run_in_a_quarter(model, options) == plenty


def test_what_prompts_share_is_computed_once(model):
    _, engine = run(model, num_tokens=4096)
    assert engine.cache.stats().reused_tokens == 11 * 48


def test_draws_depend_on_the_request_alone(model):
    alone = run(model, temperature=0.8, num_tokens=4096, max_batch=1)[0]
    assert run(model, temperature=0.8, num_tokens=4096)[0] == alone


def test_a_pool_too_small_for_one_request_says_so(model):
    packed = PackedLlama(model)
    engine = Engine(packed, packed.cache_config(num_tokens=64, max_seqs=4))
    with pytest.raises(ValueError, match="expected at most 64 tokens, the longest sequence of this cache, got 100"):
        engine.add(Request([1] * 100, 5))
    engine.add(Request([1] * 50, 14))
    engine.run()
    cache = engine.cache
    (held,), _ = cache.open([[9]])
    cache.end_step(cache.begin_step([held], 20))
    engine.add(Request([1] * 50, 14))
    with pytest.raises(CacheFullError, match="the pool is too small for one request"):
        engine.run()


# -- layers with a window --------------------------------------------------------------------------------------------

WINDOW = 32
WINDOWS = {
    "Mistral": {"sliding_window": WINDOW},  # in all layers
    "Qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "num_hidden_layers": 3},
}


@pytest.fixture(scope="module", params=WINDOWS)
def windowed(request, model):
    """A model with windows that its prompts cross, and the tokens that transformers generates."""
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range")  # fmt: skip
    shape = {name: getattr(model.config, name) for name in names} | WINDOWS[request.param]
    config = getattr(transformers, f"{request.param}Config")(**shape)
    made = getattr(transformers, f"{request.param}ForCausalLM")(config).float().eval()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = []
    for one in requests():
        prompt = torch.tensor([one.prompt])
        mask = torch.ones_like(prompt)
        tokens = made.generate(prompt, attention_mask=mask, max_new_tokens=one.max_new_tokens, **options)
        expected.append(tokens[0, prompt.shape[1] :].tolist())
    return made, expected


@pytest.mark.parametrize("options", [{"num_tokens": 4096}, {"num_tokens": 704, "growth": "append"}], ids=str)
def test_layers_with_a_window_give_the_same_tokens_and_free_their_past(windowed, options):
    model, expected = windowed
    packed = PackedLlama(model)
    config = packed.cache_config(**options, lengths=100, step_tokens=64)
    engine = Engine(packed, config, max_batch=8, max_step_tokens=64)
    wanted, held = requests(), []
    for one in wanted:
        engine.add(one)

    def on_step(engine):
        stats = engine.cache.stats()
        held.extend(group.used / max(stats.num_seqs, 1) for group in stats.groups if group.window)

    engine.run(on_step)
    assert [one.output for one in wanted] == expected
    engine.cache.check_integrity()
    assert [group.window for group in config.groups if group.window] == [WINDOW]
    assert 0 < max(held) <= WINDOW + 64 + 69
    assert engine.cache.stats().used == 0


def test_a_file_and_a_model_with_windows_make_groups(windowed, tmp_path):
    packed, path = PackedLlama(windowed[0]), tmp_path / "cache.toml"
    path.write_text('num_tokens = 4096\ngrowth = "append"\n')
    config = packed.cache_config(path, max_seqs=7)
    assert (config.growth, config.max_seqs, config.dtype) == ("append", 7, "float32")
    assert WINDOW in [group.window for group in config.groups]


# -- any load, in any memory -----------------------------------------------------------------------------------------


class Zeros:
    """A model whose likeliest token is always 0; the cache does not look at what it holds."""

    def forward(self, tokens, positions, step):
        return torch.zeros(len(step.seq_ids), 10)


def small_engine(num_tokens, requests, **options):
    options = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "dtype": "float16"} | options
    limits = {name: options.pop(name) for name in ("max_batch", "max_step_tokens") if name in options}
    engine = Engine(Zeros(), CacheConfig(num_tokens=num_tokens, **options), **limits)
    for request in requests:
        engine.add(request)
    return engine


def finish(engine, requests, most_steps):
    """Run to the end; every request has got its tokens, and no memory is lost."""

    def on_step(engine):
        assert engine.averages.num_steps < most_steps, engine.cache.stats()

    engine.run(on_step)
    assert all(len(request.output) == request.max_new_tokens for request in requests)
    engine.cache.check_integrity()
    stats = engine.cache.stats()
    assert stats.used == 0
    assert stats.num_preempted_seqs == 0
    return stats


def random_requests(draw, most):
    """Some with the same beginning; each fits alone into ``most`` tokens, some but just."""
    shared = [[draw.randrange(9) for _ in range(90)] for _ in range(2)]
    for _ in range(draw.randint(3, 8)):
        length = draw.randint(1, most - 1)
        beginning = draw.choice(shared) if draw.random() < 0.6 else []
        prompt = (beginning + [draw.randrange(9) for _ in range(length)])[:length]
        yield Request(prompt, min(draw.randint(1, 40), most - length))


MEMORY = [
    {"allocator": allocator, "growth": growth, "tiers": tiers}
    for allocator in ("buddy", "slab", "paged", "lockfree")
    for growth in ("fixed8", "fixed16", "fixed64", "append", "proportional", "lazy_merge", "adaptive")
    for tiers in (None, generate.TIERS)
    if allocator != "paged" or growth not in ("append", "lazy_merge", "adaptive")
]


@pytest.mark.parametrize("options", MEMORY, ids=lambda o: f"{o['allocator']}-{o['growth']}-{len(o['tiers'] or ())}")
def test_every_load_ends_with_few_preemptions(options):
    draw = random.Random(MEMORY.index(options))
    num_tokens = 64 * (draw.randint(9, 14) if options["tiers"] else draw.randint(3, 12))
    limits = {"max_batch": draw.randint(2, 8), "max_step_tokens": draw.choice([16, 64, 512])}
    engine = small_engine(num_tokens, [], **options, **limits)
    wanted = list(random_requests(draw, engine.cache.stats().tiers["hot"].capacity))
    for request in wanted:
        engine.add(request)
    stats = finish(engine, wanted, 2000)
    assert stats.num_preempted <= 2 * len(wanted)


GROUPS = [[{"layers": 0, "window": 40}, {"layers": 1}], [{"layers": 1}, {"layers": 0, "chunk": 48}]]


@pytest.mark.parametrize("seed", range(6))
def test_every_load_ends_in_groups_of_layers(seed):
    draw = random.Random(seed)
    growth = draw.choice(["fixed8", "append", "lazy_merge", "adaptive"])
    limits = {"max_batch": draw.randint(2, 8), "max_step_tokens": draw.choice([16, 64, 512])}
    groups = copy.deepcopy(GROUPS[seed % 2])
    for group in groups:
        group["num_tokens"] = 64 * draw.randint(3, 12)
    engine = small_engine(None, [], num_layers=2, growth=growth, layer_groups=groups, **limits)
    wanted = list(random_requests(draw, engine.cache.config.seq_len_limit))
    for request in wanted:
        engine.add(request)
    stats = finish(engine, wanted, 2000)
    assert stats.num_preempted <= 2 * len(wanted)


OWN_TIERS = [
    [{"layers": 0, "window": 40}, {"layers": 1, "tiers": generate.TIERS}],
    [{"layers": 0}, {"layers": 1, "tiers": {"warm": "int8", "hot": 64, "pinned_tokens": 0}}],
]


@pytest.mark.parametrize("seed", range(4))
def test_every_load_ends_in_groups_with_tiers_of_their_own(seed):
    draw = random.Random(seed)
    limits = {"max_batch": draw.randint(2, 8), "max_step_tokens": draw.choice([16, 64, 512])}
    groups = copy.deepcopy(OWN_TIERS[seed % 2])
    for group in groups:
        group["num_tokens"] = 64 * (draw.randint(9, 14) if "tiers" in group else draw.randint(3, 12))
    engine = small_engine(None, [], num_layers=2, layer_groups=groups, **limits)
    stats = engine.cache.stats()
    wanted = list(random_requests(draw, min(engine.cache.config.seq_len_limit, stats.groups[1].tiers["hot"].capacity)))
    for request in wanted:
        engine.add(request)
    stats = finish(engine, wanted, 2000)
    assert stats.num_preempted <= 2 * len(wanted)


@pytest.mark.parametrize(
    ("num_tokens", "lengths", "options"),
    [
        (640, [(250, 100), (326, 60)], {"growth": "fixed64"}),  # each holds what the other lacks
        (128, [(60, 30), (20, 6)], {}),  # one finds no memory in the step in which the other finishes
        (1024, [(400, 8)], {"tiers": generate.TIERS, "max_step_tokens": 512}),  # a prompt larger than the hot tier
    ],
)
def test_a_request_that_fits_alone_is_not_given_up(num_tokens, lengths, options):
    wanted = [Request([length % 9] * length, count) for length, count in lengths]
    stats = finish(small_engine(num_tokens, wanted, **options), wanted, 500)
    assert stats.num_preempted <= 1


# -- 16 bits, on a GPU too -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DEVICES)
def half(request, model):
    """The model in float16 on a device, where another batch around a request rounds its logits in another way."""
    return copy.deepcopy(model).half().to(request.param)


@pytest.fixture(scope="module")
def plenty_of_half(half):
    return run(half, num_tokens=4096)[0]


def assert_likeliest(half, outputs):
    """Every token is, after what its request held, the likeliest in float32; float16 moves logits by less than 0.02."""
    exact = copy.deepcopy(half).float().cpu()
    for request, output in zip(requests(), outputs, strict=True):
        assert len(output) == request.max_new_tokens
        with torch.no_grad():
            logits = exact(torch.tensor([request.prompt + output])).logits[0, len(request.prompt) - 1 : -1]
        lead = logits.amax(1) - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert lead.max() < 0.05


@pytest.mark.parametrize(
    "options", [{"allocator": "paged", "growth": "fixed64"}, {"growth": "append"}, {"allocator": "lockfree"}], ids=str
)
def test_16_bit_tokens_do_not_depend_on_where_they_lie(half, plenty_of_half, options):
    assert_likeliest(half, plenty_of_half)
    assert run(half, num_tokens=4096, **options)[0] == plenty_of_half


@pytest.mark.parametrize("options", SCARCE[::2], ids=str)
def test_16_bit_tokens_are_right_in_a_quarter_of_the_memory(half, options):
    assert_likeliest(half, run_in_a_quarter(half, options))


@pytest.mark.gpu
@pytest.mark.parametrize(("fused", "ahead"), [(False, 1), (False, 5), (True, 32)])
def test_captured_steps_give_the_likeliest_tokens(model, fused, ahead):
    """Prompts in parts beside decode, in a quarter of the memory; every step is a graph."""
    on_device = copy.deepcopy(model).half().to("cuda")
    packed = PackedLlama(on_device, fused=fused)
    limits = {"max_batch": 8, "max_step_tokens": 128, "captured": True, "ahead": ahead}
    engine = Engine(packed, packed.cache_config(num_tokens=704), **limits)
    wanted = requests()
    for request in wanted:
        engine.add(request)
    engine.run()
    assert_likeliest(on_device, [request.output for request in wanted])
    assert {most == 0 for _, most, _ in engine.steps.shapes} == ({True, False} if ahead == 1 else {False})
    assert bool(engine.steps.loops) == (ahead > 1)
    assert engine.cache.stats().num_preempted


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("allocator", "fused"), [("buddy", False), ("lockfree", False), ("buddy", True)])
def test_tokens_decoded_ahead_are_those_of_steps_of_the_host(model, temperature, allocator, fused):
    packed = PackedLlama(copy.deepcopy(model).half().to("cuda"), fused=fused)
    outputs = []
    for ahead in (1, 32):
        config = packed.cache_config(num_tokens=4096, allocator=allocator, max_seqs=4)
        engine = Engine(packed, config, max_batch=4, captured=True, ahead=ahead)
        wanted = [Request(list(range(i, i + 30)), 70, temperature, i, 0.9) for i in range(4)]
        for request in wanted:
            engine.add(request)
        engine.run()
        engine.cache.check_integrity()
        outputs.append([request.output for request in wanted])
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
def test_requests_end_on_the_device_at_their_last_token(model):
    packed = PackedLlama(copy.deepcopy(model).half().to("cuda"))
    outputs = []
    for eos in (None, -2):
        if eos is not None:  # a token that came up amid the first run
            eos = outputs[0][0][7]
        engine = Engine(packed, packed.cache_config(num_tokens=4096), eos_token_id=eos, max_batch=4, captured=True)
        wanted = [Request(list(range(i, i + 30)), 20 + i, 0.0, i) for i in range(4)]
        for request in wanted:
            engine.add(request)
        engine.run()
        outputs.append([request.output for request in wanted])
    assert [len(output) for output in outputs[0]] == [20, 21, 22, 23]
    for whole, ended in zip(*outputs, strict=True):
        end = whole.index(eos) + 1 if eos in whole else len(whole)
        assert ended == whole[:end]


@pytest.mark.gpu
def test_captured_draws_are_those_of_eager_steps(model):
    packed = PackedLlama(copy.deepcopy(model).half().to("cuda"))
    outputs = []
    for captured in (False, True):
        engine = Engine(packed, packed.cache_config(num_tokens=4096), max_batch=8, captured=captured)
        wanted = requests(0.8)
        for request in wanted:
            request.top_p = 0.9
            engine.add(request)
        engine.run()
        outputs.append([request.output[:3] for request in wanted])  # later ones go apart by rounding
    same = sum(one == other for one, other in zip(*outputs, strict=True))
    assert same >= 10


@pytest.mark.gpu
def test_the_cache_lies_beside_the_model(model):
    on_device = PackedLlama(copy.deepcopy(model).half().to("cuda"))
    config = on_device.cache_config(num_tokens=64)
    assert (config.backend, config.device, config.dtype) == ("cuda", 0, "float16")


# -- the demo --------------------------------------------------------------------------------------------------------


def test_a_backend_that_is_not_here_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "cache.toml"
    path.write_text('cache = {num_tokens = 4096, backend = "numba"}')
    assert generate.main(["--backend", "cuda"]) == 2
    assert generate.main(["--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert "generate: backend: 'cuda' needs a CUDA device that torch can use, found none" in err
    assert "generate: backend: 'numba' needs a CUDA device" in err


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("backend", DEVICES)
def test_the_demo_knows_the_capital_of_france(backend, capsys):
    if missing := missing_packages():
        pytest.skip(f"{', '.join(missing)} not installed")
    assert generate.main(["--backend", backend, "--max-new-tokens", "12", "What is the capital of France?"]) == 0
    out = capsys.readouterr().out
    assert "Paris" in out
    assert f" on {backend}" in out


def test_the_demo_writes_more_where_tiers_are_to_be_seen():
    assert generate.parse([]).max_new_tokens == 128
    assert generate.parse(["--tiers"]).max_new_tokens == 192
    assert generate.parse(["--tiers", "--max-new-tokens", "3"]).max_new_tokens == 3


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_shows_tokens_in_every_tier(capsys):
    if missing := missing_packages():
        pytest.skip(f"{', '.join(missing)} not installed")
    assert generate.main(["--tiers", "Explain in two sentences why the sky is blue.", "Write a long story."]) == 0
    out = capsys.readouterr().out
    assert "Rayleigh" in out
    held = re.search(r"tiers +([\d.]+) hot, ([\d.]+) warm, ([\d.]+) cold tokens, mean over steps", out)
    assert all(float(tokens) > 0 for tokens in held.groups())
