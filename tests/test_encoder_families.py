"""Encoders of other forms than BERT's: what is computed of a text is Transformers' own, whatever the family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import accumulate, examples, on_base, sequences

from capotune.data.batches import TokenRows
from capotune.errors import ModelError, SettingError
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import find
from capotune.tasks.text_targets.features import compute_features

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
MOBILE = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "one block for all": lambda: transformers.AlbertModel(transformers.AlbertConfig(**SIZES, embedding_size=16)),
    "values of another width": lambda: transformers.MobileBertModel(transformers.MobileBertConfig(**SIZES, **MOBILE)),
    "a pooler that is always called": lambda: transformers.LayoutLMModel(transformers.LayoutLMConfig(**SIZES)),
    "the encoder of two halves": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "both halves": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
}


def save(model: Any, bert: Path, folder: Path) -> Path:
    """The model with BERT's tokenizer, its weights moved so that differences show."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, folder)
    return folder


@pytest.fixture(scope="module")
def folders(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    return {name: save(make(), bert, tmp_path_factory.mktemp("families") / "model") for name, make in MODELS.items()}


@torch.no_grad()
def own_features(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """The mean of Transformers' last states of each row by itself."""
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForTextEncoding if config.model_type == "t5" else transformers.AutoModel
    model = auto.from_pretrained(folder).eval()
    return torch.stack([model(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers_and_methods_train(name: str, folders: dict[str, Path]) -> None:
    rows = sequences(7, seed=2)
    expected = own_features(folders[name], rows)
    for settings in (LoraSettings(rank=2), QloraSettings(rank=2), PromptTuningSettings(num_virtual_tokens=3)):
        assembled = on_base(folders[name], settings)
        if isinstance(settings, LoraSettings) and not isinstance(settings, QloraSettings):  # at the start the base's
            found = compute_features(assembled, (-1,), TokenRows(rows, 0), None, reduced=False)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        loss = accumulate(assembled, examples(assembled, 6), np.arange(6), assembled.method.settings)
        gradients = [weight.grad for weight in assembled.method.parameters().values()]
        assert np.isfinite(loss)
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (FeatureExtractionSettings(trainable_layers=1), "not modules of their own .* Allowed: 0. lora and qlora"),
        (LoraSettings(rank=2, layers=(1,)), "not modules of their own .* Leave it out to train in all of them"),
    ],
)
def test_shared_blocks_cannot_be_chosen(settings: Any, words: str, folders: dict[str, Path]) -> None:
    with pytest.raises(SettingError, match=f"the blocks of AlbertModel are {words}"):
        on_base(folders["one block for all"], settings)


def test_an_encoder_decoder_writes_no_text(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="a t5 model is an encoder-decoder"):
        find(str(folders["both halves"])).check_writes_text()


def test_a_model_that_asks_for_more_than_tokens_is_refused(bert: Path, tmp_path: Path) -> None:
    model = transformers.XmodModel(transformers.XmodConfig(**SIZES, languages=("en_XX", "de_DE")))
    folder = save(model, bert, tmp_path / "model")
    with pytest.raises(ModelError, match="a XmodModel cannot read a single token by itself: Input language unknown"):
        on_base(folder, LoraSettings(rank=2))


@pytest.mark.parametrize("pad", [0, 1, 5])
def test_a_text_is_as_long_as_the_positions_that_are_used(pad: int, bert: Path, tmp_path: Path) -> None:
    """RoBERTa counts positions from its padding's id on: the longest text fits, and one token more would not."""
    config = transformers.RobertaConfig(**{**SIZES, "pad_token_id": pad, "max_position_embeddings": 24})
    folder = save(transformers.RobertaModel(config), bert, tmp_path / "model")
    assembled = on_base(folder, LoraSettings(rank=2))
    longest = assembled.task.max_length
    assert longest == 24 - pad - 1
    rows = [[9] * longest, [9, 10, 11]]
    found = compute_features(assembled, (-1,), TokenRows(rows, pad), None, reduced=False)
    torch.testing.assert_close(found, own_features(folder, rows), rtol=0, atol=1e-4)
    with pytest.raises((IndexError, RuntimeError)):
        own_features(folder, [[9] * (longest + 1)])
