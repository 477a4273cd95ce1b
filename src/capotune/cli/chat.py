"""``capo chat``: a conversation with a model, in a terminal or line by line through a pipe.

Answers go to standard output; everything else that is said goes to standard error.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro

from capotune.cli.flags import base_of, parse_repeating
from capotune.cli.generate import decoding_of, show
from capotune.cli.messages import in_flags
from capotune.cli.terminal import harmless
from capotune.errors import CapotuneError, DataError, SettingError
from capotune.events import Event, Warned
from capotune.settings import BaseSettings, DecodingSettings, nearest

HELP = """\
/adapter NAME   put another adapter on: a folder, or one beside this one by its name
/base           the base alone
/system TEXT    what the model is told beforehand; without a text: nothing
/reset          begin anew
/help           this list
/quit           end (also Ctrl-D); Ctrl-C stops the answer"""
COMMANDS = ("adapter", "base", "system", "reset", "help", "quit")


class Chat(BaseSettings, DecodingSettings):
    """Talk with a model in its chat template; /help lists what can be said beside. Reads lines from a pipe as well."""

    adapter: tyro.conf.Positional[str]
    """Adapter folder, or an adapter on the hub (`owner/name@revision`); or a model alone: an embedded one by name, a
    folder, a GGUF file, or a model id on the hub."""


def chat(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    settings = parse_repeating(Chat, rest, "capo chat")
    from capotune import api
    from capotune.cli.display import watch_bytes

    with watch_bytes() as report:
        generator = api.load_generator(settings.adapter, report=report, **base_of(settings))
    if not generator.has_chat_template:
        raise SettingError(
            f"{settings.adapter}: the model has no chat template; it continues text and was not made to chat. Let "
            f"it go on with `capo generate {settings.adapter}`, or train an adapter on conversations first."
        )
    session = Session(generator, settings.adapter, decoding_of(settings))
    _say(f"{session.name}. /help lists the commands, Ctrl-D ends.")
    with _ended_by_sigterm():
        for line in _lines():
            if not session.take(line):
                break
    return 0


class Session:
    """A conversation and the model that it is held with."""

    def __init__(self, generator: Any, adapter: str, decoding: dict[str, Any]) -> None:
        from capotune import api

        self.generator, self.decoding = generator, decoding
        self.here = Path(adapter).resolve() if Path(adapter).is_dir() and api.is_adapter(adapter) else None
        """The adapter that was given first: others are looked for beside it."""
        self.name = adapter
        """What answers now."""
        self.system = ""
        self.turns: list[dict[str, Any]] = []

    def take(self, line: str) -> bool:
        """Answer a line or obey a command; False: end. A user's mistake is said, and the conversation goes on."""
        line = line.strip()
        command = re.fullmatch(r"/(\w*)(?:\s+(.*))?", line, re.DOTALL)
        try:
            if command:
                return self._obey(command[1], (command[2] or "").strip())
            if line:
                self._answer(line)
        except CapotuneError as error:
            _say(in_flags(error))
        return True

    def _obey(self, command: str, rest: str) -> bool:
        if command not in COMMANDS:
            close = nearest(command, COMMANDS)
            raise SettingError(f"no command /{command}.{close} /help lists them.")
        if command == "adapter":
            self._use(rest)
        elif command == "base":
            self.generator.use(None)
            self.name = "the base alone"
            _say("now the base alone answers; the conversation goes on.")
        elif command == "system":
            self.system = rest
            _say("the model is told this beforehand." if rest else "nothing is said beforehand.")
        elif command == "reset":
            self.turns = []
            _say("begun anew.")
        elif command == "help":
            _say(HELP)
        return command != "quit"

    def _use(self, name: str) -> None:
        from capotune import api

        beside = self._beside()
        if not name:
            others = f" Beside it: {', '.join(beside)}." if beside else ""
            _say(f"{self.name} answers.{others}")
            return
        places = [beside[name]] if name in beside else [Path(name), Path(name) / "adapter"]
        folder = next((place for place in places if (place / "adapter_config.json").is_file()), None)
        if folder is None and (Path(name).exists() or not api.is_adapter(name)):
            known = f" Beside this one: {', '.join(beside)}." if beside else ""
            raise SettingError(f"/adapter {name}: no such adapter.{nearest(name, beside)}{known} Or give its folder.")
        self.generator.use(folder or name, report=_say_warning)
        self.name = name
        _say(f"now {name} answers; the conversation goes on, /reset begins anew.")

    def _beside(self) -> dict[str, Path]:
        """Adapters in folders beside the first one, by name: ``compared/lora/adapter`` is lora."""
        if self.here is None:
            return {}
        found = [(path.parent.name, path.parent) for path in self.here.parent.glob("*/capotune.json")]
        found += [
            (path.parent.parent.name, path.parent) for path in self.here.parent.parent.glob("*/adapter/capotune.json")
        ]
        return {name: folder for name, folder in sorted(found) if name != "adapter"}

    def _answer(self, text: str) -> None:
        """Let the model answer; a turn that gets no answer is forgotten."""
        turns = self._shortened([*self.turns, {"role": "user", "content": text}])
        written: list[str] = []
        try:
            show(self.generator.stream_chat(self._all(turns), **self.decoding), written)
        except KeyboardInterrupt:
            _say("(stopped)")
        if not written:
            _say("(no answer)")
            return
        self.turns = [*turns, {"role": "assistant", "content": "".join(written)}]

    def _all(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns

    def _shortened(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The turns without the oldest ones where the context leaves too few tokens for an answer."""
        context = self.generator.context_length
        wanted = min(self.decoding["max_tokens"], context // 4)
        newest = turns
        while len(newest) > 1 and self.generator.tokens_left(self._all(newest)) < wanted:
            newest = newest[2:]  # a question and its answer
        dropped = len(turns) - len(newest)
        if dropped and self.generator.tokens_left(self._all(newest)) > 0:
            _say(f"(the model holds {context:,} tokens: the oldest {dropped} turns are left out)")
        return newest


def _lines() -> Iterator[str]:
    """What is typed or piped in, line by line. At a terminal Ctrl-C clears the line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 text ({error}). Convert it first, say with iconv.") from None
        return
    import readline  # noqa: F401 - editing and a history for ``input``

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _say("(Ctrl-D or /quit ends)")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program, where elsewhere it is as Ctrl-C, which here stops no more than the answer."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_warning(event: Event) -> None:
    if isinstance(event, Warned):
        _say(event.text)


def _say(text: str) -> None:
    print(harmless(text), file=sys.stderr, flush=True)
