"""A pretrained model for images of another number of channels: `--inflate`.

mean        every new filter is the mean of the old ones
0,1,2,1     the old channel that each new one starts from, counted from 0

Filters are multiplied by old / new channels, so that their sum over channels keeps its scale; with mean it stays what
it was. The mean is that of DINOv3's multi-channel models (FINO); timm's adapt_input_conv sums for one channel, which
is the same, and repeats the old channels in turn for others, which is 0,1,2,0 for four. Means and standard deviations
of pixels go the same way, not multiplied.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.processes import collectives


def with_channels(backbone: ViT | BiT, channels: int, inflate: str, model: str) -> ViT | BiT:
    """The backbone for images of so many channels; it says what was done. model: how the user names it."""
    old = backbone.channels
    chosen = chosen_channels(inflate, old, channels)
    if old == channels and chosen is None:
        return backbone
    if not inflate:
        raise ValueError(
            f"{model} takes images of {old} channels, these have {channels}: --inflate mean starts the new channels "
            f"from the mean of its own, and --inflate {','.join(str(i % old) for i in range(channels))} from these"
        )
    if isinstance(backbone, BiT) or backbone.config.hybrid:
        raise ValueError(
            f"--inflate {inflate}: {model} is a {backbone.name}, whose ResNet standardises its filters, so that their "
            "scale is lost: only the patches of a ViT can be inflated"
        )
    if collectives.rank() == 0:
        source = "the mean of all old ones" if chosen is None else "that of one old channel"
        print(
            f"note: --inflate {inflate}: from {old} channels to {channels}. Each filter is {source}, times "
            f"{old}/{channels}. Elsewhere repeated filters made frozen features worse in 16 of 17 cases, by 3.9 points "
            "on average (torchgeo-bench, pull request 85), so inflate a model only to train it"
        )
    return inflated(backbone, channels, chosen)


def chosen_channels(inflate: str, old: int, new: int) -> list[int] | None:
    """None for the mean."""
    if inflate in ("", "mean"):
        return None
    if not re.fullmatch(r"\d+(,\d+)*", inflate):
        raise ValueError(f"--inflate {inflate}: say mean, or old channels such as 0,1,2,1")
    chosen = [int(number) for number in inflate.split(",")]
    if len(chosen) != new or max(chosen) >= old:
        numbers = f"{new} numbers, one per channel of the images," if new > 1 else "one number"
        raise ValueError(f"--inflate {inflate}: give {numbers} from 0 to {old - 1}")
    return chosen


def inflated(vit: ViT, channels: int, chosen: list[int] | None) -> ViT:
    old = vit.channels

    def picked(values: Tensor) -> Tensor:
        """Of old channels along dimension 1."""
        return (
            values.mean(1, keepdim=True).expand(-1, channels, *values.shape[2:])
            if chosen is None
            else values[:, chosen]
        )

    mean, std = picked(torch.tensor([vit.config.mean, vit.config.std], dtype=torch.float64)).tolist()
    other = ViT(replace(vit.config, channels=channels, mean=tuple(mean), std=tuple(std)))
    state, name = vit.state_dict(), "patch_embed.proj.weight"
    other.load_state_dict(state | {name: picked(state[name]) * (old / channels)})
    return other.to(state[name]).train(vit.training)
