"""`accelerate launch`, as the process sees it that was started by it."""

import os
import subprocess
import sys

import psutil

AT_MOST = 5  # seconds that the launcher may take to end after this process
LAST_WORDS = """
import os, select, sys
mine, launcher, seconds, sentence = sys.argv[1:]
select.select([int(mine)], [], [], 60)
select.select([int(launcher)], [], [], float(seconds))
os.write(2, b"\\n" + os.fsencode(sentence) + b"\\n")
"""


def command() -> list[str]:
    """The words of the `accelerate launch` that started this process, if one did."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return []
    return words if any("accelerate" in os.path.basename(word) for word in words[:3]) else []


def repeat_after_it(sentence: str) -> None:
    """Says a sentence again when the launcher has ended, which prints twenty lines of its own traceback first.

    By a process that outlives this one until the launcher has ended, a tenth of a second as a rule and never more than
    AT_MOST seconds. A shell may show its prompt before the sentence, and whoever reads the launcher's output through a
    pipe waits for it too; but else the last thing on the terminal is a CalledProcessError that does not name the cause.
    Not where `accelerate launch --quiet` prints nothing, and not under torchrun, which ends in a table of processes.
    """
    words = command()
    if not words or {"--quiet", "-q"} & set(words) or "TORCHELASTIC_RUN_ID" in os.environ or sys.platform != "linux":
        return
    try:
        mine, launcher = os.pidfd_open(os.getpid()), os.pidfd_open(os.getppid())
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAST_WORDS, str(mine), str(launcher), str(AT_MOST), sentence],
            pass_fds=[mine, launcher],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:  # an old kernel, or no more processes: then it was said once
        return
