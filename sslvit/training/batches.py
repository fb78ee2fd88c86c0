"""This process's share of every batch: which images, when they come, and on which device."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from sslvit.config import TrainConfig
from sslvit.data.loader import EpochSampler, Loaded, MicroBatches, Views
from sslvit.data.source import Images, Source
from sslvit.data.stream import Stream
from sslvit.data.stream_order import StreamSampler
from sslvit.data.summary import PICTURED, Summary, contact_sheet
from sslvit.processes import collectives, signals
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
    contact_sheet(sampler.first(PICTURED), config.out / "first_batch.png")


def next_batch(batches: Iterator[Loaded], device: torch.device) -> Loaded:
    """The next micro-batch, on the device; or Interrupted, in all processes if in one. They agree before each
    micro-batch, since one that is in a step already would wait in it for the others."""
    loaded = None
    try:
        with signals.waiting():
            loaded = next(batches)
    except signals.Interrupted:
        if collectives.processes() == 1:
            raise
    if collectives.processes() > 1:
        missing = collectives.all_mean(torch.tensor(float(loaded is None), device=device))
        if missing.item() > 0:
            raise signals.Interrupted
    assert loaded is not None
    return to_device(loaded, device)


def to_device(loaded: Loaded, device: torch.device) -> Loaded:
    def move(value: Tensor | None) -> Tensor | None:
        return value if value is None else value.to(device, non_blocking=True)

    samples = loaded.samples
    samples = samples._replace(pixels=move(samples.pixels), extents=move(samples.extents), labels=move(samples.labels))
    return loaded._replace(samples=samples, view_key=move(loaded.view_key), slot_key=move(loaded.slot_key))
