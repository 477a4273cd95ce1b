"""The rule: the best score, and the cheapest technique that is not shown to be worse, with the numbers in words."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from report_helpers import METHODS, comparison, generation, right_rows, row

from capotune.evaluation.metrics import metric, wilson_interval
from capotune.evaluation.pairs import RowCounts
from capotune.report import Comparison, ComparisonRow, recommend


def judged(*rows: ComparisonRow, counts: dict[str, RowCounts] | None = None, base: RowCounts | None = None,
           **changes: Any) -> Comparison:  # fmt: skip
    made = Comparison("minilm", "classification", "accuracy", True, 1000, 300, math.nan, rows)
    return recommend(replace(made, **changes), counts, base)


def paired(first: RowCounts, second: RowCounts, **changes: Any) -> Comparison:
    """Feature extraction, which is cheap, beside LoRA, on the same rows."""
    known, counts = metric(first.metric), {"feature-extraction": first, "lora": second}
    scores = [known.score(one.counts) for one in counts.values()]
    rows = [row(name, score, seconds) for name, score, seconds in zip(counts, scores, (10.0, 100.0), strict=True)]
    return judged(
        *rows, counts=counts, metric=known.name, higher_is_better=known.higher_is_better,
        test_rows=len(first.counts), **changes,
    )  # fmt: skip


def losses(nats: np.ndarray, name: str = "loss") -> RowCounts:
    """Counts of rows with one token each."""
    return RowCounts.of(metric(name), np.stack([nats, np.ones(len(nats))], 1))


def test_rows_that_differ_one_way_show_what_the_scores_alone_do_not() -> None:
    """90 and 92 % right: every row that the first has right the second has too, or as few of them as can be."""
    nested = paired(right_rows(900, 1000), right_rows(920, 1000))
    assert nested.recommended == nested.best == "lora"
    assert nested.why == "lora scored best (92.0 %); every cheaper technique is shown to be worse."
    crossing = paired(right_rows(900, 1000), right_rows(920, 1000, first=80))
    assert (crossing.recommended, crossing.best) == ("feature-extraction", "lora")
    assert crossing.rows[0].difference == nested.rows[0].difference
    assert [one.paired_rows for one in crossing.rows] == [1000, 0]


def test_the_sentence_says_what_the_cheap_one_costs() -> None:
    made = paired(right_rows(239, 300), right_rows(250, 300, first=50))
    assert made.why == (
        "lora scored best (83.3 %). feature-extraction scores 3.7 points less than lora, between 3.2 points more and "
        "10.5 less; it trains 10 times faster and is the cheapest that is not shown to be worse."
    )


@pytest.mark.parametrize(("tolerance", "chosen"), [(0.0, "lora"), (2.9, "lora"), (3.0, "feature-extraction")])
def test_a_tolerance_lets_in_a_known_loss_of_at_most_so_many_points(tolerance: float, chosen: str) -> None:
    made = paired(right_rows(900, 1000), right_rows(930, 1000), tolerance=tolerance)
    assert made.recommended == chosen
    if tolerance == 3.0:
        assert made.why.endswith(
            "feature-extraction scores 3.0 points less than lora, between 1.9 and 4.1 points less; it trains 10 times "
            "faster and is the cheapest within the tolerance of 3 points."
        )


def test_a_tolerance_is_of_the_difference_itself_not_of_its_interval() -> None:
    made = paired(right_rows(900, 1000), right_rows(930, 1000), tolerance=2.0)
    assert max(made.rows[0].difference_interval or ()) > -0.02  # the loss may be less than the tolerance
    assert made.recommended == "lora"


def test_a_tolerance_of_a_plain_metric_is_in_its_own_unit() -> None:
    generator = np.random.default_rng(0)
    nats = generator.gamma(2.0, 1.0, 200)
    first, second = losses(nats + 0.2, "perplexity"), losses(nats, "perplexity")
    assert paired(first, second).recommended == "lora"
    made = paired(first, second, tolerance=5.0)
    assert made.recommended == "feature-extraction"
    assert made.why.endswith("is the cheapest within the tolerance of 5.")


def test_a_lower_loss_is_better() -> None:
    generator = np.random.default_rng(0)
    nats = generator.gamma(2.0, 1.0, 200)
    noise = generator.normal(0, 0.3, 200)
    made = paired(losses(nats + noise + 0.01), losses(nats))
    assert made.recommended == "feature-extraction"
    low, high = made.rows[0].difference_interval or (0.0, 0.0)
    assert low < 0 < (made.rows[0].difference or 0) < high
    assert "feature-extraction's loss is" in made.why
    assert "higher than lora's, between" in made.why
    assert paired(losses(nats + 0.01), losses(nats)).recommended == "lora"


def test_rows_that_are_all_equal_leave_the_cheapest() -> None:
    made = paired(right_rows(250, 300), right_rows(250, 300))
    assert made.recommended == made.best == "feature-extraction"
    assert (
        made.why
        == "feature-extraction and lora scored best (83.3 %); feature-extraction is also the cheapest to train."
    )
    low, high = made.rows[1].difference_interval or (0.0, 0.0)
    assert -0.02 < low < 0 < high < 0.02


def test_one_test_row_shows_nothing() -> None:
    made = paired(right_rows(0, 1), right_rows(1, 1))
    assert (made.best, made.recommended) == ("lora", "feature-extraction")
    low, high = made.rows[0].difference_interval or (0.0, 0.0)
    assert low < -0.9
    assert high > 0


def test_a_technique_that_answered_fewer_rows_is_compared_on_those() -> None:
    fewer = right_rows(250, 300)
    fewer = RowCounts(fewer.metric, fewer.columns, fewer.counts[:200], fewer.positions[:200])
    made = paired(fewer, right_rows(260, 300))
    assert made.rows[1].paired_rows + made.rows[0].paired_rows == 200
    assert made.rows[1].difference == 0.0  # both have all of the 200 right


def test_rows_that_cannot_be_matched_are_compared_by_their_own_intervals() -> None:
    made = paired(right_rows(900, 1000), right_rows(930, 1000))
    other = recommend(made, {"lora": right_rows(930, 1000)})
    assert other.rows[0].paired_rows == 0
    assert other.rows[0].difference == made.rows[0].difference
    width = [np.ptp(one.rows[0].difference_interval or (0.0, 0.0)) for one in (made, other)]
    assert width[1] > 1.5 * width[0]


def test_the_unpaired_difference_is_newcombes() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table II, method 10: 56/70 - 48/80."""
    rows = [replace(row("lora", 56 / 70, 2.0), interval=wilson_interval(56 / 70, 70)),
            replace(row("qlora", 48 / 80, 1.0), interval=wilson_interval(48 / 80, 80))]  # fmt: skip
    made = judged(*rows)
    assert made.rows[1].difference_interval == pytest.approx((-0.3339, -0.0524), abs=6e-5)


def test_unpaired_without_an_interval_only_an_equal_score_is_not_worse() -> None:
    rows = [row("lora", 1.25, 5.0), row("qlora", 1.20, 9.0)]
    made = judged(*rows, metric="loss", higher_is_better=False)
    assert (made.recommended, made.why) == (
        "qlora",
        "qlora scored best (loss 1.20); every cheaper technique is shown to be worse.",
    )
    assert made.rows[0].difference_interval is None


def test_unpaired_the_cheapest_is_recommended_with_its_cost() -> None:
    made = comparison()
    assert made.recommended == "feature-extraction"
    assert made.why == (
        "lora scored best (94.1 %). feature-extraction scores 0.9 points less than lora, between 0.3 points more and "
        "2.1 less; it trains 6 times faster and is the cheapest that is not shown to be worse."
    )


def test_unpaired_perplexity_in_words() -> None:
    assert generation().why == (
        "lora scored best (perplexity 12.3). feature-extraction's perplexity is 0.4 higher than lora's, between 0.4 "
        "lower and 1.2 higher; it trains 4 times faster and is the cheapest that is not shown to be worse."
    )


def test_more_test_rows_tell_more_apart() -> None:
    rows = [row("feature-extraction", 0.92, 10.0), row("lora", 0.94, 100.0)]
    assert judged(*rows, test_rows=300).recommended == "feature-extraction"
    assert judged(*rows, test_rows=3000).recommended == "lora"


def test_equal_scores_and_times_go_to_the_smaller_adapter() -> None:
    made = judged(row("lora", 0.9, 10.0, adapter_bytes=200), row("qlora", 0.9, 10.0, adapter_bytes=100))
    assert made.recommended == made.best == "qlora"
    assert made.why == "lora and qlora scored best (90.0 %); qlora is also the cheapest to train."


def test_the_best_may_be_the_cheapest() -> None:
    made = judged(row("lora", 0.95, 5.0), row("qlora", 0.9, 10.0))
    assert (made.recommended, made.why) == ("lora", "lora scored best (95.0 %); it is also the cheapest to train.")


def test_one_technique() -> None:
    made = judged(row("lora", 0.9, 5.0))
    assert (made.recommended, made.best) == ("lora", "lora")
    assert made.why == "lora is the only technique with a score (90.0 %)."


@pytest.mark.parametrize("rows", [[], [row("lora", math.nan, 1.0)]])
def test_no_technique_finished(rows: list[ComparisonRow]) -> None:
    made = judged(*rows)
    assert (made.recommended, made.best) == ("", "")
    assert made.why == "No technique finished with a score, so there is nothing to recommend."


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_technique_without_a_finite_score_is_passed_over(score: float) -> None:
    made = judged(row("qlora", score, 1.0), row("lora", 12.0, 5.0), metric="perplexity", higher_is_better=False)
    assert made.recommended == "lora"
    assert made.rows[0].difference is None


def test_counts_that_are_not_finite_are_not_paired() -> None:
    nats = np.ones(20)
    made = paired(losses(nats + 1), losses(nats))
    broken = losses(np.where(np.arange(20) == 3, np.inf, nats))
    assert recommend(made, {"feature-extraction": losses(nats + 1), "lora": broken}).rows[0].paired_rows == 0


# --- the base ---------------------------------------------------------------------------------------------------------


def test_the_base_is_clearly_better() -> None:
    made = judged(row("lora", 0.80, 5.0), row("qlora", 0.79, 3.0), base_score=0.9)
    assert made.recommended == "qlora"
    assert made.why.endswith(
        "Every technique scored clearly worse than the base without fine-tuning (90.0 %): "
        "on this data fine-tuning does not help."
    )


def test_the_base_is_compared_on_the_same_rows() -> None:
    counts = {"lora": right_rows(280, 300)}
    crossing, nested = (right_rows(270, 300, first) for first in (30, 0))
    lora = row("lora", 280 / 300, 5.0)
    unsure = judged(lora, counts=counts, base=crossing, base_score=0.9)
    assert unsure.why.endswith(
        "A gain is not shown: the base without fine-tuning scores 3.3 points less than lora, between 1.4 points more "
        "and 8.0 less."
    )
    assert "gain" not in judged(lora, counts=counts, base=nested, base_score=0.9).why


def test_a_gain_of_the_best_is_not_one_of_the_cheapest() -> None:
    scores = {"feature-extraction": right_rows(240, 300), "lora": right_rows(252, 300, first=48)}
    rows = [row("feature-extraction", 0.8, 5.0), row("lora", 0.84, 50.0)]
    made = judged(*rows, counts=scores, base=right_rows(228, 300, first=48), base_score=0.76)
    assert (made.best, made.recommended) == ("lora", "feature-extraction")
    assert max(made.base_difference_interval or ()) < 0  # the best's gain is shown
    assert (
        "A gain is not shown: the base without fine-tuning scores 4.0 points less than feature-extraction" in made.why
    )


def test_a_base_that_is_clearly_worse_is_not_spoken_of() -> None:
    assert "base" not in judged(row("lora", 0.90, 5.0), base_score=0.5).why


def test_the_base_beside_a_score_that_is_better_when_lower() -> None:
    assert generation(base_score=11.69).why.endswith(
        "Every technique scored clearly worse than the base without fine-tuning (11.7): "
        "on this data fine-tuning does not help."
    )
    assert generation(base_score=12.4).why.endswith(
        "A gain is not shown: the base without fine-tuning's perplexity is 0.3 lower than feature-extraction's, "
        "between 0.3 higher and 0.9 lower."
    )
    assert "base" not in generation(base_score=13.4).why


def test_methods_keep_their_order() -> None:
    assert [one.method for one in comparison().rows] == list(METHODS)
