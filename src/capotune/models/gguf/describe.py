"""What a GGUF file says of its model, as a Transformers folder: config.json, generation_config.json and tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capotune.errors import CapotuneError
from capotune.events import Reporter, Warned
from capotune.files import write_atomic
from capotune.models.gguf.architectures import Architecture, architecture_of
from capotune.models.gguf.file import GgufFile
from capotune.models.gguf.tokenizer import build_tokenizer, end_tokens
from capotune.models.gguf.weights import place


def describe(file: GgufFile, folder: Path, report: Reporter) -> None:
    """Write what ``file`` says of the model into the existing ``folder``: all of a Transformers folder but its weights.

    Raises ``ModelError`` for a file that is damaged or not read.
    """
    with _refusing(file):
        architecture = architecture_of(file)
        config = _config(file, architecture)
        place(file, architecture, config)
        tokenizer = build_tokenizer(file, getattr(config, "max_position_embeddings", None))
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.pre" not in file.metadata:
        report(Warned(text=f"{file.path.name} does not say how its tokenizer splits texts; GPT-2's rule is used."))
    tokenizer.save_pretrained(folder)
    _write_config(file, config, folder)


@contextmanager
def _refusing(file: GgufFile) -> Iterator[None]:
    """Metadata may hold anything under any key: what libraries raise on it becomes a ``ModelError``."""
    from huggingface_hub.errors import StrictDataclassError  # comes with Transformers

    try:
        yield
    except CapotuneError:
        raise
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
        AssertionError,
    ) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise file.error(f"its metadata make no model: {first_line}", advice="Download it again.") from None


def _config(file: GgufFile, architecture: Architecture) -> Any:
    """The model's configuration."""
    from transformers import AutoConfig

    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if file.get("block_count") != len(blocks):
        raise file.error(
            f"its metadata say {file.get('block_count')} blocks, and it holds {len(blocks)}.",
            advice="Download it again.",
        )
    return AutoConfig.for_model(architecture.model_type, dtype=_dtype(file), **architecture.config(file))


def _dtype(file: GgufFile) -> str:
    """The dtype of most of the converted weights, in PyTorch's words."""
    counted: Counter[str] = Counter()
    for tensor in file.tensors.values():
        counted[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return counted.most_common(1)[0][0]


def _write_config(file: GgufFile, config: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    generation = {
        "eos_token_id": end_tokens(file),
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    stated = {name: value for name, value in generation.items() if value not in (None, [])}
    write_atomic(folder / "generation_config.json", json.dumps(stated, indent=2) + "\n")
