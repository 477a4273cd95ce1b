"""``capo`` as a process that dies, or whose disk fills up, at a chosen moment. ``soak.py`` starts it.

The first argument is a ``Moment`` as JSON, the others are those of ``capo``. Files are watched from below: Python tells
an audit hook of every file that is opened, made, renamed and removed, in whichever thread.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PLACES = {
    "/checkpoints": "checkpoint", "/adapter": "final save", "/predictions.jsonl": "final save",
    "/test_rows.json": "final save", "/run.json": "record", "/metrics.jsonl": "log", "/activations": "cached states",
    "/models": "conversion", "/hashes": "hashes",
}  # fmt: skip
"""Kinds of changes on the disk, by what stands in their paths; of all others the kind is ``folder``."""
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Moment:
    """The ``number``-th (from 1) of a kind; 0: never."""

    roots: tuple[str, ...]
    """Folders whose files count."""
    note: str
    """A file: what was done last, and how often each kind came."""
    kind: str = "change"
    """``change``: one on the disk, or one of a kind in ``PLACES``; ``step``: an update of the weights; ``evaluation``:
    a scoring of the held-out rows."""
    number: int = 0
    deed: str = "kill"
    """``kill``: SIGKILL, of a comparison and its technique at work. ``kill the parent``: of the comparison alone.
    ``full``: from then on nothing new is written, ENOSPC."""

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


@dataclass
class Watch:
    """Counts what comes, and does the deed when it is time."""

    moment: Moment
    counts: dict[str, int] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)
    asleep: bool = False
    first: int = field(default_factory=os.getpid)
    """The process of the command."""

    def come(self, what: str, *kinds: str) -> None:
        """Something of these kinds is about to be done."""
        with self.lock:
            if self.asleep:
                return
            for kind in kinds:
                self.counts[kind] = self.counts.get(kind, 0) + 1
            moment = self.moment
            if not moment.number or moment.kind not in kinds or self.counts[moment.kind] < moment.number:
                return
            if moment.deed != "full":
                self.note(what)
                self.asleep = True
                alone = moment.deed == "kill the parent"
                for process in (self.first,) if alone else dict.fromkeys((self.first, os.getpid())):
                    os.kill(process, signal.SIGKILL)
                return
            if what.split()[0] in ("open", "os.mkdir", "fsync"):
                self.note(what)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what.split(maxsplit=1)[1])

    def note(self, what: str) -> None:
        """Write down what is done now, and what there was before."""
        self.asleep = True
        known = {"what": what, "counts": self.counts, "process": os.getpid()}
        Path(self.moment.note).write_text(json.dumps(known), encoding="utf-8")
        self.asleep = False

    def hook(self, event: str, given: tuple[Any, ...]) -> None:
        """Python's audit hook."""
        if event == "open":
            path, _, flags = given
            if isinstance(path, str) and isinstance(flags, int) and flags & _WRITES:
                self.change(event, path)
        elif event in _CHANGES and isinstance(given[0], (str, os.PathLike)):
            self.change(event, os.fspath(given[0]))

    def change(self, event: str, path: str) -> None:
        """A file is about to be changed."""
        whole = os.path.abspath(path)  # noqa: PTH100 - a Path would ask the disk
        root = next((root for root in self.moment.roots if whole.startswith(root)), None)
        if root is not None:
            kind = next((kind for part, kind in PLACES.items() if part in whole.removeprefix(root)), "folder")
            self.come(f"{event} {whole}", "change", kind)

    def synced(self, handle: int) -> None:
        """Stands for ``os.fsync``; that the disk has it all is not what is tested."""
        self.change("fsync", str(Path(f"/proc/self/fd/{handle}").readlink()))


def take_streams() -> None:
    """After a fork, use what the standard streams' numbers stand for now."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


_POPEN: Any = next(one for one in subprocess.Popen.__mro__ if one.__module__ == "subprocess")
"""Not what the tests may have put in its place."""


class Forked(_POPEN):  # type: ignore[misc]
    """``subprocess.Popen`` whose techniques of a comparison are forked from this process, which has imported all."""

    def _execute_child(self, *given: Any, **named: Any) -> None:
        start = super()._execute_child
        asked = inspect.signature(start).bind(*given, **named).arguments
        if list(asked["args"][1:]) != ["-m", "capotune.runs"]:
            start(*given, **named)
            return
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            for number, file in enumerate((asked["p2cread"], asked["c2pwrite"], asked["errwrite"])):
                os.dup2(file, number)
            os.closerange(3, 64)
            take_streams()
            from capotune.runs.__main__ import main as technique

            os._exit(technique())
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[pipe] for pipe in pipes))


def main() -> int:
    """``capo`` with the watch."""
    values = json.loads(sys.argv.pop(1))
    watch = Watch(Moment(**values | {"roots": tuple(values["roots"])}))
    from capotune.cli import main as capo
    from capotune.engine import recorded
    from capotune.engine.optimizer import FlatAdamW

    step, score = FlatAdamW.step, recorded.held_out_score

    def counted_step(self: FlatAdamW, *given: Any) -> Any:
        watch.come("step", "step")
        return step(self, *given)

    def counted_score(*given: Any) -> Any:
        watch.come("score", "evaluation")
        return score(*given)

    FlatAdamW.step, recorded.held_out_score = counted_step, counted_score  # type: ignore[method-assign]
    os.fsync = watch.synced  # type: ignore[assignment]
    subprocess.Popen = Forked  # type: ignore[misc]
    sys.addaudithook(watch.hook)
    try:
        return capo()
    finally:
        watch.note("end")
