"""``capo diff``: two adapters beside each other."""

from __future__ import annotations

import json
from typing import Any

import tyro
from rich.table import Table

from capotune.cli.console import terminal
from capotune.cli.flags import Json, parse
from capotune.cli.grid import two_columns
from capotune.conversion_settings import DiffSettings
from capotune.errors import cut
from capotune.files import human_bytes

_SHOWN = 60


class Diff(DiffSettings):
    """Say what differs between two adapters: settings, size, their changes of the weights, and their answers."""

    adapter: tyro.conf.Positional[str]
    """Adapter folder, or an adapter on the hub (`owner/name@revision`)."""
    other: tyro.conf.Positional[str]
    """The one that it is compared with."""
    as_json: Json = False
    """Print one JSON object."""


def diff(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    given = parse(Diff, rest, "capo diff")
    from capotune import api
    from capotune.cli.display import watch_bytes

    values = {name: getattr(given, name) for name in DiffSettings.model_fields if name not in ("adapter", "other")}
    with watch_bytes() as report:
        result = api.diff(given.adapter, given.other, progress=report, **values)
    if given.as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        _show(result)
    return 0


def _show(result: dict[str, Any]) -> None:
    grid = two_columns()
    one, other = result["bases"]
    same = result["same_base"]
    grid.add_row("base", one["name"] if same else f"{one['name']} against {other['name']}")
    if not result["differing"]:
        grid.add_row("settings", "equal")
    for name, values in result["differing"].items():
        first, second = (cut(str(value), _SHOWN) for value in values)
        grid.add_row(name, f"{first} against {second}")
    first, second = (
        f"{weights:,} ({human_bytes(size)})"
        for weights, size in zip(result["trained_weights"], result["bytes"], strict=True)
    )
    grid.add_row("weights", f"{first} against {second}")
    deltas = result["deltas"]
    why = "one of them has no LoRA deltas" if same else "they are of different bases"
    grid.add_row("delta", _delta(deltas) if deltas else f"not compared: {why}")
    if "answers" in result:
        for number, text in enumerate(_answers(result["answers"])):
            grid.add_row("" if number else "answers", text)
    console = terminal()
    console.print(grid, highlight=False)
    if deltas:
        console.print()
        console.print(_blocks(deltas["blocks"]), highlight=False)


def _delta(deltas: dict[str, Any]) -> str:
    norms = " against ".join(f"{norm:.3g}" for norm in deltas["norms"])
    more = "; magnitudes (DoRA) are left out" if deltas["magnitudes"] else ""
    return f"norm {norms}, {_angle(deltas)}{more}"


def _angle(norms: dict[str, Any]) -> str:
    return "no angle" if norms["cosine"] is None else f"{norms['degrees']:.1f}° apart (cosine {norms['cosine']:.3f})"


def _blocks(blocks: list[dict[str, Any]]) -> Table:
    table = Table("block", "norm", "against", "angle", box=None, padding=(0, 2, 0, 0))
    for one in blocks:
        table.add_row(one["block"], *(f"{norm:.3g}" for norm in one["norms"]), _angle(one))
    return table


def _answers(found: dict[str, Any]) -> list[str]:
    to_base = " and ".join(f"{distance:.3g}" for distance in found["to_base"])
    lines = [
        f"{found['kl_divergence']:.3g} nats apart, the same most probable answer in {found['top1_agreement']:.1%} of "
        f"{found['compared']:,} ({found['rows']} rows); {to_base} nats from the base's"
    ]
    if None not in found["losses"]:
        base, one, other = found["losses"]
        lines.append(f"loss {one:.4g} against {other:.4g} (the base's is {base:.4g})")
    return lines
