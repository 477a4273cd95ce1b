"""``capo demo``: a comparison on data that comes with the package, and its page in a browser."""

from __future__ import annotations

import os
import shlex
import sys
import webbrowser
from pathlib import Path
from typing import Any

import capotune
from capotune import api
from capotune.settings import CompareSettings

EXAMPLES = Path(capotune.__file__).parent / "examples"
EXPRESSIONS = EXAMPLES / "python_expressions.jsonl"
MESSAGES = EXAMPLES / "shop_messages.jsonl"


def demo(out: Path, show_page: bool, epochs: int | None = None) -> int:
    """Run it; returns the exit code. ``epochs``: that many passes for every technique, and not what each needs."""
    from capotune.cli.main import compare

    chosen = {} if epochs is None else {"epochs": epochs, "patience": epochs}
    command = api.install_command("smollm2")
    if command:
        print(
            f"capo: the model is capo-tiny; smollm2 writes better, and is not installed. Run: {command}",
            file=sys.stderr,
        )
    settings = on_expressions(out, chosen) if command else on_messages(out, chosen)
    shorter = [] if epochs is None else ["--epochs", str(epochs)]
    code = compare(settings, shlex.join(["capo", "demo", "generation", *shorter]))
    page = (out / "compare.html").resolve()
    if show_page and has_desktop() and webbrowser.open(page.as_uri()):
        print(f"The page is open in your browser: {page}")
    else:
        print(f"Open the page in a browser: {page}")
    return code


def on_messages(out: Path, chosen: dict[str, Any]) -> CompareSettings:
    """SmolLM2 writes a ticket for each customer's message, by the defaults of two techniques: all four would take more
    than some minutes on two cores."""
    each = dict.fromkeys(("feature_extraction", "lora"), chosen)
    methods = tuple(name.replace("_", "-") for name in each)
    return api.compare_settings()(data=str(MESSAGES), model="smollm2", out=out, methods=methods, **each)


def on_expressions(out: Path, chosen: dict[str, Any]) -> CompareSettings:
    """capo-tiny writes Python expressions."""
    few_rows: dict[str, Any] = {"epochs": 7, "patience": 7, "batch_size": 16, "learning_rate": 4e-3}
    each: dict[str, Any] = dict.fromkeys(("feature_extraction", "lora", "qlora"), few_rows | chosen)
    each["prompt_tuning"] = {"batch_size": 32, "deep": False} | chosen  # as benchmarks/README.md has it
    return api.compare_settings()(data=str(EXPRESSIONS), model="capo-tiny", out=out, **each)


def has_desktop() -> bool:
    """Whether a browser window can be seen: not over a network connection, and with a display."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ))
