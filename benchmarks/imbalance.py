"""Skewed labels: what class weights and a temperature do, with a head on frozen MiniLM.

``python benchmarks/imbalance.py [FEATURES.pt]`` needs what ``benchmarks/out_of_scope.py`` needs. Banking77's training
rows are drawn so that the most frequent of 77 labels has 75 times the rows of the rarest (150 and 2); the test rows are
balanced. Three draws. Writes ``benchmarks/results/imbalance.json``.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from out_of_scope import Part, all_features

from capotune.data.split import hold_out
from capotune.engine.linear_head import choose_regularization, solve
from capotune.evaluation.calibration import confidence_bins, expected_calibration_error, fit_temperature
from capotune.evaluation.metrics import classification_scores
from capotune.tasks.classification.asked import label_weights

OUT = Path(__file__).parent / "results" / "imbalance.json"
MOST, RATIO, DRAWS = 150, 100, 3


def drawn(labels: list[str], seed: int) -> list[int]:
    """Positions of rows whose number falls by the same factor from label to label, in an order drawn anew."""
    chooser, names = random.Random(seed), sorted({*labels})
    chooser.shuffle(names)
    found: list[int] = []
    for rank, name in enumerate(names):
        rows = [at for at, label in enumerate(labels) if label == name]
        count = max(2, round(MOST * RATIO ** (-rank / (len(names) - 1))))
        found += chooser.sample(rows, min(count, len(rows)))
    return found


def measured(data: dict[str, Part], seed: int, weights: str | None) -> dict[str, float]:
    """As a run of feature extraction does it."""
    (x, labels), (test_x, test_labels) = data["train"], data["test"]
    names = sorted({*labels})
    number = {name: at for at, name in enumerate(names)}
    rows = drawn(labels, seed)
    own = [labels[at] for at in rows]
    x, y, test_y = (
        x[rows],
        torch.tensor([number[one] for one in own]),
        torch.tensor([number[one] for one in test_labels]),
    )
    fit, held = map(torch.as_tensor, hold_out(y.tolist(), 0.1, seed))
    given = torch.tensor(label_weights(weights, names, own)) if weights else None
    first, strength = choose_regularization(x[fit], y[fit], x[held], y[held], len(names), label_weights=given)
    temperature = fit_temperature(first.logits(x[held]), y[held])
    logits = solve(x, y, len(names), strength, near=first, label_weights=given).logits(test_x)
    found = classification_scores(logits, test_y)
    errors = [expected_calibration_error(confidence_bins((logits / t).softmax(1), test_y)) for t in (1.0, temperature)]
    return {
        "rows": len(rows),
        "accuracy": found.accuracy,
        "macro_f1": found.macro_f1,
        "temperature": temperature,
        "calibration_error_before": errors[0],
        "calibration_error": errors[1],
    }


def main() -> None:
    """Every draw with and without weights, then the means."""
    torch.set_num_threads(1)
    data = all_features(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    found = {str(weights): [measured(data, seed, weights) for seed in range(DRAWS)] for weights in (None, "balanced")}
    means = {
        weights: {name: round(float(np.mean([one[name] for one in draws])), 4) for name in draws[0]}
        for weights, draws in found.items()
    }
    print(json.dumps(means, indent=1))
    OUT.write_text(json.dumps({"draws": found, "means": means}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
