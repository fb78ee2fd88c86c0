"""A file for each objective, none of which imports another, and what several share.

Here is what the rest of the package knows of them.
"""

from typing import NamedTuple


class Known(NamedTuple):
    class_name: str
    title: str  # as papers spell it
    work: float = 1.0  # the time of a step by its small preset, in times MPP's, about
    backbones: int = 3  # in a checkpoint: weights, two moments, perhaps a teacher's weights
    heads: int = 1_000_000  # bytes of a checkpoint that its heads take, by the small preset, whatever the width


OBJECTIVES = {  # by module and recipe
    "mpp": Known("MPP", "MPP"),
    "mae": Known("MAE", "MAE", work=0.9, heads=6_000_000),
    "simmim": Known("SimMIM", "SimMIM"),
    "moco_v3": Known("MoCoV3", "MoCo v3", work=2.6, backbones=4, heads=11_000_000),
    "dino": Known("DINO", "DINO", work=3.7, backbones=4, heads=7_000_000),
    "ibot": Known("IBOT", "iBOT", work=3.9, backbones=4, heads=7_000_000),
    "dinov2": Known("DINOv2", "DINOv2", work=4.0, backbones=4, heads=7_000_000),
    "simclr": Known("SimCLR", "SimCLR", work=2.5, heads=2_000_000),
    "vicreg": Known("VICReg", "VICReg", work=1.9, heads=8_000_000),
    "lejepa": Known("LeJEPA", "LeJEPA", work=3.1, heads=5_000_000),
    "ijepa": Known("IJEPA", "I-JEPA", work=1.2, backbones=4, heads=5_000_000),
    "data2vec": Known("Data2Vec", "data2vec", work=1.3, backbones=4, heads=10_000),
    "supervised": Known("Supervised", "supervised"),
}
