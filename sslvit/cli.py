"""The command line of a program: flags on top of a preset; an error as one sentence and an exit code."""

import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from typing import Any, NoReturn, TypeVar

import tyro

from sslvit.config import RENAMED, RENAMED_BUDGET, TrainConfig
from sslvit.errors import BAD_CONFIGURATION, CANNOT_WRITE, INTERNAL, Error, Preempted, shortened
from sslvit.processes import collectives, launcher, signals

Chosen = TypeVar("Chosen", bound=TrainConfig)
Options = TypeVar("Options")


def parse(kind: type[Options], default: Options | None = None, args: Sequence[str] | None = None) -> Options:
    """A configuration from the command line. Options that were renamed work by their old names too, and say so."""
    args = sys.argv[1:] if args is None else args
    return tyro.cli(kind, default=default, args=with_new_names(args))


def choose(presets: Mapping[str, Chosen], words: Sequence[str] | None = None) -> Chosen:
    """The preset named on the command line, by default the first, with the other flags on top of it; checked.

    Of --lr and --base_lr the one on the command line wins over the other in the preset.
    """
    first = next(iter(presets.values()))
    lr, base_lr = typed("lr", words), typed("base_lr", words)
    config = parse(type(first), presets.get(typed(first.chosen_by, words), first), words)
    if base_lr and not config.base_lr > 0:
        raise ValueError(f"--base_lr is {config.base_lr:g}; it must be above 0")
    if base_lr and lr and config.lr:
        raise ValueError(
            f"--base_lr {config.base_lr:g} and --lr {config.lr:g} both set the learning rate: give --lr, the rate "
            "itself, or --base_lr, the rate per 256 images of a batch"
        )
    config = (replace(config, lr=0.0) if base_lr else config).with_rate()
    config.check()
    return config


def typed(flag: str, words: Sequence[str] | None = None) -> str:
    """The value of a flag on the command line itself, or nothing."""
    alone = make_dataclass("Alone", [(flag, str, field(default=""))])
    known, _ = tyro.cli(alone, args=words, return_unknown_args=True, add_help=False)
    return getattr(known, flag)


def with_new_names(words: Sequence[str]) -> list[str]:
    """Options that were renamed, and --budget operations, as they are called now."""
    renamed = [with_new_name(word) for word in words]
    for i, word in enumerate(renamed):
        flag, equals, value = word.partition("=")
        if flag == "--budget" and value in RENAMED_BUDGET:
            renamed[i] = f"{flag}{equals}{RENAMED_BUDGET[value]}"
        elif word in RENAMED_BUDGET and i and renamed[i - 1] == "--budget":
            renamed[i] = RENAMED_BUDGET[word]
    return renamed


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


# What a machine lacks, by the messages of Python, torch and CUDA.
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


@signals.command()
def run_cli(
    main: Callable[..., Any],
    options: type | Mapping[str, Any] | None = None,
) -> None:
    """Runs a program, whose errors become one sentence and an exit code; SSLVIT_TRACEBACK=1 shows where they came from.

    options: the class of main's configuration, or its presets by name, of which the first is the default; without, main
    takes no argument. Of several processes each ends here.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files and classes may have what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        _run(main, options)
    except SystemExit as end:
        if collectives.processes() == 1:
            raise
        if isinstance(end.code, str):
            _print(end.code)
        collectives.end_process(end.code if isinstance(end.code, int) else int(end.code is not None))
    if collectives.processes() > 1:
        collectives.end_process(0)


def _run(main: Callable[..., Any], options: type | Mapping[str, Any] | None) -> None:
    try:
        main(*configurations(options))
        if sys.stdout:  # None where it was closed before we began
            sys.stdout.flush()
    except SystemExit as end:
        sys.exit(BAD_CONFIGURATION if end.code == 2 else end.code)  # the command line's parser says 2
    except KeyboardInterrupt:
        _print("stopped: interrupted")
        sys.exit(128 + signal.SIGINT)
    except (Error, ValueError) as error:
        sentence = f"{'stopped' if isinstance(error, Preempted) else 'error'}: {in_a_line(error)}"
        _stop(sentence, error.code if isinstance(error, Error) else BAD_CONFIGURATION)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            sys.exit(128 + signal.SIGPIPE)
        if lacks := lacking(error):
            _stop(f"error: {lacks}", INTERNAL)
        cannot_write = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
        where = f"{error.filename}: " if error.filename else ""
        _print(f"error: {where}{error.strerror or in_a_line(error)}")
        traceback.print_exc()
        sys.exit(CANNOT_WRITE if cannot_write else INTERNAL)
    except Exception as error:
        if lacks := lacking(error):
            _stop(f"error: {lacks}", INTERNAL)
        what = f"{type(error).__name__}: {in_a_line(error)[:500]}"
        _print(f"error: {what}. This is unexpected; please report it with this traceback:")
        traceback.print_exc()
        sys.exit(INTERNAL)


def configurations(options: type | Mapping[str, Any] | None) -> list[Any]:
    """The arguments of main."""
    if options is None:
        return []
    return [parse(options) if isinstance(options, type) else choose(options)]


def lacking(error: Exception) -> str:
    """What the machine lacks, if that is what an error is about, with the error's own words."""
    message = in_a_line(error).strip() or type(error).__name__
    for pattern, sentence in LACKS.items():
        if re.search(pattern, message, re.I) or (isinstance(error, MemoryError) and "memory" in pattern):
            return f"{sentence}. The error was: {type(error).__name__}: {message.splitlines()[0][:300]}"
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


def _output_is_closed() -> bool:
    """Whether the broken pipe is our output, whose reader, `head` for one, has ended. If not, an empty line is lost."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it when it ends
        return True
    except ValueError:  # it was closed here
        return False
    return False


def _stop(sentence: str, code: int) -> NoReturn:
    _print(sentence)
    if os.environ.get("SSLVIT_TRACEBACK"):
        traceback.print_exc()
    launcher.repeat_after_it(sentence)
    sys.exit(code)


def _print(text: str) -> None:
    for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else ():
        bar.close()  # which ends its line
    print(text, file=sys.stderr, flush=True)
