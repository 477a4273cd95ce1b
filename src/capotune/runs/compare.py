"""Several techniques on the same data, one after the other, each in a process of its own.

A process of its own makes each technique's peak memory its own, and leaves the next one a clean start.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import IO, Any

from capotune import errors, run_folder
from capotune.errors import CapotuneError, DataError, OutOfMemoryError, without_secrets
from capotune.events import CancelToken, Event, Failed, Finished, Reporter, from_json
from capotune.files import remove_folder
from capotune.memory_table import MemoryTable
from capotune.models.content import sha256_of
from capotune.run_folder import RUN, has_checkpoint, read_run, tidy
from capotune.settings import CompareSettings, RunSettings

_READ = ("data", "test", "general")
"""Settings that hold what every technique reads."""
_SECONDS_TO_SAVE = 30.0
_SECONDS_TO_LEAVE = 30.0


def record_of(settings: CompareSettings, command: str, given: Mapping[str, str]) -> dict[str, Any]:
    """What ``settings.json`` holds when the comparison is started; ``command`` is shown as the way to repeat it, and
    ``given`` says where settings came from, those of a method as ``lora.rank``."""
    values = settings.model_dump(mode="json", exclude={"out"})
    return {
        "settings": values,
        "settings_from": dict(given),
        "command": without_secrets(command),
        "files_sha256": _hashes(settings),
        "data": {},
    }


def check_same(record: dict[str, Any], settings: CompareSettings, report: Reporter) -> None:
    """``DataError`` or ``ModelError`` where rows in memory, files, data of the hub or base are not what they were when
    the comparison of these ``settings`` was started: its techniques would not be comparable."""
    from capotune.runs.resume import AS_IT_WAS, check_base, check_inputs

    out, was, now = settings.out, record["files_sha256"], _hashes(settings)
    for name, value in was.items():
        if now.get(name) != value:
            raise DataError(
                f"its content is another than when the comparison in {out} was started.",
                setting=name,
                given=str(reduce(getattr, name.split("."), settings)),
                advice=AS_IT_WAS,
            )
    sources = {"data": settings.data, "test": settings.test}
    is_on_the_hub = any(value is not None and name not in was for name, value in sources.items())
    for path in sorted(out.glob(f"*/{RUN}"))[:1]:
        if is_on_the_hub:  # it is read as that technique read it
            rows = {name: value for name, value in sources.items() if isinstance(value, MemoryTable)}
            check_inputs(path.parent, rows, settings.trust_remote_code, report)
        else:
            check_base(path.parent, report)


def is_worth_keeping(out: Path) -> bool:
    """Whether a technique of the comparison in ``out`` is finished, or can be gone on with."""
    return any(run_folder.is_worth_keeping(path.parent) for path in out.glob(f"*/{RUN}"))


def run_techniques(
    settings: CompareSettings, report: Reporter, cancel: CancelToken, given: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Run every method of ``settings`` into ``out/METHOD``, or go on with it; returns each finished one's ``run.json``.
    They agree on the score to compare by. ``given`` as in ``record_of``.

    A user's mistake (``CapotuneError`` in the technique) ends the comparison; a technique that crashes (say, out of
    memory) is reported as failed and the others go on. Raises ``CapotuneError`` when none finished.
    """
    from capotune.runs.agree import agree

    results: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(settings.methods):
        out = settings.out / method

        def listen(event: Event, method: str = method) -> None:
            if not isinstance(event, Finished):  # it is once its process has ended
                report(replace(event, method=method))

        failure: str | None = None
        if _finished(out) is None:
            request = _request(settings, method, out, base_score=number == 0)
            own = method.replace("-", "_") + "."
            request["given"] = {name.removeprefix(own): source for name, source in given.items()}
            try:
                failure = _run_one(request, listen, cancel)
            except OutOfMemoryError as error:  # the next one may need less
                failure = str(error)
        record = _finished(out)
        if record is not None:  # its process may have died after that
            report(Finished(method=method, result=record["result"]))
            results[method] = record
            continue
        if not has_checkpoint(out):
            remove_folder(out)  # there is nothing to go on with
        report(Failed(method=method, text=failure or "its process ended without a result"))
    if not results:
        raise CapotuneError("no technique finished; the messages above say why.")
    agree(results, settings.out)
    return results


def _finished(out: Path) -> dict[str, Any] | None:
    """The record of a technique that was run to its end before."""
    record = read_run(out) if (out / RUN).exists() else {}
    if "result" not in record:
        return None
    tidy(out)
    return record


def _hashes(settings: CompareSettings) -> dict[str, str]:
    """Of the rows in memory and the files that techniques read, by the setting that holds or names them."""
    values, found = settings.model_dump(mode="json"), dict[str, str]()
    for name in _READ:
        value = values[name]
        if isinstance(value, dict):
            found[name] = value["sha256"]
        elif isinstance(value, str) and (path := Path(value).expanduser()).is_file():
            found[name] = sha256_of(path)
    for method in settings.methods:
        if prompts := settings.for_method(method).candidate_prompts():
            content = json.dumps(prompts).encode()
            found[f"{method.replace('-', '_')}.candidates"] = hashlib.sha256(content).hexdigest()
    return found


def _request(settings: CompareSettings, method: str, out: Path, base_score: bool) -> dict[str, Any]:
    from capotune import methods, tasks

    values = {name: getattr(settings, name) for name in RunSettings.model_fields}
    shared = {name: value.packed() if isinstance(value, MemoryTable) else value for name, value in values.items()}
    return {
        "method": method,
        "method_settings": settings.for_method(method).model_dump(mode="json"),
        "settings": {**shared, "out": str(out)},
        "base_score": base_score,
        "patience": _SECONDS_TO_LEAVE,
        "modules": sorted({*methods.extra_modules(), *tasks.extra_modules()}),
        "path": sys.path,
    }


def _run_one(request: dict[str, Any], report: Callable[[Event], None], cancel: CancelToken) -> str | None:
    """Run one technique's process to its end; why it failed, or None."""
    cancel.check()
    command = [sys.executable, "-m", "capotune.runs"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True, start_new_session=True
        ) as process,
        cancel.calling(lambda: _end(process)),
    ):
        try:
            assert process.stdout is not None
            _send(process, request)
            for line in process.stdout:
                values = json.loads(line)
                if "error" in values:
                    raise _error(values)
                report(from_json(values))
            cancel.check()
        except BaseException:
            try:
                _end(process)
                for _ in process.stdout or []:
                    pass
            finally:  # a second Ctrl-C does not wait
                process.kill()
            raise
        process.wait()
        return _failure(process.returncode, messages)


def _end(process: subprocess.Popen[str]) -> None:
    """Have the process save its state and end; kill it where it has not done so in time."""
    process.terminate()
    killer = threading.Timer(_SECONDS_TO_SAVE, process.kill)
    killer.daemon = True
    killer.start()


def _send(process: subprocess.Popen[str], request: dict[str, Any]) -> None:
    """Write the request to a technique's process, as one line: by the end of its input that knows that this process has
    ended. One that ends before it has read all says why by its exit code."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        with suppress(BrokenPipeError):  # what is still in the buffer
            process.stdin.close()


def _error(values: dict[str, Any]) -> CapotuneError:
    """The error that a technique's process wrote."""
    kind: type[CapotuneError] = getattr(errors, values.pop("error"))
    return kind(values.pop("problem"), **values)


def _failure(code: int, messages: IO[str]) -> str | None:
    if code == 0:
        return None
    messages.seek(0)
    last = (messages.read().strip() or "no message").splitlines()[-1]
    killed = " (killed; most often the machine ran out of memory)" if code == -9 else ""
    return f"its process ended with code {code}{killed}: {last}"
