"""Kill real processes at any moment, go on from what they leave, and compare with runs that nobody stopped.

    python scripts/soak.py --kills 200 --out benchmarks/results/soak.json
    python scripts/soak.py --kills 12 --phase conversion    those alone of one kind (``dying.PLACES``)
    python scripts/soak.py --full-disk            every write of a run, one after the other, finds the disk full

A trial starts ``capo train``, kills it (SIGKILL) at a change on the disk, a step or a scoring drawn at random, or from
outside after some time; looks whether any file is half-written; goes on by ``capo resume``, which is killed too in one
of two; and compares the result bit by bit. Processes are forked from this one, which has imported Capotune and run it
once, so that a trial takes two seconds of a processor. Of a comparison half of the kills end the comparing process
alone; its technique must end by itself then, with its state saved.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import dying
from dying import Moment

HOW = {"train_seconds", "reused_seconds", "forward_rows", "peak_memory_bytes", "adapter_bytes", "sequences", "blocks"}
"""Of a record's result: what a run that found its features in the cache has otherwise, and what takes another time."""
_SHARE_KILLED_AGAIN = 0.5


_SECONDS_TO_END = 60
"""For a technique whose comparison was killed."""


@dataclass(frozen=True)
class Case:
    """A run, a comparison, or what writes a folder from an adapter or a base: method, task, and the command."""

    method: str
    task: str
    command: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """Of ``capo``, to start it."""
        return [*self.command, "--out", "run"]

    @property
    def is_comparison(self) -> bool:
        """Whether several techniques run."""
        return self.command[0] == "compare"

    @property
    def can_resume(self) -> bool:
        """Whether one that was stopped is gone on with; the others are run again."""
        return self.command[0] in ("train", "compare")

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.method}, {self.task}"


def cases(made: Path) -> list[Case]:
    """Every technique with every kind of data, on tiny models in ``made``."""
    steps = ("--epochs", "2", "--patience", "2", "--batch-size", "4", "--save-every", "2")
    labels = ("--data", f"{made}/labels.csv", "--model", f"{made}/bert")
    tags = ("--data", f"{made}/tags.jsonl", "--model", f"{made}/bert")
    text = ("--data", f"{made}/text.jsonl", "--model", f"{made}/llama", "--answers", "2")
    gguf = ("--data", f"{made}/text.jsonl", "--model", f"{made}/llama.gguf", "--answers", "2")
    lora = ("--rank", "2", "--dropout", "0.1", *steps)
    prompt = ("--num-virtual-tokens", "3", *steps)
    last = ("feature-extraction", "--trainable-layers", "1")
    candidates = ("prompt-tuning", "--candidates", f"{made}/prompts.txt")
    few = ("--save-every", "2", "--lora.epochs", "2", "--lora.batch-size", "4", "--methods", "lora")
    prompts = ("--prompt-tuning.epochs", "2", "--prompt-tuning.num-virtual-tokens", "3")
    runs = [
        Case("feature-extraction", "classification", ("feature-extraction", *labels)),
        Case("feature-extraction, last block", "classification", (*last, *labels, *steps)),
        Case("lora", "classification", ("lora", *labels, *lora)),
        Case("lora, last block", "classification", ("lora", "--layers", "2", *labels, *lora)),
        Case("qlora", "classification", ("qlora", *labels, *lora)),
        Case("prompt-tuning", "classification", ("prompt-tuning", *labels, *prompt)),
        Case("lora", "token-classification", ("lora", *tags, *lora)),
        Case("prompt-tuning", "token-classification", ("prompt-tuning", *tags, *prompt)),
        Case("lora", "generation", ("lora", *text, *lora)),
        Case("qlora", "generation", ("qlora", *text, *lora)),
        Case("prompt-tuning", "generation", ("prompt-tuning", *text, *prompt)),
        Case("prompt-tuning, candidates", "generation", (*candidates, *text, *steps)),
        Case("lora", "generation from GGUF", ("lora", *gguf, *lora)),
        Case("qlora", "generation from GGUF", ("qlora", *gguf, *lora)),
    ]  # fmt: skip
    return [
        *(Case(one.method, one.task, ("train", *one.command)) for one in runs),
        Case("lora and feature-extraction", "compared", ("compare", *labels, *few, "feature-extraction")),
        Case("lora and prompt-tuning, text", "compared", ("compare", *text, *prompts, *few, "prompt-tuning")),
    ]


def writers(made: Path) -> list[Case]:
    """What writes a folder from an adapter that ``warm`` made, or from a base."""
    tuned = {case.task: f"{made}/warm-{at}/adapter" for at, case in enumerate(cases(made)) if case.method == "lora"}
    labels, text = tuned["classification"], tuned["generation"]
    return [
        Case("merge", "classification", ("merge", labels)),
        Case("merge", "generation", ("merge", text)),
        Case("export for peft", "classification", ("export", labels, "--for", "peft")),
        Case("export for llama.cpp", "generation", ("export", text, "--for", "llama.cpp")),
        Case("export for llama.cpp, merged", "generation", ("export", text, "--for", "llama.cpp", "--merged")),
        Case("combine", "generation", ("combine", text, text)),
        Case("quantize", "a folder", ("quantize", f"{made}/llama")),
        Case("quantize", "a GGUF file", ("quantize", f"{made}/llama.gguf")),
    ]


def make(folder: Path) -> None:
    """Tiny models and data."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import gguf_files
    import tiny_families

    chooser, words = random.Random(0), ("the", "parcel", "was", "late", "again", "and", "my", "lamp", "is", "broken")
    tiny_families.make("bert", folder / "bert")
    tiny_families.make("llama", folder / "llama")
    gguf_files.write(gguf_files.FAMILIES["Llama"], folder / "llama.gguf")
    texts = [" ".join(chooser.choices(words, k=chooser.randint(3, 8))) for _ in range(40)]
    lines = [
        f"{text} {'late' if at % 2 else 'broken'},{'late' if at % 2 else 'broken'}" for at, text in enumerate(texts)
    ]
    (folder / "labels.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    tagged = [
        {"words": ["ann", "paid", *text.split()], "tags": ["B-PER", "O", *["O"] * len(text.split())]} for text in texts
    ]
    asked = [
        {"prompt": f"{text} {at}:", "completion": " late" if at % 2 else " broken"} for at, text in enumerate(texts)
    ]
    for name, rows in (("tags", tagged), ("text", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "prompts.txt").write_text("answer me\nlate or broken\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- one process


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    said: str
    seconds: float
    """Of a processor, as far as was seen."""
    what: str = ""
    """What it did last, where it died at a moment of ours."""
    counts: dict[str, int] = field(default_factory=dict)
    process: int = 0
    """Of the comparison's technique, where that is what did it."""


def moment(folder: Path, kind: str = "change", number: int = 0, deed: str = "kill") -> Moment:
    """A moment of a process in ``folder``; by default one that never comes."""
    return Moment(
        tuple(str(folder / name) for name in ("run", "cache", ".run")),
        str(folder / "note.json"),
        kind,
        number,
        deed,
    )


def run(folder: Path, arguments: list[str], at: Moment | None = None, after: float | None = None) -> Ended:
    """``capo`` in ``folder``, killed ``at`` a moment, or from outside ``after`` so many seconds of a processor."""
    note, said = folder / "note.json", folder / "said.txt"
    note.unlink(missing_ok=True)
    with warnings.catch_warnings():  # of threads, of which none works now
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if not process:
        _become(folder, said, [(at or moment(folder)).to_json(), *arguments])
    seconds = 0.0
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        seconds = max(seconds, _computed(process))
        if after is not None and seconds >= after:
            os.kill(process, signal.SIGKILL)
            ended = os.waitpid(process, 0)
            break
        time.sleep(0.004)
    noted = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {"what": ""}
    code = os.waitstatus_to_exitcode(ended[1])
    return Ended(code, said.read_text(encoding="utf-8"), seconds, **noted)


def _become(folder: Path, said: Path, arguments: list[str]) -> NoReturn:
    """Be ``capo`` in ``folder``, as if this process had begun here."""
    code = 70
    try:
        os.chdir(folder)
        os.environ["CAPOTUNE_CACHE"] = str(folder / "cache")
        for number, path in enumerate((os.devnull, os.devnull, said)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        dying.take_streams()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["capo", *arguments]
        code = dying.main()
    finally:
        if code == 70:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def _computed(number: int) -> float:
    try:
        values = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, values[11:13])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------- what it leaves


def half_written(folder: Path) -> list[str]:
    """Files that are not whole, but those whose name says so."""
    from safetensors import SafetensorError, safe_open

    found = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not path.is_file() or hidden or path.name in ("metrics.jsonl", "note.json", "said.txt"):
            continue  # the log grows line by line
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    list(file.keys())
        except (ValueError, SafetensorError) as error:
            found.append(f"{path.relative_to(folder)}: {error}")
    found += [str(path) for path in folder.glob("run/**/adapter") if len(list(path.iterdir())) < 4]
    return found


def result(out: Path) -> dict[str, Any]:
    """All of a run's folder that must be the same, by name; of a comparison's, that of each technique; of another's,
    all."""
    if not any((out / name).exists() for name in ("compare.json", "run.json")):
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if (out / "compare.json").exists():
        return {path.parent.name: result(path.parent) for path in out.glob("*/run.json")}
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    adapter = json.loads((out / "adapter" / "capotune.json").read_text(encoding="utf-8"))
    for values in (record["result"], adapter["trained"]):
        for name in HOW:
            values.pop(name, None)
    adapter.pop("sha256", None)
    names = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "predictions.jsonl", "test_rows.json",
             "metrics.jsonl")  # fmt: skip
    found: dict[str, Any] = {name: (out / name).read_bytes() for name in names if (out / name).exists()}
    left = sorted(path.name for path in out.iterdir())
    return found | {"run.json": record["result"], "capotune.json": adapter, "files": left}


def is_complete(out: Path) -> bool:
    """Whether the run has its result."""
    return (out / "run.json").exists() and "result" in json.loads((out / "run.json").read_text(encoding="utf-8"))


def last_step(out: Path) -> int:
    """Of the newest checkpoint; 0: there is none."""
    steps = [int(found[1]) for path in out.glob("checkpoints/step-*") if (found := re.match(r"step-(\d+)", path.name))]
    return max(steps, default=0)


# ------------------------------------------------------------------------------------------------- trials


@dataclass
class Reference:
    """What a run does when nobody stops it."""

    result: dict[str, Any]
    counts: dict[str, int]
    seconds: float


def reference(case: Case, folder: Path) -> Reference:
    """Run the case to its end."""
    folder.mkdir()
    ended = run(folder, case.arguments, moment(folder))
    assert ended.code == 0, ended.said
    # those of a comparison's techniques are counted in their own processes: about so many come
    counts = {"change": 250} if case.is_comparison else ended.counts
    found = Reference(result(folder / "run"), counts, ended.seconds)
    shutil.rmtree(folder)
    return found


@dataclass
class Trial:
    """What happened in one trial."""

    kills: list[str] = field(default_factory=list)
    """The phase of each."""
    problems: list[str] = field(default_factory=list)
    lost: int = 0
    """Most steps that had been taken since the checkpoint that was gone on from."""


@dataclass(frozen=True)
class Kill:
    """How and when to kill: at the ``number``-th of a kind (``dying.Moment``), or after ``seconds`` of a processor."""

    how: str
    number: int = 0
    seconds: float | None = None
    alone: bool = False
    """Of a comparison, the comparing process and not its technique."""


def trial(case: Case, expected: Reference, folder: Path, kills: Iterable[Kill]) -> Trial:
    """Start, kill, go on and kill again as often as there are ``kills``, go on to the end, compare."""
    folder.mkdir()
    found, before = Trial(), 0
    for kill in (*kills, Kill("none")):
        out = folder / "run"
        arguments = ["resume", "run"] if out.exists() else case.arguments
        deed = "kill the parent" if kill.alone else "kill"
        ended = run(folder, arguments, moment(folder, kill.how, kill.number, deed), kill.seconds)
        if ended.code != -signal.SIGKILL:
            break
        found.kills.append(_phase(ended, "the comparing process alone" if kill.alone else kill.how))
        if not _has_ended(ended.process):
            found.problems.append(f"process {ended.process} works on {_SECONDS_TO_END} s after its comparison")
        found.problems += half_written(folder)
        if is_complete(out):
            before = expected.counts.get("step", 0)
            continue
        if ended.counts and not case.is_comparison:
            found.lost = max(found.lost, before + ended.counts.get("step", 1) - 1 - last_step(out))
        before = last_step(out)
    if ended.code:
        found.problems.append(f"{arguments[0]} ended with {ended.code}: {ended.said[-600:]}")
    elif found.kills:
        steps = ended.counts.get("step", 0)
        if not case.is_comparison and steps != expected.counts.get("step", 0) - before:
            found.problems.append(f"{steps} steps after a checkpoint at {before}")
        now = result(folder / "run")
        found.problems += [f"{name} differs" for name in expected.result if now.get(name) != expected.result[name]]
    if not found.problems:
        shutil.rmtree(folder)
    return found


def _has_ended(process: int) -> bool:
    """Whether a process ends in time (0: there is none)."""
    end = time.monotonic() + _SECONDS_TO_END
    while process and (stat := Path(f"/proc/{process}/stat")).exists() and time.monotonic() < end:
        with suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.01)
    return time.monotonic() < end


def draw(case: Case, expected: Reference, phase: str | None, chooser: random.Random) -> Iterator[Kill]:
    """One kill or some, in any phase or one."""
    kinds = [phase] if phase else [*(expected.counts.keys() - {"change"} or {"change"}), "time"]
    while True:
        how = chooser.choice(sorted(kinds))
        if how == "time":
            yield Kill(how, seconds=chooser.uniform(0, expected.seconds))
        else:
            yield Kill(
                how, chooser.randint(1, expected.counts[how]), alone=case.is_comparison and chooser.random() < 0.5
            )
        if chooser.random() > _SHARE_KILLED_AGAIN:
            return


def _phase(ended: Ended, how: str) -> str:
    """In which the process was killed."""
    if how != "time":
        return how
    stages = [line.partition(": ")[2] for line in ended.said.splitlines() if ": " in line]
    return f"while {stages[-1].split(',')[0][:40]}" if stages else "at the start"


def warm(made: Path) -> None:
    """Import and run all that a run needs, once for all processes that will be forked."""
    os.environ["CAPOTUNE_CACHE"] = str(made / "warm-cache")
    from capotune.cli import main as capo

    for number, case in enumerate(cases(made)):
        if case.method == "lora":
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                capo([*case.command, "--out", str(made / f"warm-{number}")])


def soak(
    kills: int, seed: int, only: str, phase: str | None, made: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """So many kills, shared out over all cases whose names have ``only`` in them and that have the ``phase``."""
    chooser = random.Random(seed)
    expected = {case: reference(case, made / "reference") for case in cases(made) if only in case.name}
    every = [case for case in expected if phase is None or phase in expected[case].counts]
    by_phase: Counter[str] = Counter()
    by_case: Counter[str] = Counter()
    problems: list[str] = []
    lost = number = 0
    while sum(by_case.values()) < kills:
        case = every[number % len(every)]
        one = trial(case, expected[case], made / f"trial-{number}", draw(case, expected[case], phase, chooser))
        number += 1
        by_phase.update(one.kills)
        by_case[case.name] += len(one.kills)
        lost = max(lost, one.lost)
        problems += [f"trial {number - 1}, {case.name}, {one.kills}: {text}" for text in one.problems]
        progress(f"{sum(by_case.values())} kills, {len(problems)} problems, {case.name}: {one.kills}")
    return {
        "kills": sum(by_case.values()),
        "trials": number,
        "by_case": dict(by_case),
        "by_phase": dict(by_phase.most_common()),
        "most_steps_lost": lost,
        "problems": problems,
    }


def full_disk(made: Path, every: int, only: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """From every write of some runs on (or each ``every``-th) the disk is full, then there is room again."""
    chosen = [case for case in cases(made) if case.name in ("lora, classification", "lora, generation from GGUF")]
    chosen = [case for case in [*chosen, *writers(made)] if only in case.name]
    said: Counter[str] = Counter()
    problems: list[str] = []
    tried: Counter[str] = Counter()
    for case in chosen:
        expected, folder = reference(case, made / "reference"), made / "full"
        for number in range(1, expected.counts["change"] + 1, every if case.can_resume else 1):
            tried[case.name] += 1
            folder.mkdir()
            ended = run(folder, case.arguments, moment(folder, "change", number, "full"))
            lines = [line for line in ended.said.splitlines() if line.startswith("capo:") or "goes on without" in line]
            said.update(re.sub(r"/\S+|[\d.,]+ [kMG]?B|step-\S+", "…", line) for line in lines)
            problems += [
                f"{case.name}, write {number}: {text}" for text in _after_full(ended, lines, case, folder, expected)
            ]
            progress(f"{case.name}: write {number} of {expected.counts['change']}, {len(problems)} problems")
            shutil.rmtree(folder)
    return {"disks": dict(tried), "messages": dict(said.most_common()), "problems": problems}


def _after_full(ended: Ended, lines: list[str], case: Case, folder: Path, expected: Reference) -> list[str]:
    """What is wrong with how a run ended on a full disk, and with how it goes on."""
    problems = half_written(folder)
    if "Traceback" in ended.said or (ended.code and sum(line.startswith("capo:") for line in lines) != 1):
        problems.append(f"said {ended.said[-800:]}")
    if ended.code not in (0, 2):
        problems.append(f"ended with {ended.code}")
    if ended.code:
        if list(folder.rglob("*.partial")) or (not case.can_resume and (folder / "run").exists()):
            problems.append("left something half-written")
        arguments = ["resume", "run"] if (folder / "run").exists() else case.arguments
        again = run(folder, arguments)
        if again.code:
            return [*problems, f"{arguments[0]} ended with {again.code}: {again.said[-600:]}"]
    now = result(folder / "run")
    return problems + [f"{name} differs" for name in expected.result if now.get(name) != expected.result[name]]


def main() -> int:
    """Soak, and write what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phase", help="kill at changes of this kind alone (dying.PLACES)")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--full-disk", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="with --full-disk: of so many writes of a run one")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    progress = partial(print, flush=True)
    made = Path(tempfile.mkdtemp(prefix="capotune-soak-"))
    make(made)
    warm(made)
    if given.full_disk:
        found = full_disk(made, given.every, given.only, progress)
    else:
        found = soak(given.kills, given.seed, given.only, given.phase, made, progress)
    text = json.dumps(found, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    if not found["problems"]:
        shutil.rmtree(made)
    return bool(found["problems"])


if __name__ == "__main__":
    sys.exit(main())
