"""The estimator behaves as scikit-learn's own do."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.base import BaseEstimator, TransformerMixin, clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.utils import estimator_checks

import capotune
from capotune.errors import CapotuneError, DataError, SettingError
from capotune.sklearn import TextClassifier, TextRegressor

TEXTS = [
    f"{words} {number}" for number in range(12) for words in ("my lamp is broken", "the parcel was late", "paid twice")
]
NAMES = ["broken", "late", "money"] * 12


def classifier(bert: Path, **changes: Any) -> TextClassifier:
    return TextClassifier(**{"method": "feature-extraction", "model": str(bert), **changes})


@pytest.fixture(scope="module")
def fitted(bert: Path) -> TextClassifier:
    return classifier(bert).fit(TEXTS, NAMES)


def test_parameters_are_those_of_the_constructor_and_survive_clone(bert: Path) -> None:
    given = {"method": "lora", "model": str(bert), "seed": 3, "settings": {"rank": 2}, "class_weight": "balanced"}
    estimator = TextClassifier(**given)
    assert estimator.get_params() == given
    twin = clone(estimator)
    assert twin is not estimator
    assert twin.get_params() == given
    assert estimator.set_params(seed=4, settings=None) is estimator
    assert estimator.get_params() == {**given, "seed": 4, "settings": None}
    assert is_classifier(estimator)
    with pytest.raises(ValueError, match="Invalid parameter 'rank'"):
        estimator.set_params(rank=3)


@pytest.mark.parametrize(
    "name",
    [
        "check_parameters_default_constructible",
        "check_no_attributes_set_in_init",
        "check_get_params_invariance",
        "check_set_params",
        "check_estimator_repr",
        "check_estimator_cloneable",
        "check_estimator_tags_renamed",
        "check_mixin_order",
        "check_valid_tag_types",
    ],
)
def test_scikit_learns_own_checks_that_need_no_numbers(name: str) -> None:
    """The others fit on matrices of numbers, which are no texts."""
    getattr(estimator_checks, name)("TextClassifier", TextClassifier())


def test_fit_returns_the_estimator_and_sets_what_was_learned(fitted: TextClassifier, bert: Path) -> None:
    estimator = classifier(bert)
    before = estimator.get_params()
    assert not [name for name in vars(estimator) if name.endswith("_")]
    assert estimator.fit(TEXTS, NAMES) is estimator
    assert estimator.get_params() == before
    assert estimator.classes_.tolist() == ["broken", "late", "money"]
    assert estimator.run_["method"] == "feature-extraction"
    assert np.array_equal(estimator.predict_proba(TEXTS), fitted.predict_proba(TEXTS))  # same seed, same bits


def test_prediction_shapes_and_sums(fitted: TextClassifier) -> None:
    probabilities = fitted.predict_proba(TEXTS[:5])
    assert probabilities.shape == (5, 3)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert np.array_equal(fitted.predict(TEXTS[:5]), fitted.classes_[probabilities.argmax(1)])
    assert fitted.predict_proba([]).shape == (0, 3)
    assert fitted.predict([]).shape == (0,)
    assert fitted.score(TEXTS, NAMES) == np.mean(fitted.predict(TEXTS) == np.array(NAMES))
    assert fitted.score(TEXTS, NAMES) > 0.9


@pytest.mark.parametrize(
    "classes",
    [["b", "a", "c"], [3, 20, -1], [True, False], [10.0, 9.0], ["10", "9"], np.array([7, 5], dtype=np.int8)],
    ids=["str", "int", "bool", "float", "digits", "int8"],
)
def test_classes_keep_their_kind(classes: Any, bert: Path) -> None:
    """Probabilities stand in the order of ``classes_``, which is not the adapter's own order of label names."""
    labels = [classes[at % len(classes)] for at in range(len(TEXTS))]
    texts = [f"{('lamp broken', 'parcel late', 'paid twice')[at % len(classes)]} {at}" for at in range(len(TEXTS))]
    estimator = classifier(bert).fit(texts, labels)
    assert np.array_equal(estimator.classes_, np.unique(labels))
    assert estimator.classes_.dtype == np.asarray(labels).dtype
    assert estimator.predict(texts).dtype == estimator.classes_.dtype
    assert estimator.score(texts, labels) == 1.0


def test_labels_of_mixed_numbers_are_one_kind(bert: Path) -> None:
    labels = [1 if at % 2 else 2.0 for at in range(12)]
    texts = [f"{'parcel late' if at % 2 else 'lamp broken'} {at}" for at in range(12)]
    estimator = classifier(bert).fit(texts, labels)
    assert estimator.classes_.tolist() == [1.0, 2.0]
    assert estimator.score(texts, labels) == 1.0


class Lower(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A step that changes texts."""

    def fit(self, texts: list[str], labels: object = None) -> Lower:  # noqa: ARG002
        self.count_ = len(texts)
        return self

    def transform(self, texts: list[str]) -> list[str]:
        return [text.lower() for text in texts]


def test_pipeline(bert: Path) -> None:
    pipeline = Pipeline([("lower", Lower()), ("classify", classifier(bert))]).fit([one.upper() for one in TEXTS], NAMES)
    assert pipeline.score([one.upper() for one in TEXTS], NAMES) > 0.9
    assert pipeline.predict(["MY LAMP IS BROKEN"])[0] == "broken"
    assert pipeline.classes_.tolist() == ["broken", "late", "money"]


def test_grid_search_over_method_and_settings(bert: Path) -> None:
    quick = {"epochs": 1}
    grid = [
        {"method": ["feature-extraction"]},
        {"method": ["lora"], "settings": [{"rank": 1, **quick}, {"rank": 2, "target_modules": ("query",), **quick}]},
        {"method": ["prompt-tuning"], "settings": [{"num_virtual_tokens": 2, **quick}]},
    ]
    search = GridSearchCV(classifier(bert), grid, cv=2, error_score="raise").fit(np.array(TEXTS), np.array(NAMES))
    assert len(search.cv_results_["params"]) == 4
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_score_ > 0.5
    assert search.best_estimator_.run_["method"] == search.best_params_["method"]
    assert set(search.predict(TEXTS)) <= set(NAMES)


def test_cross_validation_takes_lists_and_arrays(bert: Path) -> None:
    as_lists = cross_val_score(classifier(bert), TEXTS, NAMES, cv=2, error_score="raise")
    as_arrays = cross_val_score(
        classifier(bert), np.array(TEXTS, dtype=object), np.array(NAMES), cv=2, error_score="raise"
    )
    assert as_lists.tolist() == as_arrays.tolist()


@pytest.mark.parametrize("way", ["pickle", "joblib", "deepcopy"])
@pytest.mark.parametrize("used", [True, False])
def test_a_fitted_estimator_travels(way: str, used: bool, bert: Path, tmp_path: Path) -> None:
    estimator = classifier(bert).fit(TEXTS, NAMES)
    expected = estimator.predict_proba(TEXTS[:4]) if used else None
    if way == "joblib":
        joblib.dump(estimator, tmp_path / "estimator")
        assert (tmp_path / "estimator").stat().st_size < 100_000  # the adapter travels, not the base
        other = joblib.load(tmp_path / "estimator")
    else:
        other = pickle.loads(pickle.dumps(estimator)) if way == "pickle" else copy.deepcopy(estimator)
    expected = estimator.predict_proba(TEXTS[:4]) if expected is None else expected
    assert np.array_equal(other.predict_proba(TEXTS[:4]), expected)
    assert other.classes_.tolist() == estimator.classes_.tolist()


def test_an_unfitted_estimator_travels_and_says_that_it_is_not_fitted(bert: Path, tmp_path: Path) -> None:
    other = pickle.loads(pickle.dumps(classifier(bert)))
    for use in (
        other.predict,
        other.predict_proba,
        lambda texts: other.score(texts, ["a"]),
        lambda _: other.save(tmp_path),
    ):
        with pytest.raises(NotFittedError, match="not fitted"):
            use(["a text"])
    with pytest.raises(NotFittedError):
        clone(classifier(bert).fit(TEXTS, NAMES)).predict(["a text"])


def test_a_failed_refit_does_not_answer_with_the_old_adapter(bert: Path) -> None:
    estimator = classifier(bert).fit(TEXTS, NAMES)
    with pytest.raises(SettingError):
        estimator.set_params(settings={"rnk": 3}).fit(TEXTS, [f"new {name}" for name in NAMES])
    answers = estimator.predict(TEXTS[:3])
    assert set(answers) <= set(estimator.classes_)
    assert set(estimator.classes_) == set(NAMES)


def test_a_refit_answers_with_the_new_adapter(bert: Path) -> None:
    estimator = classifier(bert).fit(TEXTS, NAMES)
    estimator.predict(TEXTS[:2])
    assert estimator.fit(TEXTS, [f"new {name}" for name in NAMES]).predict(["my lamp is broken"]) == ["new broken"]


def test_save_writes_an_adapter_for_everyone(fitted: TextClassifier, tmp_path: Path) -> None:
    folder = fitted.save(tmp_path / "kept" / "adapter")
    answers = capotune.predict(folder, TEXTS[:3])
    assert [answer.label for answer in answers] == fitted.predict(TEXTS[:3]).tolist()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == fitted.files_
    texts = [content for name, content in fitted.files_.items() if name.endswith((".md", ".json"))]
    assert not any(tempfile.gettempdir().encode() + b"/capotune-" in content for content in texts)
    with pytest.raises(CapotuneError, match="exists already"):
        fitted.save(folder)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("one text", ["a"], "a list of texts is needed"),
        ([["a"], ["c"]], ["a", "b"], "row 0: texts must be strings, found list"),
        (["a b", None], ["a", "b"], "row 1: texts must be strings, found NoneType"),
        (np.zeros((4, 2)), list("abab"), "texts must be strings, found ndarray"),
        (["a b", "c d", "e f"], ["a", "b"], "3 texts but 2 labels"),
        (["a b", " ", "e f"], ["a", "b", "a"], "row 1: empty text"),
        (["a b", "c d"], ["a", "a"], "one label"),
        (["a b", "c d"], ["a", " a"], "more than space"),
        (["a b", "c d"], ["a", ""], "not be empty"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(texts: Any, labels: Any, message: str, bert: Path) -> None:
    with pytest.raises(DataError, match=message):
        classifier(bert).fit(texts, labels)


@pytest.mark.parametrize("labels", [[0.5, float("nan"), 1.0], np.linspace(0, 1, 3), np.zeros((3, 2))])
def test_labels_that_are_no_classes_are_refused(labels: Any, bert: Path) -> None:
    with pytest.raises(ValueError, match=r"NaN|continuous|same labels"):
        classifier(bert).fit(TEXTS[:3], labels)


def test_one_string_is_not_a_list_of_letters(fitted: TextClassifier) -> None:
    with pytest.raises(DataError, match="a list of texts is needed"):
        fitted.predict("my lamp is broken")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lroa"}, "Did you mean 'lora'"),
        ({"method": "lora", "settings": {"rnk": 2}}, "Did you mean 'rank'"),
        ({"settings": {"out": "x", "data": "y"}}, "settings data, out: fit decides these itself"),
        ({"model": "./no/such/folder"}, "no such folder"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_parameters_are_refused_when_fitting(changes: dict[str, Any], message: str, bert: Path) -> None:
    with pytest.raises(CapotuneError, match=message):
        classifier(bert, **changes).fit(TEXTS, NAMES)


def test_settings_may_hold_out_test_rows_and_choose_the_seed(bert: Path) -> None:
    estimator = classifier(bert, settings={"test_fraction": 0.25, "seed": 9}).fit(TEXTS, NAMES)
    assert estimator.run_["result"]["test_rows"] == 9
    assert estimator.run_["settings"]["seed"] == 9


def test_class_weight_is_scikit_learns_word(bert: Path) -> None:
    numbers = [{"broken": 1, "late": 2, "money": 3}[name] for name in NAMES]
    held = {"validation_fraction": 0.1}  # without weights so few rows are trained on otherwise
    plain, weighted = (
        classifier(bert, class_weight=one, settings=held).fit(TEXTS, numbers) for one in (None, {1: 5.0, 3: 0.5})
    )
    assert weighted.run_["settings"]["class_weights"] == {"1": 5.0, "3": 0.5}
    assert (weighted.predict_proba(TEXTS)[:, 0] > plain.predict_proba(TEXTS)[:, 0]).mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"class_weights": "balanced"}, "class_weight"), ({"min_precision": 0.9}, "give every row a class")],
)
def test_settings_with_a_word_of_their_own_are_refused(settings: dict[str, Any], message: str, bert: Path) -> None:
    with pytest.raises(SettingError, match=message):
        classifier(bert, settings=settings).fit(TEXTS, NAMES)


# Several labels, and numbers


def test_a_table_of_0_and_1_is_fitted_as_several_labels(bert: Path) -> None:
    table = np.array([[number % 2, number % 3 == 0, 1 - number % 2] for number in range(len(TEXTS))])
    fitted = classifier(bert).fit(TEXTS, table)
    said = fitted.predict(TEXTS)
    assert said.shape == table.shape
    assert set(np.unique(said)) <= {0, 1}
    assert (fitted.predict_proba(TEXTS)[:, 0] > 0).all()
    assert 0 <= fitted.score(TEXTS, table) <= 1
    assert (pickle.loads(pickle.dumps(fitted)).predict(TEXTS[:3]) == said[:3]).all()


def test_a_regressor_gives_numbers_in_their_own_unit(bert: Path) -> None:
    worth = {"broken": 1950.0, "late": 2000.0, "money": 2050.0}
    numbers = [worth[name] for name in NAMES]
    fitted = TextRegressor(method="feature-extraction", model=str(bert)).fit(TEXTS, numbers)
    assert is_regressor(fitted)
    assert fitted.predict(TEXTS).shape == (len(TEXTS),)
    assert fitted.score(TEXTS, numbers) > 0.9
    assert fitted.intervals(TEXTS[:2]).shape == (2, 1, 2)
    both = TextRegressor(method="feature-extraction", model=str(bert)).fit(TEXTS, np.stack([numbers, numbers], 1))
    assert both.predict(TEXTS).shape == (len(TEXTS), 2)
    with pytest.raises(ValueError, match="numbers contains NaN"):
        TextRegressor(model=str(bert)).fit(TEXTS[:3], [1.0, np.nan, 2.0])
    with pytest.raises(DataError, match="3 texts but 2 numbers"):
        TextRegressor(model=str(bert)).fit(TEXTS[:3], [1.0, 2.0])
