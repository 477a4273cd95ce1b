"""``capo export``: an adapter for another program."""

from __future__ import annotations

import json
from typing import Annotated, Any

import tyro

from capotune.cli.console import terminal
from capotune.cli.flags import Json, parse
from capotune.cli.grid import two_columns
from capotune.conversion_settings import ExportSettings, LoaderName


class Export(ExportSettings):
    """Write an adapter for another program, read it back, and compare its answers with the adapter's."""

    adapter: tyro.conf.Positional[str]
    """Adapter folder, or an adapter on the hub (`owner/name@revision`)."""
    loader: Annotated[LoaderName, tyro.conf.arg(name="for")]
    """The program that is to load it."""
    as_json: Json = False
    """Print one JSON object."""


def export(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    given = parse(Export, rest, "capo export")
    from capotune import api
    from capotune.cli.display import watch_bytes

    values = {name: getattr(given, name) for name in ExportSettings.model_fields}
    with watch_bytes() as report:
        result = api.export(progress=report, **values)
    if given.as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        _show(result)
    return 0


def _show(result: dict[str, Any]) -> None:
    grid = two_columns()
    what = "a whole model" if result["form"] == "merged" else "an adapter"
    grid.add_row("written", f"{what}: {', '.join(result['files'])}, in {result['out']}")
    for number, change in enumerate(result["changes"]):
        grid.add_row("" if number else "changed", change)
    if result["agreement"] is not None:
        grid.add_row("answers", describe_agreement(result["agreement"]))
    terminal().print(grid, highlight=False)
    print(f"\n{result['command']}")


def describe_agreement(found: dict[str, Any]) -> str:
    """How far a result is from the adapter and from the base, in one line."""
    text = (
        f"{found['to_adapter']:.3g} nats from the adapter's, {found['to_base']:.3g} from the base's, the same most "
        f"probable answer as the adapter in {found['top1_agreement']:.1%} of {found['compared']:,} "
        f"({found['rows']} rows)"
    )
    if found["recovered"] is not None:
        text += f"; recovered {found['recovered']:.2f} of the adapter's gain in loss"
    return text
