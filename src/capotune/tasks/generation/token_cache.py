"""Tokens of large data: written to files some rows at a time, mapped, and found again by the next run on the same data.

The name of an entry is a hash of all that the tokens depend on: the rows, how they are read, the tokenizer and chat
template, what is trained on, the longest sequence. Small data is tokenised sooner than an entry is written.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import tokenizers
import transformers

from capotune import cache
from capotune.data.encoded_rows import ARRAYS, EncodedRows, write_encoded
from capotune.data.samples import Samples
from capotune.events import Reporter, Stage
from capotune.files import cache_folder, human_bytes
from capotune.made_once import MadeOnce
from capotune.tasks.generation.encoding import TextEncoder
from capotune.tasks.generation.notices import Notices
from capotune.tasks.generation.tokens import added_tokens

LARGE: Final = 2**22
"""Characters from which on tokens go to files: some seconds' work, and 5 MB."""
_FORMAT = 1
"""Goes up when the same samples become other tokens than before."""
_NOTICES = "notices.json"
_BUFFER = 2**20
_BYTES_A_CHARACTER = 2
"""A token takes 5, and has 3 characters or more as a rule."""


def encoded_once(task: TextEncoder, samples: Samples, notices: Notices, report: Reporter) -> EncodedRows:
    """``task.encode``. Raises ``OutputError`` where there is no room for the tokens of large data."""
    characters = int(samples.facts["characters"].sum())
    name = _name(task, samples) if characters >= LARGE else ""
    if not name:
        return task.encode(samples, notices)
    entry = MadeOnce(cache_folder() / "tokens" / name, "what was tokenised before", "is tokenised again", report)
    folder = entry.folder if entry.is_ready() else _made(entry, task, samples, characters, report)
    notices.update(json.loads((folder / _NOTICES).read_text(encoding="utf-8")))
    return EncodedRows.mapped(folder)


def _made(entry: MadeOnce, task: TextEncoder, samples: Samples, characters: int, report: Reporter) -> Path:
    report(Stage(text="tokenising"))
    nbytes = characters * _BYTES_A_CHARACTER

    def make(folder: Path) -> None:
        found = Notices()
        with ExitStack() as stack:
            files = {name: stack.enter_context((folder / name).open("wb", buffering=_BUFFER)) for name in ARRAYS}
            write_encoded(task.encoded(samples, found), files)
        (folder / _NOTICES).write_text(json.dumps(found.found), encoding="utf-8")

    cache.tidy(entry.folder.parent)
    if not cache.make_room(nbytes):
        sizes = f"about {human_bytes(nbytes)}, more than the cache has room for (at most {human_bytes(cache.limit())})"
        return entry.for_this_process(make, f"the tokens take {sizes}: the next run tokenises again.")
    return entry.made(make, elsewhere=True, base=task.base.name, data=str(samples.source))


def _name(task: TextEncoder, samples: Samples) -> str:
    """Empty where the same tokens cannot be known again: of rows in memory, and by a tokenizer in Python."""
    backend = getattr(task.tokenizer, "backend_tokenizer", None)
    if not samples.content or backend is None:
        return ""
    fields = ("max_length", "end_ids", "chat_template", "tool_template", "learn", "separator", "chat")
    parts = [
        _FORMAT,
        samples.content,
        str(samples.source),  # which notices name
        {name: getattr(task, name) for name in fields},
        task.base.vocabulary_size,
        {**json.loads(backend.to_str()), "padding": None, "truncation": None},  # those two are of the last call
        [task.tokenizer.special_tokens_map, *added_tokens(task.tokenizer)],
        [transformers.__version__, tokenizers.__version__],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
