"""How to use the adapter, and the data report, as the page shows them."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from report_helpers import HOSTILE, Tags, comparison, generation, generation_details, rendered
from test_report_page import seen, text_of

from capotune.data.inspect.measures import Lengths, Lines
from capotune.data.inspect.samples import GenerationReport, LengthBin, SampleRow, Span
from capotune.report import Comparison
from capotune.report._data_view import value_text


def data_report(**changes: Any) -> dict[str, Any]:
    """A data report of generation as JSON."""
    nothing = Lines(0, [])
    made = GenerationReport(
        source="a.jsonl", test_source="b.jsonl", test_from="given", described="prompt, completion", template_from=None,
        loss_part="the completions", train_rows=1200, test_rows=300, train_sequences=1234, max_length=512,
        base_length=512,
        train_tokens=Lengths(8, 31, 90, 600), test_tokens=None, sequence_tokens=40_000, loss_tokens=12_400,
        loss_share=0.31, train_without_loss=Lines(2, [4, 12]), test_without_loss=nothing, train_answers_cut=nothing,
        test_answers_cut=nothing, train_ends_cut=nothing, unanswered=nothing, duplicates=nothing, leaked=nothing,
        joined=nothing, straddling=nothing,
        bins=[LengthBin(0, 49, 1000), LengthBin(50, 99, 0), LengthBin(100, 600, 200)],
        samples=[SampleRow(7, 1300, 3, [Span("what is\n\ta tuple? ", False), Span("(1, 2)", True)])],
    )  # fmt: skip
    return asdict(made) | changes


def test_page_shows_what_is_in_the_loss(tmp_path: Path) -> None:
    html = seen(generation(), replace(generation_details(), data=data_report()), tmp_path)
    section = html[html.index('id="data"') : html.index('id="how"')]
    text = text_of(section)
    for expected in (
        "test rows from given",
        "read as prompt, completion",
        "chat template from none",
        "what is in the loss the completions",
        "min 8, median 31, 95 % at most 90, max 600",
        "tokens to train on 40,000 of them in the loss 12,400 share in the loss 31 %",
        "nothing to train on 2 (lines 4, 12)",
        "tokens rows 0 to 49 1,000 50 to 99 0 100 to 600 200",
        "rows as the model gets them (1)",
        "Line 7, 1,300 tokens, the first of 3 windows",
    ):
        assert expected in text, expected
    assert re.findall(r"width:([\d.]+)%", section) == ["100.0", "20.0"]  # no bar for no rows
    assert '<blockquote dir="auto">what is\n\ta tuple? <mark>(1, 2)</mark></blockquote>' in section
    assert "_" not in text
    assert Tags(html).open == []


def test_page_names_every_fact_of_the_data(tmp_path: Path) -> None:
    section = seen(generation(), replace(generation_details(), data=data_report()), tmp_path).partition('id="data"')[2]
    names = re.findall(r"<dt>(.*?)</dt>", section.partition('id="how"')[0])
    assert len(names) == len(set(names)) == len(fields(GenerationReport)) - 2  # the lengths and the rows are drawn


def test_page_escapes_hostile_training_rows(tmp_path: Path) -> None:
    spans = [{"text": HOSTILE, "in_loss": True}, {"text": HOSTILE, "in_loss": False}]
    data = data_report(samples=[{"line": 1, "tokens": 9, "windows": 1, "spans": spans, "unit": "line"}], bins=[])
    tags = Tags(html := rendered(generation(), replace(generation_details(), data=data), tmp_path))
    assert not {tag for tag, _ in tags.seen} & {"script", "img"}
    assert html.count("{{ 7*7 }}") == 2
    assert "Lengths of the training rows" not in html


def peft_snippet(made: Comparison, folder: Path) -> str:
    html = unescape(rendered(made, generation_details(made=made), folder))
    return html[html.index("<h3>PEFT, for") : html.index('aria-labelledby="data"')]


def test_peft_puts_an_adapter_on_the_base_itself(tmp_path: Path) -> None:
    snippet = peft_snippet(generation(), tmp_path)  # feature extraction is recommended, which PEFT does not know
    assert "PEFT, for lora" in snippet
    assert "from transformers import AutoModelForCausalLM\n" in snippet
    assert 'base = AutoModelForCausalLM.from_pretrained("smol/llm")\n' in snippet
    assert 'model = PeftModel.from_pretrained(base, "lora/adapter")</code>' in snippet
    assert "load_base" not in snippet


def test_peft_gets_an_embedded_base_from_capotune(tmp_path: Path) -> None:
    snippet = peft_snippet(generation(model="capo-tiny"), tmp_path)
    assert "import capotune\nfrom peft import PeftModel\n" in snippet
    assert 'base = capotune.load_base("lora/adapter")  # the frozen base\n' in snippet


def test_peft_gets_a_classifiers_base_with_its_head(tmp_path: Path) -> None:
    snippet = peft_snippet(comparison(model="models/minilm"), tmp_path)
    assert 'base = capotune.load_base("lora/adapter")  # the frozen base with a blank head' in snippet


def test_peft_gets_the_values_of_a_4_bit_base(tmp_path: Path) -> None:
    snippet = peft_snippet(generation(rows=generation().rows[2:3]), tmp_path)
    assert 'base = capotune.load_base("qlora/adapter")' in snippet
    assert "AutoModelForCausalLM" not in snippet


def test_a_base_in_a_folder_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "smol").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made = generation(model="models/smol")
    assert f'from_pretrained("{tmp_path.resolve()}/models/smol")' in peft_snippet(made, tmp_path)


def test_lines_of_version_0_1_have_no_unit() -> None:
    assert value_text({"count": 2, "first": [4, 12]}) == "2 (lines 4, 12)"
    assert value_text({"count": 1, "first": [3], "unit": "row"}) == "1 (rows 3)"
    assert value_text({"count": 0, "first": []}) == "0"
