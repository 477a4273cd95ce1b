"""What today's two tasks put on a comparison's page and in its table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capotune.sections import Answered, ConfusionMatrix, Fact, Part, Quote, Quotes, Section, SideBySide

if TYPE_CHECKING:
    from capotune.report import Comparison, ComparisonRow, Snippet

SHOWN_ANSWERS = 5
"""Prompts whose answers stand side by side on the page."""
_SHOWN_MISTAKES = 12
_PEFT_METHODS = {"lora", "qlora", "prompt-tuning"}


def base_label(task: str) -> str:
    """What the base's own score is called: nothing in it was fine-tuned."""
    return "base (frozen, nearest class mean)" if task == "classification" else "base (not fine-tuned)"


def base_note(task: str) -> str:
    """How the base's score was obtained."""
    if task == "classification":
        return (
            "Each test row gets the label whose training rows have the nearest mean, in the frozen base's features; "
            "nothing is trained."
        )
    return "The base as it is, without fine-tuning."


def columns(task: str, metric: str, scores: Mapping[str, float]) -> tuple[str, ...]:
    """The further metrics that get a column in a small table: for written text all, the loss not beside perplexity."""
    if task == "classification":
        return ()
    further = [name for name in scores if name != metric]
    return tuple(name for name in further if name != "loss" or "perplexity" not in scores)


def label_sections(run: Path, method: str, predictions: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The recommended technique's confusions, and the wrong labels it was surest of."""
    import numpy as np

    from capotune.evaluation.metrics import confusion

    labels = json.loads((run / "adapter" / "capotune.json").read_text(encoding="utf-8"))["labels"]
    number = {label: at for at, label in enumerate(labels)}
    predicted, true = (np.array([number[row[name]] for row in predictions]) for name in ("predicted", "label"))
    wrong = [row for row in predictions if row["label"] != row["predicted"]]
    surest = sorted(wrong, key=lambda row: -row["probability"])[:_SHOWN_MISTAKES]
    note = (
        f"Test rows that {method} got wrong while most certain. Read these first: some will be labels that the data "
        "has wrong."
    )
    return [
        ConfusionMatrix(f"What {method} confuses", labels, confusion(predicted, true, len(labels))),
        Quotes("Its most confident mistakes", note, [_mistake(row) for row in surest]),
    ]


def _mistake(row: Mapping[str, Any]) -> Quote:
    facts = [
        Fact("labelled", row["label"]),
        Fact("predicted", row["predicted"], wrong=True),
        Fact("with", f"{100 * row['probability']:.1f} %"),
    ]
    return Quote([Part(row["text"])], facts)


def answer_sections(predictions: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Section]:
    """The first test rows that all have answered, with what each wrote."""
    written = {who: {row["prompt"]: row["written"] for row in rows} for who, rows in predictions.items()}
    first = next(iter(predictions.values()))
    shared = [row for row in first if all(row["prompt"] in answers for answers in written.values())]
    prompts = [
        Answered(row["prompt"], row["expected"], {who: answers[row["prompt"]] for who, answers in written.items()})
        for row in shared[:SHOWN_ANSWERS]
    ]
    return [SideBySide("The same prompts, answered", "Test rows, not seen in training.", prompts)]


def snippets(comparison: Comparison) -> list[Snippet]:
    """How to use the recommended adapter, and one in PEFT's format."""
    from capotune.report import Snippet

    rows = {row.method: row for row in comparison.rows}
    chosen = rows.get(comparison.recommended)
    if chosen is None:
        return []
    verb, text = ("predict", "your text") if comparison.task == "classification" else ("generate", "your prompt")
    python = f'import capotune\n\nmodel = capotune.load({json.dumps(chosen.adapter)})\nmodel.{verb}(["{text}"])'
    found = [
        Snippet("Command line", f'capo {verb} {shlex.quote(chosen.adapter)} "{text}"'),
        Snippet("Python", python),
    ]
    in_peft = [row for row in (chosen, *comparison.rows) if row.method in _PEFT_METHODS]
    return found + [Snippet(f"PEFT, for {row.method}", _peft_code(row, comparison)) for row in in_peft[:1]]


def _peft_code(row: ComparisonRow, comparison: Comparison) -> str:
    """The adapter on its base; without Capotune where others can load the base: not with a head, nor in 4 bits."""
    adapter = json.dumps(row.adapter)
    if comparison.task == "generation" and row.method != "qlora" and (model := _known_to_others(comparison.model)):
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
        base = f"AutoModelForCausalLM.from_pretrained({json.dumps(model)})"
    else:
        imports = "import capotune\nfrom peft import PeftModel"
        what = " with its pooling and a blank head" if comparison.task == "classification" else ""
        base = f"capotune.load_base({adapter})  # the frozen base{what}"
    return f"{imports}\n\nbase = {base}\nmodel = PeftModel.from_pretrained(base, {adapter})"


def _known_to_others(model: str) -> str:
    """A folder's whole path or a hub id; empty for a bare name, which may be that of an embedded model."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder.absolute())
    return model if "/" in model else ""
