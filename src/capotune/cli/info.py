"""What ``capo info`` says of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from capotune.cli.combine import describe_combined
from capotune.cli.console import terminal
from capotune.cli.data_report import bar
from capotune.cli.display import score_text
from capotune.cli.grid import two_columns
from capotune.files import human_bytes


def show_info(facts: dict[str, Any], plot: bool) -> None:
    """An adapter's facts, settings, and a prompt's words or its vectors' nearest tokens; with ``plot`` how large its
    delta is in each block."""
    grid = two_columns()
    grid.add_row("method", facts["method"])
    grid.add_row("base", f"{facts['base']['name']} ({_fingerprint(facts['base'])})")
    for name, text in facts["in_words"]:
        grid.add_row(name, text)
    grid.add_row("weights", f"{facts['trained_weights']:,} ({human_bytes(facts['bytes'])} on disk)")
    for number, text in enumerate(_tensors(facts["tensors"])):
        grid.add_row("" if number else "tensors", text)
    if facts["delta"] is not None:
        grid.add_row("delta", _delta(facts["delta"]))
    grid.add_row("trained", _trained(facts["trained"]) if facts["trained"] else "by another program")
    for notice in facts["notices"]:
        grid.add_row("note", notice)
    grid.add_row("settings", ", ".join(f"{name} {value}" for name, value in facts["settings"].items()))
    grid.add_row("exports as", _exports(facts["exports"]))
    if facts["left_out"]:
        grid.add_row("left out", f"when it was pushed: {', '.join(facts['left_out'])}")
    if "check" in facts:
        check = facts["check"]
        words = "answers as where it was trained" if check["agrees"] else "answers otherwise than where it was trained"
        distance, tolerance = f"{check['distance']:.2g}", f"{check['tolerance']:g}"
        probabilities = f"{check['compared']} probabilities differ by at most {distance}, {tolerance} is allowed"
        grid.add_row("check", f"{words}: {probabilities}")
    if "hard_prompt" in facts:
        grid.add_row("prompt", repr(facts["hard_prompt"]))
    if "deep_prompt" in facts:
        vectors = f"{facts['deep_prompt']} vectors before every block's keys and values, which are near no token"
        grid.add_row("prompt", vectors)
    for number, near in enumerate(facts.get("nearest_tokens", [])):
        words = ", ".join(f"{token} {similarity:.2f}" for token, similarity in near)
        grid.add_row(f"vector {number}", f"near {words}")
    console = terminal()
    console.print(grid)
    if plot and facts["delta"] is not None:
        console.print()
        console.print(_bars(facts["delta"]["blocks"]), highlight=False)


def _fingerprint(base: Mapping[str, Any]) -> str:
    if base["fingerprint"] is None:
        return "no fingerprint"
    here = {True: ", as the base here has", False: "; the base here has another", None: ""}[base["matches"]]
    return f"fingerprint {base['fingerprint'][:16]}…{here}"


def _tensors(shapes: Mapping[str, list[int]]) -> list[str]:
    """A line for each kind: blocks that have a tensor of one name and shape are counted."""
    kinds: dict[tuple[str, str], int] = {}
    for key, shape in shapes.items():
        name = ".".join("*" if part.isdecimal() else part for part in key.removeprefix("base_model.model.").split("."))
        kind = name, " × ".join(map(str, shape))
        kinds[kind] = kinds.get(kind, 0) + 1
    return [f"{count} {name} of {shape}" for (name, shape), count in kinds.items()]


def _delta(delta: Mapping[str, Any]) -> str:
    blocks = delta["blocks"]
    least, most = (choose(blocks, key=blocks.get) for choose in (min, max))
    ranks, scales = (", ".join(f"{one:g}" for one in delta[name]) for name in ("ranks", "scales"))
    text = (
        f"rank {ranks}, scale {scales}, of {', '.join(delta['targets'])} ({delta['layers']} layers); norm "
        f"{delta['norm']:.3g}, from {blocks[least]:.3g} in {least} to {blocks[most]:.3g} in {most}"
    )
    return f"{text}; magnitudes (DoRA) come on top" if delta["magnitudes"] else text


def _bars(blocks: Mapping[str, float]) -> Table:
    table = Table("block", "norm of the delta", "", box=None, padding=(0, 2, 0, 0))
    most = max(blocks.values()) or 1.0
    for block, norm in blocks.items():
        table.add_row(block, f"{norm:.3g}", bar(norm / most))
    return table


def _trained(trained: dict[str, Any]) -> str:
    if trained.get("combined"):
        return f"combined: {describe_combined(trained['combined'])}; not scored since"
    parts = [f"{trained['train_rows']:,} rows"]
    if trained.get("train_seconds") is not None:
        parts.append(f"{trained['train_seconds']:.1f} s")
    metric, score = trained.get("metric"), trained.get("score")
    if trained["test_rows"] and metric is not None and score is not None:
        parts.append(f"{score_text(metric, score)} on {trained['test_rows']:,} rows")
    else:
        parts.append("no test")
    return ", ".join(parts)


def _exports(forms: dict[str, str | None]) -> str:
    """What `capo export` writes, and for which programs."""
    words = (("adapter", "an adapter for"), ("merged", "a merged model for"), (None, "nothing for"))
    named = [(text, [name for name, form in forms.items() if form == wanted]) for wanted, text in words]
    return "; ".join(f"{text} {', '.join(names)}" for text, names in named if names)
