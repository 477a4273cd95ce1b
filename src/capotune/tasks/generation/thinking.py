"""What was thought before an answer, in templates that write it between markers of their own.

Most templates write ``<think>…</think>`` and read it back from the text of an earlier answer. Some use other markers
(gpt-oss: ``<|channel|>analysis<|message|>``, Gemma 4: ``<|channel>thought``), take thinking in a field of its own and
refuse or repeat a text that holds their markers. An answer in them is given in the common form, and read back from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPENED, CLOSED = "<think>", "</think>"


@dataclass(frozen=True)
class ThinkingMarkers:
    """What a template writes around what was thought."""

    before: str
    """Before the thinking: ``<|channel|>analysis<|message|>``."""
    between: str
    """Between thinking and answer: ``<|end|><|start|>assistant<|channel|>final<|message|>``."""
    answer: str
    """Before an answer without thinking: ``<|channel|>final<|message|>``, or nothing."""

    def read(self, written: str) -> str | None:
        """The text of what a model has ``written`` so far: ``<think>…</think>`` and the answer. None: it holds no
        markers. One that is begun at the end is left out, so that the text only grows."""
        if written.startswith(self.before):
            thought, closed, answer = written.removeprefix(self.before).partition(self.between)
            if closed:
                return f"{OPENED}\n{thought}\n{CLOSED}\n\n{answer}"
            return f"{OPENED}\n{_without_begun(thought, self.between)}"
        if self.answer and written.startswith(self.answer):
            return written.removeprefix(self.answer)
        begun = any(marker.startswith(written) for marker in (self.before, self.answer))
        return "" if begun and written else None


def with_thinking_apart(message: Mapping[str, Any]) -> dict[str, Any]:
    """An assistant's message with the ``<think>…</think>`` that its text begins with in ``reasoning_content``."""
    content = message["content"].lstrip()
    if message["role"] != "assistant" or "reasoning_content" in message or not content.startswith(OPENED):
        return dict(message)
    thought, closed, answer = content.removeprefix(OPENED).partition(CLOSED)
    if not closed:
        return dict(message)
    return {**message, "content": answer.lstrip(), "reasoning_content": thought.strip()}


def _without_begun(text: str, marker: str) -> str:
    """``text`` without the longest part of ``marker`` that it ends with."""
    begun = (size for size in range(min(len(text), len(marker)), 0, -1) if text.endswith(marker[:size]))
    return text[: len(text) - next(begun, 0)]
