"""All weights of a pretrained model, trained on labels; then its accuracy on the test set.

    accelerate launch recipes/finetune.py --model runs/mpp/model --data shapes --steps 500
    accelerate launch recipes/finetune.py --protocol modern --model runs/mae/model --data folder:/imagenet

The protocols and where they come from are in sslvit/finetuning.py. --scratch is the other side of every comparison: the
same from random weights. The test set is read once, after everything is chosen and trained. The trained model, with
its head, is a classifier to sslvit.weights.folder.load_classifier and to timm. Not yet run in full.
"""

from dataclasses import replace
from typing import Any

import torch

from sslvit.cli import run_cli
from sslvit.data.subset import Subset
from sslvit.errors import DataError
from sslvit.evaluate.balance import collapsed
from sslvit.evaluate.labelled import open_labelled
from sslvit.finetuning import (
    PROTOCOLS,
    FinetuneConfig,
    chosen_ids,
    classifier,
    finetune,
    lengthened,
    rate_of,
    settled,
)
from sslvit.processes.collectives import start_run
from sslvit.reports.dry_run import preview
from sslvit.reports.live import LiveReport
from sslvit.reports.tested import read_test
from sslvit.weights.backbone import with_random_weights
from sslvit.weights.channels import with_channels

PRESETS = PROTOCOLS


def main(config: FinetuneConfig) -> dict[str, Any]:
    config = settled(config)
    accelerator = start_run(config)
    backbone, about = config.open()
    size = config.image_size or backbone.image_size
    readout = about["readout"] if config.readout == "declared" else config.readout
    train, test, note = open_labelled(config, size, None if config.inflate else backbone.channels, about=about)
    backbone = with_channels(backbone, train.channels, config.inflate, f"--model {config.model}")
    if config.scratch:
        backbone = with_random_weights(backbone, seed=config.seed)
    if note:
        accelerator.print(note)
    labels, test_labels = train.required_labels(), test.required_labels()
    highest = labels.max()
    if config.show_views or config.dry_run:
        images = Subset(train, chosen_ids(torch.from_numpy(labels), config).numpy())
        objective = classifier(backbone, int(highest) + 1, config, readout=readout, image_size=size)
        trial = lengthened(replace(config, lr=rate_of(config)), len(images))
        preview(trial, objective, images, config.views(size), accelerator)
        return {}
    if test_labels.max() > highest:
        raise DataError(f"{test.name} has label {test_labels.max()}, beyond the training images' {highest}")
    objective, tried = finetune(
        backbone, train, config, accelerator, readout=readout, image_size=size, test=test, watch=LiveReport
    )
    predicted, numbers = read_test(objective, train, test, config, accelerator, tried=tried, image_size=size)
    shown = {name: f"{value:.2%}" for name, value in numbers.items() if isinstance(value, float)}
    five = f"top-5 {shown['top5']}, " if len(set(labels.tolist())) > 5 else ""
    if sentence := collapsed(predicted.probabilities.argmax(-1), predicted.labels):
        accelerator.print(f"warning: {sentence}")
    accelerator.print(
        f"test, {len(predicted.labels):,} images, lr {numbers['lr']:g}, readout {readout}: "
        f"top-1 {shown['top1']}, {five}"
        f"balanced accuracy {shown['mean_per_class']}, calibration error {shown['calibration_error']}\n"
        f"The model is in {config.out / 'model'}"
    )
    return numbers


if __name__ == "__main__":
    run_cli(main, PRESETS)
