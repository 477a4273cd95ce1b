"""Texts, labels, columns, models and files of strangers on the terminal: shown as text, whatever is in them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

from capotune.cli import main
from capotune.cli.console import terminal
from capotune.cli.display import watch
from capotune.cli.generate import show
from capotune.cli.terminal import harmless
from capotune.events import Failed, Stage, Warned

ESCAPES = {
    "colour": "\x1b[31mred",
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;title\x07",
    "link": "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "bell": "\x07",
    "backspace": "safe\x08\x08\x08\x08evil",
    "overwritten line": "evil\rsafe",
    "C1": "\x9b31mred\x9d52;c;cm0=\x9c",
    "turned round": "\u202etxt.exe\u202c and \u2067this\u2069",
    "delete": "a\x7f",
}
MARKUP = "[red]red[/red] [link=https://evil.example]here[/link] :bomb: [/]"
STEERING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")
OWN = re.compile(r"\x1b\[\??[0-9;]*[mKAhl]|\r")
"""What rich itself writes: colours, and bars over themselves."""


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Output and errors go to a terminal; what is on it so far."""
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(type(stream), "isatty", lambda _: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "400")
    return lambda: "".join(capsys.readouterr())


def steers(shown: str) -> bool:
    planted = [text for text in ESCAPES.values() if text in shown]
    return bool(planted) or STEERING.search(OWN.sub("", shown)) is not None


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_are_spelled_out(name: str, screen: Callable[[], str]) -> None:
    text = ESCAPES[name]
    assert STEERING.search(text)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    for line in (text, table):
        terminal().print(line)
    show(piece for piece in ("before ", text, " after\n"))
    shown = screen()
    assert not steers(shown)
    assert harmless(text) in OWN.sub("", shown)


def test_texts_of_every_script_stay_as_they_are() -> None:
    text = "tab\tline\r\nשלום \u200fمرحبا\u200e 👩‍👧 é ñ 漢字\n"
    assert harmless(text) == text


def test_markup_is_text(screen: Callable[[], str]) -> None:
    console = terminal()
    console.print(MARKUP, highlight=False)
    assert MARKUP in screen()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_events_of_a_run_are_text(
    is_terminal: bool, screen: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: is_terminal)
    text = f"{MARKUP}\x1b]52;c;cm0=\x07"
    with watch(["lora"]) as report:
        for event in (Stage(text=text), Warned(text=text), Failed(text=text)):
            report(event)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen())
    assert "\x1b]" not in shown
    assert "\x07" not in shown
    assert shown.count("[link=https://evil.example]") >= 2


@pytest.mark.parametrize("name", ["colour", "clipboard", "C1", "turned round"])
def test_names_of_files_columns_and_labels_are_text(name: str, screen: Callable[[], str], tmp_path: Path) -> None:
    bad = ESCAPES[name].replace("/", "")
    path = tmp_path / f"{bad}.csv"
    path.write_text(f"text,{bad}\n" + f"one two,{bad}\n" * 3, encoding="utf-8")
    assert main(["data", str(path)]) == 2
    assert main(["data", str(tmp_path / f"{bad}-absent.csv")]) == 2
    assert main(["predict", str(tmp_path / bad), "text"]) == 2
    assert main([bad]) == 2
    assert main(["train", "lora", f"--{bad}", bad, "--data", bad]) == 2
    assert not steers(screen())


def test_labels_of_a_table_are_text(screen: Callable[[], str], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    labels = [ESCAPES["clipboard"], MARKUP]
    rows = [f'"text {number} \x1b[31m","{labels[number % 2]}"' for number in range(20)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    assert main(["data", str(path), "--model", "capo-tiny"]) == 0
    shown = screen()
    assert not steers(shown)
    assert "]52;c;" in shown
    assert MARKUP[:16] in shown


def test_a_pipe_gets_what_a_model_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    show(piece for piece in (ESCAPES["colour"], "\n"))
    assert capsys.readouterr().out == ESCAPES["colour"] + "\n"
