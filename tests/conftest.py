"""Small real models, made here: no network, no downloads. Random weights in Transformers' own architectures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FILLER = ["the", "a", "my", "parcel", "order", "please", "help", "was", "not"]
WORDS = {"late": ["late", "when", "here"], "broken": ["broken", "lamp", "is"], "money": ["paid", "twice", "refund"]}

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache of activations."""
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


def _save(folder: Path, config: object) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    words = [*FILLER, *(word for chosen in WORDS.values() for word in chosen), "card", "lost", "where"]
    vocabulary = {token: at for at, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with 3 blocks of width 32: mean pooling, no padding token trained."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return _save(tmp_path_factory.mktemp("models") / "bert", config)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 2 blocks of width 32 and grouped key/value heads: last-token pooling."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return _save(tmp_path_factory.mktemp("models") / "llama", config)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with 2 blocks of width 32: Conv1D layers, whose weights are stored (in, out)."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, architectures=["GPT2LMHeadModel"]
    )
    return _save(tmp_path_factory.mktemp("models") / "gpt2", config)


@pytest.fixture(scope="session")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 short texts in 3 labels that words decide, 24 of them marked as test rows."""
    import random

    chooser = random.Random(0)
    rows = ["text,label,split"]
    for number in range(96):
        label = list(WORDS)[number % 3]
        text = chooser.choices(FILLER, k=chooser.randint(2, 9)) + chooser.sample(WORDS[label], 2)
        chooser.shuffle(text)
        rows.append(f"{' '.join(text)} {number},{label},{'test' if number % 4 == 3 else 'train'}")
    path = tmp_path_factory.mktemp("data") / "tickets.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
