"""What a comparison comes to in words."""

from __future__ import annotations

import math

from capotune.evaluation.metrics import Metric, decimals, metric
from capotune.evaluation.pairs import Difference
from capotune.report._records import Comparison, ComparisonRow, Interval
from capotune.text import listed, times_text


def why(comparison: Comparison, base_and_chosen: Difference | None) -> str:
    """Why this technique is recommended, in sentences with their numbers.

    ``base_and_chosen``: the base's score minus that of the recommended technique.
    """
    parts = _why_it(comparison), _beside_base(comparison, base_and_chosen), comparison.metric_why
    return " ".join(part for part in parts if part)


def why_none(comparison: Comparison) -> str:
    """Why no technique is recommended."""
    if all(math.isnan(row.score) or math.isinf(row.score) for row in comparison.rows):
        return "No technique finished with a score, so there is nothing to recommend."
    chance = metric(comparison.metric).text(comparison.chance)
    what = f" ({comparison.chance_words})" if comparison.chance_words else ""
    above = "above" if comparison.higher_is_better else "below"
    first = f"No technique scored {above} {chance}{what}, so there is nothing to recommend."
    return " ".join(part for part in (first, comparison.metric_why) if part)


def above_chance(comparison: Comparison) -> bool:
    """Whether some technique scored better than one that has learned nothing, as far as that is known."""
    scores = [row.score for row in comparison.rows if math.isfinite(row.score)]
    sign = 1 if comparison.higher_is_better else -1
    return math.isnan(comparison.chance) or any(sign * score > sign * comparison.chance for score in scores)


def finding(comparison: Comparison) -> str:
    """The result in one line, for the picture's title."""
    best, chosen = row_of(comparison, comparison.best), row_of(comparison, comparison.recommended)
    if chosen is None:
        is_finished = any(math.isfinite(row.score) for row in comparison.rows)
        return "No technique scored above chance" if is_finished else "No technique finished with a score"
    if hurts(comparison):
        return "No technique reaches the base without fine-tuning"
    if best is None or best.score == chosen.score:
        return f"{chosen.method} scores best: {metric(comparison.metric).text_with_name(chosen.score)}"
    if loses(chosen, comparison):
        return f"{chosen.method} scores worse than {best.method} within the tolerance and {saving(best, chosen)}"
    return f"{chosen.method} is not shown to be worse than {best.method} and {saving(best, chosen)}"


def hurts(comparison: Comparison) -> bool:
    """Whether the base is shown to be better than the best technique."""
    if comparison.base_difference is None:
        return False
    return shown_worse(comparison.base_difference, comparison.base_difference_interval, not comparison.higher_is_better)


def shown_worse(difference: float, interval: Interval | None, higher_is_better: bool) -> bool:
    """Whether a difference is a loss, and every value of its interval too."""
    low, high = interval or (difference, difference)
    return max(difference, high) < 0 if higher_is_better else min(difference, low) > 0


def loses(row: ComparisonRow, comparison: Comparison) -> bool:
    """Whether the technique is shown to be worse than the best."""
    assert row.difference is not None
    return shown_worse(row.difference, row.difference_interval, comparison.higher_is_better)


def row_of(comparison: Comparison, method: str) -> ComparisonRow | None:
    """The row of this method, if it has a score."""
    return next((row for row in comparison.rows if row.method == method and math.isfinite(row.score)), None)


def saving(costly: ComparisonRow, cheap: ComparisonRow) -> str:
    """What the cheap technique saves: ``trains 6 times faster``."""
    ratio = costly.train_seconds / max(cheap.train_seconds, 1e-9)
    if ratio >= 1.15:
        return f"trains {times_text(ratio)} times faster"
    return "has the smaller adapter" if ratio == 1 else "trains slightly faster"


def difference_in_words(difference: Difference, subject: str, other: str, score: float, name: str) -> str:
    """``lora scores 3.6 points less than qlora, between 0.9 points more and 8.1 less``."""
    known = metric(name)
    ends = [] if difference.interval is None else sorted(difference.interval, reverse=difference.value < 0)
    digits = _digits(known, difference.value, score)

    def amount(value: float, unit: str = "") -> str:
        return f"{abs(known.points(value)):,.{digits}f}{unit}"

    less, more = ("less", "more") if known.is_percentage else ("lower", "higher")
    unit = " points" if known.is_percentage else ""
    side = less if difference.value < 0 else more
    if known.is_percentage:
        first = f"{subject} scores {amount(difference.value, unit)} {side} than {other}"
    else:
        first = f"{subject}'s {known.words} is {amount(difference.value)} {side} than {other}'s"
    if not ends:
        return first
    near, far = ends
    if near * far >= 0:
        return f"{first}, between {amount(near)} and {amount(far, unit)} {side}"
    return f"{first}, between {amount(near, unit)} {more if side == less else less} and {amount(far)} {side}"


def _digits(known: Metric, difference: float, score: float) -> int:
    """Decimals of a difference in points: as exact as the score, and more where it would be nought."""
    points = abs(known.points(difference))
    digits = 1 if known.is_percentage else decimals(score)
    return digits if round(points, digits) or not points else max(digits, decimals(points, 1))


def _why_it(comparison: Comparison) -> str:
    """Why the recommended technique, and not the best."""
    best, chosen = row_of(comparison, comparison.best), row_of(comparison, comparison.recommended)
    assert best is not None
    assert chosen is not None
    assert chosen.difference is not None
    finished = [row for row in comparison.rows if math.isfinite(row.score)]
    score = metric(comparison.metric).text_with_name(best.score)
    if len(finished) == 1:
        return f"{best.method} is the only technique with a score ({score})."
    winners = [row.method for row in finished if row.score == best.score]
    first = f"{listed(winners)} scored best ({score})"
    if chosen is not best:
        found = Difference(chosen.difference, chosen.difference_interval)
        words = difference_in_words(found, chosen.method, best.method, best.score, comparison.metric)
        reason = "the cheapest that is not shown to be worse"
        if loses(chosen, comparison):
            unit = " points" if metric(comparison.metric).is_percentage else ""
            reason = f"the cheapest within the tolerance of {comparison.tolerance:g}{unit}"
        return f"{first}. {words}; it {saving(best, chosen)} and is {reason}."
    if all((row.train_seconds, row.adapter_bytes) >= (best.train_seconds, best.adapter_bytes) for row in finished):
        who = "it" if len(winners) == 1 else best.method
        return f"{first}; {who} is also the cheapest to train."
    return f"{first}; every cheaper technique is shown to be worse."


def _beside_base(comparison: Comparison, base_and_chosen: Difference | None) -> str:
    """What to say when the base does as well: nothing where a gain is shown."""
    if comparison.base_difference is None or base_and_chosen is None:
        return ""
    base = f"the base without fine-tuning ({metric(comparison.metric).text(comparison.base_score)})"
    if hurts(comparison):
        each = "It" if len(comparison.rows) == 1 else "Every technique"
        return f"{each} scored clearly worse than {base}: on this data fine-tuning does not help."
    if shown_worse(base_and_chosen.value, base_and_chosen.interval, comparison.higher_is_better):
        return ""
    chosen = comparison.recommended
    words = difference_in_words(
        base_and_chosen, "the base without fine-tuning", chosen, comparison.base_score, comparison.metric
    )
    return f"A gain is not shown: {words}."
