"""Signals that ask a run to stop: after its step, once it has saved; and at once where there is nothing to save, or
while it waits for images, since no step is under way then."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

from sslvit.errors import Preempted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
ONCE = 1.0  # seconds within which launchers and schedulers repeat a signal that they mean once


class Interrupted(BaseException):
    """Asked to stop while waiting. Not an Exception, or a reader of images would take it for a bad file."""


class _State:
    """One for the process, since signals are the process's."""

    number, first = 0, 0.0  # the signal that was received, and when
    stepping = saving = waiting = False
    resumable = True
    until_the_end: ExitStack | None = None  # of a command


@contextmanager
def command() -> Iterator[None]:
    """In its `with` block the process is a command's: what `listen` changes stays so until the command ends."""
    before = _State.until_the_end
    with ExitStack() as _State.until_the_end:
        try:
            yield
        finally:
            _State.until_the_end = before


def is_command() -> bool:
    return _State.until_the_end is not None


def listen(*, resumable: bool = True) -> None:
    """In a command: handles signals from here on. Before the first step, between runs and after the last one a signal
    raises Preempted: all results are on the disk. resumable: whether --resume has something to continue."""
    if _State.until_the_end is not None:
        _State.until_the_end.enter_context(_handlers(resumable))


@contextmanager
def listening(*, resumable: bool = True) -> Iterator[None]:
    """Handles signals in its `with` block, and in a command until it ends."""
    if is_command():
        listen(resumable=resumable)
        yield
        return
    with _handlers(resumable):
        yield


@contextmanager
def _handlers(resumable: bool) -> Iterator[None]:
    """In its `with` block; then signals do what they did before. In another thread than the main one this does nothing:
    it cannot handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.resumable = resumable  # what was received stays: a block may begin while a stop is on its way
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python
        if _on_signal not in before.values():  # else what was received is still on its way out
            _State.number = 0


def _on_signal(number: int, frame: Any) -> None:
    now = time.monotonic()
    if not _State.number:
        _State.number, _State.first = number, now
        if not _State.stepping:
            raise _preempted()
        _raise_if_waiting()
    # A repeated signal of the same kind means: stop now. One of another kind comes from a launcher that died of it.
    elif number == _State.number and now - _State.first > ONCE and not _State.saving:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)


def _preempted() -> Preempted:
    if not _State.resumable:
        return Preempted("asked to stop; nothing was trained, and the same command starts again")
    return Preempted("asked to stop; the same command with --resume continues from what was saved")


def stop_requested() -> bool:
    return bool(_State.number)


@contextmanager
def _within(flag: Literal["stepping", "saving", "waiting"]) -> Iterator[None]:
    try:
        setattr(_State, flag, True)
        yield
    finally:
        setattr(_State, flag, False)


def stepping() -> AbstractContextManager[None]:
    """In its `with` block a signal only sets `stop_requested`, which the loop reads after each step."""
    return _within("stepping")


@contextmanager
def between_steps() -> Iterator[None]:
    """In its `with` block a signal ends the process by Preempted, also inside that of `stepping`."""
    if _State.number:
        raise _preempted()
    before, _State.stepping = _State.stepping, False
    try:
        yield
    finally:
        _State.stepping = before


def saving() -> AbstractContextManager[None]:
    """In its `with` block not even a second signal ends the process."""
    return _within("saving")


@contextmanager
def waiting() -> Iterator[None]:
    """In its `with` block a signal raises Interrupted, also one that came before."""
    with _within("waiting"):
        if _State.number and _State.stepping:
            _raise_if_waiting()
        yield


def _raise_if_waiting() -> None:
    if _State.waiting:
        _State.waiting = False  # once: the cleaning up after it must not be interrupted
        raise Interrupted


def ignore_signals_in_worker() -> None:
    """In a loader's worker: a signal to all processes of a run is for the run itself, which saves and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where a worker cannot tell whose signal it is, and ends by any
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def end_for_the_parent() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_for_the_parent, daemon=True).start()
