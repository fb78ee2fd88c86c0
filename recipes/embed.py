"""Features of images, by any model that can be opened, as a file.

    python recipes/embed.py runs/mpp folder:/my/images features.parquet
    python recipes/embed.py runs/mpp shapes features.npy --readout both

A .parquet file has the columns id, path, label and features, as far as there are paths and labels, and in its metadata
what they are of; a .npy file has the features alone, as numpy maps it into memory, and the rest is in a parquet file
beside it. Rows are in the order of ids. Images that cannot be read have no row and are listed in a file beside it.

Killed at any time, the same command goes on. Several processes, by torchrun or accelerate launch, share the work; the
rows do not depend on their number.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from sslvit.cli import run_cli
from sslvit.config import ImagesConfig, check_bounds, option
from sslvit.evaluate.embedding import UNREADABLE, Embedded, beside, check_out, embed
from sslvit.evaluate.features import READOUT
from sslvit.evaluate.monitor import draw_ids
from sslvit.processes.collectives import start
from sslvit.views.batching import Size
from sslvit.weights.foreign.options import ModelConfig

PATIENCE = 7 * 24 * 3600.0  # seconds that a process waits for the others, whose images may be slower to read


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig, ImagesConfig):
    """Write the features of images to a file. No labels are needed."""

    positional: ClassVar[tuple[str, ...]] = ("model", "data", "out")
    model: Path = field()
    data: str = field()
    out: Path
    """The file, .parquet or .npy."""
    image_size: Size = 0
    """Side in pixels; 0 takes the model's own."""
    split: Literal["train", "test"] = "train"
    """A set without splits is all train."""
    readout: str = "declared"
    """What is read: declared, cls, mean, both, cls:4 or patches. The objective declares one; cls:4 joins the last four
    blocks, and patches are all of them."""
    limit: int = option(0, least=0)
    """Use at most this many images, drawn at random; 0 takes all."""
    float16: bool = False
    """Store half the bytes. Features are computed in float32."""
    batch_size: int = option(256, above=0)
    """Images per forward pass of each process."""
    workers: int = option(0, least=0)
    """Processes that read images, per process."""
    overwrite: bool = False
    """Replace the file. Also an unfinished one of another model or other images."""
    threads: int = option(0, least=0)
    """CPU threads; 0 takes one per core."""


def main(config: Config) -> Embedded:
    check_bounds(config)
    check_out(config.out, config.overwrite)
    if config.readout != "declared" and not re.fullmatch(READOUT, config.readout):
        raise ValueError(f"--readout {config.readout}: declared, cls, mean, both, cls:4, mean:4, both:4 or patches")
    accelerator = start(threads=config.threads, timeout=PATIENCE)
    backbone, written = config.open()
    backbone.to(accelerator.device)
    size = config.image_size or backbone.image_size
    source = config.source(config.split, image_size=size, channels=backbone.channels)
    done = embed(
        backbone,
        source,
        config.eval_view(size),
        accelerator,
        config.out,
        ids=draw_ids(source, config.limit),
        readout=written["readout"] if config.readout == "declared" else config.readout,
        about={"model": str(config.model), "split": config.split, "image_size": size},
        batch_size=config.batch_size,
        workers=config.workers,
        float16=config.float16,
        overwrite=config.overwrite,
    )
    speed = f", {done.per_second:,.3g} images per second" if done.per_second else ""
    accelerator.print(f"{done.rows:,} rows of {' x '.join(map(str, done.shape))} in {config.out}{speed}")
    if done.unreadable:
        accelerator.print(f"{done.unreadable:,} cannot be read, see {beside(config.out, UNREADABLE)}")
    return done


if __name__ == "__main__":
    run_cli(main, Config)
