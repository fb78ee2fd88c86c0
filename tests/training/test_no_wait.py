"""What waits for a GPU in a training step: the loop once, with the next batch queued. On a device that is not there."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import DEVICE, FakeDevice, moved, on_device
from objectives_zoo import OBJECTIVES, Case, Views, vit
from torch import Tensor, nn

from sslvit.config import TrainConfig
from sslvit.data.labels import Labels
from sslvit.data.loader import EpochSampler, load
from sslvit.data.source import ArraySource
from sslvit.data.unreadable import UnreadableImages
from sslvit.evaluate.features import _forward
from sslvit.models.blocks import Block
from sslvit.objectives.objective import Batch, Objective
from sslvit.train import train
from sslvit.training import optim
from sslvit.training.batches import Feed
from sslvit.training.loop import Loop
from sslvit.training.state import RunState
from sslvit.views.pretraining import EvalView

STEPS, BATCH = 3, 8


def images(count: int = STEPS * BATCH) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), np.uint8)
    return ArraySource(pixels, name="noise", fingerprint="", labels=Labels(np.arange(count) % 3, None, ""))


class Noted(Views):
    """Views that tell when they are made."""

    def __init__(self, case: Case, events: list[str]):
        super().__init__(case)
        self.events = events

    def __call__(self, pixels: Tensor, key: Tensor, extents: Tensor | None = None) -> tuple[Tensor, ...]:
        self.events.append("views")
        return super().__call__(pixels, key, extents)


class Accelerator(SimpleNamespace):
    """One of one process, whose backward pass leaves gradients without computing any."""

    device, scaler, mixed_precision, is_main_process, num_processes = DEVICE, None, "bf16", False, 1

    def backward(self, loss: Tensor) -> None:
        assert loss.device == DEVICE
        for parameter in self.objective.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def clip_grad_norm_(self, parameters: list[nn.Parameter], most: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, most)

    def print(self, *words: Any) -> None: ...

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()


class Wrapped(nn.Module):
    """Moves to the device what it is given, as DDP and FSDP2 do."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.module = objective

    def forward(self, batch: Batch, progress: float) -> Any:
        return self.module(Batch(*on_device(tuple(batch))), progress)


def steps_of(
    objective: Objective, case: Case, device: FakeDevice, out: Any, model: nn.Module | None = None, **changes: Any
) -> None:
    """Three steps of the loop, under bf16, on the device."""
    config = TrainConfig(out=out, batch_size=BATCH, epochs=1, clip=1.0, log_every=100, save_every=100, **changes)
    accelerator = Accelerator(objective=objective)
    sampler = EpochSampler(images(), batch_size=BATCH, accumulation=config.accumulation, seed=0, rank=0, processes=1)
    batches = load(sampler, first_step=0, steps=STEPS, workers=0, timeout=1, pin=False)
    optimizer = optim.new_optimizer(objective, config)
    optimizer.register_step_post_hook(lambda *_: device.events.append("step"))

    objective.forward = torch.autocast("cuda", torch.bfloat16)(objective.forward)
    unreadable = UnreadableImages(out / "bad_images.jsonl", size=sampler.different, max_bad=config.max_bad)
    feed = Feed(batches, Noted(case, device.events), objective.check_labels, DEVICE)
    run = Loop(
        objective, model or objective, optimizer, sampler, batches,
        feed, True, unreadable, None, config, accelerator, STEPS,
    )  # fmt: skip
    log, checkpoints = SimpleNamespace(write=lambda *_: None), SimpleNamespace(save=lambda **_: None)
    train(run, RunState(), log, checkpoints)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_host_waits_once_in_a_step_with_the_next_batch_queued(name, tmp_path):
    case, kinds = OBJECTIVES[name], set()
    with FakeDevice() as device:
        objective = moved(case.make(0).train())
        for block in objective.modules():
            for linear in block.modules() if isinstance(block, Block) else ():
                if isinstance(linear, nn.Linear):
                    linear.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
        steps_of(objective, case, device, tmp_path)
    assert device.events == ["views", "views", "wait", "step", "views", "wait", "step", "wait", "step"]
    assert kinds <= {torch.bfloat16}  # what autocast makes of all linear layers of the backbones
    assert kinds or name == "supervised-bit"


@pytest.mark.parametrize("name", ["mpp-mean", "ibot", "dinov2", "ijepa", "data2vec"])
def test_so_it_is_where_a_wrapper_moves_the_batch_to_the_device(name, tmp_path):
    """All of it but the key: what is drawn from it on the device would be waited for."""
    with FakeDevice() as device:
        objective = moved(OBJECTIVES[name].make(0).train())
        steps_of(objective, OBJECTIVES[name], device, tmp_path, Wrapped(objective))
    assert device.events == ["views", "views", "wait", "step", "views", "wait", "step", "wait", "step"]


def test_so_it_is_with_several_micro_batches(tmp_path):
    with FakeDevice() as device:
        steps_of(moved(OBJECTIVES["mpp-mean"].make(0)), OBJECTIVES["mpp-mean"], device, tmp_path, accumulation=2)
    assert device.events == ["views"] * 3 + ["wait", "step"] + ["views"] * 2 + ["wait", "step", "views", "wait", "step"]


@pytest.mark.parametrize("readouts", [("cls", "mean"), ("both:2", "patches")])
def test_an_extractor_waits_for_a_batch_when_the_next_one_is_queued(readouts):
    source = images(4 * BATCH)
    loader = [source.read(np.arange(first, first + BATCH)) for first in range(0, len(source), BATCH)]
    with FakeDevice() as device:
        backbone = moved(vit(0))
        view = EvalView(16)

        def noted(*given: Tensor) -> tuple[Tensor, ...]:
            device.events.append("views")
            return view(*given)

        rows = _forward(backbone, loader, noted, 0, readouts, DEVICE)
    assert {len(values) for values in rows.values()} == {len(source)}
    assert device.events == ["views"] + ["views", "wait", "wait"] * 3 + ["wait", "wait"]
