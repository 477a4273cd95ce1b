"""What is made of GGUF files: whole or in 4 bits, once for each content, complete or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

from gguf_files import FAMILIES, rope_tensors, write

from capotune import cache
from capotune.adapters.fingerprint import config_hash, fingerprint
from capotune.api import is_adapter
from capotune.errors import ModelError, OutputError
from capotune.events import Event, Progress, Stage, Warned
from capotune.files import cache_folder
from capotune.models.base import Base, Quantization, find
from capotune.models.gguf.converted import converted
from capotune.models.gguf.file import open_gguf
from capotune.models.load import load_backbone, load_causal_lm
from capotune.models.shards import Shards

LLAMA = FAMILIES["Llama"]
NF4 = Quantization("nf4", 64, True)


def said(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Stage)]


def from_folder(base: Base) -> Base:
    """The base as the folder of its whole conversion."""
    return find(str(converted(base, None).folder))


def assert_same_weights(one: Any, other: Any) -> None:
    """Codes, scales and all else, bit by bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# --------------------------------------------------------------------------------------------- into 4 bits


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Phi-3, long", "GPT-2", "Falcon", "Bloom"])
def test_4_bits_straight_from_the_file_are_those_of_the_converted_folder(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    write(family, tmp_path / "model.gguf", quantization="Q4_1", tensors=rope_tensors(family))
    base = find(str(tmp_path / "model.gguf"))
    straight, identity = load_causal_lm(base, quantization=NF4), fingerprint(base)
    assert base.gguf is not None
    assert not base.gguf.whole.exists()
    folder = from_folder(base)
    assert_same_weights(straight, load_causal_lm(folder, quantization=NF4))
    assert_same_weights(load_backbone(base, quantization=NF4), load_backbone(folder, quantization=NF4))
    assert (identity, config_hash(base)) == (fingerprint(folder), config_hash(folder))


def test_4_bits_are_those_of_the_model_that_the_file_was_made_from(tmp_path: Path) -> None:
    model = write(LLAMA, tmp_path / "model.gguf")
    base = find(str(tmp_path / "model.gguf"))
    model.save_pretrained(tmp_path / "saved")
    for path in base.folder.glob("*token*"):
        (tmp_path / "saved" / path.name).write_bytes(path.read_bytes())
    saved = load_causal_lm(find(str(tmp_path / "saved")), quantization=NF4)
    assert_same_weights(load_causal_lm(base, quantization=NF4), saved)


def test_file_is_quantized_once_for_each_kind_of_4_bits(tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "model.gguf")
    seen: list[Event] = []
    base = find(str(tmp_path / "model.gguf"), report=seen.append)
    kinds = [NF4, Quantization("nf4", 128, True), Quantization("nf4", 64, False), Quantization("fp4", 64, True)]
    layers = [load_causal_lm(base, quantization=kind).model.layers[0].mlp.up_proj for kind in (*kinds, *kinds)]
    models = cache_folder() / "models"
    assert said(seen) == [f"quantizing model.gguf, once: {kind}, in {models}" for kind in kinds]
    found = [(layer.quant_type, layer.block_size, layer.quantized.nested) for layer in layers]
    assert found == 2 * [(kind.quant_type, kind.block_size, kind.double_quant) for kind in kinds]
    progress = [event for event in seen if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total
    linears = [one for path in models.rglob("*.safetensors") for one in Shards([path]) if "_proj.weight" in one.name]
    assert {one.dtype for one in linears if one.name.endswith("_proj.weight")} == {"U8"}


def test_values_that_are_not_finite_are_refused_by_name_and_nothing_is_left(tmp_path: Path) -> None:
    bad = torch.zeros(96, 64)
    bad[1, 2] = float("inf")
    write(LLAMA, tmp_path / "model.gguf", tensors={"blk.1.ffn_up.weight": bad})
    base = find(str(tmp_path / "model.gguf"))
    tensor = r"model.gguf: the tensor model.layers.1.mlp.up_proj.weight cannot be stored in 4 bits"
    with pytest.raises(ModelError, match=tensor):
        load_causal_lm(base, quantization=NF4)
    assert not list(cache_folder().rglob("*nf4*"))


@pytest.mark.parametrize("quantization", [None, NF4])
def test_file_cut_short_after_it_was_found_is_refused(quantization: Quantization | None, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(LLAMA, path)
    base = find(str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a complete GGUF file: it ends inside the tensor"):
        load_causal_lm(base, quantization=quantization)
    assert list((cache_folder() / "models").iterdir()) == [base.folder]


# ---------------------------------------------------------------------------------------------------- whole


def test_file_is_described_and_converted_once_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    write(LLAMA, folder / "model.gguf")
    (folder / "config.json").write_text("{}", encoding="utf-8")  # as hubs have it
    (tmp_path / "blob").write_bytes((folder / "model.gguf").read_bytes())
    seen: list[Event] = []
    monkeypatch.chdir(tmp_path)
    found = [find(name, report=seen.append) for name in ("downloaded/model.gguf", "downloaded", "blob")]
    assert len({fingerprint(base) for base in found}) == len({base.folder for base in found}) == 1
    assert not seen
    assert len({converted(base, None).folder for base in found}) == 1
    assert said(seen) == [f"converting model.gguf, once: 321 kB in {cache_folder() / 'models'}"]
    progress = [event for event in seen if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total
    assert [base.lasting_name for base in found] == [str(tmp_path / base.name) for base in found]
    assert not any(is_adapter(name) for name in ("downloaded/model.gguf", "downloaded"))


def test_tensors_are_the_same_in_the_file_and_converted(tmp_path: Path) -> None:
    for name in ("Llama", "GPT-2"):
        path = tmp_path / f"{name}.gguf"
        write(FAMILIES[name], path, quantization="F16")
        of_file = find(str(path)).tensors
        of_folder = from_folder(find(str(path))).tensors
        assert {one.name for one in of_file} == {one.name for one in of_folder}
        buffer = of_file.buffer_for(one.name for one in of_file)
        for stored in of_file:
            expected = of_folder.read(stored.name)
            assert (stored.dtype, stored.shape) == (of_folder[stored.name].dtype, tuple(expected.shape))
            assert torch.equal(of_file.read(stored.name, buffer), expected)
            parts = np.frombuffer(b"".join(of_file.chunks(stored.name)), dtype=np.uint8)
            np.testing.assert_array_equal(parts, expected.view(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("quantization", [None, NF4])
def test_interrupted_conversion_leaves_nothing(quantization: Quantization | None, tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "model.gguf")

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    base = find(str(tmp_path / "model.gguf"), report=interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_causal_lm(base, quantization=quantization)
    assert list((cache_folder() / "models").iterdir()) == [base.folder]
    load_causal_lm(find(str(tmp_path / "model.gguf")), quantization=quantization)


@pytest.mark.parametrize(("quantization", "size"), [(None, "321 kB"), (NF4, "136 kB")])
def test_conversion_without_room_is_refused_before_it_begins(
    quantization: Quantization | None, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(LLAMA, tmp_path / "model.gguf")
    base = find(str(tmp_path / "model.gguf"))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("", (), {"free": 1000}))
    with pytest.raises(OutputError, match=rf"{size}, and 1.0 kB are free in .*CAPOTUNE_CACHE"):
        load_causal_lm(base, quantization=quantization)


@pytest.mark.parametrize("quantization", [None, NF4])
def test_one_flipped_bit_in_a_converted_file_is_found_and_it_is_made_again(
    quantization: Quantization | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(LLAMA, tmp_path / "model.gguf")
    seen: list[Event] = []
    base = find(str(tmp_path / "model.gguf"), report=seen.append)
    folder = converted(base, quantization).folder
    (weights,) = folder.glob("*.safetensors")
    for path in (weights, base.folder / "config.json"):
        before = path.read_bytes()
        path.write_bytes(before[:-9] + bytes([before[-9] ^ 4]) + before[-8:])
        monkeypatch.setattr(cache, "_whole", set())  # as in another process
        seen.clear()
        assert converted(find(str(tmp_path / "model.gguf"), report=seen.append), quantization).folder == folder
        assert path.read_bytes() == before
        (warned,) = (event.text for event in seen if isinstance(event, Warned))
        assert warned == f"what model.gguf was converted to in {path.parent} is damaged on the disk, and is made again."


def test_a_full_cache_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(LLAMA, tmp_path / "model.gguf")
    expected = from_folder(find(str(tmp_path / "model.gguf")))
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make = os.mkdir

    def full(path: Any, *rest: Any, **more: Any) -> None:
        if tmp_path / "full" in Path(path).parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        make(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", full)
    seen: list[Event] = []
    base = find(str(tmp_path / "model.gguf"), report=seen.append)
    assert converted(base, None).folder == converted(base, None).folder
    assert_same_weights(load_causal_lm(base, quantization=NF4), load_causal_lm(expected, quantization=NF4))
    assert not (tmp_path / "full").exists() or not list((tmp_path / "full").rglob("*.safetensors"))
    notices = [event.text for event in seen if isinstance(event, Warned)]
    assert len(notices) == 3  # what the file describes, its weights whole and in 4 bits
    assert all("no space left on the disk" in text and "is taken instead" in text for text in notices)


def test_what_a_killed_process_left_is_removed_after_days(tmp_path: Path) -> None:
    old, new = (cache_folder() / "models" / f".{name}.partial" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    write(LLAMA, tmp_path / "model.gguf")
    find(str(tmp_path / "model.gguf"))
    assert (old.exists(), new.exists()) == (False, True)
    assert open_gguf(tmp_path / "model.gguf").tensors
