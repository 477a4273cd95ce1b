"""Class weights, macro F1 where labels are skewed, calibrated probabilities, and texts without a label, in runs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import on_base
from torch.nn import functional

import capotune
from capotune.adapters.store import read_adapter
from capotune.data.batches import TokenRows
from capotune.errors import SettingError
from capotune.evaluation import calibration
from capotune.evaluation.calibration import fit_temperature
from capotune.evaluation.forward import Examples, batches
from capotune.events import Warned
from capotune.methods.lora.settings import LoraSettings
from capotune.tasks.classification.asked import label_weights, why_macro_f1
from capotune.tasks.classification.objective import SkewedCrossEntropy
from capotune.tasks.text_targets.objective import RowCrossEntropy

ROWS = ["often"] * 60 + ["seldom"] * 5 + ["rare"] * 5


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Training and test rows whose words say little of their label; the first label has 12 times the rows."""
    folder, chooser = tmp_path_factory.mktemp("skewed"), random.Random(0)
    words = {
        "often": ["my", "parcel", "lamp", "card", "is"],
        "seldom": ["late", "my", "the", "was"],
        "rare": ["paid", "twice"],
    }

    def write(name: str, labels: list[str]) -> str:
        lines = ["text,label"]
        for number, label in enumerate(labels):
            telling = chooser.choices(words[label], k=2) if number // 2 % 2 else []
            own = telling + chooser.choices(words["often"], k=3)
            lines.append(f"{' '.join(own)} {number},{label}")
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(folder / name)

    return {"data": write("train.csv", ROWS), "test": write("test.csv", ["often"] * 20 + ["seldom", "rare"] * 10)}


def train(method: str, bert: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return capotune.train(method, model=str(bert), out=out, **settings)


@pytest.fixture(scope="module")
def lora(bert: Path, skewed: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "lora"
    settings = {"class_weights": "balanced", "min_precision": 0.5, "epochs": 2, "batch_size": 8, "learning_rate": 0.02}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_CHI_SQUARE_95", -1.0)  # so few rows would leave the temperature at 1
        train("lora", bert, out, **skewed, **settings, validation_fraction=0.3)
    return out


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))["result"]
    return found


# --- class weights ----------------------------------------------------------------------------------------------------


def test_balanced_weights_are_scikit_learns_and_others_have_mean_one_over_the_rows() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    names = ["often", "rare", "seldom"]
    expected = compute_class_weight("balanced", classes=np.array(names), y=np.array(ROWS))
    assert label_weights("balanced", names, ROWS) == pytest.approx(expected)
    given = label_weights({"rare": 4.0}, names, ROWS)
    assert given[1] == pytest.approx(4 * given[0])
    assert np.mean([given[names.index(label)] for label in ROWS]) == pytest.approx(1)
    assert label_weights(None, names, ROWS) == []


def test_a_step_weighs_rows_as_pytorch_does(bert: Path) -> None:
    assembled = on_base(bert, LoraSettings(rank=2))
    rows, targets = TokenRows([[5, 6], [7, 8, 9], [9, 4]], 0), torch.tensor([0, 1, 2])
    weights = (0.5, 2.0, 1.0)
    _, batch = next(batches(assembled, Examples(rows, targets)))
    with assembled.reading(), torch.no_grad():
        loss = RowCrossEntropy(weights).loss(assembled.model, batch, 0.0)
        logits = assembled.model.logits(batch)
    assert batch.targets is not None
    expected = functional.cross_entropy(logits, batch.targets, torch.tensor(weights), reduction="sum")
    assert float(loss) == pytest.approx(float(expected))
    assert float(loss) != pytest.approx(float(functional.cross_entropy(logits, batch.targets, reduction="sum")))


def test_weights_change_what_is_solved(bert: Path, skewed: dict[str, str], tmp_path: Path) -> None:
    scores = {}
    for name, weights in (("plain", None), ("balanced", "balanced"), ("given", {"seldom": 12, "rare": 12})):
        train("feature-extraction", bert, tmp_path / name, **skewed, class_weights=weights)
        scores[name] = result(tmp_path / name)["label_scores"]["rare"]["recall"]
    assert scores["plain"] < scores["balanced"] == scores["given"]


def test_a_weight_for_an_unknown_label_is_refused(bert: Path, skewed: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"class_weights=rar 2.*no training row.*Did you mean 'rare'"):
        train("lora", bert, tmp_path / "run", **skewed, class_weights={"rar": 2})
    with pytest.raises(SettingError, match="class_weights"):
        train("lora", bert, tmp_path / "run", **skewed, class_weights={"rare": 0})


# --- the score --------------------------------------------------------------------------------------------------------


def test_macro_f1_is_the_score_where_one_label_has_ten_times_the_rows() -> None:
    why = why_macro_f1(ROWS)
    assert why is not None
    assert "60 rows of often, 5 of" in why
    assert why_macro_f1(["a"] * 9 + ["b"]) is None


def test_held_out_rows_are_scored_by_macro_f1_where_labels_are_skewed() -> None:
    outputs, targets = torch.eye(2)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1])
    assert RowCrossEntropy().score(outputs, targets)[0] == 0.75
    assert SkewedCrossEntropy().score(outputs, targets)[0] == pytest.approx((6 / 7) / 2)


def test_a_run_on_skewed_labels_is_compared_by_macro_f1_and_says_why(lora: Path) -> None:
    found = result(lora)
    assert (found["metric"], found["held_out_metric"]) == ("macro_f1", "macro_f1")
    assert found["score"] == found["scores"]["macro_f1"]
    assert "skewed" in found["metric_why"]
    assert found["label_scores"]["rare"]["rows"] == 10
    rows = json.loads((lora / "test_rows.json").read_text(encoding="utf-8"))
    assert rows["metric"] == "macro_f1"
    assert [one["metric"] for one in rows["others"]] == ["accuracy"]


# --- probabilities ----------------------------------------------------------------------------------------------------


def test_the_temperature_is_in_the_head_and_in_the_record(lora: Path, skewed: dict[str, str]) -> None:
    """Of the logits as they are now no temperature makes the held-out rows more probable: it is divided out."""
    record = read_adapter(lora / "adapter").record
    assert record["temperature"] == result(lora)["calibration"]["temperature"] != 1
    scored = capotune.evaluate(lora / "adapter", data=skewed["test"])
    assert scored["calibration"] == result(lora)["calibration"]


@pytest.mark.parametrize("method", ["feature-extraction", "lora"])
def test_predicted_labels_are_those_without_a_temperature(
    method: str, bert: Path, skewed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"epochs": 1, "batch_size": 8, **skewed}
    monkeypatch.setattr(calibration, "_CHI_SQUARE_95", -1.0)
    train(method, bert, tmp_path / "calibrated", **settings)
    monkeypatch.setattr("capotune.tasks.classification.task.fit_temperature", lambda *_: 1.0)
    train(method, bert, tmp_path / "plain", **settings)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text("utf-8").splitlines()]
        for name in ("calibrated", "plain")
    ]
    assert [row["predicted"] for row in rows[0]] == [row["predicted"] for row in rows[1]]
    assert [row["probability"] for row in rows[0]] != [row["probability"] for row in rows[1]]
    scales = [result(tmp_path / name)["calibration"] for name in ("calibrated", "plain")]
    assert scales[0]["error_before"] == pytest.approx(scales[1]["error"], abs=1e-4)


def test_an_adapter_without_a_temperature_has_one_of_1(lora: Path) -> None:
    task = capotune.load(lora / "adapter")._assembled.task
    old = {
        name: value for name, value in read_adapter(lora / "adapter").record.items() if name in ("labels", "pooling")
    }
    restored = type(task).restore(task.base, {**old, "max_length": task.max_length})
    assert (restored.temperature, restored.threshold, restored.metric) == (1.0, None, "accuracy")
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 1.0


# --- no label ---------------------------------------------------------------------------------------------------------


def test_a_text_below_the_threshold_gets_no_label_everywhere(lora: Path) -> None:
    classifier = capotune.load(lora / "adapter")
    texts = [json.loads(line)["text"] for line in (lora / "predictions.jsonl").read_text("utf-8").splitlines()]
    sure = classifier.predict_proba(texts).max(1)
    task = classifier._assembled.task
    classifier._assembled.task.__dict__["threshold"] = float(np.median(sure))
    answers = classifier.answer(texts)
    assert [one.label is None for one in answers] == (sure < np.median(sure)).tolist()
    unsure = next(one for one in answers if one.label is None)
    assert unsure.as_json()["label"] is None
    assert unsure.as_line().startswith("none of these\t")
    assert classifier.predict(texts) == [one.label for one in answers]
    assert replace(task, threshold=None).undecided()


def test_coverage_and_precision_are_reported_of_test_rows(lora: Path, skewed: dict[str, str]) -> None:
    found = result(lora)
    rows = [json.loads(line) for line in (lora / "predictions.jsonl").read_text("utf-8").splitlines()]
    given = [row for row in rows if "abstains" not in row]
    assert found["scores"]["coverage"] == len(given) / len(rows)
    right = sum(row["predicted"] == row["label"] for row in given)
    assert found["scores"]["answered_precision"] == pytest.approx(right / len(given))
    scored = capotune.evaluate(lora / "adapter", data=skewed["test"])
    assert scored["coverage"] == found["scores"]["coverage"]


def test_a_precision_that_too_few_rows_could_show_is_refused(
    bert: Path, skewed: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=r"min_precision=0\.99.*99 held-out rows"):
        train("lora", bert, tmp_path / "run", **skewed, min_precision=0.99)
    with pytest.raises(SettingError, match=r"min_precision=1\.5"):
        train("lora", bert, tmp_path / "run", **skewed, min_precision=1.5)


def test_a_precision_that_nobody_reaches_is_said(bert: Path, tmp_path: Path) -> None:
    chooser = random.Random(0)
    rows = [
        {"text": f"{chooser.choice(['my', 'the', 'lamp', 'card'])} {at}", "label": "ab"[at % 2]} for at in range(60)
    ]
    said: list[str] = []
    train(
        "feature-extraction", bert, tmp_path / "run", data=rows, min_precision=0.9, validation_fraction=0.3,
        report=lambda event: said.append(event.text) if isinstance(event, Warned) else None,
    )  # fmt: skip
    assert any("every text gets a label" in text for text in said)
    assert capotune.load(tmp_path / "run" / "adapter").predict(["my lamp"])[0] is not None
