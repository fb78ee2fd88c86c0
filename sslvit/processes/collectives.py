"""Several processes: their start, checks that they train together, and collectives, which do nothing on one process."""

import atexit
import ctypes
import hashlib
import os
import signal
import sys
import threading
import zlib
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from sslvit.processes import launcher, signals, system
from sslvit.processes.device import Fetched, send

_peers: dict[int, int] = {}  # the pids of the other processes on this machine, by rank
_launch: set[str] = set()  # options of the launcher that this package takes over
CPU = torch.device("cpu")
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of <malloc.h>


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def all_mean(value: Tensor) -> Tensor:
    """The mean of a detached value over processes."""
    if processes() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / processes()


class Means:
    """The means of scalars over processes, in one collective. Only reading them waits for the device."""

    def __init__(self, values: dict[str, Tensor | float]):
        device = next(value.device for value in values.values() if isinstance(value, Tensor))
        tensors = [
            send(value, device).float() if isinstance(value, Tensor) else torch.full((), value, device=device)
            for value in values.values()
        ]
        self.names, self.coming = [*values], Fetched(all_mean(torch.stack(tensors)))

    def read(self) -> dict[str, float]:
        return dict(zip(self.names, self.coming.read().tolist(), strict=True))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        ctx.size = len(value)
        rows = [torch.empty_like(value) for _ in range(processes())]
        dist.all_gather(rows, value.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Every process used every row in its own loss, so a row's gradient is the sum over processes.
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may need the original elsewhere
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.size : (rank() + 1) * ctx.size]


def all_gather(value: Tensor) -> Tensor:
    """The rows of all processes, in order of rank, with gradient: b ... -> (processes b) ..."""
    return value if processes() == 1 else _AllGather.apply(value)


def gathered_by(device: torch.device, value: Tensor) -> Tensor:
    """all_gather of a tensor on the CPU by way of this device, as some backends need. With several processes that waits
    for the device."""
    return value if processes() == 1 else all_gather(value.to(device)).cpu()


def start(
    precision: Literal["no", "bf16", "fp16"] | None = None,
    *,
    threads: int = 0,
    timeout: float = 600.0,
    log_with: tuple[str, ...] = (),
    project_dir: str | None = None,
) -> Accelerator:
    """The Accelerator, after a check that all processes that were started see each other.

    precision None leaves the choice to `accelerate launch`. threads 0 divides this machine's cores among its processes:
    the launchers set OMP_NUM_THREADS=1, which would leave most of a CPU idle. `traces.without_trace` takes back what
    this changes in the process.
    """
    take_over_sharding()
    check_trackers(log_with)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=list(log_with) or None,
        project_dir=project_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
    )
    assert_launched_together(accelerator.num_processes)
    stop_with_the_launcher()
    if accelerator.num_processes > 1:
        atexit.unregister(leave_group)  # once is enough
        atexit.register(leave_group)
        record_peers(accelerator.device)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 does nothing on a CPU (Accelerate would silently train in float32): use --precision no")
    if accelerator.device.type == "cpu" and signals.is_command():
        keep_memory()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if accelerator.num_processes > 1 else 1
    torch.set_num_threads(threads or max(1, system.cores() // local))
    return accelerator


def check_trackers(names: tuple[str, ...]) -> None:
    """Accelerate only warns of a missing tracker; a run that is to be tracked must not start untracked."""
    option = f"--log_with {' '.join(names)}"
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"{option}: {name} must be one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    installed = {str(tracker) for tracker in get_available_trackers()}  # some are members of an Enum
    if missing := [name for name in names if name not in installed]:
        extra = " (pip install 'sslvit[trackers]' installs tensorboard, trackio and wandb)"
        raise ValueError(f"{option}: not installed: pip install {' '.join(missing)}{extra}")


def take_over_sharding() -> None:
    """The loop shards (training/sharding.py), so that checkpoints stay whole; launchers only ask for it."""
    plugins = [name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if is_true(f"ACCELERATE_USE_{name}")]
    if not plugins:
        return
    if plugins != ["FSDP"] or os.environ.get("FSDP_VERSION") != "2":
        version = f" version {os.environ.get('FSDP_VERSION', 1)}" if plugins == ["FSDP"] else ""
        raise ValueError(
            f"{plugins[0]}{version} would take over the checkpoints, which are whole here: use FSDP2, which splits "
            "weights and moments too (--shard, under any launcher)"
        )
    for name, instead in (("OFFLOAD_PARAMS", "more processes"), ("ACTIVATION_CHECKPOINTING", "--grad_checkpointing")):
        if is_true(f"FSDP_{name}"):
            raise ValueError(f"fsdp_{name.lower()} of Accelerate's configuration is not supported: use {instead}")
    del os.environ["ACCELERATE_USE_FSDP"]  # or Accelerate would do it
    _launch.add("shard")


def is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def launched_to_shard() -> bool:
    return "shard" in _launch


def launch() -> set[str]:
    return set(_launch)


def restore_launch(before: set[str]) -> None:
    _launch.clear()
    _launch.update(before)


def keep_memory() -> None:
    """Freed tensors stay in this process. By default glibc returns large ones to the kernel, and each step pays for
    clearing their pages again: a sixth of a step of XS/4 with 64 images, nothing for small tensors. In return the
    process keeps its peak memory until it ends."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 1 << 28)):
        mallopt(option, value)


def start_run(config: Any) -> Accelerator:
    """`start` by a TrainConfig."""
    signals.listen(resumable=not (config.dry_run or config.show_views))
    return start(
        precision=config.precision,
        threads=config.threads,
        timeout=config.timeout,
        log_with=config.log_with,
        project_dir=str(config.out),
    )


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Ends one of several processes as soon as Python's exit handlers have run: while the interpreter is taken down
    threads of torch can still abort it, and a run that is done would count as failed."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
    os._exit(code)


def record_peers(device: torch.device) -> None:
    """Remembers the other processes on this machine, for when one of them does not answer any more."""
    host = zlib.crc32(os.uname().nodename.encode())
    rows = all_gather(torch.tensor([[host, os.getpid()]], device=device)).tolist()
    _peers.update({r: pid for r, (its_host, pid) in enumerate(rows) if its_host == host and r != rank()})


def peers() -> dict[int, int]:
    """The pids of the other processes on this machine, by rank."""
    return dict(_peers)


def assert_identical_on_all_ranks(facts: dict[str, str], device: torch.device) -> None:
    """Raises ValueError in all processes if a fact differs between them."""
    mine = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) for text in facts.values()]
    hashes = all_gather(torch.tensor([mine], device=device)).tolist()
    for other, theirs in enumerate(hashes):
        if different := [name for name, a, b in zip(facts, hashes[0], theirs, strict=True) if a != b]:
            raise ValueError(
                f"process {other} has other {' and '.join(different)} than process 0: start all with one command, on "
                "the same files, with the same versions"
            )


def assert_launched_together(seen: int) -> None:
    """Raises ValueError if several processes were requested but each would train alone, all writing one folder."""
    requested = max(int(os.environ.get("WORLD_SIZE", 1)), _requested_of_the_launcher())
    if requested > seen:
        raise ValueError(
            f"{requested} processes were requested, but this one sees {seen}: without a GPU Accelerate starts one, or "
            "several that each train alone. On a CPU start them with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {requested} SCRIPT"
        )


def stop_with_the_launcher() -> None:
    """`accelerate launch` dies of a signal without passing it on, torchrun of SIGKILL, and the run would train on. On
    Linux the kernel then sends it the signal that saves."""
    if sys.platform == "linux" and (launcher.command() or "TORCHELASTIC_RUN_ID" in os.environ):
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)


def _requested_of_the_launcher() -> int:
    """`accelerate launch --cpu --num_processes 2` starts one process that cannot know, except from its parent."""
    words = launcher.command()
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes" and (value or following).isdigit():
            return int(value or following)
    return 1
