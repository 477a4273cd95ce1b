"""What is computed once: the same values as without a cache, found again by content alone, complete or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, assert_same_bits, examples, fit, on_base, predict_logits, sequences, shake, weights
from safetensors import SafetensorError
from torch import nn

import capotune
from capotune.adapters.assemble import Assembled
from capotune.adapters.fingerprint import config_hash
from capotune.data.batches import TokenRows
from capotune.engine import activation_cache
from capotune.engine.activation_cache import ActivationCache
from capotune.evaluation import forward
from capotune.evaluation.resume import resume_from
from capotune.events import Event, Warned
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.base import Base, Quantization, find
from capotune.models.load import load_backbone
from capotune.models.sequence_packing import Packing, packed
from capotune.runs import run as run_module
from capotune.runs.run import run
from capotune.settings import TrainSettings
from capotune.tasks import linear_head as head_module
from capotune.tasks.text_targets.features import compute_features

BASES = ("bert", "llama", "gpt2")
QUICK: dict[str, Any] = {"epochs": 2, "patience": 2, "batch_size": 8, "learning_rate": 5e-3, "head_learning_rate": 2e-2}


@pytest.fixture
def models(bert: Path, llama: Path, gpt2: Path) -> dict[str, Path]:
    return {"bert": bert, "llama": llama, "gpt2": gpt2}


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Every base loaded from now on raises when it is called with more than the one token that a head tries it on. No
    golden answers: they are asked of the whole model, whatever is cached."""
    monkeypatch.setattr(run_module, "golden_answers", lambda _assembled: [])
    real, loaded = head_module.load_backbone, []

    def load(*args: Any, **options: Any) -> Any:
        backbone = real(*args, **options)

        def refuse(_module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
            if given["input_ids"].numel() > 1:
                raise AssertionError("a forward pass")

        backbone.register_forward_pre_hook(refuse, with_kwargs=True)
        loaded.append(backbone)
        return backbone

    monkeypatch.setattr(head_module, "load_backbone", load)
    return loaded


def features(base: Path) -> Assembled:
    return on_base(base, FeatureExtractionSettings())


def pooled(cache: ActivationCache, assembled: Assembled, layers: tuple[int, ...], rows: TokenRows) -> torch.Tensor:
    """Features of these layers, from the cache or computed."""

    def compute() -> torch.Tensor:
        return compute_features(assembled, layers, rows, None, reduced=True)

    return cache.features(rows, compute, pooling=assembled.model.pooling, layers=layers)


def rows_of(assembled: Assembled, count: int = 12, seed: int = 0) -> TokenRows:
    return TokenRows(sequences(count, seed), assembled.task.pad_id, assembled.method.virtual_token_ids)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------ pooled features


@pytest.mark.usefixtures("all_bits")
@pytest.mark.parametrize("base", BASES)
def test_cached_features_are_the_computed_ones(base: str, models: dict[str, Path], tmp_path: Path) -> None:
    assembled = features(models[base])
    rows, layers = rows_of(assembled), assembled.model.feature_layers
    cold, warm, none = (ActivationCache(folder, {}) for folder in (tmp_path, tmp_path, None))
    computed, found, uncached = (pooled(cache, assembled, layers, rows) for cache in (cold, warm, none))
    assert torch.equal(found, computed)
    assert torch.equal(found, uncached)
    assert [cache.forward_rows for cache in (cold, warm, none)] == [12, 0, 12]
    assert (cold.reused_seconds, none.reused_seconds) == (0, 0)
    assert warm.reused_seconds >= 0
    for row in (0, 7):  # in the order of the rows, all layers side by side
        batch = rows.batch(torch.tensor([row]).numpy())
        with torch.no_grad():
            states = assembled.model.backbone(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
            ).hidden_states
        last = [state[0].mean(0) if assembled.task.pooling == "mean" else state[0, -1] for state in states]
        torch.testing.assert_close(found[row], torch.cat(last), rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_second_run_does_no_forward_pass(
    base: str, models: dict[str, Path], tickets: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first = capotune.train("feature-extraction", data=str(tickets), model=str(models[base]), out=tmp_path / "one")
    assert first["result"]["forward_rows"] == 96 + 3  # and the labels' names
    forbidden = request.getfixturevalue("forbidden")
    second = capotune.train("feature-extraction", data=str(tickets), model=str(models[base]), out=tmp_path / "two")
    assert len(forbidden) == 1
    assert second["result"]["forward_rows"] == 0
    assert json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))["result"]["forward_rows"] == 0
    assert second["result"]["reused_seconds"] > 0
    assert second["result"]["score"] == first["result"]["score"]
    with pytest.raises(AssertionError, match="a forward pass"):  # and without the cache it would be one
        capotune.train(
            "feature-extraction", data=str(tickets), model=str(models[base]), out=tmp_path / "three", cache=False
        )


def test_another_seed_or_head_setting_still_finds_them(bert: Path, tickets: Path, tmp_path: Path) -> None:
    capotune.train(
        "lora", data=str(tickets), validation_fraction=0.1, model=str(bert), out=tmp_path / "one", rank=2, epochs=1
    )
    record = capotune.train(
        "feature-extraction",
        data=str(tickets),
        validation_fraction=0.1,
        model=str(bert),
        out=tmp_path / "two",
        seed=3,
        batch_size=5,
    )
    assert record["result"]["forward_rows"] == 24  # the test rows; LoRA had computed those of the training rows


def test_everything_that_matters_makes_another_entry(bert: Path, tmp_path: Path) -> None:
    assembled = features(bert)
    rows = rows_of(assembled)
    longer = TokenRows([*rows.sequences[:-1], [*rows.sequences[-1], 3]], rows.pad_id)
    cut = TokenRows([sequence[:6] for sequence in rows.sequences], rows.pad_id)
    moved = TokenRows([[2, 9, 3, 2], [9, 3], *rows.sequences], 0), TokenRows([[2, 9, 3], [2, 9, 3], *rows.sequences], 0)
    plain = {"base": "x", "packing": None}
    seen: list[tuple[Any, ...]] = [
        (assembled, plain, (-1,), rows),
        (assembled, {**plain, "base": "y"}, (-1,), rows),
        (assembled, {**plain, "packing": {"quant_type": "nf4"}}, (-1,), rows),
        (assembled, {**plain, "packing": {"quant_type": "fp4"}}, (-1,), rows),
        (assembled, plain, (0, 1), rows),
        (assembled, plain, (-1,), longer),
        (assembled, plain, (-1,), cut),
        (assembled, plain, (-1,), moved[0]),
        (assembled, plain, (-1,), moved[1]),
        (on_base(bert, FeatureExtractionSettings(), pool="max"), plain, (-1,), rows),
    ]
    for number, (model, identity, layers, given) in enumerate(seen):
        cache = ActivationCache(tmp_path, identity)
        pooled(cache, model, layers, given)
        assert cache.forward_rows == len(given.sequences), number
    assert len(entries(tmp_path)) == len(seen)
    for block in (1, 2):
        ActivationCache(tmp_path, plain).boundary(assembled, block, rows)
    assert len(entries(tmp_path)) == len(seen) + 2


@pytest.mark.parametrize(
    "change", [{"max_length": 7}, {"model": "other"}, {"data": "other"}, {"model": "pooled"}, {"method": "qlora"}]
)
def test_another_run_finds_nothing_of_another_kind(
    change: dict[str, Any], bert: Path, gpt2: Path, tickets: Path, tmp_path: Path
) -> None:
    """The same file, but a longest length, a base's bits, a text, a pooling, or a packing that differs."""
    method = change.pop("method", "feature-extraction")
    capotune.train(
        "feature-extraction", data=str(tickets), validation_fraction=0.1, model=str(bert), out=tmp_path / "one"
    )
    if "data" in change:
        change["data"] = str(tmp_path / "other.csv")
        Path(change["data"]).write_text(tickets.read_text(encoding="utf-8").replace("parcel", "card"), encoding="utf-8")
    if change.get("model") == "other":
        change["model"] = str(gpt2)
    if change.get("model") == "pooled":
        folder = tmp_path / "pooled"
        (folder / "1_Pooling").mkdir(parents=True)
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}', encoding="utf-8")
        for path in bert.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change["model"] = str(folder)
    options = {"data": str(tickets), "validation_fraction": 0.1, "model": str(bert), "out": tmp_path / "two"} | change
    options |= {"epochs": 1} if method == "qlora" else {}
    record = capotune.train(method, **options)
    assert record["result"]["forward_rows"] == (72 if method == "qlora" else 96)


def test_a_base_moved_elsewhere_is_found_again(bert: Path, tickets: Path, tmp_path: Path) -> None:
    capotune.train(
        "feature-extraction", data=str(tickets), validation_fraction=0.1, model=str(bert), out=tmp_path / "one"
    )
    copied = tmp_path / "copy of the base"
    copied.mkdir()
    for path in bert.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    record = capotune.train(
        "feature-extraction", data=str(tickets), validation_fraction=0.1, model=str(copied), out=tmp_path / "two"
    )
    assert record["result"]["forward_rows"] == 0


# ------------------------------------------------------------------------------------------------------ boundary states


@pytest.mark.usefixtures("all_bits")
@pytest.mark.parametrize("packing", [None, Quantization("nf4", 64, True)], ids=["fp32", "nf4"])
@pytest.mark.parametrize("base", BASES)
def test_starting_at_a_block_is_the_whole_forward_pass(
    base: str, packing: Quantization | None, models: dict[str, Path], tmp_path: Path
) -> None:
    """Every row, in padded batches of other rows than those the states were computed in."""
    settings = FeatureExtractionSettings(trainable_layers=1) if packing is None else QloraSettings(rank=2, layers=(1,))
    assembled = on_base(models[base], settings)
    shake(assembled)
    rows = rows_of(assembled, 15)
    whole = predict_logits(assembled, rows)
    blocks = len(assembled.architecture.blocks)
    for block in range(1, blocks if packing is None else 2):
        states = ActivationCache(tmp_path, {}).boundary(assembled, block, rows)
        assert states.values.shape == (sum(rows.lengths), 32)
        found = torch.empty_like(whole)
        for how in (assembled.packing, Packing(None, "for this test")):
            with torch.no_grad(), packed(assembled.backbone, how), resume_from(assembled, block) as give:
                for chosen in torch.arange(15).flip(0).split(4):
                    batch = rows.batch(chosen.numpy(), first_position=how.first_position)
                    give(batch.laid_out(states.flat(chosen.numpy())))
                    found[chosen] = assembled.model.logits(batch)
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    assert torch.equal(predict_logits(assembled, rows), whole)  # the blocks are back, the hook is gone


@pytest.mark.parametrize("base", BASES)
def test_the_blocks_below_do_not_run(base: str, models: dict[str, Path]) -> None:
    assembled = on_base(models[base], FeatureExtractionSettings(trainable_layers=1))
    rows = rows_of(assembled)
    block = assembled.method.first_trainable_block()
    states = ActivationCache(None, {}).boundary(assembled, block, rows)
    called: list[str] = []
    for path in assembled.architecture.blocks:
        assembled.model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: called.append(path))
    predict_logits(assembled, rows, states)
    assert set(called) == {assembled.architecture.blocks[-1]}


@pytest.mark.parametrize(
    "settings",
    [
        FeatureExtractionSettings(trainable_layers=1, **QUICK),
        LoraSettings(rank=2, layers=(1,), **QUICK),
        LoraSettings(rank=2, layers=(1,), dropout=0.2, **QUICK),
        QloraSettings(rank=2, layers=(1,), **QUICK),
    ],
    ids=["features-k1", "lora-layers", "lora-dropout", "qlora-layers"],
)
@pytest.mark.parametrize("base", BASES)
def test_training_from_cached_states_is_training_without(
    settings: Any, base: str, models: dict[str, Path], tmp_path: Path
) -> None:
    outcomes = []
    for cached in (False, True):
        assembled = on_base(models[base], settings)
        given, held = examples(assembled), examples(assembled, 12, seed=1)
        if cached:
            cache = ActivationCache(tmp_path, {})
            block = assembled.method.first_trainable_block()
            assert block >= 1
            given, held = (
                replace(part, boundary=cache.boundary(assembled, block, part.rows)) for part in (given, held)
            )
        _, losses = fit(assembled, train_examples=given, held_examples=held)
        outcomes.append((losses, weights(assembled)))
    assert outcomes[1][0] == pytest.approx(outcomes[0][0], rel=1e-4)
    assert outcomes[0][0][0] > 1.1 * outcomes[0][0][-1]


def test_boundary_read_back_is_the_same_training(bert: Path, tickets: Path, tmp_path: Path) -> None:
    """Computed just now, found on disk, and never kept: the same adapter; the second run computes nothing again."""
    results = []
    for name, cache in (("cold", True), ("warm", True), ("none", False)):
        record = capotune.train(
            "feature-extraction", data=str(tickets), model=str(bert), out=tmp_path / name, trainable_layers=1,
            epochs=2, cache=cache, validation_fraction=0.1,
        )  # fmt: skip
        results.append(record["result"])
    cold, warm, none = (
        (tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("cold", "warm", "none")
    )
    assert cold == warm == none
    assert [result["forward_rows"] for result in results] == [144, 0, 144]  # 72 for the head, 72 up to the boundary
    assert [result["reused_seconds"] > 0 for result in results] == [False, True, False]


# -------------------------------------------------------------------------------------------------- complete or absent


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_disk_full(error: Exception, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"the half that still fitted")
        raise error

    monkeypatch.setattr(activation_cache, "save_file", full)
    assembled, said = features(bert), list[Event]()
    cache, rows = ActivationCache(tmp_path, {}, report=said.append), rows_of(assembled)
    for layers in ((-1,), (0, 1)):
        expected = pooled(ActivationCache(None, {}), assembled, layers, rows)
        assert torch.equal(pooled(cache, assembled, layers, rows), expected)
    assert entries(tmp_path) == []
    (warned,) = said
    assert isinstance(warned, Warned)
    assert re.fullmatch(
        rf"the cache in {tmp_path} cannot be written \(.*No space left on device; 1\.5 kB to write, .* free\): "
        "the run goes on without it\\.",
        warned.text,
    )


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses files above 4 kB: what a real full disk looks like to safetensors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_the_system_refuses_to_write(bert: Path, tmp_path: Path) -> None:
    assembled, said = features(bert), list[Event]()
    rows = rows_of(assembled, 60)
    states = ActivationCache(tmp_path, {}, report=said.append).boundary(assembled, 1, rows)
    expected = ActivationCache(None, {}).boundary(assembled, 1, rows)
    assert states is not None
    assert expected is not None
    assert torch.equal(states.values, expected.values)
    assert entries(tmp_path) == []
    assert len(said) == 1


@pytest.mark.parametrize("place", ["read-only", "a file"])
def test_a_cache_that_cannot_be_written_does_not_stop_a_run(
    place: str, bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir() if place == "read-only" else (tmp_path / "cache").touch()
    make = os.mkdir

    def forbid(path: Any, *rest: Any, **more: Any) -> None:  # the tests may run as root, whom nothing is forbidden
        if place == "read-only" and tmp_path / "cache" in Path(path).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", forbid)
    monkeypatch.setenv("CAPOTUNE_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    options: dict[str, Any] = {"data": str(tickets), "model": str(bert)}
    capotune.train(
        "feature-extraction", **options, out=tmp_path / "run",
        report=lambda event: said.append(event.text) if isinstance(event, Warned) else None,
    )  # fmt: skip
    capotune.train("feature-extraction", **options, out=tmp_path / "other", cache=False)
    assert sum("the run goes on without it" in text for text in said) == 1
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_damaged_entry_is_computed_again(keep: int, bert: Path, tmp_path: Path) -> None:
    assembled = features(bert)
    rows = rows_of(assembled)
    before = pooled(ActivationCache(tmp_path, {}), assembled, (-1,), rows)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    again = ActivationCache(tmp_path, {})
    assert torch.equal(pooled(again, assembled, (-1,), rows), before)
    assert again.forward_rows == 12
    final = ActivationCache(tmp_path, {})
    pooled(final, assembled, (-1,), rows)
    assert final.forward_rows == 0


@pytest.mark.parametrize("kind", ["features", "boundary"])
def test_one_flipped_bit_is_found_wherever_it_is(kind: str, bert: Path, tmp_path: Path) -> None:
    """In every byte of an entry's header and many of its values. One in a name of the header may do no harm."""
    assembled, said = features(bert), list[Event]()
    rows = rows_of(assembled, 4)

    def values(cache: ActivationCache) -> torch.Tensor:
        if kind == "features":
            return pooled(cache, assembled, (-1,), rows)
        states = cache.boundary(assembled, 1, rows)
        assert states is not None
        return states.values

    expected = values(ActivationCache(tmp_path, {})).clone()
    (path,) = tmp_path.iterdir()
    whole, copy = path.read_bytes(), tmp_path / "copy.safetensors"
    cache = ActivationCache(tmp_path, {}, report=said.append)
    first = 8 + int.from_bytes(whole[:8], "little")
    for at in (*range(first), *range(first, len(whole), 7)):
        copy.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        found = cache._read("copy")
        assert found is None if at >= first else found is None or torch.equal(found[0], expected), at
    copy.unlink()
    assert said == [Warned(text=f"what was cached in {copy} is damaged on the disk, and is computed again.")]
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 16]) + whole[-4:])
    again = ActivationCache(tmp_path, {})
    assert torch.equal(values(again), expected)
    assert again.forward_rows == 4
    assert path.read_bytes()[first:] == whole[first:]


def test_states_are_kept_without_padding_and_mapped(bert: Path, tmp_path: Path) -> None:
    assembled = on_base(bert, FeatureExtractionSettings(trainable_layers=1))
    rows = rows_of(assembled, 40)
    states = ActivationCache(tmp_path, {}).boundary(assembled, 2, rows)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < sum(rows.lengths) * 32 * 4 + 400
    batch, flat = rows.batch(np.array([3, 8])), states.flat([3, 8])
    assert flat.shape == (rows.lengths[3] + rows.lengths[8], 32)
    padded = batch.laid_out(flat)
    assert padded.shape == (2, max(rows.lengths[3], rows.lengths[8]), 32)
    assert torch.equal(batch.flat(padded), flat)
    shorter = min((3, 8), key=lambda row: rows.lengths[row])
    assert not padded[(3, 8).index(shorter), rows.lengths[shorter] :].any()


@pytest.mark.usefixtures("all_bits")  # AMX leaves a few rows to PyTorch
def test_inference_batches_do_not_change_the_values(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembled = features(bert)
    rows = rows_of(assembled)
    whole = compute_features(assembled, (0, -1), rows, None, reduced=True)
    monkeypatch.setattr(forward, "tokens_at_once", lambda _device: 20)
    steps: list[int] = []
    small = compute_features(assembled, (0, -1), rows, lambda done, _: steps.append(done), reduced=True)
    assert len(steps) > 1
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-6)


def test_the_model_is_whole_again_afterwards(bert: Path) -> None:
    """After stopping at a boundary nothing stays on the model: with the method off, it is the base."""
    backbone = load_backbone(find(str(bert)))
    assembled = on_base(bert, FeatureExtractionSettings(trainable_layers=2))
    rows = rows_of(assembled, 4)
    ActivationCache(None, {}).boundary(assembled, 1, rows)
    assembled.method.detach()
    batch = rows.batch(torch.arange(4).numpy()).to(CPU)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        here, there = (model(**inputs).last_hidden_state for model in (assembled.model.backbone, backbone))
    assert_same_bits({"states": here}, {"states": there})


def test_the_same_weights_read_otherwise_are_another_base(bert: Path, tickets: Path, tmp_path: Path) -> None:
    """Another activation in config.json: nothing of the first base may be served. Another name changes nothing."""
    other, renamed = tmp_path / "other", tmp_path / "renamed"
    for folder, change in ((other, {"hidden_act": "relu"}), (renamed, {"_name_or_path": "elsewhere"})):
        shutil.copytree(bert, folder)
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    computed = [
        run(
            TrainSettings(model=str(base), data=str(tickets), validation_fraction=0.1, out=tmp_path / f"out{at}"),
            FeatureExtractionSettings(),
        )["result"]["forward_rows"]
        for at, base in enumerate((bert, renamed, other))
    ]
    assert computed[1] == 0
    assert computed[0] == computed[2] > 0


def test_code_that_comes_with_a_base_is_part_of_it(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "coded")
    data_only = Base("coded", tmp_path / "coded")
    with_code = replace(data_only, trust_remote_code=True)
    plain = config_hash(data_only)
    assert config_hash(with_code) == plain
    (tmp_path / "coded" / "modeling.py").write_text("a = 1")
    assert config_hash(data_only) == plain
    assert config_hash(with_code) != plain


def test_an_entry_taken_away_while_it_is_opened_is_computed_again(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembled = features(bert)
    rows = rows_of(assembled)
    expected = pooled(ActivationCache(tmp_path, {}), assembled, (0,), rows)

    def gone(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("capotune.engine.activation_cache.safe_open", gone)
    cache = ActivationCache(tmp_path, {})
    assert torch.equal(pooled(cache, assembled, (0,), rows), expected)
    assert cache.forward_rows == len(rows.sequences)


def test_what_a_killed_process_left_is_removed_after_days(bert: Path, tmp_path: Path) -> None:
    old, new = tmp_path / ".old", tmp_path / ".new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assembled = features(bert)
    pooled(ActivationCache(tmp_path, {}), assembled, (0,), rows_of(assembled))
    assert not old.exists()
    assert new.exists()
