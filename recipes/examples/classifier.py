"""A classifier on a pretrained backbone, in a loop of your own: python recipes/examples/classifier.py MODEL FOLDER"""

import sys

import torch
import torch.nn.functional as F

from sslvit.cli import run_cli
from sslvit.data.spec import open_source
from sslvit.models.readout import Classifier
from sslvit.views.pretraining import eval_view
from sslvit.weights.foreign.open import open_backbone


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError(__doc__)
    backbone, about = open_backbone(sys.argv[1])
    source = open_source(f"folder:{sys.argv[2]}", image_size=backbone.image_size)
    labels = torch.from_numpy(source.required_labels())
    model = Classifier(backbone.freeze(blocks=2), readout=about["readout"], classes=len(source.classes)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        ids = torch.randint(len(source), (16,))
        samples = source.read(ids.numpy())
        (images,) = eval_view(backbone.image_size)(samples.pixels, torch.zeros(16, dtype=torch.int64), samples.extents)
        loss = F.cross_entropy(model(images), labels[ids])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{len(source.classes)} classes, the last loss is {loss.item():.3f}")


run_cli(main)
