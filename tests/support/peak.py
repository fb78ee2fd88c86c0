"""How much memory opening an image takes: python tests/support/peak.py OPTIONS FILE ...

In a process of its own, because a high-water mark never falls: in one that has done anything larger it says nothing,
and ru_maxrss is even handed down to children. Each line of the output is a file's growth in bytes, CPU seconds and
verdict.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from sslvit.data.image import ImageError, open_image


class Cost(NamedTuple):
    grown: int  # bytes: the peak over what the process had before
    seconds: float
    refused: str  # why, or nothing


def costs(files: list[Path], **options) -> list[Cost]:
    command = [sys.executable, __file__, json.dumps(options), *map(str, files)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [Cost(*json.loads(line)) for line in lines]


def memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def cost(file: str, options: dict) -> Cost:
    data, refused = Path(file).read_bytes(), ""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is in use
    before, start = memory("VmRSS"), time.process_time()
    try:
        open_image(data, **options)
    except ImageError as error:
        refused = str(error)
    return Cost(memory("VmHWM") - before, time.process_time() - start, refused)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    for name in sys.argv[2:]:
        print(json.dumps(cost(name, given)))
