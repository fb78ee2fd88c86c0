"""Called from Python, nothing stays: signal handlers, threads, processes, files, environment, Accelerate's state."""

import os
import signal
import sys
import threading
import time
from multiprocessing import active_children

import numpy as np
import preloaded
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data._utils import signal_handling

import sslvit
from sslvit.errors import DataError, Preempted
from sslvit.processes import collectives, signals
from sslvit.processes.traces import without_trace

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
LABELS = [0, 1] * 16


def objective() -> sslvit.MPP:
    return sslvit.MPP(sslvit.ViT.variant("mu/8", image_size=16))


def state() -> dict[str, object]:
    """All that a caller could notice, by name."""
    process = psutil.Process()
    # onnxruntime, which other tests import, has threads that open files when they like.
    mine = [(one.path, one.fd, one.mode) for one in process.open_files() if "onnxruntime" not in one.path]
    return {
        "handlers": {n: signal.getsignal(n) for n in (*signals.SIGNALS, signal.SIGCHLD)},
        "torch's note of its handler": signal_handling._SIGCHLD_handler_set,
        "threads": {thread.name for thread in threading.enumerate()},
        "torch's threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "accelerate": [dict(s._shared_state) for s in (PartialState, AcceleratorState)],
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "precision": torch.get_float32_matmul_precision(),
        "flags": (signals._State.number, signals._State.stepping, signals._State.until_the_end, collectives.launch()),
        "files": sorted(mine),
        "descriptors": process.num_fds() - (len(process.open_files()) - len(mine)),
        "children": active_children(),
    }


@pytest.fixture
def nothing_stays():
    """Of what the first call loads for good, such as a library's own files, nothing is counted."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Broken(sslvit.MPP):
    def forward(self, batch, progress):
        if progress > 0.4:
            raise RuntimeError("here")
        return super().forward(batch, progress)


def call(how: str, out) -> None:
    run = {"out": out, "batch_size": 8, "epochs": 1, "evaluate": False}
    if how == "pretrain":
        sslvit.pretrain(objective(), PIXELS, **run)
    elif how == "another precision":
        sslvit.pretrain(objective(), PIXELS, precision="bf16", grad_checkpointing=True, **run)
    elif how == "workers":
        sslvit.pretrain(objective(), PIXELS, workers=1, **run)
    elif how == "raises":
        with pytest.raises(RuntimeError, match="here"):
            sslvit.pretrain(Broken(sslvit.ViT.variant("mu/8", image_size=16)), PIXELS, workers=1, **run)
    elif how == "refused":
        with pytest.raises(DataError, match="channels 3: array"):
            sslvit.pretrain(objective(), PIXELS[..., :1], **run)
    elif how == "finetune":
        backbone = objective().backbone
        sslvit.finetune(backbone, PIXELS, sslvit.open_images(PIXELS, labels=LABELS), out=out, steps=1, lr=0.1)
    else:
        sslvit.extract_features(objective().backbone, PIXELS, workers=1)


@pytest.mark.parametrize("how", ["pretrain", "another precision", "workers", "raises", "refused", "extract"])
def test_nothing_stays_when_it_returns_or_raises(how, tmp_path, nothing_stays):
    if how in ("workers", "raises"):
        call(how, tmp_path / "first")  # multiprocessing keeps a page of shared memory
    before = state()
    call(how, tmp_path / "run")
    deadline = time.monotonic() + 10
    while threading.active_count() > len(before["threads"]) and time.monotonic() < deadline:
        time.sleep(0.05)  # the thread that fed a worker's queue is told to end, and ends a moment later
    after = state()
    assert {name: after[name] for name in after if after[name] != before[name]} == {}


def test_what_a_caller_had_stays_as_it_was(tmp_path, monkeypatch):
    """Its Accelerator of another precision, its handlers, its variables, its way to see its model."""
    AcceleratorState._reset_state(True)
    theirs = Accelerator(mixed_precision="bf16", cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = objective()
        before = state()
        sslvit.pretrain(mine, PIXELS, out=tmp_path / "run", batch_size=8, epochs=1, precision="no", evaluate=False)
        assert state() == before
        assert theirs.mixed_precision == AcceleratorState().mixed_precision == "bf16"
        assert "forward" not in vars(mine)
        assert not any(block.grad_checkpointing for block in [mine.backbone])
    finally:
        signal.signal(signal.SIGTERM, handler)
        AcceleratorState._reset_state(True)


def test_in_another_thread_it_works_without_signals(tmp_path, nothing_stays):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(call("pretrain", tmp_path / "run")))
    thread.start()
    thread.join()
    assert runs == [None]
    assert sslvit.Run(tmp_path / "run").metrics[-1]["step"] == 4


def test_a_command_keeps_what_it_has_until_it_ends():
    before = signal.getsignal(signal.SIGTERM)
    with signals.command():
        assert signal.getsignal(signal.SIGTERM) is before
        signals.listen()
        assert signal.getsignal(signal.SIGTERM) is signals._on_signal
        with signals.listening(), without_trace():
            pass
        assert signal.getsignal(signal.SIGTERM) is signals._on_signal
        with pytest.raises(Preempted, match="the same command with --resume"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    signals.listen()  # outside of a command
    assert signal.getsignal(signal.SIGTERM) is before


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np, sslvit
pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
class Interrupted(sslvit.MPP):
    def forward(self, batch, progress):
        if interrupt and round(progress * 8) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(batch, progress)
def run(resume=False):
    objective = Interrupted(sslvit.ViT.variant("mu/8", image_size=16))
    return sslvit.pretrain(objective, pixels, out=sys.argv[1], batch_size=8, epochs=2, resume=resume, threads=1)
interrupt = True
try:
    run()
except sslvit.Error as stopped:
    print(f"{type(stopped).__name__}: {stopped}")
    print(stopped.__cause__, stopped.__suppress_context__)
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("as usual")
interrupt = False
print(run(resume=True).metrics[-1]["step"])
"""


@pytest.mark.processes
def test_ctrl_c_stops_a_run_saved_by_one_exception_and_then_works_as_usual(tmp_path):
    out = tmp_path / "run"
    done = preloaded.run([sys.executable, "-c", INTERRUPTED, out], text=True)
    assert done.returncode == 0, done.stderr
    others = ("array", "  ", "The model", "Nothing ", "Accuracy ")
    said = [line for line in done.stdout.splitlines() if not line.startswith(others)]
    assert said == [
        f"Preempted: asked to stop at step 3 of 8; saved in {out}: resume=True continues from there",
        "None True",
        "as usual",
        "8",
    ]


TOGETHER = """
import sys, numpy as np, sslvit
pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)
for precision in ("no", "bf16"):
    objective = sslvit.MPP(sslvit.ViT.variant("mu/8", image_size=16))
    out = f"{sys.argv[1]}/{precision}"
    sslvit.pretrain(objective, pixels, out=out, batch_size=8, epochs=1, precision=precision, threads=1)
features = sslvit.extract_features(objective, pixels)
sys.stdout.write(f"sum {features.x.double().sum().item()} of {len(features.x)}\\n")
"""


@pytest.mark.processes
def test_two_processes_call_twice_with_other_precisions(tmp_path):
    (tmp_path / "program.py").write_text(TOGETHER)
    ended = preloaded.run_ranks([sys.executable, str(tmp_path / "program.py"), str(tmp_path)])
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr
    first, second = [line for done in ended for line in done.stdout.splitlines() if line.startswith("sum ")]
    assert first == second
    assert first.endswith("of 32")
