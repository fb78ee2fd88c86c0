"""An object detector on a pretrained ViT: torchvision's Faster R-CNN on a pyramid of its feature maps.

    python recipes/examples/detection.py MODEL [STEPS [scratch]]

It learns the objects of the built-in scenes, whose boxes are known, in a few minutes on two CPU cores, and prints the
average precision on other scenes as COCO defines it (mean over IoU 0.50 to 0.95), by torchmetrics if it is installed.
With `scratch` the same ViT starts at random. A sketch to start from: no augmentation but flips, one rate.
"""

import sys
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, masks_to_boxes

from sslvit.cli import run_cli
from sslvit.data.readers import scenes
from sslvit.finetuning import prepare
from sslvit.models.vit import ViT
from sslvit.weights.backbone import with_random_weights
from sslvit.weights.foreign.open import open_backbone

SIZE, BATCH, TRAIN, TEST, SMALLEST = 64, 8, 2_000, 200, 12  # pixels, images, scenes, scenes, visible pixels


class Pyramid(nn.Module):
    """The last block's patches at twice, once and half their resolution."""

    def __init__(self, vit: ViT, channels: int = 96):
        super().__init__()
        self.vit, self.out_channels = vit, channels
        self.lateral = nn.ModuleList(nn.Conv2d(vit.width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        patches = self.vit.feature_map(images)
        maps = (F.interpolate(patches, scale_factor=2.0, mode="bilinear"), patches, F.avg_pool2d(patches, 2))
        levels = [smooth(side(one)) for side, smooth, one in zip(self.lateral, self.smooth, maps, strict=True)]
        return OrderedDict((str(level), one) for level, one in enumerate(levels))


def detector(vit: ViT) -> FasterRCNN:
    # The ViT standardises its own images, so torchvision's own step does nothing to them. These images are small, so
    # a step looks at 64 of 200 proposals each, not at torchvision's 512 of 2,000.
    return FasterRCNN(
        Pyramid(vit),
        num_classes=1 + len(scenes.SHAPES),
        rpn_anchor_generator=AnchorGenerator(((10,), (20,), (40,)), ((0.5, 1.0, 2.0),) * 3),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        min_size=SIZE, max_size=SIZE, image_mean=[0.0] * 3, image_std=[1.0] * 3, box_detections_per_img=20,
        rpn_pre_nms_top_n_train=400, rpn_post_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=400, rpn_post_nms_top_n_test=200, box_batch_size_per_image=64,
    )  # fmt: skip


def batch(ids: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images, and the boxes and classes of the objects that can be seen."""
    made, targets = scenes.make(ids, SIZE), []
    for objects, kinds in zip(made.objects, made.kinds, strict=True):
        numbers = [number for number in range(scenes.MOST) if (objects == number).sum() >= SMALLEST]
        shown = torch.stack([objects == number for number in numbers]) if numbers else torch.zeros(0, SIZE, SIZE)
        boxes = masks_to_boxes(shown) + torch.tensor([0, 0, 1, 1])
        targets.append({"boxes": boxes.float().reshape(-1, 4), "labels": 1 + kinds[numbers]})
    return list(made.images / 255), targets


def train(model: FasterRCNN, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        images, targets = batch(torch.randint(TRAIN, (BATCH,), generator=generator))
        if step % 2:
            images = [image.flip(-1) for image in images]
            targets = [one | {"boxes": torch.stack([SIZE - one["boxes"][:, 2], one["boxes"][:, 1],
                                                    SIZE - one["boxes"][:, 0], one["boxes"][:, 3]], 1)}
                       for one in targets]  # fmt: skip
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1:,} of {steps:,}, loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def average_precision(model: FasterRCNN) -> str:
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision()
    except ImportError as error:
        return f"AP is not computed: {error}"
    model.eval()
    for ids in (torch.arange(TEST) + (1 << 40)).split(BATCH):
        images, targets = batch(ids)
        metric.update(model(images), targets)
    found = metric.compute()
    return f"AP {100 * found['map']:.1f}, AP at IoU 0.5 {100 * found['map_50']:.1f}, {TEST} test scenes"


def main() -> None:
    if not 2 <= len(sys.argv) <= 4 or sys.argv[3:] not in ([], ["scratch"]):
        raise ValueError(__doc__)
    vit, _ = open_backbone(sys.argv[1])
    if not isinstance(vit, ViT):
        raise ValueError(f"{sys.argv[1]} is no ViT")
    vit = prepare(with_random_weights(vit) if sys.argv[3:] else vit, SIZE).train()
    torch.manual_seed(0)
    model = detector(vit)
    train(model, int(sys.argv[2]) if len(sys.argv) > 2 else 500)
    print(average_precision(model))


if __name__ == "__main__":
    run_cli(main)
