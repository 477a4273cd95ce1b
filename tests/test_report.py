"""The report's contracts: the schema, the rule, a page that is safe and loads nothing, a picture that can be read."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import asdict, fields, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import pytest
from matplotlib import image as matplotlib_image
from rich.console import Console

from capotune import report
from capotune.data.inspect.measures import Lengths, Lines
from capotune.data.inspect.samples import GenerationReport, LengthBin, SampleRow, Span
from capotune.evaluation.metrics import wilson_interval
from capotune.report import Answers, Comparison, ComparisonRow, Mistake, PageDetails, recommend
from capotune.report._plot import _draw
from capotune.report._words import change_text, score_text

HOSTILE = """<script>alert("x")</script>' " & <img src=http://evil.example/x.png> {{ 7*7 }} </style>"""
METHODS = ("feature-extraction", "lora", "qlora", "prompt-tuning")


def row(method: str, score: float, seconds: float, adapter_bytes: int = 1_000_000) -> ComparisonRow:
    return ComparisonRow(
        method, score, 1_205_780, 22_713_216, adapter_bytes, seconds, 1_420_000_000, 5.0, f"{method}/adapter"
    )


def comparison(scores: tuple[float, ...] = (0.9325, 0.9412, 0.9386, 0.9162), **changes: Any) -> Comparison:
    rows = tuple(map(row, METHODS, scores, (41.0, 252.0, 377.0, 602.0)))
    test_rows = changes.get("test_rows", 3080)
    base = changes.get("base_score", 0.8951)
    method, why = recommend(rows, test_rows, base_score=base)
    made = Comparison("minilm", "classification", "accuracy", True, 10_003, test_rows, base, rows, method, why)
    return replace(made, **changes)


def details(labels: int = 3, text: str = "where is my parcel") -> PageDetails:
    names = [f"label_{i}" for i in range(labels)]
    confusion = [[9 if i == j else int(j == (i + 1) % labels) for j in range(labels)] for i in range(labels)]
    mistakes = [Mistake(text, names[0], names[1], 0.987)]
    settings = {method: {"seed": 0, "learning_rate": 5e-4, "layers": None} for method in METHODS}
    data = {
        "test_from": "the column 'split'",
        "labels": [{"name": name, "train": 30, "test": 10} for name in names],
        "train_tokens": {"min": 3, "median": 14},
        "leaked": {"count": 2, "first": [4, 12], "unit": "line"},
        "similar_labels": [],
    }
    return PageDetails(
        names, confusion, "lora", mistakes, settings, data, {"torch": "2.9.1"}, "capo compare --data f.csv"
    )


# Test prompts with every sort of answer: right, right but for blanks, wrong, none, preformatted.
ANSWERS = [
    Answers(
        "the squares below n",
        "[i**2 for i in range(n)]",
        {
            "prompt-tuning": "",
            "lora": "[i**2 for i in range(n)]",
            "base": "def squares(n):\n    return [i * i\n        for i in range(n)]",
            "qlora": " [i**2 for i in range(n)]\n",
        },
    ),
    Answers("عاصمة مصر؟", "القاهرة", {"base": "Cairo 🙂", "lora": "القاهرة", "qlora": "?", "prompt-tuning": "?"}),
]


def generation(metric: str = "perplexity", **changes: Any) -> Comparison:
    """Four techniques on a generation task, with intervals; ``metric`` is ``perplexity`` or ``exact_match``."""
    scores: list[dict[str, float]] = [
        {"loss": 2.54, "perplexity": 12.7, "exact_match": 0.707, "rouge_l": 0.811},
        {"loss": 2.51, "perplexity": 12.3, "exact_match": 0.733, "rouge_l": 0.852},
        {"loss": 2.53, "perplexity": 12.5, "exact_match": 0.71, "rouge_l": 0.849},
        {"loss": 3.12, "perplexity": 22.6, "exact_match": 0.393, "rouge_l": 0.602},
    ]
    base = {"loss": 3.72, "perplexity": 41.2, "exact_match": 0.03, "rouge_l": 0.214}
    spread = {"perplexity": 0.6, "exact_match": 0.05}[metric]
    rows = tuple(
        replace(row(method, own[metric], seconds), interval=(own[metric] - spread, own[metric] + spread), scores=own)
        for method, own, seconds in zip(METHODS, scores, (96.0, 388.0, 1412.0, 540.0), strict=True)
    )
    higher = metric == "exact_match"
    made = Comparison("smol/llm", "generation", metric, higher, 1200, 300, base[metric], rows, "", "", base)
    made = replace(made, **changes)
    method, why = recommend(made.rows, 300, higher, metric=metric, base_score=made.base_score)
    return replace(made, **{"recommended": method, "why": why} | changes)


def generation_details(answers: list[Answers] = ANSWERS) -> PageDetails:
    return replace(details(), labels=[], confusion=[], mistakes=[], answers=answers)


def rendered(made: Comparison, shown: PageDetails, folder: Path) -> str:
    path = folder / "compare.html"
    report.page(made, shown, path)
    return path.read_text("utf-8")


# --- compare.json -----------------------------------------------------------------------------------------------------


def test_schema_is_the_design() -> None:
    content = comparison().to_dict()
    assert list(content) == [
        "model", "task", "metric", "higher_is_better", "train_rows", "test_rows", "base_score", "rows",
        "recommended", "why", "base_scores",
    ]  # fmt: skip
    assert [list(line) for line in content["rows"]] == 4 * [[
        "method", "score", "trainable_parameters", "total_parameters", "adapter_bytes", "train_seconds",
        "peak_memory_bytes", "epochs", "adapter", "interval", "scores",
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


def test_a_file_from_before_generation_reads_back() -> None:
    made, shown = comparison(), details()
    content = json.loads(json.dumps(made.to_dict(shown)))
    del content["base_scores"], content["details"]["answers"]
    for line in content["rows"]:
        del line["interval"], line["scores"]
    assert Comparison.from_dict(content) == made
    assert PageDetails.from_dict(content["details"]) == shown


def test_what_json_does_not_know_is_null() -> None:
    first = replace(row("lora", math.inf, 1.0), interval=(12.0, math.inf), scores={"loss": math.nan, "rouge_l": 0.5})
    made = generation(rows=(first,), base_score=math.inf, base_scores={"loss": math.inf})
    content = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    line = content["rows"][0]
    assert (line["score"], line["interval"], line["scores"]) == (None, None, {"loss": None, "rouge_l": 0.5})
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
    for record in (Answers, ComparisonRow, Comparison, Mistake, PageDetails):
        assert record.__dataclass_params__.frozen
        assert all(field.type for field in fields(record))


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "rows", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_the_published_examples(successes: int, rows: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score, no continuity correction)."""
    assert wilson_interval(successes / rows, rows) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("score", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 10, 3080])
def test_wilson_holds_the_score_and_stays_in_range(score: float, rows: int) -> None:
    low, high = wilson_interval(score, rows)
    assert 0 <= low <= score <= high <= 1
    assert low < high


def test_the_cheapest_within_the_interval_is_recommended() -> None:
    made = comparison()
    assert made.recommended == "feature-extraction"
    assert made.why == (
        "lora scored highest (94.1 %); with 3,080 test rows its 95 % interval reaches down to 93.23 %. "
        "feature-extraction (93.25 %) is within it and trains 6 times faster."
    )


def test_the_bound_itself_is_within() -> None:
    low, _ = wilson_interval(0.9412, 3080)
    best = row("lora", 0.9412, 100.0)
    assert recommend([row("qlora", low, 1.0), best], 3080)[0] == "qlora"
    assert recommend([row("qlora", math.nextafter(low, 0), 1.0), best], 3080)[0] == "lora"


def test_more_test_rows_tell_more_apart() -> None:
    rows = [row("feature-extraction", 0.92, 10.0), row("lora", 0.94, 100.0)]
    assert recommend(rows, 300)[0] == "feature-extraction"
    method, why = recommend(rows, 3000)
    assert method == "lora"
    assert why.endswith("and nothing cheaper comes that close.")


def test_equal_scores_and_times_go_to_the_smaller_adapter() -> None:
    rows = [row("lora", 0.9, 10.0, adapter_bytes=200), row("qlora", 0.9, 10.0, adapter_bytes=100)]
    method, why = recommend(rows, 300)
    assert method == "qlora"
    assert why == "lora and qlora scored best (90.0 %); qlora is also the cheapest to train."


def test_the_best_may_be_the_cheapest() -> None:
    method, why = recommend([row("lora", 0.95, 5.0), row("qlora", 0.9, 10.0)], 300)
    assert (method, why) == ("lora", "lora scored best (95.0 %); it is also the cheapest to train.")


def test_one_technique() -> None:
    assert recommend([row("lora", 0.9, 5.0)], 300) == ("lora", "lora is the only technique with a score (90.0 %).")


@pytest.mark.parametrize("rows", [[], [row("lora", math.nan, 1.0)]])
def test_no_technique_finished(rows: list[ComparisonRow]) -> None:
    assert recommend(rows, 300) == ("", "No technique finished with a score, so there is nothing to recommend.")


def test_a_technique_without_a_score_is_passed_over() -> None:
    assert recommend([row("qlora", math.nan, 1.0), row("lora", 0.9, 5.0)], 300)[0] == "lora"


def test_the_base_is_clearly_better() -> None:
    method, why = recommend([row("lora", 0.80, 5.0), row("qlora", 0.79, 3.0)], 300, base_score=0.9)
    assert method == "qlora"
    assert why.endswith(
        "Every technique scored clearly worse than the base without fine-tuning (90.0 %): "
        "on this data fine-tuning does not help."
    )


def test_the_base_cannot_be_told_from_the_best() -> None:
    _, why = recommend([row("lora", 0.90, 5.0)], 300, base_score=0.89)
    assert why.endswith("is inside the interval of the best too: a gain is not shown.")
    assert "base" not in recommend([row("lora", 0.90, 5.0)], 300, base_score=0.5)[1]


def test_without_an_interval_only_an_equal_score_is_within() -> None:
    rows = [row("lora", 1.25, 5.0), row("qlora", 1.20, 9.0)]
    expected = "qlora scored best (loss 1.20)."
    assert recommend(rows, 300, higher_is_better=False, metric="loss") == ("qlora", expected)
    one_row = [replace(one, interval=(math.nan, math.nan)) for one in rows]
    assert recommend(one_row, 1, higher_is_better=False, metric="loss") == ("qlora", expected)


def test_lower_is_better() -> None:
    made = generation()
    assert made.recommended == "feature-extraction"
    assert made.why == (
        "lora scored best (perplexity 12.3); with 300 test rows its 95 % interval reaches up to 12.9. "
        "feature-extraction (12.7) is within it and trains 4 times faster."
    )


def test_the_interval_is_the_best_rows_own() -> None:
    made = generation("exact_match")  # from 68.3 %; Wilson's would begin at 68.0 %
    assert "reaches down to 68.3 %" in made.why
    narrow = replace(made.rows[1], interval=(0.73, 0.74))
    rows = (made.rows[0], narrow, *made.rows[2:])
    method, why = recommend(rows, 300, metric="exact_match")
    assert method == "lora"
    assert why == (
        "lora scored highest (73.3 %); with 300 test rows its 95 % interval reaches down to 73.0 %, "
        "and nothing cheaper comes that close."
    )
    best_is_wilsons = [replace(one, interval=None) for one in rows]
    assert recommend(best_is_wilsons, 300, metric="exact_match")[0] == "feature-extraction"


@pytest.mark.parametrize(("end", "chosen"), [(12.7, "feature-extraction"), (12.69, "lora")])
def test_the_upper_bound_itself_is_within(end: float, chosen: str) -> None:
    rows = list(generation().rows)
    rows[1] = replace(rows[1], interval=(11.7, end))
    assert recommend(rows, 300, higher_is_better=False, metric="perplexity")[0] == chosen


def test_a_bound_that_rounds_to_the_score_gets_another_digit() -> None:
    rows = list(generation().rows)
    rows[1] = replace(rows[1], interval=(11.7, 12.72))
    _, why = recommend(rows, 300, higher_is_better=False, metric="perplexity")
    assert "reaches up to 12.72. feature-extraction (12.70) is within it" in why


def test_an_interval_that_misses_its_score_still_leaves_a_choice() -> None:
    missed = replace(row("lora", 0.8, 5.0), interval=(0.85, 0.9))
    assert recommend([missed, row("qlora", 0.7, 1.0)], 300, metric="exact_match")[0] == "lora"


def test_an_infinite_score_is_passed_over() -> None:
    rows = [row("qlora", math.inf, 1.0), row("lora", 12.0, 5.0)]
    assert recommend(rows, 300, higher_is_better=False, metric="perplexity")[0] == "lora"


def test_the_base_beside_a_score_that_is_better_when_lower() -> None:
    assert generation(base_score=11.69).why.endswith(
        "Every technique scored clearly worse than the base without fine-tuning (11.7): "
        "on this data fine-tuning does not help."
    )
    assert generation(base_score=11.8).why.endswith(
        "The base without fine-tuning (11.8) is inside the interval of the best too: a gain is not shown."
    )
    assert "base" not in generation(base_score=13.0).why


def test_equal_bests_share_the_interval() -> None:
    rows = [row("lora", 0.9, 9.0), row("qlora", 0.9, 10.0), row("prompt-tuning", 0.89, 3.0)]
    assert "lora and qlora scored highest (90.0 %); with 300 test rows the 95 % interval" in recommend(rows, 300)[1]


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (12.345, "perplexity", "12.3"),
        (1.2, "loss", "1.20"),
        (0.0123, "loss", "0.0123"),
        (1234.5, "perplexity", "1,234"),
        (0.0, "loss", "0.00"),
        (math.inf, "perplexity", "inf"),
        (math.nan, "loss", "-"),
        (0.4531, "rouge_l", "45.3 %"),
    ],
)
def test_scores_have_three_digits(value: float, metric: str, text: str) -> None:
    assert score_text(value, metric) == text


@pytest.mark.parametrize(
    ("value", "base", "metric", "text"),
    [(12.34, 41.2, "perplexity", "-28.9"), (12.34, 812.0, "perplexity", "-800"), (0.71, 0.03, "exact_match", "+68.0"),
     (12.3, math.inf, "perplexity", "-"), (0.456, 0.412, "loss", "+0.044")],
)  # fmt: skip
def test_a_change_is_no_more_exact_than_its_scores(value: float, base: float, metric: str, text: str) -> None:
    assert change_text(value, base, metric) == text


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100])
def test_table_fits_and_cuts_nothing(width: int) -> None:
    output = io.StringIO()
    Console(file=output, width=width, no_color=True).print(report.table(comparison()))
    text = output.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for expected in (
        "* feature-extraction",
        "94.1 %",
        "+4.6",
        "1,205,780",
        "5.3 %",
        "1.0 MB",
        "252",
        "1.4 GB",
        "89.5 %",
    ):
        assert expected in text


def printed(made: Comparison, width: int = 80) -> str:
    output = io.StringIO()
    Console(file=output, width=width, no_color=True).print(report.table(made))
    text = output.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return text


@pytest.mark.parametrize("width", [80, 100])
def test_table_of_generation_has_every_metric_and_the_bases_own(width: int) -> None:
    text = printed(generation("exact_match"), width)
    assert text.startswith("exact match on 300 test rows, 1,200 to train on ")
    lines = [line.split() for line in text.splitlines()]
    assert ["technique", "score", "perpl.", "ROUGE-L", "able", "adapter", "(s)", "memory"] in lines
    assert ["lora", "73.3", "%", "12.3", "85.2", "%", "1.2", "M", "1.0", "MB", "388", "1.4", "GB"] in lines
    assert ["base", "(not", "3.0", "%", "41.2", "21.4", "%"] in lines


def test_table_of_generation_fits_with_the_longest_numbers() -> None:
    rows = tuple(
        replace(one, score=1.0, train_seconds=12_345.0, adapter_bytes=161_500_000, trainable_parameters=40_370_176,
                peak_memory_bytes=11_900_000_000, scores={"perplexity": 312.4, "rouge_l": 1.0})
        for one in generation("exact_match").rows
    )  # fmt: skip
    printed(generation("exact_match", rows=rows, base_scores={"perplexity": 12_345.6, "rouge_l": 0.1}))


def test_table_says_that_lower_is_better() -> None:
    text = printed(generation())
    assert text.startswith("perplexity (lower is better) on 300 test rows")
    assert "ROUGE-L" in text
    assert "loss" not in text  # perplexity says the same


def test_table_of_plain_text_compares_with_the_base() -> None:
    rows = tuple(replace(one, scores={"loss": 2.5}) for one in generation().rows)
    text = printed(generation(rows=rows, base_scores={"loss": 3.72}))
    assert "-28.9" in text
    assert "5.3 %" in text


def test_table_shows_the_loss_where_there_is_no_perplexity_and_a_dash_for_what_is_missing() -> None:
    rows = tuple(replace(one, scores={"loss": 2.51}) for one in generation("exact_match").rows)
    text = printed(generation("exact_match", rows=rows, base_scores={}))
    assert "loss" in text
    assert "2.51" in text
    assert [line.split()[-1] for line in text.splitlines() if "base (not" in line] == ["-"]


def test_further_scores_leave_the_table_of_classification_as_it_is() -> None:
    rows = tuple(replace(one, scores={"macro_f1": 0.9, "loss": 0.3}) for one in comparison().rows)
    assert printed(comparison(rows=rows)) == printed(comparison())


def test_table_does_not_read_markup() -> None:
    output = io.StringIO()
    made = comparison(rows=(row("[red]x[/red]", 0.9, 1.0),))
    Console(file=output, width=100).print(report.table(made))
    assert "[red]x[/red]" in output.getvalue()


# --- the picture ------------------------------------------------------------------------------------------------------


def test_picture_decodes_and_has_a_size_to_read(tmp_path: Path) -> None:
    path, before = tmp_path / "compare.png", _drawing_defaults()
    report.plot(comparison(model="$not mathtext$"), path)
    pixels = matplotlib_image.imread(path)
    assert pixels.shape[:2] == (960, 1600)
    assert pixels.std() > 0.05
    assert _drawing_defaults() == before


def _drawing_defaults() -> dict[str, Any]:
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


@pytest.mark.parametrize(
    "made",
    [
        comparison((0.9, 0.9, 0.9, 0.9), base_score=0.9),
        comparison((1.0, 1.0, 1.0, 1.0), test_rows=1),
        comparison((math.nan,) * 4, base_score=math.nan),
        comparison(rows=()),
        comparison(rows=(row("lora", 0.9, 0.0),), recommended="lora"),
        comparison(rows=(row("lora", 3.2, 9.0),), recommended="lora", metric="loss", higher_is_better=False),
        generation(),
        generation(base_score=812.0),
        generation(base_score=math.inf),
        generation(rows=(row("lora", math.inf, 1.0), row("qlora", 12.0, 2.0))),
    ],
)
def test_edge_cases_are_drawn(made: Comparison, tmp_path: Path) -> None:
    report.write(made, details(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.html", "compare.json", "compare.png"]


def _drawn(made: Comparison, monkeypatch: pytest.MonkeyPatch, inches: tuple[float, float] | None = None) -> Any:
    """The matplotlib figure of the PNG, or of the page's picture with this size."""
    figures: list[Any] = []
    save = matplotlib.figure.Figure.savefig

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    _draw(made, "png", inches or (8.0, 4.8), titled=inches is None)
    return figures[0]


@pytest.mark.parametrize("inches", [None, (8.0, 4.4), (4.4, 4.4)])
@pytest.mark.parametrize(
    "made",
    [
        generation(),
        generation(base_score=812.0),
        generation("exact_match"),
        generation(base_score=12.4),
        generation(rows=tuple(replace(one, train_seconds=200.0 + one.score) for one in generation().rows)),
        comparison(),
    ],
)
def test_no_text_of_the_picture_covers_another(
    made: Comparison, inches: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = _drawn(made, monkeypatch, inches)
    axes = figure.axes[0]
    ticks = [
        label
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for level, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if low <= level <= high
    ]
    texts = [*figure.texts, *axes.texts, axes.xaxis.label, *ticks]
    visible = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    assert {one.method for one in made.rows} <= {name.split(" ")[0] for name, _ in visible}
    for number, (name, box) in enumerate(visible):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, name
        for other, other_box in visible[:number]:
            assert not box.overlaps(other_box), (name, other)


def test_picture_says_when_lower_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    for made, label in (
        (generation(), "perplexity, lower is better"),
        (generation("exact_match"), "exact match (%)"),
        (comparison(), "accuracy (%)"),
    ):
        assert label in [text.get_text() for text in _drawn(made, monkeypatch).texts]


def test_picture_draws_each_rows_own_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _drawn(generation(), monkeypatch).axes[0].lines
    bars = [list(line.get_ydata()) for line in lines if line.get_linestyle() == "-"]
    assert bars == [pytest.approx(one.interval) for one in generation().rows]


@pytest.mark.parametrize("seconds", [(4.7, 5.2, 6.6, 7.3), (5.2, 40.0, 66.0, 73.0), (4.0, 5.0, 6.0, 90.0)])
def test_the_bases_name_keeps_clear_of_points_and_intervals(
    seconds: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tuple(map(row, METHODS, (0.0, 1 / 30, 1 / 30, 0.0), seconds))
    made = comparison(rows=rows, base_score=0.0, test_rows=30)
    axes = _drawn(made, monkeypatch, (4.4, 4.4)).axes[0]
    (name,) = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("base")]
    bars = [line.get_window_extent() for line in axes.lines if line.get_linestyle() == "-"]
    assert len(bars) == 4
    assert not [bar for bar in bars if name.overlaps(bar)]


@pytest.mark.parametrize(("base", "arrow"), [(812.0, "↑"), (-200.0, "↓"), (41.2, None)])
def test_a_far_base_does_not_press_the_techniques_together(
    base: float, arrow: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = _drawn(generation(base_score=base), monkeypatch).axes[0]
    low, high = axes.get_ylim()
    spread = max(end for one in generation().rows for end in one.interval or ()) - 11.7
    assert spread / (high - low) > 0.15
    outside = [text.get_text() for text in axes.texts if "outside this picture" in text.get_text()]
    assert bool(outside) == (arrow is not None) == (not low <= base <= high)
    assert arrow is None or outside[0].startswith(arrow)


def test_the_base_stays_in_view_beside_a_single_technique(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = _drawn(generation(rows=generation().rows[1:2], base_score=41.2), monkeypatch).axes[0]
    assert axes.get_ylim()[1] > 41.2


# --- the page ---------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Which tags a page opens and closes, and their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("labels", [3, 25, 26, 77])
def test_page_is_well_formed_and_loads_nothing(labels: int, tmp_path: Path) -> None:
    html = rendered(comparison(), details(labels), tmp_path)
    tags = Tags(html)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not re.search(r"https?:|//|@import|url\((?!#)", html.replace("<!doctype", ""))
    references = [value for _, attributes in tags.seen for name, value in attributes.items() if "href" in name]
    assert all(value and value.startswith("#") for value in references)
    assert "default-src 'none'" in html


def test_page_escapes_hostile_text(tmp_path: Path) -> None:
    shown = replace(
        details(text=HOSTILE),
        labels=[HOSTILE, "a", "b"],
        mistakes=[Mistake(HOSTILE, HOSTILE, HOSTILE, 0.9)],
        settings={HOSTILE: {HOSTILE: HOSTILE}},
        data={HOSTILE: HOSTILE, "list": [HOSTILE], "labels": [{HOSTILE: HOSTILE}]},
        environment={HOSTILE: HOSTILE},
        command=HOSTILE,
    )
    made = comparison(
        rows=(row(HOSTILE, 0.9, 1.0), row("lora", 0.8, 2.0)), recommended=HOSTILE, model=HOSTILE, why=HOSTILE
    )
    html = rendered(made, shown, tmp_path)
    tags = Tags(html)
    assert not {tag for tag, _ in tags.seen} & {"script", "img"}
    assert html.count("</style>") == 1
    assert "alert(&#34;x&#34;)" in html
    assert "{{ 7*7 }}" in html
    assert not any(name.startswith("on") for _, attributes in tags.seen for name in attributes)


def test_page_tells_what_was_asked_of_it(tmp_path: Path) -> None:
    made = comparison()
    html = rendered(made, details(), tmp_path).replace("\u00a0", " ").replace("&nbsp;", " ")
    for expected in (
        made.why,
        "Take <em>feature-extraction</em>",
        "base (frozen, nearest class mean)",
        "capo predict feature-extraction/adapter",
        "PeftModel.from_pretrained(base, &#34;lora/adapter&#34;)",
        "98.7 %",
        "2 (lines 4, 12)",
        "Wilson confidence interval",
        "learning_rate",
        "capo compare --data f.csv",
        "2.9.1",
    ):
        assert expected in html, expected


def test_few_labels_make_a_matrix_and_many_make_lists(tmp_path: Path) -> None:
    few, many = (rendered(comparison(), details(labels), tmp_path) for labels in (25, 26))
    assert 'class="wrong' in few
    assert "lowest F1" not in few
    assert 'class="wrong' not in many
    assert "lowest F1" in many
    assert "most confused pairs of 26 labels" in many


def test_page_is_accessible(tmp_path: Path) -> None:
    tags = Tags(rendered(comparison(), details(), tmp_path)).seen
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    pictures = [attributes for _, attributes in tags if attributes.get("role") == "img"]
    assert "lora 94.1 % after 4 min 12 s" in (pictures[0]["aria-label"] or "")
    assert ("html", {"lang": "en"}) in tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def seen(made: Comparison, shown: PageDetails, folder: Path) -> str:
    """The page's source with plain blanks."""
    return rendered(made, shown, folder).replace("\u00a0", " ").replace("&nbsp;", " ")


def text_of(html: str) -> str:
    """What a fragment says, without tags and line breaks of the source."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


@pytest.mark.parametrize("metric", ["perplexity", "exact_match"])
def test_page_of_generation_is_well_formed_and_loads_nothing(metric: str, tmp_path: Path) -> None:
    html = rendered(generation(metric), generation_details(), tmp_path)
    tags = Tags(html)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert all("scope" in attributes for tag, attributes in tags.seen if tag == "th")
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_page_of_generation_tells_what_was_asked_of_it(tmp_path: Path) -> None:
    made = generation()
    html = seen(made, generation_details(), tmp_path)
    text = text_of(html)
    for expected in (
        made.why,
        "22.6 22.0 to 23.2",
        "from 300 test rows",
        "lower is better",
        "mean cross-entropy",
        "longest common subsequence",
        "Bars: 95 % interval.",
        'capo generate feature-extraction/adapter "your prompt"',
        'model = capotune.load("feature-extraction/adapter") model.generate(["your prompt"])',
        "perplexity, lower is better against training time: feature-extraction 12.7 after 1 min 36 s",
    ):
        assert expected in text or expected in html, expected
    assert "Wilson" not in html
    assert "−28.5" in text


def test_page_has_every_metric_of_the_base_and_the_techniques(tmp_path: Path) -> None:
    html = seen(generation("exact_match"), generation_details(), tmp_path)
    table = text_of(html[html.index("<caption>Every metric") : html.index('aria-labelledby="plot"')])
    for line in (
        "technique exact match loss perplexity ROUGE-L",
        "lora 73.3 % 2.51 12.3 85.2 %",
        "base (not fine-tuned) 3.0 % 3.72 41.2 21.4 %",
    ):
        assert line in table, table
    assert "Every metric" not in rendered(comparison(), details(), tmp_path)


def answered(html: str) -> list[list[str]]:
    """Per prompt of the page its answers, each as its name, its mark and its text."""
    section = html[html.index('<section aria-labelledby="answers"') : html.index('aria-labelledby="use"')]
    return [[text_of(cell) for cell in item.split("<div")[1:]] for item in section.split("<li>")[1:]]


def test_page_answers_the_same_prompts_side_by_side(tmp_path: Path) -> None:
    html = seen(generation(), generation_details(), tmp_path)
    first, second = answered(html)
    assert [cell.split(">")[1].split()[0] for cell in first] == ["expected", "base", "lora", "qlora", "prompt-tuning"]
    assert ["✓" in cell for cell in first] == [False, False, True, True, False]
    assert ["✓" in cell for cell in second] == [False, False, True, False, False]
    assert html.count('role="img" aria-label="exactly as expected"') == 3
    assert "(empty)" in first[-1]
    assert "def squares(n):\n    return [i * i\n        for i in range(n)]</dd>" in html
    assert re.search(r"\.answers dd \{[^}]*white-space: pre-wrap", html)
    assert '<dd dir="auto">القاهرة</dd>' in html
    assert '<blockquote dir="auto">عاصمة مصر؟</blockquote>' in html


def test_page_marks_the_recommended_technique_among_the_answers(tmp_path: Path) -> None:
    html = seen(generation(rows=generation().rows[1:]), generation_details(), tmp_path)
    assert [cell.split(">")[0] for cell in re.findall(r'<div class="chosen">\s*<dt>(\w+)', html)] == ["lora", "lora"]


def test_plain_text_has_no_expected_answer(tmp_path: Path) -> None:
    html = seen(generation(), generation_details([Answers("ROMEO:", None, {"base": "", "lora": ""})]), tmp_path)
    assert [len(cells) for cells in answered(html)] == [2]
    assert "expected" not in text_of(html[html.index('id="answers"') : html.index('id="use"')])
    assert "✓" not in html


def test_classification_has_no_answers(tmp_path: Path) -> None:
    assert "The same prompts" not in rendered(comparison(), details(), tmp_path)


def test_long_answers_are_cut_but_compared_whole(tmp_path: Path) -> None:
    long, high = "long " * 1000, "\n".join(f"line {number}" for number in range(100))
    shown = generation_details([Answers(long, long + "end", {"base": long, "lora": long + "end", "qlora": high})])
    html = rendered(generation(), shown, tmp_path)
    assert html.count("long ") < 600
    assert html.count(" …") == 5
    assert "line 15 …" in html
    assert [("✓" in cell) for cell in answered(html)[0]] == [False, False, True, False]


def data_report(**changes: Any) -> dict[str, Any]:
    """A data report of generation as JSON."""
    nothing = Lines(0, [])
    made = GenerationReport(
        source="a.jsonl", test_source="b.jsonl", test_from="given", described="prompt, completion", template_from=None,
        loss_part="the completions", train_rows=1200, test_rows=300, train_sequences=1234, max_length=512,
        train_tokens=Lengths(8, 31, 90, 600), test_tokens=None, sequence_tokens=40_000, loss_tokens=12_400,
        loss_share=0.31, train_without_loss=Lines(2, [4, 12]), test_without_loss=nothing, train_answers_cut=nothing,
        test_answers_cut=nothing, train_ends_cut=nothing, unanswered=nothing, duplicates=nothing, leaked=nothing,
        bins=[LengthBin(0, 49, 1000), LengthBin(50, 99, 0), LengthBin(100, 600, 200)],
        samples=[SampleRow(7, 1300, 3, [Span("what is\n\ta tuple? ", False), Span("(1, 2)", True)])],
    )  # fmt: skip
    return asdict(made) | changes


def test_page_shows_what_is_in_the_loss(tmp_path: Path) -> None:
    html = seen(generation(), replace(generation_details(), data=data_report()), tmp_path)
    section = html[html.index('id="data"') : html.index('id="how"')]
    text = text_of(section)
    for expected in (
        "test rows from given",
        "read as prompt, completion",
        "chat template from none",
        "what is in the loss the completions",
        "min 8, median 31, 95 % at most 90, max 600",
        "tokens to train on 40,000 of them in the loss 12,400 share in the loss 31 %",
        "nothing to train on 2 (lines 4, 12)",
        "tokens rows 0 to 49 1,000 50 to 99 0 100 to 600 200",
        "rows as the model gets them (1)",
        "Line 7, 1,300 tokens, the first of 3 windows",
    ):
        assert expected in text, expected
    assert re.findall(r"width:([\d.]+)%", section) == ["100.0", "20.0"]  # no bar for no rows
    assert '<blockquote dir="auto">what is\n\ta tuple? <mark>(1, 2)</mark></blockquote>' in section
    assert "_" not in text
    assert Tags(html).open == []


def test_page_names_every_fact_of_the_data(tmp_path: Path) -> None:
    section = seen(generation(), replace(generation_details(), data=data_report()), tmp_path).partition('id="data"')[2]
    names = re.findall(r"<dt>(.*?)</dt>", section.partition('id="how"')[0])
    assert len(names) == len(set(names)) == len(fields(GenerationReport)) - 2  # the lengths and the rows are drawn


def test_page_escapes_hostile_training_rows(tmp_path: Path) -> None:
    spans = [{"text": HOSTILE, "in_loss": True}, {"text": HOSTILE, "in_loss": False}]
    data = data_report(samples=[{"line": 1, "tokens": 9, "windows": 1, "spans": spans, "unit": "line"}], bins=[])
    tags = Tags(html := rendered(generation(), replace(generation_details(), data=data), tmp_path))
    assert not {tag for tag, _ in tags.seen} & {"script", "img"}
    assert html.count("{{ 7*7 }}") == 2
    assert "Lengths of the training rows" not in html


def test_page_escapes_hostile_answers(tmp_path: Path) -> None:
    hostile = [Answers(HOSTILE, HOSTILE, {"base": HOSTILE, HOSTILE: HOSTILE, "lora": "\ud800"})]
    changes: dict[str, Any] = {"base_scores": {HOSTILE: 1.0}, "model": HOSTILE}
    html = rendered(generation(**changes), generation_details(hostile), tmp_path)
    tags = Tags(html)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "img"}
    assert html.count("</style>") == 1
    assert html.count("{{ 7*7 }}") >= 5


def peft_snippet(made: Comparison, folder: Path) -> str:
    html = unescape(rendered(made, generation_details(), folder))
    return html[html.index("<h3>PEFT, for") : html.index('aria-labelledby="data"')]


def test_peft_puts_an_adapter_on_the_base_itself(tmp_path: Path) -> None:
    snippet = peft_snippet(generation(), tmp_path)  # feature extraction is recommended, which PEFT does not know
    assert "PEFT, for lora" in snippet
    assert "from transformers import AutoModelForCausalLM\n" in snippet
    assert 'base = AutoModelForCausalLM.from_pretrained("smol/llm")\n' in snippet
    assert 'model = PeftModel.from_pretrained(base, "lora/adapter")</code>' in snippet
    assert "load_base" not in snippet


def test_peft_gets_an_embedded_base_from_capotune(tmp_path: Path) -> None:
    snippet = peft_snippet(generation(model="capo-tiny"), tmp_path)
    assert "import capotune\nfrom peft import PeftModel\n" in snippet
    assert 'base = capotune.load_base("lora/adapter")  # the frozen base\n' in snippet


def test_peft_gets_a_classifiers_base_with_its_head(tmp_path: Path) -> None:
    snippet = peft_snippet(comparison(model="models/minilm"), tmp_path)
    assert 'base = capotune.load_base("lora/adapter")  # the frozen base with its pooling and a blank head' in snippet


def test_peft_gets_the_values_of_a_4_bit_base(tmp_path: Path) -> None:
    snippet = peft_snippet(generation(rows=generation().rows[2:3]), tmp_path)
    assert 'base = capotune.load_base("qlora/adapter")' in snippet
    assert "AutoModelForCausalLM" not in snippet


def test_a_base_in_a_folder_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "smol").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made = generation(model="models/smol")
    assert f'from_pretrained("{tmp_path.resolve()}/models/smol")' in peft_snippet(made, tmp_path)


def test_page_does_not_say_take_when_fine_tuning_hurts(tmp_path: Path) -> None:
    html = rendered(comparison(base_score=0.99), details(), tmp_path)
    assert "<h1>No technique reaches the base without fine-tuning</h1>" in html


def test_page_does_not_say_take_when_the_base_is_better_by_being_lower(tmp_path: Path) -> None:
    html = rendered(generation(base_score=11.6), generation_details(), tmp_path)
    assert "<h1>No technique reaches the base without fine-tuning</h1>" in html
    assert "Take <em>feature-extraction</em>" in rendered(generation(), generation_details(), tmp_path)


def test_page_survives_broken_unicode_and_long_text(tmp_path: Path) -> None:
    html = rendered(comparison(), details(text="\ud800" + "long " * 1000), tmp_path)
    assert html.count("long ") < 200


def test_same_input_same_bytes(tmp_path: Path) -> None:
    first, second = (rendered(comparison(), details(), tmp_path) for _ in range(2))
    assert first == second
