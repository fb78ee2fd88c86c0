"""Runs in processes of their own, on 32 images in files, that tests stop, kill and start again."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import preloaded
import psutil
import pytest
from PIL import Image

SCRIPT = str(Path(__file__).parent / "lost_run.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


def free_port() -> str:
    """Which no other program has, so that two runs of the tests on one machine do not collide."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def within(seconds: float) -> pytest.MarkDecorator:
    """A `limit` as it is promised, for an idle machine, and one that a busy machine keeps too and a hang does not."""
    return pytest.mark.parametrize("limit", [pytest.param(seconds, marks=pytest.mark.timing), seconds + 25])


UNSHARE = """
import ctypes, subprocess, sys
def mount(*words):
    subprocess.run(["mount", *words], check=True, stdout=subprocess.DEVNULL)
if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS of <sched.h>
    raise PermissionError("unshare")
mount("--make-rprivate", "/")
mount("-t", "tmpfs", "-o", "size={size}", "tmpfs", "/dev/shm")
"""


def with_shared_memory(size: str, program: str, *words: str, **options) -> subprocess.CompletedProcess:
    """A program in a process with a /dev/shm of its own of this size, as in a container."""
    mount = "mount -t tmpfs tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    command = [sys.executable, "-c", UNSHARE.format(size=size) + program, *words]
    return preloaded.run(command, text=True, **options)


def draw_images(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for i in range(32):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def begin(start: Callable, command: list[str], out: Path, *words: str, **environment: str):
    """What start (subprocess.Popen or the like) returns."""
    out.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    with (out.parent / f"{out.name}.stderr").open("w") as file:
        return start([*command, str(out), *words], env=env, stderr=file, stdout=file)


def said(out: Path) -> str:
    return (out.parent / f"{out.name}.stderr").read_text()


def until_step(out: Path, step: int, process: subprocess.Popen) -> None:
    log, deadline = out / "metrics.jsonl", time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert process.poll() is None, said(out)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def two(images: Path, out: Path, *words: str, **environment: str) -> subprocess.Popen:
    """A run of two processes, started by torchrun."""
    return begin(subprocess.Popen, [*TORCHRUN, free_port(), SCRIPT, str(images)], out, *words, **environment)


def pair(images: Path, out: Path, *words: str, **environment: str) -> list[subprocess.Popen]:
    """The two processes of a run, without a launcher that would end one when the other ends."""
    return begin(preloaded.ranks, [sys.executable, SCRIPT, str(images)], out, *words, **environment)


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes of torchrun by rank."""
    children = psutil.Process(process.pid).children()
    return sorted((c for c in children if "RANK" in c.environ()), key=lambda child: int(child.environ()["RANK"]))


def one(images: Path, out: Path, *words: str, **environment: str) -> subprocess.Popen:
    return begin(preloaded.Process, [sys.executable, SCRIPT, str(images)], out, *words, **environment)
