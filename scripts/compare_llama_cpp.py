"""Next-token distributions of llama.cpp with what ``capo export`` writes, against ours, on SmolLM2.

llama.cpp goes into an environment of its own, where it is compiled (some minutes):

    python -m venv llama && llama/bin/pip install llama-cpp-python==0.3.36
    python scripts/compare_llama_cpp.py llama/bin/python

A LoRA of rank 8 with random weights is put on SmolLM2 and exported: as a GGUF adapter beside the base's own file, and
as whole models. Each is asked the same text; the divergence is that of llama.cpp's distributions from ours, in nats a
token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import capotune
from capotune.adapters.assemble import assemble, attach
from capotune.adapters.store import read_adapter, save_adapter
from capotune.evaluation.divergence import SHORT_TEXT, compare_logits
from capotune.methods.base import Start
from capotune.methods.lora.settings import LoraSettings
from capotune.models.base import find
from capotune.settings import Context
from capotune.tasks.generation import Generation
from capotune.tasks.loading import load_adapter, load_plain

CPU = torch.device("cpu")
TRAINED = {"held_out_score": 1.0, "train_rows": 0, "test_rows": 0, "scores": {}}
THEIRS = """
import json, sys
import numpy as np
from llama_cpp import Llama
asked = json.load(open(sys.argv[1]))
model = Llama(asked["model"], lora_path=asked["lora"], logits_all=True, n_ctx=512, n_threads=1, verbose=False)
model.eval(asked["ids"])
np.save(asked["out"], np.array(model.scores[: len(asked["ids"])], dtype=np.float32))
"""


def make_adapter(folder: Path) -> Path:
    """A LoRA whose B is not zero."""
    base = find("smollm2")
    settings = LoraSettings(rank=8, alpha=16, rslora=True).completed(Context(base.hidden_size, has_head=False))
    assembled = assemble(Generation.on(base, None, 0), settings, device=CPU)
    generator = torch.Generator().manual_seed(0)
    attach(assembled, Start(generator))
    with torch.no_grad():
        for weight in assembled.trainable().values():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    save_adapter(folder, assembled, TRAINED)
    return folder


@torch.no_grad()
def ours(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary)."""
    return model(input_ids=torch.tensor([ids])).logits[0]


def theirs(python: str, work: Path, model: Path, lora: Path | None, ids: list[int]) -> torch.Tensor:
    """llama.cpp's logits."""
    asked = {"model": str(model), "lora": None if lora is None else str(lora), "ids": ids, "out": str(work / "out.npy")}
    (work / "asked.json").write_text(json.dumps(asked))
    subprocess.run([python, "-c", THEIRS, str(work / "asked.json")], check=True)
    return torch.from_numpy(np.load(work / "out.npy"))


def main(python: str) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        adapter, base = make_adapter(work / "adapter"), find("smollm2")
        capotune.export(adapter, loader="llama.cpp", out=work / "lora")
        ids = base.tokenizer(SHORT_TEXT)["input_ids"]
        plain = ours(load_plain(base, device=CPU).model, ids)
        changed = ours(load_adapter(read_adapter(adapter), model=None, device=CPU).model, ids)
        assert base.gguf is not None
        source = base.gguf.path
        lora = work / "lora" / "adapter.gguf"
        rows = [("base, its own file (Q4_1)", source, None, plain), ("base + adapter.gguf", source, lora, changed)]
        for kind in ("F32", "F16", "Q8_0"):
            capotune.export(adapter, loader="llama.cpp", out=work / kind, merged=True, gguf_type=kind)
            rows.append((f"merged, {kind}", work / kind / "model.gguf", None, changed))
        print(
            "| llama.cpp with | KL from ours | same most probable token | KL from our base |\n| --- | --- | --- | --- |"
        )
        for what, model, with_lora, expected in rows:
            found = theirs(python, work, model, with_lora, ids)
            near, far = compare_logits(expected, found), compare_logits(plain, found)
            print(
                f"| {what} | {near.kl_divergence:.2g} | {near.top1_agreement:.1%} | {far.kl_divergence:.2g} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1])
