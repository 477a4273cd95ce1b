"""Tables of the benchmarks on labelled texts."""

from __future__ import annotations

import statistics
from typing import Any

from capotune.files import human_bytes


def wrong_labels(content: dict[str, Any]) -> list[str]:
    """Planted labels found, and what correcting by the list did."""
    lines = [
        "A tenth of the labels replaced at random, three draws: how many of them are among the first 12 % of the list "
        "of `capo data --check-labels` (MiniLM, features in the cache).",
        "",
        "| set | rows | labels | found | processor seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in content["planted"].items():
        found = ", ".join(f"{part:.1%}" for part in one["of them among the first 12 %"])
        lines.append(
            f"| {name} | {one['rows']:,} | {one['labels']} | {found} | {statistics.median(one['cpu_seconds'])} |"
        )
    before, *after = content["corrected"]
    lines += [
        "",
        f"Banking77's own labels, of which the list doubts {before['suspects']:,}: accuracy on its test rows of a head "
        f"solved on the training rows as they are {before['suggestion taken']:.2%}, and with the first of the list "
        "corrected or left out:",
        "",
        "| rows | suggestion taken | left out | as many at random left out |",
        "| --- | --- | --- | --- |",
    ]
    for one in after:
        scores = (one[name] for name in ("suggestion taken", "removed", "as many removed at random"))
        lines.append(f"| {one['k']} | {' | '.join(f'{score:.2%}' for score in scores)} |")
    if many := content.get("many"):
        sizes = human_bytes(many["features_bytes"]), human_bytes(many["peak_bytes"])
        seconds = f"{many['cpu_seconds']:.0f} processor seconds"
        lines += ["", f"{many['rows']:,} rows: features of {sizes[0]}, {seconds}, {sizes[1]} of memory at the peak."]
    return lines


def text_pairs(content: dict[str, Any]) -> list[str]:
    """Accuracy on pairs of questions, ours and a peer's."""
    lines = [
        "Do two of Banking77's questions want the same? Half of the pairs have one intent, half two of alike names; "
        f"{content['train_rows']} pairs to train on, {content['passes']} passes, {content['test_rows']} to test on, "
        "MiniLM.",
        "",
        "| way | accuracy | processor seconds |",
        "| --- | --- | --- |",
    ]
    whose = {"all weights": "Transformers' Trainer, all weights", "PEFT LoRA": "Transformers' Trainer, PEFT's LoRA"}
    for name, one in content["ways"].items():
        lines.append(f"| {whose.get(name, f'Capotune, {name}')} | {one['accuracy']:.1%} | {one['cpu_seconds']:.0f} |")
    return lines
