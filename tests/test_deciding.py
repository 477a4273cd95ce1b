"""The score that decides: exact match only where it can tell techniques apart, on training rows, for all alike."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_helpers import COLOURS, examples, on_base, samples_of, sequences, with_plain_head, write_jsonl
from report_helpers import comparison, generation, row

import capotune
from capotune import api
from capotune.data.batches import IGNORE_INDEX, TokenRows
from capotune.data.samples import Conversation, Pair
from capotune.evaluation.forward import Examples
from capotune.methods.lora.settings import LoraSettings
from capotune.report import Comparison, recommend
from capotune.runs.agree import agree
from capotune.tasks.classification import Classification
from capotune.tasks.generation import Generation
from capotune.tasks.generation.deciding import decide_by_data, decide_together, matched_share
from capotune.tasks.token_classification import TokenClassification


def pairs_of(*answers: tuple[str, str]) -> Any:
    return samples_of(*(Pair(question, answer) for question, answer in answers))


# By the data


def test_short_answers_with_one_answer_each_may_be_compared_to_the_letter() -> None:
    samples = pairs_of(*((f"q {at}", f"a {at}") for at in range(10)), ("q 1", " A  1"))
    assert decide_by_data(samples, [3] * 11) == ("exact_match", "")


def test_long_answers_are_compared_by_perplexity() -> None:
    metric, why = decide_by_data(pairs_of(("q", "a")), [49, 50, 3])
    assert (metric, why) == (
        "perplexity",
        "Perplexity decides, not exact match: half of the answers have more than 48 tokens.",
    )


def test_questions_with_several_answers_are_compared_by_perplexity() -> None:
    """Descriptions of the same data, as two people wrote them."""
    samples = pairs_of(*((f"name[{at // 2}]", f"It is called {at}.") for at in range(10)), ("name[9]", "That is 9."))
    metric, why = decide_by_data(samples, [9] * 11)
    assert metric == "perplexity"
    assert "91% of the training rows have a question with several answers, so that no one is the right one" in why
    few = pairs_of(*((f"name[{max(at, 1)}]", f"It is called {at}.") for at in range(40)))
    assert decide_by_data(few, [9] * 40)[0] == "exact_match"


# By the models


def test_techniques_decide_together() -> None:
    shares = {"lora": 0.3, "qlora": 0.0}
    assert decide_together(shares, 40) == (
        "exact_match", "Exact match decides: lora answers 30% of 40 held-out rows to the letter.",
    )  # fmt: skip
    assert decide_together({"lora": 0.04, "qlora": 0.0}, 40)[0] == "perplexity"
    assert "no technique answers more than 0% of 40 held-out rows" in decide_together({"a": 0.0, "b": 0.0}, 40)[1]
    assert "lora answers 0% of 40 held-out rows" in decide_together({"lora": 0.0}, 40)[1]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("attached", [True, False])
def test_the_share_is_that_of_greedy_decoding(llama_writer: Path, plain: bool, attached: bool) -> None:
    """Beside Transformers' own ``generate``: rows that end as it goes on, and the same with one token changed."""
    settings = LoraSettings(rank=2, epochs=1) if attached else None
    assembled = with_plain_head(on_base(llama_writer, settings, attached=attached), plain)
    ids, labels, expected = [], [], []
    for number, prompt in enumerate(one for one in sequences(20, seed=5) if len(one) > 2):
        asked = torch.tensor([prompt])
        told = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 6}
        with torch.no_grad():
            written = assembled.model.generate(asked, attention_mask=torch.ones_like(asked), **told)[0].tolist()
        changed = number % 3
        if changed:  # the first token of the answer, or the last
            written[len(prompt) if changed == 1 else -1] += 1
        before = [IGNORE_INDEX, prompt[1], *[IGNORE_INDEX] * (len(prompt) - 2)]  # an earlier answer of one token
        ids.append(written)
        labels.append([*before, *written[len(prompt) :]])
        expected.append(not changed)
    rows = TokenRows(ids, assembled.task.pad_id, assembled.method.virtual_token_ids)
    share, number = matched_share(assembled, Examples(rows, labels))
    assert (share, number) == (pytest.approx(sum(expected) / len(expected)), len(expected))
    for one, label, right in zip(ids, labels, expected, strict=True):
        assert matched_share(assembled, Examples(replace(rows, sequences=[one]), [label])) == (float(right), 1)


def test_an_untrained_model_matches_nothing(llama_writer: Path) -> None:
    assembled = on_base(llama_writer, None, attached=False)
    assert matched_share(assembled, examples(assembled, 300)) == (0.0, 200)


# Runs


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each thing is like, in two ways."""
    rows = [
        {"prompt": f"{at}: {thing}", "completion": f"{start} {colour}"}
        for at in range(6)
        for thing, colour in COLOURS.items()
        for start in ("It is", "Its colour is")
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "described.jsonl", rows)


def records_of(out: Path, methods: tuple[str, ...]) -> list[dict[str, Any]]:
    return [json.loads((out / method / "run.json").read_text("utf-8"))["result"] for method in methods]


def test_several_right_answers_are_compared_by_perplexity_everywhere(
    described: Path, llama_writer: Path, tmp_path: Path
) -> None:
    methods = ("lora",)
    own = {"lora": {"epochs": 1}, "answers": 2, "cache": False}
    made = capotune.compare(data=str(described), model=str(llama_writer), methods=methods, out=tmp_path / "out", **own)
    assert (made.metric, made.higher_is_better) == ("perplexity", False)
    assert made.recommended
    assert made.why.endswith(made.metric_why)
    assert "question with several answers" in made.metric_why
    content = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    assert (content["metric"], content["metric_why"]) == (made.metric, made.metric_why)
    assert made.metric_why in (tmp_path / "out" / "compare.html").read_text("utf-8")
    for method, result, of_row in zip(methods, records_of(tmp_path / "out", methods), made.rows, strict=True):
        assert (result["metric"], result["metric_why"]) == ("perplexity", made.metric_why)
        assert result["score"] == result["scores"]["perplexity"] == of_row.score
        assert of_row.method == made.best or of_row.paired_rows == made.test_rows
        adapter = tmp_path / "out" / method / "adapter"
        assert json.loads((adapter / "capotune.json").read_text("utf-8"))["trained"]["metric"] == "perplexity"


@pytest.fixture(scope="module")
def learned(llama_writer: Path, colour_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose held-out rows are all wrong after a first step, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    api.train("lora", data=str(colour_pairs), model=str(llama_writer), out=out, epochs=1, answers=4, cache=False)
    return out


def test_a_run_alone_decides_on_its_own_held_out_rows(learned: Path, colour_pairs: Path) -> None:
    result = json.loads((learned / "run.json").read_text("utf-8"))["result"]
    assert result["held_out_exact_match"] == 0.0
    assert result["metric"] == "perplexity"
    assert f"lora answers 0% of {result['held_out_rows']} held-out rows to the letter" in result["metric_why"]
    assert result["score"] == result["scores"]["perplexity"]
    assert result["scores"]["exact_match"] == 0.0
    assert capotune.evaluate(learned / "adapter", data=str(colour_pairs))["metric"] == "perplexity"


def test_records_agree_where_another_technique_matches(learned: Path, colour_pairs: Path, tmp_path: Path) -> None:
    """One technique alone would be scored by perplexity; beside one that answers rows to the letter it is not."""
    shutil.copytree(learned, tmp_path / "lora")
    shutil.copytree(learned, tmp_path / "qlora")
    records = {name: json.loads((tmp_path / name / "run.json").read_text("utf-8")) for name in ("lora", "qlora")}
    records["qlora"]["result"]["held_out_exact_match"] = 0.5
    records["lora"] |= {"base_score": 9.0, "base_scores": {"perplexity": 9.0, "exact_match": 0.0}}
    agree(records, tmp_path)
    for name, record in records.items():
        result = record["result"]
        assert result["metric_why"].startswith("Exact match decides: qlora answers 50% of")
        assert (result["metric"], result["score"], result["test_rows"]) == ("exact_match", 0.0, 4)
        assert result["interval"] == result["intervals"]["exact_match"]
        assert json.loads((tmp_path / name / "run.json").read_text("utf-8")) == record
        trained = json.loads((tmp_path / name / "adapter" / "capotune.json").read_text("utf-8"))["trained"]
        assert all(trained[key] == result[key] for key in ("metric", "metric_why", "score", "interval", "test_rows"))
        assert result["adapter_bytes"] == sum(path.stat().st_size for path in (tmp_path / name / "adapter").iterdir())
        rows = json.loads((tmp_path / name / "test_rows.json").read_text("utf-8"))
        assert (rows["metric"], [one["metric"] for one in rows["others"]]) == ("exact_match", ["perplexity"])
    assert records["lora"]["base_score"] == 0.0
    assert capotune.evaluate(tmp_path / "lora" / "adapter", data=str(colour_pairs))["metric"] == "exact_match"


# The rule


def judged(*scores: float) -> Comparison:
    rows = tuple(row(name, score, 10.0) for name, score in zip(("lora", "qlora"), scores, strict=True))
    return recommend(replace(generation("exact_match"), rows=rows, chance=0.0, metric_why="So it is."))


def test_a_tie_at_zero_is_no_recommendation() -> None:
    made = judged(0.0, 0.0)
    assert (made.recommended, made.best) == ("", "")
    assert made.why == "No technique scored above 0.0 %, so there is nothing to recommend. So it is."
    assert [one.difference for one in made.rows] == [None, None]
    assert judged(0.0, 0.01).recommended


def test_labels_at_chance_are_no_recommendation() -> None:
    words = "the share of the most frequent label"
    accuracy = recommend(replace(comparison((0.4, 0.4, 0.35, 0.1)), chance=0.4, chance_words=words))
    assert (accuracy.recommended, accuracy.best) == ("", "")
    assert accuracy.why == f"No technique scored above 40.0 % ({words}), so there is nothing to recommend."
    assert recommend(replace(comparison((0.4, 0.41, 0.35, 0.1)), chance=0.4)).recommended


def test_the_chance_of_each_task() -> None:
    labelled = [{"label": label} for label in "aabac"]
    assert Classification.chance("accuracy", labelled) == (0.6, "the share of the most frequent label")
    assert TokenClassification.chance("f1", []) == (0.0, "")
    assert Generation.chance("exact_match", []) == (0.0, "")
    assert math.isnan(Generation.chance("perplexity", [])[0])


def test_perplexity_has_no_chance() -> None:
    assert generation().recommended
    assert recommend(replace(generation(), chance=float("nan"))).recommended


def test_a_page_without_recommendation_says_so(tmp_path: Path) -> None:
    from report_helpers import generation_details, rendered

    html = rendered(judged(0.0, 0.0), generation_details(), tmp_path)
    assert "No technique scored above chance" in html
    assert "recommended</small>" not in html
    content = judged(0.0, 0.0).to_dict()
    assert type(judged(0.0, 0.0)).from_dict(content).to_dict() == content


def test_a_conversation_counts_every_question() -> None:
    def chat(system: str, answer: str) -> Conversation:
        return Conversation(({"role": "user", "content": system}, {"role": "assistant", "content": answer}))

    assert decide_by_data(samples_of(chat("a", "b"), chat("c", "d")), [3, 3])[0] == "exact_match"
    assert decide_by_data(samples_of(chat("a", "b"), chat("a", "d")), [3, 3])[0] == "perplexity"
