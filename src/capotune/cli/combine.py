"""``capo combine``: several adapters as one."""

from __future__ import annotations

import json
from typing import Any

import tyro

from capotune.cli.console import terminal
from capotune.cli.flags import Json, parse
from capotune.cli.grid import two_columns
from capotune.conversion_settings import CombineSettings


class Combine(CombineSettings):
    """Make one adapter of several that were trained on one base."""

    adapters: tyro.conf.Positional[tuple[str, ...]]
    """Adapter folders, of lora or qlora, on one base, or adapters on the hub (`owner/name@revision`): two or more."""
    as_json: Json = False
    """Print one JSON object."""


def combine(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    given = parse(Combine, rest, "capo combine")
    from capotune import api
    from capotune.cli.display import watch_bytes

    values = {name: getattr(given, name) for name in CombineSettings.model_fields if name != "adapters"}
    with watch_bytes() as report:
        result = api.combine(*given.adapters, progress=report, **values)
    if given.as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        _show(result)
    return 0


def _show(result: dict[str, Any]) -> None:
    grid = two_columns()
    grid.add_row("combined", describe_combined(result))
    grid.add_row("layers", f"{result['layers']} of {result['base']}")
    grid.add_row("written to", result["out"])
    terminal().print(grid, highlight=False)


def describe_combined(combined: dict[str, Any]) -> str:
    """What was combined and how, in one line."""
    adapters = ", ".join(f"{one['name']} × {one['weight']:g}" for one in combined["adapters"])
    density = f", density {combined['density']:g}" if "density" in combined else ""
    held = f", which holds {combined['held']:.1%} of the change's norm" if combined["held"] < 1 else ""
    return f"{adapters} by {combined['method']}{density}; rank {combined['rank']}{held}"
