"""What a function that is called from Python takes back when it returns or raises."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data._utils import signal_handling

from sslvit.processes import collectives, signals

STATES = (PartialState, AcceleratorState, GradientState)  # Accelerate's, one each for the process
NUMBERS = (*signals.SIGNALS, signal.SIGCHLD)


@contextmanager
def without_trace() -> Iterator[None]:
    """After its `with` block signal handlers, environment variables, torch's threads and random generator, and
    Accelerate's state are as before. Accelerate begins anew in it, so that each call may have its own precision.

    The group of several processes stays, and with it what Accelerate knows of it: a group cannot be made twice.
    """
    if signals.is_command():
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # torch's loaders draw from it
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(_restore_accelerate, [dict(state._shared_state) for state in STATES])
        stack.callback(collectives.restore_launch, collectives.launch())
        if threading.current_thread() is threading.main_thread():
            # With its handler goes torch's note that it was set, so that a loader of the caller's sets it again.
            stack.callback(setattr, signal_handling, "_SIGCHLD_handler_set", signal_handling._SIGCHLD_handler_set)
            for number in NUMBERS:
                stack.callback(_restore_handler, number, signal.getsignal(number))
        _restore_accelerate([{}, {}, {}])
        yield


def _restore_handler(number: int, handler: Any) -> None:
    if handler is not None and signal.getsignal(number) is not handler:  # None: it was not set by Python
        signal.signal(number, handler)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _restore_accelerate(before: list[dict[str, Any]]) -> None:
    kept = int(collectives.processes() > 1)  # the first, of the processes
    for state, values in zip(STATES[kept:], before[kept:], strict=True):
        state._shared_state.clear()
        state._shared_state.update(values)
