"""Shapes of models, a handful that tell: what the sweep over all families does (scripts/sweep_families.py), done here.

Every check compares with what Transformers computes of one row at a time.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import PAIRS, SHORT, TOLERANCE, TRAINED_ON, Checks
from tiny_families import make, tokenizer
from transformers import AutoModelForCausalLM, BartConfig, BartModel, LlamaConfig, TrOCRConfig, WhisperConfig

import capotune
from capotune.adapters.assemble import assemble, attach
from capotune.data.batches import parts_of
from capotune.errors import CapotuneError, ModelError, SettingError
from capotune.evaluation.boundary import resumes_with
from capotune.events import Event, Warned
from capotune.methods.base import Start
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.models.architecture import describe, text_part
from capotune.models.base import Base, find
from capotune.models.positions import positions
from capotune.models.stored_names import StoredNames
from capotune.models.stream import empty_model
from capotune.settings import Context
from capotune.tasks.generation import Generation

pytestmark = pytest.mark.skipif(
    not is_dataclass(LlamaConfig), reason="the tiny models are made of dataclasses, which Transformers 5.3 has not"
)
TOLD = {
    # in-place additions after linear layers, which are of a class of the family's own; blocks that return tuples
    "falcon": ("evaluate", "text: last block", "text: lora", "text: qlora", "merge"),
    # embeddings and last states narrower than the hidden states
    "opt-narrow-embedding": ("text: prompt", "labels: head", "labels: last block"),
    # a mixture whose experts are stored one by one, and computed with from one tensor
    "mixtral": ("text: qlora", "merge", "quantize"),
    # a causal model whose name of its base is no part of it
    "llama4_text": ("quantize",),
    # and one whose transformer without head is none: its output layer is among its parts
    "llama4": ("quantize",),
    # a text part under ``text_config``, stored under another name than it has
    "gemma3": ("evaluate", "text: lora", "merge", "labels: lora", "labels: merge"),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a family's name to its folder, made once."""
    folder, known = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def of(family: str) -> Path:
        if family not in known:
            known[family] = folder / family
            make(family, known[family])
        return known[family]

    return of


@pytest.mark.parametrize("family", TOLD)
def test_family_computes_what_transformers_computes(family: str, made: Any, tmp_path: Path) -> None:
    checks = Checks(made(family), tmp_path).all()
    needed = [name for name in checks if name in TOLD[family] or _makes_for(name, TOLD[family])]
    apart = {name: checks[name]() for name in needed}
    assert {name: value for name, value in apart.items() if not value <= TOLERANCE} == {}


def _makes_for(name: str, told: tuple[str, ...]) -> bool:
    """Whether another check uses the adapter that this one trains."""
    return (name == "text: lora" and "merge" in told) or (name == "labels: lora" and "labels: merge" in told)


def test_lora_says_which_experts_stay_frozen(made: Any, tmp_path: Path) -> None:
    folder = made("mixtral")
    experts = [weight for weight in AutoModelForCausalLM.from_pretrained(folder).parameters() if weight.dim() == 3]
    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Warned):
            said.append(event.text)

    given: dict[str, Any] = {**SHORT, "model": str(folder), "test": PAIRS, "answers": 0, "report": listen}
    capotune.train("lora", data=TRAINED_ON["text"], out=tmp_path / "run", **given)
    assert any(f"{sum(weight.numel() for weight in experts):,} weights frozen" in text for text in said), said


def test_a_weight_in_parts_is_made_of_all_of_them(made: Any) -> None:
    base = find(str(made("mixtral")))
    model = empty_model(AutoModelForCausalLM, base.config)
    from capotune.models.shards import Shards

    shards = Shards(base.weight_files)
    names = StoredNames(model, [stored.name for stored in shards])
    theirs = AutoModelForCausalLM.from_pretrained(base.folder).state_dict()
    groups = {parts.target: parts for parts in names.parts.values()}
    assert groups
    for parts in groups.values():
        for name, weight in parts.converted(model, shards.read).items():
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0)


def test_lora_leaves_weights_that_the_models_own_code_reads(made: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(made("mamba"))
    found = describe(model, text_part(model))
    assert {path.rpartition(".")[2] for path in found.bypassed} >= {"dt_proj"}
    assert not set(found.bypassed) & set(found.linears)


def test_rows_beyond_the_short_range_stand_apart_where_they_change_the_others(made: Any, tmp_path: Path) -> None:
    checks = Checks(made("phi3-longrope"), tmp_path)
    assert checks.all()["labels: head"]() <= TOLERANCE
    packing = assemble(Generation.on(checks.base, None, 0), None, device=torch.device("cpu")).packing
    lengths = [3, 24, 25, 60]
    assert [part.tolist() for part in parts_of(torch.arange(4).numpy(), lengths, 1000, packing.group)] == [
        [0, 1],
        [2, 3],
    ]


@pytest.mark.parametrize("family", ["rwkv", "git", "deepseek_v4"])
def test_prompts_of_two_lengths_are_written_as_each_alone_where_padding_is_read(
    family: str, made: Any, tmp_path: Path
) -> None:
    """By a state, by a mask that lies elsewhere once there is a cache, by blocks of tokens that are compressed."""
    pytest.importorskip(f"transformers.models.{family}")  # the oldest Transformers lacks some
    assert Checks(made(family), tmp_path).generates() == 0


def test_a_frozen_prefix_is_left_out_only_where_the_model_goes_on_from_it(made: Any) -> None:
    base = find(str(made("falcon")))
    settings = FeatureExtractionSettings(trainable_layers=1).completed(Context(base.hidden_size, False))
    assembled = assemble(Generation.on(base, None, 0), settings, device=torch.device("cpu"))
    attach(assembled, Start(torch.Generator()))
    block = assembled.method.first_trainable_block()
    assert resumes_with(assembled, block) is not None
    first, last, seen = assembled.blocks[0], assembled.blocks[-1], list[torch.Tensor]()
    first.register_forward_hook(lambda _module, _given, output: seen.append(output[0]))
    last.register_forward_hook(lambda _module, _given, output: (output[0] + seen.pop(), *output[1:]))
    assert resumes_with(assembled, block) is None


def test_a_prompt_is_refused_where_ids_are_looked_up_in_another_table(made: Any) -> None:
    """As DeepSeek-V4 routes tokens to experts by their ids."""
    base = find(str(made("mixtral")))
    settings = PromptTuningSettings(num_virtual_tokens=2, deep=False).completed(Context(base.hidden_size, False))
    assembled = assemble(Generation.on(base, None, 2), settings, device=torch.device("cpu"))
    backbone = assembled.backbone

    def look_up(module: Any, _: Any, given: dict[str, Any]) -> None:
        _ = module.routes[given["input_ids"]]

    backbone.register_buffer("routes", torch.zeros(assembled.architecture.vocab_size, 2))
    backbone.register_forward_pre_hook(look_up, with_kwargs=True)
    with pytest.raises(SettingError, match="looks tokens up in routes too"):
        attach(assembled, Start(torch.Generator(), [5, 6]))


def test_an_encoder_decoder_is_refused_with_what_to_give(tmp_path: Path) -> None:
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    BartModel(BartConfig(vocab_size=400, d_model=32, **shape)).save_pretrained(tmp_path)
    tokenizer(False, marks=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"bart model is an encoder-decoder.*Give an encoder"):
        capotune.train("lora", data=TRAINED_ON["labels"], model=str(tmp_path), out=tmp_path / "run")
    with pytest.raises(CapotuneError, match=r"encoder-decoder|reads text and does not write it"):
        capotune.load_model(tmp_path)


def test_a_part_of_other_models_is_refused(tmp_path: Path) -> None:
    TrOCRConfig(decoder_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a trocr model is a part of others"):
        _ = Base("reader", tmp_path).text_config


def test_a_decoder_that_listens_has_its_target_positions() -> None:
    assert positions(WhisperConfig(max_target_positions=96)) == 96


def test_a_model_that_looks_ahead_writes_no_text(made: Any) -> None:
    with pytest.raises(ModelError, match="predicts a token from those after it too"):
        capotune.load_model(made("xlnet"))
