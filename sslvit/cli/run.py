"""Runs a program from the command line: its help, an error as one sentence and an exit code."""

import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from sslvit.cli.words import started_as
from sslvit.errors import BAD_CONFIGURATION, CANNOT_WRITE, INTERNAL, Error, Preempted, shortened
from sslvit.processes import launcher, signals

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
        "this torch does not fit the GPU or its driver: `sslvit doctor` names both; install the torch that "
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
        if _processes() == 1:
            raise
        if isinstance(end.code, str):
            _print(end.code)
        _end_process(end.code if isinstance(end.code, int) else int(end.code is not None))
    if _processes() > 1:
        _end_process(0)


def _processes() -> int:
    """Without loading torch for it."""
    collectives = sys.modules.get("sslvit.processes.collectives")
    return collectives.processes() if collectives else 1


def _end_process(code: int) -> NoReturn:
    from sslvit.processes.collectives import end_process

    end_process(code)


def _run(main: Callable[..., Any], options: type | Mapping[str, Any] | None) -> None:
    try:
        if options is None:
            main()
        else:
            start(main, options, sys.argv[1:], started_as())
        if sys.stdout:  # None where it was closed before we began
            sys.stdout.flush()
    except SystemExit as end:
        sys.exit(BAD_CONFIGURATION if end.code == 2 else end.code)  # as argparse says it
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


def start(main: Callable[..., Any], options: type | Mapping[str, Any], words: Sequence[str], program: str) -> None:
    """main, with its configuration; or its help. An error speaks of options as they were typed."""
    from sslvit.cli import help, parse  # which load torch

    if help.asked(words):
        if os.environ.get("RANK", "0") == "0":  # of several processes one is enough
            print(help.text(program, main, options, words))
        return
    config = parse.parse(options, args=words) if isinstance(options, type) else parse.choose(options, words)
    try:
        main(config)
    except ValueError as error:
        error.args = (as_typed(str(error), config),)
        raise


# Arguments of Python by the options that they are; others have the option's name.
TYPED = {
    **dict.fromkeys(("decoder_width", "decoder_heads"), "decoder"),
    **dict.fromkeys(("scale", "small_scale"), "areas"),
    "no model": "model",
}
PLACES = ("data", "eval_data", "init_from", "model")  # options with a place from which something is read


def as_typed(text: str, config: Any) -> str:
    """`corrupt 2.0 of ...` as `--corrupt 2.0 of ...`: Python names an argument, which the user typed as an option."""
    names = "|".join(sorted([*vars(config), *TYPED], key=len, reverse=True))
    found = re.match(rf"({names}) '?([^\s':]+)", text)
    if not found:
        given = [name for name in PLACES if "/" in str(getattr(config, name, ""))]
        places = {name: re.escape(str(getattr(config, name))) for name in given}
        return next((f"--{name} {text}" for name, place in places.items() if re.match(rf"{place}[ :]", text)), text)
    argument, value = found.groups()
    name = TYPED.get(argument, argument)
    if name == "data" and value not in str(config.data):  # of another option with images
        name = next((one for one in ("eval_data", "transfer", "seen") if value in str(getattr(config, one, ""))), name)
    elif name != "data" and value.strip("(),") not in str(getattr(config, name, "")):  # a word of the sentence
        return text
    return f"--{name}{text[len(argument) :]}"


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
