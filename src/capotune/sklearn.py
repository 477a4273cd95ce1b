"""Scikit-learn estimators: ``TextClassifier(method="lora").fit(texts, labels)``, in a Pipeline or a grid search."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d

from capotune import api
from capotune.errors import DataError, SettingError, quoted
from capotune.files import output_folder, write_atomic

__all__ = ["TextClassifier", "TextRegressor"]


class _TextEstimator(BaseEstimator):  # type: ignore[misc]
    """What both estimators share: the adapter lives in the estimator and goes with it through pickle."""

    files_: dict[str, bytes]
    _predictor: Any

    def __init__(
        self, method: str = "lora", model: str = "minilm", seed: int = 0, settings: dict[str, Any] | None = None
    ) -> None:
        self.method = method
        self.model = model
        self.seed = seed
        self.settings = settings

    def save(self, folder: str | Path) -> Path:
        """Write the adapter folder, for ``capo predict`` and ``capotune.load``."""
        check_is_fitted(self)
        folder = Path(folder)
        with output_folder(folder) as new:
            for name, content in self.files_.items():
                write_atomic(new / name, content)
        return folder

    def _train(self, read: list[Any], labels: Sequence[dict[str, Any]], **asked: Any) -> dict[str, Any]:
        """Train on texts and the columns of their labels; what is then known, to be set at once."""
        empty = next((at for at, text in enumerate(read) if not all(map(str.strip, _parts(text)))), None)
        if empty is not None:
            raise DataError("empty text.", where=f"row {empty}", advice="Fill it in or leave the row out.")
        _refuse_own(self.settings or {})
        columns = ("text", "text_pair")
        rows = [
            {**dict(zip(columns, _parts(text), strict=False)), **own} for text, own in zip(read, labels, strict=True)
        ]
        with tempfile.TemporaryDirectory(prefix="capotune-") as folder:
            run = {"out": Path(folder) / "run", "model": self.model, "seed": self.seed, "test_fraction": 0, **asked}
            record = api.train(self.method, data=rows, **{**run, **(self.settings or {})})
            adapter = Path(folder) / "run" / "adapter"
            files = {path.name: path.read_bytes() for path in adapter.iterdir()}
        return {"run_": record, "files_": files, "_predictor": None}

    @property
    def _loaded(self) -> Any:
        check_is_fitted(self)
        if self._predictor is None:
            with tempfile.TemporaryDirectory(prefix="capotune-") as folder:
                self._predictor = api.load_predictor(self.save(Path(folder) / "adapter"), model=self.model)
        return self._predictor

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "files_")

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded model, which is found again from the adapter."""
        return {**super().__getstate__(), "_predictor": None}


class TextClassifier(ClassifierMixin, _TextEstimator):  # type: ignore[misc]
    """Fine-tune a pretrained transformer on texts with a class each, or with any number of labels each.

    Args:
        method: ``feature-extraction``, ``lora``, ``qlora`` or ``prompt-tuning``.
        model: ``minilm`` (embedded), a folder, or a model id on the hub.
        seed: decides every random number.
        settings: further settings of the method by name, as in ``capotune.train``: ``{"rank": 8}``.
        class_weight: ``"balanced"``, or a weight by class; None: every row counts alike.

    After ``fit``: ``classes_``, and ``run_``, what ``run.json`` holds. The adapter lives in the estimator and goes with
    it through pickle and ``clone``'s refits; ``save`` writes it as a folder.
    """

    def __init__(
        self,
        method: str = "lora",
        model: str = "minilm",
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        class_weight: str | dict[Any, float] | None = None,
    ) -> None:
        super().__init__(method, model, seed, settings)
        self.class_weight = class_weight

    def fit(self, texts: Sequence[Any], labels: Sequence[Any]) -> TextClassifier:
        """Train on texts (rows,), or pairs of texts (rows, 2) or as tuples, and labels (rows,) of any kind that numpy
        can sort; or on a table (rows, labels) of 0 and 1, where a row may have several labels."""
        read, values = _checked(texts), _checked_labels(labels)
        if len(read) != len(values):
            raise DataError(f"{len(read)} texts but {len(values)} labels were given; they go in pairs.")
        if values.ndim > 1:
            names = [str(number) for number in range(values.shape[1])]
            rows = [dict(zip(names, map(int, row), strict=True)) for row in values]
            if self.class_weight is not None:
                raise SettingError("is for one class a text.", setting="class_weight", given=self.class_weight)
            known = self._train(read, rows, task="multi-label", label_columns=tuple(names))
            self.__dict__ |= {"classes_": np.arange(len(names)), **known}
            return self
        classes = np.unique(values)
        names = [_name(one) for one in classes]
        if "" in names or len(set(map(_value, names))) < len(names):
            raise DataError(
                "labels must not be empty, and differ by more than space and how a number or a truth value is written, "
                f"found {quoted(classes.tolist(), 200)}."
            )
        known = self._train(
            read,
            [{"label": _name(label)} for label in values],
            task="classification",
            class_weights=self._class_weights(),
        )
        self.__dict__ |= {"classes_": classes, **known}  # all of one fit, or of the one before
        return self

    def predict_proba(self, texts: Sequence[Any]) -> np.ndarray:
        """(rows, classes) probabilities in the order of ``classes_``; of several labels each one's own."""
        classifier = self._loaded
        probabilities: np.ndarray = classifier.predict_proba(_checked(texts))
        columns = [classifier.labels.index(_name(one)) for one in self.classes_]
        return probabilities[:, columns]

    def predict(self, texts: Sequence[Any]) -> np.ndarray:
        """(rows,) the most probable class of each text; of several labels (rows, labels) 0 and 1."""
        probabilities = self.predict_proba(texts)
        thresholds = getattr(self._loaded, "thresholds", None)
        if thresholds is not None:
            marks: np.ndarray = (
                probabilities >= thresholds[[self._loaded.labels.index(str(one)) for one in self.classes_]]
            )
            return marks.astype(int)
        predicted: np.ndarray = self.classes_[probabilities.argmax(1)]
        return predicted

    def _class_weights(self) -> str | dict[str, float] | None:
        given = self.class_weight
        return {_name(one): weight for one, weight in given.items()} if isinstance(given, dict) else given


class TextRegressor(RegressorMixin, _TextEstimator):  # type: ignore[misc]
    """Fine-tune a pretrained transformer on texts with one number each, or several. Arguments and attributes are those
    of ``TextClassifier``, without ``classes_`` and ``class_weight``."""

    def fit(self, texts: Sequence[Any], numbers: Sequence[Any]) -> TextRegressor:
        """Train on texts (rows,), or pairs of texts, and numbers (rows,) or (rows, numbers)."""
        read = _checked(texts)
        values: np.ndarray = check_array(numbers, ensure_2d=False, dtype=np.float64, input_name="numbers")
        if len(read) != len(values):
            raise DataError(f"{len(read)} texts but {len(values)} numbers were given; they go in pairs.")
        table = values.reshape(len(values), -1)
        names = tuple(f"number {column + 1}" for column in range(table.shape[1]))
        rows = [dict(zip(names, map(float, row), strict=True)) for row in table]
        self.__dict__ |= self._train(read, rows, task="regression", label_columns=names)
        return self

    def predict(self, texts: Sequence[Any]) -> np.ndarray:
        """(rows,) numbers, or (rows, numbers) where it was fitted to several."""
        numbers: np.ndarray = self._loaded.predict(_checked(texts))
        return numbers

    def intervals(self, texts: Sequence[Any]) -> np.ndarray:
        """(rows, numbers, 2): lower and upper end of what holds the true number nine times in ten; NaN where too few
        rows were held out to tell."""
        ends: np.ndarray = self._loaded.intervals(_checked(texts))
        return ends


def _refuse_own(settings: dict[str, Any]) -> None:
    """``SettingError`` for settings that are fit's own, or the constructor's, or would leave a row without a class."""
    own = sorted({"data", "test", "out", "report", "task"} & settings.keys())
    if own:
        raise SettingError(f"settings {', '.join(own)}: fit decides these itself.", advice="Leave them out.")
    if "class_weights" in settings:
        raise SettingError("it is the constructor's `class_weight`.", setting="class_weights")
    if settings.get("min_precision") is not None:
        raise SettingError(
            "scikit-learn's classifiers give every row a class.",
            setting="min_precision",
            given=settings["min_precision"],
            advice="Take `predict_proba`, or `capotune.load` the saved adapter: its `predict` gives None.",
        )


def _name(label: object) -> str:
    """A label as the adapter knows it."""
    return unicodedata.normalize("NFC", str(label).strip())


def _value(name: str) -> str:
    """A label's name without what does not make it another label: ``1`` and ``1.0``, ``True`` and ``true`` are one."""
    return name.lower() if name.lower() in ("true", "false") else re.sub(r"(?<=\d)\.0*$", "", name)


def _checked_labels(labels: Sequence[Any]) -> np.ndarray:
    if np.ndim(labels) == 2 and type_of_target(labels) == "multilabel-indicator":
        return np.asarray(labels)
    values: np.ndarray = column_or_1d(labels)
    if values.dtype.kind == "f" and np.isnan(values).any():
        where, advice = f"row {np.isnan(values).argmax()}", "Fill it in or leave the row out."
        raise DataError("the label is NaN.", where=where, advice=advice)
    check_classification_targets(values)
    return values


def _parts(text: str | tuple[str, str]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _checked(texts: Sequence[Any]) -> list[Any]:
    """Texts, or pairs of texts as tuples: all of one form."""
    if isinstance(texts, str):
        raise DataError(f"a list of texts is needed, found one string: {texts[:40]!r}.", advice="Put it in a list.")
    rows = texts.to_numpy() if hasattr(texts, "to_numpy") else texts  # a DataFrame of two columns
    rows = [row if isinstance(row, str) else _as_pair(row) for row in rows]
    kind = tuple if rows and isinstance(rows[0], tuple) else str
    wrong = next((at for at, row in enumerate(rows) if not isinstance(row, kind)), None)
    if wrong is not None:
        wanted = "pairs of strings, as the first is one" if kind is tuple else "strings"
        raise DataError(
            f"texts must be {wanted}, found {type(rows[wrong]).__name__} {quoted(rows[wrong])}.", where=f"row {wrong}"
        )
    return rows


def _as_pair(row: Any) -> Any:
    """A row of two strings as a tuple, others as they are."""
    if not isinstance(row, list | tuple | np.ndarray):
        return row
    pair = tuple(row)
    return pair if len(pair) == 2 and all(isinstance(text, str) for text in pair) else row
