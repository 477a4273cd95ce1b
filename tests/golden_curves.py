"""Loss curves of small runs, each method on each task: what ``fixtures/golden_curves.json`` holds and how it is made.

    CAPOTUNE_NATIVE=0 python tests/golden_curves.py          # writes the file anew, with the curves of this machine

Models, tokenizer and data are made here from fixed numbers, not by a library's own start, which a new version may
change. The curves are those of PyTorch alone (``CAPOTUNE_NATIVE=0``), in one thread, in fp32.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, PreTrainedTokenizerFast

import capotune
from capotune.device import environment
from capotune.engine.metrics_log import read_metrics

CURVES = Path(__file__).parent / "fixtures" / "golden_curves.json"
TASKS = ("labels", "tags", "text")
METHODS: dict[str, dict[str, Any]] = {
    "feature-extraction": {"trainable_layers": 1},
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "qlora": {"rank": 4, "alpha": 8, "block_size": 32},
    "prompt-tuning": {"num_virtual_tokens": 4, "init": "vocabulary", "deep": False},
}
STEPPED = {
    "epochs": 1, "patience": 1, "batch_size": 8, "learning_rate": 1e-3, "head_learning_rate": 1e-3, "warmup": 0.2,
    "schedule": "linear", "weight_decay": 0.01, "validation_fraction": 0.1,
}  # fmt: skip
"""All said here: another default changes no curve."""
WORDS = ("late", "broken", "paid", "the", "lamp", "order", "was", "my", "please", "twice", "green", "white", "Paris")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def same_machine() -> dict[str, str]:
    """What decides the bits of a run beside its settings: on another one they may differ in the last places."""
    here = environment()
    capability = torch.backends.cpu.get_cpu_capability()
    return {name: here[name] for name in ("processor", "torch", "transformers", "numpy")} | {"capability": capability}


def make_inputs(folder: Path) -> dict[str, dict[str, Any]]:
    """The base and the data of each task."""
    shared: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
                              "max_position_embeddings": 64, "num_hidden_layers": 2}  # fmt: skip
    bert = _saved(AutoModel.from_config(BertConfig(**shared)), folder / "bert")
    config = LlamaConfig(**shared, num_key_value_heads=2, bos_token_id=None, eos_token_id=3, pad_token_id=0)
    llama = _saved(AutoModelForCausalLM.from_config(config), folder / "llama")
    draw = np.random.RandomState(0)
    texts = [" ".join(draw.choice(WORDS[3:10], 5)) for _ in range(60)]
    decided = draw.rand(60, 5) < 0.6  # the others are drawn: where words decided all, a solved head would grow large
    tags = [[_tag(word, known) for word, known in zip(text.split(), row, strict=True)]
            for text, row in zip(texts, decided, strict=True)]  # fmt: skip
    labels = [WORDS[at % 3 if row[0] else draw.randint(3)] for at, row in enumerate(decided)]
    rows: dict[str, list[dict[str, Any]]] = {
        "labels": [{"text": f"{text} {WORDS[at % 3]}", "label": labels[at]} for at, text in enumerate(texts)],
        "tags": [{"tokens": text.split(), "tags": tags[at]} for at, text in enumerate(texts)],
        "text": [{"prompt": text, "completion": f" {WORDS[10 + at % 3]}"} for at, text in enumerate(texts)],
    }
    return {task: {"data": rows[task], "model": str(llama if task == "text" else bert)} for task in TASKS}


def curve(method: str, given: dict[str, Any], out: Path) -> list[float]:
    """The loss of each step, and the held-out score of the epoch."""
    answers = {"answers": 0} if "prompt" in given["data"][0] else {}
    capotune.train(method, out=out, cache=False, **STEPPED, **METHODS[method], **given, **answers)
    return [line[name] for line in read_metrics(out) for name in ("loss", "held_out_score") if name in line]


def _tag(word: str, known: bool) -> str:
    return "B-THING" if known == (word in ("lamp", "order")) else "O"


def _saved(model: Any, folder: Path) -> Path:
    """The model with weights by the legacy generator of NumPy, whose numbers never change."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(weight.shape))
            is_scale = weight.dim() == 1 and name.endswith("weight")
            weight.copy_(torch.from_numpy(0.1 * drawn + float(is_scale)))
    model.save_pretrained(folder)
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if folder.name == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=64
    ).save_pretrained(folder)
    return folder


def main() -> int:
    """Write the file; 1 where the C kernels would compute."""
    if os.environ.get("CAPOTUNE_NATIVE") != "0":
        print("run it with CAPOTUNE_NATIVE=0", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        inputs = make_inputs(Path(name))
        curves = {
            f"{method} {task}": curve(method, inputs[task], Path(name) / method / task)
            for task in TASKS
            for method in METHODS
        }
    CURVES.write_text(json.dumps({"made_on": same_machine(), "curves": curves}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(curves)} curves, {CURVES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
