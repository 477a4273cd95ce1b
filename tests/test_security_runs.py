"""The folder of a run and the cache, from a stranger: nothing runs, and no other file is read or changed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import tree
from planted import MARKER, Exploit, pickled

import capotune
from capotune import api, cache
from capotune.engine.checkpoint import load_checkpoint, save_checkpoint
from capotune.engine.state import TrainingState
from capotune.errors import OutputError
from capotune.files import cache_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder of the user's that no link may reach."""
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("state.json", "state.safetensors", "thesis.txt"):
        (folder / name).write_text("the user's own\n" * 9)
    return folder


@pytest.mark.parametrize(
    "where", [".lock", "metrics.jsonl", "checkpoints", "checkpoints/step-1-epoch-0", ".x.partial", "settings.json"]
)
def test_link_in_a_run_folder_reaches_no_other_file(where: str, other: Path, tmp_path: Path) -> None:
    """Going on would empty, extend or remove what it leads to."""
    run, before = tmp_path / "run", tree(other)
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text('{"settings": {}, "method": "lora", "lora": {}}')
    if where == "checkpoints":
        (run / where).rmdir()
    is_folder = where.startswith("checkpoints") or where.endswith(".partial")
    (run / where).symlink_to(other if is_folder else other / "thesis.txt")
    with pytest.raises(OutputError, match=r"is a link|no record of a comparison|cannot be read"):
        capotune.resume(run)
    assert tree(other) == before


def test_links_in_the_place_of_a_checkpoint_are_not_followed(other: Path, tmp_path: Path) -> None:
    """Neither when one is read nor when old ones are removed."""
    folder, before = tmp_path / "checkpoints", tree(other)
    state = TrainingState(rng=torch.get_rng_state(), weights={"a": torch.ones(2)})
    folder.mkdir()
    for number in (0, 1):
        (folder / f"step-{number}-epoch-0").symlink_to(other)
    for step in (2, 3):
        path = save_checkpoint(folder, replace(state, step=step))
    assert sorted(one.name for one in folder.iterdir()) == ["step-2-epoch-0", "step-3-epoch-0"]
    (path / "state.json").unlink()
    (path / "state.json").symlink_to(folder / "step-2-epoch-0" / "state.json")
    found = load_checkpoint(folder)
    assert found is not None
    assert found.step == 2
    assert tree(other) == before


def test_pipes_in_the_place_of_records_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("run.json", "settings.json", "metrics.jsonl", ".lock"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(OutputError, match="no run in"):
        capotune.resume(tmp_path)
    assert api.list_runs(tmp_path) == []
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").write_text('{"settings": {}, "method": "lora"}')
    assert [run.status for run in api.list_runs(tmp_path)] == ["stopped"]
    with pytest.raises(OutputError, match=r"is no file, and .* is written to"):
        capotune.resume(tmp_path)


def test_links_in_the_cache_are_removed_and_not_followed(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path / "cache"))
    before = tree(other)
    for room, name in (("activations", "a.safetensors"), ("hashes", "b.json"), ("models", "c-1"), ("models", ".left")):
        (cache_folder() / room).mkdir(exist_ok=True)
        target = other if room == "models" else other / "thesis.txt"
        (cache_folder() / room / name).symlink_to(target)
    assert sum(entry.nbytes for entry in cache.entries()) < 1000, "the links' own sizes"
    monkeypatch.setattr(cache.time, "time", lambda: 10.0**11)
    cache.tidy(cache_folder() / "models")
    assert len(cache.clear()) == 3
    assert not [path for path in cache_folder().rglob("*") if path.is_symlink()]
    assert tree(other) == before


def test_pickle_in_a_checkpoint_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its files, and in the place of one, with checksums that fit."""
    monkeypatch.chdir(tmp_path)
    state = TrainingState(step=1, rng=torch.get_rng_state(), weights={"a": torch.ones(2)})
    path = save_checkpoint(tmp_path / "checkpoints", state)
    pickled("optimizer.pt", "rng_state.pth", "state.pkl")(path)
    assert torch.equal(load_checkpoint(path.parent).weights["a"], torch.ones(2))
    torch.save({"a": Exploit()}, path / "state.safetensors")
    names = ("state.safetensors", "state.json")
    sums = (f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (path / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    with pytest.raises(OutputError, match=r"every checkpoint in .* is damaged"):
        load_checkpoint(path.parent)
    assert not Path(MARKER).exists()


def test_pickle_in_the_cache_is_not_opened(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path / "cache"))
    given = {"data": str(tickets), "model": str(bert)}
    capotune.train("feature-extraction", **given, out=tmp_path / "first")
    entries = [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".safetensors"]
    assert entries
    for path in entries:
        torch.save({"a": Exploit()}, path)
        torch.save({"a": Exploit()}, path.with_suffix(".pt"))
    capotune.train("feature-extraction", **given, out=tmp_path / "again")
    first, again = (next((tmp_path / name).rglob("adapter_model.safetensors")) for name in ("first", "again"))
    assert first.read_bytes() == again.read_bytes()
    assert not Path(MARKER).exists()
