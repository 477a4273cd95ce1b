"""What QLoRA's base takes, measured; and the embedded base, checked before it is used."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import sys
import weakref
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import CPU, LABELS, fit, on_base
from torch import nn

from capotune.adapters.assemble import assemble
from capotune.data.batches import collate
from capotune.errors import MissingLibraryError, ModelError
from capotune.kernels.nf4 import Linear4bit, quantize_4bit
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models import base as base_module
from capotune.models.architecture import LINEAR_TYPES, parameter_count
from capotune.models.base import EMBEDDED, Quantization, find
from capotune.models.load import load_backbone
from capotune.models.shards import Shards
from capotune.tasks.classification import Classification

PACKAGE, SHA256 = EMBEDDED["minilm"].package, EMBEDDED["minilm"].sha256
MINILM_IS_THERE = importlib.util.find_spec(PACKAGE.replace("-", "_")) is not None
needs_minilm = pytest.mark.skipif(not MINILM_IS_THERE, reason=f"the extra 'demo' ({PACKAGE}) is not installed")
NF4 = Quantization("nf4", 64, True)
MOST = 0.14
"""Bytes of the packed weights over their bytes in fp32; 4.127 bits a weight are 0.129."""


def packed_layers(module: nn.Module) -> list[Linear4bit]:
    return [part for part in module.modules() if isinstance(part, Linear4bit)]


def held_bytes(layer: Linear4bit) -> int:
    """What the layer's buffers really take, whole storages and not views."""
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage() for buffer in layer.buffers()}
    return sum(storage.nbytes() for storage in storages.values())


def living_tensors() -> list[torch.Tensor]:
    """Every tensor that Python can reach."""
    gc.collect()
    return [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]


@needs_minilm
def test_packed_minilm_takes_an_eighth() -> None:
    source = find("minilm")
    before = {id(tensor) for tensor in living_tensors()}
    backbone = load_backbone(source, quantization=NF4)
    layers = packed_layers(backbone)
    assert len(layers) == 6 * 6  # q, k, v, o and two of the MLP in six blocks: every linear layer
    assert not [part for part in backbone.modules() if isinstance(part, nn.Linear)]
    full = sum(4 * layer.in_features * layer.out_features for layer in layers)
    assert sum(held_bytes(layer) for layer in layers) <= MOST * full
    assert sum(layer.weight_nbytes for layer in layers) <= MOST * full
    # no dense copy of any of them is alive, under any name
    shapes = {(layer.out_features, layer.in_features) for layer in layers}
    dense = [
        tensor
        for tensor in living_tensors()
        if id(tensor) not in before and tensor.is_floating_point() and tensor.device.type == "cpu"
        and (tuple(tensor.shape) in shapes or tuple(tensor.shape[::-1]) in shapes)
    ]  # fmt: skip
    assert dense == []
    assert parameter_count(backbone) == parameter_count(load_backbone(source))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_large_layer_takes_an_eighth(quant_type: str) -> None:
    linear = nn.Linear(1024, 4096)
    layer = Linear4bit.from_linear(linear, quant_type=quant_type)
    assert held_bytes(layer) - layer.bias.nbytes <= MOST * linear.weight.nbytes  # type: ignore[union-attr]
    plain = Linear4bit.from_linear(linear, quant_type=quant_type, double_quant=False)
    assert held_bytes(layer) < held_bytes(plain)  # what double quantisation is for


class WatchedShards(Shards):
    """Files that note, at every read, how many linear weights read before are still alive."""

    linears: ClassVar[set[str]]
    alive: ClassVar[list[weakref.ref[torch.Tensor]]]
    most: ClassVar[int]

    def read(self, key: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        living = sum(one() is not None for one in self.alive)
        tensor = super().read(key, buffer)
        if any(key.endswith(name) for name in self.linears):
            WatchedShards.most = max(self.most, living + 1)
            self.alive.append(weakref.ref(tensor))
        return tensor


@pytest.mark.parametrize("base", ["minilm", "bert", "llama", "gpt2"])
def test_at_most_one_weight_is_whole_while_streaming(
    base: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if base == "minilm" and not MINILM_IS_THERE:
        pytest.skip(f"the extra 'demo' ({PACKAGE}) is not installed")
    name = base if base == "minilm" else str(request.getfixturevalue(base))
    whole = load_backbone(find(name))
    WatchedShards.linears = {f"{path}.weight" for path, part in whole.named_modules() if isinstance(part, LINEAR_TYPES)}
    WatchedShards.alive, WatchedShards.most = [], 0
    monkeypatch.setattr(base_module, "Shards", WatchedShards)
    backbone = load_backbone(find(name), quantization=NF4)
    assert len(WatchedShards.alive) == len(packed_layers(backbone)) == len(WatchedShards.linears)
    assert WatchedShards.most == 1
    assert not [one for one in WatchedShards.alive if one() is not None]


@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
def test_streamed_is_loaded_and_packed(base: str, request: pytest.FixtureRequest) -> None:
    """Tensor by tensor from disk gives the codes of the loaded model packed, and the other weights as they are."""
    source = find(str(request.getfixturevalue(base)))
    streamed, whole = load_backbone(source, quantization=NF4), load_backbone(source)
    assert not [name for name, parameter in streamed.named_parameters() if parameter.is_meta]
    packed = dict(streamed.named_modules())
    for path, layer in whole.named_modules():
        if not isinstance(packed[path], Linear4bit):
            continue
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t().contiguous()
        expected = Linear4bit.from_quantized(
            quantize_4bit(weight, quant_type="nf4", block_size=64, double_quant=True), bias=layer.bias
        )
        for name, buffer in expected.named_buffers():
            assert torch.equal(buffer, packed[path].get_buffer(name)), (path, name)
        assert (layer.bias is None) == (packed[path].bias is None)
    others = dict(whole.named_parameters())
    for name, parameter in streamed.named_parameters():
        assert torch.equal(parameter, others[name]), name
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, streamed.get_buffer(name)), name


@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
def test_training_leaves_no_dense_weight(base: str, request: pytest.FixtureRequest) -> None:
    """After steps forward and backward the packed layers are all that is left of the weights."""
    assembled = on_base(request.getfixturevalue(base), QloraSettings(rank=3, epochs=1, learning_rate=1e-2))
    layers = packed_layers(assembled.model)
    shapes = {(layer.out_features, layer.in_features) for layer in layers}
    shapes -= {tuple(weight.shape) for weight in assembled.model.parameters()}  # of an embedding, say
    assert shapes
    before = {id(tensor) for tensor in living_tensors()}
    fit(assembled, on_step=lambda state, *_: state.step == 2)
    assert not [one for one in living_tensors() if id(one) not in before and tuple(one.shape) in shapes]


@needs_minilm
def test_qlora_on_minilm_trains_from_packed_weights() -> None:
    """The assembled model is packed too, and answers like the same base in fp32 up to the rounding of 4 bits."""
    source = find("minilm")
    task = Classification.on(source, LABELS, None, 0)
    packed, whole = (assemble(task, one, device=CPU) for one in (QloraSettings(), LoraSettings()))
    ids = source.tokenizer(["where is my parcel", "I was charged twice"])["input_ids"]
    with torch.no_grad():
        here, there = (one.model.features(collate(ids, np.arange(2), 0), (-1,)) for one in (packed, whole))
    assert nn.functional.cosine_similarity(here, there).min() > 0.97
    assert not torch.equal(here, there)


# ---------------------------------------------------------------------------------------------------- the embedded base


@pytest.fixture
def copied_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model folder of a copy of the package, which is found in the place of the real one."""
    name = PACKAGE.replace("-", "_")
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    folder = tmp_path / name
    shutil.copytree(Path(spec.origin).parent, folder)
    found = ModuleSpec(name, None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(base_module.importlib.util, "find_spec", lambda _: found)
    return folder / "model"


@needs_minilm
def test_whole_package_is_taken_without_importing_it(copied_package: Path) -> None:
    assert find("minilm").folder == copied_package
    assert PACKAGE.replace("-", "_") not in sys.modules


@needs_minilm
@pytest.mark.parametrize("at", [12, 20_000_000, -1])
def test_one_flipped_byte_is_refused(at: int, copied_package: Path) -> None:
    """In the header, in the middle, at the end."""
    path = copied_package / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"is damaged or another version.*expected {SHA256}.*pip install") as raised:
        find("minilm")
    assert str(path) in str(raised.value)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingLibraryError, match=f"pip install {PACKAGE}"):
        find("minilm")


@needs_minilm
def test_minilm_pools_by_the_mean() -> None:
    source = find("minilm")
    assert source.pooling == "mean"
    assert Classification.on(source, LABELS, None, 0).max_length <= 512
