"""Signals that end a process: what must not be cut in two, and what Python would lose."""

from __future__ import annotations

import signal
import sys
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from capotune.errors import OutputError

__all__ = ["asked_by_signal", "heed_sigterm", "ignore_requests", "lose_no_signal", "uninterrupted"]

_ENDING = (signal.SIGINT, signal.SIGTERM)


def heed_sigterm() -> None:
    """From now on SIGTERM raises ``KeyboardInterrupt``, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)


@contextmanager
def asked_by_signal(ask: Callable[[], object]) -> Iterator[None]:
    """Inside, SIGUSR1 calls ``ask``, where the system has that signal and this is the main thread, which alone gets
    it. What ``ask`` cannot do ends nothing."""

    def asked(_number: int, _frame: object) -> None:
        with suppress(OutputError):
            ask()

    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, asked)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def ignore_requests() -> None:
    """From now on SIGUSR1 does nothing, outside of ``asked_by_signal``; by default it would end the process."""
    if sys.platform != "win32":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def lose_no_signal() -> None:
    """From now on a signal that comes while a destructor runs is not lost; for a process that runs one command."""
    sys.unraisablehook = _interrupt_again


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM wait for the end of the block. Elsewhere than in the main thread, which alone gets
    them, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {number: handler for number in _ENDING if (handler := signal.getsignal(number)) is not None}
    try:
        for ending in before:
            signal.signal(ending, lambda number, _frame: waiting.append(number))
        yield
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)
        for number in dict.fromkeys(waiting):
            signal.raise_signal(number)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """Python drops an exception that a destructor raises, also the ``KeyboardInterrupt`` of a signal that came while
    one ran: send it once more, when that one has returned."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as a shell starts its background jobs
        threading.Timer(0.01, _signal_main_thread, [signal.SIGTERM if deaf else signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(lost)


def _signal_main_thread(number: signal.Signals) -> None:
    if sys.platform == "win32":
        interrupt_main(number)
    else:  # that would not wake a thread that waits
        signal.pthread_kill(threading.main_thread().ident or 0, number)
