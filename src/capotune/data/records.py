"""Read a data file, or a dataset of the Hugging Face hub, into plain rows that know the line they came from.

Text files are read with the standard library, so that a row's line number is the one an editor shows. Nothing is
guessed and nothing is repaired: a line that does not fit is named, with its file, its line and what to do about it.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import os
import re
import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from capotune.errors import DataError

__all__ = [
    "Records",
    "describe_bad_lines",
    "did_you_mean",
    "is_hub_id",
    "is_plain_text",
    "read_records",
    "read_text",
    "shorten",
]

DELIMITERS: Final = {".csv": None, ".tsv": "\t", ".tab": "\t"}  # None: read it off the header line
JSON_ENDINGS: Final = (".jsonl", ".ndjson", ".json")
ENDINGS: Final = (*DELIMITERS, *JSON_ENDINGS, ".parquet")
TEXT_ENDINGS: Final = (".txt", ".md")  # usual for plain text, which may have any other ending as well
ALLOWED: Final = (
    "Allowed: a .csv, .tsv, .jsonl, .ndjson, .json or .parquet file, or a hub dataset (owner/name); for a model that "
    "writes also a text file."
)
SHOWN: Final = 5  # how many bad lines one message names
OTHER_ENDINGS: Final = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Save the sheet as 'CSV UTF-8'."),
    **dict.fromkeys((".gz", ".zip", ".zst", ".bz2", ".xz"), "Unpack it first."),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt"), "Save its text as a .txt file in UTF-8."),
}
HEAD: Final = 2**20  # bytes of a large file that are read for its first rows

_HUB_ID: Final = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<split>\w[\w.-]*))?")
_NOT_SPACE: Final = re.compile(r"[^ \t\r\n]")
_FIELD_LIMIT_LOCK: Final = threading.Lock()


@dataclass(frozen=True)
class Records:
    """The rows of one source.

    Attributes:
        columns: column names in the order of the file; for JSON every key that any row has.
        rows: one dict a row. Values are ``str`` in csv and tsv, else what the format holds. A JSON row has only the
            keys it was written with.
        lines: for each row the line it starts on, counted from 1; in parquet and on the hub the row's number.
        source: the file or hub id as it was given.
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    lines: list[int]
    source: str


@dataclass(frozen=True)
class _Broken:
    """Stands in a row's place when the line could not be read."""

    why: str


def read_records(source: str | os.PathLike[str], split: str | None = None, *, limit: int | None = None) -> Records:
    """Read every row of a csv, tsv, jsonl/ndjson, json or parquet file, or of a dataset on the hub.

    Text is UTF-8, or UTF-16 with a byte-order mark. A csv file may be separated by commas, semicolons, tabs or bars,
    as its header line shows. Blank lines, and csv lines whose fields are all blank, are left out. A csv column without
    a name is called by its place: ``column 3``.

    Args:
        source: a path, ``owner/name`` or ``owner/name:split``. What stands on disk wins over the hub.
        split: the part of a hub dataset; without it all parts are read and, where there are several, a column
            ``split`` says which one a row is from.
        limit: stop after so many rows (of each split). Lines further down are not checked, and of a large text file
            only the start is read.

    Raises:
        DataError: the source does not exist or cannot be read, holds no rows, or has lines that do not fit.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    if not os.path.exists(path):  # noqa: PTH110 - Path.exists raises on a name that is too long
        if not is_hub_id(source):
            raise DataError(_no_such_file(source, path))
        records = _read_hub(source, split, limit)
    elif split is not None:
        raise DataError(f"{source}: is a file, and split={split!r} chooses a part of a hub dataset. Leave it out.")
    else:
        records = _read_file(path, source, limit)
    if not records.rows:
        held = f"only the header {shorten(records.columns)}" if records.columns else "nothing but brackets"
        raise DataError(f"{source}: holds no rows, {held}. Add rows, or give another file.")
    return records


def is_hub_id(source: str) -> bool:
    """Whether ``source`` is written like a hub dataset (``owner/name`` or ``owner/name:split``), not like a file."""
    match = _HUB_ID.fullmatch(source)
    return match is not None and Path(match["name"]).suffix.lower() not in (*ENDINGS, *TEXT_ENDINGS)


def is_plain_text(source: str | os.PathLike[str]) -> bool:
    """Whether ``source`` is a file that holds no rows, by its ending."""
    path = Path(source).expanduser()
    return os.path.isfile(path) and path.suffix.lower() not in ENDINGS  # noqa: PTH113 - as in read_records


def read_text(source: str | os.PathLike[str]) -> str:
    """The whole text of a file, in one of the encodings of ``read_records``; every line ends in a line feed.

    Raises:
        DataError: the file cannot be read, is empty, or is no text.
    """
    source = os.fspath(source)
    path = Path(source).expanduser()
    if advice := OTHER_ENDINGS.get(path.suffix.lower()):
        raise DataError(f"{source}: is not a text file. {advice}")
    text = _decode(_read_bytes(path, source), path, source)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_file(path: Path, source: str, limit: int | None) -> Records:
    ending = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{source}: is a folder; one file is needed. {_data_files_in(path)}")
    if ending not in ENDINGS:
        advice = OTHER_ENDINGS.get(ending, "Rename or convert it.")
        raise DataError(f"{source}: files ending in {ending!r} are not read. {ALLOWED} {advice}")
    if limit is not None and ending != ".parquet" and path.stat().st_size > HEAD:
        # where these rows do not end in its first lines, or are broken, the whole file tells which
        with suppress(DataError):
            head = _parse(_read_bytes(path, source, HEAD), path, source, limit)
            if len(head.rows) == limit:
                return head
    return _parse(_read_bytes(path, source), path, source, limit)


def _read_bytes(path: Path, source: str, at_most: int | None = None) -> bytes:
    """The bytes of a file, or of its first lines in ``at_most`` bytes."""
    try:
        if at_most is None:
            raw = path.read_bytes()
        else:
            with path.open("rb") as file:
                raw = file.read(at_most)
            raw = raw[: raw.rfind(b"\n") + 1] or raw
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}. Check it with: ls -l {_quote(path)}") from error
    if not raw.strip():
        raise DataError(_is_empty(path, source))
    return raw


def _parse(raw: bytes, path: Path, source: str, limit: int | None) -> Records:
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _read_parquet(raw, source, limit)
    text = _decode(raw, path, source)
    if ending in JSON_ENDINGS:
        return _read_json(text, source, limit)
    return _read_csv(text, source, DELIMITERS[ending], limit)


def _is_empty(path: Path, source: str) -> str:
    needed = "column names and rows" if path.suffix.lower() in ENDINGS else "text"
    return f"{source}: is empty. Give a file with {needed}."


# Text


def _decode(raw: bytes, path: Path, source: str) -> str:
    """UTF-8 with or without a byte-order mark, or UTF-16 with one; anything else, and blank text, is refused."""
    text = _decode_bytes(raw, path, source)
    if not text.strip():
        raise DataError(_is_empty(path, source))
    return text


def _without_zeros(raw: bytes, path: Path) -> str:
    """UTF-16 of European text is half zeros; where there are few, they are strays."""
    if raw.count(0) * 4 > len(raw):
        return f"convert it: {_iconv('UTF-16LE', path)}"
    target = path.with_name(f"{path.stem}-clean{path.suffix}")
    return f"take them out, if there is text around them: tr -d '\\000' < {_quote(path)} > {_quote(target)}"


def _decode_bytes(raw: bytes, path: Path, source: str) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _decode_utf16(raw, source)
    if b"\0" in raw:
        raise DataError(
            f"{source}:{_line_at(raw, raw.index(0))}: a zero byte, which no text has. This is a binary file (a sheet "
            "under another name?), a damaged one or UTF-16 without its byte-order mark. Allowed: UTF-8, or UTF-16 with "
            f"the mark. Export it as UTF-8, or {_without_zeros(raw, path)}"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = len(raw) - len(error.object) + error.start
        near = raw[max(raw.rfind(b"\n", 0, at) + 1, at - 30) : at + 30].partition(b"\n")[0]
        raise DataError(
            f"{source}:{_line_at(raw, at)}: the byte 0x{raw[at]:02x} is not UTF-8. Allowed: UTF-8, or UTF-16 with a "
            f"byte-order mark. Windows-1252 (Excel's plain CSV) is likely; in it the place reads "
            f"{_excerpt(near.decode('cp1252', errors='replace'))}. Save it as 'CSV UTF-8', or convert it: "
            f"{_iconv('WINDOWS-1252', path)}"
        ) from error


def _decode_utf16(raw: bytes, source: str) -> str:
    text = raw.decode("utf-16", errors="replace")
    broken = min((at for at in (text.find("\ufffd"), text.find("\0")) if at >= 0), default=None)
    if broken is not None:
        line = text.count("\n", 0, broken) + 1
        raise DataError(f"{source}:{line}: starts as UTF-16 and is not UTF-16 here. Export the file again, as UTF-8.")
    return text


def _line_at(raw: bytes, position: int) -> int:
    return raw.count(b"\n", 0, position) + 1


def _iconv(encoding: str, path: Path) -> str:
    target = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t UTF-8 {_quote(path)} > {_quote(target)}"


# Csv and tsv


def _read_csv(text: str, source: str, delimiter: str | None, limit: int | None) -> Records:
    columns: list[str] = []
    rows: list[dict[str, Any]] = []
    starts: list[int] = []
    bad: dict[int, str] = {}
    lines = list(io.StringIO(text, newline=""))
    with _fields_up_to(len(text)):
        first, delimiter = _header(lines, delimiter)
        for line, fields in _split_fields(lines, delimiter, first):
            if isinstance(fields, _Broken):
                bad[line] = f"{fields.why}: {_excerpt(lines[line - 1])}"
            elif not any(map(str.strip, fields)):
                continue
            elif not columns:
                columns = _column_names(fields, f"{source}:{line}")
            elif len(fields) != len(columns):
                found = _count(len(fields), "field")
                bad[line] = f"{found}, where the header has {len(columns)}: {_excerpt(lines[line - 1])}"
            else:
                rows.append(dict(zip(columns, fields, strict=True)))
                starts.append(line)
            if len(bad) == SHOWN or (bad and not columns) or len(rows) == limit:
                break
    if bad:
        summary = f"{_at_least(bad)} cannot be read as fields separated by {delimiter!r}"
        advice = (
            f'Double quotes go around a field that holds {delimiter!r} or a line break; a quote in it is written "".'
        )
        raise DataError(describe_bad_lines(source, summary, bad, advice))
    return Records(columns, rows, starts, source)


@contextmanager
def _fields_up_to(size: int) -> Iterator[None]:
    """Let csv read fields of ``size`` characters. Its limit is one number a process: it is lent, and put back."""
    with _FIELD_LIMIT_LOCK:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, min(size, 2**31 - 1)))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _header(lines: list[str], delimiter: str | None) -> tuple[int, str]:
    """Where the header line stands, and the delimiter that gives it the most fields (a comma when none does)."""
    first = next(index for index, line in enumerate(lines) if line.strip())
    if excel := re.fullmatch(r"sep=(.)\s*", lines[first]):
        return first + 1, excel[1]
    candidates = delimiter or ",;\t|"
    return first, max(candidates, key=lambda candidate: len(next(csv.reader([lines[first]], delimiter=candidate))))


def _split_fields(lines: list[str], delimiter: str, first: int) -> Iterator[tuple[int, list[str] | _Broken]]:
    """Yield each record's line and fields; after a broken record go on with the line below it."""
    start = first
    while start < len(lines):
        offset = start
        reader = csv.reader((lines[index] for index in range(offset, len(lines))), delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                yield start + 1, fields
                start = offset + reader.line_num
            return
        except csv.Error as error:
            yield start + 1, _Broken(_csv_problem(error))
            start += 1


def _csv_problem(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a double quote opens a field here and is never closed"
    if "expected after" in str(error):
        return "its double quotes do not pair up (text follows a closing one)"
    return str(error)


def _column_names(fields: list[str], where: str) -> list[str]:
    names = [field.strip() or f"column {number}" for number, field in enumerate(fields, start=1)]
    _refuse_duplicates(names, where)
    return names


def _refuse_duplicates(names: Sequence[str], where: str) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise DataError(f"{where}: more than one column is named {shorten(twice)}. Give each its own name.")


# Json, as an array or one object a line


def _read_json(text: str, source: str, limit: int | None) -> Records:
    values = _array_values(text) if text.lstrip().startswith("[") else _line_values(text)
    has_surrogates = re.search(r"\\u[dD]", text) is not None
    columns: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    starts: list[int] = []
    bad: dict[int, str] = {}
    for line, value in values:
        if isinstance(value, dict) and not (has_surrogates and _has_half_a_character(value)):
            columns.update(dict.fromkeys(value))
            rows.append(value)
            starts.append(line)
        else:
            bad[line] = f"{_json_problem(value)}: {_excerpt(text.split(chr(10), line)[line - 1])}"
        if len(bad) == SHOWN or len(rows) == limit:
            break
    if bad:
        summary = f"{_at_least(bad)} cannot be read as JSON objects"
        advice = (
            'Allowed: one object a line, like {"text": "…", "label": "…"}, or an array of them. Correct these lines.'
        )
        raise DataError(describe_bad_lines(source, summary, bad, advice))
    return Records(list(columns), rows, starts, source)


def _line_values(text: str) -> Iterator[tuple[int, Any]]:
    decode = json.JSONDecoder(object_pairs_hook=_object).decode
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield line, decode(content)
            except (ValueError, RecursionError) as error:
                yield line, _Broken(_decoder_problem(error))


def _array_values(text: str) -> Iterator[tuple[int, Any]]:
    """Decode an array element by element, to know each one's line. A break in it cannot be stepped over."""
    decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
    line, counted = 1, 0
    position = _after_space(text, text.index("[") + 1)
    more = not text.startswith("]", position)
    while more:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decode(text, position)
        except (ValueError, RecursionError) as error:
            yield getattr(error, "lineno", line), _Broken(_decoder_problem(error))
            return
        yield line, value
        position = _after_space(text, position)
        more = text.startswith(",", position)
        position = _after_space(text, position + more)
    end = _after_space(text, position + 1)
    if not text.startswith("]", position):
        yield text.count("\n", 0, position) + 1, _Broken("a comma or the closing ] is missing")
    elif end < len(text):
        yield text.count("\n", 0, end) + 1, _Broken("something follows the array's closing ]")


def _after_space(text: str, position: int) -> int:
    match = _NOT_SPACE.search(text, position)
    return match.start() if match else len(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} stands twice in one object")
    return value


def _decoder_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON, {error.msg[0].lower()}{error.msg[1:]} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json_problem(value: object) -> str:
    if isinstance(value, _Broken):
        return value.why
    if isinstance(value, dict):
        return "half of a two-part \\ud… character"
    return f"not an object but {'null' if value is None else type(value).__name__}"


def _has_half_a_character(value: dict[str, Any]) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


# Parquet and the hub


def _read_parquet(raw: bytes, source: str, limit: int | None) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
        columns = [str(name) for name in table.column_names]
        _refuse_duplicates(columns, source)
        rows = table.slice(0, limit).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: is not whole parquet ({_first_line(error)}). Write it again.") from error
    written_by_datasets = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    _name_classes(rows, written_by_datasets.get("info", {}).get("features") or {})
    return Records(columns, rows, list(range(1, len(rows) + 1)), source)


def _read_hub(source: str, split: str | None, limit: int | None) -> Records:
    match = _HUB_ID.fullmatch(source)
    assert match is not None
    if split is not None and match["split"] not in (None, split):
        raise DataError(f"{source}: names a split, and split={split!r} names another. Give one of the two.")
    parts = _load_from_hub(source, match["name"], split or match["split"])
    rows: list[dict[str, Any]] = []
    columns: dict[str, None] = {}
    for name, part in parts.items():
        part_rows = (part if limit is None else part.select(range(min(limit, len(part))))).to_list()
        _name_classes(part_rows, part.features.to_dict())
        columns.update(dict.fromkeys(part.column_names))
        rows += part_rows if len(parts) == 1 else [{"split": name, **row} for row in part_rows]
    if len(parts) > 1:
        if "split" in columns:
            raise DataError(f"{source}: has several splits and a column 'split'. Choose one: {shorten(parts)}.")
        columns["split"] = None
    return Records(list(columns), rows, list(range(1, len(rows) + 1)), source)


def _load_from_hub(source: str, name: str, split: str | None) -> dict[str, Any]:
    """The parts of a hub dataset by name. No code from the hub is run."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError  # of whichever library it speaks HTTP with

    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(name, timeout=10)  # without a network load_dataset would try for half a minute
        loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        path = Path(name)
        near = did_you_mean(path.name, _names_in(path.parent)) if path.parent.is_dir() else ""
        raise DataError(
            f"{source}: no such file, and no such dataset on the hub; both were tried. The hub's answer: "
            f"{_first_line(error)}. {near}{ALLOWED} Check the spelling and the network, or download the data and give "
            "the file."
        ) from error
    return {split: loaded} if split is not None else dict(loaded)


def _name_classes(rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
    """Put the names of a ``ClassLabel`` column where its numbers stand; -1 is how such a column says 'no label'."""
    for column, feature in features.items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            names = dict(enumerate(feature["names"]))
            for row in rows:
                if column in row:
                    row[column] = names.get(row[column])


# What messages are made of


def describe_bad_lines(source: str, summary: str, bad: dict[int, str], advice: str) -> str:
    """A message: ``summary``, the first bad lines as ``file:line: why``, and ``advice``."""
    shown = [f"  {source}:{line}: {why}" for line, why in list(bad.items())[:SHOWN]]
    more = [f"  … and {len(bad) - SHOWN:,} more"] if len(bad) > SHOWN else []
    return "\n".join([f"{source}: {summary}:", *shown, *more, advice])


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """``Did you mean 'tickets.csv'? `` when something in ``known`` is spelled nearly like ``name``, else nothing."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.7)
    return f"Did you mean {' or '.join(repr(by_lower[match]) for match in near)}? " if near else ""


def shorten(names: Sequence[str] | dict[str, Any], limit: int = 8) -> str:
    """Names in quotes, parted by commas; of a long list the first ones and how many more there are."""
    quoted = [repr(name if len(name) <= 60 else f"{name[:59]}…") for name in list(names)[:limit]]
    return ", ".join(quoted) + (f" … and {len(names) - limit} more" if len(names) > limit else "")


def _no_such_file(source: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"{source}: no such file, and no such folder: {path.parent}. {ALLOWED}"
    near = did_you_mean(path.name, _names_in(path.parent))
    return f"{source}: no such file. {near or _data_files_in(path.parent) + ' '}{ALLOWED}"


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _data_files_in(folder: Path) -> str:
    found = [name for name in _names_in(folder) if Path(name).suffix.lower() in ENDINGS]
    return f"Data files there: {shorten(found)}." if found else "The folder holds no data file."


def _at_least(bad: dict[int, str]) -> str:
    return f"{len(bad)} lines or more" if len(bad) == SHOWN else _count(len(bad), "line")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _excerpt(text: str, limit: int = 60) -> str:
    """The start of a line, with control characters spelled out so that they neither vanish nor reach a terminal."""
    text = text.rstrip("\r\n")
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:limit])
    return f"«{shown}{'…' if len(text) > limit else ''}»"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
