"""Rows that leave their batch when their answer has ended: the others must not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding_models import END, PAD, make, prompts, settings
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from capotune.evaluation import roomy_cache
from capotune.evaluation.generate import generate
from capotune.evaluation.leaving import can_leave
from capotune.evaluation.roomy_cache import RoomyCache
from capotune.kernels import policy


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 1.5, "seed": 4},
        {"repetition_penalty": 1.4},
        {"stop": ("A", "e", "<special>")},
        {"temperature": 1.2, "repetition_penalty": 1.2, "stop": ("b",)},
    ],
)
@pytest.mark.parametrize(("kind", "virtual"), [("llama", 0), ("llama", 4), ("gpt2", 0)])
def test_answers_are_those_of_rows_that_stay(
    kind: str, virtual: int, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assembled, rows = make(kind, virtual, ends=(END, 5, 9)), prompts(16)
    computed = [0]
    assembled.model.register_forward_pre_hook(
        lambda _model, _arguments, named: computed.__setitem__(0, computed[0] + len(named["input_ids"])),
        with_kwargs=True,
    )
    left = generate(assembled, rows, settings(max_tokens=24, **asked))
    with_leaving, computed[0] = computed[0], 0
    monkeypatch.setattr(policy, "LEAVING_FROM_ROWS", 17)
    assert left == generate(assembled, rows, settings(max_tokens=24, **asked))
    assert with_leaving < computed[0], "nobody left"


def test_a_cache_with_room_holds_what_a_dynamic_cache_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roomy_cache, "ROOM", 3)
    caches = (DynamicCache(), RoomyCache())
    generator = torch.Generator().manual_seed(0)
    before = 4
    for rows, tokens in [(4, 5), (4, 1), (4, 1), (4, 2), (4, 6), (2, 1), (2, 1), (1, 4), (1, 1)]:
        if rows < before:
            for cache in caches:
                cache.batch_select_indices(torch.arange(before)[-rows:])
        new = [torch.randn(rows, 2, tokens, 3, generator=generator) for _ in range(2)]
        expected, found = (cache.update(*new, 0) for cache in caches)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        before = rows


def test_a_model_is_tried_before_rows_leave() -> None:
    assert can_leave(make("llama").model, PAD)
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2)
    assert not can_leave(MambaForCausalLM(config).eval(), PAD)  # its states cannot be taken by rows
    lying = make("llama").model
    lying.model.layers[0].register_forward_hook(lambda _module, _inputs, output: output + output.mean(0, keepdim=True))
    assert not can_leave(lying, PAD)  # a row's scores depend on the others
