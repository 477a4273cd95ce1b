"""Stopped anywhere: at once, cleanly, and what can be gone on with reaches the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from commands import PATIENCE, capo, start, tree, wait_until
from warm import WARM

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")

LITTLE = 1.0
"""Seconds of a processor's work that a process may still do once it is told to stop; it takes a tenth of that."""
SETTINGS = ("--learning-rate", "1e-4", "--dropout", "0.1", "--rank", "2", "--batch-size", "4")
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, to see that none stays."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture(scope="module")
def whole(bert: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped: 12 epochs of 17 steps."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = capo(*training(bert, tickets, 12))
    assert made.code == 0, made.err
    return folder / "run"


def training(bert: Path, tickets: Path, epochs: int) -> list[object]:
    data = ["--data", tickets, "--model", bert, "--out", "run", "--no-cache"]
    return ["train", "lora", *data, *SETTINGS, "--epochs", epochs, "--patience", epochs]


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Send the signal; the exit code and what was said. Fails when much was computed after it.

    What counts is work, not time: on a busy machine a process may have to wait for its turn.
    """
    before = computed(process.pid)
    earlier = os.times()
    process.send_signal(number)
    process.wait(timeout=PATIENCE)
    later = os.times()
    ended = later.children_user + later.children_system - earlier.children_user - earlier.children_system
    print(f"{number.name}: {ended - before:.3f} s of work", file=sys.stderr)
    assert ended - before < LITTLE
    _, said = process.communicate()
    return process.returncode, said


def computed(number: int) -> float:
    """Seconds that a process has computed, and the ones that it started."""
    ticks = 0
    for one in (number, *family(number)):
        with contextlib.suppress(FileNotFoundError):  # it has just ended, and its parent counts it
            ticks += sum(map(int, Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def assert_one_line(said: str) -> None:
    assert "Traceback" not in said
    assert said.count("capo:") == 1
    assert re.search(r"\ncapo: stopped\.( Go on with: capo resume \S+)?\n$", said)


def family(number: int) -> list[int]:
    """The processes that ``number`` started, and theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it ended while we looked
            continue
        if parent == number:
            found += [int(path.parent.name), *family(int(path.parent.name))]
    return found


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text()


def test_interrupt_before_the_command_line_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    program = (
        "import signal, sys; from capotune.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "info"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (130, "\ncapo: stopped.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_a_destructor_runs_is_not_lost(number: signal.Signals, tmp_path: Path) -> None:
    """Python prints and drops what a destructor raises."""
    program = (
        "import os, signal, sys, time\n"
        "from capotune.cli import main as entry\n"
        "from capotune.cli.main import COMMANDS\n"
        "class Signalled:\n"
        f"    def __del__(self):\n        os.kill(os.getpid(), {int(number)})\n        time.sleep(1)\n"
        "def command(rest):\n    Signalled()\n    time.sleep(60)\n    return 0\n"
        "COMMANDS['info'] = command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv[1:] = ['info']\n"
        "sys.exit(entry())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "\ncapo: stopped.\n")


def test_a_comparison_that_is_ended_leaves_what_it_can_go_on_with(
    bert: Path, tickets: Path, tmp_path: Path, temporary: Path
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    flags = ["--methods", "lora", "--lora.epochs", 100_000, "--lora.patience", 100_000]
    with start("compare", "--data", tickets, "--model", bert, "--out", "new/out", *flags, cwd=folder) as process:
        wait_until(lambda: bool(list(folder.glob("new/out/lora/checkpoints/step-*"))), process)
        children = family(process.pid)
        assert children
        code, said = stop(process, signal.SIGTERM)
    assert code == 130
    assert_one_line(said)
    assert said.endswith(" Go on with: capo resume new/out\n")
    left = tree(folder)
    assert not [name for name in left if ".partial" in name or ".lock" in name]
    assert {"new/out/settings.json", "new/out/lora/run.json"} < left.keys()
    assert not [child for child in children if is_alive(child)]
    of_torch = {left.parent for left in temporary.glob("*/_remote_module_*")}  # 2.9 makes them on import
    assert set(temporary.iterdir()) <= of_torch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_before_its_first_checkpoint_leaves_nothing(
    number: signal.Signals, bert: Path, tickets: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with start(*training(bert, tickets, 12), cwd=folder) as process:
        wait_until(lambda: (folder / "run" / "run.json").exists(), process)
        code, said = stop(process, number)
    assert code == 130
    assert_one_line(said)
    if not (folder / "run" / "checkpoints").exists():  # it may have come so far on a fast machine
        assert tree(folder) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_resumes_to_the_same_bytes(
    number: signal.Signals, whole: Path, bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    checkpoints = folder / "run" / "checkpoints"
    with start(*training(bert, tickets, 12), cwd=folder) as process:
        wait_until(lambda: any(int(path.name.split("-")[1]) >= 51 for path in checkpoints.glob("step-*")), process)
        code, said = stop(process, number)
    assert code == 130
    assert_one_line(said)
    assert not [name for name in tree(folder) if ".partial" in name]
    assert not (folder / "run" / "adapter").exists()
    assert (folder / "run" / "run.json").exists()
    monkeypatch.chdir(folder)
    resumed = capo("resume", "run")
    assert resumed.code == 0, resumed.err
    assert "epoch 1:" not in resumed.err  # it did go on, and did not begin again
    assert "epoch 12:" in resumed.err
    assert (folder / "run" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (folder / "run" / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert set(tree(folder / "run")) == set(tree(whole))


def test_killed_while_the_adapter_is_written_leaves_no_half_of_it(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill -9 in the middle of the adapter's files: the adapter's place stays empty, and resume fills it."""
    folder = tmp_path / "work"
    folder.mkdir()
    program = WARM + (
        "import os, signal, sys\nimport capotune.adapters.store as store\nwrite = store.write_atomic\n"
        "def die(path, content):\n    write(path, content)\n    if path.name == store.WEIGHTS:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.write_atomic = die\nfrom capotune.cli import main\nmain()"
    )
    flags = [str(one) for one in training(bert, tickets, 2)]
    died = subprocess.run([sys.executable, "-c", program, *flags], cwd=folder, capture_output=True)
    assert died.returncode == -signal.SIGKILL
    assert not (folder / "run" / "adapter").exists()
    monkeypatch.chdir(folder)
    resumed = capo("resume", "run")
    assert resumed.code == 0, resumed.err
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "adapter", "metrics.jsonl", "predictions.jsonl", "run.json", "test_rows.json"
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["train lora", "compare"])
def test_how_to_go_on_is_not_said_of_a_folder_without_a_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capotune import api

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("train_run", "compare_run"):
        monkeypatch.setattr(api, name, stop)
    (tmp_path / "settings.json").write_text('{"another": "program"}')
    stopped = capo(*command.split(), "--data", "x.csv", "--out", tmp_path)
    assert (stopped.code, stopped.err) == (130, "\ncapo: stopped.\n")


def test_resume_wants_the_same_data_and_base(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import capotune.runs.run as run

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_adapter", fail)
        stopped = capo(*training(bert, tickets, 1))
        assert (stopped.code, stopped.err.splitlines()[-1]) == (130, "capo: stopped. Go on with: capo resume run")
    before = tree(tmp_path)
    again = capo(*training(bert, tickets, 1))
    assert again.code == 2
    assert "run exists already. Go on with what was stopped there (capo resume), or choose" in again.said
    assert tree(tmp_path) == before
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for part, said in (("data_sha256", "the data is another than"), ("base", "the base is another than")):
        changed = {**record, part: {**record["base"], "fingerprint": "0"} if part == "base" else "0"}
        (tmp_path / "run" / "run.json").write_text(json.dumps(changed))
        elsewhere = capo("resume", "run")
        assert elsewhere.code == 2
        assert said in elsewhere.said
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert capo("resume", "run").code == 0
    ended = tree(tmp_path)
    once_more = capo("resume", "run")
    assert (once_more.code, "solving" in once_more.err) == (0, False)
    assert tree(tmp_path) == ended


def test_a_record_does_not_let_a_models_code_run(
    bert: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    settings = {"data": str(tickets), "model": str(bert), "trust_remote_code": True}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": settings, "method": "lora", "lora": {}}))
    refused = capo("resume", "run")
    assert refused.code == 2
    assert "--trust-remote-code: the run in run lets its model run its own Python code" in refused.said
