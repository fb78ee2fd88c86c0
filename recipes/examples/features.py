"""The features of a folder of images, as a table: python recipes/examples/features.py MODEL FOLDER OUT.parquet"""

import sys

import pyarrow as pa
import pyarrow.parquet as pq

from sslvit.cli import run_cli
from sslvit.data.spec import open_source
from sslvit.evaluate.features import extract
from sslvit.processes.collectives import start
from sslvit.views.pretraining import eval_view
from sslvit.weights.foreign.open import open_backbone


def main() -> None:
    if len(sys.argv) != 4:
        raise ValueError(__doc__)
    model, folder, out = sys.argv[1:]
    backbone, about = open_backbone(model)
    source = open_source(f"folder:{folder}", image_size=backbone.image_size, cache=False)
    accelerator = start()
    features = extract(backbone.to(accelerator.device), source, eval_view(backbone.image_size), accelerator)
    files = [source.store.where(id) for id in features.ids.tolist()]
    pq.write_table(pa.table({"file": files, "features": list(features.by_readout[about["readout"]].numpy())}), out)
    print(f"{len(files):,} of {len(source):,} images, readout {about['readout']}, in {out}")
    for id in features.unreadable.split(1):  # those that could not be read are not in the table
        for bad in source.read(id.numpy()).bad:
            print(f"left out: {bad.path}: {bad.reason}")


run_cli(main)
