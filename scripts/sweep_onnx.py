"""The table of docs/export.md: encoder families as ONNX graphs, by the largest difference of a logit.

    python scripts/sweep_onnx.py

A small model of each family gets a head for labels or tags and an adapter whose weights are moved from their start, and
goes through ``capo export --for onnx``. Then ONNX Runtime is asked one batch of rows of different lengths.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from conftest import _save
from helpers import on_base, sequences
from test_onnx import METHODS, SIZES, run, saved, tagger

import capotune

DEBERTA = {
    "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
TWO = SIZES | {"num_hidden_layers": 2}
DISTILBERT = {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 64}
FAMILIES: dict[str, Any] = {
    "BERT (MiniLM)": lambda: transformers.BertConfig(**TWO),
    "DistilBERT": lambda: transformers.DistilBertConfig(**DISTILBERT),
    "RoBERTa": lambda: transformers.RobertaConfig(**TWO | {"max_position_embeddings": 66}, pad_token_id=0),
    "DeBERTa-v3": lambda: transformers.DebertaV2Config(**TWO, **DEBERTA),
    "ModernBERT": lambda: transformers.ModernBertConfig(
        **TWO | {"num_hidden_layers": 3}, local_attention=8, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        cls_token_id=2, sep_token_id=3,
    ),
    "MPNet": lambda: transformers.MPNetConfig(**TWO | {"max_position_embeddings": 66}, pad_token_id=0),
    "ELECTRA": lambda: transformers.ElectraConfig(**TWO, embedding_size=16),
    "Llama, labels by the last token": lambda: transformers.LlamaConfig(**TWO, architectures=["LlamaForCausalLM"]),
    "Qwen3, labels by the last token": lambda: transformers.Qwen3Config(
        **TWO, num_key_value_heads=1, head_dim=16, architectures=["Qwen3ForCausalLM"]
    ),
}  # fmt: skip
CELLS = {
    "labels, LoRA": (on_base, "lora"),
    "labels, QLoRA": (on_base, "qlora"),
    "labels, all layers": (on_base, "head"),
    "labels, deep prompt": (on_base, "deep-prompt"),
    "tags, soft prompt": (tagger, "soft-prompt"),
}
ROWS = [*sequences(11, seed=1, longest=20), [2, 9, 3]]


def difference(base: Path, cell: str, work: Path) -> str:
    """Largest difference of a logit, or why there is none."""
    make, name = CELLS[cell]
    settings: Any = METHODS[name]
    if name == "qlora":
        settings = settings.model_copy(update={"target_modules": ("all-linear",)})
    try:
        assembled = make(base, settings)
        adapter = saved(assembled, work / "adapter")
        capotune.export(adapter, loader="onnx", out=work / "out")
    except capotune.CapotuneError as error:
        return str(error).partition(":")[0][:60]
    found = run(work / "out", ROWS)
    if found.dim() > 2:
        found = torch.cat([row[: len(ids)] for row, ids in zip(found, ROWS, strict=True)])
    return f"{float((found - assembled.task.logits_of_ids(assembled, ROWS)).abs().max()):.0e}"


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"| | {' | '.join(CELLS)} |\n|{' --- |' * (len(CELLS) + 1)}")
    for family, config in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CAPOTUNE_CACHE"] = folder
            base = _save(Path(folder) / "base", config())
            found = []
            for number, cell in enumerate(CELLS):
                (Path(folder) / str(number)).mkdir()
                found.append(difference(base, cell, Path(folder) / str(number)))
            print(f"| {family} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
