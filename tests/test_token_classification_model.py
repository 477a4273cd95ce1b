"""The model of token classification: states of words, packed and padded, and what other programs get of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capotune.data.batches import IGNORE_INDEX, TokenRows
from capotune.models.base import find
from capotune.models.load import load_backbone
from capotune.models.sequence_packing import packed, try_packing
from capotune.tasks.linear_head import spread_layers
from capotune.tasks.token_classification.model import TokenClassifier

ROWS = [[2, 5, 6, 7, 3], [2, 9, 3], [2, 10, 11, 12, 13, 14, 3]]
_ = IGNORE_INDEX
TARGETS = [[_, 0, _, 1, _], [_, 2, _], [_, 1, 1, _, _, 0, _]]
LAYERS = ((-1,), (0, 1, 2), (1,))


@pytest.fixture(params=["bert", "llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def made(base: Path, layers: tuple[int, ...]) -> Any:
    torch.manual_seed(0)
    return TokenClassifier(load_backbone(find(str(base))), 3, layers).eval()


def read_one_by_one(model: Any, layers: tuple[int, ...]) -> torch.Tensor:
    """The definition: each row alone, the states of its words side by side."""
    found = []
    for ids, labels in zip(ROWS, TARGETS, strict=True):
        output = model.backbone(torch.tensor([ids]), output_hidden_states=True)
        words = [at for at, label in enumerate(labels) if label != IGNORE_INDEX]
        found.append(torch.cat([output.hidden_states[layer][0, words] for layer in layers], dim=1))
    return torch.cat(found)


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_features_are_the_states_of_the_words(base: Path, layers: tuple[int, ...]) -> None:
    model = made(base, layers)
    expected = read_one_by_one(model, layers)
    rows, packing = TokenRows(ROWS, 0), try_packing(model.backbone)
    padded = model.features(rows.batch(np.arange(3), TARGETS))
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-5)
    assert packing.first_position is not None
    with packed(model.backbone, packing):
        together = model.features(rows.batch(np.arange(3), TARGETS, packing.first_position))
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_words_of_rows_after_a_prompt_are_the_same_words(bert: Path) -> None:
    """What stands before every row moves the words and is none itself."""
    model = made(bert, (-1,))
    prompted = TokenRows(ROWS, 0, prefix=[20, 21]).batch(np.arange(3), TARGETS)
    written = TokenRows([[20, 21, *row] for row in ROWS], 0).batch(
        np.arange(3), [[-100, -100, *row] for row in TARGETS]
    )
    assert torch.equal(model.features(prompted), model.features(written))
    assert len(model.features(prompted)) == 6


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_other_programs_get_the_logits_of_every_token(base: Path, layers: tuple[int, ...]) -> None:
    model = made(base, layers)
    batch = TokenRows(ROWS, 0).batch(np.arange(3), TARGETS)
    labels = batch.laid_out(batch.targets.float()).long().masked_fill(batch.attention_mask == 0, IGNORE_INDEX)
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    assert output.logits.shape == (3, 7, 3)
    own = model.logits(batch)
    torch.testing.assert_close(batch.flat(output.logits)[batch.in_loss], own, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(own, batch.targets[batch.in_loss])
    torch.testing.assert_close(output.loss, loss)
    embedded = model.backbone.get_input_embeddings()(batch.input_ids)
    again = model(inputs_embeds=embedded, attention_mask=batch.attention_mask)
    torch.testing.assert_close(again.logits, output.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("blocks", "most", "layers"),
    [
        (6, 99, (0, 1, 2, 3, 4, 5, 6)),
        (6, 4, (0, 2, 4, 6)),
        (12, 2, (0, 12)),
        (6, 1, (-1,)),
        (6, 0, (-1,)),
        (1, 3, (0, 1)),
    ],
)
def test_layers_are_spread_evenly_and_hold_the_last(blocks: int, most: int, layers: tuple[int, ...]) -> None:
    assert spread_layers(blocks, most) == layers
