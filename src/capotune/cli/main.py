"""Settings from flags, one command run, one message and exit code 2 for a user's mistake."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from capotune.config import METHODS, CompareSettings, Settings, TrainSettings, build, method_class, nearest, read_yaml
from capotune.errors import CapotuneError, DataError, SettingError

HELP = """usage: capo COMMAND …

Fine-tune a pretrained transformer four ways and keep a small adapter; the base never changes.

  capo compare --data tickets.csv          all four techniques side by side, and which one to take
  capo train lora --data tickets.csv       one technique
  capo evaluate ADAPTER --data more.csv    score an adapter
  capo predict ADAPTER "some text"         label and probability
  capo info ADAPTER                        what an adapter is
  capo quantize MODEL --out DIR            the model in 4 bits, for Transformers with bitsandbytes and for qlora

`capo COMMAND --help` lists a command's settings. `--config FILE.yaml` gives compare and train settings from a file."""

Json = Annotated[bool, tyro.conf.arg(name="json")]


class Evaluate(Settings):
    """Score an adapter on labelled text."""

    adapter: tyro.conf.Positional[Path]
    """Adapter folder."""
    data: str
    """Labelled text; when a `split` column marks test rows, those alone are scored."""
    text_column: str | None = None
    """Column that holds the text. Found by name when left out."""
    label_column: str | None = None
    """Column that holds the label. Found by name when left out."""
    model: str | None = None
    """Where the base is, when not where it was trained."""
    as_json: Json = False
    """Print one JSON object."""


class Predict(Settings):
    """Label texts: given as arguments, in a file, or line by line on standard input."""

    adapter: tyro.conf.Positional[Path]
    """Adapter folder."""
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to label."""
    file: str | None = None
    """A file of texts: a column of a csv, tsv, jsonl or parquet file, or the lines of any other."""
    text_column: str | None = None
    """Column of the file that holds the text. Found by name when left out."""
    model: str | None = None
    """Where the base is, when not where it was trained."""
    as_json: Json = False
    """Print one JSON object a line."""


class Info(Settings):
    """Say what an adapter is."""

    adapter: tyro.conf.Positional[Path]
    """Adapter folder."""
    model: str | None = None
    """Where the base is, when not where it was trained."""
    as_json: Json = False
    """Print one JSON object."""


class Resumable(TrainSettings):
    """Train one technique on labelled text."""

    resume: bool = False
    """Go on from the last checkpoint of a run that was stopped; give the same settings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # clean up as on Ctrl-C
    try:
        return _dispatch(given)
    except CapotuneError as error:
        print(f"capo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncapo: stopped.", file=sys.stderr, flush=True)
        if arguments is None:  # a process of its own: unloading PyTorch in good order would take another second
            os._exit(130)
        return 130
    except SystemExit as stop:  # tyro has printed the help or what is wrong with the flags
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if given[0] == "--version":
        import capotune

        print(f"capotune {capotune.__version__}")
        return 0
    if given[0] not in COMMANDS:
        raise SettingError(
            f"unknown command '{given[0]}'. Allowed: {', '.join(COMMANDS)}.{nearest(given[0], COMMANDS)}"
        )
    return COMMANDS[given[0]](given[1:])


def _compare(rest: list[str]) -> int:
    flags, config = _take_config(rest)
    settings = _parse(CompareSettings, flags, "capo compare", config)
    from capotune import api
    from capotune.cli.display import show_comparison, watch

    with watch(settings.methods) as report:
        comparison = api.compare_run(settings, report=report, command=shlex.join(["capo", "compare", *rest]))
    show_comparison(comparison, settings.out)
    return 0 if len(comparison.rows) == len(settings.methods) else 1  # a technique that crashed was reported above


def _train(rest: list[str]) -> int:
    if not rest:
        raise SettingError(f"train which method? Give one of {', '.join(METHODS)}: capo train lora --data tickets.csv")
    if rest[0] in ("-h", "--help"):
        print(f"usage: capo train METHOD --data FILE …\n\nMETHOD is one of: {', '.join(METHODS)}.")
        print("`capo train METHOD --help` lists its settings.")
        return 0
    own_class = method_class(rest[0])
    flags, config = _take_config(rest[1:])
    both: Any = type("Train", (Resumable, own_class), {"__doc__": f"{Resumable.__doc__} {own_class.__doc__}"})
    parsed = _parse(both, flags, f"capo train {rest[0]}", config).model_dump()
    from capotune import api
    from capotune.cli.display import show_run, watch

    settings = build(TrainSettings, {name: parsed[name] for name in TrainSettings.model_fields})
    own = build(own_class, {name: parsed[name] for name in own_class.model_fields})
    with watch([own.method]) as report:
        record = api.train_run(settings, own, resume=parsed["resume"], report=lambda event: report(own.method, event))
    show_run(record, settings.out)
    return 0


def _evaluate(rest: list[str]) -> int:
    settings = _parse(Evaluate, rest, "capo evaluate")
    from capotune import api
    from capotune.cli.display import show_scores

    columns = {"text_column": settings.text_column, "label_column": settings.label_column}
    scores = api.evaluate(settings.adapter, data=settings.data, model=settings.model, **columns)
    if settings.as_json:
        print(json.dumps(scores))
    else:
        show_scores(scores)
    return 0


def _predict(rest: list[str]) -> int:
    settings = _parse(Predict, rest, "capo predict")
    from capotune import api

    if settings.texts and settings.file:
        raise SettingError("give texts or --file, not both.")
    classifier = api.load(settings.adapter, model=settings.model)
    if settings.texts or settings.file:
        texts = list(settings.texts) or list(api.read_texts(str(settings.file), settings.text_column))
        _print_predictions(classifier.answer(texts), settings.as_json)
        return 0
    try:
        for line in sys.stdin:  # answered as they come, so that it works inside a pipe
            if line.strip():
                _print_predictions(classifier.answer([line.rstrip("\n")]), settings.as_json)
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text ({error}). Convert it first, say with iconv.") from None
    return 0


def _info(rest: list[str]) -> int:
    settings = _parse(Info, rest, "capo info")
    from capotune import api
    from capotune.cli.display import show_info

    facts = api.info(settings.adapter, model=settings.model)
    if settings.as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        show_info(facts)
    return 0


def _quantize(rest: list[str]) -> int:
    from capotune.cli.convert import quantize

    return quantize(rest)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compare": _compare,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "info": _info,
    "quantize": _quantize,
}


def _print_predictions(predictions: list[Any], as_json: bool) -> None:
    for one in predictions:
        if as_json:
            row = {"text": one.text, "label": one.label, "probability": round(one.probability, 6)}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            print(f"{one.label}\t{one.probability:.3f}\t{' '.join(one.text.split())}", flush=True)


def _take_config(rest: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without ``--config FILE``, and that file."""
    for at, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        if name == "--config":
            if not equals and at + 1 == len(rest):
                raise SettingError("--config needs a YAML file.")
            path = value if equals else rest[at + 1]
            return rest[:at] + rest[at + (1 if equals else 2) :], Path(path)
    return rest, None


def _parse(cls: type[Any], flags: list[str], program: str, config: Path | None = None) -> Any:
    """Settings of ``cls`` from the flags, which win over the YAML file ``config``; on a mistake ``SystemExit(2)``."""
    values = read_yaml(config) if config else {}
    cls = type(program, (cls,), {"__doc__": cls.__doc__})  # tyro's messages show the class's name
    if not values:
        return tyro.cli(cls, args=flags, prog=program)
    required = {name: "" for name, field in cls.model_fields.items() if field.is_required() and name not in values}
    checked = build(cls, {**required, **values}, where=f"--config {config}")
    default = checked.model_copy(update=dict.fromkeys(required, tyro.MISSING))
    return tyro.cli(cls, args=flags, prog=program, default=default)
