"""The language model of ``engine.py`` and what it reads: made here, since neither is at hand at this size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine_data import DEVICE, NOT_LEARNED, dtype_of
from _engine_workloads import SHAPES, Workload
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_WORDS = {"<pad>": 0, "<end>": 1, "a": 2, "b": 3}  # a tokenizer that nobody uses, but all want to load
_ONLY_READ = 64  # tokens at the start of a row whose length is given


def write_text(work: Workload, folder: Path) -> tuple[dict[str, Any], str]:
    """Save the model; its rows, and where their lengths are from, in words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[work.shape], max_position_embeddings=8192, pad_token_id=0, bos_token_id=None, eos_token_id=1
    )
    with DEVICE, default_dtype(dtype_of(work)):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    words = Tokenizer(WordLevel(_WORDS, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>").save_pretrained(
        folder / "model"
    )
    (folder / "base.json").write_text(json.dumps({"folder": str(folder / "model")}), encoding="utf-8")
    return completions(work)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new tensors have it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def completions(work: Workload) -> tuple[dict[str, Any], str]:
    """Prompts with completions, which are learned. Ids are drawn with frequencies like words', so that there is
    something to learn and losses fall."""
    generator = np.random.default_rng(0)
    path = work.data() / "train.jsonl"
    if work.tokens:
        count = work.rows or 1
        lengths = [(_ONLY_READ, work.tokens - _ONLY_READ)] * count
        source = f"{count} rows of {work.tokens:,} tokens"
    elif path.is_file():
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lengths = [(math.ceil(len(one["question"]) / 4), math.ceil(len(one["answer"]) / 4)) for one in records]
        source = "lengths of GSM8K's train.jsonl"
    else:
        drawn = generator.lognormal((4.0, 4.2), (0.4, 0.5), (4000, 2))
        lengths, source = [(math.ceil(p), math.ceil(c)) for p, c in drawn], "GSM8K is not there: lognormal lengths"
    sequences, targets, vocabulary = [], [], SHAPES[work.shape]["vocab_size"]
    for prompt, completion in lengths[: work.rows]:
        ids = (generator.zipf(1.2, prompt + completion) % (vocabulary - len(_WORDS)) + len(_WORDS)).tolist()
        sequences.append(ids)
        targets.append([NOT_LEARNED] * prompt + ids[prompt:])
    return {"sequences": sequences, "targets": targets}, source
