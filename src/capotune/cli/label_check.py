"""Labels that are likely to be wrong, on the terminal."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any, Final

from rich.table import Table

from capotune import api
from capotune.cli.console import terminal
from capotune.cli.display import counting
from capotune.cli.terminal import for_output

_SHOWN: Final = 20


def check_labels(settings: dict[str, Any], *, as_json: bool) -> int:
    """Check the labels of a data set and show what was found; ``settings`` are those of ``api.check_labels``."""
    with counting("texts") as report:
        check = api.check_labels(report=report, **settings)
    if as_json:
        print(for_output(json.dumps(asdict(check), ensure_ascii=False)))
        return 0
    console = terminal()
    if check.suspects:
        console.print(_table(check))
        console.print()
    for sentence in _sentences(check, settings["out"]):
        console.print(sentence, highlight=False)
    return 0


def _table(check: api.LabelCheck) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(check.unit, justify="right")
    table.add_column("text", overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column("label", overflow="fold")
    table.add_column("suggestion", overflow="fold")
    table.add_column("it / the label", no_wrap=True)
    for one in check.suspects[:_SHOWN]:
        sure = f"{_percent(one.probability)} / {_percent(one.label_probability)}"
        text = one.text if isinstance(one.text, str) else " | ".join(one.text)
        table.add_row(str(one.line), " ".join(text.split()), one.label, one.suggestion, sure)
    return table


def _percent(probability: float) -> str:
    """Rounded to where two that differ look different, and never to a certainty that nobody has."""
    return "< 1 %" if probability < 0.01 else f"{math.floor(100 * probability)} %"


def _sentences(check: api.LabelCheck, out: Any) -> list[str]:
    more = len(check.suspects) - _SHOWN
    first = f"; the first {_SHOWN} are shown" if more > 0 else ""
    found = [
        f"Of {check.rows:,} labels {len(check.suspects):,} are not what the other rows say{first}. About "
        f"{check.estimated:,} of them are likely to be wrong: those at the top of the list first."
        if check.suspects
        else f"All {check.rows:,} labels are what the other rows say."
    ]
    if check.unchecked:
        names = ", ".join(check.unchecked[:5]) + (", …" if len(check.unchecked) > 5 else "")
        found.append(f"Not checked, as there is one text alone of each: {names}.")
    if out is not None:
        found.append(f"{out} has all rows, with suggestions: correct the labels there and train on it.")
    return found
