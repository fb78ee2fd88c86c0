"""The backbone that a recipe trains: with random weights, or the model of --init_from."""

import os
from dataclasses import replace
from typing import Any

from sslvit.config import PretrainConfig
from sslvit.data.source import Images
from sslvit.errors import NoInput
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.processes import collectives
from sslvit.weights.foreign.open import start_from


def new_backbone(
    config: PretrainConfig,
    images: Images,
    preset: PretrainConfig,
    kind: type[ViT] | type[BiT] = ViT,
    **options: Any,
) -> Any:
    """The model of --init_from, or one of this kind by the name of --model, with these options.

    preset: the configuration's defaults. Its model gives way to that of --init_from; another --model must be the same.
    """
    if not config.init_from:
        return kind.variant(config.model, image_size=config.image_size, channels=images.channels, **options)
    if not os.path.exists(config.init_from):
        raise NoInput(f"--init_from {config.init_from} does not exist: it is the folder of a model or of a run")
    backbone = start_from(
        config.init_from, image_size=config.image_size, channels=images.channels, inflate=config.inflate
    )
    resumed = config.resume and (config.out / "checkpoints").exists()  # whose settings are compared with the old ones
    if config.model != backbone.name and not resumed:
        if config.model != preset.model:
            raise ValueError(
                f"--model {config.model} is not the model of --init_from {config.init_from}, {backbone.name}: leave "
                "one of them out"
            )
        if collectives.rank() == 0:
            print(f"note: the model is {backbone.name}, from --init_from; the preset's would be {preset.model}")
    if "drop_path" in options and isinstance(backbone, ViT):  # of training, whatever the file was trained with
        backbone.drop_path = options["drop_path"]
        backbone.config = replace(backbone.config, drop_path=backbone.drop_path)
    return backbone


def with_random_weights(backbone: ViT | BiT, **changes: Any) -> ViT | BiT:
    """The same architecture, with what its configuration says of random weights."""
    config = replace(backbone.config, **changes)
    return ViT(config) if isinstance(config, ViTConfig) else BiT(config)
