"""``capo export --for onnx``: one graph of base, adapter and head, which gives what ``predict`` computes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import generation_helpers
import numpy as np
import pytest
import torch
from commands import capo, tree
from conftest import _save
from helpers import TRAINED, on_base, sequences, shake
from transformers import BertConfig

import capotune
from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.adapters.store import save_adapter
from capotune.data.batches import collate
from capotune.errors import AdapterError, MissingLibraryError, SettingError
from capotune.methods.base import Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import find
from capotune.runs import onnx as module
from capotune.settings import TrainingSettings
from capotune.tasks.token_classification import TokenClassification

DOCS = Path(__file__).parents[1] / "docs" / "export.md"
METHODS: dict[str, TrainingSettings] = {
    "lora": LoraSettings(rank=4, alpha=8),
    "dora": LoraSettings(rank=4, alpha=8, dora=True),
    "qlora": QloraSettings(rank=4, alpha=8, target_modules=("query",)),
    "head": FeatureExtractionSettings(),
    "last-block": FeatureExtractionSettings(trainable_layers=1),
    "soft-prompt": PromptTuningSettings(num_virtual_tokens=3, deep=False),
    "deep-prompt": PromptTuningSettings(num_virtual_tokens=3, deep=True),
}
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
ROWS = [*sequences(6, seed=3), [2, 9, 3]]


def saved(assembled: Assembled, folder: Path) -> Path:
    """As an adapter folder, its weights moved from where they start."""
    shake(assembled)
    save_adapter(folder, assembled, TRAINED | {"scores": {}})
    return folder


def tagger(base: Path, settings: Any) -> Assembled:
    found = find(str(base))
    task = TokenClassification.on(found, ["PER"], None, settings.virtual_tokens, 100)
    assembled = assemble(task, settings, device=torch.device("cpu"))
    attach(assembled, Start(torch.Generator().manual_seed(0), [9, 10]))
    return assembled


def run(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """ONNX Runtime's own answer to one batch."""
    import onnxruntime

    batch = collate(rows, np.arange(len(rows)), 0)
    assert batch.attention_mask is not None
    given = {"input_ids": batch.input_ids.numpy(), "attention_mask": batch.attention_mask.numpy()}
    (logits,) = onnxruntime.InferenceSession(folder / "model.onnx").run(None, given)
    return torch.from_numpy(logits)


# -------------------------------------------------------------------------------------------------------- one graph


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_graph_computes_what_predict_reads(method: str, bert: Path) -> None:
    """Of every method, before it is written: merged, in full precision, with its prompt inside."""
    assembled = on_base(bert, METHODS[method], pool="weightedmean" if method == "dora" else None)
    shake(assembled)
    expected = assembled.task.logits_of_ids(assembled, ROWS)
    assembled.method.merge()
    module.dequantize_layers(assembled)
    batch = collate(ROWS, np.arange(len(ROWS)), 0)
    assert batch.attention_mask is not None
    found = module.Graph(assembled.model, assembled.method.virtual_token_ids)(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A QLoRA adapter for labels, its graph, and what the command said. One block: exporting takes seconds for each."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    adapter = saved(on_base(_save(folder / "bert", BertConfig(**SIZES)), METHODS["qlora"]), folder / "adapter")
    ran = capo("export", adapter, "--for", "onnx", "--out", folder / "out")
    assert ran.code == 0, ran.err
    return adapter, folder / "out", ran.out


def test_labels_of_any_batch_and_length_are_the_adapters(labels: tuple[Path, Path, str]) -> None:
    adapter, out, said = labels
    assembled = capotune.load(adapter)._assembled
    longest = [2, *[5 + at % 20 for at in range(62)], 3]
    for rows in (ROWS, [longest], [[2, 9, 3]], [[9]], [longest, [9], *ROWS]):
        expected = assembled.task.logits_of_ids(assembled, rows)
        torch.testing.assert_close(run(out, rows), expected, rtol=1e-4, atol=1e-4)
    assert "written as one graph" in said
    assert re.search(r"differ from the adapter's by at most \d\S*e-0[6-9]\.", " ".join(said.split()))
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.onnx", "tokenizer.json"]
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["id2label"] == {"0": "late", "1": "broken", "2": "money"}
    assert config["hidden_size"] == 32


def test_example_of_the_docs_labels_as_the_adapter(labels: tuple[Path, Path, str], tmp_path: Path) -> None:
    """With ONNX Runtime and tokenizers alone."""
    adapter, out, _ = labels
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    (tmp_path / "out").symlink_to(out)
    alone = "\nimport sys; assert not {'torch', 'transformers', 'capotune'} & set(sys.modules)\n"
    ran = subprocess.run([sys.executable, "-c", example + alone], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    texts = re.findall(r'"(.*?)"', re.findall(r"texts = \[(.*?)\]", example)[0])
    lines = zip(capotune.load(adapter).predict(texts), texts, strict=True)
    assert ran.stdout == "".join(f"{label} {text}\n" for label, text in lines)


def test_tags_after_a_soft_prompt_are_the_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights in a file of their own, as those of a large model."""
    pytest.importorskip("onnxruntime")
    assembled = tagger(_save(tmp_path / "bert", BertConfig(**SIZES)), METHODS["soft-prompt"])
    adapter = saved(assembled, tmp_path / "adapter")
    monkeypatch.setattr(module, "_ONE_FILE", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the exporter's own, none reaches a user
        result = capotune.export(adapter, loader="onnx", out=tmp_path / "out")
    assert result["files"] == ["config.json", "model.onnx", "model.onnx.data", "tokenizer.json"]
    expected = assembled.task.logits_of_ids(assembled, ROWS)
    found = run(tmp_path / "out", ROWS)
    found = torch.cat([row[: len(ids)] for row, ids in zip(found, ROWS, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def unwritten(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter; the exporter is not run."""
    monkeypatch.setattr(module, "_trace", lambda *_, **__: None)
    return saved(on_base(bert, METHODS["lora"]), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "said"), [(lambda found: found + 0.01, "differ from the adapter's by"),
                         (lambda found: found * float("nan"), "differ from the adapter's by nan")],
)  # fmt: skip
def test_graph_that_answers_otherwise_is_not_written(
    change: Any, said: str, unwritten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembled = capotune.load(unwritten)._assembled
    monkeypatch.setattr(module, "read_onnx", lambda _, ids, *__: change(assembled.task.logits_of_ids(assembled, ids)))
    before = tree(tmp_path)
    with pytest.raises(AdapterError, match=said):
        capotune.export(unwritten, loader="onnx", out=tmp_path / "out")
    assert tree(tmp_path) == before


def test_model_that_cannot_be_traced_is_refused_with_the_reason(
    unwritten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("no such op\nand more")

    monkeypatch.setattr(module, "_trace", fail)
    with pytest.raises(AdapterError, match=r"as a graph: no such op.*loader=transformers"):
        capotune.export(unwritten, loader="onnx", out=tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingLibraryError, match=r"onnxscript is needed .* pip install 'capotune\[onnx\]'"):
        capotune.export(unwritten, loader="onnx", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "way_out"), [("lora", "llama.cpp"), ("soft-prompt", "peft")])
def test_adapter_that_writes_text_is_refused(method: str, way_out: str, llama_writer: Path, tmp_path: Path) -> None:
    adapter = saved(generation_helpers.on_base(llama_writer, METHODS[method]), tmp_path / "adapter")
    with pytest.raises(SettingError, match=f"gives labels or tags, and this adapter writes text.*loader={way_out}"):
        capotune.export(adapter, loader="onnx", out=tmp_path / "out")
