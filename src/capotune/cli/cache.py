"""``capo cache``: what the cache holds, against its limit; and clear it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Literal

import tyro
from rich.table import Table
from rich.text import Text

from capotune import cache
from capotune.cli.console import terminal
from capotune.cli.flags import Json, parse
from capotune.files import cache_folder, human_bytes
from capotune.settings import Settings


class Cache(Settings):
    """Show what the cache holds, the least recently used first, which leave first; or clear it."""

    kinds: tyro.conf.Positional[tuple[Literal["features", "boundary", "tokens", "models", "hashes"], ...]] = ()
    """What to look at: features that heads read, boundary states that frozen layers compute, tokens of large data,
    models converted from GGUF, hashes of files. Left out: all."""
    clear: bool = False
    """Remove them, without asking; converted models that another command works with stay."""
    as_json: Json = False
    """Print one JSON object."""


def show_cache(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    given = parse(Cache, rest, "capo cache")
    kinds = given.kinds or cache.KINDS
    removed = cache.clear(kinds) if given.clear else []
    left = cache.entries()
    chosen = removed if given.clear else [one for one in left if one.facts["kind"] in kinds]
    if given.as_json:
        print(json.dumps(_record(chosen, left, given.clear), ensure_ascii=False))
        return 0
    console = terminal()
    if given.clear:
        console.print(f"freed {human_bytes(_nbytes(chosen))}: {_counted(chosen)}", soft_wrap=True)
    elif chosen:
        console.print(_table(chosen))
    whole = f"{human_bytes(_nbytes(left))} of at most {human_bytes(cache.limit())} ({cache.LIMIT_VARIABLE})"
    console.print(f"{whole} in {cache_folder()}", soft_wrap=True)
    return 0


def _table(entries: Sequence[cache.Entry]) -> Table:
    """A line for each entry, hashes together in one."""
    table = Table("kind", "base", "data", box=None, padding=(0, 2), pad_edge=False)
    for heading in ("size", "last used"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in entries:
        if one.facts["kind"] != "hashes":
            texts = [Text(one.facts.get(name, "")) for name in ("kind", "base", "data")]
            table.add_row(*texts, human_bytes(one.nbytes), _when(one))
    hashes = [one for one in entries if one.facts["kind"] == "hashes"]
    if hashes:
        table.add_row("hashes", f"{len(hashes):,} files", "", human_bytes(_nbytes(hashes)), _when(hashes[-1]))
    return table


def _when(entry: cache.Entry) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))


def _counted(entries: Sequence[cache.Entry]) -> str:
    kinds = [one.facts["kind"] for one in entries]
    return ", ".join(f"{kinds.count(kind):,} {kind}" for kind in dict.fromkeys(kinds)) or "there was nothing"


def _nbytes(entries: Sequence[cache.Entry]) -> int:
    return sum(one.nbytes for one in entries)


def _record(chosen: Sequence[cache.Entry], left: Sequence[cache.Entry], cleared: bool) -> dict[str, Any]:
    return {
        "folder": str(cache_folder()),
        "bytes": _nbytes(left),
        "limit": cache.limit(),
        "removed" if cleared else "entries": [
            {**one.facts, "path": str(one.path), "bytes": one.nbytes, "used": one.used} for one in chosen
        ],
    }
