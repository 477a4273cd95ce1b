"""Tiny random models for the tests of decoding, and what asks them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from capotune.methods.prompt_tuning.deep import DeepPromptEmbedding, observe_start
from capotune.methods.prompt_tuning.method import PromptEmbedding
from capotune.models.prefix import put_prefixes
from capotune.models.sequence_packing import try_packing
from capotune.settings import DecodingSettings

VOCABULARY, CONTEXT, PAD, END = 40, 48, 0, 1
LETTERS = "  ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnop"
SPECIAL = {"<special>": LETTERS.index("Q")}


def make(kind: str, virtual: int = 0, ends: tuple[int, ...] = (END,), *, deep: bool = False) -> Any:
    """A stand-in for ``Assembled``: a model with large random weights, so that its choices differ from step to step."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.6, "bos_token_id": None}
    shape |= {"eos_token_id": None, "pad_token_id": None}
    if kind in ("llama", "windowed"):
        shape |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= {"intermediate_size": 48, "max_position_embeddings": CONTEXT}
        model: Any = (
            LlamaForCausalLM(LlamaConfig(**shape))
            if kind == "llama"
            else MistralForCausalLM(MistralConfig(sliding_window=4, **shape))
        )
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **shape))
    model.eval().requires_grad_(False)
    if virtual:
        prompt = torch.randn(virtual, 32, generator=torch.Generator().manual_seed(3))
        words = model.get_input_embeddings()
        model.set_input_embeddings(PromptEmbedding(words, prompt))
        if deep:
            seen = observe_start(model.base_model, 2, range(VOCABULARY, VOCABULARY + virtual))
            embedding = DeepPromptEmbedding(words, seen, seen)
            with torch.no_grad():
                for one in embedding.trained().values():
                    one += torch.randn(one.shape, generator=torch.Generator().manual_seed(4))
            model.set_input_embeddings(embedding)
            put_prefixes(model.base_model, [(s.module, p) for s, p in zip(seen, embedding.prefixes(), strict=True)])
    return stand_in(model, virtual, ends)


def stand_in(model: Any, virtual: int = 0, ends: tuple[int, ...] = (END,), decode: Any = None) -> Any:
    decode = decode or (lambda ids: "".join(LETTERS[token] for token in ids))
    task = SimpleNamespace(
        pad_id=PAD,
        end_ids=ends,
        tokenizer=SimpleNamespace(model_max_length=int(1e30)),
        decode=decode,
        decode_after=lambda _before, ids: decode(ids),
        without_open_bytes=list,
        special_ids=lambda texts: [SPECIAL[text] for text in texts if text in SPECIAL],
    )
    return SimpleNamespace(
        model=model,
        task=task,
        method=SimpleNamespace(virtual_token_ids=range(VOCABULARY, VOCABULARY + virtual)),
        backbone=model.base_model,
        packing=try_packing(model.base_model),
    )


def prompts(count: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]


def settings(**values: Any) -> DecodingSettings:
    return DecodingSettings(**{"max_tokens": 10, **values})
