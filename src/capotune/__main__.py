"""The process of ``capo``, which is also ``python -m capotune``."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> int:
    """Import the command line and run it; returns the exit code. Ctrl-C ends it at any time with one line."""
    try:
        before = signal.getsignal(signal.SIGINT)
        if before != signal.SIG_IGN:  # as a shell starts its background jobs
            signal.signal(signal.SIGINT, _stop)  # a ``KeyboardInterrupt`` in an import may be printed and dropped
        from capotune.cli import main as run

        signal.signal(signal.SIGINT, before)
        return run()
    except KeyboardInterrupt:
        _stop()


def _stop(*_: object) -> NoReturn:
    """End the process, which has not begun anything yet."""
    os.write(2, b"\ncapo: stopped.\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
