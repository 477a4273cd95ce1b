"""A row's answer does not depend on the rows beside it, and every row is used once."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import logits, on_base, sequences, shake

from capotune.data.batches import Batch, TokenRows, collate, epoch_order, like_length, sorted_order, tokens_at_once
from capotune.kernels.attention import Sequences
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import Pooling
from capotune.settings import TrainingSettings
from capotune.tasks.text_targets.model import pool, pool_padded, pooled_positions

VARIANTS: dict[str, TrainingSettings] = {
    "features": FeatureExtractionSettings(),
    "features-k1": FeatureExtractionSettings(trainable_layers=1),
    "lora": LoraSettings(rank=4),
    "lora-dora": LoraSettings(rank=4, dora=True),
    "qlora": QloraSettings(rank=4),
    "prompt-tuning": PromptTuningSettings(num_virtual_tokens=6, deep=False),
}
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "last", "max")


@pytest.fixture
def models(bert: Path, llama: Path, gpt2: Path) -> dict[str, Path]:
    return {"bert": bert, "llama": llama, "gpt2": gpt2}


@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_alone_or_in_a_padded_batch(variant: str, pooling: Pooling, base: str, models: dict[str, Path]) -> None:
    assembled = on_base(models[base], VARIANTS[variant], pool=pooling)
    shake(assembled)
    rows = [*sequences(6, seed=2, longest=20), [2, 3], [2, 9, 3]]
    together = logits(assembled, rows)
    alone = torch.cat([logits(assembled, [row]) for row in rows])
    assert (together[0] - together[1]).abs().max() > 1e-4 or pooling == "cls"
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
def test_the_padding_id_does_not_matter(base: str, models: dict[str, Path]) -> None:
    assembled = on_base(models[base], VARIANTS["lora"])
    shake(assembled)
    rows = sequences(5, seed=2)
    outputs = []
    for pad_id in (0, 17):
        batch = collate(rows, np.arange(5), pad_id)
        assert (batch.input_ids == pad_id).any()
        with torch.no_grad():
            outputs.append(assembled.model(batch.input_ids, batch.attention_mask).logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def pooled(batch: Batch, states: torch.Tensor, pooling: Pooling, skip: int) -> torch.Tensor:
    """One vector per row of (rows, longest, hidden)."""
    at = pooled_positions(batch.starts, pooling, skip)
    flat = batch.flat(states)
    return pool(flat if at is None else flat[at], batch.starts, pooling, skip)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pooling", ["last", "weightedmean", "mean_sqrt_len_tokens"])
def test_long_rows_in_16_bits_are_pooled_as_in_fp32(pooling: Pooling, dtype: torch.dtype) -> None:
    """Positions above 256 have no exact value in bf16, and their sum above 362 none in fp16."""
    generator, lengths = torch.Generator().manual_seed(0), torch.tensor([512, 301])
    states = torch.randn(2, 512, 4, generator=generator).to(dtype)
    mask = (torch.arange(512) < lengths[:, None]).long()
    expected = pool_padded(states.float(), mask, pooling, 0)
    flat, starts = states[mask.bool()], torch.tensor([0, 512, 813])
    at = pooled_positions(starts, pooling, 0)
    packed = pool(flat if at is None else flat[at], starts, pooling, 0)
    for found in (pool_padded(states, mask, pooling, 0), packed):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_ignores_padding_and_virtual_tokens(pooling: Pooling) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 8, 4, generator=generator)
    lengths = [8, 5, 3]
    mask = torch.tensor([[1] * length + [0] * (8 - length) for length in lengths])
    by_hand = {
        "mean": lambda rows: rows.mean(0),
        "max": lambda rows: rows.max(0).values,
        "cls": lambda rows: rows[0],
        "last": lambda rows: rows[-1],
    }[pooling]
    expected = torch.stack([by_hand(row[2:length]) for row, length in zip(states, lengths, strict=True)])
    batch = Batch(mask, Sequences(tuple(lengths)), mask)
    found = pooled(batch, states, pooling, 2)
    torch.testing.assert_close(found, expected)
    noisy = states.clone()
    noisy[:, :2] = 1e4
    noisy[mask == 0] = -1e4
    assert torch.equal(pooled(batch, noisy, pooling, 2), found)
    torch.testing.assert_close(pool_padded(noisy, mask, pooling, 2), expected)


@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_prompt_touches_its_text_and_is_not_pooled(pooling: Pooling, base: str, models: dict[str, Path]) -> None:
    """A prompt of real words is what those words before the text give, with their positions left out of the pooling."""
    assembled = on_base(models[base], VARIANTS["prompt-tuning"], pool=pooling, tokens=[7, 8, 9, 10, 11, 12])
    rows = sequences(5, seed=4)
    found = logits(assembled, rows)
    assembled.method.detach()  # the words themselves, in the plain embedding
    batch = collate([[7, 8, 9, 10, 11, 12, *row] for row in rows], np.arange(5), 0)
    with torch.no_grad():
        hidden = assembled.model.backbone(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        expected = assembled.model.classifier(pooled(batch, hidden, pooling, 6))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_virtual_ids_are_outside_the_vocabulary(bert: Path) -> None:
    assembled = on_base(bert, VARIANTS["prompt-tuning"])
    assert assembled.method.virtual_token_ids == range(40, 46)
    batch = TokenRows([[2, 9, 3], [2, 3]], 0, assembled.method.virtual_token_ids).batch(np.array([1, 0]))
    assert batch.input_ids.tolist() == [[*range(40, 46), 2, 3, 0], [*range(40, 46), 2, 9, 3]]
    assert batch.attention_mask.tolist() == [[1] * 8 + [0], [1] * 9]


# -------------------------------------------------------------------------------------------------------------- batches

LENGTHS = [
    [5],
    list(range(1, 100)),
    np.random.default_rng(0).integers(1, 200, 3571).tolist(),  # more than one pool of batches
    [9] * 64,
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_epoch_holds_every_row_once(lengths: list[int], batch_size: int, mixed: bool) -> None:
    batches = epoch_order(lengths, batch_size, seed=3, epoch=2, mixed=mixed)
    assert sorted(itertools.chain.from_iterable(batch.tolist() for batch in batches)) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert max(map(len, batches)) <= batch_size


@pytest.mark.parametrize("mixed", [False, True])
def test_the_order_is_a_function_of_seed_and_epoch(mixed: bool) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in epoch_order(LENGTHS[2], 32, seed, epoch, mixed=mixed)]

    first = order(0, 0)
    np.random.default_rng().random(5)
    torch.rand(5)
    assert order(0, 0) == first
    others = [order(0, 1), order(1, 0), order(1, 1), order(2, 0)]
    assert all(one != other for one, other in itertools.combinations([first, *others], 2))


def test_mixed_batches_have_nearly_as_many_tokens_as_each_other() -> None:
    lengths = LENGTHS[2][:3552]  # 111 whole batches
    tokens = np.array([sum(lengths[row] for row in batch) for batch in epoch_order(lengths, 32, 0, 0, mixed=True)])
    assert tokens.std() < 0.01 * tokens.mean()
    first, second = (
        {frozenset(batch.tolist()) for batch in epoch_order(lengths, 32, 0, epoch, mixed=True)} for epoch in (0, 1)
    )
    assert first.isdisjoint(second)


def test_lengths_are_alike_that_are_less_than_a_quarter_apart() -> None:
    for _, together in itertools.groupby(range(1, 3000), like_length):
        lengths = list(together)
        assert lengths[-1] <= 1.25 * lengths[0] + 1


def test_little_padding() -> None:
    lengths = LENGTHS[2]

    def padded(batches: list[np.ndarray]) -> float:
        return sum(max(lengths[row] for row in batch) * len(batch) for batch in batches) / sum(lengths)

    assert padded(epoch_order(lengths, 32, 0, 0)) < 1.05
    assert padded(sorted_order(lengths, tokens_at_once(torch.device("cpu")))) < 1.05


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_inference_holds_every_row_once_within_the_budget(lengths: list[int]) -> None:
    batches = sorted_order(lengths, token_budget=400)
    assert sorted(itertools.chain.from_iterable(batch.tolist() for batch in batches)) == list(range(len(lengths)))
    assert all(max(lengths[row] for row in batch) * len(batch) <= 400 or len(batch) == 1 for batch in batches)


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    assert [batch.tolist() for batch in sorted_order([3, 900, 4], token_budget=100)] == [[0, 2], [1]]
