"""A scikit-learn classifier: ``TextClassifier(method="lora").fit(texts, labels)``, in a Pipeline or a grid search."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from capotune import api
from capotune.errors import DataError

__all__ = ["TextClassifier"]


class TextClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Fine-tune a pretrained transformer on texts.

    Args:
        method: ``feature-extraction``, ``lora``, ``qlora`` or ``prompt-tuning``.
        model: ``minilm`` (embedded), a folder, or a model id on the hub.
        seed: decides every random number.
        settings: further settings of the method by name, as in ``capotune.train``: ``{"rank": 8}``.

    After ``fit``: ``classes_``, and ``run_``, what ``run.json`` holds. The adapter lives in the estimator and goes with
    it through pickle and ``clone``'s refits; ``save`` writes it as a folder.
    """

    def __init__(
        self, method: str = "lora", model: str = "minilm", seed: int = 0, settings: dict[str, Any] | None = None
    ) -> None:
        self.method = method
        self.model = model
        self.seed = seed
        self.settings = settings

    def fit(self, texts: Sequence[str], labels: Sequence[Any]) -> TextClassifier:
        """Train on texts (rows,) and labels (rows,) of any kind that numpy can sort."""
        texts = _checked(texts)
        self.classes_ = np.unique(np.asarray(labels))
        if len(texts) != len(labels):
            raise DataError(f"{len(texts)} texts but {len(labels)} labels were given; they go in pairs.")
        with tempfile.TemporaryDirectory(prefix="capotune-") as folder:
            data = Path(folder) / "data.jsonl"
            rows = zip(texts, labels, strict=True)
            lines = [json.dumps({"text": text, "label": str(label)}) for text, label in rows]
            data.write_text("\n".join(lines) + "\n", encoding="utf-8")
            run = {"data": str(data), "out": Path(folder) / "run", "model": self.model, "seed": self.seed}
            self.run_ = api.train(self.method, test_fraction=0, **{**run, **(self.settings or {})})
            adapter = Path(folder) / "run" / "adapter"
            self.files_ = {path.name: path.read_bytes() for path in adapter.iterdir()}
        self._classifier: api.Classifier | None = None
        return self

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """(rows, classes) probabilities in the order of ``classes_``."""
        check_is_fitted(self)
        texts = _checked(texts)
        if self._classifier is None:
            with tempfile.TemporaryDirectory(prefix="capotune-") as folder:
                self._classifier = api.load(self.save(Path(folder) / "adapter"), model=self.model)
        classifier = self._classifier
        probabilities: np.ndarray = classifier.predict_proba(texts)
        columns = [classifier.labels.index(str(one)) for one in self.classes_]
        return probabilities[:, columns]

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """(rows,) the most probable class of each text."""
        predicted: np.ndarray = self.classes_[self.predict_proba(texts).argmax(1)]
        return predicted

    def save(self, folder: str | Path) -> Path:
        """Write the adapter folder, for ``capo predict`` and ``capotune.load``."""
        check_is_fitted(self)
        folder = Path(folder)
        folder.mkdir(parents=True)
        for name, content in self.files_.items():
            (folder / name).write_bytes(content)
        return folder

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "files_")

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded model, which is found again from the adapter."""
        return {**super().__getstate__(), "_classifier": None}


def _checked(texts: Sequence[str]) -> list[str]:
    rows = list(texts)
    wrong = next((at for at, text in enumerate(rows) if not isinstance(text, str)), None)
    if wrong is not None:
        raise DataError(f"row {wrong}: texts must be strings, found {type(rows[wrong]).__name__} {rows[wrong]!r}.")
    return rows
