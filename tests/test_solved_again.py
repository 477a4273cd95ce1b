"""The head of prompt tuning is solved once more when its vectors are trained, on what they give of every row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression

import capotune
from capotune.data.batches import TokenRows
from capotune.tasks.text_targets.features import head_features

SHORT: dict[str, Any] = {"num_virtual_tokens": 3, "epochs": 1, "batch_size": 8, "validation_fraction": 0.1}


@pytest.fixture(scope="module")
def trained(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("again") / "out"
    capotune.train("prompt-tuning", data=str(tickets), model=str(bert), out=out, **SHORT)
    return out


def standardised(features: torch.Tensor) -> torch.Tensor:
    return (features - features.mean(0)) / features.std(0, unbiased=False)


def test_the_stored_head_is_the_best_for_the_trained_vectors_and_all_rows(trained: Path, tickets: Path) -> None:
    result = json.loads((trained / "run.json").read_text(encoding="utf-8"))["result"]
    assembled = capotune.load(trained / "adapter")._assembled
    with tickets.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    ids = assembled.task.encode([row["text"] for row in rows])
    tokens = TokenRows(ids, assembled.task.pad_id, assembled.method.virtual_token_ids)
    features = head_features(assembled, tokens)
    targets = torch.tensor([assembled.task.labels.index(row["label"]) for row in rows])
    weak = 1 / (2 * result["regularization"] * len(targets))
    theirs = LogisticRegression(C=weak, tol=1e-6, max_iter=10_000, solver="newton-cg").fit(
        standardised(features), targets
    )
    expected = torch.as_tensor(theirs.predict_proba(standardised(features)))
    found = assembled.model.classifier(features).detach().softmax(1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)
