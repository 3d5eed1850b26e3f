"""Models of transformers on a GPU, in 16 bits: as near to their float32 selves on a KVCache as on a DynamicCache."""

import copy
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvtoolkit import UnsupportedError  # noqa: E402
from kvtoolkit.integrations.transformers import TransformersCache  # noqa: E402
from tests.kvtoolkit.integrations.test_transformers import POOLS, cache_for, own_cache, prompts, tiny  # noqa: E402
from tests.kvtoolkit.integrations.test_transformers import generate as generate_on_host  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = [
    ("Llama", 4, 4, 64, "float16"),
    ("Llama", 8, 2, 128, "bfloat16"),
    ("Qwen2", 4, 1, 64, "bfloat16"),
    ("Qwen3", 4, 4, 128, "float16"),
]
# rounding to 16 bits moves these models' logits, whose standard deviation is 1.6, by 0.003 and 0.05 in the mean: where
# two of them differ by less than several times that, either token is right
UNDECIDED = {"float16": 0.05, "bfloat16": 0.4}


@functools.cache
def model_on_device(*shape):
    return copy.deepcopy(tiny(*shape)).to(DEVICE)


@functools.cache
def exact_model(*shape):
    """The same weights, in float32 on the CPU."""
    return copy.deepcopy(tiny(*shape)).float()


@pytest.fixture
def shape():
    return SHAPES[1]


@pytest.fixture
def model(shape):
    return model_on_device(*shape)


def on_device(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def generate(model, cache, inputs, **options):
    return generate_on_host(model, cache, on_device(inputs), **options)


def places_of(mask):
    """``[batch, columns]`` positions as `generate` counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def prefill(model, cache, inputs):
    with torch.no_grad():
        model(**inputs, position_ids=places_of(inputs["attention_mask"]), past_key_values=cache)


def exact_logits(shape, sequences, mask):
    """``[batch, columns, vocabulary]`` float32 of whole sequences, whose first columns ``mask`` covers."""
    sequences, mask = sequences.cpu(), mask.cpu()
    mask = torch.cat([mask, torch.ones(len(mask), sequences.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    options = {"attention_mask": mask, "position_ids": places_of(mask), "use_cache": False}
    with torch.no_grad():
        return exact_model(*shape)(sequences, **options).logits


def forced_logits(model, cache, inputs, more, chunk):
    """``[batch, columns of more, vocabulary]``: the prompts, then the tokens of ``more``, ``chunk`` at a time."""
    logits, (ids, mask) = [], inputs.values()
    with torch.no_grad():
        for first in range(0, more.shape[1] + 1, chunk):
            positions = places_of(mask)[:, -ids.shape[1] :]
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            logits.append(out[:, -1:] if first == 0 else out)
            ids = more[:, first : first + chunk]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.cat(logits, 1).float().cpu()


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_logits_of_given_tokens_are_as_exact_as_on_dynamic_cache(shape, chunk):
    """Left-padded prompts, then the same tokens for both caches: one at a time (decode), or five (verify)."""
    model, inputs = model_on_device(*shape), on_device(prompts())
    more = torch.from_numpy(np.random.default_rng(5).integers(3, 97, (3, 20))).to(DEVICE)
    sequences = torch.cat([inputs["input_ids"], more], 1)
    exact = exact_logits(shape, sequences, inputs["attention_mask"])[:, 20:]
    caches = cache_for(model), own_cache(model)
    ours, theirs = (
        (forced_logits(model, cache, inputs, more, chunk) - exact).norm(dim=-1) / exact.norm(dim=-1) for cache in caches
    )
    assert ours.norm() < 1.5 * theirs.norm()
    assert ours.max() < 3 * theirs.max()
    caches[0].kv_cache.check_integrity()


def assert_undecided_at_most(shape, sequences, mask):
    """Every generated token is, after what precedes it, the likeliest, but for what 16 bits leave open."""
    logits = exact_logits(shape, sequences, mask)[:, mask.shape[1] - 1 : -1]
    chosen = logits.gather(2, sequences.cpu()[:, mask.shape[1] :, None])[..., 0]
    assert (logits.amax(2) - chosen).max() < UNDECIDED[shape[-1]]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_greedy_tokens_of_left_padded_batches_are_the_likeliest(shape):
    model, inputs = model_on_device(*shape), prompts()
    cache = cache_for(model)
    got = generate(model, cache, inputs)
    assert cache.kv_cache.config.backend == "cuda"
    assert got.sequences.shape == (3, 21 + 24)
    assert_undecided_at_most(shape, got.sequences, inputs["attention_mask"])
    assert cache.kv_cache.lengths(cache.seq_ids).tolist() == [44, 39, 31], "padding takes no memory"
    cache.kv_cache.check_integrity()


def test_outputs_do_not_depend_on_allocator_and_growth_policy(model):
    inputs = prompts(columns=200)
    logits = [torch.stack(generate(model, cache_for(model, **pool), inputs).logits) for pool in POOLS]
    assert all(torch.equal(other, logits[0]) for other in logits[1:])


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_have_the_scores_that_their_tokens_earn(model, shape, options):
    """A beam that continued another's memory would have a score that its own tokens do not explain."""
    cache, inputs = cache_for(model), prompts()
    got = generate(model, cache, inputs, output_scores=True, **options)
    copies = options.get("num_return_sequences", 1)
    mask = inputs["attention_mask"].repeat_interleave(copies, 0)
    logits = exact_logits(shape, got.sequences, mask)[:, 20:-1]
    chances = logits.log_softmax(2).gather(2, got.sequences.cpu()[:, 21:, None])[..., 0]
    assert (got.sequences_scores.cpu() - chances.mean(1)).abs().max() < UNDECIDED[shape[-1]] / 4
    stats = cache.kv_cache.stats()
    assert stats.used < stats.num_tokens, "beams share their common past"
    cache.kv_cache.check_integrity()


def test_sampling_and_assisted_decoding_run(model, shape):
    cache, inputs = cache_for(model), prompts(batch=1)
    got = generate(model, cache, inputs, do_sample=True, num_return_sequences=3)
    assert got.sequences.shape == (3, 45)
    cache.reset()
    inputs["input_ids"] = inputs["input_ids"][:, :7].repeat(1, 3)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(**on_device(inputs), past_key_values=cache, prompt_lookup_num_tokens=3, **options)
    assert_undecided_at_most(shape, got, inputs["attention_mask"])
    cache.kv_cache.check_integrity()


def test_opened_prompts_are_computed_once(model, shape):
    cache, inputs = cache_for(model), prompts(pads=(0, 2))
    assert cache.open(**on_device(inputs)) == 0
    generate(model, cache, inputs)
    assert cache.open(**on_device(inputs)) == 16
    got = generate(model, cache, inputs)
    assert_undecided_at_most(shape, got.sequences, inputs["attention_mask"])
    cache.kv_cache.check_integrity()


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2], device=DEVICE)), [2, 0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True], device=DEVICE)), [0, 2]),
    ],
)
def test_rows_can_be_rearranged(model, shape, change, rows):
    cache, inputs = cache_for(model), on_device(prompts())
    prefill(model, cache, inputs)
    change(cache)
    ids, mask = inputs["input_ids"][rows], inputs["attention_mask"][rows]
    new = torch.full((len(rows), 1), 11, device=DEVICE)
    with torch.no_grad():
        options = {"attention_mask": torch.cat([mask, torch.ones_like(new)], 1), "position_ids": mask.sum(1)[:, None]}
        logits = model(new, **options, past_key_values=cache).logits[:, -1]
    exact = exact_logits(shape, torch.cat([ids, new], 1), mask)[:, -1]
    assert ((logits.float().cpu() - exact).norm(dim=-1) < 0.1 * exact.norm(dim=-1)).all()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("columns", [1, 4])
def test_no_layer_waits_for_the_device(model, columns):
    """The host looks at the mask before the first layer; what comes after that is queued."""
    cache, inputs = cache_for(model), on_device(prompts())
    prefill(model, cache, inputs)
    begin = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    end = model.model.norm.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        for padded in (False, True):
            mask = torch.ones(3, cache.get_seq_length() + columns, dtype=torch.long, device=DEVICE)
            mask[:, :21] = inputs["attention_mask"]
            if padded:
                mask[1, -columns:] = 0  # a row without new tokens: the others are packed
            with torch.no_grad():
                model(torch.full((3, columns), 7, device=DEVICE), attention_mask=mask, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        begin.remove()
        end.remove()


def test_model_and_cache_must_lie_together(model):
    on_host = TransformersCache.for_model(model, num_tokens=256, backend="cpu")
    with pytest.raises(NotImplementedError, match="expected a model on cpu, where the cache is, got one on cuda:0"):
        model(**on_device(prompts()), past_key_values=on_host)
    host_model = tiny("Llama", 4, 4, 64, "float16")
    on_gpu = TransformersCache.for_model(host_model, num_tokens=256, backend="cuda")
    with pytest.raises(NotImplementedError, match="expected a model on cuda:0, where the cache is, got one on cpu"):
        host_model(**prompts(), past_key_values=on_gpu)
    assert on_gpu.kv_cache.stats().num_seqs == 0


def test_a_float32_model_is_refused(shape):
    model = copy.deepcopy(exact_model(*shape)).to(DEVICE)
    with pytest.raises(UnsupportedError, match="dtype: expected float16 or bfloat16 with backend 'cuda', got float32"):
        TransformersCache.for_model(model, num_tokens=256)
