"""Few rows a label: the head that leaves each row out in turn, contrast between rows, and runs of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional

import capotune
from capotune.data.batches import TokenRows
from capotune.engine import ridge
from capotune.engine.ridge import solve_leaving_one_out
from capotune.evaluation.forward import Examples
from capotune.evaluation.metrics import nearest_mean_logits
from capotune.events import Event, StepTaken, Warned
from capotune.models.base import find
from capotune.tasks.classification import Classification
from capotune.tasks.text_targets.contrast import RowContrast
from capotune.tasks.text_targets.few_rows import are_few, with_names

ROWS, LABELS = 14, 3


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(0)) + 0.5


TARGETS = torch.arange(ROWS) % LABELS


def one_hot(targets: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(targets, LABELS).float()


def test_answers_left_out_are_those_of_heads_solved_without_the_row(features: torch.Tensor) -> None:
    y = one_hot(TARGETS)
    for regularization, _, _, left_out in ridge._path(features, y):
        for row in range(ROWS):
            others = torch.arange(ROWS) != row
            solved = Ridge(alpha=regularization).fit(features[others].double(), y[others].double())
            expected = solved.predict(features[row : row + 1].double())[0]
            np.testing.assert_allclose(left_out[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_head_is_the_ridge_solution_that_answers_left_out_rows_best(features: torch.Tensor, layers: int) -> None:
    """Over the ways to read the layers too; where the rows beyond those judged are fitted and not judged."""
    judged, found = 10, solve_leaving_one_out(features, TARGETS, LABELS, 10, layers)
    x, y = features - features[:judged].mean(0), one_hot(TARGETS)
    candidates = []
    for scale in ridge._scales(x[:judged], layers):
        for regularization in ridge._PATH:
            answers = []
            for row in range(judged):
                others = torch.arange(ROWS) != row
                solved = Ridge(alpha=regularization).fit((x * scale)[others].double(), y[others].double())
                answers.append(solved.predict((x * scale)[row : row + 1].double())[0])
            solved = Ridge(alpha=regularization).fit((x * scale).double(), y.double())
            left_out = 10 * torch.tensor(np.stack(answers))
            left_out /= ridge.fit_temperature(left_out, TARGETS[:judged])
            loss = float(functional.cross_entropy(left_out, TARGETS[:judged]))
            candidates.append((loss, regularization, solved.predict((x * scale).double())))
    _, regularization, expected = min(candidates, key=lambda one: one[0])
    assert found.head.regularization == regularization
    logits = found.head.logits(features)
    sharpness = float(logits.diff(dim=1).norm()) / np.linalg.norm(np.diff(expected, axis=1))
    np.testing.assert_allclose(logits, sharpness * expected, rtol=1e-3, atol=1e-4 * sharpness)


def test_outputs_of_left_out_rows_are_calibrated() -> None:
    """Twice as sure, or half as sure, they would say less of the labels."""
    generator, targets = torch.Generator().manual_seed(0), torch.arange(60) % LABELS
    rows = torch.randn(LABELS, 6, generator=generator)[targets] + 2 * torch.randn(60, 6, generator=generator)
    left_out = solve_leaving_one_out(rows, targets, LABELS, 60).left_out
    loss = float(functional.cross_entropy(left_out, targets))
    assert all(float(functional.cross_entropy(factor * left_out, targets)) > loss for factor in (0.5, 2))


@pytest.mark.parametrize("spread", [0.5, 1.5, 4.0])
def test_head_is_on_average_no_worse_than_the_nearest_mean(spread: float) -> None:
    """Of labels that are points with rows about them, drawn anew each time."""
    gains = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(5, 40, generator=generator)

        def rows(of_each: int, centres: torch.Tensor = centres, drawn: torch.Generator = generator) -> Any:
            targets = torch.arange(5).repeat(of_each)
            return centres[targets] + spread * torch.randn(len(targets), 40, generator=drawn), targets

        (x, y), (test, wanted) = rows(4), rows(40)
        head = solve_leaving_one_out(x, y, 5, len(x)).head
        own, base = head.logits(test), nearest_mean_logits(x, y, test, 5)
        gains.append(float((own.argmax(1) == wanted).float().mean() - (base.argmax(1) == wanted).float().mean()))
    assert np.mean(gains) > -0.015


def test_features_that_never_vary_are_left_out() -> None:
    features = torch.cat([torch.zeros(6, 2), torch.randn(6, 2, generator=torch.Generator().manual_seed(1))], 1)
    head = solve_leaving_one_out(features, torch.arange(6) % 2, 2, 6, layers=2).head
    assert head.weight.isfinite().all()
    assert (head.weight[:, :2] == 0).all()


class Pooled:
    """A model whose pooled vectors are given."""

    def __init__(self, vectors: torch.Tensor) -> None:
        self.vectors = vectors

    def features(self, _batch: Any) -> torch.Tensor:
        return self.vectors


class Rows:
    """A batch of rows with these targets."""

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets


def test_contrast_is_the_mean_log_probability_of_rows_of_the_same_label() -> None:
    vectors = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 0, 0, 1, 1, 2])
    loss = RowContrast().loss(Pooled(vectors), Rows(targets), 0.0)  # type: ignore[arg-type]
    cosines = functional.cosine_similarity(vectors[:, None], vectors[None], dim=2) / 0.1
    expected = torch.zeros(())
    for row in range(6):
        others = [at for at in range(6) if at != row]
        same = [at for at in others if targets[at] == targets[row]]
        for at in same:
            expected = expected - (cosines[row, at] - cosines[row, others].logsumexp(0)) / len(same)
    torch.testing.assert_close(loss, expected)
    score = RowContrast().score(functional.normalize(vectors.detach(), dim=1), targets)
    assert RowContrast().shown(score) == pytest.approx(float(expected.detach()) / 6)
    loss.backward()
    assert vectors.grad is not None
    assert vectors.grad[:5].norm() > 0


@pytest.mark.parametrize(
    ("rows", "labels", "few"), [(96, 3, True), (97, 3, False), (2000, 100, True), (2001, 100, False)]
)
def test_rows_are_few_up_to_32_a_label_and_2000_in_all(rows: int, labels: int, few: bool) -> None:
    assert are_few(rows, labels) is few


def test_names_of_labels_are_rows_where_they_are_words(bert: Path) -> None:
    task = Classification.on(find(str(bert)), ("lost_card", "7", "late"), None, 0)
    given = Examples(TokenRows([[2, 5, 3]], task.pad_id), torch.tensor([1]))
    named = with_names(given, task)
    assert list(named.rows.sequences) == [[2, 5, 3], *task.encode(["lost card", "late"])]
    assert named.targets.tolist() == [1, 0, 2]  # type: ignore[union-attr]
    assert [named.where(at) for at in range(3)] == [
        "row 0", "the name of the label 'lost_card'", "the name of the label 'late'"
    ]  # fmt: skip


SETTINGS: dict[str, Any] = {"cache": False, "seed": 3}
METHODS: dict[str, dict[str, Any]] = {
    "feature-extraction": {},
    "lora": {"rank": 4},
    "qlora": {"rank": 4, "block_size": 32},
    "prompt-tuning": {"num_virtual_tokens": 4},
}


@pytest.fixture(scope="module")
def runs(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each technique, with the notices beside it."""
    folder = tmp_path_factory.mktemp("few")
    for method, own in METHODS.items():
        events: list[Event] = []
        capotune.train(
            method, data=str(tickets), model=str(bert), out=folder / method, report=events.append, **SETTINGS, **own
        )
        said = [event.text for event in events if isinstance(event, Warned)]
        (folder / f"{method}.json").write_text(json.dumps(said), "utf-8")
    return {method: folder / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_run_of_few_rows_says_so_once_and_learns_what_words_decide(method: str, runs: dict[str, Path]) -> None:
    said = json.loads(runs[method].with_suffix(".json").read_text("utf-8"))
    assert sum("72 rows of 3 labels are few" in text for text in said) == 1
    record = json.loads((runs[method] / "run.json").read_text("utf-8"))
    assert record["result"]["score"] > 0.6
    assert record["settings"]["validation_fraction"] is None


def test_run_that_is_stopped_goes_on_to_the_same_bits(
    runs: dict[str, Path], bert: Path, tickets: Path, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capotune.train(
            "lora", data=str(tickets), model=str(bert), out=tmp_path / "run", report=stop, **SETTINGS, rank=4
        )
    capotune.resume(tmp_path / "run")
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (runs["lora"] / weights).read_bytes()


def test_with_a_validation_fraction_rows_are_held_out_as_of_many(bert: Path, tickets: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    capotune.train(
        "feature-extraction", data=str(tickets), model=str(bert), out=tmp_path / "run", report=events.append,
        validation_fraction=0.1, **SETTINGS,
    )  # fmt: skip
    assert not [event for event in events if isinstance(event, Warned) and "are few" in event.text]
