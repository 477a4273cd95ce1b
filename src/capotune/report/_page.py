"""The page: one HTML file that loads nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from capotune.evaluation.metrics import metric
from capotune.files import human_bytes, write_atomic
from capotune.report._data_view import bins, facts, samples, value_text
from capotune.report._plot import footnote, svg, unit
from capotune.report._records import Comparison, ComparisonRow, Interval, PageDetails
from capotune.report._rule import has_interval, interval, interval_name, scored
from capotune.report._section_views import section_views
from capotune.report._sentences import finding, hurts, loses, row_of
from capotune.text import listed, memory_text, seconds_text, share_text, words


def page(comparison: Comparison, details: PageDetails, path: str | Path) -> None:
    """Write the comparison as one HTML file that loads nothing: no script, no font, no request.

    All text from data and models is escaped, and the page's own content policy forbids scripts and loads.
    """
    html = _template().render(_view(comparison, details))
    write_atomic(path, html.encode("utf-8", "xmlcharrefreplace"))


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("capotune"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    filters: dict[str, Callable[..., str]] = {
        "bytes": human_bytes,
        "memory": memory_text,
        "duration": seconds_text,
        "share": lambda row: _keep_together(share_text(row.trainable_parameters, row.total_parameters)),
        "together": _keep_together,
        "setting": lambda value: value if isinstance(value, str) else json.dumps(value, default=str),
        "value": value_text,
        "words": words,
        "listed": listed,
        "breakable": _breakable,
    }
    environment.filters.update(filters)
    return environment.get_template("compare.html.j2")


def _view(comparison: Comparison, details: PageDetails) -> dict[str, Any]:
    """Everything that the template names."""
    return {
        "comparison": comparison,
        "details": details,
        "finding": finding(comparison),
        **_result_view(comparison),
        **_picture_view(comparison),
        "sections": section_views(details.sections, ["base", *(row.method for row in comparison.rows)]),
        "facts": facts(details.data),
        "bins": bins(details.data),
        "samples": samples(details.data),
        "seeds": sorted({str(values["seed"]) for values in details.settings.values() if "seed" in values}),
        "split": details.data.get("test_from"),
    }


def _result_view(comparison: Comparison) -> dict[str, Any]:
    """The two techniques to know, and the tables of results."""
    known = metric(comparison.metric)
    metrics = [known, *map(metric, comparison.further_metrics)]
    best, chosen = row_of(comparison, comparison.best), row_of(comparison, comparison.recommended)
    return {
        "metric": known,
        "best": best,
        "chosen": chosen,
        "take": chosen is not None and not hurts(comparison),
        "chosen_loses": chosen is not None and chosen.difference is not None and loses(chosen, comparison),
        "score": lambda value: _keep_together(known.text(value)),
        "named_score": lambda value: _keep_together(known.text_with_name(value)),
        "interval": lambda row: _interval_text(row, comparison),
        "difference": lambda value: _signed(known.difference_text(_number(value), _best_score(comparison))),
        "difference_interval": lambda ends: _difference_interval(ends, comparison),
        "tolerance": f"{comparison.tolerance:g}{' points' if known.is_percentage else ''}",
        "unpaired": [row.method for row in _with_interval(comparison) if not row.paired_rows],
        "fewer_rows": [row for row in _with_interval(comparison) if 0 < row.paired_rows < comparison.test_rows],
        "has_differences": bool(_with_interval(comparison)),
        "has_interval": has_interval(comparison),
        "interval_name": interval_name(comparison),
        "metrics": metrics,
        "row_scores": [
            (row, _score_texts(metrics, row.scores | {known.name: row.score})) for row in comparison.rows
        ],
        "base_scores": _score_texts(metrics, comparison.base_scores | {known.name: comparison.base_score}),
    }  # fmt: skip


def _picture_view(comparison: Comparison) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "wide_picture": Markup(svg(comparison, "wide", (8.0, 4.4))),  # matplotlib escapes its text
        "narrow_picture": Markup(svg(comparison, "narrow", (4.4, 4.4))),
        "footnote": footnote(comparison),
        "picture_text": _picture_text(comparison),
    }


def _with_interval(comparison: Comparison) -> list[ComparisonRow]:
    return [row for row in comparison.rows if row.difference_interval is not None]


def _score_texts(metrics: list[Any], scores: Mapping[str, float]) -> list[str]:
    return [_keep_together(one.text(scores.get(one.name, math.nan))) for one in metrics]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _best_score(comparison: Comparison) -> float:
    best = row_of(comparison, comparison.best)
    return comparison.base_score if best is None else best.score


def _difference_interval(ends: Interval | None, comparison: Comparison) -> str:
    """``−8.1 to +0.9`` in points."""
    if ends is None:
        return ""
    known, beside = metric(comparison.metric), _best_score(comparison)
    return " to ".join(_signed(known.difference_text(end, beside)) for end in ends)


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _keep_together(text: str) -> str:
    """No line break between a number and its percent sign."""
    return text.replace(" %", "\u00a0%")


def _breakable(label: str) -> str:
    """A label that may break after its underscores, not inside its words."""
    from markupsafe import Markup, escape

    return escape(label).replace("_", Markup("_<wbr>"))


def _interval_text(row: ComparisonRow, comparison: Comparison) -> str:
    ends = interval(row, comparison.test_rows, comparison.metric)
    low, high = (metric(comparison.metric).text(end) for end in ends)
    return _keep_together(f"{low.removesuffix(' %')} to {high}")


def _picture_text(comparison: Comparison) -> str:
    """The picture in words, for those who cannot see it."""
    known = metric(comparison.metric)
    parts = [
        f"{row.method} {known.text(row.score)} after {seconds_text(row.train_seconds)}" for row in scored(comparison)
    ]
    base = f"{comparison.base_label} {known.text(comparison.base_score)}"
    return f"{unit(comparison)} against training time: {'; '.join([*parts, base])}."
