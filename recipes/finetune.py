"""All weights of a pretrained model, trained on labels; then its accuracy on the test set.

    accelerate launch recipes/finetune.py --model runs/mpp/model --data shapes --steps 500
    accelerate launch recipes/finetune.py --protocol modern --model runs/mae/model --data folder:/imagenet

The protocols and where they come from are in sslvit/finetune.py. --scratch is the other side of every comparison: the
same from a random start. The test set is looked at once, after everything is chosen and trained. The model that is
left, with its head, is a classifier to sslvit.weights.folder.load_classifier and to timm. Not yet run in full.
"""

from dataclasses import asdict, dataclass, replace

import torch

from sslvit.cli import choose, run_cli
from sslvit.config import ImagesConfig
from sslvit.data.subset import Subset
from sslvit.errors import DataError
from sslvit.evaluate.balance import collapsed
from sslvit.evaluate.metrics import confusion, metrics
from sslvit.evaluate.predictions import save_predictions
from sslvit.finetune import PROTOCOLS, FinetuneConfig, chosen_part, classifier, finetune, lengthened, predict, settled
from sslvit.preflight.dry_run import dry_run
from sslvit.preflight.views import show_views
from sslvit.processes.collectives import start_run
from sslvit.reports.figures import draw_confusion
from sslvit.storage import sealed
from sslvit.views.batching import Size
from sslvit.weights.foreign.options import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig, FinetuneConfig, ImagesConfig):
    """Fine-tune a pretrained model, on labelled images with a train and a test split."""

    image_size: Size = 0
    """0 takes the model's own; larger than it, positions are interpolated."""
    scratch: bool = False
    """Start the same architecture at random instead."""


def main() -> None:
    config = settled(choose({name: Config(**asdict(protocol)) for name, protocol in PROTOCOLS.items()}, by="protocol"))
    accelerator = start_run(config)
    backbone, written = config.open()
    size, readout = config.image_size or backbone.image_size, config.readout
    readout = written["readout"] if readout == "declared" else readout
    if config.scratch:
        backbone = type(backbone)(replace(backbone.config, seed=config.seed))
    like = {"image_size": size, "channels": backbone.channels}
    train = config.source(**like)
    test = config.source("test", classes=train.classes, **like)
    if show_views(config, train, config.views(size), accelerator):
        return
    if config.dry_run:
        part = Subset(train, chosen_part(torch.from_numpy(train.required_labels()), config).numpy())
        objective = classifier(backbone, int(train.labels.max()) + 1, config, readout=readout, image_size=size)
        dry_run(lengthened(config, len(part)), objective, part, config.views(size), accelerator)
        return
    classes, highest = len(set(train.required_labels().tolist())), int(test.required_labels().max())
    if highest > train.labels.max():
        raise DataError(f"{test.name} has label {highest}, beyond the training images' {train.labels.max()}")
    given = {"eval_crop": config.eval_crop}
    objective, tried = finetune(backbone, train, config, accelerator, readout=readout, image_size=size, **given)
    rate = max(tried, key=tried.get) if tried else config.lr
    about = {"model": str(config.model), "scratch": config.scratch, "data": test.name, "protocol": config.protocol}
    found = predict(objective, test, size, accelerator, about=about | {"readout": readout, "lr": rate}, **given)
    numbers = metrics(found.probabilities, found.labels)
    if accelerator.is_main_process:
        save_predictions(config.out / "predictions.parquet", found)
        draw_confusion(confusion(found.probabilities, found.labels), train.classes, config.out / "confusion.png")
        tested = numbers._asdict() | {"images": len(found.labels), "lr": rate, "held out": tried}
        sealed.write(config.out / "test.json", tested)
    five = f"top-5 {100 * numbers.top5:.2f} %, " if classes > 5 else ""
    if sentence := collapsed(found.probabilities.argmax(-1), found.labels):
        accelerator.print(f"warning: {sentence}")
    accelerator.print(
        f"test, {len(found.labels):,} images, lr {rate:g}, readout {readout}: top-1 {100 * numbers.top1:.2f} %, {five}"
        f"balanced accuracy {100 * numbers.mean_per_class:.2f} %, calibration error "
        f"{100 * numbers.calibration_error:.2f} %\nThe model is in {config.out / 'model'}"
    )


if __name__ == "__main__":
    run_cli(main)
