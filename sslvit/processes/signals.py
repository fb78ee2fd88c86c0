"""Signals that ask a run to stop: after its step, when it has saved; and at once where there is nothing to save, or
where images are awaited, since no step is under way then."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sslvit.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONCE = 1.0  # seconds in which launchers and schedulers send again what they mean once


class Interrupted(BaseException):
    """Asked to stop while waiting. No Exception, or whoever reads images would take it for a bad file of theirs."""


class _Asked:
    """The process has one: signals are its own."""

    number, first = 0, 0.0
    stepping = saving = waiting = False
    goes_on = True


def listen(*, goes_on: bool = True) -> None:
    """From here on. Before the first step, between runs and after the last one a signal ends the process by Preempted:
    what is worth keeping is on the disk. goes_on: whether there is something that --resume goes on with."""
    _Asked.number, _Asked.goes_on = 0, goes_on
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _on_signal)


def _on_signal(number: int, frame: Any) -> None:
    now = time.monotonic()
    if not _Asked.number:
        _Asked.number, _Asked.first = number, now
        if not _Asked.stepping:
            if not _Asked.goes_on:
                raise Preempted("asked to stop; nothing was trained, and the same command begins again")
            raise Preempted("asked to stop; what was saved is kept, and the same command with --resume goes on from it")
        _raise_if_waiting()
    # A launcher that dies of the signal sends another one: only the same one again is somebody's impatience.
    elif number == _Asked.number and now - _Asked.first > ONCE and not _Asked.saving:
        sys.exit(128 + number)


def stop_requested() -> bool:
    return bool(_Asked.number)


@contextmanager
def stepping() -> Iterator[None]:
    """Signals wait for who asks about them, after each step."""
    _Asked.stepping = True
    try:
        yield
    finally:
        _Asked.stepping = False


@contextmanager
def waiting() -> Iterator[None]:
    """A signal raises Interrupted in here, also one that came before."""
    try:
        _Asked.waiting = True
        if _Asked.number and _Asked.stepping:
            _raise_if_waiting()
        yield
    finally:
        _Asked.waiting = False


def _raise_if_waiting() -> None:
    if _Asked.waiting:
        _Asked.waiting = False  # once: what clears up after it is not to be interrupted
        raise Interrupted


@contextmanager
def saving() -> Iterator[None]:
    """Not even a second signal ends the process in here."""
    _Asked.saving = True
    try:
        yield
    finally:
        _Asked.saving = False


def ignore_signals_in_worker() -> None:
    """In a loader's worker: who signals all processes of a run means the run, which saves and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def end_for_the_parent() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_for_the_parent, daemon=True).start()
