"""Texts that belong to no label: what the head computes, what it learns, and that every program gives the same."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional

import capotune
from capotune.adapters.store import read_adapter
from capotune.data.batches import TokenRows, collate
from capotune.errors import AdapterError, DataError, SettingError
from capotune.runs.onnx import read_onnx
from capotune.tasks.classification import Classification
from capotune.tasks.classification.scope import CENTRES, ScopedHead, _best_cut, scoped
from capotune.tasks.text_targets.task import TrainedRows

OUTSIDE = "none"


def head(outside: int = 1) -> ScopedHead:
    generator = torch.Generator().manual_seed(0)
    found = ScopedHead(nn.Linear(6, 4), outside, 5, 3)
    with torch.no_grad():
        found.known.copy_(functional.normalize(torch.randn(5, 3, generator=generator), dim=1))
        found.scope.copy_(torch.tensor([1.5, 4.0, 2.0]))
    return found


@pytest.mark.parametrize("outside", [0, 1, 3])
def test_the_probability_of_what_is_out_of_scope_is_the_formulas(outside: int) -> None:
    made, x = head(outside), torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        linear, logits = functional.linear(x, made.weight, made.bias), made(x)
    inside = [label for label in range(4) if label != outside]
    unsure = -linear.softmax(1)[:, inside].max(1).values.log()
    near = (functional.normalize(x[:, 3:], dim=1) @ made.known.detach().t()).max(1).values
    torch.testing.assert_close(logits.softmax(1)[:, outside], torch.sigmoid(1.5 * unsure - 4 * near + 2))
    torch.testing.assert_close(logits[:, inside], linear[:, inside])


def test_the_cut_gains_most_and_stands_in_the_middle() -> None:
    margin, is_out = torch.tensor([3.0, 2.0, 0.0, -1.0]), torch.tensor([True, True, False, False])
    assert _best_cut(margin, is_out, ~is_out) == 1.0
    assert _best_cut(margin, is_out, torch.zeros(4, dtype=torch.bool)) == 1.0  # labels that are wrong are no loss
    assert _best_cut(-margin, is_out, ~is_out) == 1.5  # nothing is: every cut loses as much as it finds


def clusters(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three labels around three axes of ten, and rows around the others, which are out of scope."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % 4
    axis = torch.where(targets < 3, targets, 3 + torch.randint(7, (rows,), generator=generator))
    return 4 * functional.one_hot(axis, 10).float() + torch.randn(rows, 10, generator=generator), targets


def test_what_is_far_from_every_label_is_found_to_be_out_of_scope() -> None:
    x, targets = clusters(400, 0)
    linear = nn.Linear(10, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.cat([torch.eye(10)[:3], torch.zeros(1, 10)]))
        linear.bias.zero_()
    fit, held = torch.arange(300), torch.arange(300, 400)
    rows = TrainedRows(lambda: linear(x[held]), lambda at: x[at], targets, fit, held)
    made, logits = scoped(linear, 3, 10, rows, linear(x[held]).detach())
    torch.testing.assert_close(made(x[held]).detach(), logits)
    assert len(made.known) == 3 * CENTRES
    new, labels = clusters(1000, 1)
    with torch.no_grad():
        found, before = made(new).argmax(1), linear(new).argmax(1)
    recall, inside = ((found == labels)[labels == 3], (found == labels)[labels != 3])
    assert float(recall.float().mean()) > 0.85 > float((before == labels)[labels == 3].float().mean()) + 0.5
    assert float(inside.float().mean()) > 0.85


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    chooser = random.Random(0)
    words = {
        "broken": ["lamp", "is"],
        "late": ["parcel", "late"],
        OUTSIDE: ["was", "the", "my", "paid", "card"],
    }

    def some(count: int) -> list[dict[str, str]]:
        labels = [(*words,)[at % 3] for at in range(count)]
        return [{"text": " ".join(chooser.choices(words[one], k=4)) + f" {at}", "label": one}
                for at, one in enumerate(labels)]  # fmt: skip

    return {"data": some(150), "test": some(60)}


@pytest.fixture(scope="module", params=["feature-extraction", "lora"])
def run(
    request: pytest.FixtureRequest, bert: Path, rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out: Path = tmp_path_factory.mktemp("scope") / request.param
    settings = {"epochs": 1, "batch_size": 16, "min_precision": 0.5, "validation_fraction": 0.2}
    capotune.train(request.param, **rows, model=str(bert), out=out, out_of_scope=OUTSIDE, **settings)
    return out


def predictions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_scope_and_labels_are_scored_apart(run: Path, rows: dict[str, Any]) -> None:
    scores, found = json.loads((run / "run.json").read_text("utf-8"))["result"]["scores"], predictions(run)
    for name, outside in (("in_scope_accuracy", False), ("out_of_scope_recall", True)):
        own = [row["predicted"] == row["label"] for row in found if (row["label"] == OUTSIDE) is outside]
        assert scores[name] == pytest.approx(sum(own) / len(own))
    scored = capotune.evaluate(run / "adapter", data=rows["test"])
    assert {name: scored[name] for name in scores} == scores


def test_the_loaded_adapter_gives_the_runs_answers(run: Path) -> None:
    classifier, found = capotune.load(run / "adapter"), predictions(run)
    assert isinstance(classifier.model.classifier, ScopedHead)
    answers = classifier.answer([row["text"] for row in found])
    assert [one.label for one in answers] == [None if "abstains" in row else row["predicted"] for row in found]
    assert [one.probability for one in answers] == pytest.approx([row["probability"] for row in found], abs=1e-5)
    assert capotune.info(run / "adapter", check=True)["check"]["agrees"]


def test_peft_gives_the_same(run: Path) -> None:
    if run.name != "lora":  # the others are no adapters of PEFT's kinds
        return
    assembled = capotune.load(run / "adapter")._assembled
    ids = assembled.task.encode(["my parcel is late", "the lamp", "paid twice"])
    batch = collate(ids, torch.arange(3).numpy(), assembled.task.pad_id)
    model = peft.PeftModel.from_pretrained(capotune.load_base(run / "adapter"), run / "adapter").eval()
    with torch.no_grad():
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    ours = assembled.task.logits(assembled, TokenRows(ids, assembled.task.pad_id))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_a_record_that_says_otherwise_than_the_tensors_is_refused(run: Path) -> None:
    stored = read_adapter(run / "adapter")
    wrong = replace(stored, record={**stored.record, "known": stored.record["known"] + 1})
    with pytest.raises(AdapterError, match="the head knows"):
        Classification.check_tensors(wrong)
    with pytest.raises(AdapterError, match="cannot be averaged"):
        Classification.check_combines(stored.record, stored.record)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out_of_scope": "non"}, DataError, "no training row has the label 'non'.*Did you mean 'none'"),
        ({"out_of_scope": OUTSIDE, "validation_fraction": 0.02}, SettingError, "1 are held out, and 4 are needed"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str, rows: dict[str, Any], bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        capotune.train("lora", **rows, model=str(bert), out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_single_label_in_scope_is_refused(rows: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    two = [row for row in rows["data"] if row["label"] != "late"]
    with pytest.raises(DataError, match="there is 1 label; 2 at least"):
        capotune.train("lora", data=two, model=str(bert), out=tmp_path / "run", out_of_scope=OUTSIDE)


def test_onnx_runtime_gives_the_same(run: Path, tmp_path: Path) -> None:
    if run.name == "lora":  # the graph is of the head, whatever trained it
        return
    pytest.importorskip("onnxruntime")
    capotune.export(run / "adapter", loader="onnx", out=tmp_path / "graph")
    assembled = capotune.load(run / "adapter")._assembled
    ids = assembled.task.encode(["my parcel is late", "the lamp", "paid twice"])
    expected = assembled.task.logits_of_ids(assembled, ids)
    torch.testing.assert_close(read_onnx(tmp_path / "graph", ids, 0), expected, rtol=1e-4, atol=1e-4)
