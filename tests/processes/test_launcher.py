"""What a user of `accelerate launch` reads last is why the run stopped."""

import os
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import psutil
import pytest

from sslvit.processes.launcher import AT_MOST

pytestmark = pytest.mark.processes

SENTENCE = "error: --lr is -1.0"
PROGRAM = """
from sslvit.cli import run_cli
def main():
    raise ValueError("--lr is -1.0")
run_cli(main)
"""


@pytest.fixture
def program(tmp_path) -> str:
    (tmp_path / "program.py").write_text(PROGRAM)
    return str(tmp_path / "program.py")


def launched(program: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", *options, program]
    env = os.environ | {"HF_HOME": str(Path(program).parent)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_the_error_comes_last_after_the_launchers_traceback_and_no_process_stays(program):
    done = launched(program)
    assert done.returncode == 1  # accelerate's, whatever ours was
    first, _, after = done.stderr.partition(SENTENCE)
    assert "Traceback" not in first
    assert "returned non-zero exit status 78" in after
    assert done.stderr.splitlines()[-1].startswith(SENTENCE)
    deadline = time.monotonic() + AT_MOST
    while any(SENTENCE in word for one in psutil.process_iter() for word in words_of(one)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize("quiet", ["--quiet", pytest.param("-q", marks=pytest.mark.slow)])
def test_it_is_said_once_where_the_launcher_says_nothing(program, quiet):
    done = launched(program, quiet)
    assert done.returncode == 1
    assert done.stderr.count(SENTENCE) == 1
    assert "Traceback" not in done.stderr


def test_it_is_said_once_without_a_launcher_and_the_exit_code_is_ours(program):
    done = preloaded.run([sys.executable, program], text=True)
    assert (done.returncode, done.stderr) == (78, f"{SENTENCE}\n")
