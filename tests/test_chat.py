"""``capo chat``: conversations through a pipe and at a terminal, its commands, a context that is full."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE, Result, capo
from warm import CAPO

import capotune
from capotune.cli.chat import Session


@pytest.fixture(scope="module")
def adapters(untied_writer: Path, colour_chats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters beside each other; the base has no chat template of its own, and a longer context than elsewhere."""
    folder = tmp_path_factory.mktemp("compared")
    base = folder / "base"
    shutil.copytree(untied_writer, base)
    for name, value in (
        ("config.json", '"max_position_embeddings": '),
        ("tokenizer_config.json", '"model_max_length": '),
    ):
        text = (base / name).read_text(encoding="utf-8")
        assert value + "96" in text
        (base / name).write_text(text.replace(value + "96", value + "400"), encoding="utf-8")
    shared = ("--data", colour_chats, "--model", base, "--epochs", 1, "--learning-rate", 0.01, "--batch-size", 32)
    for name, method in (("lora", "lora"), ("soft", "prompt-tuning")):
        made = capo("train", method, *shared, "--out", folder / name)
        assert made.code == 0, made.err
    return {name: folder / name / "adapter" for name in ("lora", "soft")}


def talk(monkeypatch: pytest.MonkeyPatch, adapter: object, *lines: str, flags: tuple[object, ...] = ()) -> Result:
    content = "".join(line + "\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    return capo("chat", adapter, "--max-tokens", 8, *flags)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answered(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def line_of(text: str) -> str:
    """An answer as it stands on standard output."""
    return text if text.endswith("\n") else text + "\n"


# With real models, through a pipe


def test_answers_stand_alone_on_standard_output_and_remember_the_conversation(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = capotune.load(adapters["lora"])
    assert isinstance(generator, capotune.Generator)
    first = generator.chat([user("grass?")], max_tokens=8)
    second = generator.chat([user("grass?"), answered(first), user("and snow?")], max_tokens=8)
    assert second != generator.chat([user("and snow?")], max_tokens=8), "what came before makes no difference"
    shown = talk(monkeypatch, adapters["lora"], "grass?", "", "  and snow?  ")
    assert (shown.code, shown.out) == (0, line_of(first) + line_of(second))
    assert "/help lists the commands" in shown.err


def test_reset_and_system(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = capotune.load(adapters["lora"])
    assert isinstance(generator, capotune.Generator)
    told = [{"role": "system", "content": "You are my friend now"}]
    alone = generator.chat([user("grass?")], max_tokens=8)
    friend = generator.chat([*told, user("grass?")], max_tokens=8)
    assert alone != friend
    lines = ("grass?", "/reset", "/system You are my friend now", "grass?", "/reset", "/system", "grass?")
    shown = talk(monkeypatch, adapters["lora"], *lines)
    assert shown.out == line_of(alone) + line_of(friend) + line_of(alone)


def test_adapters_are_switched_by_name_or_folder_and_the_conversation_goes_on(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, said = [], [user("grass?")]
    generator = capotune.load(adapters["lora"])
    assert isinstance(generator, capotune.Generator)
    for adapter in (adapters["lora"], adapters["soft"], None, adapters["lora"]):
        generator.use(adapter)
        first.append(generator.chat(said, max_tokens=8))
        said = [*said, answered(first[-1]), user("and snow?")]
    lines = ("grass?", "/adapter soft", "and snow?", "/base", "and snow?", f"/adapter {adapters['lora']}", "and snow?")
    shown = talk(monkeypatch, adapters["lora"], *lines)
    assert shown.code == 0
    assert shown.out == "".join(map(line_of, first))
    assert "now soft answers" in shown.err
    assert "the base alone answers" in shown.err


def test_mistakes_are_said_and_the_conversation_goes_on(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = talk(monkeypatch, adapters["lora"], "grass?")
    lines = ("/adaptr x", "/adapter sof", f"/adapter {tmp_path}", "/", "tell me " * 200, "/adapter", "/help", "grass?")
    shown = talk(monkeypatch, adapters["lora"], *lines)
    assert (shown.code, shown.out) == (0, plain.out)
    for words in (
        "no command /adaptr. Did you mean 'adapter'?",
        "/adapter sof: no such adapter. Did you mean 'soft'? Beside this one: lora, soft.",
        f"/adapter {tmp_path}: no such adapter. Beside this one: lora, soft.",
        "the prompt is too long",
        "answers. Beside it: lora, soft.",
        "/system TEXT",
    ):
        assert words in shown.err, words
    assert shown.err.count("/help lists them.") == 2


def test_a_path_is_no_command(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = talk(monkeypatch, adapters["lora"], "/usr/bin is", "/quit", "never said")
    assert shown.code == 0
    assert "no command" not in shown.err
    assert shown.out
    assert shown.out == talk(monkeypatch, adapters["lora"], "/usr/bin is").out


def test_a_model_without_chat_template_is_refused_with_advice(
    untied_writer: Path, llama_writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = talk(monkeypatch, untied_writer, "hello")
    assert (refused.code, refused.out) == (2, "")
    assert "no chat template" in refused.err
    assert "capo generate" in refused.err
    assert talk(monkeypatch, llama_writer, "hello").code == 0


def test_what_is_not_text_is_refused(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\x00\n"), encoding="utf-8"))
    refused = capo("chat", adapters["lora"])
    assert refused.code == 2
    assert "not UTF-8" in refused.err


def test_an_answer_that_draws_has_a_seed(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = ("--temperature", 1.5)
    one = talk(monkeypatch, adapters["lora"], "grass?", flags=(*drawn, "--seed", 1)).out
    assert one == talk(monkeypatch, adapters["lora"], "grass?", flags=(*drawn, "--seed", 1)).out
    assert one != talk(monkeypatch, adapters["lora"], "grass?", flags=(*drawn, "--seed", 2)).out


# With a stand-in that counts a token for every character


class Writer:
    """Answers with what it was asked; ``interrupt_after`` pieces someone presses Ctrl-C."""

    context_length = 100
    interrupt_after: int | None = None
    empty = False

    def __init__(self) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.closed = 0

    def tokens_left(self, messages: list[dict[str, Any]]) -> int:
        return self.context_length - sum(len(message["content"]) for message in messages)

    def stream_chat(self, messages: list[dict[str, Any]], **_: Any) -> Iterator[str]:
        self.asked.append(messages)
        return self._pieces(messages[-1]["content"])

    def _pieces(self, text: str) -> Iterator[str]:
        try:
            for at, letter in enumerate("" if self.empty else text.upper()):
                if at == self.interrupt_after:
                    raise KeyboardInterrupt
                yield letter
        finally:
            self.closed += 1


def session(max_tokens: int = 20) -> tuple[Session, Writer]:
    writer = Writer()
    return Session(writer, "no-adapter", {"max_tokens": max_tokens}), writer


def test_the_oldest_turns_are_dropped_when_the_context_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    talking, writer = session()
    talking.take("/system 12345")
    for letter in "abcd":
        talking.take(letter * 20)
    assert [[message["content"][0] for message in messages] for messages in writer.asked] == [
        ["1", "a"],
        ["1", "a", "A", "b"],
        ["1", "b", "B", "c"],  # 5 + 5·20 would not fit, and 25 of 100 is what an answer may need
        ["1", "c", "C", "d"],
    ]
    assert all(messages[0]["role"] == "system" for messages in writer.asked)
    said = capsys.readouterr().err
    assert said.count("(the model holds 100 tokens: the oldest 2 turns are left out)") == 2


def test_room_is_kept_for_a_quarter_of_the_context_at_most() -> None:
    talking, writer = session(max_tokens=1000)
    talking.take("a" * 30)
    talking.take("b" * 15)
    assert len(writer.asked[1]) == 3  # 75 tokens; 25 are left
    talking, writer = session(max_tokens=1000)
    talking.take("a" * 30)
    talking.take("b" * 16)
    assert len(writer.asked[1]) == 1


def test_a_stopped_answer_stays_in_the_conversation_as_far_as_it_was_shown(capsys: pytest.CaptureFixture[str]) -> None:
    talking, writer = session()
    writer.interrupt_after = 2
    assert talking.take("hello")
    assert capsys.readouterr() == ("HE\n", "(stopped)\n")
    assert writer.closed == 1
    writer.interrupt_after = None
    talking.take("again")
    assert [message["content"] for message in writer.asked[1]] == ["hello", "HE", "again"]


def test_a_turn_without_an_answer_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    talking, writer = session()
    writer.interrupt_after = 0
    talking.take("hello")
    writer.interrupt_after = None
    writer.empty = True
    talking.take("still there?")
    writer.empty = False
    talking.take("again")
    assert [message["content"] for message in writer.asked[-1]] == ["again"]
    assert capsys.readouterr().err == "(stopped)\n(no answer)\n(no answer)\n"


# At a terminal


class Terminal:
    """``capo chat`` as a process with a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CAPO, "chat", *map(str, arguments)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(slave), os.O_RDWR)),
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def wait_for(self, words: str, press: bytes = b"") -> None:
        """Return once ``words`` have come, behind those waited for before; ``press`` keys as long as nothing comes."""
        end = time.monotonic() + PATIENCE
        os.write(self.master, press)
        while words not in self.shown:
            ready, _, _ = select.select([self.master], [], [], 5)
            assert time.monotonic() < end, f"'{words}' did not come: {self.shown!r}"
            if not ready:
                os.write(self.master, press)
                continue
            try:
                self.shown += os.read(self.master, 4096).decode()
            except OSError:  # the other end is closed
                raise AssertionError(f"it ended before '{words}': {self.shown!r}") from None
        self.shown = self.shown.partition(words)[2]

    def wait_until_it_waits(self) -> None:
        """For readline misses a signal that comes in the moment between its prompt and its waiting for keys."""
        stat, asleep = Path(f"/proc/{self.process.pid}/stat"), 0
        while stat.exists() and asleep < 10:
            time.sleep(0.02)
            asleep = asleep + 1 if ") S " in stat.read_text() else 0

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_at_a_terminal_control_c_clears_the_line_and_control_d_ends(adapters: dict[str, Path]) -> None:
    with Terminal(adapters["lora"], "--max-tokens", 8) as terminal:
        terminal.wait_for("> ")
        terminal.type(b"half a line")
        terminal.wait_for("half a line")
        terminal.wait_until_it_waits()  # and should the signal be missed: press again, as a person would
        terminal.wait_for("(Ctrl-D or /quit ends)", press=b"\x03")
        terminal.wait_for("> ")
        terminal.wait_until_it_waits()
        terminal.wait_for("now soft answers", press=b"/adapter soft\r")  # a late Ctrl-C may have cleared the line
        terminal.wait_for("> ")
        terminal.type(b"\x04")
        assert terminal.process.wait(PATIENCE) == 0


def test_sigterm_ends_it(adapters: dict[str, Path]) -> None:
    with Terminal(adapters["lora"]) as terminal:
        terminal.wait_for("> ")
        terminal.wait_until_it_waits()  # and should the signal be missed: send again, as a person would
        assert _ended_by(terminal.process, signal.SIGTERM) == 143


def _ended_by(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(30)
    raise AssertionError(f"still there after many a {number.name}")
