"""The images most like image NUMBER of a folder: python recipes/examples/retrieval.py MODEL FOLDER NUMBER|FILE"""

import os
import sys

import torch
import torch.nn.functional as F

from sslvit.cli import run_cli
from sslvit.data.image import read_file
from sslvit.data.spec import open_source
from sslvit.evaluate.features import extract
from sslvit.models.readout import read
from sslvit.processes.collectives import start
from sslvit.views.pretraining import eval_view
from sslvit.weights.foreign.open import open_backbone


def main() -> None:
    if len(sys.argv) != 4:
        raise ValueError(__doc__)
    backbone, about = open_backbone(sys.argv[1])
    source = open_source(f"folder:{sys.argv[2]}", image_size=backbone.image_size, cache=False)
    accelerator, view = start(), eval_view(backbone.image_size)
    features = extract(backbone.to(accelerator.device), source, view, accelerator)
    unit = F.normalize(features.by_readout[about["readout"]], dim=-1)
    if sys.argv[3] in map(str, features.ids.tolist()):
        query = unit[features.ids.tolist().index(int(sys.argv[3]))]
    elif os.path.exists(sys.argv[3]):
        (image,) = view(source.decode(read_file(sys.argv[3]))[None], torch.zeros(1, dtype=torch.int64))
        query = F.normalize(read(backbone(image.to(accelerator.device)), about["readout"]).detach().cpu()[0], dim=-1)
    else:
        raise ValueError(f"{sys.argv[3]} is neither a file nor the number of an image, 0 to {len(features.ids) - 1}")
    for place in (unit @ query).argsort(descending=True)[:6].tolist():
        print(f"{unit[place] @ query:.3f} {source.store.where(int(features.ids[place]))}")


run_cli(main)
