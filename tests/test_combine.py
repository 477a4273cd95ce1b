"""Several adapters made one: each way against its definition on dense deltas, and the folder that comes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import generation_helpers
import helpers
import pytest
import torch
from commands import capo, tree
from safetensors.torch import load_file, save_file
from torch import Tensor

import capotune
from capotune.adapters.combine import Deltas, combine, threshold
from capotune.adapters.store import read_adapter, save_adapter
from capotune.conversion_settings import CombineSettings
from capotune.errors import AdapterError, CapotuneError, SettingError
from capotune.methods.base import LowRank
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.method import Lora
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.settings import TrainingSettings

SHAPES = {"wide": (12, 20), "tall": (24, 8), "square": (16, 16)}
IDS = torch.randint(8, 300, (3, 12), generator=torch.Generator().manual_seed(5))
TEXTS = ["my parcel is late", "the lamp is broken", "I paid twice please refund"]


def deltas(seed: int, rank: int, scale: float, *without: str) -> Deltas:
    """Random ones; of "tall" much smaller ones, so that it shows what is trimmed over all layers."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, (out, into) in SHAPES.items():
        a, b = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        found[path] = LowRank(a, b * (0.1 if path == "tall" else 1.0), scale)
    return {path: one for path, one in found.items() if path not in without}


ADAPTERS = [deltas(0, 3, 2.0), deltas(1, 2, 0.5), deltas(2, 4, 1.0, "square")]
WEIGHTS = (1.0, -0.5, 0.75)


def settings(**values: Any) -> CombineSettings:
    return CombineSettings(adapters=("a", "b", "c"), out=Path("out"), weights=WEIGHTS, **values)


def dense(adapter: Deltas, path: str) -> Tensor:
    one = adapter.get(path)
    return torch.zeros(SHAPES[path]) if one is None else one.scale * (one.b @ one.a)


def product(one: LowRank) -> Tensor:
    return one.scale * (one.b @ one.a)


def nearest(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]).float()


def summed(path: str) -> Tensor:
    return sum(w * dense(one, path) for w, one in zip(WEIGHTS, ADAPTERS, strict=True))  # type: ignore[return-value]


def trimmed(density: float) -> list[dict[str, Tensor]]:
    """The task vector of each adapter as one vector, of which the largest values stay."""
    found = []
    for adapter in ADAPTERS:
        vector = torch.cat([dense(adapter, path).flatten() for path in adapter])
        stays = torch.zeros(len(vector), dtype=torch.bool)
        stays[vector.abs().topk(round(density * len(vector))).indices] = True
        parts = (vector * stays).split([SHAPES[path][0] * SHAPES[path][1] for path in adapter])
        found.append({path: part.view(SHAPES[path]) for path, part in zip(adapter, parts, strict=True)})
    return found


def dropped(density: float, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = [{} for _ in ADAPTERS]
    for path in SHAPES:
        stays = torch.empty(len(ADAPTERS), *SHAPES[path]).bernoulli_(density, generator=generator)
        for adapter, mask, into in zip(ADAPTERS, stays, found, strict=True):
            into[path] = dense(adapter, path) * mask / density
    return found


def elected(vectors: list[dict[str, Tensor]], path: str) -> Tensor:
    """Value by value, as the paper writes it."""
    matrices = [w * one.get(path, torch.zeros(SHAPES[path])) for w, one in zip(WEIGHTS, vectors, strict=True)]
    out = torch.zeros(SHAPES[path])
    for at in range(out.numel()):
        values = [float(matrix.flatten()[at]) for matrix in matrices]
        sign = (sum(values) > 0) - (sum(values) < 0)
        agreeing = [value for value in values if value * sign > 0]
        out.view(-1)[at] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def test_linear_is_the_sum_of_weighted_deltas_and_not_the_product_of_sums() -> None:
    found = combine(ADAPTERS, settings())
    assert (found.rank, found.held) == (9, 1.0)
    for path in SHAPES:
        torch.testing.assert_close(product(found.layers[path]), summed(path), rtol=1e-5, atol=1e-5)
        assert found.layers[path].rank == 9


def test_linear_needs_no_more_rank_than_the_widest_layer_has() -> None:
    many = [deltas(seed, 6, 1.0) for seed in range(3)]
    found = combine(many, settings().model_copy(update={"weights": ()}))
    assert (found.rank, found.held) == (16, pytest.approx(1.0))
    for path in SHAPES:
        expected: Any = sum(dense(one, path) for one in many)
        torch.testing.assert_close(product(found.layers[path]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, None])
def test_svd_is_the_nearest_sum_of_its_rank(rank: int | None) -> None:
    found = combine(ADAPTERS, settings(method="svd", rank=rank))
    assert found.rank == (rank or 4)
    square = lost = 0.0
    for path in SHAPES:
        expected = nearest(summed(path), found.rank)
        torch.testing.assert_close(product(found.layers[path]), expected, rtol=1e-4, atol=1e-4)
        square += float(summed(path).square().sum())
        lost += float((summed(path) - expected).square().sum())
    assert found.held == pytest.approx((1 - lost / square) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties"])
def test_merging_value_by_value_follows_its_paper(method: str, rank: int) -> None:
    """At rank 16, all that any of the layers has, exactly; below it the nearest."""
    found = combine(ADAPTERS, settings(method=method, rank=rank, density=0.3, seed=4))
    assert found.held == (pytest.approx(1.0) if rank == 16 else pytest.approx(0.9, abs=0.2))
    vectors = trimmed(0.3) if method == "ties" else dropped(0.3, 4)
    for path in SHAPES:
        if method == "dare":
            expected: Any = sum(
                w * one.get(path, torch.zeros(SHAPES[path])) for w, one in zip(WEIGHTS, vectors, strict=True)
            )
        else:
            expected = elected(vectors, path)
        torch.testing.assert_close(product(found.layers[path]), nearest(expected, rank), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.77, 1.0])
def test_threshold_is_the_least_of_the_largest_magnitudes_of_all_layers(density: float) -> None:
    every = torch.cat([dense(ADAPTERS[0], path).abs().flatten() for path in SHAPES])
    assert threshold(ADAPTERS[0], density) == float(every.topk(max(1, round(density * len(every)))).values[-1])


# -------------------------------------------------------------------------------------------------------- as a folder


def writer(base: Path, settings: TrainingSettings, folder: Path, seed: int = 7, **trained: Any) -> Path:
    assembled = generation_helpers.on_base(base, settings)
    helpers.shake(assembled, seed)
    save_adapter(folder, assembled, helpers.TRAINED | {"held_out_score": 2.0, "scores": {}} | trained)
    return folder


def by_transformers(base: Path, *adapters: tuple[Path, float]) -> Tensor:
    """The base with every adapter's own deltas added to its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for folder, weight in adapters:
            stored = read_adapter(folder)
            for path, one in Lora.low_rank(stored.settings, stored.tensors).items():
                model.get_submodule(path).weight += weight * one.scale * (one.b @ one.a)
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def test_combined_adapter_answers_as_the_base_with_both_deltas(llama_writer: Path, tmp_path: Path) -> None:
    """Of other ranks, scales and layers each; the folder is one that every command takes."""
    one = writer(llama_writer, LoraSettings(rank=4, alpha=10, rslora=True, layers=(0, 1)), tmp_path / "one" / "adapter")
    two = writer(llama_writer, LoraSettings(rank=2, target_modules=("q_proj", "down_proj")), tmp_path / "two", 8)
    ran = capo("combine", one, two, "--weights", "0.5", "-1", "--out", tmp_path / "both")
    assert ran.code == 0, ran.err
    assert "one × 0.5, two × -1 by linear; rank 6" in ran.said
    expected = by_transformers(llama_writer, (one, 0.5), (two, -1.0))
    with torch.no_grad():
        found = capotune.load(tmp_path / "both").model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    said = capo("info", tmp_path / "both", "--check").said
    assert "combined: one × 0.5, two × -1 by linear; rank 6; not scored since" in said
    assert "answers as where it was trained" in said
    record = json.loads((tmp_path / "both" / "capotune.json").read_text())["trained"]["combined"]
    assert [part["settings"]["rank"] for part in record["adapters"]] == [4, 2]
    assert str(tmp_path) not in json.dumps(record)
    assert "Combined of one, two by linear" in (tmp_path / "both" / "README.md").read_text()
    merged = capotune.merge(tmp_path / "both", out=tmp_path / "merged")
    assert merged["answers"]["top1_agreement"] == 1


def test_seed_decides_what_dare_drops(llama_writer: Path, tmp_path: Path) -> None:
    folders = [writer(llama_writer, LoraSettings(rank=2), tmp_path / str(seed), seed) for seed in range(2)]
    made = {}
    for name, seed in (("a", 1), ("again", 1), ("other", 2)):
        result = capotune.combine(*folders, out=tmp_path / name, method="dare", density=0.5, seed=seed, rank=3)
        assert 0.3 < result["held"] < 1
        made[name] = read_adapter(tmp_path / name).tensors
    helpers.assert_same_bits(made["a"], made["again"])
    assert not all(torch.equal(made["a"][key], made["other"][key]) for key in made["a"])


def test_over_4_bits_the_combined_adapter_stays_there(llama_writer: Path, tmp_path: Path) -> None:
    """LoRA in full precision beside it is taken, and said."""
    over = writer(llama_writer, QloraSettings(rank=2, block_size=32), tmp_path / "over")
    plain = writer(llama_writer, LoraSettings(rank=2), tmp_path / "plain", 8)
    ran = capo("combine", over, plain, "--out", tmp_path / "both")
    assert ran.code == 0, ran.err
    assert "was trained over full precision, and the combined adapter is for a base in nf4" in ran.said
    stored = read_adapter(tmp_path / "both")
    assert isinstance(stored.settings, QloraSettings)
    assert (stored.settings.block_size, stored.settings.rank) == (32, 4)


def test_adapter_that_peft_wrote_is_combined_with_ours(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The same one, whose record is what ours alone has: half of each is the whole."""
    by_peft = Path(shutil.copytree(pair[0], tmp_path / "peft"))
    for name in ("capotune.json", "README.md"):
        (by_peft / name).unlink()
    capotune.combine(by_peft, pair[0], out=tmp_path / "both", weights=(0.5, 0.5))
    with torch.no_grad():
        found, expected = (capotune.load(folder).model(input_ids=IDS).logits for folder in (tmp_path / "both", pair[0]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "both" / "capotune.json").read_text("utf-8"))
    assert record["trained"]["combined"]["adapters"][1]["trained"] == {"score": None, "train_rows": 48}
    shutil.rmtree(tmp_path / "both")
    weights = by_peft / "adapter_model.safetensors"
    save_file({key.replace("layers.1", "layers.7"): one for key, one in load_file(weights).items()}, weights)
    refused(AdapterError, r"has no linear layer 'model\.layers\.7", tmp_path, pair[0], by_peft)


def labels(base: Path, settings: TrainingSettings, folder: Path, seed: int = 7, order: str = "") -> Path:
    assembled = helpers.on_base(base, settings, seed=seed)
    helpers.shake(assembled, seed)
    save_adapter(folder, assembled, helpers.TRAINED | {"scores": {}})
    if order:
        record = json.loads((folder / "capotune.json").read_text())
        (folder / "capotune.json").write_text(json.dumps(record | {"labels": order.split()}))
    return folder


def test_heads_are_averaged_label_by_label(bert: Path, tmp_path: Path) -> None:
    """The second adapter knows the labels in another order; without deltas of its own its head alone counts."""
    one = labels(bert, LoraSettings(rank=2), tmp_path / "one")
    two = labels(bert, LoraSettings(rank=2), tmp_path / "two", 8, "money late broken")
    capotune.combine(one, two, out=tmp_path / "both", weights=(1.0, 3.0))
    first, second, both = (read_adapter(folder).tensors for folder in (one, two, tmp_path / "both"))
    for name in ("weight", "bias"):
        key = f"base_model.model.classifier.{name}"
        expected = (first[key] + 3 * second[key][[1, 2, 0]]) / 4
        torch.testing.assert_close(both[key], expected)
    assert capotune.load(tmp_path / "both").labels == ("late", "broken", "money")
    same = capotune.combine(one, one, out=tmp_path / "same", weights=(0.25, 0.75))
    assert same["held"] == 1
    found, expected = (capotune.load(folder).predict_proba(TEXTS) for folder in (tmp_path / "same", one))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(error: type[CapotuneError], said: str, tmp_path: Path, *folders: Path, **options: Any) -> None:
    before = tree(tmp_path)
    with pytest.raises(error, match=said):
        capotune.combine(*folders, out=tmp_path / "both", **options)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def pair(llama_writer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    one = writer(llama_writer, LoraSettings(rank=2), folder / "one")
    return one, Path(shutil.copytree(one, folder / "two"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (PromptTuningSettings(num_virtual_tokens=3, init="vocabulary"), "prompt-tuning has no LoRA deltas"),
        (FeatureExtractionSettings(trainable_layers=1), "feature-extraction has no LoRA deltas"),
        (LoraSettings(rank=2, dora=True), "rescales whole rows.*Train it without `dora`"),
    ],
    ids=["prompt", "blocks", "dora"],
)
def test_technique_that_cannot_be_combined_says_why(
    other: TrainingSettings, said: str, pair: tuple[Path, Path], llama_writer: Path, tmp_path: Path
) -> None:
    folder = writer(llama_writer, other, tmp_path / "other")
    refused(AdapterError, f"{folder}: .*{said}", tmp_path, pair[0], folder)


def test_other_bases_tasks_and_labels_are_refused(
    pair: tuple[Path, Path], bert: Path, gpt2_writer: Path, tmp_path: Path
) -> None:
    of_gpt2 = writer(gpt2_writer, LoraSettings(rank=2), tmp_path / "gpt2")
    refused(AdapterError, "belongs to another base than", tmp_path, pair[0], of_gpt2)
    one = labels(bert, LoraSettings(rank=2), tmp_path / "one")
    others = labels(bert, LoraSettings(rank=2), tmp_path / "others", 8, "late broken gone")
    refused(AdapterError, r"3 labels are others than .*'gone', 'money'", tmp_path, one, others)
    refused(SettingError, "sum must be above 0", tmp_path, one, one, weights=(1.0, -1.0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": (1.0,)}, r"`weights=1`: there are 2 adapters. Allowed: 2 numbers"),
        ({"rank": 4}, "`rank=4`: linear writes the exact sum.*Give `method=svd`"),
        ({"rank": 400, "method": "ties"}, "`rank=400`: more than any layer has. Allowed: 1 to 48|1 to 32"),
        ({"density": 0.0}, "density"),
        ({"weights": (1.0, float("nan"))}, "weights"),
        ({"method": "cat"}, "'linear'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(options: dict[str, Any], said: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    refused(SettingError, said, tmp_path, *pair, **options)


def test_one_adapter_alone_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    refused(SettingError, "two adapters or more are combined, and .*one was given", tmp_path, pair[0])
