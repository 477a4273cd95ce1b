"""Ollama's Modelfile: the trained chat template in Go's language, stop tokens, and the system text.

Ollama reads no Jinja. The template is asked: a system turn, a question and an answer are written with it, and what
stands around their texts becomes the Go template. It is used where it writes conversations of several turns to the
letter as the Jinja template does; else the Modelfile has none, which is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capotune.tasks.generation.chat_template import ChatTemplate, RefusedError
from capotune.tasks.generation.encoding import TextEncoder

_SYSTEM, _ASKED, _ANSWERED = "qwksystem", "qwkasked", "qwkanswered"


@dataclass(frozen=True)
class TurnTexts:
    """What stands before and after each turn's text, by role, and before the answer that is to be written."""

    start: str
    """Before everything."""
    turns: dict[str, tuple[str, str]]
    ask: str
    system: str | None
    """The system text that the template writes where none is given."""

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """As Ollama writes them."""
        told = [] if self.system is None or messages[0]["role"] == "system" else [_turn("system", self.system)]
        parts = [
            f"{self.turns[one['role']][0]}{one['content']}{self.turns[one['role']][1]}" for one in (*told, *messages)
        ]
        return self.start + "".join(parts) + self.ask

    def go_template(self) -> str:
        """In the language of Go's text/template."""
        cases = []
        for number, (role, (before, after)) in enumerate(self.turns.items()):
            word = "if" if not number else "else if"
            cases.append(f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
        return f"{self.start}{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{self.ask}"


def modelfile(task: TextEncoder, model: str, adapter: str | None) -> tuple[str, list[str]]:
    """The file's text, and what the user should know. ``model`` and ``adapter`` are GGUF files, as it names them."""
    lines = [f"FROM {model}", *([] if adapter is None else [f"ADAPTER {adapter}"])]
    notices = []
    texts = turn_texts(task) if task.chat_template is not None else None
    if texts is not None:
        lines.append(f'TEMPLATE """{texts.go_template()}"""')
        if texts.system:
            lines.append(f'SYSTEM """{texts.system}"""')
    elif task.chat_template is not None:
        notices.append(
            "the chat template cannot be said in Ollama's language, so the Modelfile has none: ask with raw prompts."
        )
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    stops = [str(task.tokenizer.convert_ids_to_tokens(end)) for end in task.end_ids]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n", notices


def turn_texts(task: TextEncoder) -> TurnTexts | None:
    """The chat template's texts around turns; None where conversations are more than their turns one after another."""
    assert task.chat_template is not None
    template = ChatTemplate(task.tokenizer, task.chat_template)
    try:
        texts = _read(template, str(task.tokenizer.bos_token or ""))
        if texts is None:
            return None
        same = all(texts.render(one) == _without_bos(template.render(one, ask=True), task) for one in _cases(texts))
    except RefusedError:
        return None
    return texts if same else None


def _read(template: ChatTemplate, bos: str) -> TurnTexts | None:
    asked, answered = _turn("user", _ASKED), _turn("assistant", _ANSWERED)
    one = template.render([asked], ask=True)
    two = template.render([asked, answered, asked], ask=True)
    first, _, rest = two.partition(_ANSWERED)
    lead, _, between = first.partition(_ASKED)
    tail = one.partition(_ASKED)[2]
    ask = next((tail[at:] for at in range(len(tail) + 1) if between.endswith(tail[at:])), "")
    user_end = between[: len(between) - len(ask)] if ask else between
    before_second, _, end = rest.partition(_ASKED)
    if not ask or end != tail:
        return None
    user_start = _common_end(lead, before_second)
    turns = {
        "user": (user_start, user_end),
        "assistant": (ask, before_second[: len(before_second) - len(user_start)]),
    }
    start, system = lead[: len(lead) - len(user_start)], None
    if template.has_system:
        told = template.render([_turn("system", _SYSTEM), asked], ask=True)
        before, _, after = told.partition(_SYSTEM)
        until = after.partition(_ASKED)[0]
        if not until.endswith(user_start):
            return None
        close = until[: len(until) - len(user_start)]
        if bos and before.startswith(bos):
            before = before[len(bos) :]
        if start.removeprefix(bos).startswith(before) and before and start.endswith(close):
            inner = start.removeprefix(bos)
            system, start = inner[len(before) : len(inner) - len(close)], start[: len(start) - len(inner)]
        turns = {"system": (before, close), **turns}
    return TurnTexts(start.removeprefix(bos), turns, ask, system)


def _cases(texts: TurnTexts) -> list[list[dict[str, Any]]]:
    asked, answered = _turn("user", "What colour is it?"), _turn("assistant", "Blue.")
    found = [[asked], [asked, answered, asked], [asked, answered, asked, answered, asked]]
    told = _turn("system", "You are a friend.")
    return found + ([[told, *one] for one in found] if "system" in texts.turns else [])


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _without_bos(text: str, task: TextEncoder) -> str:
    """Ollama puts the begin-of-text token before a prompt itself."""
    bos = task.tokenizer.bos_token
    return text.removeprefix(bos) if bos else text


def _common_end(one: str, other: str) -> str:
    size = 0
    while size < min(len(one), len(other)) and one[-1 - size] == other[-1 - size]:
        size += 1
    return one[len(one) - size :]
