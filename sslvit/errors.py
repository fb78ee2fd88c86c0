"""What stops a run, in one sentence, and the exit code that says it to a script."""

import errno
import io
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from sslvit import launcher

LONGEST = 2000  # characters of a message

DONE, DIVERGED, BAD_DATA, NO_INPUT, INTERNAL, CANNOT_WRITE, PREEMPTED, BAD_CONFIGURATION = 0, 3, 65, 66, 70, 73, 75, 78


# What a machine lacks, by what Python, torch and CUDA say of it.
LACKS = {
    r"out of memory|can't allocate memory|cannot allocate memory": (
        "no memory is left. A smaller --batch_size needs less, and so do --accumulation, --grad_checkpointing and, on "
        "a GPU, --precision bf16 with the same one; of main memory also fewer --workers"
    ),
    r"too many open files|received 0 items of ancdata": (
        "the limit of open files is reached: raise it with `ulimit -n 65536` in the shell that starts the run, or give "
        "fewer --workers"
    ),
    r"can't start new thread|resource temporarily unavailable": (
        "the system allows no more threads or processes: see `ulimit -u`, a container's limit of pids (docker run "
        "--pids-limit), or give fewer --workers"
    ),
    r"eaddrinuse|address already in use": (
        "another program, perhaps another run, has the port through which the processes meet: start with another "
        "--master_port (torchrun) or --main_process_port (accelerate launch)"
    ),
    r"driver on your system is too old|no kernel image is available|driver version is insufficient": (
        "this torch does not fit the GPU or its driver: `python -m sslvit doctor` names both; install the torch that "
        "pytorch.org offers for this driver"
    ),
}


class Stop(Exception):
    """A run cannot go on, and the message says why and what to do. Plain ValueErrors are bad configurations."""

    code = INTERNAL

    def __str__(self) -> str:
        return shortened(super().__str__())


class Diverged(Stop):
    """Training left the numbers, or its features collapsed."""

    code = DIVERGED


class DataError(Stop, ValueError):
    """Data that cannot be used."""

    code = BAD_DATA


class NoInput(DataError):
    """There is no data where we were told to look."""

    code = NO_INPUT


class CannotWrite(Stop, OSError):
    """Output cannot be written, or belongs to another run."""

    code = CANNOT_WRITE


class Preempted(Stop):
    """A signal asked us to stop, and everything was saved."""

    code = PREEMPTED


def at_the_door(main: Callable[[], None]) -> None:
    """Runs a recipe: what stops it is one sentence and an exit code; SSLVIT_TRACEBACK=1 shows where it came from."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files and classes may have what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout:  # None where it was closed before we began
            sys.stdout.flush()
    except SystemExit as end:
        sys.exit(BAD_CONFIGURATION if end.code == 2 else end.code)  # the command line's parser says 2
    except KeyboardInterrupt:
        _say("stopped: interrupted")
        sys.exit(128 + signal.SIGINT)
    except (Stop, ValueError) as error:
        sentence = f"{'stopped' if isinstance(error, Preempted) else 'error'}: {in_a_line(error)}"
        _stop(sentence, error.code if isinstance(error, Stop) else BAD_CONFIGURATION)
    except OSError as error:
        if error.errno == errno.EPIPE and _nobody_reads():
            sys.exit(128 + signal.SIGPIPE)
        if lacks := lacking(error):
            _stop(f"error: {lacks}", INTERNAL)
        cannot_write = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror or in_a_line(error)}")
        traceback.print_exc()
        sys.exit(CANNOT_WRITE if cannot_write else INTERNAL)
    except Exception as error:
        if lacks := lacking(error):
            _stop(f"error: {lacks}", INTERNAL)
        _say(f"error: {type(error).__name__}: {in_a_line(error)[:500]}. Nobody foresaw this here; it came from:")
        traceback.print_exc()
        sys.exit(INTERNAL)


def shortened(text: str) -> str:
    """The beginning and the end, where the way out stands, of a text that quotes a file at length."""
    left_out = len(text) - LONGEST
    return text if left_out <= 0 else f"{text[: LONGEST // 2]} ({left_out:,} characters) {text[-LONGEST // 2 :]}"


def lacking(error: Exception) -> str:
    """A sentence about what the machine lacks, if that is what an error is about; with what was said of it."""
    said = in_a_line(error).strip() or type(error).__name__
    for pattern, sentence in LACKS.items():
        if re.search(pattern, said, re.I) or (isinstance(error, MemoryError) and "memory" in pattern):
            return f"{sentence}. The error was: {type(error).__name__}: {said.splitlines()[0][:300]}"
    return ""


def in_a_line(error: Exception) -> str:
    """Its message; of one that torch brings from a loader's worker, with all of its traceback, the last line."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return shown(shortened(text))


def shown(text: str) -> str:
    """Without control characters, which could rewrite a terminal: they come from names of files and classes."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _nobody_reads() -> bool:
    """Whether what read our output, `head` for one, has gone."""
    poll = select.poll()
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # it is something else, in a notebook for one
        return False
    poll.register(output, 0)
    if gone := any(event & select.POLLERR for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # or Python complains of it when it ends
    return gone


def _stop(sentence: str, code: int) -> NoReturn:
    _say(sentence)
    if os.environ.get("SSLVIT_TRACEBACK"):
        traceback.print_exc()
    launcher.repeat_after_it(sentence)
    sys.exit(code)


def _say(text: str) -> None:
    for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else ():
        bar.close()  # which ends its line
    print(text, file=sys.stderr, flush=True)
