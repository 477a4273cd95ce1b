"""One technique in a process of its own, for ``compare``: its peak memory is then its own.

It reads one JSON object, the request, from standard input and writes one JSON object per event to standard output.
"""

from __future__ import annotations

import atexit
import gc
import json
import sys
from importlib import import_module
from typing import Any

from capotune.device import collector_at_rest
from capotune.errors import CapotuneError
from capotune.events import Event, to_json

with collector_at_rest():
    from capotune import methods
    from capotune.runs.run import run
    from capotune.settings import TrainSettings, build


def main() -> int:
    """The process; returns its exit code."""
    events, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the events

    def write(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=events, flush=True)

    def report(event: Event) -> None:
        write(to_json(event))

    request = json.load(sys.stdin)
    sys.path[:0] = [path for path in request["path"] if path not in sys.path]
    for module in request["modules"]:  # they register methods and tasks of the caller's
        import_module(module)
    try:
        method = build(methods.get(request["method"]).Settings, request["method_settings"])
        run(build(TrainSettings, request["settings"]), method, report, base_score=request["base_score"])
    except CapotuneError as error:
        write({"error": type(error).__name__, **error.parts()})
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    atexit.register(gc.freeze)  # as in a command (cli/main.py)
    raise SystemExit(main())
