"""The picture: it can be read, nothing covers anything, and its bars are the differences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import pytest
from matplotlib import image as matplotlib_image
from report_helpers import METHODS, comparison, details, generation, row

from capotune import report
from capotune.report import Comparison
from capotune.report._plot import _draw


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
        comparison(rows=(row("lora", 0.9, 0.0),)),
        comparison(rows=(row("lora", 3.2, 9.0),), metric="loss", higher_is_better=False, base_score=math.nan),
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


def bars(figure: Any) -> list[list[float]]:
    """From where to where each bar of the picture reaches."""
    return [list(line.get_ydata()) for line in figure.axes[0].lines if len(set(line.get_xdata())) == 1]


def test_a_bar_is_the_interval_of_the_difference_from_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generation()
    expected = [
        [12.3, 12.3] if one.difference_interval is None else [12.3 + end for end in one.difference_interval]
        for one in made.rows
    ]
    figure = _drawn(made, monkeypatch)
    assert bars(figure) == [pytest.approx(ends) for ends in expected]
    footnote = " ".join(text.get_text() for text in figure.texts)
    assert "where it reaches the line of lora, the technique" in " ".join(footnote.split())


def test_a_bar_of_a_share_ends_at_all_and_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = comparison((1.0, 0.95, 0.9, 0.1), test_rows=20)
    assert max(end for ends in bars(_drawn(made, monkeypatch)) for end in ends) == 100.0


def test_a_single_technique_has_a_bar_of_its_own_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generation(rows=generation().rows[1:2])
    figure = _drawn(made, monkeypatch)
    assert bars(figure) == [pytest.approx(made.rows[0].interval)]
    assert any("Bars: 95 % interval." in text.get_text() for text in figure.texts)


@pytest.mark.parametrize("seconds", [(4.7, 5.2, 6.6, 7.3), (5.2, 40.0, 66.0, 73.0), (4.0, 5.0, 6.0, 90.0)])
def test_the_bases_name_keeps_clear_of_points_and_intervals(
    seconds: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tuple(map(row, METHODS, (0.0, 1 / 30, 1 / 30, 0.0), seconds))
    made = comparison(rows=rows, base_score=0.0, test_rows=30)
    axes = _drawn(made, monkeypatch, (4.4, 4.4)).axes[0]
    (name,) = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("base")]
    drawn = [line.get_window_extent() for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert len(drawn) == 4
    assert not [bar for bar in drawn if name.overlaps(bar)]


@pytest.mark.parametrize(("base", "arrow"), [(812.0, "↑"), (-200.0, "↓"), (41.2, None)])
def test_a_far_base_does_not_press_the_techniques_together(
    base: float, arrow: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = _drawn(generation(base_score=base), monkeypatch).axes[0]
    low, high = axes.get_ylim()
    spread = max(12.3 + end for one in generation().rows for end in one.difference_interval or ()) - 12.0
    assert spread / (high - low) > 0.15
    outside = [text.get_text() for text in axes.texts if "outside this picture" in text.get_text()]
    assert bool(outside) == (arrow is not None) == (not low <= base <= high)
    assert arrow is None or outside[0].startswith(arrow)


def test_the_base_stays_in_view_beside_a_single_technique(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = _drawn(generation(rows=generation().rows[1:2], base_score=41.2), monkeypatch).axes[0]
    assert axes.get_ylim()[1] > 41.2


@pytest.mark.parametrize("ends", [(1.0, math.inf), (math.nan, 2.0)])
@pytest.mark.parametrize("differences", [True, False])
def test_interval_without_an_end_is_drawn_as_none(ends: tuple[float, float], differences: bool, tmp_path: Path) -> None:
    made = generation()
    worst = replace(made.rows[-1], interval=ends, difference_interval=ends if differences else None)
    report.plot(replace(made, rows=(*made.rows[:-1], worst)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
