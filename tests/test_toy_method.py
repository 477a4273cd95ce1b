"""A method is one file: BitFit is defined here, from its settings to its keys, and every command knows it.

BitFit trains the biases of the linear layers, for labels and for text, and nothing else of the base (Ben Zaken et al.
2022, arXiv 2106.10199).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from commands import capo
from torch import nn

import capotune
from capotune import methods
from capotune.errors import SettingError
from capotune.methods.base import Method, Start
from capotune.models.architecture import Architecture
from capotune.settings import Count, TrainingSettings

# The method


class BitFitSettings(TrainingSettings):
    """BitFit (Ben Zaken et al. 2022): only biases train."""

    method: ClassVar[str] = "bitfit"
    last_blocks: Count | None = None
    """Blocks whose biases train, counted from the last. Left out: all."""


class BitFit(Method):
    """A trainable copy stands in place of each bias; the frozen one is set aside."""

    Settings = BitFitSettings
    known_to_peft = False
    settings: BitFitSettings

    def attach(self, model: nn.Module, architecture: Architecture, start: Start) -> None:  # noqa: ARG002
        """Swap the biases. ``SettingError`` for a base without any."""
        count = len(architecture.blocks)
        self.first = count - min(self.settings.last_blocks or count, count)
        paths = [path for path in architecture.linears if (architecture.block_of(path) or 0) >= self.first]
        layers = {path: model.get_submodule(path) for path in paths}
        self.layers: dict[str, Any] = {path: layer for path, layer in layers.items() if layer.bias is not None}
        if not self.layers:
            raise SettingError("the linear layers of this base have no bias.", setting="method", given="bitfit")
        self.frozen = {path: layer.bias for path, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.bias = nn.Parameter(layer.bias.detach().float().clone())

    def detach(self) -> None:
        """Put the frozen biases back."""
        for path, layer in self.layers.items():
            layer.bias = self.frozen[path]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Each bias by its path, with PEFT's prefix."""
        return {f"{self.key_prefix}{path}.bias": layer.bias for path, layer in self.layers.items()}

    def expected_parameters(self) -> int:
        """Σ out over the layers."""
        return sum(bias.numel() for bias in self.frozen.values())

    def first_trainable_block(self) -> int:
        """The lowest block whose biases train."""
        return self.first

    def peft_config(self) -> dict[str, Any]:
        """Not a type of PEFT's."""
        return {"peft_type": None, "bias": "all"}


if (main := sys.modules["__main__"].__spec__) and main.name.startswith("capotune."):
    methods.register(BitFit)  # in the process that ``compare`` starts, which imports this file for it


@pytest.fixture(scope="module", autouse=True)
def _known_in_this_file_alone() -> Iterator[None]:
    """A user's module registers at import. Here other tests, in the same process, are to know the built-in four."""
    methods.register(BitFit)
    yield
    methods._registered.clear()


# What it must be able to do


@pytest.fixture(scope="module", params=["labels", "text"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run on labels or text, and what it was made of."""
    on_labels = request.param == "labels"
    base, data = ("bert", "tickets") if on_labels else ("gpt2_writer", "colour_pairs")
    given = {
        "data": str(request.getfixturevalue(data)), "model": str(request.getfixturevalue(base)), "cache": False,
        **({} if on_labels else {"answers": 2}),
    }  # fmt: skip
    out = tmp_path_factory.mktemp("bitfit") / "run"
    record = capotune.train("bitfit", out=out, epochs=2, last_blocks=2, learning_rate=0.01, **given)
    return {"given": given, "record": record, "out": out, "adapter": out / "adapter", "on_labels": on_labels}


def test_the_adapter_holds_the_biases_of_the_last_blocks_by_their_paths(made: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    stored = load_file(made["adapter"] / "adapter_model.safetensors")
    own = {key: bias for key, bias in stored.items() if "classifier" not in key}
    assert all(key.startswith("base_model.model.") and key.endswith(".bias") for key in own)
    loaded = capotune.load(made["adapter"])
    assert {key: bias.shape for key, bias in loaded.method.parameters().items()} == {k: b.shape for k, b in own.items()}
    assert {loaded._assembled.architecture.block_of(path) for path in loaded.method.layers} == {1, 2}
    assert made["record"]["result"]["trainable_parameters"] == sum(bias.numel() for bias in stored.values())
    assert made["on_labels"] or all(
        not torch.equal(layer.bias, loaded.method.frozen[path]) for path, layer in loaded.method.layers.items()
    )


def test_training_moves_every_bias_that_matters(bert: Path) -> None:
    from helpers import fit, on_base

    assembled = on_base(bert, BitFitSettings(epochs=1, learning_rate=0.01, weight_decay=0.0))
    frozen = {f"base_model.model.{path}.bias": bias for path, bias in assembled.method.frozen.items()}
    state, _ = fit(assembled, on_epoch=lambda *_: None)  # it captures the weights
    moved = {key for key, bias in frozen.items() if not torch.equal(state.weights[key], bias)}
    assert {key for key in frozen if ".key." not in key} <= moved  # the softmax takes a key's bias out again
    assert len(frozen) == 3 * 6


def test_evaluate_gives_the_score_of_the_run(made: dict[str, Any]) -> None:
    scored = capotune.evaluate(made["adapter"], data=made["given"]["data"])
    assert {name: scored[name] for name in made["record"]["result"]["scores"]} == made["record"]["result"]["scores"]


def test_info_names_its_settings(made: dict[str, Any]) -> None:
    facts = capotune.info(made["adapter"])
    assert facts["method"] == "bitfit"
    assert facts["settings"]["last_blocks"] == 2
    shown = capo("info", made["adapter"])
    assert shown.code == 0, shown.err
    assert "last_blocks 2" in shown.said


def test_the_adapter_answers(made: dict[str, Any]) -> None:
    if made["on_labels"]:
        (prediction,) = capotune.predict(made["adapter"], ["paid twice refund"])
        assert prediction.label in ("late", "broken", "money")
    else:
        (text,) = capotune.generate(made["adapter"], ["What colour is grass?"], max_tokens=3)
        assert isinstance(text, str)


def test_the_base_is_as_it_was_after_detach(bert: Path) -> None:
    from helpers import assert_same_bits, contents, on_base, shake

    assembled = on_base(bert, BitFitSettings(), attached=False)
    before = contents(assembled.backbone)
    assembled.method.attach(assembled.model, assembled.architecture, Start(torch.Generator()))
    shake(assembled)
    assembled.method.detach()
    assert_same_bits(before, contents(assembled.backbone))


def test_an_unknown_setting_is_named_with_the_nearest(made: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"unknown setting 'last_block' for bitfit. Did you mean 'last_blocks'"):
        capotune.train("bitfit", last_block=1, **made["given"])


def test_a_base_without_biases_is_refused_and_nothing_is_left(llama: Path, tickets: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no bias"):
        capotune.train("bitfit", data=str(tickets), model=str(llama), out=tmp_path / "run", cache=False)
    assert not list(tmp_path.iterdir())


# The command line, and compare's own process


def test_help_lists_it_and_its_settings() -> None:
    assert "bitfit" in capo("train", "--help").out
    shown = capo("train", "bitfit", "--help")
    assert shown.code == 0
    assert "--last-blocks" in shown.out
    assert "counted from the last" in shown.said
    assert "--bitfit.last-blocks" in capo("compare", "--help").out


@pytest.mark.parametrize("on_labels", [True, False], ids=["labels", "text"])
def test_compare_runs_it_and_shows_it(on_labels: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base, data = ("bert", "tickets") if on_labels else ("gpt2_writer", "colour_pairs")
    answers = () if on_labels else ("--answers", 2)
    compared = ["bitfit", "lora"] if on_labels else ["bitfit"]  # each is a process
    made = capo(
        "compare", "--data", request.getfixturevalue(data), "--model", request.getfixturevalue(base),
        "--methods", *compared, "--bitfit.epochs", 1, "--bitfit.last-blocks", 1, "--lora.epochs", 1,
        "--out", tmp_path / "compared", "--no-cache", *answers,
    )  # fmt: skip
    assert made.code == 0, made.err
    assert "bitfit" in made.out
    record = json.loads((tmp_path / "compared" / "compare.json").read_text("utf-8"))
    assert [row["method"] for row in record["rows"]] == compared
    settings = json.loads((tmp_path / "compared" / "bitfit" / "run.json").read_text("utf-8"))["bitfit"]
    assert (settings["epochs"], settings["last_blocks"]) == (1, 1)
    page = (tmp_path / "compared" / "compare.html").read_text("utf-8")
    assert "bitfit" in page
    assert "last_blocks" in page


def test_train_on_the_command_line(bert: Path, tickets: Path, tmp_path: Path) -> None:
    made = capo(
        "train", "bitfit", "--data", tickets, "--model", bert, "--epochs", 1, "--last-blocks", 1,
        "--out", tmp_path / "run", "--no-cache",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert "Try it: capo predict" in made.out
    labelled = capo("predict", tmp_path / "run" / "adapter", "the lamp is broken")
    assert labelled.code == 0, labelled.err
