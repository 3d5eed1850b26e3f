"""`CacheConfig.for_model`: what it reads of a model, and how it divides memory."""

import types

import numpy as np
import pytest

from kvtoolkit import CacheConfig, ConfigError, KVCache, UnsupportedError

GEMMA3_27B = {
    "model_type": "gemma3",
    "dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text", "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16,
        "hidden_size": 5376, "head_dim": 128, "sliding_window": 1024, "sliding_window_pattern": 6,
    },
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "torch_dtype": "bfloat16", "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "hidden_size": 2880, "head_dim": 64, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
LLAMA4 = {"model_type": "llama4_text", "attention_chunk_size": 64}
SLIDING = {"model_type": "qwen2", "sliding_window": 32}
GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 32}
USE = {"use_sliding_window": True, "max_window_layers": 2}
TINY = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


def spans(config):
    """For each layer its window, minus its chunk, or 0."""
    of = {layer: group.span for group in config.groups for layer in group.layers}
    return [of[layer] for layer in range(config.num_layers)]


def read(**fields):
    return CacheConfig.for_model(TINY | fields, num_tokens=4096, max_seqs=4)


def test_shape_and_dtype_are_those_of_the_model():
    config = CacheConfig.for_model(GEMMA3_27B, num_tokens=8192)
    assert (config.num_layers, config.num_kv_heads, config.head_dim, config.dtype) == (62, 16, 128, "bfloat16")
    config = read(num_key_value_heads=None)
    assert (config.num_layers, config.num_kv_heads, config.head_dim, config.dtype) == (4, 4, 16, "float16")
    assert config.layer_groups is None


def test_a_field_given_wins_over_the_model():
    config = CacheConfig.for_model(GPT_OSS_20B, num_tokens=8192, dtype="float32", layer_groups=None, max_seqs=3)
    assert (config.dtype, config.layer_groups, config.max_seqs) == ("float32", None, 3)


def test_an_object_is_read_like_a_dict():
    given = types.SimpleNamespace(**GPT_OSS_20B)
    assert CacheConfig.for_model(given, num_tokens=4096) == CacheConfig.for_model(GPT_OSS_20B, num_tokens=4096)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 32}, [0, 32, 0, 32]),
        ({"model_type": "mistral", "sliding_window": 32}, [32] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [0] * 4),
        ({"model_type": "gemma2", "sliding_window": 32}, [32, 0, 32, 0]),
        ({"model_type": "cohere2", "sliding_window": 32}, [32, 32, 32, 0]),
        ({"model_type": "gemma3_text", "sliding_window": 32, "sliding_window_pattern": 3}, [32, 32, 0, 32]),
        ({"model_type": "exaone4", "sliding_window": 32, "sliding_window_pattern": "LLG"}, [32, 32, 0, 32]),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False, "max_window_layers": 2}, [0] * 4),
        ({"model_type": "qwen3", "sliding_window": 32} | USE, [0, 0, 32, 32]),
        ({"model_type": "qwen2_moe", "sliding_window": 32} | USE, [32, 0, 0, 0]),
        ({"model_type": "qwen3_moe", "sliding_window": 32, "use_sliding_window": True}, [32] * 4),
        ({"model_type": "qwen3_moe", "sliding_window": 32}, [0] * 4),
        ({"model_type": "llama4_text", "attention_chunk_size": 64}, [-64, -64, -64, 0]),
        ({"model_type": "llama4_text", "attention_chunk_size": 64, "no_rope_layers": [0, 1, 0, 1]}, [0, -64, 0, -64]),
        ({"model_type": "llama4_text", "attention_chunk_size": None}, [0] * 4),
    ],
    ids=lambda value: value.get("model_type", "layer_types") if isinstance(value, dict) else "",
)  # fmt: skip
def test_windows_and_chunks_are_read(fields, expected):
    assert spans(read(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_hidden_layers": None}, ConfigError, "num_hidden_layers: expected an int from 1 to 65536, got None"),
        ({"hidden_size": None}, ConfigError, "hidden_size: expected an int of at least 1, got None"),
        ({"layer_types": ["full_attention"]}, ConfigError, "layer_types: expected a list of 4 kinds"),
        ({"layer_types": ["linear_attention"] * 4}, UnsupportedError, "expected .*full_attention.*, got 'linear_atten"),
        ({"layer_types": ["sliding_attention"] * 4}, ConfigError, "sliding_window: expected a number of tokens"),
        ({"layer_types": ["chunked_attention"] * 4}, ConfigError, "attention_chunk_size: expected a number of tokens"),
        ({"model_type": "other", "sliding_window": 8}, ConfigError, "layer_types: expected them in .* of 'other'"),
        ({"model_type": "other", "attention_chunk_size": 8}, ConfigError, "layer_types: expected .* with chunks"),
        ({"num_hidden_layers": 10**8}, ConfigError, "num_hidden_layers: expected an int from 1 to 65536, got 1000"),
        ({"layer_types": ["full_attention"] * 5}, ConfigError, "layer_types: expected a list of 4 kinds.*, got 5: "),
        ({"layer_types": [["full_attention"]] * 4}, UnsupportedError, r"layer_types: expected .*, got \['full_att"),
        ({"num_key_value_heads": 3}, ConfigError, "num_key_value_heads: expected a divisor of num_attention_heads, wh"),
        ({"num_key_value_heads": 0}, ConfigError, "num_key_value_heads: expected an int of at least 1, got 0"),
        ({"text_config": 5}, ConfigError, "text_config: expected a configuration of transformers, or a dict, got 5"),
        (LLAMA4 | {"no_rope_layers": 3}, ConfigError, "no_rope_layers: expected a list of 4 .*, got 3$"),
        (LLAMA4 | {"no_rope_layers": "1010"}, ConfigError, "no_rope_layers: expected a list of 4 .*, got '1010'"),
        (LLAMA4 | {"no_rope_layers": [1, 1]}, ConfigError, r"no_rope_layers: expected a list of 4 .*, got 2: \[1, 1\]"),
        (LLAMA4 | {"no_rope_layers": [1] * 5}, ConfigError, "no_rope_layers: expected a list of 4 .*, got 5: "),
        (LLAMA4 | {"no_rope_layers": [1, 1, 1, "0"]}, ConfigError, "no_rope_layers: expected 0 or 1 for each layer"),
        (LLAMA4 | {"no_rope_layer_interval": 0}, ConfigError, "no_rope_layer_interval: expected an int of at least 1"),
        (LLAMA4 | {"attention_chunk_size": 63}, ConfigError, "attention_chunk_size: expected a multiple of 8, got 63"),
        (SLIDING | {"use_sliding_window": "false"}, ConfigError, "use_sliding_window: expected true or false, got 'fa"),
        (SLIDING | {"sliding_window": "32"} | USE, ConfigError, "sliding_window: expected a number .*got '32'"),
        (SLIDING | USE | {"max_window_layers": None}, ConfigError, "max_window_layers: expected an int of at least 0"),
        (GEMMA3 | {"sliding_window_pattern": "3"}, ConfigError, "sliding_window_pattern: expected an int, or a text"),
        (GEMMA3 | {"sliding_window_pattern": ""}, ConfigError, "sliding_window_pattern: expected an int, or a text"),
        (GEMMA3 | {"sliding_window_pattern": 0}, ConfigError, "sliding_window_pattern: expected an int from 1 to"),
        (GEMMA3 | {"sliding_window_pattern": 2.5}, ConfigError, "sliding_window_pattern: expected an int from 1 to"),
        ({"kv_lora_rank": 512}, UnsupportedError, "kv_lora_rank: expected a model without it, because latent"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why(fields, error, message):
    with pytest.raises(error, match=message):
        read(**fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected exactly one of num_tokens and memory, got None and None"),
        ({"num_tokens": 64, "memory": 1}, "expected exactly one of num_tokens and memory, got 64 and 1"),
        ({"memory": "1 MB"}, "memory: expected room for step_tokens = 512 .*got '1 MB'"),
        ({"num_tokens": 4096, "lengths": []}, r"lengths: expected a number of tokens, .*got \[\]"),
        ({"num_tokens": 4096, "lengths": [5, 0]}, r"lengths: expected a number of tokens, .*got \[5, 0\]"),
        ({"num_tokens": 4096, "lengths": "long"}, "lengths: expected a number of tokens, .*got 'long'"),
        ({"num_tokens": 4096, "step_tokens": -1}, "step_tokens: expected an int of at least 0, got -1"),
        ({"num_tokens": 4096, "nun_tokens": 1}, "'nun_tokens': expected one of .*did you mean 'num_tokens'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CacheConfig.for_model(GPT_OSS_20B, **options)


def test_memory_counts_the_tiers_of_layers_that_keep_all_tokens():
    tiers = {"warm": "int8", "cold": "int4"}
    plain = CacheConfig.for_model(GPT_OSS_20B, memory="4 GiB")
    mixed = CacheConfig.for_model(GPT_OSS_20B, memory="4 GiB", tiers=tiers)
    assert [group.tiers is None for group in mixed.group_configs] == [bool(group.span) for group in mixed.groups]
    for config in (plain, mixed):
        assert 0.99 * (4 << 30) < config.nbytes <= 4 << 30
    assert mixed.seq_len_limit > 1.5 * plain.seq_len_limit


def test_what_is_no_configuration_is_refused():
    for wrong in (None, "gemma3", [GPT_OSS_20B], 5):
        with pytest.raises(ConfigError, match="model_config: expected a configuration of transformers, or a dict, got"):
            CacheConfig.for_model(wrong, num_tokens=64)


GIB = 1 << 30


# one sequence, then 64; by hand: layers, slots, and bytes of a token in a layer
@pytest.mark.parametrize(
    ("model", "length", "num_seqs", "grouped", "plain"),
    [
        (GEMMA3_27B, 8192, 1, 52 * 1664 * 8192 + 10 * 8192 * 8192, 62 * 8192 * 8192),
        (GEMMA3_27B, 32768, 1, 52 * 1664 * 8192 + 10 * 32768 * 8192, 62 * 32768 * 8192),
        (GEMMA3_27B, 32768, 64, 52 * 70528 * 8192 + 10 * 64 * 32768 * 8192, 62 * 64 * 32768 * 8192),
        (GPT_OSS_20B, 8192, 1, 12 * 768 * 2048 + 12 * 8192 * 2048, 24 * 8192 * 2048),
        (GPT_OSS_20B, 32768, 1, 12 * 768 * 2048 + 12 * 32768 * 2048, 24 * 32768 * 2048),
        (GPT_OSS_20B, 8192, 64, 12 * 13184 * 2048 + 12 * 64 * 8192 * 2048, 24 * 64 * 8192 * 2048),
    ],
)
def test_bytes_of_large_models_with_and_without_groups(model, length, num_seqs, grouped, plain):
    config = CacheConfig.for_model(model, lengths=length, num_tokens=num_seqs * length)
    assert config.nbytes == grouped
    assert CacheConfig.for_model(model, num_tokens=num_seqs * length, layer_groups=None).nbytes == plain


@pytest.mark.parametrize("model", [GEMMA3_27B, GPT_OSS_20B])
@pytest.mark.parametrize("lengths", [8192, 32768, [100, 4000, 30000]])
def test_memory_is_filled(model, lengths):
    config = CacheConfig.for_model(model, lengths=lengths, memory="16 GiB")
    assert 15.98 * GIB < config.nbytes <= 16 * GIB


@pytest.mark.parametrize("lengths", [2000, [100, 9000]])
def test_memory_is_filled_where_layers_that_keep_all_tokens_have_tiers(lengths):
    fields = {"lengths": lengths, "memory": "1 GiB"}
    plain, config = (
        CacheConfig.for_model(GEMMA3_27B, **fields, **tiers)
        for tiers in ({}, {"tiers": {"warm": "int8", "cold": "int4"}})
    )
    assert 0.98 * 2**30 < config.nbytes <= 2**30
    window, full = config.group_configs
    assert (window.tiers is None, full.tiers is None) == (True, False)
    assert full.num_granules > plain.group_configs[1].num_granules  # they take less, so there are more


def test_memory_is_filled_if_every_layer_has_a_window():
    layers = ["sliding_attention", "chunked_attention"] * 2
    model = TINY | {"layer_types": layers, "sliding_window": 64, "attention_chunk_size": 512}
    config = CacheConfig.for_model(model, lengths=100_000, memory="1 GiB", max_seqs=4)
    assert 0.99 * GIB < config.nbytes <= GIB


def test_a_sample_of_lengths_counts_by_its_means():
    lengths = np.array([100, 300, 8000])  # of a window of 128 they hold 100, 198 and 198
    config = CacheConfig.for_model(GPT_OSS_20B, lengths=lengths, num_tokens=64 * 8400, step_tokens=1000)
    window, full = config.groups
    assert full.num_tokens == 64 * 8400
    assert window.num_tokens == -(-(64 * 496 + 1000) // 64) * 64


def test_a_model_in_which_all_layers_have_one_window_has_one_pool():
    config = read(model_type="mistral", sliding_window=32)
    assert [(group.window, group.num_tokens) for group in config.groups] == [(32, None)]
    assert config.num_tokens == 4096


def test_sequences_of_the_expected_length_fill_all_groups_at_the_same_time():
    """Room for eight sequences of 640 tokens, fed 64 at a time in all, and not for a ninth."""
    model = TINY | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
    config = CacheConfig.for_model(model, lengths=640, step_tokens=64, num_tokens=8 * 640, dtype="float32")
    cache = KVCache(config)
    for _ in range(8):
        seq, _ = cache.open([[]])
        for _ in range(10):
            step = cache.begin_step(seq, 64)
            assert step.ok.all()
            cache.end_step(step)
    step = cache.begin_step(cache.open([[]])[0], 64)
    assert not step.ok.any()
    window, full = cache.stats().groups
    assert full.used == full.capacity
    assert window.used > window.capacity / 2
