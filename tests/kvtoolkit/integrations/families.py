"""Every causal family of the installed transformers, made tiny: equal to its own cache, or refused by `for_model`.

    python -m tests.kvtoolkit.integrations.families

writes the table of docs/models.md; it takes some minutes on one core.
"""

import contextlib
import datetime
import inspect
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvtoolkit.integrations.transformers import TransformersCache, use_kvtoolkit

# attributes of configurations, whatever they are called, and what makes a model tiny
SIZES: dict[str, Any] = {
    "vocab_size": 97, "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "seq_length": 512,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "embed_dim": 64, "embedding_size": 64, "dim": 64,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "ffn_hidden_size": 96, "decoder_ffn_dim": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "intermediate_size_mlp": 96, "dense_intermediate_size": 96,
    "prefix_dense_intermediate_size": 96, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "multi_query": None, "head_dim": 16,
    "kv_channels": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "attention_multiplier": 0.2, "index_head_dim": 16, "index_n_heads": 2,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "state_size": 8, "conv_kernel": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "global_head_dim": 16, "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8, "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "is_decoder": True, "add_cross_attention": False, "use_cache": True, "word_embed_proj_dim": 64,
    "max_source_positions": 64, "max_target_positions": 512, "lru_width": 64, "attention_window_size": 9,
    "original_max_position_embeddings": 512, "image_token_id": 90, "audio_token_id": 91, "video_token_id": 92,
}  # fmt: skip
WINDOW = {"sliding_window": 9, "attention_chunk_size": 16, "use_sliding_window": True, "max_window_layers": 1}
OFTEN_NONE = {*WINDOW, "head_dim", "num_key_value_heads"}  # attributes whose usual value may be None
STATUSES = ("equal", "refused", "different", "unknown")
TABLE = Path(__file__).parents[3] / "docs" / "models.md"
MOST_PARAMETERS = 4_000_000
COLUMNS = (21, 3, 1)  # of three forwards
PADDING = (0, 5)


class Verdict(NamedTuple):
    """What became of a family."""

    family: str
    status: str
    """``equal``, ``refused``, ``different`` or ``unknown``, where the model could not be made or run by itself."""
    detail: str


def families() -> list[str]:
    """Model types that have a causal language model here."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(family: str, **changes: Any) -> Any:
    """A model of a family with few small layers and random weights, in evaluation mode, float32."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    config = tiny_config(model_class.config_class, **changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"not made tiny: {size} parameters")
    torch.manual_seed(7)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return model


def tiny_config(config_class: Any, **changes: Any) -> Any:
    """A configuration with the sizes of `SIZES`, those of its parts too, and one layer of each usual kind."""
    usual = config_class()
    options = {}
    for name, value in (SIZES | WINDOW).items():
        computed = isinstance(inspect.getattr_static(config_class, name, None), property)
        given = getattr(usual, name, None) is not None or (name in OFTEN_NONE and hasattr(usual, name))
        if value is not None and given and not computed:
            options[name] = value
    layers = getattr(usual, "num_hidden_layers", None)
    for name, value in usual.to_dict().items():
        if isinstance(value, list) and len(value) == layers and layers != 2 and layers:
            options[name] = ends(value)
    for name in getattr(config_class, "sub_configs", {}):
        if (part := getattr(usual, name, None)) is not None:
            options[name] = tiny_config(type(part)).to_dict()
    return config_class(**{**options, **changes})


def ends(values: list[Any]) -> list[Any]:
    """Two elements of a list with one for every layer: the first, and the first that differs from it."""
    return [values[0], next((value for value in values if value != values[0]), values[-1])]


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """TimeoutError after some time: some configurations have parts that are large whatever they are told."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"takes more than {seconds} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def judge(family: str) -> Verdict:
    """Run a family on its own cache and on ours."""
    try:
        with at_most(15):
            return compare(family)
    except TimeoutError as error:
        return Verdict(family, "unknown", str(error))


def compare(family: str) -> Verdict:
    """`judge` without a limit of time."""
    model, why = None, ""
    for changes in ({}, {"sliding_window": None}):
        try:
            model = tiny_model(family, **changes)
            expected = run(model, None)
            break
        except TimeoutError:
            raise
        except Exception as error:  # whatever a model of 200 may raise
            model, why = None, why or f"{type(error).__name__}: {error}"
    try:
        if model is None:
            model = tiny_model(family)
            refusal = refused(model)
            return Verdict(family, "unknown" if refusal is None else "refused", refusal or why)
    except TimeoutError:
        raise
    except Exception:
        return Verdict(family, "unknown", why)
    refusal = refused(model)
    if refusal is not None:
        return Verdict(family, "refused", refusal)
    use_kvtoolkit(model)
    try:
        got = run(model, TransformersCache.for_model(model, num_tokens=512))
        alone = run(model, None)
    except Exception as error:
        return Verdict(family, "different", f"{type(error).__name__}: {error}")
    scale = max(logits.abs().max().item() for logits in expected)
    for name, found in (("on kvtoolkit", got), ("on its own cache after use_kvtoolkit", alone)):
        off = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)) / scale
        if not off < 1e-4:
            return Verdict(family, "different", f"{name}: logits differ by {off:.1e} of the largest")
    return Verdict(family, "equal", "")


def refused(model: Any) -> str | None:
    """Why `TransformersCache.for_model` refuses a model; None if it does not."""
    try:
        TransformersCache.for_model(model, num_tokens=512)
    except NotImplementedError as error:
        return str(error)
    return None


def run(model: Any, cache: Any) -> list[torch.Tensor]:
    """Logits of three forwards of a batch that is padded on the left; without a cache on the model's own."""
    ids = torch.randint(3, 89, (len(PADDING), sum(COLUMNS)), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, pads in enumerate(PADDING):
        mask[row, :pads] = ids[row, :pads] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    logits, seen = [], 0
    for columns in COLUMNS:
        now = slice(seen, seen + columns)
        options = {"position_ids": positions[:, now]} if "position_ids" in known else {}
        if cache is not None:
            options[name] = cache
        with torch.no_grad():
            out = model(input_ids=ids[:, now], attention_mask=mask[:, : now.stop], use_cache=True, **options)
        logits.append(out.logits[:, -columns:][mask[:, now].bool()])
        seen = now.stop
        if cache is None:
            cache = out.get(name, None) or out.get("past_key_values", None)
    return logits


def read_table() -> tuple[str, dict[str, str]]:
    """The version of transformers that the table of the documentation is of, and its families with their status."""
    lines = TABLE.read_text().splitlines()
    version = next(line.split("`")[1] for line in lines if line.startswith("transformers "))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return version, {row[0].strip("`"): row[1] for row in rows}


def write_table(verdicts: list[Verdict], seconds: float) -> None:
    """Write the documentation's table."""
    counts = {status: sum(v.status == status for v in verdicts) for status in STATUSES}
    lines = [
        "# Supported models",
        "",
        "Decoder-only models of transformers run on a `TransformersCache` if their attention goes through",
        "`AttentionInterface`, is causal (windows and chunks are fine), and stores keys and values of one shape in all",
        "layers. `TransformersCache.for_model` looks, and refuses everything else with the reason. How to use it:",
        "[prefix reuse](guides/prefix-reuse.md#with-transformers), [windows](guides/windows.md#with-transformers).",
        "",
        "The table has every causal language model of the installed transformers, made tiny with random weights",
        "in float32. Each runs a prefill, then 3 tokens, then 1 token of a batch padded on the left: on its own",
        "cache, on a `TransformersCache`, and on its own cache again after `use_kvtoolkit`.",
        "",
        "| status | means | families |",
        "|---|---|---|",
        f"| equal | logits are those of the model's own cache, up to 1e-4 of the largest | {counts['equal']} |",
        f"| refused | `TransformersCache.for_model` raises NotImplementedError, as below | {counts['refused']} |",
        f"| unknown | could not be made tiny, or does not run on its own cache when it is | {counts['unknown']} |",
        "",
        f"transformers `{transformers.__version__}`, torch `{torch.__version__}`, {datetime.date.today()}, "
        f"`python -m tests.kvtoolkit.integrations.families`: {seconds:.0f} s with one thread.",
        "`make families` runs the same as a test. A family that is not in this table is reported there and does",
        "not fail.",
        "",
        "| family | status | reason |",
        "|---|---|---|",
    ]
    for family, status, detail in verdicts:
        reason = " ".join(detail.replace("|", "/").split())[:200]
        lines.append(f"| `{family}` | {status} | {reason} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Judge all families and write the table."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    started, verdicts = time.perf_counter(), []
    for family in families():
        verdicts.append(judge(family))
        print(*verdicts[-1], flush=True)
    write_table(verdicts, time.perf_counter() - started)


if __name__ == "__main__":
    main()
