"""The picture: score against training time."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from capotune.evaluation.metrics import metric
from capotune.files import write_atomic
from capotune.report._records import Comparison, ComparisonRow
from capotune.report._rule import has_interval, interval, interval_name, scored
from capotune.report._sentences import finding

_PAPER, _INK, _MUTED, _RULE, _ACCENT = "#ffffff", "#22262b", "#667079", "#d9dde1", "#a8480f"
_FARTHEST_BASE = 5  # times the techniques' own spread
_CSS_NAMES = {_PAPER: "paper", _INK: "ink", _MUTED: "muted", _RULE: "rule", _ACCENT: "accent"}


def plot(comparison: Comparison, path: str | Path) -> None:
    """Draw score against training time as a PNG of 1600 pixels' width.

    A point per technique; its bar is the 95 % interval of its difference from the best, placed so that it reaches the
    best's line where the technique is not shown to be worse. The point's area grows with peak memory, the recommended
    one has the one colour, and names stand beside the points, so nothing depends on telling colours apart.
    """
    write_atomic(path, _draw(comparison, "png", inches=(8.0, 4.8), titled=True))


def svg(comparison: Comparison, name: str, inches: tuple[float, float]) -> str:
    """The same picture for the page, which has title and footnote itself, in the page's own colours and font.

    ``name`` keeps its element ids apart from those of another picture on the same page.
    """
    image = _draw(comparison, "svg", inches, titled=False).decode()
    image = image[image.index("<svg") :]
    image = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", image, flags=re.DOTALL)
    image = re.sub(r' xmlns(:xlink)?="[^"]*"', "", image)
    image = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", image)
    image = re.sub(r' (width|height)="[\d.]+pt"', "", image, count=2)
    image = re.sub(r"(font(?:-family)?:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--sans)", image)
    for colour, variable in _CSS_NAMES.items():
        image = image.replace(colour, f"var(--{variable})")
    return image.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def _draw(comparison: Comparison, kind: str, inches: tuple[float, float], titled: bool) -> bytes:
    """The picture as PNG or SVG bytes; matplotlib's object API, so that no figure of the caller is touched."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "capotune", "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, dpi=200)
        FigureCanvasAgg(figure)
        left, bottom, top = (0.1, *_draw_title(figure, comparison)) if titled else (0.0, 0.6, 0.35)
        axes = _axes_inches(figure, left + 0.45, 0.3, bottom, top)
        figure.text(left / inches[0], 1 - (top - 0.15) / inches[1], unit(comparison), color=_INK, fontsize=10.5)
        _draw_axes(axes, comparison)
        points = _draw_points(axes, comparison)
        _label(axes, comparison, points + _draw_base(axes, comparison, points))
        buffer = BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, metadata=metadata, transparent=kind == "svg")
    return buffer.getvalue()


def _draw_title(figure: Any, comparison: Comparison) -> tuple[float, float]:
    """The finding above and the footnote below; returns the inches that the plot leaves free below and above."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(finding(comparison), 66, break_on_hyphens=False)
    title = {"fontsize": 13, "fontweight": "bold", "va": "top", "linespacing": 1.3}
    figure.text(0.1 / width, 1 - 0.15 / height, "\n".join(lines), color=_INK, **title)
    notes = textwrap.wrap(footnote(comparison), 118, break_on_hyphens=False)
    figure.text(0.1 / width, 0.15 / height, "\n".join(notes), color=_MUTED, fontsize=9, linespacing=1.3)
    return 0.84 + 0.16 * len(notes), 0.55 + 0.3 * len(lines)


def _axes_inches(figure: Any, left: float, right: float, bottom: float, top: float) -> Any:
    """Axes with fixed inches around them, whatever the size of the figure."""
    width, height = figure.get_size_inches()
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    return figure.add_axes(box)


def _draw_axes(axes: Any, comparison: Comparison) -> None:
    """Limits that leave space for labels, quiet lines, round numbers of seconds."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    seconds = [_log_seconds(row) for row in scored(comparison)] or [1.0]
    span = max(max(seconds) / min(seconds), 4)
    axes.set_xscale("log")
    axes.set_xlim(min(seconds) / span**0.18, max(seconds) * span**0.24)
    axes.set_ylim(*_heights(comparison))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1,), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.tick_params(which="both", length=0, labelcolor=_MUTED, labelsize=10)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.set_xlabel("training time (seconds, log scale)", color=_INK, fontsize=10.5)


def _heights(comparison: Comparison) -> tuple[float, float]:
    """The score axis: every interval and the base, if it is in view, and a margin."""
    ends = _bar_ends(comparison) + ([comparison.base_score] if _base_in_view(comparison) else [])
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return _height(low - margin, comparison), _height(high + margin, comparison)


def _bar_ends(comparison: Comparison) -> list[float]:
    return [end for row in scored(comparison) for end in _bar(row, comparison)]


def _base_in_view(comparison: Comparison) -> bool:
    """Not where a far-off base would leave the techniques, which are what is compared, a sixth of the picture."""
    if len(scored(comparison)) < 2 or not math.isfinite(comparison.base_score):
        return math.isfinite(comparison.base_score)
    ends = _bar_ends(comparison)
    low, high = min(ends), max(ends)
    return max(low - comparison.base_score, comparison.base_score - high) <= _FARTHEST_BASE * (high - low)


def _height(score: float, comparison: Comparison) -> float:
    return metric(comparison.metric).points(score)


def _log_seconds(row: ComparisonRow) -> float:
    return max(row.train_seconds, 0.001)


def _draw_points(axes: Any, comparison: Comparison) -> list[Any]:
    """Points and intervals; returns the boxes that they take, for labels to keep clear of."""
    from matplotlib.transforms import Bbox

    boxes = []
    most = max((row.peak_memory_bytes for row in comparison.rows), default=0) or 1
    for row in scored(comparison):
        colour, layer = (_ACCENT, 3.5) if row.method == comparison.recommended else (_INK, 3)
        x, y = _log_seconds(row), _height(row.score, comparison)
        area = 40 + 140 * row.peak_memory_bytes / most
        axes.scatter([x], [y], s=area, color=colour, zorder=layer, linewidths=0)
        ends = _bar(row, comparison)
        low, high = (_height(end, comparison) for end in ends)
        if row.method == comparison.best and shows_differences(comparison):
            axes.axhline(y, color=colour, linewidth=0.8, zorder=1.2)
        axes.plot([x, x], [low, high], color=colour, linewidth=1.6, zorder=layer - 1, solid_capstyle="butt")
        (left, bottom), (_, top) = axes.transData.transform([(x, low), (x, high)])
        centre = axes.transData.transform((x, y))
        radius = math.sqrt(area / math.pi) * axes.figure.dpi / 72
        boxes += [Bbox([centre - radius, centre + radius]), Bbox([[left - 4, bottom], [left + 4, top]])]
    return boxes


def _draw_base(axes: Any, comparison: Comparison, taken: list[Any]) -> list[Any]:
    """The base as a dashed line with its name where it covers least; returns the boxes that they take."""
    from matplotlib.transforms import Bbox

    if not _base_in_view(comparison):
        return _point_to_base(axes, comparison)
    height = _height(comparison.base_score, comparison)
    axes.axhline(height, color=_MUTED, linewidth=1.3, linestyle=(0, (5, 4)), zorder=1)
    text = axes.annotate(
        _base_name(comparison), (0, height), (0, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=9.5, color=_MUTED, bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 1},
    )  # fmt: skip
    frame = axes.get_window_extent()

    def hidden(place: tuple[float, int]) -> float:
        return _covered(_beside_line(text, height, *place), taken, frame)

    _beside_line(text, height, *min(((1, 4), (0, 4), (1, -4), (0, -4)), key=hidden))
    level = axes.transData.transform((1, height))[1]
    return [text.get_window_extent(), Bbox([[frame.x0, level - 3], [frame.x1, level + 3]])]


def _beside_line(text: Any, height: float, end: float, offset: int) -> Any:
    """Put the base's name at the left (0) or right (1) end of its line, above or below; returns the box it takes."""
    text.xy = 0.005 + 0.99 * end, height
    text.set(position=(0, offset), ha="right" if end else "left", va="bottom" if offset > 0 else "top")
    return text.get_window_extent()


def _point_to_base(axes: Any, comparison: Comparison) -> list[Any]:
    """The name of a base that is out of view, at the edge behind which it lies."""
    if not math.isfinite(comparison.base_score):
        return []
    above = _height(comparison.base_score, comparison) > axes.get_ylim()[1]
    text = axes.text(
        0.995, 0.99 if above else 0.01, f"{'↑' if above else '↓'} {_base_name(comparison)}, outside this picture",
        transform=axes.transAxes, ha="right", va="top" if above else "bottom", fontsize=9.5, color=_MUTED,
    )  # fmt: skip
    return [text.get_window_extent()]


def _base_name(comparison: Comparison) -> str:
    return f"{comparison.base_label}: {metric(comparison.metric).text(comparison.base_score)}"


def _label(axes: Any, comparison: Comparison, taken: list[Any]) -> None:
    """Write each technique's name and score beside its point, at the first place that covers nothing."""
    frame = axes.get_window_extent()
    for row in sorted(scored(comparison), key=lambda row: row.method != comparison.recommended):
        recommended = row.method == comparison.recommended
        text = axes.annotate(
            f"{row.method} {metric(comparison.metric).text(row.score)}",
            (_log_seconds(row), _height(row.score, comparison)), (0, 0), textcoords="offset points",
            color=_ACCENT if recommended else _INK, fontweight="bold" if recommended else "normal", zorder=4,
            bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
        places = list(_places(axes, comparison, row))
        best = min(places, key=lambda place: _covered(_move(text, place), taken, frame))
        taken.append(_move(text, best))
        if places.index(best) >= 4:
            leader = {"arrowstyle": "-", "color": _MUTED, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", text.xy, best[:2], textcoords="offset points", arrowprops=leader, zorder=1.5)


def _places(axes: Any, comparison: Comparison, row: ComparisonRow) -> Iterator[tuple[float, float, str, str]]:
    """Where a label may stand: offset in points from the point, and alignment; the most natural place first.

    The first four touch the point or the ends of its interval, the others need a line that leads to it.
    """
    ends = _bar(row, comparison)
    levels = [(1.0, _height(score, comparison)) for score in (*ends, row.score)]
    bottom, top, middle = axes.transData.transform(levels)[:, 1] * 72 / axes.figure.dpi
    yield 12, 0, "left", "center"
    yield -12, 0, "right", "center"
    for line in range(3):
        yield 0, max(top - middle, 8) + 4 + 15 * line, "center", "bottom"
        yield 0, min(bottom - middle, -8) - 4 - 15 * line, "center", "top"
    for line in (1, 2, 3):
        for y in (15 * line, -15 * line):
            yield 10, y, "left", "center"
            yield -10, y, "right", "center"


def _move(text: Any, place: tuple[float, float, str, str]) -> Any:
    """Put a label at a place; returns the box that it takes there."""
    x, y, horizontal, vertical = place
    text.set(position=(x, y), ha=horizontal, va=vertical)
    return text.get_window_extent().padded(5)


def _covered(box: Any, taken: list[Any], frame: Any) -> float:
    """How much a label at ``box`` would hide, in square pixels; outside the frame counts as hidden ten times over."""
    from matplotlib.transforms import Bbox

    def shared(other: Any) -> float:
        both = Bbox.intersection(box, other)
        return float(both.width * both.height) if both else 0.0

    return sum(shared(other) for other in taken) + 10 * (float(box.width * box.height) - shared(frame))


def unit(comparison: Comparison) -> str:
    """What the picture's height means."""
    known = metric(comparison.metric)
    percent = " (%)" if known.is_percentage else ""
    better = "" if comparison.higher_is_better else ", lower is better"
    return f"{known.words}{percent}{better}"


def footnote(comparison: Comparison) -> str:
    """How to read the picture."""
    model = comparison.model if len(comparison.model) <= 40 else f"…{comparison.model[-39:]}"
    parts = [f"{model}, {comparison.test_rows:,} test rows."]
    if shows_differences(comparison):
        parts.append(
            f"A bar is the 95 % interval of a technique's difference from {comparison.best}: where it reaches the line "
            f"of {comparison.best}, the technique is not shown to be worse."
        )
    elif has_interval(comparison):
        parts.append(f"Bars: 95 % {interval_name(comparison)}.")
    if any(row.peak_memory_bytes for row in comparison.rows):
        parts.append("Area of a point: peak memory.")
    return " ".join(parts)


def shows_differences(comparison: Comparison) -> bool:
    """Whether the bars are differences from the best; else they are each score's own interval."""
    return any(row.difference_interval is not None for row in scored(comparison))


def _bar(row: ComparisonRow, comparison: Comparison) -> tuple[float, float]:
    """From where to where a technique's bar reaches, as scores; the best has none beside differences from it."""
    if not shows_differences(comparison):
        return interval(row, comparison.test_rows, comparison.metric)
    if row.difference is None or row.difference_interval is None:
        return row.score, row.score
    low, high = (row.score - row.difference + end for end in row.difference_interval)
    if not (math.isfinite(low) and math.isfinite(high)):
        return row.score, row.score
    if metric(comparison.metric).is_percentage:
        low, high = max(low, 0.0), min(high, 1.0)
    return min(low, row.score), max(high, row.score)
