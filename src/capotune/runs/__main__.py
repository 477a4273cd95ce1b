"""One technique in a process of its own, for ``compare``: its peak memory is then its own.

It reads one JSON object of settings from standard input and writes one JSON object per event to standard output.
"""

from __future__ import annotations

import json
import sys

from capotune.device import collector_at_rest
from capotune.errors import CapotuneError
from capotune.settings import TrainSettings, build, method_class

with collector_at_rest():
    from capotune.runs.run import run
    from capotune.runs.task_run import Event


def main() -> int:
    """The process; returns its exit code."""
    events, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the events

    def report(event: Event) -> None:
        print(json.dumps(event), file=events, flush=True)

    request = json.load(sys.stdin)
    try:
        method = build(method_class(request["method"]), request["method_settings"])
        run(build(TrainSettings, request["settings"]), method, report, base_score=request["base_score"])
    except CapotuneError as error:
        report({"kind": "error", "text": str(error)})
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
