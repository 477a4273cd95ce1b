"""``compare.json``: the schema, what JSON does not know, and files of before."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
from report_helpers import HOSTILE, comparison, details, generation, generation_details, row

from capotune import sections
from capotune.report import Comparison, ComparisonRow, PageDetails, Snippet


def test_schema_is_the_design() -> None:
    content = comparison().to_dict()
    assert list(content) == [
        "model", "task", "metric", "higher_is_better", "train_rows", "test_rows", "base_score", "rows",
        "recommended", "why", "base_scores", "best", "tolerance", "base_difference", "base_difference_interval",
        "base_label", "columns", "metric_why", "chance", "chance_words",
    ]  # fmt: skip
    assert [list(line) for line in content["rows"]] == 4 * [[
        "method", "score", "trainable_parameters", "total_parameters", "adapter_bytes", "train_seconds",
        "peak_memory_bytes", "epochs", "adapter", "interval", "scores", "difference", "difference_interval",
        "paired_rows",
    ]]  # fmt: skip
    assert list(comparison().to_dict(details())) == [*content, "details"]


def test_round_trip_through_json() -> None:
    made, shown = comparison(), details(text=HOSTILE)
    content = json.loads(json.dumps(made.to_dict(shown)))
    assert Comparison.from_dict(content) == made
    assert PageDetails.from_dict(content["details"]) == shown


def test_generation_round_trips_through_json() -> None:
    made, shown = generation(), generation_details()
    content = json.loads(json.dumps(made.to_dict(shown), allow_nan=False))
    assert Comparison.from_dict(content) == made
    assert PageDetails.from_dict(content["details"]) == shown
    assert content["rows"][1]["interval"] == [pytest.approx(11.7), pytest.approx(12.9)]
    assert content["rows"][1]["scores"]["rouge_l"] == 0.852
    assert content["base_scores"]["loss"] == 3.72
    assert content["columns"] == ["exact_match", "rouge_l"]
    assert content["best"] == "lora"
    assert [line["difference"] for line in content["rows"]] == [
        pytest.approx(0.4),
        0.0,
        pytest.approx(0.2),
        pytest.approx(10.3),
    ]


def test_a_file_of_version_0_1_reads_back() -> None:
    made = comparison()
    content = json.loads(json.dumps(made.to_dict()))
    new = ("best", "tolerance", "base_difference", "base_difference_interval", "base_label", "columns", "base_scores")
    for name in new:
        del content[name]
    for line in content["rows"]:
        for name in ("interval", "scores", "difference", "difference_interval", "paired_rows"):
            del line[name]
    again = Comparison.from_dict(content)
    assert (again.recommended, again.why, again.best) == (made.recommended, made.why, "")
    assert [line.score for line in again.rows] == [line.score for line in made.rows]
    assert {line.difference for line in again.rows} == {None}


def test_the_sections_of_version_0_1_read_back() -> None:
    before = {
        "labels": ["a", "b"], "confusion": [[1, 2], [0, 3]], "confusion_method": "lora", "settings": {}, "data": {},
        "mistakes": [{"text": "t", "true": "a", "predicted": "b", "probability": 0.987}], "environment": {},
        "command": "capo", "answers": [{"prompt": "p", "expected": None, "by": {"lora": "x"}}],
    }  # fmt: skip
    matrix, mistakes, answers = PageDetails.from_dict(before).sections
    assert matrix == sections.ConfusionMatrix("What lora confuses", ["a", "b"], [[1, 2], [0, 3]])
    assert isinstance(mistakes, sections.Quotes)
    assert [fact.value for fact in mistakes.quotes[0].facts] == ["a", "b", "98.7 %"]
    assert isinstance(answers, sections.SideBySide)
    assert answers.prompts == [sections.Answered("p", None, {"lora": "x"})]


def test_every_kind_of_section_round_trips_through_json() -> None:
    shown = [
        sections.TableSection("Types", "By type.", ["type", "F1"], [["PER", "90.0 %"]]),
        sections.Quotes("Marked", "", [sections.Quote([sections.Part("Paris", "LOC"), sections.Part(" is")])]),
    ]
    made = replace(generation_details(), sections=shown, snippets=[Snippet("Python", "import capotune")])
    content = json.loads(json.dumps(generation().to_dict(made)))
    assert PageDetails.from_dict(content["details"]) == made


def test_what_json_does_not_know_is_null() -> None:
    first = replace(
        row("lora", math.inf, 1.0), interval=(12.0, math.inf), scores={"loss": math.nan, "rouge_l": 0.5},
        difference_interval=(-math.inf, math.inf),
    )  # fmt: skip
    made = replace(generation(), rows=(first,), base_score=math.inf, base_scores={"loss": math.inf})
    content = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    line = content["rows"][0]
    assert (line["score"], line["interval"], line["scores"]) == (None, None, {"loss": None, "rouge_l": 0.5})
    assert line["difference_interval"] is None
    assert (content["base_score"], content["base_scores"]) == (None, {"loss": None})
    again = Comparison.from_dict(content)
    assert math.isnan(again.rows[0].scores["loss"])
    assert math.isnan(again.base_scores["loss"])


def test_further_metrics_leave_out_the_score_and_keep_their_order() -> None:
    assert generation().further_metrics == ["loss", "exact_match", "rouge_l"]
    assert generation("exact_match").further_metrics == ["loss", "perplexity", "rouge_l"]
    assert comparison().further_metrics == []
    assert comparison(base_scores={"loss": 1.0}).further_metrics == ["loss"]


def test_nan_is_null_in_json() -> None:
    made = comparison((math.nan, 0.9, 0.9, 0.9), base_score=math.nan)
    text = json.dumps(made.to_dict(), allow_nan=False)
    again = Comparison.from_dict(json.loads(text))
    assert math.isnan(again.base_score)
    assert math.isnan(again.rows[0].score)
    assert again.rows[1:] == made.rows[1:]


def test_every_record_is_frozen_and_typed() -> None:
    for record in (ComparisonRow, Comparison, PageDetails, Snippet, sections.ConfusionMatrix, sections.Quotes):
        assert record.__dataclass_params__.frozen
        assert all(field.type for field in fields(record))
