"""Kills a tiny run with SIGKILL at random moments and restarts it: python tests/support/kill_campaign.py N SEED FOLDER

A moment is an event: a step of the log, or a call that changes the file system. The n-th event kills the process,
with n drawn evenly, so saves are hit often and a failure can be played again. Every fourth restart is killed too.
Prints a JSON object. The parent only imports; each run is a forked child: 40 runs take about a minute.
"""

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401 (imported lazily by the optimizer: kills would land in that import instead of training)

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import fingerprint, tiny_run

CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir", "pwrite", "write", "open")


def count_events(on_event: Callable[[], None]) -> None:
    """Calls on_event before and after each call that may change the file system."""

    def counted(call):
        def wrapper(*args, **kwargs):
            on_event()
            result = call(*args, **kwargs)
            on_event()
            return result

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def run(out: Path, kill_at: int | None, **changes) -> tuple[int, int]:
    """A forked child runs; returns its wait status and how many events it counted."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        write, seen = os.write, 0

        def on_event() -> None:
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            os.close(reader)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2), os.dup2(null, 1)
            count_events(on_event)
            tiny_run(out, **changes)
            write(writer, str(seen).encode())
            code = 0
        except BaseException:
            write(writer, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(said)
    return status, int(said or 0)


def main() -> None:
    kills, seed, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    draw = random.Random(seed)
    _, events = run(folder / "reference", None)
    reference = fingerprint(folder / "reference")
    result = {
        "kills": 0,
        "nested": 0,
        "identical": 0,
        "inside a save": 0,
        "left over": 0,
        "events": events,
        "failed": [],
    }
    for turn in range(kills):
        out = folder / str(turn)
        moments = [draw.randrange(1, events)] + ([draw.randrange(1, events // 2)] if turn % 4 == 0 else [])
        for number, moment in enumerate(moments):
            status, _ = run(out, moment, resume=True)
            if os.WIFSIGNALED(status):
                result["kills" if number == 0 else "nested"] += 1
                result["inside a save"] += any(out.glob("checkpoints/.tmp-*")) or any(out.glob("checkpoints/.del-*"))
        run(out, None, resume=True)
        same = fingerprint(out) == reference
        result["identical"] += same
        result["left over"] += len(
            [*out.glob(".tmp-*"), *out.glob(".del-*"), *out.glob("*/.tmp-*"), *out.glob("*/.del-*")]
        )
        if same:
            shutil.rmtree(out)
        else:
            result["failed"].append({"turn": turn, "moments": moments, "folder": str(out)})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
