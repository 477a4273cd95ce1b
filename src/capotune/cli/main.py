"""Settings from flags, one command run, one message and exit code 2 for a user's mistake."""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from capotune.cli.flags import Json, base_of, given_by, parse, take_config, without_out
from capotune.cli.messages import in_flags
from capotune.cli.terminal import for_output, harmless
from capotune.device import is_out_of_memory
from capotune.errors import CapotuneError, DataError, OutputError, SettingError
from capotune.interrupts import asked_by_signal, heed_sigterm, ignore_requests, lose_no_signal
from capotune.settings import BaseSettings, CompareSettings, DataSettings, Settings, TrainSettings, build, nearest

HELP = """usage: capo COMMAND …

Fine-tune a pretrained transformer four ways and keep a small adapter; the base never changes.

  capo compare --data tickets.csv          all four techniques side by side, and which one to take
  capo train lora --data tickets.csv       one technique
  capo resume DIR                          go on with a run or comparison that was stopped
  capo checkpoint DIR                      ask a run that is going on for a checkpoint now
  capo evaluate ADAPTER --data more.csv    score an adapter
  capo predict ADAPTER "some text"         label or entities, with their probability
  capo generate ADAPTER "some text"        what the model writes after it
  capo chat ADAPTER                        a conversation; /adapter switches
  capo info ADAPTER                        what an adapter is
  capo diff A B                            what differs between two adapters
  capo data tickets.csv                    what a data file holds, and what is wrong with it (--check-labels)
  capo demo generation                     a comparison on data that is already here
  capo merge ADAPTER --out DIR             the base with the adapter's change in its weights
  capo export ADAPTER --for vllm           for vllm, sglang, llama.cpp, ollama, peft or transformers (--out DIR)
  capo combine A B --out DIR               several adapters of one base as one
  capo push ADAPTER OWNER/NAME             the adapter on the Hugging Face hub, with its card
  capo quantize MODEL --out DIR            the model in 4 bits, for Transformers with bitsandbytes and for qlora
  capo runs [FOLDER]                       the runs there and how far they came; --compare A B what differs
  capo reproduce DIR                       make a run again and compare bit by bit
  capo cache                               what the cache holds; --clear empties it

Data is labelled text; tagged words: CoNLL text, or lists of words and tags; or text to write: conversations, prompts
with completions, plain text. generate, chat and evaluate also take a model alone. `capo COMMAND --help` lists a
command's settings; `--config FILE.yaml` gives compare and train settings from a file."""


class Evaluate(BaseSettings):
    """Score an adapter, or a language model alone, on data."""

    adapter: tyro.conf.Positional[str]
    """Adapter folder, or an adapter on the hub (`owner/name@revision`); or a language model alone: an embedded one by
    name, a folder, or a model id on the hub."""
    data: str
    """Labelled text, tagged words, or text to write; when a `split` column marks test rows, those alone are scored."""
    text_column: str | None = None
    """Labels, tags: column that holds the text, or the list of words. Found by name when left out."""
    label_column: str | None = None
    """Labels, tags: column that holds the label, or the list of tags. Found by name when left out."""
    label_columns: tuple[str, ...] | None = None
    """Several labels or numbers: columns that hold one each. Left out: those of the run."""
    pair_columns: tuple[str, str] | None = None
    """Labels: two columns of texts that are read together. Found by name when left out."""
    prompt_template: str | None = None
    """Text to write: the prompt made from columns, as in `Question: {question} Answer:`."""
    completion_column: str | None = None
    """Text to write: with a prompt template, the column that holds the text to write. Found by name when left out."""
    answers: Annotated[int, Field(ge=0)] | None = None
    """Text to write: rows that the model answers, for exact match and ROUGE-L (0: none). Left out: as many as in the
    run that made the adapter, or 200."""
    general: str | None = None
    """Text to write: a text file of your own, or a file with a column of texts, on which the adapted model is compared
    with its base. Left out: passages of ours, as many as the run read."""
    as_json: Json = False
    """Print one JSON object."""


class Predict(BaseSettings):
    """Label texts, or find entities in them: given as arguments, in a file, or line by line on standard input."""

    adapter: tyro.conf.Positional[str]
    """Adapter folder, or an adapter on the hub (`owner/name@revision`)."""
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to read; of pairs the first and then the second."""
    file: str | None = None
    """A file of texts: a column of a csv, tsv, jsonl or parquet file, or the lines of any other. For entities also
    lists of words, or CoNLL text."""
    text_column: str | None = None
    """Column of the file that holds the text, or the list of words. Found by name when left out."""
    pair_columns: tuple[str, str] | None = None
    """Two columns of the file that hold texts to read together. Found by name when left out."""
    as_json: Json = False
    """Print one JSON object a line."""


class Info(BaseSettings):
    """Say what an adapter is."""

    adapter: tyro.conf.Positional[str]
    """Adapter folder, or an adapter on the hub (`owner/name@revision`)."""
    check: bool = False
    """Put it on its base and ask it again what it was asked where it was trained: the answers must be the same."""
    plot: bool = False
    """Draw how large the adapter's change of the weights is in each block."""
    as_json: Json = False
    """Print one JSON object."""


class Data(DataSettings):
    """Say what a data file holds, how it would be read, and what is wrong with it. Nothing is trained."""

    data: tyro.conf.Positional[str]
    """Labelled text, tagged words, or text to write: a file, or a dataset id on the hub."""
    model: str | None = None
    """The model whose tokens are counted. Left out: minilm for labels, smollm2 for text."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which rows are held out for the test."""
    check_labels: bool = False
    """Labels of texts: list those that are likely to be wrong, each with the label that is more probable."""
    out: Path | None = None
    """With `check_labels`: a csv file to write, to correct and to train on: the data's rows and columns, and behind
    them a suggestion where a label is suspect. Must not exist."""
    as_json: Json = False
    """Print one JSON object."""


class Demo(Settings):
    """Compare the techniques on data that comes with the package, and show the page."""

    task: tyro.conf.Positional[Literal["generation"]]
    """What is predicted: generation writes tickets for customers' messages (smollm2), or, where its package is not
    installed, Python expressions for descriptions (capo-tiny)."""
    out: Path = Path("capo-demo")
    """Folder for the table, the picture, the page and the adapters. Must not exist."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes over the data for each technique: with 1 the demo is over sooner, and the scores are lower. Left out: as
    many as each needs."""
    open: bool = True
    """Open the page in a browser, where there is a desktop."""


class Resume(Settings):
    """Go on with a run or a comparison that was stopped. All settings stand in its folder."""

    out: tyro.conf.Positional[Path]
    """The folder of the run or the comparison."""
    trust_remote_code: bool = False
    """To be given again where the run had it."""


class Checkpoint(Settings):
    """Ask the process that trains in a folder for a checkpoint, and wait for it."""

    out: tyro.conf.Positional[Path]
    """The folder of a run or a comparison that is going on."""


class Train(TrainSettings):
    """Train one technique on data."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        heed_sigterm()
        if arguments is None:
            _own_process()
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except CapotuneError as error:
        print(f"capo: {in_flags(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return _stopped(stop, own_process=arguments is None)
    except ImportError as error:
        if not _comes_from_an_interrupt(error):
            raise
        return _stopped("", own_process=arguments is None)
    except SystemExit as stop:  # tyro has printed the help
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _close_output()
        return 0
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            problem = "memory ran out. Close other programs, or take a smaller model or fewer rows."
        elif isinstance(error, OSError):  # the machine's, as of a disk that is full or gone: no fault of ours to trace
            problem = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror or error}."
        else:
            raise
        print(f"capo: {harmless(problem)}", file=sys.stderr)
        if arguments is None:
            _close_output()
        return 2


def _stopped(how_to_go_on: object, *, own_process: bool) -> int:
    print(f"\ncapo: stopped. {how_to_go_on}".rstrip(), file=sys.stderr, flush=True)
    if own_process:  # unloading PyTorch in good order would take another second
        os._exit(130)
    return 130


def _comes_from_an_interrupt(error: BaseException | None) -> bool:
    """Transformers says of any exception while a part of it is imported that the part cannot be imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _close_output() -> None:
    """Whatever could not be written is not tried again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _own_process() -> None:
    """Set up a process that runs one command and ends."""
    lose_no_signal()
    ignore_requests()
    atexit.register(gc.freeze)  # or the interpreter looks through PyTorch's modules once more: a second
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # models write what not every terminal can show


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
    flags, config = take_config(rest)
    from capotune import api

    settings = parse(api.compare_settings(), flags, "capo compare", config)
    return compare(settings, shlex.join(["capo", "compare", *without_out(rest)]), given_by(flags, config))


def compare(settings: CompareSettings, command: str, given: dict[str, str] | None = None) -> int:
    """Compare and show the result; ``command`` is what the page names as the way to repeat it, ``given`` as
    ``api.compare_run`` takes it."""
    from capotune import api
    from capotune.cli.display import watch

    with _stoppable(settings.out), watch(settings.methods) as report:
        comparison = api.compare_run(settings, report=report, command=command, given=given)
    return _show(comparison, settings.out, settings.methods)


def _show(result: Any, out: Path, methods: Sequence[str]) -> int:
    """Show what a run or a comparison of these methods came to; the exit code."""
    from capotune import api
    from capotune.cli.display import show_comparison, show_run

    if not isinstance(result, api.Comparison):
        show_run(result, out)
        return 0
    show_comparison(result, out)
    return 0 if len(result.rows) == len(methods) else 1  # a technique that crashed was reported above


def _train(rest: list[str]) -> int:
    from capotune import api

    known = ", ".join(api.method_names())
    if not rest:
        raise SettingError(f"train which method? Give one of {known}: capo train lora --data tickets.csv")
    if rest[0] in ("-h", "--help"):
        print(f"usage: capo train METHOD --data FILE …\n\nMETHOD is one of: {known}.")
        print("`capo train METHOD --help` lists its settings.")
        return 0
    own_class = api.method_settings(rest[0])
    flags, config = take_config(rest[1:])
    both: Any = type("Train", (Train, own_class), {"__doc__": f"{Train.__doc__} {own_class.__doc__}"})
    parsed = parse(both, flags, f"capo train {rest[0]}", config).model_dump()
    from capotune.cli.display import show_run, watch

    settings = build(TrainSettings, {name: parsed[name] for name in TrainSettings.model_fields})
    own = build(own_class, {name: parsed[name] for name in own_class.model_fields})
    with _stoppable(settings.out), watch([own.method]) as report:
        record = api.train_run(settings, own, report=report, given=given_by(flags, config))
    show_run(record, settings.out)
    return 0


def _resume(rest: list[str]) -> int:
    settings = parse(Resume, rest, "capo resume")
    from capotune import api
    from capotune.cli.display import watch

    methods = api.methods_of(settings.out)
    with _stoppable(settings.out), watch(methods) as report:
        result = api.resume(settings.out, trust_remote_code=settings.trust_remote_code, report=report)
    return _show(result, settings.out, methods)


def _checkpoint(rest: list[str]) -> int:
    settings = parse(Checkpoint, rest, "capo checkpoint")
    from capotune import api

    print(api.checkpoint(settings.out))
    return 0


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Around what trains in ``out``: SIGUSR1 asks for a checkpoint, and who stops it learns how to go on."""
    from capotune import api

    with asked_by_signal(lambda: api.request_checkpoint(out)):
        try:
            yield
        except KeyboardInterrupt:
            with suppress(OutputError):  # of a folder that holds no run
                api.methods_of(out)
                raise KeyboardInterrupt(f"Go on with: capo resume {shlex.quote(str(out))}") from None
            raise


def _evaluate(rest: list[str]) -> int:
    settings = parse(Evaluate, rest, "capo evaluate")
    from capotune import api
    from capotune.cli.display import counting, show_scores

    given = {name: value for name, value in settings.model_dump().items() if name not in ("adapter", "as_json")}
    with counting("scored") as report:
        scores = api.evaluate(settings.adapter, report=report, **given)
    if settings.as_json:
        print(json.dumps(scores))
    else:
        show_scores(scores)
    return 0


def _predict(rest: list[str]) -> int:
    settings = parse(Predict, rest, "capo predict")
    from capotune import api
    from capotune.cli.display import watch_bytes

    if settings.texts and settings.file:
        raise SettingError("give texts or --file, not both.")
    with watch_bytes() as report:
        predictor = api.load_predictor(settings.adapter, report=report, **base_of(settings))
    if settings.texts or settings.file:
        columns = settings.text_column, predictor, settings.pair_columns
        texts = predictor.of_arguments(settings.texts) or api.read_texts(str(settings.file), *columns)
        _print_predictions(predictor.answer(texts), settings.as_json)
        _say_cut(len(predictor.cut(texts)), len(texts))
        return 0
    read = cut = 0
    try:
        for number, line in enumerate(sys.stdin, start=1):  # answered as they come, so that it works inside a pipe
            if line.strip():
                texts = [predictor.of_line(line.rstrip("\n"), f"line {number}")]
                _print_predictions(predictor.answer(texts), settings.as_json)
                read, cut = read + 1, cut + len(predictor.cut(texts))
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8 text ({error}).", advice="Convert it first, say with iconv."
        ) from None
    _say_cut(cut, read)
    return 0


def _say_cut(cut: int, texts: int) -> None:
    """How many of so many texts were not read to their end, on standard error."""
    if cut:
        print(
            f"capo: {cut:,} of {texts:,} texts are longer than what the adapter reads (`capo info` says how much); "
            "what is beyond was left out.",
            file=sys.stderr,
        )


def _info(rest: list[str]) -> int:
    settings = parse(Info, rest, "capo info")
    from capotune import api
    from capotune.cli.display import watch_bytes
    from capotune.cli.info import show_info

    with watch_bytes() as report:
        facts = api.info(settings.adapter, check=settings.check, report=report, **base_of(settings))
    if settings.as_json:
        print(for_output(json.dumps(facts, ensure_ascii=False)))
    else:
        show_info(facts, settings.plot)
    return 0 if facts.get("check", {}).get("agrees", True) else 1


def _data(rest: list[str]) -> int:
    settings = parse(Data, rest, "capo data")
    from capotune import api
    from capotune.cli.display import show_data, watch_bytes

    given = {name: value for name, value in settings.model_dump().items() if name not in ("as_json", "check_labels")}
    if settings.check_labels:
        from capotune.cli.label_check import check_labels

        return check_labels(given, as_json=settings.as_json)
    if given.pop("out") is not None:
        raise SettingError("belongs to `check_labels`.", setting="out", given=settings.out, advice="Give both.")
    with watch_bytes() as report:
        found = api.inspect(report=report, **given)
    if settings.as_json:
        print(for_output(json.dumps(found, ensure_ascii=False)))
    else:
        show_data(found)
    if "refused" in found:
        print(f"capo: {in_flags(DataError(found['refused']))}", file=sys.stderr)
        return 2
    return 0


def _demo(rest: list[str]) -> int:
    settings = parse(Demo, rest, "capo demo")
    from capotune.cli.demo import demo

    return demo(settings.out, settings.open, settings.epochs)


def _in(module: str, command: str) -> Callable[[list[str]], int]:
    """A command that stands in a module of its own, which is imported when the command is run."""
    return lambda rest: int(getattr(import_module(f"capotune.cli.{module}"), command)(rest))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compare": _compare,
    "train": _train,
    "resume": _resume,
    "checkpoint": _checkpoint,
    "evaluate": _evaluate,
    "predict": _predict,
    "generate": _in("generate", "generate"),
    "chat": _in("chat", "chat"),
    "info": _info,
    "data": _data,
    "demo": _demo,
    "quantize": _in("convert", "quantize"),
    "merge": _in("convert", "merge"),
    "export": _in("export", "export"),
    "combine": _in("combine", "combine"),
    "diff": _in("diff", "diff"),
    "push": _in("push", "push"),
    "runs": _in("runs", "runs"),
    "reproduce": _in("runs", "reproduce"),
    "cache": _in("cache", "show_cache"),
}


def _print_predictions(predictions: Iterable[Any], as_json: bool) -> None:
    for one in predictions:
        text = json.dumps(one.as_json(), ensure_ascii=False) if as_json else one.as_line()
        print(for_output(text), flush=True)
