"""Whatever stops a program ends in a sentence and a documented exit code."""

import errno
import multiprocessing
import subprocess
import sys

import preloaded
import pytest
from torch.utils.data import DataLoader, Dataset

from sslvit.cli import run_cli
from sslvit.errors import CannotWrite, DataError, Diverged, Error, NoInput, Preempted


class Broken(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, item: int) -> int:
        raise DataError("row 3 of labels.csv holds 'x', which is no number")


def read_by_a_worker() -> None:
    next(iter(DataLoader(Broken(), num_workers=1, multiprocessing_context=multiprocessing.get_context("fork"))))


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.processes
@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (raising(Diverged("it did")), 3, "error: it did\n"),
        (raising(DataError("bad")), 65, "error: bad\n"),
        (raising(NoInput("none")), 66, "error: none\n"),
        (raising(Error("odd")), 70, "error: odd\n"),
        (raising(CannotWrite("full")), 73, "error: full\n"),
        (raising(Preempted("asked")), 75, "stopped: asked\n"),
        (raising(ValueError("--lr is -1")), 78, "error: --lr is -1\n"),
        (
            raising(OSError(errno.ENOSPC, "No space left on device", "/a/b")),
            73,
            "error: /a/b: No space left on device\n",
        ),
        (raising(OSError(errno.EIO, "Input/output error", "/a/b")), 70, "error: /a/b: Input/output error\n"),
        (
            raising(ZeroDivisionError("division by zero")),
            70,
            "error: ZeroDivisionError: division by zero. This is unexpected",
        ),
        (
            raising(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")),
            70,
            "error: no memory is left. A smaller --batch_size needs less",
        ),
        (raising(MemoryError()), 70, "error: no memory is left. A smaller --batch_size needs less"),
        (raising(OSError(errno.ENOMEM, "Cannot allocate memory")), 70, "error: no memory is left."),
        (raising(OSError(errno.EMFILE, "Too many open files", "/a")), 70, "error: the limit of open files is reached:"),
        (raising(RuntimeError("can't start new thread")), 70, "error: the system allows no more threads or processes"),
        (raising(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")), 70, "error: the system allows no"),
        (
            raising(RuntimeError("The server socket has failed to listen: port: 29500, EADDRINUSE")),
            70,
            "error: another program, perhaps another run, has the port",
        ),
        (raising(KeyboardInterrupt()), 130, "stopped: interrupted\n"),
        (raising(NoInput("clear\x1b[2J\ttab")), 66, "error: clear\\x1b[2J\\x09tab\n"),
        (read_by_a_worker, 65, "error: row 3 of labels.csv holds 'x', which is no number\n"),
    ],
)
def test_an_error_is_a_sentence_and_a_code(main, code, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == code
    assert capsys.readouterr().err.startswith(said)


REAL = {
    "memory": ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 33,) * 2)", "torch.ones(1 << 33)"),
    "files": (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
        "[open('/dev/null') for _ in X]",
    ),
    "port": ("import socket; s = socket.socket(); s.bind(('', 0)); s.listen()", "meet(s.getsockname()[1])"),
}
MEET = "lambda port: torch.distributed.TCPStore('127.0.0.1', port, 1, True, datetime.timedelta(seconds=5))"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("memory", "no memory is left. A smaller --batch_size needs less"),
        ("files", "the limit of open files is reached: raise it with `ulimit -n 65536`"),
        ("port", "another program, perhaps another run, has the port through which the processes meet"),
    ],
)
def test_what_a_machine_really_lacks_is_a_sentence_without_a_traceback(lacks, said):
    before, then = REAL[lacks]
    program = "import datetime, torch\nfrom sslvit.cli import run_cli\nX = range(1000)\n"
    program += f"meet = {MEET}\n{before}\nrun_cli(lambda: {then})"
    done = preloaded.run([sys.executable, "-c", program], text=True)
    assert done.returncode == 70, done.stderr
    assert f"error: {said}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.processes
def test_output_that_was_closed_before_is_no_error():
    command = f"{sys.executable} -m sslvit --help >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
