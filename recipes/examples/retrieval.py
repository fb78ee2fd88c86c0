"""The images of a folder that are most like one of them: python recipes/examples/retrieval.py MODEL FOLDER NUMBER"""

import sys

import torch

from sslvit.data.source import open_source
from sslvit.data.views import evaluation
from sslvit.distributed import start
from sslvit.errors import at_the_door
from sslvit.evaluate.features import extract
from sslvit.weights import open_backbone


def main() -> None:
    if len(sys.argv) != 4:
        raise ValueError(__doc__)
    backbone, about = open_backbone(sys.argv[1])
    source = open_source(f"folder:{sys.argv[2]}", image_size=backbone.image_size, cache=False)
    accelerator = start()
    found = extract(backbone.to(accelerator.device), source, evaluation(backbone.image_size), accelerator)
    unit = torch.nn.functional.normalize(found.by_readout[about["readout"]], dim=-1)
    if sys.argv[3] not in map(str, found.ids.tolist()):
        raise ValueError(f"NUMBER {sys.argv[3]} is none of the {len(found.ids)} images, which are counted from 0")
    query = found.ids.tolist().index(int(sys.argv[3]))
    for place in (unit @ unit[query]).argsort(descending=True)[:6].tolist():
        print(f"{unit[place] @ unit[query]:.3f} {source.store.where(int(found.ids[place]))}")


at_the_door(main)
