"""Several techniques on the same data, one after the other, each in a process of its own.

A process of its own makes each technique's peak memory its own, and leaves the next one a clean start.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from capotune import errors
from capotune.errors import CapotuneError, OutOfMemoryError
from capotune.events import CancelToken, Event, Failed, Reporter, from_json
from capotune.memory_table import MemoryTable
from capotune.settings import CompareSettings, RunSettings


def run_techniques(
    settings: CompareSettings, folder: Path, report: Reporter, cancel: CancelToken
) -> dict[str, dict[str, Any]]:
    """Run every method of ``settings`` into ``folder/METHOD``; returns each finished one's ``run.json``. They agree on
    the score to compare by.

    A user's mistake (``CapotuneError`` in the technique) ends the comparison; a technique that crashes (say, out of
    memory) is reported as failed and the others go on. Raises ``CapotuneError`` when none finished.
    """
    from capotune.runs.agree import agree

    results: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(settings.methods):

        def listen(event: Event, method: str = method) -> None:
            report(replace(event, method=method))

        request = _request(settings, method, folder / method, base_score=number == 0)
        try:
            failure = _run_one(request, listen, cancel)
        except OutOfMemoryError as error:  # the next one may need less
            failure = str(error)
        except CapotuneError as error:  # it names the folder's temporary name, the only one that it knows
            raise _rename(error, str(folder), str(settings.out)) from None
        if failure:
            shutil.rmtree(folder / method, ignore_errors=True)  # what a killed process left half-written
            report(Failed(method=method, text=failure))
        else:
            results[method] = json.loads((folder / method / "run.json").read_text(encoding="utf-8"))
    if not results:
        raise CapotuneError("no technique finished; the messages above say why.")
    agree(results, folder)
    return results


def _request(settings: CompareSettings, method: str, out: Path, base_score: bool) -> dict[str, Any]:
    from capotune import methods, tasks

    values = {name: getattr(settings, name) for name in RunSettings.model_fields}
    shared = {name: value.packed() if isinstance(value, MemoryTable) else value for name, value in values.items()}
    return {
        "method": method,
        "method_settings": settings.for_method(method).model_dump(mode="json"),
        "settings": {**shared, "out": str(out)},
        "base_score": base_score,
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
        cancel.calling(process.kill),
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
            process.kill()  # Ctrl-C must not wait for the step in flight
            raise
        process.wait()
        return _failure(process.returncode, messages)


def _send(process: subprocess.Popen[str], request: dict[str, Any]) -> None:
    """Write the request to a technique's process. One that ends before it has read all says why by its exit code."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request))
    with suppress(BrokenPipeError):  # what is still in the buffer
        process.stdin.close()


def _error(values: dict[str, Any]) -> CapotuneError:
    """The error that a technique's process wrote."""
    kind: type[CapotuneError] = getattr(errors, values.pop("error"))
    return kind(values.pop("problem"), **values)


def _rename(error: CapotuneError, before: str, after: str) -> CapotuneError:
    parts = {
        name: part.replace(before, after) if isinstance(part, str) else part for name, part in error.parts().items()
    }
    return type(error)(parts.pop("problem"), **parts)


def _failure(code: int, messages: IO[str]) -> str | None:
    if code == 0:
        return None
    messages.seek(0)
    last = (messages.read().strip() or "no message").splitlines()[-1]
    killed = " (killed; most often the machine ran out of memory)" if code == -9 else ""
    return f"its process ended with code {code}{killed}: {last}"
