"""The page is safe, loads nothing, and tells what was asked of it."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from report_helpers import (
    HOSTILE,
    METHODS,
    Tags,
    comparison,
    details,
    generation,
    generation_details,
    page_details,
    rendered,
    right_rows,
    row,
)

from capotune.report import Comparison, PageDetails, Snippet, recommend
from capotune.sections import Answered, ConfusionMatrix, Fact, Part, Quote, Quotes, SideBySide, TableSection


@pytest.mark.parametrize("labels", [3, 25, 26, 77])
def test_page_is_well_formed_and_loads_nothing(labels: int, tmp_path: Path) -> None:
    html = rendered(comparison(), details(labels), tmp_path)
    tags = Tags(html)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not re.search(r"https?:|//|@import|url\((?!#)", html.replace("<!doctype", ""))
    references = [value for _, attributes in tags.seen for name, value in attributes.items() if "href" in name]
    assert all(value and value.startswith("#") for value in references)
    assert "default-src 'none'" in html


def test_page_escapes_hostile_text(tmp_path: Path) -> None:
    shown = page_details(
        [
            ConfusionMatrix(HOSTILE, [HOSTILE, "a"], [[1, 2], [3, 4]]),
            ConfusionMatrix(HOSTILE, [HOSTILE + str(at) for at in range(26)], [[1] * 26] * 26),
            Quotes(HOSTILE, HOSTILE, [Quote([Part(HOSTILE, HOSTILE)], [Fact(HOSTILE, HOSTILE, wrong=True)])]),
            SideBySide(HOSTILE, HOSTILE, [Answered(HOSTILE, HOSTILE, {HOSTILE: HOSTILE})]),
            TableSection(HOSTILE, HOSTILE, [HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]]),
        ],
        snippets=[Snippet(HOSTILE, HOSTILE)],
        base_note=HOSTILE,
        settings={HOSTILE: {HOSTILE: HOSTILE}},
        data={HOSTILE: HOSTILE, "list": [HOSTILE], "labels": [{HOSTILE: HOSTILE}]},
        environment={HOSTILE: HOSTILE},
        command=HOSTILE,
    )
    made = comparison(
        rows=(row(HOSTILE, 0.9, 1.0), row("lora", 0.8, 2.0)), recommended=HOSTILE, model=HOSTILE, why=HOSTILE,
        base_label=HOSTILE, columns=(HOSTILE,),
    )  # fmt: skip
    html = rendered(made, shown, tmp_path)
    tags = Tags(html)
    assert not {tag for tag, _ in tags.seen} & {"script", "img"}
    assert html.count("</style>") == 1
    assert "alert(&#34;x&#34;)" in html
    assert "{{ 7*7 }}" in html
    assert not any(name.startswith("on") for _, attributes in tags.seen for name in attributes)


def test_page_tells_what_was_asked_of_it(tmp_path: Path) -> None:
    made = comparison()
    html = rendered(made, details(), tmp_path).replace("\u00a0", " ").replace("&nbsp;", " ")
    for expected in (
        made.why,
        "Take <em>feature-extraction</em>",
        "base (frozen, nearest class mean)",
        "capo predict feature-extraction/adapter",
        "PeftModel.from_pretrained(base, &#34;lora/adapter&#34;)",
        "98.7 %",
        "2 (lines 4, 12)",
        "confidence interval (Wilson), from 3,080 test rows",
        "Best score",
        "Cheapest that is not shown to be worse",
        "−2.1 to +0.3",
        "learning_rate",
        "capo compare --data f.csv",
        "2.9.1",
    ):
        assert expected in html, expected


def test_few_labels_make_a_matrix_and_many_make_lists(tmp_path: Path) -> None:
    few, many = (rendered(comparison(), details(labels), tmp_path) for labels in (25, 26))
    assert 'class="wrong' in few
    assert "lowest F1" not in few
    assert "Each label" in few
    assert 'class="wrong' not in many
    assert "lowest F1" in many
    assert "most confused pairs of 26 labels" in many


def test_probabilities_are_drawn_over_what_came_true(tmp_path: Path) -> None:
    html = rendered(comparison(), details(), tmp_path)
    assert 'points="70.0,150.0 175.0,0.0 "' in html
    assert "25 % at 35 %, 100 % at 88 %" in html.replace("\u00a0", " ")


def test_page_is_accessible(tmp_path: Path) -> None:
    tags = Tags(rendered(comparison(), details(), tmp_path)).seen
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    pictures = [attributes for _, attributes in tags if attributes.get("role") == "img"]
    assert "lora 94.1 % after 4 min 12 s" in (pictures[0]["aria-label"] or "")
    assert ("html", {"lang": "en"}) in tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def seen(made: Comparison, shown: PageDetails, folder: Path) -> str:
    """The page's source with plain blanks."""
    return rendered(made, shown, folder).replace("\u00a0", " ").replace("&nbsp;", " ")


def text_of(html: str) -> str:
    """What a fragment says, without tags and line breaks of the source."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


@pytest.mark.parametrize("metric", ["perplexity", "exact_match"])
def test_page_of_generation_is_well_formed_and_loads_nothing(metric: str, tmp_path: Path) -> None:
    html = rendered(generation(metric), generation_details(), tmp_path)
    tags = Tags(html)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert all("scope" in attributes for tag, attributes in tags.seen if tag == "th")
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_page_of_generation_tells_what_was_asked_of_it(tmp_path: Path) -> None:
    made = generation()
    html = seen(made, generation_details(), tmp_path)
    text = text_of(html)
    for expected in (
        made.why,
        "22.6 22.0 to 23.2 +10.3 +9.5 to +11.1",
        "from 300 test rows",
        "lower is better",
        "mean cross-entropy",
        "longest common subsequence",
        "A bar is the 95 % interval of a technique&#39;s difference from lora",
        'capo generate feature-extraction/adapter "your prompt"',
        'model = capotune.load("feature-extraction/adapter") model.generate(["your prompt"])',
        "perplexity, lower is better against training time: feature-extraction 12.7 after 1 min 36 s",
    ):
        assert expected in text or expected in html, expected
    assert "Wilson" not in html
    assert "41.2 +28.9 +28.3 to +29.5" in text


def test_page_has_every_metric_of_the_base_and_the_techniques(tmp_path: Path) -> None:
    html = seen(generation("exact_match"), generation_details(), tmp_path)
    table = text_of(html[html.index("<caption>Every metric") : html.index('aria-labelledby="plot"')])
    for line in (
        "technique exact match loss perplexity ROUGE-L",
        "lora 73.3 % 2.51 12.3 85.2 %",
        "base (not fine-tuned) 3.0 % 3.72 41.2 21.4 %",
    ):
        assert line in table, table
    assert "Every metric" not in rendered(comparison(), details(), tmp_path)


def answered(html: str) -> list[list[str]]:
    """Per prompt of the page its answers, each as its name, its mark and its text."""
    section = html[html.index("The same prompts, answered") : html.index('aria-labelledby="use"')]
    return [[text_of(cell) for cell in item.split("<div")[1:]] for item in section.split("<li>")[1:]]


def test_page_answers_the_same_prompts_side_by_side(tmp_path: Path) -> None:
    html = seen(generation(), generation_details(), tmp_path)
    first, second = answered(html)
    assert [cell.split(">")[1].split()[0] for cell in first] == ["expected", "base", "lora", "qlora", "prompt-tuning"]
    assert ["✓" in cell for cell in first] == [False, False, True, True, False]
    assert ["✓" in cell for cell in second] == [False, False, True, False, False]
    assert html.count('role="img" aria-label="exactly as expected"') == 3
    assert "(empty)" in first[-1]
    assert "def squares(n):\n    return [i * i\n        for i in range(n)]</dd>" in html
    assert re.search(r"\.answers dd \{[^}]*white-space: pre-wrap", html)
    assert '<dd dir="auto">القاهرة</dd>' in html
    assert '<blockquote dir="auto">عاصمة مصر؟</blockquote>' in html


def test_page_marks_the_recommended_technique_among_the_answers(tmp_path: Path) -> None:
    html = seen(generation(rows=generation().rows[1:]), generation_details(), tmp_path)
    assert [cell.split(">")[0] for cell in re.findall(r'<div class="chosen">\s*<dt>(\w+)', html)] == ["lora", "lora"]


def test_plain_text_has_no_expected_answer(tmp_path: Path) -> None:
    html = seen(generation(), generation_details([Answered("ROMEO:", None, {"base": "", "lora": ""})]), tmp_path)
    assert [len(cells) for cells in answered(html)] == [2]
    assert "expected" not in text_of(html[html.index("The same prompts") : html.index('id="use"')])
    assert "✓" not in html


def test_classification_has_no_answers(tmp_path: Path) -> None:
    assert "The same prompts" not in rendered(comparison(), details(), tmp_path)


def test_long_answers_are_cut_but_compared_whole(tmp_path: Path) -> None:
    long, high = "long " * 1000, "\n".join(f"line {number}" for number in range(100))
    shown = generation_details([Answered(long, long + "end", {"base": long, "lora": long + "end", "qlora": high})])
    html = rendered(generation(), shown, tmp_path)
    assert html.count("long ") < 600
    assert html.count(" …") == 5
    assert "line 15 …" in html
    assert [("✓" in cell) for cell in answered(html)[0]] == [False, False, True, False]


def paired(scores: tuple[int, ...] = (2872, 2899, 2891, 2822)) -> Comparison:
    """Four techniques that answered the same 3,080 rows: so many of the first ones are right."""
    made = comparison(tuple(right / 3080 for right in scores))
    counts = {method: right_rows(right, 3080) for method, right in zip(METHODS, scores, strict=True)}
    return recommend(made, counts, right_rows(2757, 3080))


def test_page_explains_pairs_in_one_sentence(tmp_path: Path) -> None:
    text = text_of(seen(paired(), details(), tmp_path))
    assert "The differences are paired: all techniques answered the same test rows" in text
    assert "could not be matched" not in text
    assert "Best score, and the cheapest that is not shown to be worse lora 94.1 %" in text
    unpaired = text_of(seen(comparison(), details(), tmp_path))
    assert "The differences are paired" not in unpaired
    assert "The rows of feature-extraction, qlora and prompt-tuning could not be matched with those of lora" in unpaired


def test_page_says_who_answered_fewer_rows(tmp_path: Path) -> None:
    made = paired()
    rows = (replace(made.rows[0], paired_rows=3000), *made.rows[1:])
    text = text_of(seen(replace(made, rows=rows), details(), tmp_path))
    assert "feature-extraction is compared on the 3,000 rows that it and lora both answered." in text


def test_page_names_a_loss_within_the_tolerance(tmp_path: Path) -> None:
    made = recommend(replace(paired(), tolerance=1.0))
    counts = {method: right_rows(right, 3080) for method, right in zip(METHODS, (2872, 2899, 2891, 2822), strict=True)}
    text = text_of(seen(recommend(made, counts), details(), tmp_path))
    assert "Cheapest within your tolerance feature-extraction 93.2 %" in text
    assert "or the difference is a loss of at most 1 points" in text


def test_page_marks_parts_of_a_quote_and_cuts_it_as_a_whole(tmp_path: Path) -> None:
    quote = Quote([Part("Paris", "LOC"), Part(" is" + " so" * 400), Part("far", "LOC")])
    html = rendered(comparison(), page_details([Quotes("Found", "By lora.", [quote])]), tmp_path)
    assert "<mark>Paris<small>LOC</small></mark> is so" in html
    assert html.count("<small>LOC") == 1
    assert " …</blockquote>" in html


def test_page_shows_a_table_of_a_task(tmp_path: Path) -> None:
    table = TableSection("By type", "Entities by type.", ["type", "F1"], [["PER", "90.0 %"], ["LOC", "80.0 %"]])
    text = text_of(seen(comparison(), page_details([table]), tmp_path))
    assert "By type Entities by type. type F1 PER 90.0 % LOC 80.0 %" in text


def test_page_leaves_out_a_section_with_nothing_to_show(tmp_path: Path) -> None:
    empty = [ConfusionMatrix("Confused", ["a"], [[3]]), Quotes("None", "", []), SideBySide("Neither", "", [])]
    html = rendered(comparison(), page_details(empty), tmp_path)
    assert "section-" not in html


def test_a_narrow_page_says_that_the_table_goes_on(tmp_path: Path) -> None:
    html = rendered(comparison(), details(), tmp_path)
    assert re.search(r"@media \(max-width: 40rem\) \{[^@]*\.hint \{ display: block", html)
    assert "The table goes on to the right: swipe it." in html


def test_page_does_not_say_take_when_fine_tuning_hurts(tmp_path: Path) -> None:
    html = rendered(comparison(base_score=0.99), details(), tmp_path)
    assert "<h1>No technique reaches the base without fine-tuning</h1>" in html


def test_page_does_not_say_take_when_the_base_is_better_by_being_lower(tmp_path: Path) -> None:
    html = rendered(generation(base_score=11.6), generation_details(), tmp_path)
    assert "<h1>No technique reaches the base without fine-tuning</h1>" in html
    assert "Take <em>feature-extraction</em>" in rendered(generation(), generation_details(), tmp_path)


def test_page_survives_broken_unicode_and_long_text(tmp_path: Path) -> None:
    html = rendered(comparison(), details(text="\ud800" + "long " * 1000), tmp_path)
    assert html.count("long ") < 200


def test_same_input_same_bytes(tmp_path: Path) -> None:
    first, second = (rendered(comparison(), details(), tmp_path) for _ in range(2))
    assert first == second


def test_page_escapes_hostile_answers(tmp_path: Path) -> None:
    hostile = [Answered(HOSTILE, HOSTILE, {"base": HOSTILE, HOSTILE: HOSTILE, "lora": "\ud800"})]
    changes: dict[str, Any] = {"base_scores": {HOSTILE: 1.0}, "model": HOSTILE}
    html = rendered(generation(**changes), generation_details(hostile), tmp_path)
    tags = Tags(html)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "img"}
    assert html.count("</style>") == 1
    assert html.count("{{ 7*7 }}") >= 5
