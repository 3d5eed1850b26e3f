"""Models of transformers on a KVCache give what they give on transformers' own DynamicCache."""

import contextlib
import copy
import functools
import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from kvtoolkit import ArgumentError, CacheFullError, ConfigError, KVCache, ShapeError, UnsupportedError  # noqa: E402
from kvtoolkit.integrations.smollm2 import load_smollm2, missing_packages  # noqa: E402
from kvtoolkit.integrations.transformers import TransformersCache, cache_config, use_kvtoolkit  # noqa: E402

# family, query heads, kv heads, head_dim
SHAPES = [
    ("Llama", 4, 4, 64),
    ("Llama", 8, 2, 128),
    ("Qwen2", 8, 1, 64),
    ("Qwen2", 4, 1, 96),
    ("Qwen3", 2, 2, 256),
    ("Qwen3", 8, 2, 96),
]
POOLS = [
    {"allocator": "paged", "growth": "fixed8"},
    {"allocator": "paged", "growth": "fixed64"},
    {"allocator": "buddy", "growth": "append"},
    {"allocator": "buddy", "growth": "lazy_merge"},
    {"allocator": "slab", "growth": "proportional"},
    {"allocator": "lockfree", "growth": "adaptive"},
]
VOCABULARY = 97


@functools.cache
def tiny(family="Llama", num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="float32", num_layers=2, **options):
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=num_q_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(getattr(torch, dtype)).eval()
    use_kvtoolkit(model)
    return model


@pytest.fixture
def model():
    return tiny()


def prompts(batch=3, columns=21, pads=(0, 5, 13)):
    """Token ids and mask, ``[batch, columns]``, padded on the left."""
    ids = torch.from_numpy(np.random.default_rng(3).integers(3, VOCABULARY, (batch, columns)))
    mask = torch.ones_like(ids)
    for row, count in zip(range(batch), pads, strict=False):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def cache_for(model, **options):
    return TransformersCache.for_model(model, **{"num_tokens": 4096, **options})


def generate(model, cache, inputs, seed=0, **options):
    torch.manual_seed(seed)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options)


def own_cache(model):
    return DynamicCache(config=model.config)


def assert_same_tokens(got, expected):
    """Equal, except after a place where the reference itself is undecided: its two best logits differ by < 1e-4."""
    ours, theirs = got.sequences, expected.sequences
    assert ours.shape == theirs.shape
    first = theirs.shape[1] - len(expected.logits)
    assert torch.equal(ours[:, :first], theirs[:, :first])
    for row in range(len(theirs)):
        different = (ours[row] != theirs[row]).nonzero()
        if len(different):
            best, second = expected.logits[int(different[0]) - first][row].topk(2).values.tolist()
            assert best - second < 1e-4, f"row {row} differs from column {int(different[0])} on"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_greedy_tokens_of_left_padded_batches_are_those_of_dynamic_cache(shape):
    model = tiny(*shape)
    cache = cache_for(model)
    got = generate(model, cache, prompts())
    assert_same_tokens(got, generate(model, own_cache(model), prompts()))
    torch.testing.assert_close(got.logits[0], generate(model, own_cache(model), prompts()).logits[0])
    cache.kv_cache.check_integrity()


def test_outputs_do_not_depend_on_allocator_and_growth_policy(model):
    logits = [torch.stack(generate(model, cache_for(model, **pool), prompts()).logits) for pool in POOLS]
    assert all(torch.equal(other, logits[0]) for other in logits[1:])


def test_sampling_draws_the_same_tokens(model):
    options = {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2, "seed": 5}
    got = generate(model, cache_for(model), prompts(), **options)
    assert torch.equal(got.sequences, generate(model, own_cache(model), prompts(), **options).sequences)


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beam_search_finds_the_same_sequences(model, options):
    cache = cache_for(model)
    got = generate(model, cache, prompts(), **options)
    assert torch.equal(got.sequences, generate(model, own_cache(model), prompts(), **options).sequences)
    stats = cache.kv_cache.stats()
    assert stats.used < stats.num_tokens, "beams share their common past"
    cache.kv_cache.check_integrity()


def test_beam_search_reorders_once_a_step(model, monkeypatch):
    calls = []
    reorder = KVCache.reorder
    monkeypatch.setattr(KVCache, "reorder", lambda *args: (calls.append(1), reorder(*args))[1])
    generate(model, cache_for(model), prompts(), num_beams=2, max_new_tokens=8)
    assert 7 <= len(calls) <= 8


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}])
def test_assisted_decoding_takes_rejected_tokens_back(model, how):
    inputs = prompts(batch=1)
    inputs["input_ids"] = inputs["input_ids"][:, :7].repeat(1, 3)
    options = {"assistant_model": tiny("Llama", 2, 1, 32)} if "assistant" in how else how
    cache = cache_for(model)
    plain = generate(model, own_cache(model), inputs)
    torch.manual_seed(0)
    got = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    assert torch.equal(got, plain.sequences)
    assert cache.get_seq_length() < got.shape[1]
    cache.kv_cache.check_integrity()


def test_chunked_prefill_equals_prefill_at_once(model):
    expected = generate(model, cache_for(model), prompts())
    assert_same_tokens(generate(model, cache_for(model), prompts(), prefill_chunk_size=4), expected)


def test_a_second_generate_continues_from_the_cache(model):
    cache, inputs = cache_for(model), prompts()
    first = generate(model, cache, inputs, max_new_tokens=10)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 10, dtype=torch.long)], 1)
    second = generate(model, cache, {"input_ids": first.sequences, "attention_mask": mask}, max_new_tokens=14)
    assert torch.equal(second.sequences, generate(model, cache_for(model), inputs, max_new_tokens=24).sequences)


def test_padding_takes_no_memory(model):
    cache, inputs = cache_for(model), prompts()
    model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 21
    assert cache.kv_cache.lengths(cache.seq_ids).tolist() == [21, 16, 8]


def test_a_row_may_be_padding_in_any_forward(model):
    """The second forward brings 3, 0 and 2 tokens; the mask has a hole in the third row."""
    inputs, mask = prompts(), torch.ones(3, 24, dtype=torch.long)
    mask[:, :21] = inputs["attention_mask"]
    mask[1, 21:], mask[2, 22] = 0, 0
    more, logits = prompts(columns=3, pads=())["input_ids"], {}
    for name, cache in (("ours", cache_for(model)), ("theirs", own_cache(model))):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(**inputs, position_ids=positions[:, :21], past_key_values=cache)
        options = {"attention_mask": mask, "position_ids": positions[:, 21:]}
        logits[name] = model(more, **options, past_key_values=cache).logits[mask[:, 21:].bool()]
    torch.testing.assert_close(logits["ours"], logits["theirs"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_models_run_as_exactly_as_on_dynamic_cache(dtype):
    exact = tiny()
    with torch.no_grad():
        expected = exact(**prompts(), past_key_values=own_cache(exact)).logits[:, -1]
        model = tiny(dtype=dtype)
        theirs = model(**prompts(), past_key_values=own_cache(model)).logits[:, -1].float()
        cache = cache_for(model)
        ours = model(**prompts(), past_key_values=cache).logits[:, -1].float()
    assert cache.kv_cache.dtype == dtype
    assert (ours - expected).norm() < 1.5 * (theirs - expected).norm()
    generate(model, cache_for(model), prompts())


# -- attention variants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_without_our_cache_a_model_attends_as_before(family):
    """Gemma 2 attends eagerly, with a softcap that SDPA does not have."""
    options = {"attn_logit_softcapping": 1.0} if family == "Gemma2" else {}
    model = tiny(family, 4, 2, 32, **options)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        before = model(**prompts(), use_cache=False).logits
        for _ in range(2):
            use_kvtoolkit(model)
            assert torch.equal(model(**prompts(), use_cache=False).logits, before)
            cached = model(**prompts(), use_cache=True, past_key_values=own_cache(model)).logits
            assert torch.equal(cached, before)
        model.set_attn_implementation("sdpa" if family == "Llama" else "eager")
        use_kvtoolkit(model)


def test_making_a_cache_leaves_the_models_attention_as_it_was(model):
    model.set_attn_implementation("sdpa")
    cache_for(model)
    assert model.config._attn_implementation == "sdpa"
    use_kvtoolkit(model)


def test_without_our_cache_attention_is_sdpa(model):
    with torch.no_grad():
        ours = [model(**prompts(), use_cache=False).logits, generate(model, own_cache(model), prompts()).sequences]
        model.set_attn_implementation("sdpa")
        theirs = [model(**prompts(), use_cache=False).logits, generate(model, own_cache(model), prompts()).sequences]
        use_kvtoolkit(model)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


# -- rows ------------------------------------------------------------------------------------------------------------


def next_logits(model, cache, mask):
    tokens = torch.full((len(mask), 1), 11)
    positions = mask.sum(1, keepdim=True)
    mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 1, 0, 1])), [1, 1, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ],
)
def test_rows_can_be_rearranged(model, change, rows):
    inputs, logits = prompts(), []
    for cache in (cache_for(model), own_cache(model)):
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        change(cache)
        logits.append(next_logits(model, cache, inputs["attention_mask"][rows]))
    torch.testing.assert_close(*logits)


def test_cropping_forgets_the_last_columns(model):
    inputs, logits = prompts(), []
    for cache in (cache_for(model), own_cache(model)):
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        cache.crop(-10)  # into the padding of the third row
        cache.crop(0)
        assert cache.get_seq_length() == 11
        logits.append(next_logits(model, cache, inputs["attention_mask"][:, :11])[:2])
    torch.testing.assert_close(*logits)
    with pytest.raises(ValueError, match="expected 0 or a negative number"):
        cache_for(model).crop(3)


def test_reset_gives_the_memory_back_and_takes_any_batch(model):
    cache = cache_for(model)
    model(**prompts(), past_key_values=cache)
    with pytest.raises(ShapeError, match="batch of 3 rows"):
        model(**prompts(batch=2), past_key_values=cache)
    cache.reset()
    assert cache.kv_cache.stats().num_seqs == 0
    assert cache.get_seq_length() == 0
    model(**prompts(batch=2), past_key_values=cache)
    assert cache.batch_size == 2


def test_caches_may_share_one_pool(model):
    pool = KVCache(cache_config(model, num_tokens=4096))
    caches = [TransformersCache(pool), TransformersCache(pool)]
    first = generate(model, caches[0], prompts())
    assert torch.equal(generate(model, caches[1], prompts()).sequences, first.sequences)
    caches[0].close()
    assert pool.stats().num_seqs == 3
    pool.check_integrity()


def test_a_deep_copy_is_a_fork(model):
    inputs, logits = prompts(), {}
    cache, reference = cache_for(model), own_cache(model)
    with torch.no_grad():
        for one in (cache, reference):
            model(**inputs, past_key_values=one)
    alone = cache.kv_cache.stats().used
    forked = copy.deepcopy(cache)
    assert forked.kv_cache is cache.kv_cache
    for name, one in (("fork", forked), ("parent", cache), ("theirs", copy.deepcopy(reference))):
        logits[name] = next_logits(model, one, inputs["attention_mask"])
    torch.testing.assert_close(logits["fork"], logits["theirs"])
    assert torch.equal(logits["fork"], logits["parent"])
    assert cache.kv_cache.stats().used < 2 * alone, "the fork shares the memory of its parent"
    cache.close()
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    next_logits(model, forked, mask)
    forked.kv_cache.check_integrity()
    assert copy.deepcopy(cache_for(model)).batch_size == -1


@pytest.mark.parametrize("raises", [False, True])
def test_a_lost_cache_is_gone_at_once(model, raises):
    """No cycle keeps it, and with it its rows, until the garbage collector comes by."""
    pool = KVCache(cache_config(model, num_tokens=4096))
    cache = TransformersCache(pool)
    gc.disable()
    try:
        generate(model, cache, prompts(), max_new_tokens=3)
        if raises:
            with contextlib.suppress(ShapeError):
                model(**prompts(batch=2), past_key_values=cache)
        lost = [weakref.ref(one) for one in (cache, cache._batch, cache.layers[0])]
        del cache
        assert [one() for one in lost] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_float32_model_may_have_a_16_bit_cache(model, stored):
    cache, exact = cache_for(model, dtype=stored), own_cache(model)
    with torch.no_grad():
        got = [model(**prompts(), past_key_values=one).logits[:, -1] for one in (cache, exact)]
        got += [next_logits(model, one, prompts()["attention_mask"])[:, -1] for one in (cache, exact)]
    assert cache.kv_cache.dtype == stored
    assert got[0].dtype == torch.float32
    for ours, theirs in ((got[0], got[1]), (got[2], got[3])):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_generation_works_under_autocast(model, stored):
    inputs, cache = prompts(), cache_for(model, dtype=stored)
    with torch.autocast("cpu", torch.bfloat16):
        got = generate(model, cache, inputs, max_new_tokens=6)
        theirs = generate(model, own_cache(model), inputs, max_new_tokens=6)
    assert (got.logits[0] - theirs.logits[0]).float().norm() < 0.05 * theirs.logits[0].float().norm()
    assert cache.get_seq_length() == 21 + 5
    cache.kv_cache.check_integrity()


# -- prefix reuse ----------------------------------------------------------------------------------------------------


def test_opened_prompts_are_computed_once(model):
    cache, inputs = cache_for(model), prompts(pads=(0, 2))
    assert cache.open(**inputs) == 0
    first = generate(model, cache, inputs)
    assert cache.open(**inputs) == 16
    assert cache.kv_cache.stats().reused_tokens == 16 + 16 + 16
    assert_same_tokens(generate(model, cache, inputs), first)
    cache.kv_cache.check_integrity()


def test_a_batch_is_found_under_its_own_salt_and_extra_keys(model):
    own, inputs = {"salt": ["a", "b"], "extra_keys": [None, [(12, "image")]]}, prompts(batch=2, pads=(0, 2))
    for other, columns in (({}, 0), ({"salt": "a"}, 2), ({"salt": ["a", "b"]}, 10), (own, 16)):
        cache = cache_for(model)
        assert cache.open(**inputs, **own) == 0
        generate(model, cache, inputs, max_new_tokens=1)
        assert cache.open(**inputs, **other) == columns, other
    for bad, error in (([None, [(1, "image")]], ShapeError), ([None], ArgumentError)):
        with pytest.raises(error, match="extra_keys"):
            cache.open(**inputs, extra_keys=bad)
    assert cache.get_seq_length() == 16, "what is refused changes nothing"


def test_what_comes_after_the_prompt_is_never_published(model):
    cache, inputs = cache_for(model), prompts(batch=1)
    cache.open(**inputs)
    out = generate(model, cache, inputs).sequences
    assert cache.open(out) == 16
    cache.crop(-8)
    other = {"input_ids": (out + 1) % VOCABULARY}
    with torch.no_grad():
        model(other["input_ids"][:, 8:], past_key_values=cache)
    cache.reset()
    assert cache.open(other["input_ids"]) == 0


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_full_pool_raises_and_changes_nothing(model):
    cache = cache_for(model, num_tokens=64, growth="fixed8")
    inputs = prompts(pads=())
    with pytest.raises(
        CacheFullError, match=r"no room for 21 more tokens in 1 of 3 rows \(sequence \d+: out of blocks"
    ):
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 0
    two = {name: tensor[:2] for name, tensor in inputs.items()}
    with pytest.raises(CacheFullError, match="no room for 1 more"):
        generate(model, cache, two, max_new_tokens=40)
    assert cache.get_seq_length() == 32
    cache.kv_cache.check_integrity()
    cache.batch_select_indices(torch.tensor([1]))
    next_logits(model, cache, torch.ones(1, 32, dtype=torch.long))


def test_an_exception_in_a_forward_is_forgotten_by_the_next(model):
    def fail(*args):
        raise KeyboardInterrupt

    cache, inputs = cache_for(model), prompts()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        for part in (model.model.layers[0].mlp, model.model.layers[1].self_attn.q_proj):
            hook = part.register_forward_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                next_logits(model, cache, inputs["attention_mask"])
            hook.remove()
    reference = own_cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=reference)
    ours = next_logits(model, cache, inputs["attention_mask"])
    torch.testing.assert_close(ours, next_logits(model, reference, inputs["attention_mask"]))


@pytest.fixture(params=[1, 2])
def layered(request):
    """A model of one layer, and one of two."""
    model = tiny(num_layers=request.param)
    model.set_attn_implementation("sdpa")
    use_kvtoolkit(model)
    yield model
    model.set_attn_implementation("sdpa")
    use_kvtoolkit(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("late", [False, True])
def test_a_model_that_does_not_attend_through_kvtoolkit_is_told(layered, implementation, late):
    cache, mask = cache_for(layered), prompts()["attention_mask"]
    if late:
        layered(**prompts(), past_key_values=cache)
    layered.set_attn_implementation(implementation)
    with pytest.raises(NotImplementedError, match="call use_kvtoolkit"):
        next_logits(layered, cache, mask) if late else layered(**prompts(), past_key_values=cache)


def last_attention(model):
    return model.model.layers[-1].self_attn


def changing(name, change):
    """A change of what the attention function of the last layer is given."""

    def set_up(model, monkeypatch):
        interface, attention = transformers.AttentionInterface._global_mapping, last_attention(model)
        former = interface["kvtoolkit"]

        def changed(module, query, key, value, mask, **options):
            given = {"query": query, "key": key, "value": value, "mask": mask, **options}
            if module is attention:
                given[name] = change(given.get(name))
            query, key, value, mask = (given.pop(part) for part in ("query", "key", "value", "mask"))
            return former(module, query, key, value, mask, **given)

        monkeypatch.setitem(interface, "kvtoolkit", changed)

    return set_up


CHANGES = {
    "acausal": (lambda model, patch: patch.setattr(last_attention(model), "is_causal", False), "is_causal=False"),
    "told acausal": (changing("is_causal", lambda _: False), "is_causal=False"),
    "no mask": (changing("mask", lambda _: None), "attention_mask: expected .*, got none"),
    "mask of numbers": (
        changing("mask", lambda _: torch.zeros(3, 1, 21, 21)),
        r"attention_mask: expected \[batch, col",
    ),
    "mask sliced": (changing("mask", lambda mask: mask[:, :3]), "changes the attention mask"),
    "keys scaled": (changing("key", lambda key: key * 2), "keys were used by something else"),
    "other keys": (changing("key", lambda key: key.states.clone()), "keys that are not those of the cache"),
    "another window": (changing("sliding_window", lambda _: 5), "sliding_window: expected that of the layer's mask"),
    "biased": (changing("position_bias", lambda _: 1), "position bias"),
    "dropout": (changing("dropout", lambda _: 0.1), "dropout: expected 0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_attends_in_another_way_is_refused(layered, monkeypatch, name):
    change, match = CHANGES[name]
    cache = cache_for(layered)
    change(layered, monkeypatch)
    with pytest.raises(NotImplementedError, match=match):
        layered(**prompts(), past_key_values=cache)
    assert cache.get_seq_length() == 0
    if name != "dropout":  # of a model in training, which may be ended
        with pytest.raises(NotImplementedError, match=match):
            cache_for(layered)


def test_what_is_not_supported_says_so(model):
    ids = prompts()["input_ids"]
    cache = cache_for(model)
    with pytest.raises(NotImplementedError, match=r"expected \[batch, columns\]"):
        model(ids, attention_mask=torch.zeros(3, 1, 21, 21), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="custom mask function"):
        transformers.masking_utils.create_causal_mask(
            model.config, torch.zeros(3, 21, 64), None, cache, and_mask_function=lambda b, h, q, k: q == k
        )
    with pytest.raises(ShapeError, match="attention_mask: expected"):
        model(ids, attention_mask=torch.zeros(3, 22).bool(), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot be offloaded"):
        cache.layers[0].offload()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("call", [use_kvtoolkit, cache_for])
@pytest.mark.parametrize(
    ("family", "options", "match"),
    [
        (
            "DeepseekV3",
            {"kv_lora_rank": 16, "q_lora_rank": 16, "n_routed_experts": 4, "n_group": 1},
            "latent attention",
        ),
        ("Bloom", {"n_head": 4}, "BloomForCausalLM attends by code of its own"),
        ("Falcon", {"alibi": True, "num_attention_heads": 4}, "ALiBi"),
    ],
)
def test_models_that_cannot_run_are_refused_with_the_reason(family, options, match, call):
    options = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, **options}
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options))
    with pytest.raises(NotImplementedError, match=match):
        call(model)


@pytest.mark.parametrize(
    ("family", "options", "match"),
    [
        ("T5", {}, "expected a decoder"),
        ("Gemma3nText", {}, "share keys and values"),
    ],
)
def test_models_of_another_make_are_refused(family, options, match):
    model = torch.nn.Module()
    model.config = getattr(transformers, f"{family}Config")(**options)
    with pytest.raises(NotImplementedError, match=match):
        cache_config(model, num_tokens=64)


@pytest.mark.parametrize("call", [use_kvtoolkit, cache_for, functools.partial(cache_config, num_tokens=64)])
def test_what_is_no_model_is_refused(model, call):
    for wrong in (None, 5, "model", model.config, torch.nn.Linear(2, 2), type(model)):
        with pytest.raises(ArgumentError, match="model: expected a model of transformers, got"):
            call(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foo": 1}, "'foo': expected one of num_layers, "),
        ({"num_token": 1}, "'num_token': expected one of .*; did you mean 'num_tokens'"),
        ({"foo": 1, "layer_groups": None}, "'foo': expected one of"),
        ({"foo": 1, "layer_groups": [{"layers": [0, 1]}]}, "'foo': expected one of"),
        ({"foo": 1, "lengths": 64}, "'foo': expected one of"),
        ({"step_tokens": 64}, "step_tokens: expected it only with lengths, got 64 without them"),
        ({"head_dim": 32}, "head_dim: expected 64, which the model has, or none, got 32"),
        ({"head_dim": "64"}, "head_dim: expected 64, .*, got '64'"),
        ({"num_kv_heads": 4}, "num_kv_heads: expected 2, which the model has, or none, got 4"),
        ({"num_layers": 3}, "num_layers: expected 2, which the model has, or none, got 3"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_cache_is_made(model, options, message):
    with pytest.raises(ConfigError, match=message):
        cache_for(model, **options)


def test_what_is_no_cache_and_what_are_no_tokens_is_refused(model):
    with pytest.raises(ArgumentError, match="kv_cache: expected a KVCache, got CacheConfig"):
        TransformersCache(cache_for(model).kv_cache.config)
    cache, ids = cache_for(model), torch.ones((1, 9), dtype=torch.long)
    cache.open(ids)
    for name, arguments in (("input_ids", (None,)), ("input_ids", ([[1]],)), ("attention_mask", (ids, [[1]]))):
        with pytest.raises(ShapeError, match=rf"{name}: expected a tensor \[batch, columns\], got"):
            cache.open(*arguments)
    assert cache.batch_size == 1


def test_a_model_on_a_gpu_gets_a_cache_beside_it():
    model = torch.nn.Module()
    model.config, model.dtype, model.device = tiny().config, torch.bfloat16, torch.device("cuda", 1)
    config = cache_config(model, num_tokens=64)
    assert (config.backend, config.device, config.dtype) == ("cuda", 1, "bfloat16")
    assert (cache_config(model, num_tokens=64, backend="numba").backend, config.device) == ("numba", 1)
    assert cache_config(model, num_tokens=64, backend="cpu").device is None
    model.dtype = torch.float32
    with pytest.raises(UnsupportedError, match="dtype: expected float16 or bfloat16 with backend 'cuda', got float32"):
        cache_config(model, num_tokens=64)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(NotImplementedError, match="expected a model on one device"):
        cache_config(model, num_tokens=64)


def test_a_model_elsewhere_than_its_cache_is_refused(model):
    cache = cache_for(model)
    cache._batch.device = 1  # as if its memory were there
    with pytest.raises(NotImplementedError, match="expected a model on cuda:1, where the cache is, got one on cpu"):
        model(**prompts(), past_key_values=cache)
    assert cache.kv_cache.stats().num_seqs == 0


def test_a_mask_may_not_change_what_is_cached(model):
    cache, inputs = cache_for(model), prompts()
    model(**inputs, past_key_values=cache)
    with pytest.raises(ShapeError, match="masked as when they were computed"):
        next_logits(model, cache, inputs["attention_mask"].flip(1))


# -- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    if missing := missing_packages():
        pytest.skip(f"{', '.join(missing)} not installed")
    model, tokenizer = load_smollm2()
    use_kvtoolkit(model)
    return model, tokenizer


TEXTS = ["The capital of France is", "Once upon a time there was a little girl who", "def fibonacci(n):"]


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_smollm2_writes_what_it_writes_on_dynamic_cache(smollm2, options):
    model, tokenizer = smollm2
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 12, **options}  # the tiny models above write more
    got = generate(model, cache_for(model), inputs, **options)
    assert_same_tokens(got, generate(model, own_cache(model), inputs, **options))
    assert "Paris" in tokenizer.decode(got.sequences[0]) or len(options) > 1


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_does_not_depend_on_allocator_and_growth_policy(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    pools = [POOLS[1], POOLS[3], POOLS[5]]
    logits = [
        torch.stack(generate(model, cache_for(model, **pool), inputs, max_new_tokens=12).logits) for pool in pools
    ]
    assert all(torch.equal(other, logits[0]) for other in logits[1:])
