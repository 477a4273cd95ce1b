"""Deep prompts through the whole of Capotune: trained, described, refused, compared, over 4 bits, with beams."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from generation_helpers import examples, logits, on_base, sequences
from helpers import TRAINED, shake
from transformers import AutoModelForCausalLM

import capotune
from capotune.adapters.store import read_adapter, save_adapter
from capotune.cli.display import show_run
from capotune.cli.info import show_info
from capotune.engine.loop import train
from capotune.errors import SettingError
from capotune.evaluation.forward import held_out_score
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.deep import KEY
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.models.base import find
from capotune.settings import TrainSettings
from capotune.tasks.generation import giving_back
from capotune.tasks.generation.run import GenerationRun
from capotune.tasks.loading import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

DEEP = PromptTuningSettings(deep=True, num_virtual_tokens=5, epochs=2)
SHORT: dict[str, Any] = {"deep": True, "num_virtual_tokens": 5, "epochs": 2}


@pytest.fixture(scope="module")
def compared(llama_writer: Path, colour_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that fills the cache of activations."""
    out = tmp_path_factory.mktemp("deep") / "out"
    capotune.compare(
        data=str(colour_pairs), model=str(llama_writer), methods=("prompt-tuning",), out=out, answers=0,
        prompt_tuning=SHORT,
    )  # fmt: skip
    return out


def adapter_of(compared: Path) -> Path:
    return compared / "prompt-tuning" / "adapter"


def test_compare_counts_and_scores_it(compared: Path) -> None:
    rows = {row["method"]: row for row in json.loads((compared / "compare.json").read_text(encoding="utf-8"))["rows"]}
    deep = rows["prompt-tuning"]
    config = json.loads((adapter_of(compared) / "adapter_config.json").read_text(encoding="utf-8"))
    width = config["token_dim"]
    assert deep["trainable_parameters"] == (5 - 1) * config["num_layers"] * 2 * width, "the first vector rests"
    assert deep["scores"]["part_of_change"] in (0.6, 0.7, 0.8, 0.9, 1.0)


def test_info_says_where_the_vectors_stand(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = capotune.info(adapter_of(compared))
    assert facts["deep_prompt"] == 5
    record = json.loads((compared / "prompt-tuning" / "run.json").read_text(encoding="utf-8"))
    assert facts["trained_weights"] == record["result"]["trainable_parameters"]
    assert "nearest_tokens" not in facts
    show_info(facts, plot=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "5 vectors before every block's keys and values, which are near no token" in said


def test_merge_refuses_it_and_names_what_can_be_merged(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"prompt-tuning has no change.*Adapters of lora, qlora"):
        capotune.merge(adapter_of(compared), out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_training_again_with_a_full_cache_gives_the_same_bits(
    compared: Path, llama_writer: Path, colour_pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    capotune.train(
        data=str(colour_pairs), model=str(llama_writer), method="prompt-tuning", out=out, answers=0, **SHORT
    )  # fmt: skip
    stored = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert stored == (adapter_of(compared) / "adapter_model.safetensors").read_bytes()


def test_over_a_4_bit_base_it_is_stored_and_answers_alike(writers: dict[str, Path], tmp_path: Path) -> None:
    capotune.quantize(str(writers["llama"]), out=tmp_path / "packed")
    assembled = on_base(tmp_path / "packed", DEEP)
    shake(assembled)
    save_adapter(tmp_path / "adapter", assembled, TRAINED)
    loaded = load_adapter(read_adapter(tmp_path / "adapter"), model=None, device=torch.device("cpu"))
    torch.testing.assert_close(logits(loaded), logits(assembled), rtol=0, atol=1e-6)
    full = on_base(writers["llama"], DEEP)
    full.method.load(assembled.method.stored())
    assert (logits(full) - logits(assembled)).abs().max() > 1e-3, "the base is not in 4 bits"


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_beams_are_those_of_peft(base: str, writers: dict[str, Path], tmp_path: Path) -> None:
    assembled = on_base(writers[base], DEEP)
    shake(assembled)
    save_adapter(tmp_path / "adapter", assembled, TRAINED)
    model = AutoModelForCausalLM.from_pretrained(writers[base]).eval()
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ours = capotune.load(tmp_path / "adapter")
    ends = list(ours._assembled.task.end_ids)
    for ids in sequences(4, seed=2):
        prompt = assembled.task.decode(ids)
        asked = torch.tensor([assembled.task.encode_prompt(prompt)])
        written = theirs.generate(
            input_ids=asked, attention_mask=torch.ones_like(asked), num_beams=3, max_new_tokens=6, do_sample=False,
            eos_token_id=ends, pad_token_id=1,
        )[0, asked.shape[1] :].tolist()  # fmt: skip
        stop = next((at for at, token in enumerate(written) if token in ends), len(written))
        expected = assembled.task.decode_after(asked[0].tolist(), written[:stop])
        assert ours.generate([prompt], max_tokens=6, num_beams=3) == [expected]


# ------------------------------------------------------------------------------------------- how the vectors learn


def trained_from(assembled: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored vectors before and after a few steps."""
    before = assembled.method.stored()[KEY]
    better = itertools.count()
    train(
        assembled, examples(assembled, 12), assembled.method.settings, seed=0, evaluate=lambda: (float(next(better)),)
    )
    return before, assembled.method.stored()[KEY]


@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
def test_the_first_vector_rests_and_the_others_learn(weight_decay: float, writers: dict[str, Path]) -> None:
    before, after = trained_from(on_base(writers["llama"], DEEP.model_copy(update={"weight_decay": weight_decay})))
    assert torch.equal(after[0], before[0])
    assert (after[1:] != before[1:]).any(1).all()


def test_a_loaded_first_vector_is_read_and_stored(writers: dict[str, Path]) -> None:
    one, other = (on_base(writers["llama"], DEEP) for _ in range(2))
    stored = one.method.stored()[KEY].clone()
    stored[0] += 1
    other.method.load({KEY: stored})
    assert torch.equal(other.method.stored()[KEY], stored)
    assert (logits(other) != logits(one)).any()


def test_a_single_vector_learns(writers: dict[str, Path]) -> None:
    before, after = trained_from(on_base(writers["llama"], DEEP.model_copy(update={"num_virtual_tokens": 1})))
    assert (after != before).any()


def test_the_way_from_the_start_is_a_straight_line(writers: dict[str, Path]) -> None:
    assembled = on_base(writers["llama"], DEEP)
    before, after = trained_from(assembled)
    go = assembled.method.way_from_start()
    assert go is not None
    for part in (0.5, 0.0, 1.0):
        go(part)
        torch.testing.assert_close(assembled.method.stored()[KEY], before.lerp(after, part))


@pytest.mark.parametrize(
    ("losses", "part"),
    [
        ({0: 2.0, 0.6: 1.09}, 0.6),
        ({0: 2.0, 0.6: 1.5, 0.7: 1.11, 0.8: 1.05}, 0.8),
        ({0: 2.0, 0.6: 1.5, 0.7: 1.4, 0.8: 1.3, 0.9: 1.2}, 1.0),
        ({0: 1.0, 0.6: 1.0}, 0.6),
    ],
)
def test_as_much_is_given_back_as_leaves_90_percent_of_the_held_out_gain(
    losses: dict[float, float], part: float, writers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assembled, went = on_base(writers["llama"], DEEP), []
    monkeypatch.setattr(assembled.method, "way_from_start", lambda: went.append)
    monkeypatch.setattr(giving_back, "held_out_score", lambda *_: (-losses[went[-1]],))
    found = giving_back.give_back(assembled, examples(assembled, 2), (-1.0,), lambda _: None)
    assert went[-1] == part
    assert found == ((-losses.get(part, 1.0),), part)


def test_records_and_summary_say_how_much_of_the_change_was_left(
    compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((compared / "prompt-tuning" / "run.json").read_text(encoding="utf-8"))
    result = record["result"]
    adapter = json.loads((adapter_of(compared) / "capotune.json").read_text(encoding="utf-8"))
    assert result["part_of_change"] in (0.6, 0.7, 0.8, 0.9, 1.0)
    assert adapter["trained"]["part_of_change"] == result["part_of_change"]
    show_run(record, compared / "prompt-tuning")
    assert f"{result['part_of_change']:.0%} of what training changed" in capsys.readouterr().out
    assert "part of the change" in (compared / "compare.html").read_text(encoding="utf-8")


def test_the_recorded_held_out_loss_is_that_of_the_stored_vectors(
    compared: Path, llama_writer: Path, colour_pairs: Path
) -> None:
    record = json.loads((compared / "prompt-tuning" / "run.json").read_text(encoding="utf-8"))
    settings = TrainSettings(data=str(colour_pairs), model=str(llama_writer))
    method = PromptTuningSettings(**record["prompt-tuning"])
    run = GenerationRun(settings, method, find(str(llama_writer)), lambda _: None)
    loaded = load_adapter(read_adapter(adapter_of(compared)), model=None, device=torch.device("cpu"))
    held = run.train.take(run.held_rows).after(loaded.method.virtual_token_ids)
    (score,) = held_out_score(loaded, held)
    assert record["result"]["held_out_score"] == pytest.approx(run.task.objective.shown((score,)))


@pytest.mark.parametrize(("given", "deep", "rate"), [({}, True, 0.2), ({"deep": False}, False, None),
    ({"hard": True, "init": "text", "init_text": "my friend"}, False, None)])  # fmt: skip
def test_a_prompt_for_text_is_deep_unless_asked_otherwise(
    given: dict[str, Any], deep: bool, rate: float | None, writers: dict[str, Path]
) -> None:
    assembled = on_base(writers["llama"], PromptTuningSettings(**{"num_virtual_tokens": 2, **given}))
    settings = assembled.method.settings
    assert settings.deep is deep
    assert settings.learning_rate == rate if deep else settings.learning_rate < 0.2
    assert assembled.method.notices() == []


def test_a_record_from_before_deep_prompts_is_of_none() -> None:
    assert PromptTuningSettings.of_record({"num_virtual_tokens": 2}).deep is False
    assert PromptTuningSettings.of_record({"num_virtual_tokens": 2, "deep": True}).deep is True


def test_other_methods_have_nothing_to_give_back(writers: dict[str, Path]) -> None:
    for settings in (LoraSettings(rank=2), PromptTuningSettings(num_virtual_tokens=3, deep=False)):
        assembled = on_base(writers["llama"], settings)
        assert assembled.method.way_from_start() is None
