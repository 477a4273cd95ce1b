"""``capo push``: an adapter on the Hugging Face hub."""

from __future__ import annotations

import json

import tyro

from capotune.cli.console import terminal
from capotune.cli.flags import Json, parse
from capotune.cli.grid import two_columns
from capotune.conversion_settings import PushSettings


class Push(PushSettings):
    """Put an adapter on the Hugging Face hub, with a card made from its record and without anything of this machine."""

    adapter: tyro.conf.Positional[str]
    """Adapter folder."""
    repo: tyro.conf.Positional[str]
    """Repository on the hub, OWNER/NAME; made where it is missing."""
    as_json: Json = False
    """Print one JSON object."""


def push(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    given = parse(Push, rest, "capo push")
    from capotune import api
    from capotune.cli.display import watch_bytes

    with watch_bytes() as report:
        result = api.push(progress=report, **{name: getattr(given, name) for name in PushSettings.model_fields})
    if given.as_json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    grid = two_columns()
    grid.add_row("pushed", result["url"])
    grid.add_row("files", ", ".join(result["files"]))
    grid.add_row("base", result["base"])
    grid.add_row("stayed here", ", ".join(result["left_out"]) or "nothing")
    terminal().print(grid, highlight=False)
    return 0
