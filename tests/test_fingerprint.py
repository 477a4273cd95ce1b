"""A base is known by its content: hashed once, remembered while its files stay, refused when it differs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from commands import capo
from safetensors.torch import load_file, save_file

import capotune
from capotune.adapters import fingerprint as module
from capotune.adapters.fingerprint import fingerprint
from capotune.adapters.store import save_adapter
from capotune.errors import AdapterError
from capotune.events import Event, Warned
from capotune.methods.lora.settings import LoraSettings
from capotune.models import content
from capotune.models.base import find


def by_definition(folder: Path) -> str:
    """sha256 over each tensor's sha256, by name; with the safetensors library."""
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        assert tensor.dtype == torch.float32
        head = json.dumps([name, "F32", list(tensor.shape)]).encode()
        total.update(hashlib.sha256(head + tensor.numpy().tobytes()).digest())
    return total.hexdigest()


@pytest.fixture
def base(bert: Path, tmp_path: Path) -> Path:
    """A copy that has not been changed for a minute, as far as its files tell, in a process that knows no hash."""
    return Path(shutil.copytree(bert, tmp_path / "base"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[str, int]]:
    """A model's fingerprint in a fresh process, and how many times its weights were read for it."""
    monkeypatch.setattr(content, "_RACY_SECONDS", 0)

    def found(folder: Path) -> tuple[str, int]:
        monkeypatch.setattr(content, "_known", {})
        read: list[object] = []
        computed = module._computed
        with monkeypatch.context() as patch:
            patch.setattr(module, "_computed", lambda *given: (read.append(given), computed(*given))[1])
            return fingerprint(find(str(folder))), len(read)

    return found


@pytest.mark.parametrize("cores", [1, 3])
def test_fingerprint_is_the_same_on_any_number_of_cores(
    cores: int, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert fingerprint(find(str(base))) == by_definition(base)


def test_fingerprint_is_remembered_across_processes(base: Path, hashed: Any) -> None:
    assert hashed(base) == (by_definition(base), 1)
    assert hashed(base) == (by_definition(base), 0)


def change_and_set_times_back(base: Path) -> None:
    path = base / "model.safetensors"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def put_another_in_its_place(base: Path) -> None:
    path = base / "model.safetensors"
    new = shutil.copy2(path, base / "new")
    data = bytearray(Path(new).read_bytes())
    data[-1] ^= 1
    Path(new).write_bytes(data)
    shutil.copystat(path, new)
    Path(new).replace(path)


def entries() -> list[Path]:
    return list((Path(os.environ["CAPOTUNE_CACHE"]) / "hashes").glob("*.json"))


def damage_the_entries(_base: Path) -> None:
    for path in entries():
        path.write_text('{"files": [], "sha256": ' + "[" * 5000)


def put_nonsense_in_the_entries(_base: Path) -> None:
    for path in entries():
        path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": "x"}))


@pytest.mark.parametrize(
    "change", [change_and_set_times_back, put_another_in_its_place, damage_the_entries, put_nonsense_in_the_entries]
)
def test_remembered_hash_is_dropped_on_doubt(change: Callable[[Path], None], base: Path, hashed: Any) -> None:
    hashed(base)
    change(base)
    assert hashed(base) == (by_definition(base), 1)


def test_hash_of_a_file_changed_a_moment_ago_is_not_remembered(
    base: Path, hashed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_RACY_SECONDS", 3600)
    (base / "model.safetensors").touch()
    assert [hashed(base)[1], hashed(base)[1]] == [1, 1]


def test_hash_of_a_file_changed_meanwhile_is_not_remembered(
    base: Path, hashed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, left = module._digest, [1]

    def change(*given: Any) -> bytes:
        if left:
            left.pop()
            (base / "model.safetensors").touch()
        return digest(*given)

    monkeypatch.setattr(module, "_digest", change)
    assert [hashed(base)[1], hashed(base)[1], hashed(base)[1]] == [1, 1, 0]


def test_hash_is_computed_where_the_cache_cannot_be_written(
    base: Path, hashed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path / "file"))
    assert hashed(base) == (by_definition(base), 1)


def test_gguf_and_embedded_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    os.utime(path, (time.time() - 60,) * 2)
    monkeypatch.setattr(content, "_RACY_SECONDS", 0)
    assert content.sha256_of(path) == hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(content, "_known", {})
    monkeypatch.setattr(content, "hashed", lambda _path: pytest.fail("it was read again"))
    assert content.sha256_of(path) == hashlib.sha256(b"weights").hexdigest()


# -------------------------------------------------------------------------------------------------------- another base


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    assembled = helpers.on_base(base, LoraSettings(rank=4, alpha=8))
    helpers.shake(assembled)
    save_adapter(tmp_path / "adapter", assembled, helpers.TRAINED | {"scores": {}})
    return tmp_path / "adapter"


def test_another_base_is_refused_unless_it_is_allowed(adapter: Path, other: Path, tickets: Path) -> None:
    texts = ["my parcel is late", "refund please"]
    with pytest.raises(AdapterError, match=r"belongs to another base.*`allow_different_base=True`"):
        capotune.load(adapter, model=str(other))
    seen: list[Event] = []
    found = capotune.load(adapter, model=str(other), allow_different_base=True, report=seen.append)
    (said,) = [event.text for event in seen if isinstance(event, Warned)]
    assert "its scores do not hold here" in said
    assert not (found.predict_proba(texts) == capotune.load(adapter).predict_proba(texts)).all()
    scores = capotune.evaluate(adapter, data=str(tickets), model=str(other), allow_different_base=True)
    assert scores["different_base"]
    assert "different_base" not in capotune.evaluate(adapter, data=str(tickets))


def test_merge_into_another_base_is_recorded(adapter: Path, base: Path, other: Path, tmp_path: Path) -> None:
    refused = capo("merge", adapter, "--model", other, "--out", tmp_path / "merged")
    assert refused.code == 2
    assert "--allow-different-base" in refused.err
    ran = capo("merge", adapter, "--model", other, "--out", tmp_path / "merged", "--allow-different-base", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["different_base"]
    stored = json.loads((tmp_path / "merged" / "different_base.json").read_text())
    assert stored == {"trained_on": by_definition(base), "merged_into": by_definition(other)}
    assert not capotune.merge(adapter, out=tmp_path / "own")["different_base"]
    assert not (tmp_path / "own" / "different_base.json").exists()


def test_another_base_of_other_shapes_is_refused_anyhow(adapter: Path, llama: Path) -> None:
    with pytest.raises(AdapterError):
        capotune.load(adapter, model=str(llama), allow_different_base=True)
