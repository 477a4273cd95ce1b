"""Text that a model is to write: conversations, prompts with completions, and plain text."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from capotune.data.table import Origin
from capotune.data.view import View
from capotune.data.wording import quoted, shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Conversation",
    "Document",
    "Format",
    "GenerationData",
    "Pair",
    "Sample",
    "Samples",
    "answer_of",
    "asked",
    "described",
    "question_of",
]

Format = Literal["messages", "conversations", "prompt-completion", "instruction", "question-answer", "text", "template"]

START: Final = 200  # characters of a document that stand for it where a question is shown


@dataclass(frozen=True)
class Conversation:
    """Turns between people, a model and its tools, to be written out with the model's chat template.

    Attributes:
        messages: in OpenAI's form, ``{"role": "user", "content": "…"}``. ``content`` is always a string, thinking is
            ``reasoning_content``, ``tool_calls`` are ``{"type": "function", "function": {"name", "arguments"}}`` with
            arguments as an object where they are JSON. Further keys (``name``, ``tool_call_id`` …) are kept as they
            are, without those that hold null.
        tools: the functions that the model may call, as JSON schemas.
        read_only: positions of assistant turns that are not trained on.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    read_only: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        """Positions of the assistant turns to train on."""
        roles = [message["role"] for message in self.messages]
        return [at for at, role in enumerate(roles) if role == "assistant" and at not in self.read_only]


@dataclass(frozen=True)
class Pair:
    """Plain text to go on from, and how it goes on. No chat template is used."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Document:
    """Plain text, all of which is trained on."""

    text: str

    @property
    def parts(self) -> Iterable[str]:
        """The text part by part: a long one is not to be in memory whole."""
        return (self.text,)


Sample = Conversation | Pair | Document


@dataclass(frozen=True)
class Samples:
    """Rows of one source; ``samples[i]`` starts on line ``lines[i]`` of ``source``.

    ``format`` is how they were read, ``columns`` are those that were read (none in a plain text file), ``unused`` those
    that were not; ``note`` says what else there is to say of it. The rows may be more than memory holds: a
    sample is made when it is asked for, and ``facts`` say what is to be known of all.
    """

    samples: Sequence[Sample]
    lines: Sequence[int]
    source: Origin
    format: Format
    columns: tuple[str, ...]
    unused: tuple[str, ...] = ()
    note: str = ""
    known: NDArray[Any] | None = field(default=None, repr=False, compare=False)
    """The facts, where they are known already."""
    content: str = field(default="", compare=False)
    """A hash of all that the samples are made of; empty where it is not known."""

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def facts(self) -> NDArray[Any]:
        """Of each row, as ``sample_facts.FACTS`` names them."""
        from capotune.data.sample_facts import facts_of

        return facts_of(self.samples) if self.known is None else self.known

    @property
    def are_conversations(self) -> bool:
        """Whether the rows are conversations, all of which are of one kind."""
        return any(isinstance(sample, Conversation) for sample in self.samples[:1])

    @property
    def is_one_text(self) -> bool:
        """Whether it is a single plain text, whose windows count as rows."""
        return len(self.samples) == 1 and isinstance(self.samples[0], Document)

    def where(self, row: int) -> str:
        """Where a row stands, as messages name it."""
        return self.source.at(self.lines[row])

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Samples:
        """The rows at ``indices``, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        samples = View(len(rows), lambda at: self.samples[int(rows[at])])
        lines = array("q", (self.lines[row] for row in rows))
        content = self.content and sha256(self.content.encode() + rows.tobytes()).hexdigest()
        return replace(self, samples=samples, lines=lines, known=self.facts[rows], content=content)

    @property
    def described(self) -> str:
        """The format and the columns in words."""
        if self.format == "prompt-completion" and self.are_conversations:
            return f"{described(self.format, self.columns)} (messages)"
        if not self.columns:
            return "plain text"
        return f"{described(self.format, self.columns)}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class GenerationData:
    """What to train on and what to test on. ``test_from`` says in words where the test rows are from."""

    train: Samples
    test: Samples
    test_from: str = "given"


def described(format: Format, columns: Sequence[str]) -> str:
    """Format and columns in words."""
    if format in ("messages", "conversations", "text"):
        return f"{format} (column{'s' * (len(columns) > 1)} {shorten(columns)})"
    if format == "template":
        return f"a prompt of {shorten(columns[:-1])}, completion in {quoted(columns[-1])}"
    return ", ".join(columns)


# What was asked, and what was answered


def question_of(sample: Sample) -> str:
    """What the model is asked, to be shown: the last user turn before the answer, the prompt, or how a text starts."""
    if isinstance(sample, Conversation):
        return _user_turns(sample)[-1] if _user_turns(sample) else ""
    return sample.prompt if isinstance(sample, Pair) else sample.text[:START]


def asked(sample: Sample) -> str:
    """All that the model is asked, to compare rows: every user turn before the answer, the prompt, or the whole text.

    In a long conversation the last turn alone ("and then?") would make rows equal that have nothing in common.
    """
    if isinstance(sample, Conversation):
        return "\n".join(_user_turns(sample) or [message["content"] for message in sample.messages])
    return sample.prompt if isinstance(sample, Pair) else sample.text


def answer_of(sample: Sample) -> str | None:
    """The answer to compare with: the assistant's turn at the end, or the completion. None where there is none."""
    if isinstance(sample, Conversation):
        last = len(sample.messages) - 1
        content: str = sample.messages[last]["content"]
        return content if last in sample.answers and content.strip() else None
    return sample.completion if isinstance(sample, Pair) else None


def _user_turns(conversation: Conversation) -> list[str]:
    """What the user said before the assistant's last turn."""
    roles = [message["role"] for message in conversation.messages]
    end = len(roles) - roles[::-1].index("assistant")
    return [message["content"] for message in conversation.messages[:end] if message["role"] == "user"]
