"""A base model's weights, frozen: the backbone alone, or a causal language model with its output layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from capotune.errors import ModelError, OutputError
from capotune.events import OnProgress
from capotune.models.base import Base, Quantization, quiet
from capotune.models.gguf.converted import converted
from capotune.models.stream import check_complete, stream_quantized, wrong_shape


def load_backbone(
    base: Base,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    progress: OnProgress | None = None,
) -> Any:
    """The transformer without a head, frozen, in evaluation mode; with ``quantization`` its linear layers in 4 bits.

    What is not in 4 bits is in ``dtype``. A model that is stored in 4 bits keeps its own quantization, whatever
    ``quantization`` says. ``progress`` is called with (bytes read, all bytes) while weights are quantized.

    Raises ``ModelError`` when weights are missing, damaged, or do not fit the configuration.
    """
    backbone = _load(base.backbone_class, base, dtype, quantization, progress)
    table = backbone.get_input_embeddings()
    if not hasattr(table, "embedding_dim"):
        raise base.error(
            f"the token embedding of a {type(backbone).__name__} is a {type(table).__name__}, which is not supported."
        )
    if getattr(backbone, "pooler", None) is not None:
        # a head of the pretraining task; the text's vector is pooled from the tokens instead
        can_lack_it = "add_pooling_layer" in inspect.signature(type(backbone)).parameters
        backbone.pooler = None if can_lack_it else nn.Identity()
    return backbone


def load_causal_lm(
    base: Base,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    progress: OnProgress | None = None,
) -> Any:
    """The transformer with its own output layer; arguments as ``load_backbone``.

    Raises ``ModelError`` when it is no causal language model, or its weights are missing, damaged, or do not fit.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    base.check_writes_text()
    wraps = type(base.config) not in AutoModelForCausalLM._model_mapping and not hasattr(base.config, "auto_map")
    return _load(AutoModelForImageTextToText if wraps else AutoModelForCausalLM, base, dtype, quantization, progress)


def load_classifier(
    base: Base,
    config: Any,
    given: frozenset[str],
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    progress: OnProgress | None = None,
) -> Any:
    """Transformers' own classifier of whole texts, by ``config``; other arguments as ``load_backbone``.

    ``given``: weights that an adapter brings, by path. Raises ``ModelError`` also for others that the base lacks:
    Transformers would draw them at random.
    """
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, base, dtype, quantization, progress, config, given)


def _load(
    auto_class: Any,
    base: Base,
    dtype: torch.dtype,
    quantization: Quantization | None,
    progress: OnProgress | None,
    config: Any = None,
    given: frozenset[str] | None = None,
) -> Any:
    config = base.config if config is None else config
    try:
        with quiet(), _without_adapters():
            base = converted(base, quantization)
            if quantization is not None or base.is_quantized:
                model = stream_quantized(auto_class, base, config, dtype, quantization, progress)
            else:
                for part in (config, config.get_text_config()):
                    part.transformers_weights = base.weights.entry  # a second copy under another name is not read
                model, info = auto_class.from_pretrained(
                    base.folder,
                    config=config,
                    dtype=dtype,
                    trust_remote_code=base.trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # refused below, with their names
                )
                if given is None:
                    check_complete(base, info["missing_keys"])
                else:
                    _check_head(base, set(info["missing_keys"]) - given)
                for name, found, expected in sorted(info["mismatched_keys"]):
                    if given is None or name not in given:
                        raise wrong_shape(base, name, found, expected)
    except (ModelError, OutputError):
        raise
    except (OSError, TypeError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise base.unusable("it cannot be loaded", error) from None
    model.config.use_cache = False  # generation asks for keys and values by itself; training does not need them
    return model.requires_grad_(False).eval()


def _check_head(base: Base, missing: set[str]) -> None:
    """``ModelError`` for weights that neither base nor adapter has."""
    if missing:
        raise base.error(
            f"neither it nor the adapter holds {', '.join(sorted(missing)[:3])}, which training began from by chance.",
            advice="PEFT stores unasked only what is called classifier or score: give the checkpoint that was trained "
            "on, or save the adapter again with these among modules_to_save.",
        )


@contextmanager
def _without_adapters() -> Iterator[None]:
    """Inside, Transformers does not put an adapter on that lies in the model's folder, as it does where PEFT is."""
    from transformers.integrations import peft
    from transformers.models.auto import auto_factory

    before = {module: module.find_adapter_config_file for module in (peft, auto_factory)}
    try:
        for module in before:
            module.find_adapter_config_file = lambda *_, **__: None
        yield
    finally:
        for module, find in before.items():
            module.find_adapter_config_file = find
