"""Json files: one object a line, or an array of objects. Every object knows the line that it starts on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from capotune.data.readers.lines import LONGEST, TOO_LONG, Lines
from capotune.data.row_store import TooDeepError
from capotune.data.table import Origin, Table, TakesRows
from capotune.data.wording import SHOWN, bad_rows, count, excerpt, quoted

__all__ = ["read_json"]

_NOT_SPACE: Final = re.compile(r"[^ \t\r\n]")
_TOO_DEEP: Final = "nested too deeply"
_HALF: Final = re.compile(r"\\u[dD]")


@dataclass(frozen=True)
class _Broken:
    """Stands in a value's place when it could not be read."""

    why: str


def read_json(lines: Lines, source: str, limit: int | None, rows: TakesRows) -> Table:
    """The objects in the lines of a json file, each of which ends in a line feed, put into ``rows``.

    Raises:
        DataError: a value is broken or is no object.
    """
    first = next((line.lstrip() for line in lines.since(0) if line.strip()), "")
    values = _array_values("".join(lines.since(0))) if first.startswith("[") else _line_values(lines)
    columns: dict[str, None] = {}
    bad: dict[int, str] = {}
    for line, value, may_be_halved in values:
        problem = _problem(value, may_be_halved)
        if not problem:
            columns.update(dict.fromkeys(value))
            try:
                rows.add(line, tuple(value), tuple(value.values()))
            except TooDeepError:
                problem = _TOO_DEEP
        if problem:
            bad[line] = f"{problem}: {excerpt(lines.at(line - 1))}"
        if len(bad) == SHOWN or (limit is not None and len(rows) == limit):
            break
    if bad:
        at_least = f"{len(bad)} lines or more" if len(bad) == SHOWN else count(len(bad), "line")
        advice = (
            'Allowed: one object a line, like {"text": "…", "label": "…"}, or an array of them. Correct these lines.'
        )
        raise bad_rows(Origin(source), f"{at_least} cannot be read as JSON objects", bad, advice)
    return Table(list(columns), rows.rows(), rows.lines, Origin(source))


def _line_values(lines: Lines) -> Iterator[tuple[int, Any, bool]]:
    """Each value with its line, and whether escapes in it may be half of a two-part character."""
    decode = json.JSONDecoder(object_pairs_hook=_object).decode
    for line, ended in enumerate(lines.since(0), start=1):
        content = ended.removesuffix("\n")
        if len(content) > LONGEST:
            yield line, _Broken(TOO_LONG), False
        elif content.strip():
            try:
                yield line, decode(content), _HALF.search(content) is not None
            except (ValueError, RecursionError) as error:
                yield line, _Broken(_decoder_problem(error)), False


def _array_values(text: str) -> Iterator[tuple[int, Any, bool]]:
    """Decode an array element by element, to know each one's line. A break in it cannot be stepped over."""
    decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
    line, counted, may_be_halved = 1, 0, _HALF.search(text) is not None
    position = _after_space(text, text.index("[") + 1)
    more = not text.startswith("]", position)
    while more:
        line, counted = line + text.count("\n", counted, position), position
        start = position
        try:
            value, position = decode(text, position)
        except (ValueError, RecursionError) as error:
            yield getattr(error, "lineno", line), _Broken(_decoder_problem(error)), False
            return
        yield line, _Broken(TOO_LONG) if position - start > LONGEST else value, may_be_halved
        position = _after_space(text, position)
        more = text.startswith(",", position)
        position = _after_space(text, position + more)
    end = _after_space(text, position + 1)
    if not text.startswith("]", position):
        yield text.count("\n", 0, position) + 1, _Broken("a comma or the closing ] is missing"), False
    elif end < len(text):
        yield text.count("\n", 0, end) + 1, _Broken("something follows the array's closing ]"), False


def _after_space(text: str, position: int) -> int:
    match = _NOT_SPACE.search(text, position)
    return match.start() if match else len(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {quoted(max(names, key=names.count))} stands twice in one object")
    return value


def _decoder_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON, {error.msg[0].lower()}{error.msg[1:]} at column {error.colno}"
    return _TOO_DEEP if isinstance(error, RecursionError) else str(error)


def _problem(value: object, may_be_halved: bool) -> str:
    """What is wrong with a value; nothing where it is a sound object."""
    if isinstance(value, _Broken):
        return value.why
    if isinstance(value, dict):
        return "half of a two-part \\ud… character" if may_be_halved and _has_half_a_character(value) else ""
    return f"not an object but {'null' if value is None else type(value).__name__}"


def _has_half_a_character(value: dict[str, Any]) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
