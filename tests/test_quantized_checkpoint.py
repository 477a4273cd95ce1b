"""Models that bitsandbytes packed and Transformers saved: loaded as they are, and refused when they are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import examples, fit, logits, on_base
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import capotune
from capotune import device
from capotune.device import compute_dtype
from capotune.errors import ModelError, SettingError
from capotune.events import Event, Heartbeat, Progress, Stage
from capotune.kernels.nf4 import Linear4bit
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models import stream
from capotune.models.base import Quantization, find
from capotune.models.load import load_backbone, load_causal_lm
from capotune.models.shards import Shards

NF4 = Quantization("nf4", 64, True)
FAMILIES = ("llama", "bert", "gpt2")


def config_of(family: str) -> Any:
    """Small, with rows that are whole blocks of 64: bitsandbytes' CPU kernel misreads others (tests/test_nf4.py)."""
    from transformers import BertConfig, GPT2Config, LlamaConfig

    common = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"intermediate_size": 128, "max_position_embeddings": 64}
    if family == "llama":
        return LlamaConfig(**common, num_key_value_heads=2)
    if family == "bert":
        return BertConfig(**common)
    return GPT2Config(vocab_size=40, n_embd=64, n_layer=2, n_head=4, n_positions=64)


def saved_by_bitsandbytes(folder: Path, family: str, tokenizer_of: Path, **packing: Any) -> Path:
    """A random model packed with bitsandbytes inside Transformers and saved; ``folder/full`` is what it was before."""
    from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

    auto = AutoModel if family == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config_of(family)).save_pretrained(folder / "full")
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | packing
    how = BitsAndBytesConfig(load_in_4bit=True, **how)
    auto.from_pretrained(folder / "full", quantization_config=how, dtype=torch.float32).save_pretrained(
        folder / "packed"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for kind in ("full", "packed"):
            shutil.copy(tokenizer_of / name, folder / kind)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Callable[..., Path]:
    """Makes each of them once."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, **packing: Any) -> Path:
        key = (family, str(sorted(packing.items())))
        if key not in made:
            made[key] = saved_by_bitsandbytes(tmp_path_factory.mktemp(family), family, bert, **packing)
        return made[key]

    return make


def load(folder: Path, **options: Any) -> Any:
    source = find(str(folder))
    causal = source.config_values["architectures"][0] != "BertModel"
    return (load_causal_lm if causal else load_backbone)(source, **options)


def states(model: Any) -> Tensor:
    """Logits, or last states. With gradients on: without, bitsandbytes' CPU path rounds what it multiplies to bf16."""
    ids = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids)[0].detach()  # type: ignore[no-any-return]


def packed_layers(model: nn.Module) -> dict[str, Linear4bit]:
    return {path: part for path, part in model.named_modules() if isinstance(part, Linear4bit)}


# ------------------------------------------------------------------------------------------------------ what is loaded


@pytest.mark.parametrize("packing", [{}, {"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": False}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_to_the_bit_as_transformers_with_bitsandbytes_does(
    family: str, packing: dict[str, Any], saved: Callable[..., Path]
) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    folder = saved(family, **packing) / "packed"
    theirs = (AutoModel if family == "bert" else AutoModelForCausalLM).from_pretrained(folder)
    model = load(folder)
    assert torch.equal(states(model), states(theirs.eval()))
    assert len(packed_layers(model)) == {"llama": 14, "bert": 12, "gpt2": 8}[family]
    kind, nested = packing.get("bnb_4bit_quant_type", "nf4"), packing.get("bnb_4bit_use_double_quant", True)
    assert find(str(folder)).quantization == Quantization(kind, 64, nested)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_unpacked_on_the_way(
    family: str, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes in memory are the codes in the file, also where a setting asks for another: the folder's wins."""
    folder = saved(family) / "packed"
    monkeypatch.setattr(stream, "quantize_4bit", lambda *_, **__: pytest.fail("a weight was packed again"))
    stored = load_file(folder / "model.safetensors")
    for asked in (None, Quantization("fp4", 128, False)):
        layers = packed_layers(load(folder, quantization=asked))
        assert layers
        for path, layer in layers.items():
            codes = next(tensor for name, tensor in stored.items() if name.endswith(f"{path}.weight"))
            assert torch.equal(layer.codes, codes.view(-1))
            assert layer.quant_type == "nf4"


def test_a_layer_that_was_left_whole_stays_whole(saved: Callable[..., Path]) -> None:
    folder = saved("llama", llm_int8_skip_modules=["lm_head", "down_proj"]) / "packed"
    model = load(folder, quantization=NF4)
    assert {type(model.get_submodule(f"model.layers.{n}.mlp.down_proj")) for n in range(2)} == {nn.Linear}
    assert len(packed_layers(model)) == 12


def test_parts_may_stand_in_another_shard(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("llama") / "packed", tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    expected = states(load(folder))
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{at % 3}.safetensors" for at, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    assert torch.equal(states(load(folder)), expected)


def test_progress_ends_with_everything(saved: Callable[..., Path]) -> None:
    for folder, quantization in ((saved("llama") / "packed", None), (saved("llama") / "full", NF4)):
        seen: list[tuple[int, int]] = []
        load(folder, quantization=quantization, progress=lambda done, total, seen=seen: seen.append((done, total)))
        total = Shards([folder / "model.safetensors"]).nbytes
        assert seen[-1] == (total, total)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert len(seen) > 10


# ------------------------------------------------------------------------------------------------- what trains on it


@pytest.mark.parametrize(
    "settings",
    [
        QloraSettings(rank=2, epochs=1, learning_rate=1e-2),
        LoraSettings(rank=2, epochs=1, learning_rate=1e-2),
        PromptTuningSettings(num_virtual_tokens=3, epochs=1),
        FeatureExtractionSettings(epochs=1),
    ],
    ids=lambda settings: settings.method,
)
def test_every_method_that_leaves_the_base_alone_trains_on_it(settings: Any, saved: Callable[..., Path]) -> None:
    assembled = on_base(saved("llama") / "packed", settings)
    before = {path: layer.codes.clone() for path, layer in packed_layers(assembled.model).items()}
    assert before
    if settings.method != "feature-extraction":
        _, losses = fit(assembled, train_examples=examples(assembled))
        assert losses[-1] < losses[0]
    assert torch.isfinite(logits(assembled)).all()
    after = packed_layers(assembled.model)
    assert all(torch.equal(after[path].codes, codes) for path, codes in before.items())


def test_a_run_says_how_its_base_is_stored_and_shows_the_load(
    llama_writer: Path, colour_pairs: Path, tmp_path: Path
) -> None:
    capotune.quantize(str(llama_writer), out=tmp_path / "packed")
    events: list[Event] = []
    record = capotune.train(
        "qlora", data=str(colour_pairs), model=str(tmp_path / "packed"), out=tmp_path / "run", epochs=1, rank=2,
        quant_type="fp4", report=events.append,
    )  # fmt: skip
    loading = next(
        at for at, event in enumerate(events) if isinstance(event, Stage) and event.text.startswith("loading base")
    )
    said = events[loading].text
    assert "in the 4 bits that it is stored in (nf4, blocks of 64, double-quantised)" in said
    dtype = "float32"  # too narrow a model to gain from bf16
    assert f"to compute in {dtype} on cpu" in said
    assert record["base"]["quantization"] == "nf4, blocks of 64, double-quantised"
    after = (event for event in events[loading + 1 :] if not isinstance(event, Heartbeat))
    steps = list(takewhile(lambda event: isinstance(event, Progress), after))
    shown = [event.done for event in steps]
    assert shown
    assert shown == sorted(shown)
    assert shown[-1] == steps[0].total


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("instructions", [{}, {"avx512_bf16": True}, {"amx_bf16": True}], ids=str)
def test_a_packed_model_computes_in_bf16_where_the_processor_can(
    instructions: dict[str, bool], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, has_bf16 = torch.device("cpu"), instructions and level in ("avx512", "amx")
    monkeypatch.setattr(device, "machine_cpu_level", lambda: "amx")
    monkeypatch.setenv("CAPOTUNE_CPU_LEVEL", level)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert compute_dtype(cpu, quantized=True) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert compute_dtype(cpu) == torch.float32  # a model in full precision is trained as it always was
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert compute_dtype(cpu, quantized=True) == torch.float32


def test_packed_weights_do_not_train(saved: Callable[..., Path]) -> None:
    with pytest.raises(SettingError, match=r"`trainable_layers=1`: this base is stored in 4 bits.*full precision"):
        on_base(saved("llama") / "packed", FeatureExtractionSettings(trainable_layers=1))


# ---------------------------------------------------------------------------------------------------- what is refused

WEIGHT = "model.layers.1.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def restate(tensors: dict[str, Tensor], **facts: Any) -> None:
    """Change what the quant state says."""
    stated = json.loads(bytes(tensors[STATE].tolist())) | facts
    tensors[STATE] = torch.tensor(list(json.dumps(stated).encode()), dtype=torch.uint8)


def cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)})


def unknown_type(tensors: dict[str, Tensor]) -> None:
    restate(tensors, quant_type="int4")
    tensors[STATE.replace("nf4", "int4")] = tensors.pop(STATE)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "codes cut short": (cut(WEIGHT), "codes is"),
    "absmax cut short": (cut(f"{WEIGHT}.absmax"), "absmax is"),
    "nested absmax cut short": (cut(f"{WEIGHT}.nested_absmax"), "nested_absmax is"),
    "absmax missing": (lambda tensors: tensors.pop(f"{WEIGHT}.absmax"), "absmax is missing"),
    "codes missing": (lambda tensors: tensors.pop(WEIGHT), f"{WEIGHT} is missing|lack {WEIGHT}"),
    "no quant state": (lambda tensors: tensors.pop(STATE), "found 0"),
    "quant state is no JSON": (fill(STATE, 200), "not JSON"),
    "another block size": (lambda tensors: restate(tensors, blocksize=128), "absmax is"),
    "a block size that is none": (lambda tensors: restate(tensors, blocksize=100), "block size 100"),
    "a shape that does not hold": (lambda tensors: restate(tensors, shape=[128, 65]), "codes is"),
    "a shape turned round": (lambda tensors: restate(tensors, shape=[64, 128]), "where config.json asks"),
    "a shape that is none": (lambda tensors: restate(tensors, shape=[128, -64]), "shape"),
    "an unknown type": (unknown_type, "unknown 4-bit type 'int4'"),
    "scales that are not finite": (fill(f"{WEIGHT}.nested_absmax", float("nan")), "nested_absmax holds values"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_refused_by_name_and_file(damage: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("llama") / "packed", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    change, said = DAMAGE[damage]
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=said) as raised:
        load(folder)
    assert WEIGHT in str(raised.value)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("left", [0.5, 0.99])
def test_a_file_that_was_cut_short(left: float, saved: Callable[..., Path], tmp_path: Path) -> None:
    for kind in ("packed", "full"):
        folder = shutil.copytree(saved("llama") / kind, tmp_path / f"{kind}-{left}")
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
        with pytest.raises(ModelError, match="ends inside the tensor model") as raised:
            load(folder, quantization=NF4)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_cannot_be_packed(value: float, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("llama") / "full", tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="holds 1 values that are NaN or infinite") as raised:
        load(folder, quantization=NF4)
    assert f"{folder / 'model.safetensors'}: the tensor {WEIGHT}" in str(raised.value)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "the format 'gptq'.*full precision"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ("nonsense", "the format None"),
    ],
    ids=str,
)
def test_other_formats_are_refused(stated: Any, said: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("llama") / "packed", tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said) as raised:
        find(str(folder))
    assert str(folder) in str(raised.value)


def test_a_config_that_says_packed_where_nothing_is(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("llama") / "full", tmp_path / "not packed")
    shutil.copy(saved("llama") / "packed" / "config.json", folder)
    with pytest.raises(ModelError, match="says that weights are stored in 4 bits, and none is"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 8 + b"{}",
        (10).to_bytes(8, "little") + b"not json!!",
        (2).to_bytes(8, "little") + b"[]",
        (11).to_bytes(8, "little") + b'{"a": null}',
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}     ',
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}      ' + b"1234",
    ],
)
def test_a_header_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a complete safetensors file") as raised:
        Shards([path])
    assert str(path) in str(raised.value)


def test_an_unread_dtype_is_named(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ModelError, match="the tensor a has the dtype F4"):
        Shards([tmp_path / "model.safetensors"]).read("a")
