"""Processes of Capotune that start warm: forked from one that has imported the program already.

Importing PyTorch and Transformers is most of what a process does that trains a tiny model, and the tests start some
sixty of them. ``Popen`` is ``subprocess.Popen``, but a comparison's techniques, and programs that begin with ``WARM``,
are forked from a server, one for each process of the tests. All else is as in a process started anew: arguments,
folder, environment, files, signals, exit. What needs another environment than the tests' own is started anew, and so is
what the installed wheel runs.
"""

from __future__ import annotations

import array
import ctypes
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

WARM = "# Capotune is imported already.\n"
"""How a program for ``python -c`` begins that may start warm."""
CAPO = WARM + (
    "import signal, sys; from capotune.cli import main\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it\n"
    "sys.exit(main())"
)
"""``capo`` for ``python -c``, started as from a terminal."""
TECHNIQUE = "capotune.runs"
"""What a comparison starts by ``python -m``."""
IMPORTED = (
    "capotune.api", "capotune.cli", "capotune.runs.__main__", "pandas", "scipy.stats", "sklearn.metrics", "tyro",
    "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
READ_LATE = {"CAPOTUNE_CACHE", "PYTEST_CURRENT_TEST", "TMPDIR", "HOME", "TERM", "COLUMNS", "LINES", "NO_COLOR",
             "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}  # fmt: skip
"""Variables of the environment that nothing reads while it is imported, or that an import sets: in these a process may
differ."""
COLD = subprocess.Popen
PR_SET_CHILD_SUBREAPER = 36


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen``, whose known commands are forked from the server. A child of this process all the same: the
    parent that forked it ends at once, and this process adopts it."""

    def _execute_child(self, *given: Any, **named: Any) -> None:
        start = super()._execute_child  # type: ignore[misc]
        asked = inspect.signature(start).bind(*given, **named).arguments
        environment = dict(os.environ if asked["env"] is None else asked["env"])
        request = _known(asked["args"])
        if request is None or asked["preexec_fn"] or sys.platform != "linux" or not _as_imported(environment):
            start(*given, **named)
            return
        request |= {"folder": str(asked["cwd"] or Path.cwd()), "environment": environment}
        request["session"] = asked["start_new_session"]
        files = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
        self.pid = _server().start(request, [number if file < 0 else file for number, file in enumerate(files)])
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[pipe] for pipe in pipes))  # type: ignore[attr-defined]


def _known(command: Sequence[str]) -> dict[str, Any] | None:
    """What to do after the fork: the ``-W`` options, the program, its arguments; None for any other command."""
    if isinstance(command, str) or command[0] != sys.executable:
        return None
    rest, options = list(command[1:]), []
    while rest[:1] == ["-W"]:
        options.append(rest[1])
        rest = rest[2:]
    known = rest[:2] == ["-m", TECHNIQUE] or (rest[:1] == ["-c"] and rest[1].startswith(WARM))
    return {"options": options, "program": rest[1], "arguments": rest[2:]} if known else None


def _as_imported(environment: dict[str, str]) -> bool:
    """Whether the server's imports are those that a process with this environment would make."""
    names = (set(environment) | set(_server().environment)) - READ_LATE
    return all(environment.get(name) == _server().environment.get(name) for name in names)


class _Server:
    """The tests' end of the server's socket. The server ends when the tests do."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self.process = COLD(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def start(self, request: dict[str, Any], files: list[int]) -> int:
        """Fork a process with these three files; its number."""
        body = json.dumps(request).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
        self.socket.sendmsg([len(body).to_bytes(8, "big")], rights)
        self.socket.sendall(body)
        answer = self.socket.recv(8, socket.MSG_WAITALL)
        assert len(answer) == 8, "the server of warm processes ended"
        return int.from_bytes(answer, "big")


@cache
def _server() -> _Server:
    return _Server()


# ------------------------------------------------------------------------------------------------- the server's side


def serve(connection: socket.socket) -> dict[str, Any]:
    """Answer requests until the tests end. Returns in each forked process, with what it is to do."""
    size = array.array("i").itemsize
    while True:
        head, rights, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * size))
        if not head:
            os._exit(0)
        request: dict[str, Any] = json.loads(connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
        files = array.array("i", rights[0][2])
        read, write = os.pipe()
        parent = os.fork()
        if not parent:
            child = os.fork()
            if child:
                os.write(write, child.to_bytes(8, "big"))
                os._exit(0)  # the tests' process adopts the child
            for number, file in enumerate(files):
                os.dup2(file, number)
            for file in (read, write, connection.detach(), *files):
                os.close(file)
            return request
        os.waitpid(parent, 0)
        connection.sendall(os.read(read, 8))
        for file in (read, write, *files):
            os.close(file)


def become(request: dict[str, Any]) -> None:
    """Do what the process was started for, as if it had begun here."""
    if request["session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for option in request["options"]:
        action, message, category = option.split(":")
        warnings.filterwarnings(action, message, {"ResourceWarning": ResourceWarning}[category])  # type: ignore[arg-type]
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv, sys.path[0] = ["-c", *request["arguments"]], ""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["program"] == TECHNIQUE:
        del sys.modules[f"{TECHNIQUE}.__main__"]
        runpy.run_module(TECHNIQUE, run_name="__main__", alter_sys=True)
    else:
        exec(request["program"], {"__name__": "__main__"})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the keyboard: the tests end this process
    for module in IMPORTED:
        import_module(module)
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
