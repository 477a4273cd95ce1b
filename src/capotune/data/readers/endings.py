"""Which files are read, by how their names end."""

from __future__ import annotations

from typing import Final

__all__ = ["ALLOWED", "DELIMITERS", "ENDINGS", "JSON_ENDINGS", "OTHER_ENDINGS", "TEXT_ENDINGS"]

DELIMITERS: Final = {".csv": None, ".tsv": "\t", ".tab": "\t"}  # None: read it off the header line
JSON_ENDINGS: Final = (".jsonl", ".ndjson", ".json")
ENDINGS: Final = (*DELIMITERS, *JSON_ENDINGS, ".parquet")
TEXT_ENDINGS: Final = (".txt", ".md")  # usual for plain text, which may have any other ending as well
ALLOWED: Final = (
    "a .csv, .tsv, .jsonl, .ndjson, .json or .parquet file, or a hub dataset (owner/name); for a model that writes "
    "also a text file"
)
OTHER_ENDINGS: Final = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Save the sheet as 'CSV UTF-8'."),
    **dict.fromkeys((".gz", ".zip", ".zst", ".bz2", ".xz"), "Unpack it first."),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt"), "Save its text as a .txt file in UTF-8."),
}
