"""What the settings ask of labels: weights, a precision, a label for what is out of scope; which score fits them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from capotune.data.inspect.labels import IMBALANCE_WORTH_A_WORD
from capotune.data.wording import quoted, shorten
from capotune.errors import DataError, SettingError
from capotune.evaluation.abstaining import rows_needed
from capotune.settings import nearest

_FEWEST_IN_SCOPE, _FEWEST_OUT_OF_SCOPE = 2, 4


def label_weights(asked: str | Mapping[str, float] | None, names: Sequence[str], rows: Sequence[str]) -> list[float]:
    """A weight for each of ``names``, of mean 1 over the training ``rows``' labels, so that neither the learning rate
    nor λ means something else; empty where none is asked for.

    ``balanced``: rows / (labels · rows of the label), scikit-learn's rule (G. King and L. Zeng, "Logistic Regression in
    Rare Events Data", Political Analysis 9 (2001)). ``SettingError`` for a weight of a label that no row has.
    """
    if asked is None:
        return []
    counts = Counter(rows)
    if isinstance(asked, str):
        return [len(rows) / (len(names) * counts[name]) for name in names]
    unknown = next((name for name in asked if name not in counts), None)
    if unknown is not None:
        raise SettingError(
            f"no training row has that label.{nearest(unknown, names)}",
            setting="class_weights",
            given=f"{unknown} {asked[unknown]:g}",
            allowed=shorten(names),
        )
    weights = [asked.get(name, 1.0) for name in names]
    mean = sum(weight * counts[name] for name, weight in zip(names, weights, strict=True)) / len(rows)
    return [weight / mean for weight in weights]


def why_macro_f1(rows: Sequence[str]) -> str | None:
    """Why the score is macro F1 where the labels of the training ``rows`` are skewed; None where they are not."""
    counts = Counter(rows)
    (most, many), (least, few) = counts.most_common(1)[0], min(counts.items(), key=lambda one: one[1])
    if many < IMBALANCE_WORTH_A_WORD * few:
        return None
    return (
        f"The labels are skewed ({many:,} rows of {most}, {few:,} of {least}): macro F1 counts each label alike, where "
        "accuracy hardly shows the rare ones."
    )


def check_enough_held_out(precision: float, held: int) -> None:
    """``SettingError`` where no threshold could show that ``precision`` on so many held-out rows."""
    needed = rows_needed(precision)
    if needed > held:
        raise SettingError(
            f"that takes {needed:,} held-out rows at least, and {held:,} are held out.",
            setting="min_precision",
            given=f"{precision:g}",
            advice="Give more rows, a larger `validation_fraction` (500 rows are held out at most), or ask for less.",
        )


def check_scope(label: str, names: Sequence[str], where: str) -> None:
    """``DataError`` unless ``label`` is one of the training rows' and at least two others are in scope."""
    if label not in names:
        raise DataError(
            f"no training row has the label {quoted(label)}, which `out_of_scope` names.{nearest(label, names)}",
            where=where,
            advice=f"The labels are {shorten(names)}.",
        )
    if len(names) < _FEWEST_IN_SCOPE + 1:
        others = len(names) - 1
        raise DataError(
            f"beside {quoted(label)}, which `out_of_scope` names, there is {others} label; {_FEWEST_IN_SCOPE} at least "
            "are needed.",
            where=where,
            advice="Leave `out_of_scope` out: two labels are told apart as they are.",
        )


def check_enough_out_of_scope(label: str, held: int) -> None:
    """``SettingError`` where too few held-out rows have the out-of-scope ``label`` to choose anything by them."""
    if held < _FEWEST_OUT_OF_SCOPE:
        raise SettingError(
            f"of the rows with that label {held} are held out, and {_FEWEST_OUT_OF_SCOPE} are needed to choose by.",
            setting="out_of_scope",
            given=label,
            advice="Give more such rows, or a larger `validation_fraction`.",
        )
