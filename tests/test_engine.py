"""The engine of the examples: whatever memory it has, every request gets the same tokens."""

import random

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from examples.engine import Engine, Request  # noqa: E402
from examples.llama import PackedLlama  # noqa: E402
from kvtoolkit import CacheFullError  # noqa: E402


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
    assert engine.cache.stats().used == 8 * engine.cache.allocator.stats().pinned
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


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_caching": False},
        {"prefix_caching": False, "allocator": "lockfree", "allocator_options": {"layout": "slab"}},
        {"allocator": "slab", "growth": "lazy_merge"},
        {"allocator": "lockfree", "growth": "append"},
        {"allocator": "paged"},
        {"allocator": "buddy", "growth": "proportional"},
    ],
    ids=str,
)
def test_a_quarter_of_the_memory_gives_the_same_tokens(model, plenty, options):
    needed = sum(sorted(len(r.prompt) + r.max_new_tokens for r in requests())[-8:])
    outputs, engine = run(model, num_tokens=needed // 4, **options)
    stats = engine.cache.stats()
    # without a shared beginning to save memory, requests have to give theirs up
    assert stats.num_evicted if engine.cache.config.prefix_caching else stats.num_preempted
    assert outputs == plenty


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
