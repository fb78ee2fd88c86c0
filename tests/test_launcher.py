"""What a user of `accelerate launch` reads last is why the run stopped."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sslvit.launcher import AT_MOST

RECIPE = str(Path(__file__).parent.parent / "recipes" / "mpp.py")
SENTENCE = "error: --lr is -1.0"


def launched(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", *options, RECIPE]
    env = os.environ | {"HF_HOME": str(tmp_path)}
    words = ["--lr", "-1", "--out", str(tmp_path / "run")]
    return subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=120)


def test_the_sentence_stands_last_behind_the_launchers_own_traceback_and_nobody_stays(tmp_path):
    done = launched(tmp_path)
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


@pytest.mark.parametrize("quiet", ["--quiet", "-q"])
def test_it_is_said_once_where_the_launcher_says_nothing(tmp_path, quiet):
    done = launched(tmp_path, quiet)
    assert done.returncode == 1
    assert done.stderr.count(SENTENCE) == 1
    assert "Traceback" not in done.stderr


def test_it_is_said_once_without_a_launcher_and_the_exit_code_is_ours(tmp_path):
    command = [sys.executable, RECIPE, "--lr", "-1", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count(SENTENCE)) == (78, 1)
