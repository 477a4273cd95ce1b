"""``capo demo``: a comparison on data that comes with the package, and its page in a browser."""

from __future__ import annotations

import os
import shlex
import sys
import webbrowser
from pathlib import Path
from typing import Any

import capotune
from capotune.settings import CompareSettings, FeatureExtractionSettings, LoraSettings, QloraSettings

EXPRESSIONS = Path(capotune.__file__).parent / "examples" / "python_expressions.jsonl"


def demo(out: Path, show_page: bool) -> int:
    """Run it; returns the exit code."""
    from capotune.cli.main import compare

    longer: Any = {"epochs": 7, "patience": 7, "batch_size": 16, "learning_rate": 4e-3}  # few rows, so more passes
    settings = CompareSettings(
        data=str(EXPRESSIONS),
        model="capo-tiny",
        out=out,
        feature_extraction=FeatureExtractionSettings(**longer),
        lora=LoraSettings(**longer),
        qlora=QloraSettings(**longer),
    )
    code = compare(settings, shlex.join(["capo", "demo", "generation", "--out", str(out)]))
    page = (out / "compare.html").resolve()
    if show_page and has_desktop() and webbrowser.open(page.as_uri()):
        print(f"The page is open in your browser: {page}")
    else:
        print(f"Open the page in a browser: {page}")
    return code


def has_desktop() -> bool:
    """Whether a browser window can be seen: not over a network connection, and with a display."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ))
