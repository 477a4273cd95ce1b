"""Telling texts that belong to none of the labels: a head that also looks how near a text is to what it knows.

A linear head is sure of itself far from all training rows as well, and rows that show what is out of scope show a part
of it only. Two things together tell more than either (``benchmarks/out_of_scope.py``): how probable the best label is
(D. Hendrycks and K. Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017), and
how near the nearest known text is (Y. Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML
2022). With z the logits, p their softmax, x the text's vector and n the known ones, both of length 1:

    s = a·(−ln max p(label in scope)) + b·(−max cos(x, n)) + c,     P(out of scope) = 1 / (1 + e^−s)

a and b are found by logistic regression on held-out rows, c so that in-scope accuracy and out-of-scope recall count
alike on them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from capotune.tasks.text_targets.task import TrainedRows

CENTRES = 8
"""Of each label's training rows, that are stored as what is known."""
_MOST_ROWS = 64  # of a label, that its centres are made of


class ScopedHead(nn.Module):
    """A linear head whose logit at ``outside`` is the logarithm of the odds that a text is out of scope, put on the
    scale of the others: softmax gives the probability of the module's docstring.

    Args:
        linear: the head as it was trained, with an output for what is out of scope as well.
        outside: that output's position.
        known: how many vectors are stored.
        hidden: their width; they are the last ``hidden`` features of a text.
    """

    def __init__(self, linear: nn.Linear, outside: int, known: int, hidden: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.outside = outside
        self.known = nn.Parameter(self.weight.new_zeros(known, hidden))
        self.scope = nn.Parameter(self.weight.new_zeros(3))
        """a, b and c."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(rows, features) → logits (rows, labels)."""
        return self.scoped(functional.linear(features, self.weight, self.bias), features)

    def scoped(self, logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The same, from the ``logits`` of the linear head."""
        inside = self._inside(logits)
        log_odds = self.signs(logits, features) @ self.scope[:2] + self.scope[2]
        outside = (inside.logsumexp(1) + log_odds)[:, None]
        return torch.cat([inside[:, : self.outside], outside, inside[:, self.outside :]], 1)

    def signs(self, logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(rows, 2): −ln of the best in-scope label's probability by the linear head, −cosine of the nearest."""
        unsure = logits.logsumexp(1) - self._inside(logits).amax(1)
        vectors = functional.normalize(features[:, -self.known.shape[1] :], dim=1)
        return torch.stack([unsure, -(vectors @ self.known.t()).amax(1)], 1)

    @torch.no_grad()
    def fit(self, logits: torch.Tensor, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Choose a, b and c on rows that nothing was fitted to; some are out of scope, some are not.

        Shapes: logits of the linear head (rows, labels), features (rows, features), targets (rows,).
        """
        from sklearn.linear_model import LogisticRegression

        signs, is_out = self.signs(logits, features).double(), targets == self.outside
        mean, std = signs.mean(0), signs.std(0).clamp_min(1e-9)
        model = LogisticRegression(class_weight="balanced", solver="newton-cholesky").fit(
            ((signs - mean) / std).numpy(), is_out.numpy()
        )
        slopes = torch.from_numpy(model.coef_[0]) / std
        log_odds = signs @ slopes + float(model.intercept_[0]) - mean @ slopes
        inside = self._inside(logits)
        margin = log_odds + inside.logsumexp(1) - inside.amax(1)  # above 0 the text is taken to be out of scope
        right = logits.index_fill(1, torch.tensor([self.outside]), -torch.inf).argmax(1) == targets
        offset = float(model.intercept_[0]) - float(mean @ slopes) - _best_cut(margin, is_out, right)
        self.scope.copy_(torch.tensor([*slopes.tolist(), offset]))

    def _inside(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits[:, : self.outside], logits[:, self.outside + 1 :]], 1)


def _best_cut(margin: torch.Tensor, is_out: torch.Tensor, right: torch.Tensor) -> float:
    """The margin above which rows are best taken to be out of scope: in-scope accuracy plus out-of-scope recall is
    largest; where that is so over a stretch, its middle. ``right``: whether the best in-scope label is the row's."""
    order = margin.argsort(descending=True)
    found = is_out[order].double() / is_out.sum()
    lost = (right & ~is_out)[order].double() / (~is_out).sum()
    gain = torch.cat([torch.zeros(1), (found - lost).cumsum(0)])  # of taking the first 0, 1, … rows to be out of scope
    ends = torch.cat([margin[order][:1] + 1, margin[order], margin[order][-1:] - 1])
    best = int((gain >= gain.max() - 1e-12).nonzero()[0, 0])
    return float(ends[best] + ends[best + 1]) / 2


def scoped(
    linear: nn.Linear, outside: int, hidden: int, rows: TrainedRows, logits: torch.Tensor
) -> tuple[ScopedHead, torch.Tensor]:
    """The head that tells what is out of scope, and its logits of the held-out rows.

    Args:
        linear: the trained head.
        outside: the position of its output for what is out of scope.
        hidden: width of a text's vector.
        rows: the training rows.
        logits: (held-out rows, labels) by a linear head that was not fitted to them.
    """
    chosen = _rows_to_know(rows.targets, rows.fit, outside)
    known = _centres(rows.features(chosen)[:, -hidden:], rows.targets[chosen])
    head = ScopedHead(linear, outside, len(known), hidden)
    head.known.data.copy_(known)
    features = rows.features(rows.held)
    on_cpu = copy.deepcopy(head).cpu()
    on_cpu.fit(logits, features, rows.targets[rows.held])
    head.scope.data.copy_(on_cpu.scope)
    with torch.no_grad():
        return head, on_cpu.scoped(logits, features)


def _rows_to_know(targets: torch.Tensor, rows: torch.Tensor, outside: int) -> torch.Tensor:
    """Of the training ``rows`` those whose vectors make the centres: of each label in scope some, evenly spread."""
    own = targets[rows]
    found = []
    for label in sorted({*own.tolist()}):
        at = rows[own == label] if label != outside else rows[:0]
        found.append(at[torch.arange(min(_MOST_ROWS, len(at))) * len(at) // max(1, min(_MOST_ROWS, len(at)))])
    return torch.cat(found)


def _centres(vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(known, hidden) of length 1: the k-means centres of each label's vectors (rows, hidden), or few vectors as they
    are."""
    from sklearn.cluster import KMeans

    vectors, found = functional.normalize(vectors, dim=1), []
    for label in sorted({*targets.tolist()}):
        own = np.unique(vectors[targets == label].numpy(), axis=0)
        if len(own) > CENTRES:
            own = KMeans(CENTRES, n_init=1, random_state=0).fit(own).cluster_centers_.astype(np.float32)
        found.append(torch.from_numpy(own))
    return functional.normalize(torch.cat(found), dim=1)
