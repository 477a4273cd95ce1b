"""Shared by the tests of reports: comparisons of four techniques, and what their pages show."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from capotune import report
from capotune.api import comparison as comparison_module
from capotune.evaluation.metrics import metric
from capotune.evaluation.pairs import RowCounts
from capotune.report import Comparison, ComparisonRow, PageDetails, recommend
from capotune.sections import Answered, ConfusionMatrix, Fact, Part, Point, Quote, Quotes, Reliability, SideBySide
from capotune.tasks.classification import Classification
from capotune.tasks.generation import Generation

HOSTILE = """<script>alert("x")</script>' " & "><img src=http://evil.example/x onerror=alert(1)> {{ 7*7 }} </style>"""
METHODS = ("feature-extraction", "lora", "qlora", "prompt-tuning")

# Test prompts with every sort of answer: right, right but for blanks, wrong, none, preformatted.
ANSWERS = [
    Answered(
        "the squares below n",
        "[i**2 for i in range(n)]",
        {
            "prompt-tuning": "",
            "lora": "[i**2 for i in range(n)]",
            "base": "def squares(n):\n    return [i * i\n        for i in range(n)]",
            "qlora": " [i**2 for i in range(n)]\n",
        },
    ),
    Answered("عاصمة مصر؟", "القاهرة", {"base": "Cairo 🙂", "lora": "القاهرة", "qlora": "?", "prompt-tuning": "?"}),
]


def row(method: str, score: float, seconds: float, adapter_bytes: int = 1_000_000) -> ComparisonRow:
    return ComparisonRow(
        method, score, 1_205_780, 22_713_216, adapter_bytes, seconds, 1_420_000_000, 5.0, f"{method}/adapter"
    )


def comparison(scores: tuple[float, ...] = (0.9325, 0.9412, 0.9386, 0.9162), **changes: Any) -> Comparison:
    """Four techniques on a classification task, compared by their scores' own intervals."""
    rows = tuple(map(row, METHODS, scores, (41.0, 252.0, 377.0, 602.0)))
    made = Comparison("minilm", "classification", "accuracy", True, 10_003, 3080, 0.8951, rows)
    made = replace(made, base_label=Classification.base_label)
    return replace(recommend(replace(made, **changes)), **changes)


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
    made = Comparison("smol/llm", "generation", metric, higher, 1200, 300, base[metric], rows, base_scores=base)
    made = replace(made, columns=Generation.further_columns(metric, base))
    return replace(recommend(replace(made, **changes)), **changes)


def right_rows(right: int, rows: int, first: int = 0) -> RowCounts:
    """Counts of accuracy: ``right`` rows from row ``first`` on are right, the others wrong."""
    correct = np.zeros(rows)
    correct[first : first + right] = 1
    return RowCounts.of(metric("accuracy"), np.stack([correct, np.ones(rows)], 1))


def page_details(sections: list[Any], **changes: Any) -> PageDetails:
    settings = {method: {"seed": 0, "learning_rate": 5e-4, "layers": None} for method in METHODS}
    data = {
        "test_from": "the column 'split'",
        "labels": [{"name": f"label_{number}", "train": 30, "test": 10} for number in range(3)],
        "train_tokens": {"min": 3, "median": 14},
        "leaked": {"count": 2, "first": [4, 12], "unit": "line"},
        "similar_labels": [],
    }
    made = PageDetails(settings, data, {"torch": "2.9.1"}, "capo compare --data f.csv", sections)
    return replace(made, **changes)


def details(labels: int = 3, text: str = "where is my parcel") -> PageDetails:
    """What the page of a classification shows; each label is once taken for the next one."""
    names = [f"label_{i}" for i in range(labels)]
    confusion = [[9 if i == j else int(j == (i + 1) % labels) for j in range(labels)] for i in range(labels)]
    facts = [Fact("labelled", names[0]), Fact("predicted", names[1], wrong=True), Fact("with", "98.7 %")]
    mistakes = Quotes("Its most confident mistakes", "Read these first.", [Quote([Part(text)], facts)])
    points = [Point(0.35, 0.25, 10), Point(0.875, 1.0, 9)]
    reliability = Reliability("What its probabilities are worth", "On the line as many are right as it says.", points)
    return page_details(
        [ConfusionMatrix("What lora confuses", names, confusion), mistakes, reliability],
        base_note=Classification.base_note,
        snippets=comparison_module._snippets(comparison(), ('"your text"',) * 2),
    )


def generation_details(answers: list[Answered] = ANSWERS, made: Comparison | None = None) -> PageDetails:
    """What the page of a generation task shows."""
    sections = [SideBySide("The same prompts, answered", "Test rows, not seen in training.", answers)]
    return page_details(sections, snippets=comparison_module._snippets(made or generation(), ('"your prompt"',) * 2))


def rendered(made: Comparison, shown: PageDetails, folder: Path) -> str:
    """The page's source."""
    path = folder / "compare.html"
    report.page(made, shown, path)
    return path.read_text("utf-8")


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
