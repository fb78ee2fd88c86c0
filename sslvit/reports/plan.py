"""Whether a model, a batch and a precision fit GPUs that are not here, by arithmetic on small steps taken here.

What a process has on a device is counted by the storages that live during a real step of a few images, under the same
precision: weights, moments, teachers, gradients, what is kept for the backward pass. After each operation of a step
that is A + B n + C n^2 bytes for n images (C where each image meets every other one). Three small steps give the three
numbers for every operation, and so the peak for any n: with few images it is where all gradients are there, with many
where the forward pass ends. On several GPUs DDP keeps a second copy of the gradients, in the buckets that it sends.
FSDP2 divides weights, gradients and moments, beside a whole copy of the weights that is evaluated and saved, and adds
the whole of the largest block twice: one in use, one on its way. With accumulation all gradients are there from the
second micro-batch on, and the views of all micro-batches.

A GPU also holds torch's context and what lies between the pieces of its memory: RESERVED and a tenth are left for them.
The time of a step is an estimate: floating-point operations at SHARE of a GPU's rate of dense products in bf16.
"""

import copy
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslvit import rng
from sslvit.config import TrainConfig
from sslvit.objectives.objective import Batch, Objective
from sslvit.training import optim

GB = 1e9
RESERVED, PIECES = 1.0 * GB, 0.1
SHARE = 0.4  # of the rate, which well-fed steps of ViTs reach or exceed
SIZES = (2, 4, 6)  # images of the steps that are taken
# Memory in GB, and 10^12 operations a second in bf16 without sparsity, by NVIDIA's data sheets.
GPUS = {
    "v100": (32, 125), "a100": (80, 312), "h100": (80, 989), "h200": (141, 989), "b200": (180, 2250),
    "a10": (24, 125), "l4": (24, 121), "l40s": (48, 362), "rtx3090": (24, 71), "rtx4090": (24, 165),
}  # fmt: skip


class Machine(NamedTuple):
    """GPUs of one kind."""

    name: str
    memory: float  # bytes of each
    number: int
    rate: float | None  # operations per second of each, if known


class Parts(NamedTuple):
    """How a step is divided."""

    processes: int = 1
    shards: int = 1  # processes among which FSDP2 divides the weights
    accumulation: int = 1


class Memory(NamedTuple):
    """Bytes that a process has on its device, by name."""

    weights: int
    moments: int
    gradients: int
    largest_block: int
    inputs: float  # views, of an image
    forward: int  # the operations of the forward pass
    coefficients: Tensor  # 3 t: A, B, C of a step's operations, beyond weights and moments

    def step(self, images: float) -> float:
        """The peak of what a step adds."""
        return float(self._after_each(images).max())

    def _after_each(self, images: float) -> Tensor:
        a, b, c = self.coefficients
        return a + b * images + c * images**2

    def peak(self, images: float, parts: Parts) -> float:
        """images: of a micro-batch."""
        kept, more = self.weights + self.moments, 0.0
        if parts.accumulation > 1:
            more = self.gradients / parts.shards + (parts.accumulation - 1) * self.inputs * images
        if parts.shards == 1:
            return kept + self.step(images) + more + (self.gradients if parts.processes > 1 else 0)
        shared = self.weights + (kept + self.gradients) / parts.shards + 2 * self.largest_block
        gradients = self.coefficients[0].clamp(0, self.gradients)  # as many of them as there are after an operation
        gradients[: self.forward] = 0  # what lives then whatever the batch are weights in bf16, whole on each GPU
        return shared + float((self._after_each(images) - gradients).max()) + more


def machine(words: tuple[str, ...]) -> Machine:
    """h100, h100:80GB, or h100:80GB x 8"""
    text = " ".join(words)
    match = re.fullmatch(r"([a-z0-9]+)(?::(\d+(?:\.\d+)?)GB)?(?: ?x ?(\d+))?", text, re.IGNORECASE)
    if match is None or int(match[3] or 1) == 0:
        raise ValueError(f"--plan {text}: must be like h100, h100:80GB or h100:80GB x 8")
    name = match[1].lower()
    if name not in GPUS and not match[2]:
        raise ValueError(f"--plan {text}: give its memory, e.g. {name}:80GB; known are {', '.join(GPUS)}")
    memory, rate = GPUS.get(name, (0, None))
    return Machine(name, float(match[2] or memory) * GB, int(match[3] or 1), rate and rate * 1e12)


class Alive(TorchDispatchMode):
    """The bytes of storages that live now, of those that are made inside, and how many lived after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.after: list[int] = []
        self.known: set[int] = set()

    @property
    def peak(self) -> int:
        return max(self.after)

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.meet(leaf)
        self.after.append(self.now)
        return result

    def meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        weakref.finalize(storage, self.leave, key, size)

    def leave(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def ignore(self, tensors: list[Tensor]) -> None:
        """What lives already."""
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}


def memory_of(objective: Objective, config: TrainConfig, batch: Callable[[int], Batch]) -> Memory:
    """batch: so many images, as the objective sees them."""
    trained = copy.deepcopy(objective).train()
    optimizer = optim.new_optimizer(trained, config)
    autocast = nullcontext()
    if config.precision in ("bf16", "fp16"):
        autocast = torch.autocast("cpu", torch.bfloat16)  # a CPU has no fp16; both have two bytes

    def step(images: int) -> tuple[list[int], int]:
        """What lives after each operation, and how many of them are of the forward pass."""
        given = batch(images)
        with Alive() as alive:
            alive.ignore([*trained.parameters(), *trained.buffers(), *moments(optimizer), *tensors_of(given)])
            with autocast:
                loss, _ = trained(given, 0.5)
            forward = len(alive.after)
            loss.backward()
            optimizer.step()
            trained.after_step(0.5)
            del loss
            optimizer.zero_grad()
        inputs = size_of(tensors_of(given))
        return [live + inputs for live in alive.after], forward

    step(SIZES[0])  # AdamW makes its moments in the first
    taken = [step(size) for size in SIZES]
    curves, forward = [curve for curve, _ in taken], taken[0][1]
    if len({len(curve) for curve in curves}) > 1:  # where masks vary, so may the operations
        curves, forward = [[max(curve)] for curve in curves], 1
    parameters = [p for p in trained.parameters() if p.requires_grad]
    blocks = [size_of(list(block.parameters())) for block in getattr(objective.learner, "blocks", [])]
    return Memory(
        weights=size_of([*trained.parameters(), *trained.buffers()]),
        moments=size_of(moments(optimizer)),
        gradients=size_of(list(parameters)),
        largest_block=max(blocks, default=0),
        inputs=size_of(tensors_of(batch(SIZES[0]))) / SIZES[0],
        forward=forward,
        coefficients=parabola(torch.tensor(curves, dtype=torch.float64)),
    )


def tensors_of(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tuple(batch)) if isinstance(leaf, Tensor)]


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def size_of(tensors: list[Tensor] | list[nn.Parameter]) -> int:
    """Bytes of their storages, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def parabola(bytes_after: Tensor) -> Tensor:
    """A, B, C of A + B n + C n^2 through what lived at SIZES; a line where C would be below 0: 3 t -> 3 t"""
    n = torch.tensor(SIZES, dtype=torch.float64)
    through = torch.linalg.solve(torch.stack([n**0, n, n**2], 1), bytes_after)
    slope = (bytes_after[-1] - bytes_after[0]) / (n[-1] - n[0])
    line = torch.stack([bytes_after[-1] - slope * n[-1], slope, torch.zeros_like(slope)])
    return torch.where(through[2] > 0.25, through, line)  # of a byte: no rounding


def fits(memory: Memory, on: Machine, images: float, parts: Parts) -> bool:
    return memory.peak(images, parts) * (1 + PIECES) + RESERVED <= on.memory


def largest(memory: Memory, on: Machine, parts: Parts) -> int:
    """Images per process that just fit; 0 if none does."""
    low, high = 0, 1
    while high < 1 << 24 and fits(memory, on, high, parts):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(memory, on, middle, parts) else (low, middle)
    return low


def told(memory: Memory, on: Machine, config: TrainConfig, flops: float | None) -> list[str]:
    """The verdict, the arithmetic behind it, the largest batch, and an estimate of time."""
    parts = Parts(on.number, on.number if config.shard else 1, config.accumulation)
    images, rest = divmod(config.batch_size, on.number * config.accumulation)
    if rest:
        raise ValueError(
            f"--batch_size {config.batch_size} is not divisible by {on.number} GPUs"
            + (f" times --accumulation {config.accumulation}" if config.accumulation > 1 else "")
        )
    peak, verdict = memory.peak(images, parts), "fits" if fits(memory, on, images, parts) else "DOES NOT FIT"
    held = {"weights": memory.weights, "moments": memory.moments, "gradients": memory.gradients}
    listed = ", ".join(f"{name} {size / GB:.3g}" for name, size in held.items())
    divided = f", divided among {parts.shards}" if parts.shards > 1 else ""
    gpus = f"{on.name} of {on.memory / GB:g} GB" + (f" x {on.number}" if on.number > 1 else "")
    lines = [
        f"plan        {gpus}: {verdict}. {peak / GB:.3g} GB at the peak of a step; {RESERVED / GB:g} GB and a tenth "
        "more are left for torch",
        f"            {listed} GB{divided}; {memory.step(images) / GB:.3g} GB of a step with {images:,.0f} images, "
        f"including gradients",
    ]
    most = largest(memory, on, parts)
    if most:
        whole = most * on.number * config.accumulation
        lines.append(f"            the largest batch that fits: {most:,} images per GPU, --batch_size {whole:,}")
    else:
        sharded = "" if config.shard or on.number == 1 else "; --shard divides what the GPUs hold"
        lines.append(f"            not one image fits{sharded}")
    if flops and on.rate:
        seconds = flops * config.batch_size / (SHARE * on.rate * on.number)
        lines.append(
            f"            a step of about {seconds:.2g} s, an estimate: at {SHARE:.0%} of "
            f"{on.rate / 1e12:g} x 10^12 operations per second"
        )
    return lines


def batches(views: Callable, pixels: Tensor, extents: Tensor | None, labels: Tensor | None) -> Callable[[int], Batch]:
    """Batches of any number of images, by repeating a few."""

    def of(images: int) -> Batch:
        rows = torch.arange(images) % len(pixels)
        key = rng.key(0, torch.arange(images))
        seen = views(pixels[rows], key, None if extents is None else extents[rows])
        return Batch(seen, key, None if labels is None else labels[rows])

    return of
