"""What an adapter costs on general text: the figures against plain PyTorch, and where a run reports them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import generation_helpers as writing
import pytest
import torch
from helpers import shake
from torch.nn import functional

import capotune
from capotune.adapters import assemble
from capotune.adapters.assemble import Assembled
from capotune.errors import CapotuneError
from capotune.evaluation.metrics import mean_interval
from capotune.methods.base import Untouched
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.models.load import load_causal_lm
from capotune.settings import TrainingSettings
from capotune.tasks.generation.general import GeneralText, positions_for

METHODS = {
    "lora": LoraSettings(rank=4, target_modules=("all-linear",)),
    "prompt-tuning": PromptTuningSettings(num_virtual_tokens=3, init="vocabulary"),
}


@torch.no_grad()
def _reference(model: Any, sequences: list[list[int]], prefix: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and most probable tokens at every position, one sequence at a time."""
    losses, most_probable = [], []
    for ids in sequences:
        logits = model(input_ids=torch.tensor([prefix + ids])).logits[0, len(prefix) : -1].double()
        losses.append(functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
        most_probable.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(most_probable)


def _text(assembled: Assembled, train_tokens: int = 0) -> GeneralText:
    return GeneralText.read(assembled.task, None, positions_for(train_tokens))


@pytest.mark.parametrize("plain_head", [True, False], ids=["plain-head", "own-logits"])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("writer", ["llama", "gpt2"])
def test_cost_equals_a_plain_computation(
    writers: dict[str, Path], writer: str, settings: TrainingSettings, plain_head: bool
) -> None:
    assembled = writing.with_plain_head(writing.on_base(writers[writer], settings, attached=False), plain_head)
    text = _text(assembled)
    base = text.next_tokens(replace(assembled, method=Untouched()))
    assembled = writing.with_plain_head(writing.on_base(writers[writer], settings), plain_head)
    shake(assembled)

    cost = text.cost(base, text.next_tokens(assembled))

    base_losses, base_ids = _reference(load_causal_lm(assembled.base), text.sequences, [])
    losses, ids = _reference(assembled.model, text.sequences, list(assembled.method.virtual_token_ids))
    assert cost.tokens == len(losses)
    assert cost.base_loss == pytest.approx(float(base_losses.mean()), abs=1e-5)
    assert cost.loss == pytest.approx(float(losses.mean()), abs=1e-5)
    assert cost.agreement == pytest.approx(float((ids == base_ids).double().mean()), abs=1 / len(losses))
    assert cost.loss != pytest.approx(cost.base_loss, abs=1e-5)
    lengths = [len(one) - 1 for one in text.sequences]
    changes = [float(part.sum()) for part in torch.split(losses - base_losses, lengths)]
    expected = mean_interval(changes, lengths)
    assert expected is not None
    assert cost.interval == pytest.approx(expected, abs=1e-5)


def test_a_base_costs_nothing_against_itself(llama_writer: Path) -> None:
    bare = writing.on_base(llama_writer, None, attached=False)
    text = _text(bare)
    cost = text.cost(text.next_tokens(bare), text.next_tokens(bare))
    assert (cost.loss - cost.base_loss, cost.agreement) == (0.0, 1.0)
    assert "as good as the base, the same next token at 100 %" in cost.words


def test_more_training_reads_more_of_our_text_and_never_other_text(llama_writer: Path) -> None:
    assembled = writing.on_base(llama_writer, None, attached=False)
    short, longer, whole = (
        [*chain.from_iterable(_text(assembled, tokens).sequences)] for tokens in (0, 10_000, 10_000_000)
    )
    assert len(short) < len(longer) < len(whole)
    assert whole[: len(longer)] == longer
    assert longer[: len(short)] == short


def test_a_run_records_the_cost_and_says_it(llama_writer: Path, colour_pairs: Path, tmp_path: Path) -> None:
    settings = {"data": str(colour_pairs), "model": str(llama_writer), "epochs": 1, "answers": 0}
    record = capotune.train("lora", out=tmp_path / "run", **settings)
    general = record["result"]["general"]
    assert general["tokens"] > 0
    assert general["words"] in (tmp_path / "run/adapter/README.md").read_text(encoding="utf-8")
    assert capotune.evaluate(tmp_path / "run/adapter", data=str(colour_pairs), answers=0)["general"] == general
    own = tmp_path / "mine.txt"
    own.write_text("A ripe tomato lay in the snow.\n\nNobody knew why.\n", encoding="utf-8")
    other = capotune.train("lora", out=tmp_path / "other", general=str(own), **settings)["result"]["general"]
    assert other["text"] == "mine.txt"
    assert "on 'mine.txt' " in other["words"]
    assert other["base_loss"] != general["base_loss"]
    adapter = tmp_path / "other/adapter"
    assert capotune.evaluate(adapter, data=str(colour_pairs), answers=0, general=str(own))["general"] == other


def test_a_model_alone_has_no_base_to_be_compared_with(llama_writer: Path, colour_pairs: Path) -> None:
    assert "general" not in capotune.evaluate(llama_writer, data=str(colour_pairs), answers=0)
    with pytest.raises(CapotuneError, match=r"`general=mine\.txt`.*no base"):
        capotune.evaluate(llama_writer, data=str(colour_pairs), general="mine.txt")


def test_a_run_finds_out_once_how_its_base_reads(
    llama_writer: Path, colour_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    found_out = assemble.try_packing
    monkeypatch.setattr(assemble, "try_packing", lambda backbone: tried.append(backbone) or found_out(backbone))
    capotune.train("lora", data=str(colour_pairs), model=str(llama_writer), out=tmp_path / "run", epochs=1, answers=0)
    assert len(tried) == 1


def test_a_comparison_shows_the_cost_of_each_technique(llama_writer: Path, colour_pairs: Path, tmp_path: Path) -> None:
    comparison = capotune.compare(
        data=str(colour_pairs), model=str(llama_writer), out=tmp_path / "out", methods=("lora", "prompt-tuning"),
        answers=0, lora={"epochs": 1}, prompt_tuning={"epochs": 2},
    )  # fmt: skip
    read = {
        name: json.loads((tmp_path / "out" / name / "run.json").read_text(encoding="utf-8"))["result"]["general"]
        for name in ("lora", "prompt-tuning")
    }
    assert read["lora"]["tokens"] == read["prompt-tuning"]["tokens"]
    assert read["lora"]["base_loss"] == read["prompt-tuning"]["base_loss"]
    general = json.loads((tmp_path / "out/lora/run.json").read_text(encoding="utf-8"))["result"]["general"]
    scores = comparison.rows[0].scores
    assert scores["general_change"] == general["loss"] - general["base_loss"]
    assert scores["general_agreement"] == general["agreement"]
    assert "same next token" in (tmp_path / "out/compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("content", "problem"), [(None, "no such file"), ("", "empty"), ("a", "less than two tokens")])
def test_a_general_file_that_cannot_be_read_is_one_message(
    llama_writer: Path, colour_pairs: Path, tmp_path: Path, content: str | None, problem: str
) -> None:
    own = tmp_path / "mine.txt"
    if content is not None:
        own.write_text(content, encoding="utf-8")
    with pytest.raises(CapotuneError, match=problem):
        capotune.train("lora", data=str(colour_pairs), model=str(llama_writer), out=tmp_path / "run", general=str(own))
    assert not (tmp_path / "run").exists()


def test_a_general_file_is_refused_for_labels(tickets: Path, tmp_path: Path) -> None:
    with pytest.raises(CapotuneError, match="`general"):
        capotune.train("lora", data=str(tickets), model="minilm", out=tmp_path / "run", general="mine.txt")
