"""A prompt template for columns that look like a text to read and one to write, ready to be pasted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from capotune.data.columns import COMPLETION_NAMES, CONTEXT_NAMES, LABEL_NAMES, find_column
from capotune.data.table import Table

__all__ = ["suggested_template", "template_for"]

_READ: Final = (
    *("instruction", "question", "query", "input", "prompt", "source", "source_text", "src", "article", "dialogue"),
    *("dialog", "meaning_representation", "mr", "docstring", "question_title", "text", "sentence", "content", "body"),
    *("description", "title"),
)
_WRITTEN: Final = tuple(name for name in COMPLETION_NAMES if name not in LABEL_NAMES or name == "target")
_SUMMARIES: Final = ("summary", "highlights")
_LANGUAGES: Final = (
    *("ar", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "es", "et", "eu", "fa", "fi", "fr", "gl", "he", "hi", "hr"),
    *("hu", "id", "is", "it", "ja", "ko", "lt", "lv", "mk", "ms", "nb", "nl", "nn", "no", "pl", "pt", "ro", "ru", "sk"),
    *("sl", "sq", "sr", "sv", "sw", "ta", "th", "tr", "uk", "ur", "vi", "zh", "arabic", "chinese", "dutch", "english"),
    *("french", "german", "hindi", "italian", "japanese", "korean", "polish", "portuguese", "russian", "spanish"),
    *("turkish", "ukrainian"),
)


def suggested_template(table: Table) -> str:
    """The settings that would read the table as prompts with completions; ``""`` where its columns do not show them."""
    inner = {f"{name}.{key}": value for name, part in table.rows[0].items() if isinstance(part, dict)
             for key, value in part.items()}  # fmt: skip
    for columns in (table.columns, list(inner)):
        languages = [column for column in columns if column.rpartition(".")[2].lower() in _LANGUAGES]
        if len(languages) > 1:
            one, other = languages[:2]
            names = [name.rpartition(".")[2] for name in (one, other)]
            return _settings(f"Translate from {names[0]} to {names[1]}: {{{one}}}\\n", other)
    written = find_column(table.columns, _WRITTEN)
    rest = [column for column in table.columns if column != written]
    context, read = find_column(rest, CONTEXT_NAMES), find_column(rest, _READ)
    parts = [column for column in (context, read) if column is not None]
    return template_for(parts, written) if parts and written is not None else ""


def template_for(read: Sequence[str], written: str) -> str:
    """The settings that put the columns ``read`` into the prompt and ``written`` after it; ``""`` where a name cannot
    stand in a template."""
    end = "\\n\\nSummary:\\n" if find_column([written], _SUMMARIES) else "\\n"
    return _settings("\\n\\n".join(f"{{{name}}}" for name in read) + end, written)


def _settings(template: str, completion: str) -> str:
    if not re.fullmatch(r"[\w .,:{}\\-]+", template + completion):
        return ""
    return f'`prompt_template="{template}"` `completion_column="{completion}"`'
