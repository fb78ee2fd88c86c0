"""A check of this machine for training: sslvit doctor, also under a launcher, with all its processes.

Each check prints a line; one that fails says what to do, and the exit code is then not 0.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from sslvit.data import shared
from sslvit.errors import CANNOT_WRITE, INTERNAL
from sslvit.processes import collectives, system
from sslvit.runs.log import PACKAGES, environment
from sslvit.storage import durable

MEGABYTES = 64  # written and read back
SLOW_DISK = 20.0  # MB per second, of synced writes
LITTLE_ROOM = 2.0  # GB
TYPICAL = 10 * 256 * 3 * 224**2 * 4  # bytes of ten batches of float views: four ahead for each of two workers, two more


class Finding(NamedTuple):
    name: str
    text: str
    code: int = 0  # the exit code if this is why nothing would work
    warning: bool = False


def packages() -> Iterator[Finding]:
    versions = environment()["packages"]
    missing = [name for name in PACKAGES if versions[name] is None]
    text = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if versions[name])
    text += f"; not installed: {', '.join(missing)}" if missing else ""
    yield Finding("packages", text, warning=bool(missing))
    try:
        from torchvision.ops import nms  # of torchvision's own compiled part, which must have been built for this torch

        boxes = nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
        yield Finding("torchvision", f"its operators run with this torch ({len(boxes)} of 1 box)")
    except (ImportError, RuntimeError) as error:
        wheels = f"torch {versions['torch']} and torchvision {versions['torchvision']}"
        yield Finding("torchvision", f"{wheels} do not fit each other: {error}. Install both anew, together", INTERNAL)


def devices() -> Iterator[Finding]:
    cores = system.cores()
    threads = torch.get_num_threads()
    less = f"; torch uses {threads} of them here, recipes use all" if threads < cores else ""
    yield Finding("CPU", f"{cores} cores{less}")
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that torch can use; training runs on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16: use fp16"
        text = f"{number}: {facts.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, {half}"
        yield Finding("GPU", text, warning=free < total / 2)


def together() -> Iterator[Finding]:
    """Every process sends its rank to all."""
    if collectives.processes() == 1:
        yield Finding("processes", "one; a launcher starts more (docs/scaling.md)")
        return
    mine = torch.tensor([float(collectives.rank())], device="cuda" if torch.cuda.is_available() else "cpu")
    seen = sorted(collectives.all_gather(mine).int().tolist())
    expected = list(range(collectives.processes()))
    if seen == expected:
        yield Finding("processes", f"{len(seen)} that see each other")
    else:
        yield Finding("processes", f"{len(expected)} were started and these answered: {seen}", INTERNAL)


def shared_memory() -> Iterator[Finding]:
    """The memory through which a loader's workers pass their batches."""
    free = shared.room()
    if free is None:
        return
    text = f"{free / 1e9:,.1f} GB free at {shared.SHARED}, for the batches of --workers"
    if small := free < TYPICAL:
        text += f": little, 2 workers with 256 images of 224 px need {TYPICAL / 1e9:,.1f}. A run that lacks it copies "
        text += f"batches through pipes, which takes longer. {shared.MORE}"
    yield Finding("shared", text, warning=small)


def disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(existing(folder)).free / 1e9
    yield Finding("room", f"{free:,.1f} GB free at {existing(folder)}", warning=free < LITTLE_ROOM)
    data = os.urandom(MEGABYTES << 20)
    try:
        with tempfile.TemporaryDirectory(dir=existing(folder)) as place:
            start = time.perf_counter()
            written = durable.write(Path(place) / "test", [data])
            speed = len(data) / 1e6 / (time.perf_counter() - start)
            same = durable.read(Path(place) / "test", written=written) == data
    except OSError as error:
        text = f"{existing(folder)} cannot be written: {error.strerror or error}. Choose another --out"
        yield Finding("disk", text, CANNOT_WRITE)
        return
    if not same:
        yield Finding("disk", f"{existing(folder)}: other bytes were read than written", CANNOT_WRITE)
        return
    slow = " A checkpoint will take long" if speed < SLOW_DISK else ""
    yield Finding("disk", f"{speed:,.0f} MB per second, written, synced and hashed.{slow}", warning=bool(slow))


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return folder if folder.is_dir() else existing(folder.parent)


def learns() -> Iterator[Finding]:
    """Trains a linear layer for a moment: autograd, optimizer and device work together."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator).to(device)
    layer = torch.nn.Linear(8, 1, device=device)
    optimizer, losses = torch.optim.AdamW(layer.parameters(), lr=0.1), []
    for _ in range(50):
        loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    good = losses[-1] < 0.1 * losses[0]
    text = f"a loss fell from {losses[0]:.2f} to {losses[-1]:.4f} on {device}"
    yield Finding("training", text if good else f"{text}: something is wrong with torch here", 0 if good else INTERNAL)


def examine(folder: Path, say: Callable[[str], None]) -> int:
    """Prints all findings, and returns the exit code. folder: where runs would be written."""
    code = 0
    for check in (packages(), devices(), together(), shared_memory(), disk(folder), learns()):
        for finding in check:
            mark = "FAIL" if finding.code else "warn" if finding.warning else "ok"
            say(f"{mark:<5}{finding.name:<12}{finding.text}")
            code = code or finding.code
    return code
