"""The comparison in the terminal: it fits, cuts nothing, and shows every difference."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from report_helpers import comparison, generation, row
from rich.console import Console

from capotune.cli.comparison_table import comparison_table
from capotune.report import Comparison


@pytest.mark.parametrize("width", [80, 100])
def test_table_fits_and_cuts_nothing(width: int) -> None:
    output = io.StringIO()
    Console(file=output, width=width, no_color=True).print(comparison_table(comparison()))
    text = output.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for expected in (
        "* feature-extraction",
        "94.1 %",
        "best",
        "-0.9",
        "-2.1 to +0.3",
        "-4.6",
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
    Console(file=output, width=width, no_color=True).print(comparison_table(made))
    text = output.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return text


@pytest.mark.parametrize("width", [80, 100])
def test_table_of_generation_has_every_metric_and_the_bases_own(width: int) -> None:
    text = printed(generation("exact_match"), width)
    assert text.startswith("exact match on 300 test rows, 1,200 to train on; differences in points ")
    lines = [line.split() for line in text.splitlines()]
    assert ["technique", "score", "best", "interval", "(s)", "adapter", "memory"] in lines
    assert ["lora", "73.3", "%", "best", "388", "1.0", "MB", "1.4", "GB"] in lines
    assert ["technique", "trainable", "of", "base", "perplexity", "ROUGE-L"] in lines
    assert ["lora", "1,205,780", "5.3", "%", "12.3", "85.2", "%"] in lines
    assert ["base", "(not", "41.2", "21.4", "%"] in lines


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


def test_table_compares_the_base_with_the_best() -> None:
    lines = [line.split() for line in printed(generation()).splitlines()]
    assert ["base", "(not", "41.2", "+28.9"] in lines


def test_table_names_what_is_recommended_and_why() -> None:
    made = generation()
    assert " ".join(printed(made).split()).endswith(f"* {made.why}")


def test_table_shows_a_dash_for_a_metric_that_is_missing() -> None:
    rows = tuple(replace(one, scores={"loss": 2.51}) for one in generation("exact_match").rows)
    text = printed(generation("exact_match", rows=rows, base_scores={}, columns=("loss",)))
    assert "2.51" in text
    assert [line.split()[-1] for line in text.splitlines() if "base (not" in line][1] == "-"


def test_table_without_columns_shows_no_further_metric() -> None:
    rows = tuple(replace(one, scores={"macro_f1": 0.9, "loss": 0.3}) for one in comparison().rows)
    assert printed(comparison(rows=rows)) == printed(comparison())


def test_table_does_not_read_markup() -> None:
    output = io.StringIO()
    made = comparison(rows=(row("[red]x[/red]", 0.9, 1.0),))
    Console(file=output, width=100).print(comparison_table(made))
    assert "[red]x[/red]" in output.getvalue()
