"""Attention with a deep prompt's keys and values before each sequence's own, which no token stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_helpers import examples, on_base
from torch import nn

from capotune.data.batches import collate
from capotune.engine.loop import accumulate
from capotune.evaluation.forward import outputs
from capotune.kernels import policy
from capotune.kernels.attention import Sequences
from capotune.kernels.blocks import BERT, LLAMA, Block, Call, Linear, Norm, reference
from capotune.kernels.composed_block import ComposedBlock
from capotune.kernels.lora_linear import LinearLayer
from capotune.kernels.prefix import LayerPrefix, Places, prefixed_attention, prefixed_attention_reference
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.models.sequence_packing import Packing

HEADS, KEY_HEADS, SIZE, VIRTUAL = 4, 2, 8, 3
LONG = policy.SHORT_ATTENTION_LENGTH + 1
DEEP = PromptTuningSettings(deep=True, num_virtual_tokens=VIRTUAL)


class Normal:
    """Random tensors, the same in each test."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def prefix_of(normal: Normal) -> LayerPrefix:
    keys, values = (nn.Parameter(normal(VIRTUAL, KEY_HEADS, SIZE)) for _ in range(2))
    return LayerPrefix(keys, values, Places(), resting=1)


def with_gradients(computed: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    parts = torch.linspace(-1, 1, computed.numel()).view(computed.shape)
    return [computed.detach(), *torch.autograd.grad((computed * parts).sum(), leaves)]


@pytest.mark.parametrize("lengths", [(5, 1, 9, 9), (LONG, 2)])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 4)])
def test_prefixed_attention_matches_the_reference(lengths: tuple[int, ...], causal: bool, window: int | None) -> None:
    normal, sequences, how = Normal(), Sequences(lengths, VIRTUAL), {"causal": causal, "scale": 0.4, "window": window}
    prefix, tokens = prefix_of(normal), sum(lengths)
    q, k, v = (normal(tokens, heads, SIZE).requires_grad_() for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    leaves = q, k, v, prefix.keys, prefix.values
    found = with_gradients(prefixed_attention(prefix, q, k, v, sequences, **how), *leaves)
    expected = with_gradients(prefixed_attention_reference(prefix, q, k, v, sequences, **how), *leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not found[4][0].any(), "the first vector rests"
    assert found[4][1:].any()


@pytest.mark.parametrize("ops", [BERT, LLAMA], ids=["bert", "llama"])
def test_a_block_with_a_prefix_matches_the_reference(ops: Any) -> None:
    normal, hidden, kv = Normal(), HEADS * SIZE, KEY_HEADS * SIZE
    names = [name for op in ops if isinstance(op, Linear) for name in op.layers]
    shapes = dict.fromkeys(names, (hidden, hidden)) | {"k": (kv, hidden), "v": (kv, hidden)}
    layers = {name: LinearLayer((normal(*shapes[name]) / hidden**0.5).to, None) for name in names}
    norms = {name: Norm(1 + 0.1 * normal(hidden), 0.1 * normal(hidden), 1e-5) for name in ("norm1", "norm2")}
    prefix, causal = prefix_of(normal), ops is LLAMA
    block = Block(ops, layers, norms, SIZE, SIZE**-0.5, causal, prefix=prefix)
    sequences, x = Sequences((5, 2), VIRTUAL), normal(7, hidden)
    angles = normal(7, SIZE // 2).repeat(1, 2)
    call = Call(sequences, (angles.cos(), angles.sin()), rows=torch.tensor([4, 6]))
    found = with_gradients(ComposedBlock(block)(x, call), prefix.keys, prefix.values)
    expected = with_gradients(reference(block, x, call), prefix.keys, prefix.values)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    without = reference(replace(block, prefix=None), x, replace(call, sequences=Sequences((5, 2))))
    assert (without - expected[0]).abs().max() > 1e-2, "the prefix is read"


def test_packed_placeholders_are_left_out_and_positions_go_on_after_them() -> None:
    how: dict[str, Any] = {"first_position": 2, "prefix": (90, 91, 92)}
    rows, sequences = np.array([1, 0]), [[5], [6, 7]]
    batch = collate(sequences, rows, 0, targets=[[8], [9, 10]], placeholders=True, **how)
    assert batch.input_ids.tolist() == [[6, 7, 5]]
    assert batch.sequences == Sequences((2, 1), 3)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[5, 6, 5]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [9, 10, 8]
    words = collate(sequences, rows, 0, placeholders=False, **how)
    assert words.input_ids.tolist() == [[90, 91, 92, 6, 7, 90, 91, 92, 5]]
    assert words.position_ids is not None
    assert words.position_ids.tolist() == [[2, 3, 4, 5, 6, 2, 3, 4, 5]]


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_without_placeholders_outputs_and_gradients_are_those_with_them(base: str, writers: dict[str, Path]) -> None:
    packed, padded = (on_base(writers[base], DEEP) for _ in range(2))
    assert packed.packing.first_position is not None
    vars(padded)["packing"] = Packing(None, "to compare with")
    found, expected = [], []
    for assembled, results in ((packed, found), (padded, expected)):
        rows = examples(assembled, 6).after(assembled.method.virtual_token_ids)
        results.append(outputs(assembled, rows))
        with assembled.reading():
            accumulate(assembled, rows, np.arange(6), DEEP.model_copy(update={"batch_size": 6, "epochs": 1}))
        results += [one.grad for one in assembled.method.parameters().values()]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
