"""Models in which layers have windows, chunks, softcaps or sinks: they give what they give on transformers' own cache.

Prompts are longer than the window, and sequences go on until they have crossed it several times.
"""

import copy
import functools
import itertools
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvtoolkit import ArgumentError, CacheConfig, CacheFullError, ConfigError, KVCache, UnsupportedError  # noqa: E402
from kvtoolkit.integrations import layer_groups  # noqa: E402
from kvtoolkit.integrations.transformers import TransformersCache, cache_config, use_kvtoolkit  # noqa: E402
from tests.kvtoolkit.integrations import families  # noqa: E402

W = 16
F, S, C = "full_attention", "sliding_attention", "chunked_attention"
USE = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}


class Family(NamedTuple):
    """How a family is made tiny, and what its layers then see: a window, minus a chunk, or 0 for all."""

    changes: dict
    spans: list


FAMILIES = {
    "gemma2": Family({"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 50}, [W, 0]),
    "gemma3_text": Family({"num_hidden_layers": 4, "layer_types": [S, S, S, F]}, [W, W, W, 0]),
    "gpt_oss": Family({}, [W, 0]),
    "mistral": Family({}, [W, W]),
    "mixtral": Family({}, [W, W]),
    "phi3": Family({}, [W, W]),
    "phimoe": Family({}, [W, W]),  # its window is in the mask alone
    "qwen2": Family(USE, [0, W]),
    "qwen2_moe": Family(USE, [W, 0]),
    "qwen3": Family(USE, [0, W]),
    "qwen3_moe": Family({"use_sliding_window": True}, [W, W]),
    "llama4_text": Family({"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}, [-W, 0, -W]),
    "cohere2": Family({}, [W, 0]),
    "cohere2_moe": Family({}, [W, 0]),
    "exaone4": Family({}, [W, 0]),
    "exaone_moe": Family({}, [W, 0]),
}
PADS = (0, 5, 21)
COLUMNS, NEW = 40, 30
POOL = {"growth": "append"}  # blocks of 8, so that what a window keeps is least
POOLS = {
    "prompts at once": ({}, {"num_tokens": 512, **POOL}),
    "prompts in pieces": ({"prefill_chunk_size": 7}, {"num_tokens": 512, "lengths": 128, "step_tokens": 21, **POOL}),
    "all kept": ({}, {"num_tokens": 512, "layer_groups": None}),
}


@functools.cache
def tiny(name):
    """A model, and what it generates on its own cache."""
    family = FAMILIES[name]
    window = {"attention_chunk_size": W, "layer_types": None} if name == "llama4_text" else {"sliding_window": W}
    model = families.tiny_model(name, **(window | family.changes))
    if "attn_logit_softcapping" in family.changes:
        model.set_attn_implementation("eager")  # "sdpa" leaves the softcap out
    expected = generate(model)
    use_kvtoolkit(model)
    return model, expected


def prompts(columns=COLUMNS):
    """Token ids and mask, ``[batch, columns]``, padded on the left."""
    ids = torch.randint(3, 89, (len(PADS), columns), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADS):
        ids[row, :count] = mask[row, :count] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, cache=None, **options):
    given = {} if cache is None else {"past_key_values": cache}
    fixed = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**prompts(), **given, **fixed, **options, return_dict_in_generate=True, output_logits=True)


def assert_equal(got, expected):
    """Equal logits in every step, for each row until two tokens are likeliest."""
    scale = max(logits.abs().max().item() for logits in expected.logits)
    same = torch.ones(len(PADS), dtype=torch.bool)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours[same], theirs[same], rtol=0, atol=2e-5 * scale)
        best, second = theirs.topk(2).values.unbind(1)
        parted = same & (ours.argmax(1) != theirs.argmax(1))
        assert ((best - second)[parted] < 4e-5 * scale).all()
        same &= ~parted
    assert same.any()


def spans_of(config):
    of = {layer: group.span for group in config.groups for layer in group.layers}
    return [of[layer] for layer in range(config.num_layers)]


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "mistral", "llama4_text"])
def test_a_prompt_goes_on_from_what_an_earlier_one_has_left_in_all_groups(name, quiet):
    model, expected = tiny(name)
    scale = max(logits.abs().max().item() for logits in expected.logits)
    prompt = {key: value[:1] for key, value in prompts().items()}
    cache = TransformersCache.for_model(model, num_tokens=1024, **POOL)
    for found in (0, 32):
        assert cache.open(**prompt) == found
        options = {"max_new_tokens": 1, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
        got = model.generate(**prompt, past_key_values=cache, do_sample=False, **options)
        torch.testing.assert_close(got.logits[0], expected.logits[0][:1], rtol=0, atol=2e-5 * scale)
        cache.reset()
        cache.kv_cache.check_integrity()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_generates_what_it_generates_on_its_own_cache(name, pool, quiet):
    model, expected = tiny(name)
    generation, options = POOLS[pool]
    spans = FAMILIES[name].spans
    if pool == "all kept" and min(spans) < 0:
        with pytest.raises(ConfigError, match="expected groups with chunks for a model that attends in chunks"):
            TransformersCache.for_model(model, **options)
        return
    cache = TransformersCache.for_model(model, **options)
    assert_equal(generate(model, cache, **generation), expected)
    cache.kv_cache.check_integrity()
    assert spans_of(cache.kv_cache.config) == ([0] * len(spans) if pool == "all kept" else spans)
    for group in cache.kv_cache.stats().groups:
        if group.window or group.chunk:
            assert group.used <= len(PADS) * (W + 1 + 13)
        else:
            assert group.used >= len(PADS) * (COLUMNS + NEW - 1) - sum(PADS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_says_what_a_trial_shows(name, quiet):
    """It may be an object of transformers, its dict, or a dict without what transformers fills in."""
    config, spans = tiny(name)[0].config, FAMILIES[name].spans
    assert spans_of(CacheConfig.for_model(config, num_tokens=512)) == spans
    assert spans_of(CacheConfig.for_model(config.to_dict(), num_tokens=512)) == spans
    if name in ("gemma3_text", "cohere2_moe", "exaone_moe"):  # the last two must have layer_types
        return
    few = {key: value for key, value in config.to_dict().items() if key not in ("layer_types", "no_rope_layers")}
    few["num_hidden_layers"] = 3
    filled = type(config)(**few)
    assert spans_of(CacheConfig.for_model(few, num_tokens=512)) == spans_of(
        CacheConfig.for_model(filled, num_tokens=512)
    )


def test_a_model_without_windows_has_no_groups(quiet):
    model = families.tiny_model("qwen2", use_sliding_window=False)
    assert TransformersCache.for_model(model, num_tokens=512).kv_cache.config.layer_groups is None


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("gemma2", [{"layers": [0, 1], "window": W}], f"layer 1 to keep all tokens, .*got a window of {W}"),
        (
            "gemma2",
            [{"layers": 0, "window": 8}, {"layers": 1}],
            f"layer 0 to keep a window of {W}, .*got a window of 8",
        ),
        ("gemma2", [{"layers": 0, "chunk": W}, {"layers": 1}], f"layer 0 to keep a window of {W}, .*got chunks of {W}"),
        ("llama4_text", [{"layers": range(3)}], f"layer 0 to keep chunks of {W}, .*got all tokens"),
    ],
)
def test_groups_that_do_not_fit_a_model_are_refused(name, groups, message):
    model, _ = tiny(name)
    with pytest.raises(ConfigError, match=f"layer_groups: expected {message}"):
        TransformersCache.for_model(model, num_tokens=512, layer_groups=groups)


def test_groups_that_keep_more_than_windows_are_taken(quiet):
    model, expected = tiny("gemma2")
    cache = TransformersCache.for_model(
        model, num_tokens=512, layer_groups=[{"layers": [0], "window": 40}, {"layers": 1}]
    )
    assert_equal(generate(model, cache), expected)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "gemma2",
            {"layer_groups": [{"layers": [0, 1], "window": W}]},
            ArgumentError,
            "layer 1, which keeps 16 tokens",
        ),
        ("llama4_text", {}, NotImplementedError, f"keeps chunks of {W} for layer 0, .*got all tokens"),
        ("gemma2", {"layer_groups": [{"layers": [0, 1], "chunk": W}]}, NotImplementedError, "keeps a window of 16 for"),
    ],
)
def test_a_cache_made_for_another_model_is_refused(name, options, error, message, quiet):
    model, _ = tiny(name)
    cache = TransformersCache(KVCache(cache_config(model, num_tokens=512, **options)))
    with pytest.raises(error, match=message):
        generate(model, cache)
    assert cache.get_seq_length() == 0


def test_chunks_that_are_no_whole_granules_are_refused(quiet):
    model = families.tiny_model("llama4_text", attention_chunk_size=12, layer_types=None)
    with pytest.raises(NotImplementedError, match="attention_chunk_size: expected a multiple of 8, got 12"):
        TransformersCache.for_model(model, num_tokens=512)


def test_a_prompt_for_which_a_window_has_no_room_says_what_to_do(quiet):
    model, _ = tiny("gemma2")
    cache = TransformersCache.for_model(model, num_tokens=512, lengths=512, step_tokens=21)
    assert cache.kv_cache.config.group_configs[0].num_tokens == 128
    with pytest.raises(CacheFullError, match=r"feed prompts in pieces \(prefill_chunk_size\)"):
        generate(model, cache)


def test_where_a_cache_cannot_have_groups_all_layers_keep_all_tokens(monkeypatch):
    """Windows are obeyed there, but free nothing; chunks need groups, and so does what ``lengths`` promises."""

    class WithoutGroups(CacheConfig):
        def __post_init__(self):
            if self.layer_groups:
                raise UnsupportedError("no groups here")
            super().__post_init__()

    monkeypatch.setattr(layer_groups, "CacheConfig", WithoutGroups)
    fields = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 16, "num_tokens": 512}
    assert not layer_groups.grouped_config([W, 0], None, 512, fields).is_grouped
    for spans, lengths in (([-W, 0], None), ([W, 0], 300)):
        with pytest.raises(UnsupportedError, match="no groups here"):
            layer_groups.grouped_config(spans, lengths, 512, fields)


@pytest.mark.parametrize("size", [{"num_tokens": 1000}, {"memory": 1 << 20}])
def test_groups_get_as_many_slots_as_a_cache_without_them(size):
    fields = {"num_layers": 3, "num_kv_heads": 1, "head_dim": 16, **size}
    config = layer_groups.grouped_config([W, 0, W], None, 512, fields)
    assert [8 * one.num_granules for one in config.group_configs] == [8 * CacheConfig(**fields).num_granules] * 2


@pytest.mark.parametrize("name", ["gemma2", "llama4_text"])
def test_padding_between_tokens_may_not_stretch_a_window(name, quiet):
    """A window counts columns in transformers and tokens here, which is the same until padding is in between."""
    model, _ = tiny(name)
    ids = prompts()["input_ids"][:1]
    mask = torch.ones_like(ids)
    mask[0, 20:23] = 0
    cache = TransformersCache.for_model(model, num_tokens=512)
    with pytest.raises(NotImplementedError, match="no padding between tokens that are further apart than the window"):
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    short = slice(12, 12 + W)  # within the window it makes no difference
    with torch.no_grad():
        model(input_ids=ids[:, short], attention_mask=mask[:, short], past_key_values=cache)


def test_beams_and_forks_work_on_groups(quiet):
    model, _ = tiny("gpt_oss")
    options = {"num_beams": 3, "max_new_tokens": 20}
    fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = TransformersCache.for_model(model, num_tokens=1024)
    got = model.generate(**prompts(), **fixed, **options, past_key_values=cache)
    assert torch.equal(got, model.generate(**prompts(), **fixed, **options))
    cache.kv_cache.check_integrity()


def test_rejected_tokens_are_taken_back(quiet):
    model, _ = tiny("gemma3_text")
    inputs = {"input_ids": prompts()["input_ids"][:1, :7].repeat(1, 4)}
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = TransformersCache.for_model(model, num_tokens=512)
    got = model.generate(**inputs, **options, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(got, model.generate(**inputs, **options))
    assert cache.get_seq_length() < got.shape[1]
    cache.kv_cache.check_integrity()


def test_columns_whose_past_is_gone_cannot_be_taken_back(quiet):
    model, _ = tiny("gemma2")
    cache = TransformersCache.for_model(model, num_tokens=512)
    fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = prompts()
    first = model.generate(**inputs, **fixed, max_new_tokens=20, past_key_values=cache)
    columns = cache.get_seq_length()
    with pytest.raises(ArgumentError, match="expected 0 or at least"):
        cache.crop(-25)
    assert cache.get_seq_length() == columns
    inputs = {"input_ids": first, "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 20).long()], 1)}
    more = model.generate(**inputs, **fixed, max_new_tokens=10, past_key_values=cache)
    assert torch.equal(more, model.generate(**prompts(), **fixed, max_new_tokens=30))


def test_rows_that_cannot_begin_at_one_column_begin_at_the_first(quiet, monkeypatch):
    """Windows may hold only the end of what a row has found, so it cannot be cut to where the others begin."""
    model, expected = tiny("mistral")
    pool = TransformersCache.for_model(model, num_tokens=1024, layer_groups=None).kv_cache
    inputs, asked, truncate = prompts(), [], KVCache.truncate
    first = TransformersCache(pool)
    assert first.open(**inputs) == 0
    generate(model, first)
    first.reset()

    def without_past(cache, seq_ids, new_lens):
        asked.append(new_lens.tolist())
        if any(new_lens):
            raise ArgumentError("new_lens[0]: expected 0 or at least 30")
        truncate(cache, seq_ids, new_lens)

    monkeypatch.setattr(KVCache, "truncate", without_past)
    second = TransformersCache(pool)
    assert second.open(**inputs) == 0
    assert asked == [[32, 27, 11], [0, 0, 0]]
    assert_equal(generate(model, second), expected)


def logits_of(model, cache, more):
    """``[tokens of rows, vocabulary]`` float32: the prompts in pieces of 7 columns, then ``more`` column by column."""
    inputs = prompts()
    ids = torch.cat([inputs["input_ids"], more], 1).to(model.device)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1).to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    bounds = [*range(0, COLUMNS, 7), *range(COLUMNS, ids.shape[1] + 1)]
    logits = []
    with torch.no_grad():
        for start, stop in itertools.pairwise(bounds):
            given = {
                "attention_mask": mask[:, :stop],
                "position_ids": positions[:, start:stop],
                "past_key_values": cache,
            }
            logits.append(model(ids[:, start:stop], **given).logits[mask[:, start:stop].bool()])
    return torch.cat(logits).float().cpu()


SOME = ["gemma2", "gemma3_text", "gpt_oss", "mistral", "phi3", "qwen3", "llama4_text", "exaone4"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SOME)
def test_in_16_bits_logits_are_as_exact_as_on_the_models_own_cache(name, device, quiet):
    exact, _ = tiny(name)
    more = torch.randint(3, 89, (len(PADS), NEW), generator=torch.Generator().manual_seed(5))
    expected = logits_of(exact, transformers.DynamicCache(config=exact.config), more)
    model = copy.deepcopy(exact).to(device, torch.float16)
    cache = TransformersCache.for_model(model, num_tokens=1024, lengths=128, step_tokens=21, growth="append")
    assert spans_of(cache.kv_cache.config) == FAMILIES[name].spans
    ours, theirs = (
        (logits_of(model, one, more) - expected).norm(dim=-1) / expected.norm(dim=-1)
        for one in (cache, transformers.DynamicCache(config=model.config))
    )
    assert ours.norm() < 1.5 * theirs.norm()
    cache.kv_cache.check_integrity()
