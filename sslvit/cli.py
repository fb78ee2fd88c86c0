"""What a recipe is told, and what it answers: flags on top of a preset; an error as one sentence and an exit code."""

import errno
import io
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import field, make_dataclass, replace
from typing import NoReturn, TypeVar

import tyro

from sslvit.config import RENAMED, TrainConfig
from sslvit.errors import BAD_CONFIGURATION, CANNOT_WRITE, INTERNAL, Preempted, Stop, shortened
from sslvit.processes import launcher

Chosen = TypeVar("Chosen", bound=TrainConfig)
Options = TypeVar("Options")


def choose(presets: dict[str, Chosen], by: str = "preset") -> Chosen:
    """The first preset is what is trained where the flag --preset (or `by`) names none.

    Of --lr and --base_lr the one on the command line wins over the other in the preset; a base rate is for each 256
    images of a batch.
    """
    first = next(iter(presets))
    given = {rate: typed(rate) for rate in ("lr", "base_lr")}
    config = parse(type(presets[first]), default=presets.get(typed(by), presets[first]))
    if given["base_lr"] and not config.base_lr > 0:
        raise ValueError(f"--base_lr is {config.base_lr:g}; it must be above 0")
    if given["base_lr"] and given["lr"] and config.lr:
        raise ValueError(
            f"--base_lr {config.base_lr:g} and --lr {config.lr:g} are both given: --lr is the rate itself, --base_lr "
            "that for each 256 images of a batch; give one of them"
        )
    base = config.base_lr * config.batch_size / 256
    config = replace(config, lr=base if given["base_lr"] else config.lr or base)
    config.check()
    return config


def parse(kind: type[Options], default: Options | None = None, args: list[str] | None = None) -> Options:
    """A configuration from the command line. Options that were renamed work by their old names too, and say so."""
    words = sys.argv[1:] if args is None else args
    return tyro.cli(kind, default=default, args=[with_new_name(word) for word in words])


def with_new_name(word: str) -> str:
    """--drop=0.5 as --mask_ratio=0.5."""
    flag, equals, value = word.partition("=")
    negated = flag.startswith(("--no-", "--no_")) and flag not in ("--no_weight_decay", "--no-weight-decay")
    old = flag[5:] if negated else flag[2:]
    new = RENAMED.get(old.replace("-", "_")) if flag.startswith("--") else None
    if new is None:
        return word
    renamed = f"--{'no-' if negated else ''}{new}"
    print(f"note: {flag} is now {renamed}; the old name works in this version only", file=sys.stderr)
    return f"{renamed}{equals}{value}"


def typed(flag: str) -> str:
    """What the command line itself gives a flag, or nothing."""
    alone = make_dataclass("Alone", [(flag, str, field(default=""))])
    return getattr(tyro.cli(alone, return_unknown_args=True, add_help=False)[0], flag)


def typed_model(config: TrainConfig) -> str:
    """The --model that was typed: beside --init_from it must be the model that is there, while a preset's gives way.
    Of a run that is resumed nothing: that its settings are the old ones is checked elsewhere."""
    return "" if config.resume and (config.out / "checkpoints").exists() else typed("model")


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


def run_cli(main: Callable[[], None]) -> None:
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
        what = f"{type(error).__name__}: {in_a_line(error)[:500]}"
        _say(f"error: {what}. This is unexpected; please report it with this traceback:")
        traceback.print_exc()
        sys.exit(INTERNAL)


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
