"""Pairs of texts: read, put together as the base's own tokenizer does it, trained by every technique, and asked."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from commands import capo
from helpers import shake
from torch import nn
from transformers import AutoModel, AutoTokenizer

import capotune
from capotune.adapters.assemble import Assembled, assemble, attach
from capotune.adapters.store import save_adapter
from capotune.data.batches import TokenRows, TypedLists, collate, taken
from capotune.data.classes import CLASSES
from capotune.data.split import text_numbers
from capotune.data.token_types import TypedTokens
from capotune.errors import DataError, SettingError
from capotune.evaluation.forward import Examples, outputs
from capotune.methods.base import Start
from capotune.methods.lora.settings import LoraSettings
from capotune.methods.prompt_tuning.settings import PromptTuningSettings
from capotune.models.base import find
from capotune.runs import onnx
from capotune.settings import Context
from capotune.tasks.classification import Classification

WORDS = ["the", "a", "parcel", "order", "was", "late", "broken", "lamp", "paid", "twice", "refund", "card", "lost"]
CPU = torch.device("cpu")


def _tokenizer(template: str | None, pair: str | None, special: dict[str, str], names: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: at for at, token in enumerate([*special.values(), "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if template is not None:
        marks = [(mark, at) for at, mark in enumerate(special.values()) if mark in f"{template} {pair}".split()]
        marks += [(mark, at) for at, mark in enumerate(special.values()) if f"{mark}:" in str(pair)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=pair, special_tokens=list(dict(marks).items())
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=48, model_input_names=names, **special)


BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ROBERTA = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BOTH = ["input_ids", "token_type_ids", "attention_mask"]
IDS = ["input_ids", "attention_mask"]
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
"""Of every family."""
FAMILIES = ("bert", "deberta", "deberta-untyped", "roberta", "llama", "gpt2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models whose tokenizers put two texts together as their families do."""
    from transformers import BertConfig, DebertaV2Config, GPT2Config, LlamaConfig, RobertaConfig

    typed = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    deberta = {"position_biased_input": False, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    made: dict[str, tuple[Any, Any]] = {
        "bert": (BertConfig(**SIZES), _tokenizer("[CLS] $A [SEP]", typed, BERT, BOTH)),
        "deberta": (
            DebertaV2Config(**SIZES, type_vocab_size=2, **deberta), _tokenizer("[CLS] $A [SEP]", typed, BERT, BOTH)
        ),
        "deberta-untyped": (
            DebertaV2Config(**SIZES, type_vocab_size=0, **deberta), _tokenizer("[CLS] $A [SEP]", typed, BERT, BOTH)
        ),
        "roberta": (
            RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1),
            _tokenizer("<s> $A </s>", "<s> $A </s> </s> $B </s>", ROBERTA, IDS),
        ),
        "llama": (
            LlamaConfig(**SIZES, num_key_value_heads=2, architectures=["LlamaForCausalLM"]),
            _tokenizer("<s> $A", "<s> $A <s> $B", LLAMA, IDS),
        ),
        "gpt2": (
            GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, architectures=["GPT2LMHeadModel"]),
            _tokenizer(None, None, LLAMA, IDS),
        ),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("pairs")
    for name, (config, tokenizer) in made.items():
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.2 * torch.randn_like(weight)  # so that segments and positions count
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in made}


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


PAIRS = [(words(one, at), words(other, at + 50)) for at, (one, other) in enumerate([(3, 5), (1, 1), (12, 2), (2, 9)])]
LONG = [(words(40, 90), words(5, 91)), (words(30, 92), words(33, 93)), (words(4, 94), words(60, 95))]


def on_pairs(base: Path, settings: Any = None, max_length: int | None = 20) -> Assembled:
    """A base with a head on it, and a technique attached and moved from its start."""
    found = find(str(base))
    if settings is not None:
        settings = settings.completed(Context(found.hidden_size, True))
    virtual = settings.virtual_tokens if settings is not None else 0
    task = Classification.on(found, ("no", "maybe", "yes"), max_length, virtual).of_pairs()
    assembled = assemble(task, settings, device=CPU)
    with torch.no_grad():
        assembled.model.classifier.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    if settings is not None:
        attach(assembled, Start(torch.Generator().manual_seed(0), [7, 8, 9]))
        shake(assembled)
    return assembled


def encoded(assembled: Assembled, pairs: list[tuple[str, str]]) -> TokenRows:
    task = assembled.task
    return TokenRows(task.encode(pairs), task.pad_id, assembled.method.virtual_token_ids)


@torch.no_grad()
def by_transformers(base: Path, assembled: Assembled, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Each pair by Transformers' own model on what the tokenizer gives for it; pooled and put through the head."""
    model, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    found = []
    for first, second in pairs:
        second = second if base.name != "gpt2" else f"\n{second}"
        given = tokenizer(first, second, truncation=True, max_length=assembled.task.max_length, return_tensors="pt")
        if getattr(model.config, "type_vocab_size", 0) == 0:
            given.pop("token_type_ids", None)
        states = model(**given).last_hidden_state[0]
        pooled = states[-1] if assembled.task.pooling == "last" else states.mean(0)
        found.append(assembled.model.classifier(pooled))
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_pairs_are_those_of_transformers(family: str, bases: dict[str, Path]) -> None:
    """Packed where the base can be; odd lengths, and pairs of which one text or both are cut."""
    assembled = on_pairs(bases[family])
    rows = encoded(assembled, PAIRS + LONG)
    assert max(map(len, rows.sequences)) == 20
    found = assembled.task.logits(assembled, rows)
    torch.testing.assert_close(found, by_transformers(bases[family], assembled, PAIRS + LONG), rtol=0, atol=1e-5)
    typed = family in ("bert", "deberta")
    assert all(isinstance(row, TypedTokens) == typed for row in rows.sequences)
    turned = encoded(assembled, [(second, first) for first, second in PAIRS])
    assert (assembled.task.logits(assembled, turned) - found[: len(PAIRS)]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_many_pairs_are_held_as_a_few_are(family: str, bases: dict[str, Path]) -> None:
    task = on_pairs(bases[family]).task
    many, lengths = task.encode_many(PAIRS + LONG)
    few = task.encode(PAIRS + LONG)
    assert list(many) == few
    assert lengths == task.token_lengths(PAIRS + LONG)
    if family == "bert":
        assert isinstance(many, TypedLists)
        assert [row.types for row in many] == [row.types for row in few]
        assert [row.types for row in taken(many, [3, 1])] == [few[3].types, few[1].types]  # type: ignore[attr-defined]


def test_types_decide_what_is_cached() -> None:
    """The same ids of other segments are other rows; without types the hash is what it was."""
    ids = [[2, 5, 3, 6, 3]]
    one, other = (TokenRows([TypedTokens(ids[0], types)], 0) for types in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1]))
    assert len({one.digest(), other.digest(), TokenRows(ids, 0).digest()}) == 3


def test_batches_hold_types_beside_ids() -> None:
    rows = [TypedTokens([2, 5, 3, 6, 3], [0, 0, 0, 1, 1]), TypedTokens([2, 3, 6, 3], [0, 0, 1, 1])]
    padded = collate(rows, np.arange(2), 9, [40])
    assert padded.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    packed = collate(rows, np.arange(2), 9, first_position=0)
    assert packed.inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 1, 1]]
    assert rows[0][1:4].types == bytes([0, 0, 1])  # type: ignore[attr-defined]
    assert "token_type_ids" not in collate([[1, 2]], np.arange(1), 0).inputs


VARIANTS = ["lora", "qlora", "prompt-tuning", "feature-extraction"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whether the second text says what the first one does; the same pair stands there twice."""
    path = tmp_path_factory.mktemp("data") / "nli.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["premise", "hypothesis", "label"])
        for number in range(40):
            first = words(4, number // 4)
            same = number % 2 == 0
            writer.writerow([first, first if same else words(4, 1000 + number), "yes" if same else "no"])
    return path


@pytest.fixture(scope="module")
def runs(data: Path, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A trained adapter of each technique, made when it is first asked for."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            out = tmp_path_factory.mktemp("runs") / method
            own: dict[str, Any] = {"epochs": 1} if method != "feature-extraction" else {}
            if method == "prompt-tuning":
                own["num_virtual_tokens"] = 3
            if method == "feature-extraction":
                own["trainable_layers"] = 1
            capotune.train(method, data=data, model=str(bases["bert"]), out=out, **own)
            made[method] = out
        return made[method]

    return run


@pytest.mark.parametrize("method", VARIANTS)
def test_every_technique_trains_on_pairs_and_its_adapter_answers_them(
    method: str, data: Path, runs: Callable[[str], Path]
) -> None:
    """As the run did: the predictions of its test rows, from the loaded adapter."""
    out = runs(method)
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = [json.loads(line) for line in lines]
    assert predictions
    classifier = capotune.load(out / "adapter")
    answers = classifier.answer([tuple(one["text"]) for one in predictions])
    assert [one.label for one in answers] == [one["predicted"] for one in predictions]
    assert [one.probability for one in answers] == pytest.approx([one["probability"] for one in predictions], abs=2e-5)
    scores = capotune.evaluate(out / "adapter", data=data)
    assert scores["rows"] == 40


def test_equal_pairs_stay_on_one_side(data: Path) -> None:
    for seed in range(3):
        split = CLASSES.load(data, seed=seed)
        assert not set(split.train.texts) & set(split.test.texts)
        assert len(set(split.train.texts + split.test.texts)) < 40
    same = text_numbers([("A  b", "c"), ("a b", "C "), ("a", "b c"), ("c", "a b"), "a b c"])
    assert same.tolist() == [0, 0, 1, 2, 3]


def test_info_checks_golden_answers_of_pairs(runs: Callable[[str], Path]) -> None:
    adapter = runs("lora") / "adapter"
    facts = capotune.api.info(adapter, check=True)
    assert facts["check"]["agrees"]
    assert facts["pairs"] is True
    assert ["pairs of texts", "up to 48 tokens, mean pooling"] in [list(one) for one in facts["in_words"]]
    assert capotune.api.usage("classification", adapter) == f'capo predict {adapter} "first text" "second text"'
    assert 'classifier.predict([("first text", "second text")])' in (adapter / "README.md").read_text(encoding="utf-8")


def test_capo_data_says_which_columns_are_pairs(data: Path, bases: dict[str, Path]) -> None:
    shown = capo("data", data, "--model", bases["bert"])
    assert "pairs of texts in 'premise' and 'hypothesis', read together, label in 'label'" in shown.said


def test_capo_predict_reads_two_arguments_and_two_columns(data: Path, runs: Callable[[str], Path]) -> None:
    adapter = runs("lora") / "adapter"
    shown = capo("predict", adapter, "the lamp", "a broken lamp", "--json")
    assert json.loads(shown.out)["text"] == ["the lamp", "a broken lamp"]
    shown = capo("predict", adapter, "--file", data)
    assert len(shown.out.splitlines()) == 40
    assert all(line.count("\t") == 3 for line in shown.out.splitlines())


def test_page_shows_both_texts() -> None:
    from capotune.sections import Quotes
    from capotune.tasks.classification.page import sections

    wrong = {"text": ["one", "other"], "label": "no", "predicted": "yes", "probability": 0.9, "line": 2}
    record = {"labels": ["no", "yes"], "trained": {}}
    quotes = next(one for one in sections(record, "lora", [wrong]) if isinstance(one, Quotes))
    assert [(part.text, part.mark) for part in quotes.quotes[0].parts] == [
        ("one", ""), (" ", ""), ("other", "second text"),
    ]  # fmt: skip


def test_scikit_learn_takes_two_columns_and_tuples(bases: dict[str, Path]) -> None:
    from capotune.sklearn import TextClassifier

    pairs = [(words(3, at), words(3, at + 100)) for at in range(12)]
    labels = [at % 2 for at in range(12)]
    by_tuples = TextClassifier("feature-extraction", str(bases["bert"])).fit(pairs, labels)
    table = np.array(pairs, dtype=object)
    assert (by_tuples.predict_proba(pairs) == by_tuples.predict_proba(table)).all()
    with pytest.raises(DataError, match="pairs of strings, as the first is one, found str"):
        by_tuples.fit([*pairs[:-1], "one text"], labels)


PEFTS = [
    ("bert", LoraSettings(rank=2)),
    ("llama", LoraSettings(rank=2)),
    ("bert", PromptTuningSettings(num_virtual_tokens=3)),
    ("bert", PromptTuningSettings(num_virtual_tokens=3, deep=True)),
]


@pytest.mark.parametrize(("family", "settings"), PEFTS)
def test_peft_loads_an_adapter_of_pairs_and_agrees(
    family: str, settings: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    """With the tokenizer's own output, token types among it."""
    assembled = on_pairs(bases[family], settings)
    expected = assembled.task.logits(assembled, encoded(assembled, PAIRS + LONG))
    trained = {"score": None, "held_out_score": 0.5, "test_rows": 0, "train_rows": 4, "adapter": "lora"}
    save_adapter(tmp_path / "adapter", assembled, trained)
    loaded = peft.PeftModel.from_pretrained(capotune.load_base(tmp_path / "adapter"), tmp_path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(bases[family])
    for (first, second), logits in zip(PAIRS + LONG, expected, strict=True):
        given = tokenizer(first, second, truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(loaded(**given).logits[0], logits, rtol=0, atol=1e-5)


def test_boundary_states_are_of_the_types_too(bases: dict[str, Path]) -> None:
    """What the frozen blocks computed of pairs is gone on from: the logits are the same."""
    from capotune.engine.activation_cache import ActivationCache
    from capotune.evaluation.boundary import resumes_with
    from capotune.methods.feature_extraction.settings import FeatureExtractionSettings

    assembled = on_pairs(bases["bert"], FeatureExtractionSettings(trainable_layers=1))
    rows = encoded(assembled, PAIRS)
    how = resumes_with(assembled, 1)
    assert how is not None
    boundary = ActivationCache(None, {}).boundary(assembled, 1, rows, outputs=how)
    unknown = torch.zeros(len(PAIRS), dtype=torch.long)
    whole, resumed = (outputs(assembled, Examples(rows, unknown, one)) for one in (None, boundary))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=2e-2)


def test_graph_of_pairs_takes_token_types(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given to PyTorch's exporter, which test_onnx.py runs: three inputs, and logits as ours."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch.onnx, "export", lambda graph, *_, **more: given.update(graph=graph, **more))
    assembled = on_pairs(bases["bert"], PromptTuningSettings(num_virtual_tokens=3))
    onnx._trace(onnx.Graph(assembled.model, assembled.method.virtual_token_ids), Path("unused"), typed=True)
    assert given["input_names"] == list(given["dynamic_shapes"]) == ["input_ids", "attention_mask", "token_type_ids"]
    batch = collate(assembled.task.encode(PAIRS), np.arange(len(PAIRS)), assembled.task.pad_id)
    found = given["graph"](*(batch.inputs[name] for name in given["input_names"]))
    expected = assembled.task.logits(assembled, encoded(assembled, PAIRS))
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [("sentence1", "sentence2"), ("Question 1", "Question 2"), ("question", "answer"), ("text_a", "text_b")],
)
def test_pairs_are_found_by_name(names: tuple[str, str]) -> None:
    rows = [dict(zip((*names, "label"), (f"one {at}", f"two {at}", at % 2), strict=True)) for at in range(4)]
    read = CLASSES.read(rows)
    assert read.pair_columns == names
    assert read.texts[1] == ("one 1", "two 1")
    assert read.unused == ()


class TestBadInput:
    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"hypothesis": " "}, "train.jsonl:2: empty text (hypothesis)"),
            ({"premise": None}, "train.jsonl:2: empty text (premise)"),
            ({"hypothesis": ["a"]}, "train.jsonl:2: text (hypothesis) is list, not a string"),
        ],
    )
    def test_row_without_one_of_two_texts(self, row: dict[str, Any], said: str, tmp_path: Path) -> None:
        rows = [{"premise": "a", "hypothesis": "b", "label": "x"}, {"premise": "c", "hypothesis": "d", "label": "y"}]
        rows[1] |= row
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        with pytest.raises(DataError) as raised:
            CLASSES.load(tmp_path / "train.jsonl")
        assert said in str(raised.value)

    def test_test_file_without_the_second_column(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "test.csv").write_text("premise,label\na,yes\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"test.csv: no column 'hypothesis', which .*nli.csv names."):
            CLASSES.load(data, test=tmp_path / "test.csv")

    def test_columns_that_are_given(self, data: Path) -> None:
        rows = CLASSES.read(data, pair_columns=("hypothesis", "premise"))
        assert rows.pair_columns == ("hypothesis", "premise")
        assert CLASSES.read(data, text_column="premise").pair_columns is None
        with pytest.raises(DataError, match="'premise' is given as the first text and as the second"):
            CLASSES.read(data, pair_columns=("premise", "premise"))
        with pytest.raises(SettingError, match="names the column of one text"):
            CLASSES.read(data, text_column="premise", pair_columns=("premise", "hypothesis"))
        with pytest.raises(DataError, match="no column 'claim', which `pair_columns` names"):
            CLASSES.read(data, pair_columns=("premise", "claim"))

    def test_adapter_of_pairs_asked_for_single_texts(self, runs: Callable[[str], Path], tmp_path: Path) -> None:
        adapter = runs("lora") / "adapter"
        classifier = capotune.load(adapter)
        with pytest.raises(DataError, match="text 0: a pair of texts is needed, found 'one text'"):
            classifier.predict(["one text"])
        with pytest.raises(DataError, match="text 0, the second of two: a string is needed, found int 5"):
            classifier.predict([("a", 5)])
        (tmp_path / "single.csv").write_text("text,label\na,yes\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"single.csv:2: one text a row \('text'\), and the adapter reads pairs"):
            capotune.evaluate(adapter, data=tmp_path / "single.csv")
        shown = capo("predict", adapter, "one", "two", "three")
        assert shown.code == 2
        assert "reads pairs of texts, and 3 texts cannot be paired" in shown.said
        shown = capo("predict", adapter, "--file", tmp_path / "single.csv")
        assert "not clear which columns hold the two texts" in shown.said
        (tmp_path / "lines.txt").write_text("a\tb\n\nonly one\n", encoding="utf-8")
        shown = capo("predict", adapter, "--file", tmp_path / "lines.txt")
        assert "lines.txt:3: two texts parted by a tab are needed, found 1 text." in shown.said

    def test_adapter_of_single_texts_asked_for_pairs(self, data: Path, bases: dict[str, Path], tmp_path: Path) -> None:
        capotune.train(
            "feature-extraction", data=data, text_column="hypothesis", model=str(bases["bert"]), out=tmp_path / "run"
        )
        adapter = tmp_path / "run" / "adapter"
        with pytest.raises(DataError, match=r"nli.csv:2: pairs of texts \('premise', 'hypothesis'\), and the adapter"):
            capotune.evaluate(adapter, data=data)
        with pytest.raises(DataError, match="text 0: a string is needed, found tuple"):
            capotune.load(adapter).predict([("a", "b")])
        shown = capo("predict", adapter, "--file", data, "--pair-columns", "premise", "hypothesis")
        assert "--pair-columns premise, hypothesis: the adapter reads one text." in shown.said

    def test_length_without_room_for_both(self, bases: dict[str, Path]) -> None:
        with pytest.raises(SettingError, match=r"3 tokens mark start and end of two texts. Allowed: at least 5"):
            on_pairs(bases["bert"], max_length=4)


def test_heads_of_several_adapters_read_types(runs: Callable[[str], Path]) -> None:
    adapters = capotune.load_adapters({"one": runs("lora") / "adapter"})
    tokenizer = adapters.use("one").tokenizer
    given = tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="pt")
    with adapters.rows(["one"] * len(PAIRS)) as model, torch.no_grad():
        found = torch.stack(model(**given))
    expected = capotune.load(runs("lora") / "adapter").outputs(PAIRS)
    assert isinstance(model, nn.Module)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
