"""Token classification from end to end, on a small real model: train, evaluate, predict, info, data, compare."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from commands import capo
from seqeval.metrics import f1_score, precision_score, recall_score

import capotune
from capotune import api
from capotune.errors import DataError, SettingError
from capotune.tasks.token_classification import Tagger

METHODS = ("feature-extraction", "lora", "qlora", "prompt-tuning")
FILLER = ["the", "a", "my", "please", "help", "was", "not"]
THINGS = {"ITEM": [["parcel"], ["lamp"], ["broken", "card"]], "PRICE": [["paid", "twice"], ["refund"]]}


def sentence(chooser: random.Random) -> tuple[list[str], list[str]]:
    """Some filler, and in most sentences one or two entities."""
    words, tags = [], []
    for kind in chooser.sample([*THINGS, ""], chooser.randint(1, 3)):
        filler = chooser.choices(FILLER, k=chooser.randint(1, 4))
        entity = chooser.choice(THINGS[kind]) if kind else []
        words += [*filler, *entity]
        tags += ["O"] * len(filler) + [f"{'I' if at else 'B'}-{kind}" for at in range(len(entity))]
    return words, tags


def written(path: Path, count: int, seed: int) -> Path:
    chooser = random.Random(seed)
    rows = [sentence(chooser) for _ in range(count)]
    text = "\n".join("".join(f"{word}\t{tag}\n" for word, tag in zip(*row, strict=True)) for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data") / "train.conll", 90, 0)


@pytest.fixture(scope="module")
def test_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data") / "test.conll", 30, 1)


@pytest.fixture(scope="module")
def compared(bert: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of all four techniques."""
    out = tmp_path_factory.mktemp("compared") / "out"
    epochs = [part for method in METHODS[1:] for part in (f"--{method}.epochs", 2)]
    made = capo("compare", "--data", train_file, "--test", test_file, "--model", bert, "--out", out, *epochs)
    assert made.code == 0, made.err
    return out


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


def predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_a_run_are_seqevals_and_evaluate_gives_them_again(
    method: str, compared: Path, test_file: Path
) -> None:
    run = compared / method
    result, rows = record(run)["result"], predictions(run)
    true, own = [row["tags"] for row in rows], [row["predicted"] for row in rows]
    for name, seqeval in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert result["scores"][name] == pytest.approx(seqeval(true, own, zero_division=0), abs=1e-12)
    assert (result["metric"], result["score"]) == ("f1", result["scores"]["f1"])
    assert result["score"] > 0.5
    assert result["interval"][0] <= result["score"] <= result["interval"][1]
    again = json.loads(capo("evaluate", run / "adapter", "--data", test_file, "--json").out)
    assert {name: again[name] for name in result["scores"]} == result["scores"]
    assert again["rows"] == result["test_rows"] == 30
    assert again["intervals"]["f1"] == list(result["interval"])


def test_comparison_knows_task_base_and_recommendation(compared: Path) -> None:
    found = json.loads((compared / "compare.json").read_text(encoding="utf-8"))
    assert (found["task"], found["metric"], found["higher_is_better"]) == ("token-classification", "f1", True)
    assert (found["train_rows"], found["test_rows"]) == (90, 30)
    assert [row["method"] for row in found["rows"]] == list(METHODS)
    assert found["recommended"] in METHODS
    assert 0 <= found["base_score"] < max(row["score"] for row in found["rows"])
    assert all(row["difference_interval"] for row in found["rows"] if row["method"] != found["best"])


def test_page_shows_types_and_mistakes(compared: Path) -> None:
    page = (compared / "compare.html").read_text(encoding="utf-8")
    found = json.loads((compared / "compare.json").read_text(encoding="utf-8"))
    assert f"What {found['recommended']} finds" in page
    for words in ("wrongly predicted", "ITEM", "PRICE", "nearest class mean", "capo predict", "capotune.load("):
        assert words in page


@pytest.mark.parametrize("method", METHODS)
def test_predict_finds_entities_in_text(method: str, compared: Path) -> None:
    adapter = compared / method / "adapter"
    text = "please help, my parcel was not paid twice"
    shown = capo("predict", adapter, text)
    assert shown.code == 0, shown.err
    line, given = shown.out.removesuffix("\n").split("\t")
    assert given == text
    answer = json.loads(capo("predict", adapter, text, "--json").out)
    assert answer["words"] == ["please", "help", ",", "my", "parcel", "was", "not", "paid", "twice"]
    assert len(answer["tags"]) == len(answer["probabilities"]) == 9
    for entity in answer["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]
        assert f"{entity['text']} ({entity['type']} {entity['probability']:.3f})" in line
    assert {"parcel", "paid twice"} & {entity["text"] for entity in answer["entities"]}


def test_tagger_answers_lists_of_words_as_the_run_did(compared: Path) -> None:
    tagger = capotune.load(compared / "lora" / "adapter")
    assert isinstance(tagger, Tagger)
    assert (tagger.types, tagger.labels[:2]) == (("ITEM", "PRICE"), ("O", "B-ITEM"))
    rows = predictions(compared / "lora")
    assert [one.tags for one in tagger.answer([row["words"] for row in rows])] == [row["predicted"] for row in rows]
    assert tagger.predict([[], "", " \n"]) == [[], [], []]
    assert tagger.answer([]) == []
    with pytest.raises(DataError, match="a string or a list of words is needed"):
        tagger.predict([["a", 3]])  # type: ignore[list-item]


def test_predict_reads_words_and_texts_from_files(compared: Path, test_file: Path, tmp_path: Path) -> None:
    adapter = compared / "lora" / "adapter"
    rows = predictions(compared / "lora")
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"tokens": row["words"]}) + "\n" for row in rows))
    (tmp_path / "lines.txt").write_text("".join(" ".join(row["words"]) + "\n" for row in rows))
    for file in (test_file, tmp_path / "words.jsonl", tmp_path / "lines.txt"):
        shown = capo("predict", adapter, "--file", file, "--json")
        assert shown.code == 0, shown.err
        assert [json.loads(line)["tags"] for line in shown.out.splitlines()] == [row["predicted"] for row in rows]


def test_info_names_types(compared: Path) -> None:
    shown = capo("info", compared / "lora" / "adapter")
    assert shown.code == 0
    assert "2 types: ITEM, PRICE" in shown.said
    facts = json.loads(capo("info", compared / "lora" / "adapter", "--json").out)
    assert (facts["task"], facts["labels"]) == ("token-classification", ["O", "B-ITEM", "I-ITEM", "B-PRICE", "I-PRICE"])


def test_card_says_how_to_use_it(compared: Path) -> None:
    card = (compared / "lora" / "adapter" / "README.md").read_text(encoding="utf-8")
    score = record(compared / "lora")["result"]["score"]
    for words in (
        "Finds entities of 2 types in text: ITEM, PRICE.",
        f"F1 of entities {score:.2%} on 30 test sentences",
    ):
        assert words in card


def test_data_is_described(bert: Path, train_file: Path) -> None:
    shown = capo("data", train_file, "--model", bert)
    assert shown.code == 0, shown.err
    for words in ("CoNLL text, IOB2", "72 to train, 18 to test", "ITEM", "PRICE"):
        assert words in shown.said
    report = json.loads(capo("data", train_file, "--model", bert, "--json").out)
    assert (report["task"], report["report"]["train_rows"]) == ("token-classification", 72)


def test_rows_of_lists_give_the_same_run_as_conll_text(
    bert: Path, train_file: Path, test_file: Path, tmp_path: Path
) -> None:
    """The same sentences in memory, in another scheme, give the same bits."""
    results = []
    for name, data in (("conll", str(train_file)), ("rows", as_rows(train_file))):
        made = capotune.train(
            "lora", data=data, test=str(test_file), model=str(bert), out=tmp_path / name, epochs=1, seed=3
        )
        results.append(
            (made["result"]["scores"], (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
        )
    assert results[0] == results[1]


def as_rows(path: Path) -> Any:
    sentences = [part.split("\n") for part in path.read_text(encoding="utf-8").strip("\n").split("\n\n")]
    words = [[line.split("\t")[0] for line in part] for part in sentences]
    tags = [[line.split("\t")[1] for line in part] for part in sentences]
    iob1 = [[_iob1(own, at) for at in range(len(own))] for own in tags]
    return [{"words": own, "ner_tags": of_row} for own, of_row in zip(words, iob1, strict=True)]


def _iob1(tags: list[str], at: int) -> str:
    follows_its_type = at > 0 and tags[at - 1][2:] == tags[at][2:]
    return tags[at] if follows_its_type else tags[at].replace("B-", "I-")


def test_long_sentences_are_cut_and_their_last_words_count_as_missed(
    bert: Path, train_file: Path, tmp_path: Path
) -> None:
    made = capotune.train(
        "feature-extraction",
        data=str(train_file),
        test_fraction=0,
        model=str(bert),
        out=tmp_path / "run",
        max_length=12,
    )
    assert made["result"]["score"] is None
    long = tmp_path / "long.conll"
    long.write_text("parcel\tB-ITEM\n" + "the\tO\n" * 9 + "refund\tB-PRICE\n", encoding="utf-8")
    found = api.evaluate(tmp_path / "run" / "adapter", data=str(long))
    assert found["recall"] <= 0.5
    answer = capotune.load(tmp_path / "run" / "adapter").answer(["parcel " + "the " * 9 + "refund"])[0]
    assert (answer.cut, answer.tags[-1], answer.probabilities[-1]) == (1, "O", None)


def test_what_does_not_fit_is_refused(compared: Path, bert: Path, train_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.conll"
    other.write_text("Anna\tB-PER\n", encoding="utf-8")
    refused = capo("evaluate", compared / "lora" / "adapter", "--data", other)
    assert refused.code == 2
    assert "other.conll:1: PER" in refused.said
    assert "Known are 'ITEM', 'PRICE'" in refused.said
    assert capo("generate", compared / "lora" / "adapter", "text").code == 2
    with pytest.raises(SettingError, match="prompt_template"):
        capotune.train("lora", data=str(train_file), model=str(bert), out=tmp_path / "run", prompt_template="{x}")
    assert not (tmp_path / "run").exists()
