"""The report's contracts: the schema, the rule, a page that is safe and loads nothing, a picture that can be read."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import image as matplotlib_image
from rich.console import Console

from capotune import report
from capotune.report import Comparison, ComparisonRow, Mistake, PageDetails, recommend, wilson_interval

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
        "leaked": {"count": 2, "first": [4, 12]},
        "similar_labels": [],
    }
    return PageDetails(
        names, confusion, "lora", mistakes, settings, data, {"torch": "2.9.1"}, "capo compare --data f.csv"
    )


def rendered(made: Comparison, shown: PageDetails, folder: Path) -> str:
    path = folder / "compare.html"
    report.page(made, shown, path)
    return path.read_text("utf-8")


# --- compare.json -----------------------------------------------------------------------------------------------------


def test_schema_is_the_design() -> None:
    content = comparison().to_dict()
    assert list(content) == [
        "model", "task", "metric", "higher_is_better", "train_rows", "test_rows", "base_score", "rows",
        "recommended", "why",
    ]  # fmt: skip
    assert [list(line) for line in content["rows"]] == 4 * [[
        "method", "score", "trainable_parameters", "total_parameters", "adapter_bytes", "train_seconds",
        "peak_memory_bytes", "epochs", "adapter",
    ]]  # fmt: skip
    assert list(comparison().to_dict(details())) == [*content, "details"]


def test_round_trip_through_json() -> None:
    made, shown = comparison(), details(text=HOSTILE)
    content = json.loads(json.dumps(made.to_dict(shown)))
    assert Comparison.from_dict(content) == made
    assert PageDetails.from_dict(content["details"]) == shown


def test_nan_is_null_in_json() -> None:
    made = comparison((math.nan, 0.9, 0.9, 0.9), base_score=math.nan)
    text = json.dumps(made.to_dict(), allow_nan=False)
    again = Comparison.from_dict(json.loads(text))
    assert math.isnan(again.base_score)
    assert math.isnan(again.rows[0].score)
    assert again.rows[1:] == made.rows[1:]


def test_every_record_is_frozen_and_typed() -> None:
    for record in (ComparisonRow, Comparison, Mistake, PageDetails):
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


def test_lower_is_better() -> None:
    rows = [row("lora", 1.25, 5.0), row("qlora", 1.20, 9.0)]
    assert recommend(rows, 300, higher_is_better=False, metric="loss") == ("qlora", "qlora scored best (1.2).")
    _, why = recommend(rows, 300, higher_is_better=False, metric="loss", base_score=1.0)
    assert "clearly worse than the base" in why


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
    ],
)
def test_edge_cases_are_drawn(made: Comparison, tmp_path: Path) -> None:
    report.write(made, details(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.html", "compare.json", "compare.png"]


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


def test_page_does_not_say_take_when_fine_tuning_hurts(tmp_path: Path) -> None:
    html = rendered(comparison(base_score=0.99), details(), tmp_path)
    assert "<h1>No technique reaches the base without fine-tuning</h1>" in html


def test_page_survives_broken_unicode_and_long_text(tmp_path: Path) -> None:
    html = rendered(comparison(), details(text="\ud800" + "long " * 1000), tmp_path)
    assert html.count("long ") < 200


def test_same_input_same_bytes(tmp_path: Path) -> None:
    first, second = (rendered(comparison(), details(), tmp_path) for _ in range(2))
    assert first == second
