"""`accelerate launch`, as seen by the process that it started."""

import os
import subprocess
import sys

import psutil

AT_MOST = 5  # seconds that the launcher may take to end after this process
REPEAT = """
import os, select, sys
mine, launcher, seconds, sentence = sys.argv[1:]
select.select([int(mine)], [], [], 60)
select.select([int(launcher)], [], [], float(seconds))
os.write(2, b"\\n" + os.fsencode(sentence) + b"\\n")
"""


def command() -> list[str]:
    """The command line of the `accelerate launch` that started this process, if any."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return []
    return words if any("accelerate" in os.path.basename(word) for word in words[:3]) else []


def repeat_after_it(sentence: str) -> None:
    """Prints an error again after the launcher, which ends in twenty lines of its own traceback that do not name the
    cause. By a process that waits for the launcher's end, a tenth of a second as a rule and never more than AT_MOST.

    Not where `accelerate launch --quiet` prints nothing, and not under torchrun, which ends in a table of processes.
    """
    words = command()
    if not words or {"--quiet", "-q"} & set(words) or "TORCHELASTIC_RUN_ID" in os.environ or sys.platform != "linux":
        return
    try:
        mine, launcher = os.pidfd_open(os.getpid()), os.pidfd_open(os.getppid())
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", REPEAT, str(mine), str(launcher), str(AT_MOST), sentence],
            pass_fds=[mine, launcher],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:  # an old kernel, or no more processes: then it is printed once
        return
