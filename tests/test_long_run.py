"""What a run holds after its sixth epoch is what it held after its second: memory, files, threads, shared memory.

python tests/test_long_run.py RECIPE WORDS... prints what the recipe holds at each checkpoint, an object a line.
"""

import gc
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from sslvit.storage import checkpoint

pytestmark = pytest.mark.processes

RECIPES = Path(__file__).parent.parent / "recipes"
MARK = "held: "


def held() -> dict[str, int]:
    """By this process and its workers: memory in KB, what they share counted once and files left out; descriptors,
    threads, mapped files of shared memory, processes."""
    gc.collect()
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    lines = [line for p in processes for line in Path(f"/proc/{p.pid}/smaps_rollup").read_text().splitlines()]
    mapped = [line for p in processes for line in Path(f"/proc/{p.pid}/maps").read_text().splitlines()]
    shared = [line.split(maxsplit=5)[-1] for line in mapped]
    return {
        "memory": sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")),
        "files": sum(p.num_fds() for p in processes),
        "threads": sum(p.num_threads() for p in processes),
        "shared": len({name for name in shared if name.startswith(("/dev/shm/", "/torch_"))}),
        "processes": len(processes),
    }


def main() -> None:
    save = checkpoint.save

    def counted(*args, **kwargs):
        print(f"\n{MARK}{json.dumps(held())}", flush=True)
        return save(*args, **kwargs)

    checkpoint.save = counted
    sys.argv = [f"{RECIPES / sys.argv[1]}.py", *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.slow
def test_six_epochs_leave_what_two_left(tmp_path):
    draw, images = np.random.default_rng(0), 800
    for number in range(images):
        folder = tmp_path / "set" / ("val" if number % 4 == 0 else "train") / "abcd"[number // 4 % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{number}.png")
    words = "--image_size 32 --model mu/8 --batch_size 20 --epochs 7 --evaluate_every 1 --save_every 30 --workers 2"
    command = [
        sys.executable,
        __file__,
        "mpp",
        "--data",
        f"folder:{tmp_path / 'set'}",
        *words.split(),
        "--threads",
        "1",
    ]
    own = {"SSLVIT_CACHE": str(tmp_path / "cache")}
    shm = set(os.listdir("/dev/shm"))
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), "--canvas", "40"],
        env=os.environ | own, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    epochs = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert len(epochs) == 7
    print(*epochs, sep="\n")
    second, last = epochs[1], epochs[5]  # at the end of the seventh nothing is read ahead any more
    assert last["processes"] == 3  # the run and two workers
    assert last["memory"] < 1.1 * second["memory"]
    for name in ("files", "threads", "shared"):
        assert last[name] == second[name], name
    assert not {name for name in set(os.listdir("/dev/shm")) - shm if name.startswith("torch_")}


if __name__ == "__main__":
    main()
