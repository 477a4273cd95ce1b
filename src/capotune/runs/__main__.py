"""One technique in a process of its own, for ``compare``: its peak memory is then its own.

It reads one line of JSON, the request, from standard input and writes one JSON object per event to standard output.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
import threading
from importlib import import_module
from typing import Any

from capotune.device import collector_at_rest
from capotune.errors import CapotuneError
from capotune.events import Event, Reporter, to_json
from capotune.folder_lock import wait_for_its_end
from capotune.interrupts import asked_by_signal, heed_sigterm, ignore_requests, lose_no_signal
from capotune.memory_table import MemoryTable
from capotune.run_folder import RUN, request_checkpoint

with collector_at_rest():
    from capotune import methods
    from capotune.runs.resume import resume
    from capotune.runs.run import run
    from capotune.settings import TrainSettings, build


def main() -> int:
    """The process; returns its exit code."""
    ignore_requests()
    events, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the events

    def write(values: dict[str, Any]) -> None:
        try:
            print(json.dumps(values), file=events, flush=True)
        except BrokenPipeError:  # nobody reads any more
            raise KeyboardInterrupt from None

    def report(event: Event) -> None:
        write(to_json(event))

    heed_sigterm()
    lose_no_signal()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sys.path[:0] = [path for path in request["path"] if path not in sys.path]
    for module in request["modules"]:  # they register methods and tasks of the caller's
        import_module(module)
    try:
        settings = build(TrainSettings, request["settings"])
        with asked_by_signal(lambda: request_checkpoint(settings.out)):
            _run_or_resume(settings, request, report)
    except CapotuneError as error:
        write({"error": type(error).__name__, **error.parts()})
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run_or_resume(settings: TrainSettings, request: dict[str, Any], report: Reporter) -> None:
    """Go on with the run where there is one, once the process of a comparison that was killed has left its folder."""
    wait_for_its_end(settings.out, request["patience"])
    if not (settings.out / RUN).exists():
        method = build(methods.get(request["method"]).Settings, request["method_settings"])
        run(settings, method, report, base_score=request["base_score"], given=request["given"])
        return
    given = {"data": settings.data, "test": settings.test}
    rows = {name: value for name, value in given.items() if isinstance(value, MemoryTable)}
    trusted = settings.trust_remote_code
    resume(settings.out, report, rows=rows, trust_remote_code=trusted)


def _end_with_the_parent() -> None:
    """Nothing more comes on standard input: its end tells that the process that compares has ended, however it did."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    atexit.register(gc.freeze)  # as in a command (cli/main.py)
    raise SystemExit(main())
