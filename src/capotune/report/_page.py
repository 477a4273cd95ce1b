"""The page: one HTML file that loads nothing."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from capotune.evaluation.metrics import exact_match
from capotune.files import human_bytes, write_atomic
from capotune.report._plot import footnote, svg, unit
from capotune.report._records import Answers, Comparison, ComparisonRow, PageDetails
from capotune.report._rule import finding, has_interval, hurts, interval, interval_name, recommended_row, scored
from capotune.report._words import (
    PERCENTAGES,
    base_label,
    change_text,
    memory_text,
    score_text,
    seconds_text,
    share_text,
    words,
)

_DATA_NAMES = {
    "test_from": "test rows from",
    "p95": "95 % at most",
    "train_truncated": "cut in train",
    "test_truncated": "cut in test",
    "train_empty": "empty in train",
    "test_empty": "empty in test",
    "duplicates": "repeated in train",
    "conflicts": "in train with two labels",
    "leaked": "in both train and test",
    "described": "read as",
    "template_from": "chat template from",
    "loss_part": "what is in the loss",
    "train_sequences": "sequences to train on",
    "max_length": "tokens read at once",
    "sequence_tokens": "tokens to train on",
    "loss_tokens": "of them in the loss",
    "loss_share": "share in the loss",
    "train_without_loss": "nothing to train on",
    "test_without_loss": "nothing to score in test",
    "train_answers_cut": "answers cut in train",
    "test_answers_cut": "answers cut in test",
    "train_ends_cut": "end of text cut in train",
    "unanswered": "open at the end in train",
}
_DRAWN = {"bins", "samples"}  # parts of the data report that the page does not show as facts
_METRICS = {
    "accuracy": "the share of test rows whose label is the right one",
    "macro_f1": "the mean of every label's F1, each label counting alike",
    "exact_match": "the share of answers that are the expected one to the letter, blanks around it aside",
    "rouge_l": "how many words, in their order, an answer shares with the expected one: "
    "F1 of the longest common subsequence (Lin 2004), the mean of all answers",
    "loss": "mean cross-entropy of what all test rows hold to predict, in nats",
    "perplexity": "the exponential of the mean loss: as if the model wavered between so many tokens at each step",
}
_PEFT_METHODS = {"lora", "qlora", "prompt-tuning"}

_MATRIX_LABELS = 25
_LONGEST_TEXT = 600
_MOST_LINES = 16


@dataclass(frozen=True)
class _Answer:
    """One answer as the page shows it; ``exact``: it is the expected one."""

    by: str
    text: str
    exact: bool


def page(comparison: Comparison, details: PageDetails, path: str | Path) -> None:
    """Write the comparison as one HTML file that loads nothing: no script, no font, no request.

    All text from data and models is escaped, and the page's own content policy forbids scripts and loads.
    """
    html = _template().render(_view(comparison, details))
    write_atomic(path, html.encode("utf-8", "xmlcharrefreplace"))


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Callable[..., str]] = {
        "bytes": human_bytes,
        "memory": memory_text,
        "duration": seconds_text,
        "share": lambda row: _keep_together(share_text(row.trainable_parameters, row.total_parameters)),
        "together": _keep_together,
        "setting": lambda value: value if isinstance(value, str) else json.dumps(value, default=str),
        "value": _value,
        "words": words,
        "breakable": _breakable,
    }
    environment.filters.update(filters)
    return environment.from_string(package_files("capotune").joinpath("templates/compare.html.j2").read_text("utf-8"))


def _view(comparison: Comparison, details: PageDetails) -> dict[str, Any]:
    """Everything that the template names."""
    from markupsafe import Markup

    metric = comparison.metric
    metrics = [metric, *comparison.further_metrics]
    chosen = recommended_row(comparison)
    return {
        "comparison": comparison,
        "details": details,
        "chosen": chosen,
        "take": chosen is not None and not hurts(comparison),
        "finding": finding(comparison),
        "base_label": base_label(comparison.task),
        "score": lambda value: _keep_together(score_text(value, metric)),
        "change": lambda value: change_text(value, comparison.base_score, metric).replace("-", "−"),
        "interval": lambda row: _interval_text(row, comparison),
        "metrics": metrics,
        "row_scores": [(row, _score_texts(metrics, row.scores | {metric: row.score})) for row in comparison.rows],
        "base_scores": _score_texts(metrics, comparison.base_scores | {metric: comparison.base_score}),
        "is_percentage": metric in PERCENTAGES,
        "has_interval": has_interval(comparison),
        "interval_name": interval_name(comparison),
        "wide_picture": Markup(svg(comparison, "wide", (8.0, 4.4))),  # matplotlib escapes its text
        "narrow_picture": Markup(svg(comparison, "narrow", (4.4, 4.4))),
        "footnote": footnote(comparison),
        "picture_text": _picture_text(comparison),
        "matrix": _matrix(details) if 0 < len(details.labels) <= _MATRIX_LABELS else [],
        "pairs": _confused_pairs(details)[:15],
        "label_scores": _label_scores(details)[:10],
        "definitions": [(name, _METRICS[name]) for name in metrics if name in _METRICS],
        "answers": [_answered(answers, comparison) for answers in details.answers],
        "any_expected": any(answers.expected is not None for answers in details.answers),
        "mistakes": [(_shortened(mistake.text), mistake) for mistake in details.mistakes],
        "facts": [_fact(_data_name(name), value) for name, value in _facts(details.data).items()],
        "bins": details.data.get("bins", []),
        "most_in_bin": max((one["rows"] for one in details.data.get("bins", [])), default=0) or 1,
        "samples": details.data.get("samples", []),
        "seeds": sorted({str(values["seed"]) for values in details.settings.values() if "seed" in values}),
        "split": details.data.get("test_from"),
        "snippets": _snippets(comparison),
    }


def _score_texts(names: list[str], scores: Mapping[str, float]) -> list[str]:
    return [_keep_together(score_text(scores.get(name, math.nan), name)) for name in names]


def _keep_together(text: str) -> str:
    """No line break between a number and its percent sign."""
    return text.replace(" %", "\u00a0%")


def _breakable(label: str) -> str:
    """A label that may break after its underscores, not inside its words."""
    from markupsafe import Markup, escape

    return escape(label).replace("_", Markup("_<wbr>"))


def _interval_text(row: ComparisonRow, comparison: Comparison) -> str:
    low, high = (score_text(end, comparison.metric) for end in interval(row, comparison.test_rows, comparison.metric))
    return _keep_together(f"{low.removesuffix(' %')} to {high}")


def _picture_text(comparison: Comparison) -> str:
    """The plot in words, for those who cannot see it."""
    parts = [f"{row.method} {score_text(row.score, comparison.metric)} after {seconds_text(row.train_seconds)}"
             for row in scored(comparison)]  # fmt: skip
    base = f"{base_label(comparison.task)} {score_text(comparison.base_score, comparison.metric)}"
    return f"{unit(comparison)} against training time: {'; '.join([*parts, base])}."


def _shortened(text: str) -> str:
    """The text's start: what would fill a screen shows nothing more."""
    start = "\n".join(text.split("\n", _MOST_LINES)[:_MOST_LINES])[:_LONGEST_TEXT]
    return text if start == text else start.rstrip() + " …"


def _answered(answers: Answers, comparison: Comparison) -> dict[str, Any]:
    """A prompt and the answers to it as the page shows them: the expected one, the base's, the techniques'."""
    wanted = answers.expected
    given = [
        _Answer(name, _shortened(text), wanted is not None and exact_match(text, wanted))
        for name, text in answers.by.items()
    ]
    order = ["base", *(row.method for row in comparison.rows)]
    given.sort(key=lambda answer: order.index(answer.by) if answer.by in order else len(order))
    expected = [] if wanted is None else [_Answer("expected", _shortened(wanted), False)]
    return {"prompt": _shortened(answers.prompt), "answers": expected + given}


def _matrix(details: PageDetails) -> list[tuple[str, list[tuple[int, str, float]]]]:
    """Per true label its cells: count, kind (``right``, ``wrong``, ``none``) and its share of the largest mistake."""
    most = max([4, *(count for _, _, count, _ in _confused_pairs(details))])
    lines = []
    for i, (label, counts) in enumerate(zip(details.labels, details.confusion, strict=True)):
        kinds = ["none" if not n else "right" if i == j else "wrong" for j, n in enumerate(counts)]
        lines.append((label, [(n, kind, n / most) for n, kind in zip(counts, kinds, strict=True)]))
    return lines


def _confused_pairs(details: PageDetails) -> list[tuple[str, str, int, int]]:
    """True label, predicted label, how many rows, of how many; the most frequent first."""
    pairs = [
        (details.labels[i], details.labels[j], count, sum(counts))
        for i, counts in enumerate(details.confusion)
        for j, count in enumerate(counts)
        if count and i != j
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[2] / pair[3]))


def _label_scores(details: PageDetails) -> list[tuple[str, float, float, float, int]]:
    """Label, F1, precision, recall and test rows; the lowest F1 first. Labels without test rows have no F1."""
    scores = []
    for i, label in enumerate(details.labels):
        right, rows = details.confusion[i][i], sum(details.confusion[i])
        predicted = sum(counts[i] for counts in details.confusion)
        if rows:
            scores.append((label, 2 * right / (rows + predicted), right / (predicted or 1), right / rows, rows))
    return sorted(scores, key=lambda line: line[1])


def _facts(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data report without what the page draws; shares as percentages."""
    facts = {name: value for name, value in data.items() if name not in _DRAWN}
    return {name: f"{100 * value:.0f} %" if name.endswith("_share") else value for name, value in facts.items()}


def _fact(name: str, value: Any) -> tuple[str, str, Any]:
    """One line of the data report: its name, how to show it (``text``, ``list`` or ``table``), and what."""
    if not isinstance(value, (list, tuple)) or not value:
        return name, "text", _value(value)
    if all(isinstance(item, Mapping) and item.keys() == value[0].keys() for item in value):
        return name, "table", [dict.fromkeys(value[0]), *value]
    return name, "list", [_shortened(_value(item)) for item in value]


def _data_name(name: str) -> str:
    return _DATA_NAMES.get(name, words(name))


def _value(value: Any) -> str:
    """A setting or a fact as text."""
    if value is None or value in ([], (), {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping) and value.keys() == {"count", "first", "unit"}:
        return f"{value['count']:,} ({value['unit']}s {_value(value['first'])})" if value["count"] else "0"
    if isinstance(value, Mapping):
        return ", ".join(f"{_data_name(str(key))} {_value(item)}" for key, item in value.items())
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)


def _snippets(comparison: Comparison) -> list[tuple[str, str]]:
    """How to use the recommended adapter, and one in PEFT's format: heading and code."""
    chosen = recommended_row(comparison)
    if chosen is None:
        return []
    verb, text = ("predict", "your text") if comparison.task == "classification" else ("generate", "your prompt")
    snippets = [
        ("Command line", f'capo {verb} {shlex.quote(chosen.adapter)} "{text}"'),
        ("Python", f'import capotune\n\nmodel = capotune.load({json.dumps(chosen.adapter)})\nmodel.{verb}(["{text}"])'),
    ]
    in_peft = [row for row in (chosen, *scored(comparison)) if row.method in _PEFT_METHODS]
    return snippets + [(f"PEFT, for {row.method}", _peft_snippet(row, comparison)) for row in in_peft[:1]]


def _peft_snippet(row: ComparisonRow, comparison: Comparison) -> str:
    """The adapter on its base; without Capotune where others can load the base: not with a head, nor in 4 bits."""
    adapter = json.dumps(row.adapter)
    if comparison.task == "generation" and row.method != "qlora" and (model := _known_to_others(comparison.model)):
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
        base = f"AutoModelForCausalLM.from_pretrained({json.dumps(model)})"
    else:
        imports = "import capotune\nfrom peft import PeftModel"
        what = " with its pooling and a blank head" if comparison.task == "classification" else ""
        base = f"capotune.load_base({adapter})  # the frozen base{what}"
    return f"{imports}\n\nbase = {base}\nmodel = PeftModel.from_pretrained(base, {adapter})"


def _known_to_others(model: str) -> str:
    """A folder's whole path or a hub id; empty for a bare name, which may be that of an embedded model."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder.absolute())
    return model if "/" in model else ""
