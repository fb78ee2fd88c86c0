"""Timing side by side: contestants take turns in one run, so that what disturbs the machine disturbs all of them."""

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from sslvit.processes.system import cores
from sslvit.storage import durable, sealed

OURS = "sslvit"


class Result(NamedTuple):
    """Of one contestant in one case; None is what was not measured."""

    case: str
    who: str
    milliseconds: float  # the median
    low: float
    high: float
    images_per_second: float | None = None
    ratio: float | None = None  # how many times its time ours takes, in the same round; the median
    ratio_low: float | None = None
    ratio_high: float | None = None
    share: float | None = None  # of the rate at which this machine multiplies matrices
    mebibytes: float | None = None


def in_turns(runs: dict[str, Callable[[], object]], *, rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each in each round."""
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for turn in range(warm + rounds):
        for who, run in runs.items():
            wait()
            began = time.perf_counter()
            run()
            wait()
            if turn >= warm:
                seconds[who].append(time.perf_counter() - began)
    return seconds


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compared(
    case: str,
    seconds: dict[str, list[float]],
    *,
    images: int = 0,
    flops: float = 0.0,
    rate: float = 0.0,
    mebibytes: dict[str, float] | None = None,
) -> list[Result]:
    """flops: of one run; all contestants are taken to need as many. rate: the machine's, per second."""
    results = []
    for who, numbers in seconds.items():
        middle = median(numbers)
        ratios = sorted(ours / theirs for ours, theirs in zip(seconds.get(OURS, []), numbers, strict=False))
        beside = (median(ratios), ratios[0], ratios[-1]) if who != OURS and ratios else (None, None, None)
        results.append(
            Result(
                case, who, 1000 * middle, 1000 * min(numbers), 1000 * max(numbers), images / middle if images else None,
                *beside, flops / middle / rate if rate and flops else None, (mebibytes or {}).get(who),
            )
        )  # fmt: skip
    return results


def matrix_rate(device: str, dtype: torch.dtype = torch.float32, side: int = 2048, rounds: int = 8) -> float:
    """Floating-point operations per second of a matrix product: the best of some rounds."""
    side *= 4 if device == "cuda" else 1
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    seconds = in_turns({"product": lambda: a @ b}, rounds=rounds)["product"]
    return 2 * side**3 / min(seconds)


def line(result: Result) -> str:
    cells = [f"{result.case:44} {result.who:13} {result.milliseconds:9.1f} ms"]
    cells.append(f"({result.low:.1f} to {result.high:.1f})")
    if result.images_per_second:
        cells.append(f"{result.images_per_second:9.1f} images/s")
    if result.share:
        cells.append(f"{result.share:4.0%} of the matrix rate")
    if result.mebibytes:
        cells.append(f"{result.mebibytes:.0f} MiB")
    if result.ratio:
        cells.append(f"ours takes {result.ratio:.2f} of it ({result.ratio_low:.2f} to {result.ratio_high:.2f})")
    return " ".join(cells)


def machine() -> dict[str, Any]:
    names = [line.split(": ")[1] for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "processor": names[0] if names else platform.processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def save(results: list[Result], out: Path | None, name: str) -> None:
    """In out/NAME.json, if there is an out, with the command that measures it again."""
    if out is None:
        return
    words = sys.argv[1:]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    command = " ".join(["python", f"recipes/benchmarks/{Path(sys.argv[0]).name}", *words])
    durable.make_folder(out)
    content = {"name": name, "command": command, "machine": machine(), "results": [one._asdict() for one in results]}
    sealed.write(out / f"{name}.json", content)
