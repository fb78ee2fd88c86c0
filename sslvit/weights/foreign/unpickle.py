"""The tensors of one PyTorch file, read in a process of its own: `python -m sslvit.weights.foreign.unpickle FILE OUT`.

A pickle is a program. torch.load(weights_only=True) runs only what makes tensors and plain containers, but it has had
holes (CVE-2025-32434, CVE-2026-24747), and a file can also ask for more memory or time than there is. So
sslvit.weights.foreign.files starts this module, with limits, and reads back a safetensors file, in which nothing can be
executed. Each tensor is named by the JSON list of the keys that lead to it.
"""

import argparse
import json
import sys
from pathlib import Path

import psutil
import torch
from torch import Tensor

from sslvit.processes.system import resource
from sslvit.storage import durable

MOST_BYTES, MOST_ENTRIES, DEEPEST = 32 << 30, 100_000, 8
# Saved by official training loops beside the weights: DINO's schedules are numbers of numpy (numpy.core in numpy 1),
# and launchers on clusters (submitit, in MAE, DINO and DeiT) leave a Path in the arguments.
LEFT_OUT = (
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
)


class LeftOut:
    """Replaces a number of numpy's, its dtype or a path, without calling numpy or pathlib: no weight is one."""

    __slots__ = ()

    def __new__(cls, *_: object) -> "LeftOut":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def tensors_of(loaded: object) -> dict[str, Tensor]:
    """All tensors that string keys lead to, which leaves out an optimizer's state, whose keys are numbers."""
    tensors, entries, size = {}, 0, 0
    waiting: list[tuple[tuple[str, ...], object]] = [((), loaded)]
    while waiting:
        path, value = waiting.pop()
        entries += 1
        # A dict can hold itself, or the same dict twice, and that again: small files with endlessly many paths.
        if entries > MOST_ENTRIES or len(path) > DEEPEST:
            raise ValueError(f"it has more than {MOST_ENTRIES} entries or is nested deeper than {DEEPEST}")
        if isinstance(value, dict):
            waiting += [((*path, key), child) for key, child in value.items() if isinstance(key, str)]
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError(f"{'.'.join(path)} is a {value.layout} tensor on {value.device}: no plain weight")
            size += value.numel() * value.element_size()  # strides of 0 can make much of little
            if size > MOST_BYTES:
                raise ValueError(f"its tensors have more than {MOST_BYTES} bytes")
            if value.dtype in durable.DTYPES:
                tensors[json.dumps(path)] = value
            if len(tensors) > durable.MOST_TENSORS:
                raise ValueError(f"it has more than {durable.MOST_TENSORS} tensors")
    if not tensors:
        raise ValueError("it holds no tensors that names lead to")
    return tensors


def limit(size: int) -> None:
    """Limits memory to what reading a file of this size needs, beyond what Python and torch have already."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES + (1 << 20), MOST_BYTES + (1 << 20)))
    if sys.platform != "linux":  # elsewhere the memory of a process cannot be limited
        return
    memory = psutil.Process().memory_info().vms + 4 * size + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def main(source: str, target: str) -> None:
    limit(Path(source).stat().st_size)
    try:
        # The arguments of a run, which MAE's and DINO's checkpoints hold; a Namespace is a bare dict of attributes.
        with torch.serialization.safe_globals([argparse.Namespace, *((LeftOut, name) for name in LEFT_OUT)]):
            loaded = torch.load(source, map_location="cpu", weights_only=True)
        durable.write(Path(target), durable.tensor_pieces(tensors_of(loaded)))
    except Exception as error:  # a broken file can raise anything
        sys.exit(f"{type(error).__name__}: {error}"[:4000])


if __name__ == "__main__":
    main(*sys.argv[1:])
