"""Wrong labels: planted ones are at the top of the list, cleanlab agrees on its order, and the file to correct is the
user's with suggestions beside."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import capo

import capotune
from capotune.data.readers import read_table
from capotune.data.split import folds
from capotune.data.suggestions import with_suggestions
from capotune.errors import MissingLibraryError, OutputError
from capotune.events import ignore

ROWS, LABELS, FEATURES, PLANTED = 240, 4, 12, 24


def test_folds_hold_like_parts_of_each_label_and_whole_groups() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200).tolist()
    groups = [f"{label}-{rng.integers(0, 30)}" for label in labels]
    fold = folds(labels, 5, 0, groups)
    assert set(fold.tolist()) == set(range(5))
    by_group: dict[str, set[int]] = {}
    for group, number in zip(groups, fold.tolist(), strict=True):
        by_group.setdefault(group, set()).add(number)
    assert all(len(numbers) == 1 for numbers in by_group.values())
    for label in range(3):
        held = [min(by_group[group]) for group in by_group if group.startswith(str(label))]
        counts = np.bincount(held, minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (fold == folds(labels, 5, 0, groups)).all()
    assert (fold != folds(labels, 5, 1, groups)).any()


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Clusters, and the rows whose label was replaced."""
    pytest.importorskip("cleanlab", reason="comes with capotune[labels]")
    rng = np.random.default_rng(0)
    right = np.arange(ROWS) % LABELS
    centres = rng.normal(size=(LABELS, FEATURES))
    features = torch.tensor(centres[right] + 0.6 * rng.normal(size=(ROWS, FEATURES)), dtype=torch.float32)
    rows = rng.choice(ROWS, PLANTED, replace=False)
    given = right.copy()
    given[rows] = (right[rows] + rng.integers(1, LABELS, PLANTED)) % LABELS
    return features, torch.tensor(given), rows


@pytest.fixture(scope="module")
def found(planted: Any) -> Any:
    from capotune.tasks.classification.label_check import find_suspects

    return find_suspects(planted[0], planted[1], np.arange(ROWS), 0, ignore)


def test_planted_labels_come_first(planted: Any, found: Any) -> None:
    first = found.checked[found.ranked[: ROWS * 12 // 100]]
    assert len(set(first.tolist()) & set(planted[2].tolist())) >= 0.8 * PLANTED


def test_order_is_that_of_self_confidence(found: Any) -> None:
    from cleanlab.rank import get_label_quality_scores

    quality = get_label_quality_scores(found.given, found.probabilities, method="self_confidence")
    suspect = np.flatnonzero(found.probabilities.argmax(1) != found.given)
    assert found.ranked.tolist() == suspect[np.argsort(quality[suspect], kind="stable")].tolist()


def test_no_head_has_seen_the_row_that_it_labels_nor_an_equal_text() -> None:
    """Each text is a feature of its own, by which a head that had seen it would know its label."""
    pytest.importorskip("cleanlab", reason="comes with capotune[labels]")
    from capotune.tasks.classification.label_check import find_suspects

    text = np.arange(ROWS) // 2
    found = find_suspects(torch.eye(ROWS // 2)[text], torch.tensor(text % LABELS), text, 0, ignore)
    own = found.probabilities[np.arange(ROWS), found.given]
    assert abs(own - 1 / LABELS).max() < 0.1


def test_labels_of_one_text_alone_are_not_checked(planted: Any) -> None:
    from capotune.tasks.classification.label_check import find_suspects

    features, given, _ = planted
    lonely = given.clone()
    lonely[[3, 7]] = LABELS
    groups = np.arange(ROWS)
    groups[7] = groups[3]
    found = find_suspects(features, lonely, groups, 0, ignore)
    assert found.labels.tolist() == list(range(LABELS))
    assert not {3, 7} & set(found.checked.tolist())


def test_suggestions_stand_beside_every_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": 'say "hi",\nthere', "label": 1, "more": [1, 2]}, {"text": "=b", "label": True, "note": "é"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    written = with_suggestions(read_table(str(path)), {1: ("money", 0.9, 0.04321)})
    (tmp_path / "again.csv").write_text(written, encoding="utf-8")
    table = read_table(str(tmp_path / "again.csv"))
    assert table.columns == [
        "text",
        "label",
        "more",
        "note",
        "suggestion",
        "suggestion_probability",
        "label_probability",
    ]
    assert list(table.rows[0].values()) == [rows[0]["text"], "1", "[1, 2]", "", "", "", ""]
    assert list(table.rows[1].values()) == ["=b", "true", "", "é", "money", "0.9000", "0.0432"]
    assert with_suggestions(table, {}).count("suggestion_probability") == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cleanlab", reason="comes with capotune[labels]")
    words = {"late": "parcel", "broken": "cup", "money": "refund"}
    path = tmp_path_factory.mktemp("labels") / "tickets.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label", "split"])
        for number in range(48):
            label = list(words)[number % 3]
            given = "money" if number == 9 else label
            part = "test" if number % 4 == 0 else "train"
            writer.writerow([number, f"{words[label]} {'again ' * (number // 3 % 5)}{number}", given, part])
    return path


def test_list_and_file(data: Path, bert: Path, tmp_path: Path) -> None:
    before, out = data.read_bytes(), tmp_path / "to_correct.csv"
    result = capo("data", data, "--check-labels", "--model", bert, "--out", out, "--json")
    assert result.code == 0, result.err
    check = json.loads(result.out)
    assert check["rows"] == 48
    assert data.read_bytes() == before
    table = read_table(str(out))
    assert table.columns[:4] == ["id", "text", "label", "split"]
    suspects = {one["row"]: one for one in check["suspects"]}
    assert [row["suggestion"] for row in table.rows] == [
        suspects[at]["suggestion"] if at in suspects else "" for at in range(48)
    ]
    ranked = [one["label_probability"] for one in check["suspects"]]
    assert ranked == sorted(ranked)
    for one in check["suspects"]:
        assert one["suggestion"] != one["label"] == table.rows[one["row"]]["label"]
        assert one["line"] == one["row"] + 2
    again = capo("data", out, "--model", bert)
    assert again.code == 0, again.err


def test_table_shows_line_text_label_and_suggestion(data: Path, bert: Path) -> None:
    result = capo("data", data, "--check-labels", "--model", bert)
    assert result.code == 0, result.err
    assert "suggestion" in result.said or "All 48 labels" in result.said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "x.csv"], "--out x.csv: belongs to --check-labels. Give both."),
        (["--check-labels", "--out", "x.jsonl"], "--out x.jsonl: a csv file is written. Allowed: a name that ends"),
        (["--check-labels", "--test", "t.csv"], "--test: labels are checked in one file at a time."),
        (["--check-labels", "--task", "generation"], "--check-labels: does not apply to"),
    ],
)
def test_what_cannot_be_asked(flags: list[str], said: str, data: Path, bert: Path) -> None:
    result = capo("data", data, "--model", bert, *flags)
    assert result.code == 2
    assert said in result.said


def test_file_that_is_there_is_not_written_over(data: Path, bert: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        capotune.check_labels(data=data, model=str(bert), out=data)


def test_missing_cleanlab_is_named_with_its_command(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    rows = [{"text": "a parcel", "label": "late"}] * 2
    with pytest.raises(MissingLibraryError, match=r"pip install 'capotune\[labels\]'"):
        capotune.check_labels(data=rows, model=str(bert))
