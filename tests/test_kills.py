"""A process that is killed (SIGKILL) leaves nothing half-written, and what goes on from there comes to the same bits.

``scripts/soak.py`` does the same some hundred times, at random.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import soak
from commands import capo
from soak import Case, Kill, Reference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and looked at in /proc")

LORA = ("--rank", "2", "--dropout", "0.1", "--epochs", "2", "--patience", "2", "--batch-size", "8", "--save-every", "2")
KILLS = [
    ("step", 0.5),
    ("cached states", 0.5),
    ("checkpoint", 0.1),
    ("checkpoint", 0.6),
    ("evaluation", 0.5),
    ("final save", 0.3),
    ("final save", 0.9),
    ("folder", 0.97),
]


@pytest.fixture(scope="module")
def case(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """LoRA in the last block, so that what is below is cached."""
    rows = tickets.read_text(encoding="utf-8").splitlines()[:41]
    data = tmp_path_factory.mktemp("data") / "rows.csv"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return Case(
        "lora",
        "classification",
        (
            "train",
            "lora",
            "--layers",
            "2",
            "--validation-fraction",
            "0.1",
            "--data",
            str(data),
            "--model",
            str(bert),
            *LORA,
        ),
    )


@pytest.fixture(scope="module")
def expected(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("whole")
    assert capo(*case.command, "--out", folder / "warm").code == 0  # what is imported and found out once is so
    return soak.reference(case, folder / "reference")


@pytest.mark.parametrize(("kind", "place"), KILLS)
def test_a_killed_run_goes_on_to_the_same_bits(
    kind: str, place: float, case: Case, expected: Reference, tmp_path: Path
) -> None:
    kill = Kill(kind, 1 + int(place * expected.counts[kind]))
    found = soak.trial(case, expected, tmp_path / "trial", [kill])
    assert found.problems == []
    assert found.kills == [kind]
