"""``capo generate``: what a model writes after some prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import tyro

from capotune.cli.flags import Json, base_of, parse_repeating
from capotune.cli.terminal import for_output
from capotune.errors import DataError, SettingError
from capotune.events import counter
from capotune.settings import BaseSettings, DecodingSettings


class Generate(BaseSettings, DecodingSettings):
    """Let a model write: after prompts given as arguments, in a file, or on standard input (one prompt in whole)."""

    adapter: tyro.conf.Positional[str]
    """Adapter folder, or an adapter on the hub (`owner/name@revision`); or a model alone: an embedded one by name, a
    folder, a GGUF file, or a model id on the hub."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts, each answered on its own."""
    file: str | None = None
    """A file of prompts: a column of a csv, tsv, jsonl or parquet file; any other file is one prompt."""
    prompt_column: str | None = None
    """Column of the file that holds the prompt. Found by name when left out."""
    chat: bool = False
    """Ask each prompt as a user's turn, in the model's chat template. An adapter that was trained on conversations is
    asked so anyhow."""
    raw: bool = False
    """Go on with the prompt as it stands, also with an adapter that was trained on conversations."""
    as_json: Json = False
    """Print one JSON object a line: prompt and text."""


def generate(rest: list[str]) -> int:
    """Run the command; returns the exit code."""
    settings = parse_repeating(Generate, rest, "capo generate")
    if settings.chat and settings.raw:
        raise SettingError("--chat and --raw exclude each other. Leave one of them out.")
    prompts = _prompts(settings)
    from capotune import api
    from capotune.cli.display import counting, watch_bytes

    with watch_bytes() as report:
        generator = api.load_generator(settings.adapter, report=report, **base_of(settings))
    chat = settings.chat or (generator.chats and not settings.raw)
    decoding = decoding_of(settings)
    if len(prompts) == 1 and not settings.as_json:
        turns, pieces = [{"role": "user", "content": prompts[0]}], list[str]()
        show(generator.stream_chat(turns, **decoding) if chat else generator.stream(prompts[0], **decoding), pieces)
        _say_if_silent(["".join(pieces)], generator.has_chat_template and not (chat or settings.raw))
        return 0
    with counting("answered") as report:
        write = generator.chat_each if chat else generator.generate
        texts = write(prompts, progress=counter(report), **decoding)
    for prompt, text in zip(prompts, texts, strict=True):
        if settings.as_json:
            print(for_output(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False)), flush=True)
        else:
            print(for_output("> " + prompt.replace("\n", "\n> ") + f"\n{text}\n"), flush=True)
    _say_if_silent(texts, generator.has_chat_template and not (chat or settings.raw))
    return 0


def decoding_of(settings: DecodingSettings) -> dict[str, Any]:
    """The settings of decoding alone."""
    return {name: getattr(settings, name) for name in DecodingSettings.model_fields}


def show(pieces: Iterator[str], written: list[str] | None = None) -> None:
    """Print pieces as they come, each at once, and end the line; ``written`` collects what was shown.

    Whatever ends it early also stops the model.
    """
    last = "\n"
    with closing(pieces):  # type: ignore[type-var]
        try:
            for piece in pieces:
                if written is not None:
                    written.append(piece)
                sys.stdout.write(for_output(piece))
                sys.stdout.flush()
                last = piece
        finally:
            if not last.endswith("\n"):
                print(flush=True)


def _say_if_silent(texts: Sequence[str], may_chat: bool) -> None:
    """Where nothing is written after a prompt, models that were made to chat want to be asked in their template."""
    silent = sum(not text.strip() for text in texts)
    if silent and may_chat:
        which = "the prompt" if len(texts) == 1 else f"{silent:,} of {len(texts):,} prompts"
        print(f"The model wrote nothing after {which}. It has a chat template: --chat asks in it.", file=sys.stderr)


def _prompts(settings: Generate) -> list[str]:
    if settings.prompts and settings.file:
        raise SettingError("give prompts or --file, not both.")
    if settings.prompt_column and not settings.file:
        raise SettingError(f"--prompt-column {settings.prompt_column}: belongs to a --file. Give one, or leave it out.")
    if settings.prompts:
        return list(settings.prompts)
    if settings.file:
        from capotune import api

        return api.read_prompts(settings.file, settings.prompt_column)
    if sys.stdin.isatty():
        print("Type the prompt; a line with Ctrl-D alone ends it.", file=sys.stderr)
    try:
        prompt = sys.stdin.read().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text ({error}). Convert it first, say with iconv.") from None
    if not prompt:
        raise DataError("standard input holds no prompt. Give one there, as an argument, or in a --file.")
    return [prompt]
