"""``capo export``: what another program loads answers as the adapter does; what it cannot take is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import generation_helpers
import helpers
import pytest
import torch
from commands import capo, tree
from safetensors.torch import load_file, save_file

import capotune
from capotune.adapters.assemble import Assembled
from capotune.adapters.loaders import LOADERS, Traits, judge, traits
from capotune.adapters.store import read_adapter, save_adapter
from capotune.conversion_settings import ExportSettings
from capotune.errors import AdapterError, SettingError
from capotune.evaluation.agreement import Agreement, agreement
from capotune.methods.feature_extraction.settings import FeatureExtractionSettings
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.methods.qlora.settings import QloraSettings
from capotune.models.gguf import write
from capotune.runs.publish import publish

LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "epochs": 1}
VARIANTS = {
    "lora": LoraSettings(**LORA),
    "dora": LoraSettings(dora=True, **LORA),
    "rslora": LoraSettings(rslora=True, **LORA),
    "fractional": LoraSettings(**LORA | {"alpha": 5.3}),
    "one-block": LoraSettings(layers=(1,), target_modules=("q_proj", "down_proj"), **LORA),
}
IDS = torch.randint(8, 300, (2, 12), generator=torch.Generator().manual_seed(5))


def save(assembled: Assembled, folder: Path) -> Path:
    """As an adapter folder, its weights moved from where they start."""
    helpers.shake(assembled)
    save_adapter(folder, assembled, helpers.TRAINED | {"held_out_score": 2.0, "scores": {}})
    return folder


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def made(base: Path, folder: Path, settings: Any = VARIANTS["lora"]) -> tuple[Path, torch.Tensor]:
    """An adapter's folder, and what it answers."""
    assembled = generation_helpers.on_base(base, settings)
    return save(assembled, folder / "adapter"), answers(assembled.model)


@pytest.fixture(scope="module")
def lora(writers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A LoRA adapter of the small Llama, and what it answers."""
    return made(writers["llama"], tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def merged_llama(lora: tuple[Path, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its merged model in F16."""
    pytest.importorskip("gguf")
    out = tmp_path_factory.mktemp("merged") / "out"
    result = capotune.export(lora[0], loader="llama.cpp", out=out, merged=True)
    assert result["files"] == ["model.gguf"]
    return out


# ------------------------------------------------------------------------------------------------ vLLM, SGLang, PEFT


def test_a_link_out_of_an_adapter_is_not_exported(writers: dict[str, Path], tmp_path: Path) -> None:
    adapter, _ = made(writers["llama"], tmp_path, PromptTuningSettings(num_virtual_tokens=3, deep=False))
    (tmp_path / "secret").write_text("hunter2", encoding="utf-8")
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(tmp_path / "secret")
    for name in ("notes.txt", "more.safetensors"):
        (adapter / name).symlink_to(tmp_path / "secret")
    assert "hunter2" not in str(publish(read_adapter(adapter), "ours/copy", "ours/base", None).files)
    with pytest.raises(AdapterError, match=r"README.md.*a link that leaves the folder"):
        capotune.export(adapter, loader="peft", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_answers_as_the_adapter_with_what_is_written_for_vllm(
    variant: str, writers: dict[str, Path], tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    adapter, expected = made(writers["llama"], tmp_path, VARIANTS[variant])
    result = capotune.export(adapter, loader="vllm", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"], config["bias"]) == (False, False, "none")
    assert isinstance(config["lora_alpha"], int)
    base = AutoModelForCausalLM.from_pretrained(writers["llama"])
    found = answers(peft.PeftModel.from_pretrained(base, tmp_path / "out").eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert result["agreement"]["to_adapter"] < 1e-8 < result["agreement"]["to_base"]
    assert "--max-lora-rank" in result["command"]


def test_every_block_has_all_names_and_the_rank_is_one_that_is_served(writers: dict[str, Path], tmp_path: Path) -> None:
    adapter, _ = made(writers["llama"], tmp_path, VARIANTS["one-block"])
    capotune.export(adapter, loader="sglang", out=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for block in range(3):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            a = tensors[f"base_model.model.model.layers.{block}.{name}.lora_A.weight"]
            assert a.shape[0] == 8
            assert bool(a.any()) == (block == 1)


def test_soft_prompt_is_copied_for_peft(writers: dict[str, Path], tmp_path: Path) -> None:
    adapter, _ = made(writers["llama"], tmp_path, PromptTuningSettings(num_virtual_tokens=3, deep=False))
    capotune.export(adapter, loader="peft", out=tmp_path / "out")
    assert tree(tmp_path / "out") == tree(adapter)


def test_whole_blocks_become_a_merged_folder_for_vllm(writers: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    adapter, expected = made(writers["llama"], tmp_path, FeatureExtractionSettings(trainable_layers=1))
    result = capotune.export(adapter, loader="vllm", out=tmp_path / "out")
    assert result["form"] == "merged"
    assert result["command"] == f"vllm serve {tmp_path / 'out'}"
    found = answers(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_merged_qlora_is_compared_on_the_weights_that_it_is_merged_into(
    writers: dict[str, Path], tmp_path: Path
) -> None:
    """What quantizing the base cost is no fault of the merge: a small change would drown in it."""
    assembled = generation_helpers.on_base(writers["llama"], QloraSettings(**LORA))
    helpers.shake(assembled)
    with torch.no_grad():
        for weight in assembled.trainable().values():
            weight *= 0.3
    save_adapter(tmp_path / "adapter", assembled, helpers.TRAINED | {"held_out_score": 2.0, "scores": {}})
    found = capotune.export(tmp_path / "adapter", loader="transformers", out=tmp_path / "out")["agreement"]
    assert found["to_adapter"] < 1e-8 < 1e-5 < found["to_base"]
    assert capotune.merge(tmp_path / "adapter", out=tmp_path / "merged")["answers"]["over_4_bits"] > found["to_base"]


def test_classifier_is_merged_for_transformers_with_its_head_beside(bert: Path, tmp_path: Path) -> None:
    adapter = save(helpers.on_base(bert, VARIANTS["lora"]), tmp_path / "adapter")
    capotune.export(adapter, loader="transformers", out=tmp_path / "out")
    texts = ["my parcel is late", "the lamp is broken"]
    expected = capotune.load(adapter).predict_proba(texts)
    found = capotune.load(tmp_path / "out" / "adapter").predict_proba(texts)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- llama.cpp, Ollama


def test_gguf_adapter_holds_what_llama_cpps_converter_would_write(writers: dict[str, Path], tmp_path: Path) -> None:
    """Names, scale, and the rows of B for queries and keys in pairs, by that converter's own formula."""
    gguf = pytest.importorskip("gguf")
    from gguf_files import permuted

    adapter, _ = made(writers["llama"], tmp_path, VARIANTS["rslora"])
    result = capotune.export(adapter, loader="llama.cpp", out=tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter", "lora", "llama",
    )  # fmt: skip
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    deltas = LoraMethod().low_rank(adapter)
    assert len(found) == 2 * len(deltas)
    names = {"self_attn.q_proj": ("attn_q", 4), "self_attn.k_proj": ("attn_k", 2), "mlp.down_proj": ("ffn_down", None)}
    for block in range(3):
        for name, (called, heads) in names.items():
            one = deltas[f"model.layers.{block}.{name}"]
            delta = one.scale * one.b @ one.a
            a, b = (found[f"blk.{block}.{called}.weight.lora_{part}"] for part in "ab")
            scaled = fields["adapter.lora.alpha"] / len(a) * b @ a
            torch.testing.assert_close(scaled, permuted(delta, heads) if heads else delta)
    assert result["agreement"]["to_adapter"] < 1e-8


class LoraMethod:
    """Reads an adapter's deltas as they were trained."""

    def low_rank(self, adapter: Path) -> Any:
        from capotune import methods

        stored = read_adapter(adapter)
        return methods.get("lora").low_rank(stored.settings, stored.tensors)


def read_by_transformers(folder: Path) -> Any:
    """Transformers' own reader of GGUF is the judge."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)


def test_merged_gguf_in_half_precision_answers_as_the_adapter(
    lora: tuple[Path, torch.Tensor], merged_llama: Path
) -> None:
    torch.testing.assert_close(answers(read_by_transformers(merged_llama)), lora[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("base", "kind", "within"), [("qwen2", "F32", 1e-4), ("llama", "Q8_0", 0.5)])
def test_merged_gguf_answers_as_the_adapter(
    base: str, kind: str, within: float, writers: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    adapter, expected = made(writers[base], tmp_path)
    capotune.export(adapter, loader="llama.cpp", out=tmp_path / "out", merged=True, gguf_type=kind)
    read = read_by_transformers(tmp_path / "out")
    torch.testing.assert_close(answers(read), expected, rtol=within, atol=within)


@pytest.mark.parametrize(("shape", "kind"), [((33, 64), "Q8_0"), ((64, 33), "F16"), ((3, 33, 64), "Q8_0"),
                                             ((64,), "F32")])  # fmt: skip
def test_length_of_a_row_says_whether_it_is_stored_in_8_bits(shape: tuple[int, ...], kind: str) -> None:
    assert write._kind_of("blk.0.attn_q.weight", shape, "Q8_0") == kind


@pytest.mark.parametrize("name", ["Llama 3", "Mistral", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3, long", "StableLM",
                                  "Nemotron", "StarCoder2", "Falcon, new", "Bloom", "GPT-2",
                                  "Qwen2, YaRN"])  # fmt: skip
def test_written_model_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    """Every family: values in llama.cpp's order and metadata, by a reader that is tested against its formulas."""
    pytest.importorskip("gguf")
    from gguf_files import FAMILIES

    from capotune.models.base import find
    from capotune.models.gguf.write import write_model
    from capotune.models.load import load_causal_lm

    model = FAMILIES[name].model()
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "model")
    generation_helpers.make_tokenizer(pad=None).save_pretrained(tmp_path / "model")
    base = find(str(tmp_path / "model"))
    write_model(tmp_path / "model.gguf", base, base, "F32", end_ids=(0,), chat_template=None, progress=lambda *_: None)
    ids = IDS % 280
    with torch.no_grad():
        found = load_causal_lm(find(str(tmp_path / "model.gguf")))(ids).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_tokenizer_and_template_come_back_from_the_file(merged_llama: Path, writers: dict[str, Path]) -> None:
    read, own = (capotune.load_model(path).tokenizer for path in (merged_llama, writers["llama"]))
    for text in ("What colour is 12 the sky?", "<|im_start|>user\nhi<|im_end|>", " Ünïcode 👍\n\n x"):
        assert read(text)["input_ids"] == own(text)["input_ids"]
    assert read.chat_template == own.chat_template
    assert read.eos_token == own.eos_token


@pytest.mark.parametrize("prefix", ["normalizer", "pre-tokenizer", "none"])
def test_sentencepiece_tokenizer_comes_back_from_the_file(prefix: str, tmp_path: Path) -> None:
    """Llama 2's kind, by the three ways in which its space before a text is stored; scores stand for its merges."""
    pytest.importorskip("gguf")
    from gguf_files import FAMILIES, TEXT, sentencepiece
    from tokenizers import normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from capotune.models.base import find
    from capotune.models.gguf.write import write_model

    written = sentencepiece()
    if prefix == "pre-tokenizer":
        written.normalizer, written.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefix == "none":
        written.normalizer = normalizers.Replace(" ", "▁")
    written.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = FAMILIES["Mistral"].model()
    model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=written, **special).save_pretrained(tmp_path / "model")
    base = find(str(tmp_path / "model"))
    write_model(tmp_path / "model.gguf", base, base, "F16", end_ids=(2,), chat_template=None, progress=lambda *_: None)
    read = find(str(tmp_path / "model.gguf")).tokenizer
    texts = [TEXT, "a", "two  spaces", "日本語 with bytes 👍"]
    if prefix != "pre-tokenizer":  # which adds no space where there is one; SentencePiece and llama.cpp do
        texts.append(" leading")
    for text in texts:
        assert read(text)["input_ids"] == written.encode(text).ids, text
    assert read.decode(read(TEXT)["input_ids"], skip_special_tokens=True) == TEXT


def test_ollama_gets_the_trained_template_and_stop_tokens(lora: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    capotune.export(lora[0], loader="ollama", out=tmp_path / "out")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n")
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in text
    assert text.count("<|im_start|>assistant\n") == 2  # a turn, and where the answer begins
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_default_system_text_and_begin_of_text_are_told_apart(writers: dict[str, Path], tmp_path: Path) -> None:
    from capotune.tasks.generation.modelfile import turn_texts

    told = (
        "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + generation_helpers.CHATML
    )
    folder = generation_helpers.with_tokenizer(writers["llama"], tmp_path / "base", chat_template=told, bos=True)
    texts = turn_texts(generation_helpers.make_task(folder))
    assert texts is not None
    assert (texts.start, texts.system) == ("", "Be kind.")
    numbered = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    other = generation_helpers.with_tokenizer(writers["llama"], tmp_path / "other", chat_template=numbered)
    assert turn_texts(generation_helpers.make_task(other)) is None


# ------------------------------------------------------------------------------------------------ what is measured


def test_users_rows_are_compared_and_the_gain_is_measured(
    writers: dict[str, Path], colour_pairs: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    capotune.train(
        "lora", data=str(colour_pairs), model=str(writers["llama"]), out=tmp_path / "run", epochs=3, learning_rate=1e-2,
        answers=0,
    )  # fmt: skip
    ran = capo(
        "export", tmp_path / "run" / "adapter", "--for", "llama.cpp", "--out", tmp_path / "out", "--merged",
        "--gguf-type", "Q8_0", "--data", colour_pairs,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "recovered 1.0" in ran.said or "recovered 0.9" in ran.said
    assert "nats from the adapter's" in ran.said


def test_recovered_gain_is_that_of_the_mean_loss_over_the_tokens_in_it() -> None:
    from capotune.data.batches import Encoded

    rows = [Encoded([5, 1, 2], [-100, 1, 2], 3), Encoded([5, 3], [-100, 3], 2)]
    base, adapter, result = torch.zeros(5, 4), torch.zeros(5, 4), torch.zeros(5, 4)
    for position, token in ((0, 1), (1, 2), (3, 3)):  # what the model writes after each token
        adapter[position, token], result[position, token] = 2.0, 1.0
    result[2], result[4] = 9.0, -9.0  # after the last token of a row
    gained = [math.log(4) - math.log(3 + math.exp(by)) + by for by in (2.0, 1.0)]
    assert agreement(rows, adapter, base, result).recovered == pytest.approx(gained[1] / gained[0])
    assert agreement(rows, base, base, result).recovered is None


def test_result_like_the_base_is_refused(
    lora: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a program scaled every delta by zero."""
    adapter, _ = lora
    monkeypatch.setattr("capotune.runs.export._add", lambda *_: None)
    before = tree(tmp_path)
    with pytest.raises(AdapterError, match="answers as the base does"):
        capotune.export(adapter, loader="vllm", out=tmp_path / "out")
    assert tree(tmp_path) == before


def test_result_unlike_the_adapter_is_refused() -> None:
    far = Agreement(32, 100, 0.3, 0.9, 1.0, 0.5, None)
    with pytest.raises(AdapterError, match="otherwise than the adapter"):
        far.check("4-bit", "out")
    Agreement(32, 100, 0.1, 0.9, 1.0, 0.5, None).check("4-bit", "out")
    with pytest.raises(AdapterError, match="otherwise than the adapter"):
        Agreement(32, 100, 0.1, 0.9, 1.0, 0.5, None).check("F32", "out")
    with pytest.raises(AdapterError, match="otherwise than the adapter"):
        Agreement(32, 100, float("nan"), 0.9, 1.0, 0.5, None).check("F32", "out")
    Agreement(32, 100, 0.0137, 2.1, 2.1, 0.9, None).check("BF16", "out")
    with pytest.raises(AdapterError, match=r"rounding to BF16 explains.*Merge into a copy of the base in float32"):
        Agreement(32, 100, 0.1, 2.1, 2.1, 0.9, None).check("BF16", "out")


# ------------------------------------------------------------------------------------------------ what is refused


def test_loaders_of_the_setting_are_those_of_the_table() -> None:
    assert get_args(ExportSettings.model_fields["loader"].annotation) == tuple(LOADERS)


PLAIN: dict[str, Any] = {
    "ranks": (16,), "narrowest": 256, "magnitudes": False, "scales": (2.0,), "blocks": False, "soft_prompt": False,
    "head": False, "of_peft": False,
}  # fmt: skip
NO_DELTA: dict[str, Any] = {"ranks": (), "scales": (), "narrowest": 0}
TRAITS: dict[str, dict[str, Any]] = {
    "LoRA, QLoRA": {},
    "rsLoRA": {"scales": (2.83,)},
    "alpha by layer": {"scales": (1.0, 2.0)},
    "rank by layer": {"ranks": (4, 16)},
    "DoRA": {"magnitudes": True},
    "DoRA on wide layers": {"magnitudes": True, "narrowest": 4096},
    "bias, whole layers": {**NO_DELTA, "blocks": True},
    "whole layers": {**NO_DELTA, "blocks": True},
    "rank above 512": {"ranks": (1024,)},
    "rank below 8": {"ranks": (4,)},
    "some blocks alone": {},
    "soft or deep prompt": {**NO_DELTA, "soft_prompt": True},
    "labels": {"head": True},
    "labels, LoRA": {"head": True},
    "labels, soft or deep prompt": {**NO_DELTA, "head": True, "soft_prompt": True},
    "labels, a head alone": {**NO_DELTA, "head": True},
    "labels, whole layers": {**NO_DELTA, "head": True, "blocks": True},
}
UNJUDGED = {"alpha", "rank allowed", "file", "another base"}


def outcome(verdict: Any) -> str:
    """How the docs' tables begin what they say of it."""
    if verdict.form is None:
        (way_out,) = re.findall(r"loader=([\w.]+)", verdict.instead)
        return f"refused: `{way_out}`"
    if verdict.as_it_is:
        return "copied"
    if verdict.form == "merged":
        return "one graph" if verdict.loader.graphs else "merged"
    return "folded|padded|exact delta|zeros|as it is|written anew|a folder|GGUF adapter"


def test_tables_of_the_docs_say_what_becomes_of_an_adapter() -> None:
    rows = re.findall(
        r"^\| (.*) \|$", (Path(__file__).parents[1] / "docs" / "export.md").read_text("utf-8"), re.MULTILINE
    )
    tables, judged = [row.split(" | ") for row in rows], 0
    programs: list[str] = []
    for name, *cells in tables:
        if name == "an adapter with":
            programs = [one.replace("LoRAX", "vLLM").lower() for one in cells]
        elif name in TRAITS:
            for program, cell in zip(programs, cells, strict=True):
                said = cell.rpartition(" → ")[2]
                for one in program.split(", "):
                    expected = outcome(judge(Traits(**PLAIN | TRAITS[name]), LOADERS[one]))
                    assert re.match(expected, said), (name, one, said, expected)
                    judged += 1
    assert {name for name, *_ in tables} >= TRAITS.keys() | UNJUDGED
    assert judged == 11 * 5 + 12 * 7


def test_soft_prompt_is_refused_where_no_vectors_are_taken(writers: dict[str, Path], tmp_path: Path) -> None:
    adapter, _ = made(writers["llama"], tmp_path, PromptTuningSettings(num_virtual_tokens=3, deep=False))
    ran = capo("export", adapter, "--for", "llama.cpp", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "--for llama.cpp" in ran.said
    assert "Give --for peft" in ran.said
    assert not (tmp_path / "out").exists()


def test_labels_are_refused_where_text_is_written(bert: Path, tmp_path: Path) -> None:
    adapter = save(helpers.on_base(bert, VARIANTS["lora"]), tmp_path / "adapter")
    for loader in ("vllm", "sglang", "llama.cpp", "ollama"):
        with pytest.raises(SettingError, match=r"head gives labels.*loader=transformers"):
            capotune.export(adapter, loader=loader, out=tmp_path / "out")


def test_wide_dora_and_high_rank_are_merged_and_said_why(writers: dict[str, Path], tmp_path: Path) -> None:
    from dataclasses import replace

    adapter, _ = made(writers["llama"], tmp_path, VARIANTS["dora"])
    found = traits(read_adapter(adapter), has_head=False)
    assert judge(found, LOADERS["vllm"]).form == "adapter"
    wide = judge(replace(found, narrowest=4096), LOADERS["vllm"])
    assert (wide.form, "full rank 4096" in wide.why) == ("merged", True)
    high = judge(replace(found, magnitudes=False, ranks=(1024,)), LOADERS["llama.cpp"])
    assert (high.form, "rank is 1024" in high.why) == ("merged", True)


def test_info_says_what_export_writes_for_each_program(lora: tuple[Path, torch.Tensor]) -> None:
    forms = capotune.info(lora[0])["exports"]
    assert list(forms) == list(LOADERS)
    assert (forms["vllm"], forms["transformers"]) == ("adapter", "merged")


def test_damaged_adapter_and_other_base_leave_nothing(
    lora: tuple[Path, torch.Tensor], writers: dict[str, Path], tmp_path: Path
) -> None:
    adapter, _ = lora
    with pytest.raises(AdapterError, match="another base"):
        capotune.export(adapter, loader="vllm", out=tmp_path / "out", model=str(writers["qwen2"]))
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    bad = shutil.copytree(adapter, tmp_path / "bad")
    save_file(tensors, bad / "adapter_model.safetensors")
    helpers.unsigned(bad)
    with pytest.raises(AdapterError, match="NaN"):
        capotune.export(bad, loader="vllm", out=tmp_path / "out")
    with pytest.raises(SettingError, match="loads adapters, and no whole model"):
        capotune.export(adapter, loader="peft", out=tmp_path / "out", merged=True)
    assert not (tmp_path / "out").exists()
