"""This process's share of every batch: which images, when they come, and on which device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslvit.config import TrainConfig
from sslvit.data.loader import EpochSampler, Loaded, MicroBatches, Views
from sslvit.data.source import Images, Source
from sslvit.data.stream import Stream
from sslvit.data.stream_order import StreamSampler
from sslvit.data.summary import PICTURED, Summary, contact_sheet
from sslvit.objectives.objective import Batch
from sslvit.processes import collectives, signals
from sslvit.processes.device import send
from sslvit.storage import durable
from sslvit.views.batching import Size
from sslvit.views.crop import Scaled


def sampler_for(source: Images, config: TrainConfig, accelerator: Accelerator) -> MicroBatches:
    """Which images this process sees, in the order of training."""
    kind: type[MicroBatches] = StreamSampler if isinstance(source, Stream) else EpochSampler
    if kind is StreamSampler and config.workers:
        raise ValueError(f"--workers {config.workers}: a stream is decoded by threads of its own; leave --workers out")
    return kind(
        source,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        seed=config.seed,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )


def look(sampler: MicroBatches, image_size: Size, views: Views, config: TrainConfig, accelerator: Accelerator) -> None:
    """Shows the data before the hours of training begin: in words, in data.txt too, and in first_batch.png."""
    if not accelerator.is_main_process:
        return
    if isinstance(sampler.source, Source):
        canvas = views.canvas if isinstance(views, Scaled) else 0
        text = Summary(sampler.source, batch_size=config.batch_size, image_size=image_size, canvas=canvas).text()
    else:
        text = f"{sampler.source.name}: a dataset of unknown size, {len(sampler.source):,} images count as one pass"
    accelerator.print(text)
    durable.replace_text(config.out / "data.txt", text + "\n")
    first = sampler.first(PICTURED)
    first = first._replace(pixels=first.pixels[:, : sampler.source.channels])  # without a mask
    contact_sheet(first, config.out / "first_batch.png")


class Feed:
    """The micro-batches of this process, each with its views on the device. The next one can be prepared while the
    device computes a step, so that the host waits for neither the images nor the device with nothing queued on it."""

    def __init__(
        self,
        batches: Iterator[Loaded],
        views: Views,
        check_labels: Callable[[Tensor | None], None],
        device: torch.device,
    ):
        self.batches, self.views, self.check_labels, self.device = batches, views, check_labels, device
        self.loaded: Loaded | None = None
        self.batch: Batch | None = None
        self.error: BaseException | None = None

    def look_ahead(self) -> None:
        """Waits for the images of the next micro-batch. What goes wrong, a signal too, is raised when it is taken: the
        step that is under way comes first."""
        try:
            with signals.waiting():
                self.loaded = next(self.batches)
            self.check_labels(self.loaded.samples.labels)
        except (Exception, signals.Interrupted) as error:
            self.error = error

    def queue(self) -> None:
        """The copies and views of the micro-batch that was loaded; the device is not waited for. Keys and extents stay
        on the host, where all draws are made."""
        if self.loaded is None or self.error:
            return
        samples, view_key, slot_key, made = self.loaded
        labels = None if samples.labels is None else send(samples.labels, self.device)
        views = made or self.views(send(samples.pixels, self.device), view_key, samples.extents)
        self.batch = Batch(views, slot_key, labels)

    def take(self) -> tuple[Loaded, Batch]:
        """The next micro-batch; or Interrupted, in all processes if in one. Where it was not loaded yet, they agree on
        that first, since one that is in a step already would wait in it for the others."""
        if self.loaded is None and self.error is None:
            self.look_ahead()
            interrupted = isinstance(self.error, signals.Interrupted)
            if collectives.processes() > 1 and (interrupted or self.error is None):
                missing = collectives.all_mean(torch.tensor(float(interrupted), device=self.device))
                if missing.item() > 0:
                    raise signals.Interrupted
        if self.error:
            raise self.error
        if self.batch is None:
            self.queue()
        loaded, batch, self.loaded, self.batch = self.loaded, self.batch, None, None
        assert loaded is not None
        assert batch is not None
        return loaded, batch


@contextmanager
def key_on_host(objective: nn.Module, batch: Batch) -> Iterator[Batch]:
    """The batch without its key, which the objective gets back when it is called: DDP and FSDP2, which wrap it for
    several GPUs, would move the key to the GPU, and all that is drawn would be drawn and waited for there."""

    def give_back(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return arguments[0]._replace(key=batch.key), *arguments[1:]

    hook = objective.register_forward_pre_hook(give_back)
    try:
        yield batch._replace(key=None)
    finally:
        hook.remove()
