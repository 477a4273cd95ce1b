"""Several labels, numbers and labels of an order: each is one folder, and goes the whole way as classes do."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import capo
from conftest import FILLER
from scipy import stats
from sklearn import metrics as reference

import capotune
from capotune import api, tasks
from capotune.adapters.store import read_adapter
from capotune.errors import AdapterError, CapotuneError
from capotune.evaluation.metrics import metric
from capotune.evaluation.pairs import RowCounts
from capotune.events import EpochEnded, Event, Warned

WORTH = {"late": 1.0, "broken": 3.0, "refund": -2.0}
"""What a word says of its text."""
Rows = list[dict[str, Any]]
METHODS: dict[str, dict[str, Any]] = {
    "feature-extraction": {},
    "lora": {"epochs": 2, "rank": 2},
    "qlora": {"epochs": 1, "rank": 2},
    "prompt-tuning": {"epochs": 1, "num_virtual_tokens": 3},
}


def texts() -> Iterator[tuple[str, list[str]]]:
    """128 texts, and the words in them that say something."""
    chooser = random.Random(0)
    for number in range(128):
        found = chooser.choices(list(WORTH), k=number % 4)
        words = chooser.sample(FILLER, 3) + found
        chooser.shuffle(words)
        yield " ".join(words), found


def several() -> Rows:
    return [{"text": text, "labels": sorted(set(found))} for text, found in texts()]


def numbers() -> Rows:
    noise = np.random.default_rng(0).normal(0, 0.1, 128)
    worth = ((text, sum(WORTH[word] for word in found)) for text, found in texts())
    return [{"text": text, "score": 100 + value / 4 + own} for (text, value), own in zip(worth, noise, strict=True)]


def ordered() -> Rows:
    return [{"text": text, "stars": len(found) + 1} for text, found in texts()]


KINDS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "multi-label": (several(), {}),
    "regression": (numbers(), {}),
    "ordinal": (ordered(), {"task": "ordinal"}),
}
MADE = [(kind, method) for kind in KINDS for method in ("feature-extraction", "lora")]
MADE += [("multi-label", "qlora"), ("regression", "prompt-tuning")]


@dataclass(frozen=True)
class Made:
    """A finished run."""

    kind: str
    rows: Rows
    record: dict[str, Any]
    out: Path

    @property
    def adapter(self) -> Path:
        return self.out / "adapter"

    @property
    def predictions(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "predictions.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module", params=MADE, ids="-".join)
def made(request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    kind, method = request.param
    rows, settings = KINDS[kind]
    out = tmp_path_factory.mktemp(kind) / "run"
    record = capotune.train(method, data=rows, model=str(bert), out=out, **METHODS[method], **settings)
    return Made(kind, rows, record, out)


def of(*chosen: str) -> Any:
    """The runs whose kind or technique is one of these."""
    runs = [one for one in MADE if set(one) & set(chosen)]
    return pytest.mark.parametrize("made", runs, indirect=True, ids=["-".join(one) for one in runs])


# ------------------------------------------------------------------------------------------------------ the whole way


def test_the_kind_is_recognised_and_learned(made: Made) -> None:
    result = made.record["result"]
    assert made.record["settings"]["task"] == made.kind
    task = tasks.get(made.kind)
    chance, words = task.chance(result["metric"], made.predictions)
    sign = 1 if metric(result["metric"]).higher_is_better else -1
    assert sign * result["score"] > sign * chance, words
    assert math.isfinite(result["held_out_score"])


def test_evaluate_gives_the_scores_of_the_run(made: Made) -> None:
    test = [made.rows[row["line"]] for row in made.predictions]
    scored = capotune.evaluate(made.adapter, data=test)
    assert {name: scored[name] for name in made.record["result"]["scores"]} == pytest.approx(
        made.record["result"]["scores"], rel=1e-5, abs=1e-6
    )


def test_the_score_is_that_of_its_counts(made: Made) -> None:
    result = made.record["result"]
    counts = RowCounts.from_dict(json.loads((made.out / "test_rows.json").read_text("utf-8")))
    assert metric(result["metric"]).score(counts.counts) == pytest.approx(result["score"], rel=1e-6)
    low, high = result["interval"]
    assert low <= result["score"] <= high


def test_the_adapter_is_read_back_with_equal_answers(made: Made) -> None:
    answers = {row["text"]: row for row in made.predictions}
    for one in capotune.load(made.adapter).answer(list(answers)):
        stored, said = answers[one.text], one.as_json()
        if made.kind == "regression":
            assert said["numbers"] == pytest.approx(stored["predicted"], rel=1e-5)
        elif made.kind == "ordinal":
            assert said["label"] == stored["predicted"]
        else:
            assert sorted(said["labels"]) == stored["predicted"]
            assert said["probabilities"] == pytest.approx(stored["probabilities"], abs=1e-4)
        assert len(one.as_line().split("\t")) > 1


def test_golden_answers_are_distributions_and_agree(made: Made) -> None:
    assert api.info(made.adapter, check=True)["check"]["agrees"]
    stored = read_adapter(made.adapter)
    rows = torch.tensor([[p for _, p in row] for row in stored.record["golden"][0]["rows"]])
    assert ((rows >= 0) & (rows <= 1)).all()


def test_info_card_and_graph_say_what_it_gives(made: Made) -> None:
    shown = capo("info", made.adapter).said
    card = (made.adapter / "README.md").read_text("utf-8")
    facts = capotune.load(made.adapter)._assembled.task.graph_facts()
    expected = {
        "multi-label": ("each from a probability on", "any of 3 labels", "multi_label_classification"),
        "regression": ("in training; nine in ten", "Gives numbers for a text: score", "regression"),
        "ordinal": ("1 < 2 < 3 < 4", "Gives a text one of 4 labels of an order", "single_label_classification"),
    }[made.kind]
    assert expected[0] in shown
    assert expected[1] in card
    assert facts["problem_type"] == expected[2]


@of("multi-label", "regression")
def test_a_record_that_contradicts_itself_is_refused(made: Made) -> None:
    stored = read_adapter(made.adapter)
    name = "thresholds" if made.kind == "multi-label" else "centers"
    stored.record[name] = [0.5]
    if made.kind == "regression":
        stored.record[name] = [0.5, 0.5]
    with pytest.raises(AdapterError, match=r"capotune\.json"):
        capotune.tasks.loading.task_class(stored)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(bert: Path, tmp_path: Path) -> None:
    """Of the kind whose head is changed after training."""

    class StoppedError(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == 2:
            raise StoppedError

    rows, settings = KINDS["regression"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    given = {"data": str(data), "model": str(bert), "epochs": 3, "rank": 2, "patience": 3, **settings}
    whole = capotune.train("lora", out=tmp_path / "whole", **given)
    with pytest.raises(StoppedError):
        capotune.train("lora", out=tmp_path / "run", report=stop, **given)
    resumed = capotune.resume(tmp_path / "run")
    assert resumed["result"]["scores"] == whole["result"]["scores"]
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@of("lora")
def test_peft_loads_it_with_the_outputs_and_the_loss_of_its_kind(made: Made) -> None:
    peft = pytest.importorskip("peft")
    base = capotune.load_base(made.adapter)
    model = peft.PeftModel.from_pretrained(base, str(made.adapter)).eval()
    loaded = capotune.load(made.adapter)
    ids = torch.tensor(loaded._assembled.task.encode(["broken late the", "refund a my"]))
    outputs = loaded.outputs(["broken late the", "refund a my"])
    labels = {
        "multi-label": torch.ones(2, 3),
        "regression": torch.tensor([99.0, 101.0]),
        "ordinal": torch.tensor([0, 1]),
    }
    with torch.no_grad():
        found = model(input_ids=ids, labels=labels[made.kind])
    torch.testing.assert_close(found.logits, outputs, rtol=1e-4, atol=1e-4)
    wanted = {
        "multi-label": lambda: -torch.nn.functional.logsigmoid(outputs).mean(),
        "regression": lambda: (outputs[:, 0] - labels["regression"]).square().mean(),
        "ordinal": lambda: torch.nn.functional.cross_entropy(outputs, labels["ordinal"]),
    }[made.kind]()
    torch.testing.assert_close(found.loss, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("made", [("regression", "lora")], indirect=True)
def test_merged_model_answers_as_the_adapter(made: Made, tmp_path: Path) -> None:
    said = capotune.merge(made.adapter, out=tmp_path / "merged")
    assert said["answers"]["to_adapter"] < 1e-6
    head = capotune.load(tmp_path / "merged" / "adapter")
    asked = ["broken late the", "refund a my"]
    torch.testing.assert_close(head.outputs(asked), capotune.load(made.adapter).outputs(asked), rtol=1e-3, atol=1e-3)


def test_page_shows_what_it_gives(made: Made) -> None:
    record = read_adapter(made.adapter).record
    rows = made.predictions
    wrong = {"multi-label": [] if rows[0]["labels"] else ["late"]} if made.kind == "multi-label" else {}
    wrong |= {"ordinal": "1" if rows[0].get("label") == "4" else "4"}
    if made.kind in wrong:  # all may be right
        rows[0]["predicted"] = wrong[made.kind]
    sections = tasks.get(made.kind).page_sections(record, "lora", {"lora": rows}, [])
    from capotune.report._section_views import section_views

    views = section_views(sections, ["lora"])
    kinds = {"multi-label": ["table", "quotes"], "regression": ["scatter", "quotes"], "ordinal": ["confusion_matrix"]}
    assert [view["kind"] for view in views][:2] == kinds[made.kind]
    if made.kind == "regression":
        points = np.array(views[0]["shown"])
        assert points.min() >= 0
        assert points.max() <= 200
        predicted = [row["predicted"]["score"] for row in made.predictions]
        assert np.corrcoef(points[:, 1], predicted)[0, 1] == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------- the scores


@of("multi-label")
def test_scores_of_several_labels_are_scikit_learns(made: Made) -> None:
    names = sorted(WORTH)
    true, said = (
        np.array([[name in row[column] for name in names] for row in made.predictions])
        for column in ("labels", "predicted")
    )
    scores = made.record["result"]["scores"]
    assert scores["micro_f1"] == pytest.approx(reference.f1_score(true, said, average="micro"))
    assert scores["macro_f1"] == pytest.approx(reference.f1_score(true, said, average="macro"))
    assert scores["subset_accuracy"] == pytest.approx(reference.accuracy_score(true, said))
    probabilities = np.array([[row["probabilities"][name] for name in names] for row in made.predictions])
    loss = np.mean([reference.log_loss(true[:, at], probabilities[:, at].clip(1e-4, 1 - 1e-4)) for at in range(3)])
    assert scores["loss"] == pytest.approx(loss, rel=0.02, abs=1e-3)


@of("regression")
def test_scores_of_numbers_are_scipys(made: Made) -> None:
    true, said = (np.array([row[name]["score"] for row in made.predictions]) for name in ("numbers", "predicted"))
    scores = made.record["result"]["scores"]
    assert scores["rmse"] == pytest.approx(reference.root_mean_squared_error(true, said))
    assert scores["mae"] == pytest.approx(reference.mean_absolute_error(true, said))
    assert scores["pearson"] == pytest.approx(stats.pearsonr(true, said)[0])
    assert scores["spearman"] == pytest.approx(stats.spearmanr(true, said)[0])
    margin = made.predictions[0]["margins"]["score"]
    assert scores["coverage"] == pytest.approx(np.mean(np.abs(true - said) <= margin))


@of("ordinal")
def test_scores_of_an_order_are_scikit_learns(made: Made) -> None:
    true, said = ([int(row[name]) for row in made.predictions] for name in ("label", "predicted"))
    scores = made.record["result"]["scores"]
    assert scores["steps"] == pytest.approx(reference.mean_absolute_error(true, said))
    assert scores["kappa"] == pytest.approx(reference.cohen_kappa_score(true, said, weights="quadratic"))
    assert scores["accuracy"] == pytest.approx(reference.accuracy_score(true, said))


# ------------------------------------------------------------------------------------------------- what is asked of it


def test_several_numbers_have_each_their_unit(bert: Path, tmp_path: Path) -> None:
    rows = [
        {"text": text, "worth": sum(WORTH[word] for word in found) / 8, "year": 2000 + 10 * len(found)}
        for text, found in texts()
    ]
    given = {"model": str(bert), "label_columns": ("worth", "year")}
    capotune.train("feature-extraction", data=rows, out=tmp_path / "run", **given)
    one = capotune.predict(tmp_path / "run" / "adapter", ["broken broken broken the"])[0].as_json()
    assert 0 < one["numbers"]["worth"] < 2
    assert 2005 < one["numbers"]["year"] < 2045
    low, high = one["intervals"]["year"]
    assert low < one["numbers"]["year"] < high
    scored = capotune.evaluate(tmp_path / "run" / "adapter", data=rows)
    assert scored["metric"] == "standard_rmse"
    assert set(scored["numbers"]) == {"worth", "year"}


def test_an_order_is_that_which_is_given(bert: Path, tmp_path: Path) -> None:
    names = ("none", "one", "some", "most")
    rows = [{"text": row["text"], "label": names[row["stars"] - 1]} for row in ordered()]
    given = {"data": rows, "model": str(bert), "task": "ordinal"}
    with pytest.raises(CapotuneError, match=r"`label_order`: is needed for labels that are no numbers, such as 'most'"):
        capotune.train("feature-extraction", out=tmp_path / "run", **given)
    with pytest.raises(CapotuneError, match=r"must name every label of the training rows once, and no other: 'some'"):
        capotune.train("feature-extraction", out=tmp_path / "run", label_order=("none", "one", "most"), **given)
    capotune.train("feature-extraction", out=tmp_path / "run", label_order=names, **given)
    assert capotune.load(tmp_path / "run" / "adapter").labels == names


def test_too_few_held_out_rows_give_no_intervals_and_say_so(bert: Path, tmp_path: Path) -> None:
    said: list[str] = []
    capotune.train(
        "feature-extraction", data=numbers()[:40], model=str(bert), out=tmp_path / "run",
        report=lambda event: said.append(event.text) if isinstance(event, Warned) else None,
    )  # fmt: skip
    assert any("too few rows are held out to say how far a number may be off" in one for one in said)
    adapter = tmp_path / "run" / "adapter"
    assert capotune.predict(adapter, ["late"])[0].margins is None
    assert np.isnan(capotune.load(adapter).intervals(["late"])).all()
    assert "coverage" not in capotune.evaluate(adapter, data=numbers())


@of("multi-label")
def test_unknown_labels_are_named_with_their_row(made: Made) -> None:
    data = [{"text": "late", "labels": ["late"]}, {"text": "lost", "labels": ["late", "losst"]}]
    with pytest.raises(CapotuneError, match=r"row 1: the label 'losst' is not one the adapter knows"):
        capotune.evaluate(made.adapter, data=data)
