"""What a chat template makes of conversations that whoever trains on them should know: each thing once, counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Kind = Literal["system", "developer", "thinking", "tools", "asked otherwise", "control token"]

_SENTENCES: Final[dict[Kind, str]] = {
    "system": "the chat template has no system turn: {count} written before the user's text",
    "developer": "the chat template has no developer turn: {count} written as a system turn",
    "thinking": "the chat template leaves out what the assistant thought in {count}, and it is not trained on",
    "tools": "the chat template has no place for tools: they are left out in {count}",
    "asked otherwise": "the chat template asks for an answer with more words than it writes before one: {count} "
    "trained on without those words",
    "control token": "a special token stands in the text of {count}, and the model reads it as such",
}
_UNITS: Final[dict[Kind, tuple[str, str]]] = {
    "system": ("1 system turn is", "{:,} system turns are"),
    "developer": ("1 is", "{:,} are"),
    "thinking": ("1 turn", "{:,} turns"),
    "tools": ("1 conversation", "{:,} conversations"),
    "asked otherwise": ("1 turn is", "{:,} turns are"),
    "control token": ("1 message", "{:,} messages"),
}


@dataclass
class Notices:
    """Counts and first places, filled while conversations are written out."""

    found: dict[Kind, tuple[int, str]] = field(default_factory=dict)
    """For each kind how many places have it, and the first of them."""

    def add(self, kind: Kind, where: str) -> None:
        """Something of a kind stands at ``where``."""
        count, first = self.found.get(kind, (0, where))
        self.found[kind] = count + 1, first

    def update(self, others: Mapping[Kind, Sequence[Any]]) -> None:
        """What was ``found`` in further samples."""
        for kind, (more, where) in others.items():
            count, first = self.found.get(kind, (0, where))
            self.found[kind] = count + more, first

    def sentences(self) -> Iterable[str]:
        """A sentence for each kind that was found."""
        for kind, (number, first) in self.found.items():
            one, many = _UNITS[kind]
            count = one if number == 1 else many.format(number)
            yield f"{_SENTENCES[kind].format(count=count)} (first: {first})"
