"""The cache is bounded: what leaves when it is full, what does not, and what people see of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import capo
from safetensors import safe_open
from safetensors.torch import save_file
from test_activation_cache import features, pooled, rows_of

import capotune
from capotune import cache
from capotune.engine.activation_cache import ActivationCache
from capotune.errors import SettingError
from capotune.events import Event, Reporter, Warned
from capotune.files import cache_folder

BYTES = 1000


def entry(room: str, name: str, used: int, **facts: str) -> Path:
    """One of ``BYTES`` bytes, last used ``used`` seconds after 1970."""
    path = cache_folder() / room / name
    if room == "models":
        path.mkdir(parents=True)
        cache.sign(path, **facts)
        (path / "weights").write_bytes(bytes(BYTES - (path / ".cached.json").stat().st_size))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(BYTES))
    os.utime(path, (used, used))
    return path


@pytest.fixture
def four() -> list[Path]:
    """Entries, the least recently used first."""
    return [
        entry("activations", "a.safetensors", 10),
        entry("models", "b-1", 20, base="b.gguf"),
        entry("hashes", "c.json", 30),
        entry("activations", "d.safetensors", 40),
    ]


def limited(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setenv("CAPOTUNE_CACHE_LIMIT", str(nbytes))


def there(paths: list[Path]) -> list[bool]:
    return [path.exists() for path in paths]


@pytest.mark.parametrize(
    ("nbytes", "left"),
    [
        (0, [True, True, True, True]),
        (500, [True, True, True, True]),
        (501, [False, True, True, True]),
        (2500, [False, False, True, True]),
        (4500, [False, False, False, False]),
    ],
)
def test_least_recently_used_entries_leave_for_a_new_one(
    nbytes: int, left: list[bool], four: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 4500)
    assert cache.make_room(nbytes)
    assert there(four) == left
    assert [one.path for one in cache.entries()] == [path for path, stays in zip(four, left, strict=True) if stays]


def test_nothing_leaves_for_what_does_not_fit(four: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 4500)
    assert not cache.make_room(4501)
    assert not cache.make_room(3501, spared=four[:1])
    assert all(there(four))
    assert cache.make_room(3500, spared=four[:1])
    assert there(four) == [True, False, False, False]


def test_what_is_being_written_counts(four: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 5000)
    (four[0].parent / ".being-written").write_bytes(bytes(BYTES))
    assert cache.make_room(1)
    assert there(four) == [False, True, True, True]


def test_used_entry_leaves_last(four: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 4000)
    assert cache.hold(four[0])
    assert cache.make_room(3 * BYTES)
    assert there(four) == [True, False, False, False]
    assert not cache.hold(four[3])


def test_other_files_in_the_folder_are_left_alone(four: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 1)
    others = [four[0].with_name("notes.txt"), cache_folder() / "thesis.docx", cache_folder() / "mine" / "x.json"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert cache.make_room(1)
    assert len(cache.clear()) == 0
    assert there(others) == [True] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be removed there")
def test_model_that_another_process_uses_does_not_leave(four: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until that process has ended."""
    program = f"from pathlib import Path; from capotune.cache import hold; print(hold(Path({str(four[1])!r}))); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        os.utime(four[1], (20, 20))
        assert [one.path for one in cache.clear(["models", "hashes"])] == [four[2]]
        limited(monkeypatch, 1500)
        assert not cache.make_room(501)
        assert there(four) == [True, True, False, True], "no other one leaves for nothing"
        assert cache.make_room(500)
        assert there(four) == [False, True, False, False]
        process.communicate("\n")
    assert cache.make_room(1500)
    assert there(four) == [False] * 4


def test_entry_that_leaves_can_be_read_by_who_has_it_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    path = entry("activations", "a.safetensors", 10)
    save_file({"values": torch.arange(5000)}, path)
    with safe_open(path, framework="pt") as file:
        values = file.get_tensor("values")
    limited(monkeypatch, 1)
    assert cache.make_room(1)
    assert not path.exists()
    assert torch.equal(values, torch.arange(5000))


@pytest.mark.parametrize(
    ("given", "nbytes"), [("0", 0), ("123", 123), ("20 GB", 20 * 10**9), ("1.5mb", 1_500_000), (" 2TB ", 2 * 10**12)]
)
def test_limit_is_a_size(given: str, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPOTUNE_CACHE_LIMIT", given)
    assert cache.limit() == nbytes


@pytest.mark.parametrize("given", ["much", "-1", "1 GiB", "1e9", "9" * 20])
def test_other_limits_are_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPOTUNE_CACHE_LIMIT", given)
    with pytest.raises(SettingError, match=r"CAPOTUNE_CACHE_LIMIT=.*: this is no size\. Allowed: a size, as 20 GB"):
        cache.limit()


@pytest.mark.parametrize(("free", "nbytes"), [(10**12, 50 * 10**9), (8000, 6000), (0, 2000)])
def test_limit_left_out_is_half_of_what_the_disk_has_for_it(
    free: int, nbytes: int, four: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(four) * BYTES == 4000
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("", (), {"free": free}))
    assert cache.limit() == nbytes


def test_full_disk_is_a_limit_too(four: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("", (), {"free": 100}))
    assert cache.make_room(1100)
    assert there(four) == [False, True, True, True]
    assert not cache.make_room(3101)


# ------------------------------------------------------------------------------------------------------------ in a run


def warnings(seen: list[Event]) -> list[str]:
    return [event.text for event in seen if isinstance(event, Warned) and "frozen layers" in event.text]


def trained(bert: Path, tickets: Path, out: Path, report: Reporter, **settings: Any) -> dict[str, Any]:
    result: dict[str, Any] = capotune.train(
        "feature-extraction", data=str(tickets), model=str(bert), out=out, trainable_layers=1, epochs=1, report=report,
        validation_fraction=0.1, **settings,
    )["result"]  # fmt: skip
    return result


def test_states_that_do_not_fit_are_computed_anew(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, nothing is stored, and the run comes to the same scores as with room for all."""
    roomy: list[Event] = []
    expected = trained(bert, tickets, tmp_path / "roomy", roomy.append)
    assert not warnings(roomy)
    states = max(one.nbytes for one in cache.entries() if one.facts["kind"] == "boundary")
    cache.clear()
    limited(monkeypatch, states // 2)
    seen: list[Event] = []
    found = trained(bert, tickets, tmp_path / "narrow", seen.append)
    (said,) = warnings(seen)
    assert "more than the cache has room for (at most " in said
    assert sum(one.nbytes for one in cache.entries()) <= states // 2
    assert found["held_out_score"] == pytest.approx(expected["held_out_score"], rel=1e-3)
    assert found["scores"] == pytest.approx(expected["scores"], rel=1e-3)


def test_no_entry_of_a_run_leaves_for_another_of_it(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembled, folder = features(bert), cache_folder() / "activations"
    first, second = rows_of(assembled), rows_of(assembled, seed=1)
    before = ActivationCache(folder, {})
    pooled(before, assembled, (0,), first)
    size = cache.entries()[0].nbytes
    limited(monkeypatch, size * 3 // 2)
    said: list[Event] = []
    run = ActivationCache(folder, {}, report=said.append)
    pooled(run, assembled, (0,), first)
    assert run.forward_rows == 0
    pooled(run, assembled, (0,), second)
    assert len(cache.entries()) == len(warnings(said)) == 1
    again = ActivationCache(folder, {})
    pooled(again, assembled, (0,), second)  # of another run
    assert len(cache.entries()) == 1
    pooled(again, assembled, (0,), second)
    assert again.forward_rows == len(second.sequences)


# --------------------------------------------------------------------------------------------------------- capo cache


def test_command_shows_what_the_cache_holds(bert: Path, tickets: Path, tmp_path: Path, four: list[Path]) -> None:
    for path in (four[0], four[3]):
        path.unlink()
    trained(bert, tickets, tmp_path / "run", lambda _event: None)
    shown = capo("cache")
    assert shown.code == 0
    for word in ("kind", "base", "data", "size", "last used", "boundary", "b.gguf", "1.0 kB", "1970-01-01", "at most"):
        assert word in shown.said
    found = json.loads(capo("cache", "--json").out)
    kinds = [one["kind"] for one in found["entries"]]
    assert {kind: kinds.count(kind) for kind in sorted(set(kinds))}.items() >= {"boundary": 2, "features": 1}.items()
    made = [one for one in found["entries"] if one["kind"] in ("boundary", "features")]
    assert {(one["base"], one["data"]) for one in made} == {(str(bert), str(tickets))}
    assert found["bytes"] == sum(one["bytes"] for one in found["entries"])
    assert [one["kind"] for one in json.loads(capo("cache", "models", "--json").out)["entries"]] == ["models"]


def test_command_clears_a_kind_or_all(four: list[Path]) -> None:
    assert "freed 2.0 kB: 2 features" in capo("cache", "features", "--clear").said
    assert there(four) == [False, True, True, False]
    assert "freed 2.0 kB: 1 models, 1 hashes" in capo("cache", "--clear").said
    assert not any(there(four))
    assert "freed 0 B: there was nothing" in capo("cache", "--clear").said
    assert capo("cache", "everything").code == 2


def test_damaged_entries_are_shown_and_cleared(four: list[Path]) -> None:
    four[0].write_bytes(b"\xff" * 20)
    four[3].write_bytes(len(b'{"__metadata__": [1]}').to_bytes(8, "little") + b'{"__metadata__": [1]}')
    (four[1] / ".cached.json").write_text("[" * 100_000)
    assert {one.path: one.facts for one in cache.entries()} == {
        path: {"kind": kind} for path, kind in zip(four, ("features", "models", "hashes", "features"), strict=True)
    }
    assert len(cache.clear()) == 4


@pytest.mark.parametrize("name", ["", "a", "a name", "é" * 7, 'quoted " and \\ and \n', "x" * 61])
def test_values_are_aligned_in_memory_whatever_the_names_in_the_header(name: str, bert: Path, tmp_path: Path) -> None:
    """The same products come of them, to the last bit, as of values that were just computed."""
    assembled = features(bert)
    for _ in range(2):
        run = ActivationCache(tmp_path, {}, {"base": name, "data": "rows.csv"})
        values = pooled(run, assembled, (0,), rows_of(assembled))
    assert run.forward_rows == 0
    assert values.data_ptr() % 64 == 0
