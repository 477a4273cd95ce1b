"""Models' folders as people have them: what in them is the model, and what is said where nothing is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from commands import capo, tree
from helpers import on_base, shake
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import capotune
from capotune.adapters.fingerprint import earlier_fingerprint, fingerprint
from capotune.adapters.store import save_adapter
from capotune.errors import ModelError
from capotune.methods.lora.settings import LoraSettings
from capotune.models.base import find
from capotune.models.load import load_backbone

IDS = torch.tensor([[2, 5, 9, 14, 3]])
TEXTS = ["my parcel is late", "the lamp is broken"]
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 90868376\n"
TRAINED = {"score": None, "held_out_score": 0.5, "test_rows": 0, "train_rows": 48, "adapter": "lora", "scores": {}}


def in_shards(source: Path, folder: Path) -> Path:
    """The model in three files with their index. Not by Transformers, which renames norms when it saves (5.3)."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{at % 3 + 1:05}-of-00003.safetensors" for at, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def other_weights(source: Path) -> dict[str, torch.Tensor]:
    """The same names and shapes with other values."""
    tensors = load_file(source / "model.safetensors")
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def strewn(source: Path, folder: Path) -> Path:
    """The model in several files, and beside it all that lies about: stale copies, other formats, an adapter."""
    in_shards(source, folder)
    stale = other_weights(source)
    for name in ("model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"):
        save_file(stale, folder / name, {"format": "pt"})
    for name in ("onnx/model.onnx", "onnx/model.onnx_data", "onnx/config.json", "original/consolidated.00.pth",
                 "original/params.json", "checkpoint-10/model.safetensors", "checkpoint-10/trainer_state.json",
                 "pytorch_model.bin", "model.safetensors.index.fp16.json"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    rank = {"r": 2, "lora_alpha": 64, "peft_type": "LORA", "target_modules": ["query"], "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(rank))
    path = "base_model.model.encoder.layer.0.attention.self.query"
    delta = {f"{path}.lora_A.weight": torch.ones(2, 32), f"{path}.lora_B.weight": torch.ones(32, 2)}
    save_file(delta, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def messy(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strewn(bert, tmp_path_factory.mktemp("messy") / "model")


def states(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_backbone(find(str(folder)))(input_ids=IDS).last_hidden_state  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------ second copies


def test_the_index_decides_which_files_are_the_model(bert: Path, messy: Path) -> None:
    base = find(str(messy))
    assert {path.name for path in base.weight_files} == {path.name for path in messy.glob("model-*-of-*.safetensors")}
    assert base.weight_bytes == sum(path.stat().st_size for path in messy.glob("model-*-of-*.safetensors"))
    assert torch.equal(states(messy), states(bert))
    assert fingerprint(base) == fingerprint(find(str(bert)))


def test_a_file_that_the_configuration_names_is_the_model(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    save_file(other_weights(bert), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))
    assert torch.equal(states(folder), states(bert))
    capotune.quantize(str(folder), out=tmp_path / "small")
    assert "transformers_weights" not in json.loads((tmp_path / "small" / "config.json").read_text())


def test_quantizing_leaves_second_copies_behind(bert: Path, messy: Path, tmp_path: Path) -> None:
    capotune.quantize(str(bert), out=tmp_path / "clean")
    capotune.quantize(str(messy), out=tmp_path / "small")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("clean", "small"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    names = {path.name for path in (tmp_path / "small").rglob("*")}
    assert names == {path.name for path in (tmp_path / "clean").rglob("*")}


def test_merging_leaves_second_copies_behind(bert: Path, messy: Path, tmp_path: Path) -> None:
    adapter = on_base(messy, LoraSettings(rank=2))
    shake(adapter)
    save_adapter(tmp_path / "adapter", adapter, TRAINED)
    expected = capotune.load(tmp_path / "adapter").predict_proba(TEXTS)
    capotune.merge(tmp_path / "adapter", out=tmp_path / "merged")
    found = capotune.load(tmp_path / "merged" / "adapter").predict_proba(TEXTS)
    assert abs(found - expected).max() < 1e-5
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in bert.iterdir()} | {"adapter"}


def test_an_adapter_from_before_second_copies_were_left_out_still_loads(messy: Path, tmp_path: Path) -> None:
    adapter = on_base(messy, LoraSettings(rank=2))
    save_adapter(tmp_path / "adapter", adapter, TRAINED)
    record = json.loads((tmp_path / "adapter" / "capotune.json").read_text())
    assert earlier_fingerprint(adapter.base) != record["base"]["fingerprint"]
    record["base"]["fingerprint"] = earlier_fingerprint(adapter.base)
    (tmp_path / "adapter" / "capotune.json").write_text(json.dumps(record))
    assert len(capotune.load(tmp_path / "adapter").predict(TEXTS)) == len(TEXTS)


def test_a_part_of_a_sentence_model_comes_along_with_its_weights(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]
    stored = [{"idx": 0, "path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in modules]
    (folder / "modules.json").write_text(json.dumps(stored))
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    capotune.quantize(str(folder), out=tmp_path / "small")
    assert (tmp_path / "small" / "2_Dense" / "model.safetensors").is_file()


# ----------------------------------------------------------------------------------------------------- where it lies


def test_links_and_slashes_lead_to_the_same_model(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the hub's cache: files are links to blobs; and as people type paths."""
    blobs, snapshot = tmp_path / "home" / "blobs", tmp_path / "home" / "snapshots" / "main"
    shutil.copytree(bert, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (f"{snapshot}/", "~/snapshots/main", "~/snapshots/main/"):
        assert fingerprint(find(name)) == fingerprint(find(str(bert)))
    (blobs / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is a link to a file that is gone"):
        find(str(snapshot))


def test_links_into_the_hubs_cache_alone_are_the_models_own(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to huggingface_hub 0.22 a download into a folder of the user's was links for large files."""
    blobs, folder = tmp_path / "hub" / "models--a--b" / "blobs", tmp_path / "download"
    blobs.mkdir(parents=True)
    shutil.copytree(bert, folder)
    (folder / "tokenizer.json").rename(blobs / "0123")
    (folder / "tokenizer.json").symlink_to(blobs / "0123")
    with pytest.raises(ModelError, match="is a link that leaves the folder"):
        find(str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fingerprint(find(str(folder))) == fingerprint(find(str(bert)))


# ------------------------------------------------------------------------------------------------------- what is said


def write(name: str, content: str | bytes = "{}") -> Callable[[Path], object]:
    """Put a file into the folder."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def cast(dtype: torch.dtype) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})

    return change


def prefixed(prefix: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})

    return change


def said_in(name: str, **values: object) -> Callable[[Path], object]:
    """Change values of a JSON file."""

    def change(folder: Path) -> None:
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**stored, **values}))

    return change


def all_of(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


CHECKS_TYPES = is_dataclass(LlamaConfig)
"""Whether Transformers looks at a config's types, and at its attn_implementation: 5.3 does neither."""
NO_WEIGHTS = without("model.safetensors")
NO_CONFIG = without("config.json")
ADAPTER = '{"base_model_name_or_path": "some/base", "peft_type": "LORA"}'
INDEX = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "index of absent files": (
        write("model.safetensors.index.json", INDEX),
        ("model-00001-of-00002.safetensors and 1 more, which are not there", "remove the index"),
    ),
    "index of nothing": (write("model.safetensors.index.json", "[]"), ("index.json is not an index of weights",)),
    "shards without index": (
        rename("model.safetensors", "model-00001-of-00002.safetensors"),
        ("it holds model-00001-of-00002.safetensors", "Download model.safetensors.index.json"),
    ),
    "a variant alone": (
        rename("model.safetensors", "model.fp16.safetensors"), ("it holds model.fp16", "copy model.fp16.safetensors to")
    ),
    "the makers' form": (
        rename("model.safetensors", "consolidated.safetensors"), ("the form of the model's makers", "convert")
    ),
    "the makers' form, pickled": (
        all_of(NO_WEIGHTS, NO_CONFIG, write("consolidated.00.pth"), write("params.json")),
        ("no config.json in", "consolidated.00.pth, the form of the model's makers", "convert_"),
    ),
    "pickled alone": (
        all_of(NO_WEIGHTS, write("pytorch_model.bin")), ("pytorch_model.bin, which can run code", "save_pretrained")
    ),
    "another library's alone": (all_of(NO_WEIGHTS, write("tf_model.h5")), ("It holds tf_model.h5",)),
    "a pointer for the weights": (
        write("model.safetensors", POINTER), ("model.safetensors in", "pointer of Git LFS", "git lfs pull")
    ),
    "a pointer for the tokenizer": (write("tokenizer.json", POINTER), ("tokenizer.json in", "pointer of Git LFS")),
    "no bytes": (write("model.safetensors", ""), ("model.safetensors: not a complete safetensors file",)),
    "an adapter of PEFT": (
        all_of(emptied, write("adapter_config.json", ADAPTER)), ("is an adapter of some/base", "merge it with PEFT")
    ),
    "an adapter": (
        all_of(emptied, write("adapter_config.json", ADAPTER), write("capotune.json")),
        ("is an adapter of some/base", "capo info"),
    ),
    "a run": (all_of(emptied, write("run.json"), write("adapter/capotune.json")), ("is a run", "Its adapter is")),
    "the model in a folder inside": (
        all_of(emptied, write("0_Transformer/config.json")), ("no config.json in", "Did you mean", "0_Transformer?")
    ),
    "nothing": (emptied, ("is empty",)),
    "config of another form": (write("config.json", "[]"), ("config.json: expected an object, found a list",)),
    "config without a type": (write("config.json", '{"hidden_size": 32}'), ("cannot be used", "model_type")),
    "config with a text for a number": (
        said_in("config.json", hidden_size="32"),
        ("config.json cannot be used", "'hidden_size' expected int, got str" if CHECKS_TYPES else "ints,but got str"),
    ),
    "config of other widths": (said_in("config.json", num_attention_heads=5), ("config.json cannot be used",)),
    "code of its own": (
        said_in("config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"}),
        ("asks for Python code of its own", "give --trust-remote-code"),
    ),
    "another attention library": (
        said_in("config.json", attn_implementation="flash_attention_2"), ("cannot be used", "FlashAttention2")
    ),
    "tokenizer of an unknown class": (
        all_of(without("tokenizer.json"), said_in("tokenizer_config.json", tokenizer_class="Mine")),
        ("names the class Mine, which Transformers", "tokenizer.save_pretrained"),
    ),
    "8 bits": (cast(torch.float8_e4m3fn), ("has the dtype F8_E4M3", "F32, BF16 or F16")),
    "a compiled model": (prefixed("_orig_mod."), ("it holds them as _orig_mod.", "A wrapper was saved")),
    "a model of DataParallel": (prefixed("module."), ("it holds them as module.", "A wrapper was saved")),
    "a model in PEFT": (prefixed("base_model.model."), ("it holds them as base_model.model.", "A wrapper was saved")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_used_is_refused_in_one_message(
    case: str, bert: Path, tickets: Path, tmp_path: Path
) -> None:
    if case == "another attention library" and not CHECKS_TYPES:
        pytest.skip("Transformers 5.3 takes its own attention instead")
    change, words = REFUSED[case]
    folder = shutil.copytree(bert, tmp_path / "model")
    change(folder)
    before = tree(tmp_path)
    ran = capo("train", "lora", "--data", tickets, "--model", folder, "--out", tmp_path / "run", "--epochs", 1)
    assert ran.code == 2, ran
    assert "Traceback" not in ran.said
    assert f"--model {folder}" in ran.said
    for word in words:
        assert word in ran.said.replace("\n", " "), ran.said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_wrapper_is_named_where_weights_are_quantized(prefix: str, bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    prefixed(prefix)(folder)
    with pytest.raises(ModelError, match=f"no linear layer's weight is stored.*it holds them as {prefix}"):
        capotune.quantize(str(folder), out=tmp_path / "small")


def test_a_file_is_refused_with_its_folder(bert: Path) -> None:
    with pytest.raises(ModelError, match=f"a file and no folder. Give the folder that it is in: {bert}"):
        find(str(bert / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_mixed_dtypes_are_read(dtype: torch.dtype, bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    path = folder / "model.safetensors"
    mixed = {name: tensor.to(dtype) if "dense" in name else tensor for name, tensor in load_file(path).items()}
    save_file(mixed, path, {"format": "pt"})
    torch.testing.assert_close(states(folder), states(bert), rtol=0, atol=2e-2)
    assert not torch.equal(states(folder), states(bert))


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("name", "content", "libraries"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00", "sentencepiece protobuf"),
        ("spm.model", b"\n\x0e\n\x05<unk>\x15\x00\x00", "sentencepiece protobuf"),
        ("tokenizer.model", b"AA== 0\nAQ== 1\n", "tiktoken"),
    ],
)
def test_a_tokenizer_of_another_library_alone_is_refused_with_the_libraries(
    name: str, content: bytes, libraries: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils

    for library in ("sentencepiece", "protobuf", "tiktoken"):
        monkeypatch.setattr(transformers.utils, f"is_{library}_available", lambda: False)
    folder = shutil.copytree(llama, tmp_path / "model")
    all_of(without("tokenizer.json", "tokenizer_config.json"), write(name, content))(folder)
    with pytest.raises(ModelError, match=f"stored as {name} alone.* Run: pip install {libraries}$"):
        _ = find(str(folder)).tokenizer


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")  # Transformers 5.3 of tokenizers
def test_a_vocabulary_alone_is_a_tokenizer(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    whole = find(str(folder)).tokenizer
    without("tokenizer.json", "tokenizer_config.json")(folder)
    (folder / "vocab.txt").write_text("\n".join(whole.convert_ids_to_tokens(range(len(whole)))) + "\n")
    assert find(str(folder)).tokenizer(TEXTS)["input_ids"] == whole(TEXTS)["input_ids"]
