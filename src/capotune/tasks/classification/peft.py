"""Classification by Transformers' own classes, for adapters that PEFT wrote.

These were trained in an ``…ForSequenceClassification``, whose pooling and head are the family's own. So the model
is that class, with the head that the adapter stores, and it reads rows of one length together: then no family finds
padding to mind, whichever way it looks for the last token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from capotune.adapters.assemble import Assembled
from capotune.adapters.store import StoredAdapter
from capotune.data.batches import Batch, TokenRows
from capotune.data.classes import respelled
from capotune.data.labelled import LabelledText
from capotune.engine.activation_cache import ActivationCache
from capotune.errors import AdapterError
from capotune.evaluation.forward import Examples, outputs
from capotune.events import OnProgress
from capotune.methods.base import Method
from capotune.methods.peft.parts import read_parts
from capotune.models.architecture import text_part
from capotune.models.base import Base
from capotune.models.load import load_classifier
from capotune.models.stream import empty_model
from capotune.tasks.classification.task import Classification
from capotune.tasks.text_targets.objective import RowCrossEntropy

_EVERY_TOKEN_COUNTS = -1
"""A padding id that no token has."""


class OwnHeadCrossEntropy(RowCrossEntropy):
    """The same of logits that the model's own head gives."""

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (rows, labels)."""
        logits: torch.Tensor = model(**batch.inputs).logits
        return logits


@dataclass(frozen=True)
class PeftClassification(Classification):
    """The task of an adapter on a ``…ForSequenceClassification``."""

    stored: frozenset[str] = frozenset()
    """Weights that the adapter brings, by path: the base may lack them."""
    placeholders: int = 0
    """Virtual tokens of a deep prompt: their place in a text's states is nothing that a head may read."""

    reads_packed: ClassVar[bool] = False
    shares_base: ClassVar[bool] = False

    @classmethod
    def of_peft(cls, base: Base, stored: StoredAdapter) -> PeftClassification:
        """Labels by the base's names, where it has as many. ``AdapterError`` where the adapter tells none apart."""
        replaced = read_parts(stored.settings.config, stored.tensors).replaced  # type: ignore[attr-defined]
        count = _label_count(base, replaced)
        where = str(stored.folder)
        if count is None:
            raise AdapterError(
                "neither it nor its base holds a head for labels.",
                where=where,
                advice="If the head is in another checkpoint, give that with `model`.",
            )
        if count < 2 or getattr(base.config, "problem_type", None) in ("regression", "multi_label_classification"):
            raise AdapterError("its head gives values or several labels a text; one label a text is read.", where=where)
        names = getattr(base.config, "id2label", None) or {}
        labels = tuple(
            str(names.get(at, f"LABEL_{at}")) if len(names) == count else f"LABEL_{at}" for at in range(count)
        )
        on_base = Classification.on(base, labels, None, stored.settings.virtual_tokens, "cls")
        settings: Any = stored.settings
        placeholders = settings.virtual_tokens if settings.deep else 0
        length, pooling = on_base.max_length, on_base.pooling
        return cls(base, labels, length, pooling, pairs=None, stored=frozenset(replaced), placeholders=placeholders)

    @property
    def objective(self) -> OwnHeadCrossEntropy:  # type: ignore[override]
        """Of the model's own head."""
        return OwnHeadCrossEntropy()

    def load_base(self, method: Method, dtype: torch.dtype, progress: OnProgress | None) -> Any:
        """The family's classifier; a head that the adapter brings is not in place yet."""
        config = _with_labels(self.base, len(self.labels))
        model = load_classifier(
            self.base, config, self.stored, dtype=dtype, quantization=method.quantization, progress=progress
        )
        if getattr(model.config.get_text_config(), "pad_token_id", None) is None:
            model.config.get_text_config().pad_token_id = _EVERY_TOKEN_COUNTS
        return model

    def put_head(self, loaded: Any, method: Method) -> tuple[Any, str]:  # noqa: ARG002
        """The same model."""
        backbone = text_part(loaded)
        if self.placeholders and "past_key_values" not in signature(loaded.forward).parameters:
            self._hide_placeholders(loaded, backbone)
        return loaded, backbone

    def _hide_placeholders(self, model: Any, backbone: str) -> None:
        """From a head that counts tokens from the first: PEFT gives it the text's states alone."""

        def text_alone(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            states, *more = given
            reads_tokens = states.dim() == 3 and states.shape[1] > self.placeholders
            return (states[:, self.placeholders :], *more) if reads_tokens else None

        for part in (getattr(model.get_submodule(backbone), "pooler", None), getattr(model, "classifier", None)):
            if part is not None:
                part.register_forward_pre_hook(text_alone)

    def with_own_labels(self, rows: LabelledText[str]) -> LabelledText[str]:
        """Data sets of the hub number their labels, as the model does: a number is the label at that position."""
        numbered = {str(at): label for at, label in enumerate(self.labels)}
        return super().with_own_labels(respelled(rows, numbered | {label: label for label in self.labels}))

    def prompt_attached(self, model: Any, virtual_tokens: int) -> None:
        """The head reads where it reads."""

    def head_parameters(self, model: Any) -> dict[str, nn.Parameter]:  # noqa: ARG002 - it is a part of the adapter
        """None that are apart."""
        return {}

    def expected_head(self, model: Any) -> int:  # noqa: ARG002
        """0."""
        return 0

    def write_merged_files(self, folder: Path) -> list[str]:  # noqa: ARG002
        """Nothing: the merged model's own head is the trained one."""
        return []

    def logits(
        self,
        assembled: Assembled,
        rows: TokenRows,
        cache: ActivationCache | None = None,  # noqa: ARG002 - the head's features are its own
        progress: OnProgress | None = None,
    ) -> torch.Tensor:
        """Logits (rows, labels) on the CPU."""
        unknown = Examples(rows, torch.zeros(len(rows.sequences), dtype=torch.long))
        return outputs(assembled, unknown, progress)


def _with_labels(base: Base, count: int) -> Any:
    config = copy.deepcopy(base.config)
    if config.num_labels != count:
        config.num_labels = count
    return config


def _label_count(base: Base, replaced: Mapping[str, torch.Tensor]) -> int | None:
    """Outputs of the head: of the weights whose shape depends on them, that of the adapter, else that of a base which
    is a classifier already; None without either."""
    from transformers import AutoModelForSequenceClassification

    shapes = []
    for count in (2, 3):
        try:
            model = empty_model(AutoModelForSequenceClassification, _with_labels(base, count))
        except ValueError:
            raise base.error(f"Transformers has no classifier of a {base.config.model_type} model.") from None
        shapes.append({name: weight.shape for name, weight in model.named_parameters()})
    for name, two in shapes[0].items():
        for dimension, (one, other) in enumerate(zip(two, shapes[1][name], strict=True)):
            if one != other and name in replaced and replaced[name].dim() == len(two):
                return int(replaced[name].shape[dimension])
    architecture = str((base.config_values.get("architectures") or [""])[0])
    return int(base.config.num_labels) if architecture.endswith("ForSequenceClassification") else None
