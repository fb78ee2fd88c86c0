"""A run of which a worker is stopped (SIGSTOP) at a random moment: python tests/support/stopped_worker.py COUNT [SEED]

Prints how many seconds after it each run said so; --timeout is 6.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from started import draw_images, one, said, until_step

TIMEOUT = 6


def one_moment(images: Path, out: Path, seed: int) -> float:
    """Seconds from the signal to the sentence; or from the last step, where batches that had been read lasted on."""
    draw = np.random.default_rng(seed)
    process = one(images, out, "workers=2", "epochs=100000", f"timeout={TIMEOUT}", "save_every=1000")
    try:
        until_step(out, int(draw.integers(1, 30)), process)
        family = sorted(psutil.Process(process.pid).children(recursive=True), key=lambda child: child.pid)
        assert len(family) == 2
        number, log = int(draw.integers(2)), out / "metrics.jsonl"
        time.sleep(draw.random() / 4)
        os.kill(family[number].pid, signal.SIGSTOP)
        began = time.time()
        while "error:" not in said(out):
            assert process.poll() is None, said(out)
            assert time.time() - began < 60, "it hangs"
            time.sleep(0.02)
        took = time.time() - max(began, log.stat().st_mtime)
        assert not psutil.wait_procs(family, timeout=3)[1]
        assert process.wait(60) == 70, (process.returncode, said(out))
        (sentence,) = [line for line in said(out).splitlines() if line.startswith("error:")]
        assert f"no images came within {TIMEOUT} seconds: worker {number} (pid {family[number].pid})" in sentence, (
            sentence
        )
        return took
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children():
                child.kill()
        process.kill()
        process.wait()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        draw_images(images)
        first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        for seed in range(first, first + int(sys.argv[1])):
            print(f"{one_moment(images, Path(folder) / str(seed), seed):.2f}", flush=True)


if __name__ == "__main__":
    main()
