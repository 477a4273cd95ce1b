"""Norms and angles of deltas against dense ones, and what ``capo diff`` and ``capo info`` say of real adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generation_helpers
import helpers
import pytest
import torch
from commands import capo
from safetensors.torch import save_file
from torch.nn import functional

import capotune
from capotune.adapters.deltas import OUTSIDE, block_norms, compare, compare_blocks
from capotune.adapters.files import CONFIG, WEIGHTS
from capotune.adapters.store import read_adapter, save_adapter
from capotune.errors import SettingError
from capotune.methods.base import LowRank
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.settings import TrainingSettings

PATHS = ("model.layers.0.q", "model.layers.0.v", "model.layers.10.q", "model.layers.2.q", "model.norm")


def deltas(seed: int, rank: int, scale: float, *without: str) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    found = {
        path: LowRank(torch.randn(rank, 9, generator=generator), torch.randn(7, rank, generator=generator), scale)
        for path in PATHS
    }
    return {path: one for path, one in found.items() if path not in without}


ONE, OTHER = deltas(0, 3, 2.0), deltas(1, 2, 0.5, "model.layers.2.q")


def vector(adapter: dict[str, LowRank], block: str = "") -> torch.Tensor:
    """All values of the deltas as one vector."""
    parts = [
        (one.scale * one.b @ one.a).flatten() if (one := adapter.get(path)) is not None else torch.zeros(63)
        for path in PATHS
        if path.startswith(block) or (block == OUTSIDE and path == "model.norm")
    ]
    return torch.cat(parts)


def test_norms_and_angles_are_those_of_dense_deltas() -> None:
    found = compare_blocks(ONE, OTHER)
    assert list(found) == ["model.layers.0", "model.layers.2", "model.layers.10", OUTSIDE]
    for block, norms in {**found, "": compare(ONE, OTHER)}.items():
        one, other = (
            vector(ONE, f"{block}." if block not in ("", OUTSIDE) else block),
            vector(OTHER, f"{block}." if block not in ("", OUTSIDE) else block),
        )
        assert norms.one == pytest.approx(float(one.norm()), rel=1e-5)
        assert norms.other == pytest.approx(float(other.norm()), rel=1e-5)
        if block == "model.layers.2":
            assert norms.cosine is None
            assert norms.degrees is None
        else:
            assert norms.cosine == pytest.approx(float(functional.cosine_similarity(one, other, dim=0)), rel=1e-4)
    assert block_norms(ONE) == {block: pytest.approx(norms.one) for block, norms in found.items()}


def test_same_deltas_are_no_angle_apart_and_opposite_ones_half_a_turn() -> None:
    opposite = {path: LowRank(one.a, -one.b, one.scale) for path, one in ONE.items()}
    assert compare(ONE, ONE).degrees == pytest.approx(0, abs=1e-3)
    assert compare(ONE, opposite).degrees == pytest.approx(180, abs=1e-3)


def test_delta_whose_factors_cancel_has_a_norm_of_zero() -> None:
    for seed in range(20):
        made = torch.Generator().manual_seed(seed)
        a, b = torch.randn(3, 12, generator=made).double(), torch.randn(12, 3, generator=made).double()
        turn = torch.randn(3, 3, generator=made).double()
        none = LowRank(torch.cat([a, turn @ a]), torch.cat([b, -b @ torch.linalg.inv(turn)], 1), 1.0)
        assert block_norms({"m.0.q": none})["m.0"] == pytest.approx(0, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ adapters


def saved(base: Path, settings: TrainingSettings, folder: Path, seed: int = 7) -> Path:
    assembled = generation_helpers.on_base(base, settings)
    helpers.shake(assembled, seed)
    trained = helpers.TRAINED | {"held_out_score": 2.0, "scores": {}, "train_seconds": 1.0}
    save_adapter(folder, assembled, trained)
    return folder


@pytest.fixture(scope="module")
def pair(llama_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    one = saved(llama_writer, LoraSettings(rank=4), folder / "one")
    return one, saved(llama_writer, LoraSettings(rank=2, target_modules=("q_proj",)), folder / "two", 8)


def test_diff_names_what_differs_and_compares_answers(
    pair: tuple[Path, Path], colour_pairs: Path, llama_writer: Path
) -> None:
    ran = capo("diff", *pair, "--data", colour_pairs)
    assert ran.code == 0, ran.err
    for words in ("rank 4 against 2", "['all-linear'] against ['q_proj']", "° apart (cosine", "nats apart", "loss"):
        assert words in ran.said, words
    found = json.loads(capo("diff", *pair, "--data", colour_pairs, "--json").out)
    assert set(found["differing"]) == {"rank", "target_modules"}
    task = generation_helpers.make_task(llama_writer)
    rows = task.rows_to_compare(str(colour_pairs), 32)
    first, second = (capotune.load(folder).model for folder in pair)
    with torch.no_grad():
        p, q = (
            torch.cat([model(input_ids=torch.tensor([row.ids])).logits[0] for row in rows]).double().log_softmax(1)
            for model in (first, second)
        )
    assert found["answers"]["rows"] == len(rows)
    assert found["answers"]["kl_divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert found["answers"]["losses"][1] != found["answers"]["losses"][2]
    assert all(distance > 0 for distance in found["answers"]["to_base"])


def test_diff_of_an_adapter_and_itself_is_nothing(pair: tuple[Path, Path]) -> None:
    assert "settings equal" in capo("diff", pair[0], pair[0]).said
    found = capotune.diff(pair[0], pair[0], data=None)
    assert found["differing"] == {}
    assert found["deltas"]["degrees"] == pytest.approx(0, abs=1e-3)


def test_diff_with_a_prompt_compares_no_deltas_and_no_answers(
    pair: tuple[Path, Path], llama_writer: Path, colour_pairs: Path, tmp_path: Path
) -> None:
    prompt = saved(llama_writer, PromptTuningSettings(num_virtual_tokens=3, init="vocabulary"), tmp_path / "prompt")
    assert "one of them has no LoRA deltas" in capo("diff", pair[0], prompt).said
    with pytest.raises(SettingError, match="vectors before a text"):
        capotune.diff(pair[0], prompt, data=str(colour_pairs))


def by_peft(folder: Path, width: int, base: str) -> Path:
    folder.mkdir()
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file({f"{key}A.weight": torch.ones(2, width), f"{key}B.weight": torch.ones(width, 2)}, folder / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_diff_of_adapters_of_other_bases_compares_no_deltas_and_no_answers(
    pair: tuple[Path, Path], gpt2_writer: Path, colour_pairs: Path, tmp_path: Path
) -> None:
    one = by_peft(tmp_path / "one", 8, "some/base")
    for name, width, base, same in (
        ("a", 8, "some/base", True),
        ("b", 8, "other/base", False),
        ("c", 16, "some/base", False),
    ):
        found = capotune.diff(one, by_peft(tmp_path / name, width, base))
        assert (found["same_base"], found["deltas"] is not None) == (same, same)
    assert "of different bases" in capo("diff", one, tmp_path / "b").said
    other = saved(gpt2_writer, LoraSettings(rank=2), tmp_path / "gpt2")
    with pytest.raises(SettingError, match="they are of different bases"):
        capotune.diff(pair[0], other, data=str(colour_pairs))


def test_info_shows_tensors_norms_and_whether_the_base_matches(pair: tuple[Path, Path], gpt2_writer: Path) -> None:
    said = capo("info", pair[0], "--plot").said
    for words in ("as the base here has", "3 model.layers.*.self_attn.q_proj.lora_A.weight of 4 × 32", "█"):
        assert words in said, words
    facts: dict[str, Any] = capotune.info(pair[1])
    stored = read_adapter(pair[1])
    assert facts["tensors"] == {key: list(tensor.shape) for key, tensor in stored.tensors.items()}
    assert facts["delta"]["ranks"] == [2]
    assert facts["delta"]["targets"] == ["q_proj"]
    total = sum(norm**2 for norm in facts["delta"]["blocks"].values()) ** 0.5
    assert facts["delta"]["norm"] == pytest.approx(total)
    assert capotune.info(pair[1], model=str(gpt2_writer))["base"]["matches"] is False
    assert "the base here has another" in capo("info", pair[1], "--model", gpt2_writer).said
