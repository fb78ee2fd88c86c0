"""Self-supervised pretraining of Vision Transformers.

Importing this loads no torch: each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sslvit.objectives import OBJECTIVES

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers
    from sslvit import recipes as recipes, views as views
    from sslvit.api.dense import Dense as Dense, probe_dense as probe_dense
    from sslvit.api.features import (
        extract_features as extract_features,
        few_shot as few_shot,
        knn as knn,
        linear_probe as linear_probe,
        logistic_regression as logistic_regression,
    )
    from sslvit.api.images import open_images as open_images
    from sslvit.api.models import (
        export_model as export_model,
        load_model as load_model,
        push_to_hub as push_to_hub,
        save_model as save_model,
    )
    from sslvit.api.robust import corrupt as corrupt, robustness as robustness
    from sslvit.api.runs import Run as Run, finetune as finetune, pretrain as pretrain
    from sslvit.api.seen import nearest_patches as nearest_patches, pca_of_patches as pca_of_patches
    from sslvit.config import TrainConfig as TrainConfig
    from sslvit.errors import Error as Error
    from sslvit.evaluate.features import Features as Features
    from sslvit.models.readout import Classifier as Classifier, Encoded as Encoded
    from sslvit.models.resnet import BiT as BiT
    from sslvit.models.vit import ViT as ViT
    from sslvit.objectives.data2vec import Data2Vec as Data2Vec
    from sslvit.objectives.dino import DINO as DINO
    from sslvit.objectives.dinov2 import DINOv2 as DINOv2
    from sslvit.objectives.ibot import IBOT as IBOT
    from sslvit.objectives.ijepa import IJEPA as IJEPA
    from sslvit.objectives.lejepa import LeJEPA as LeJEPA
    from sslvit.objectives.mae import MAE as MAE
    from sslvit.objectives.moco_v3 import MoCoV3 as MoCoV3
    from sslvit.objectives.mpp import MPP as MPP
    from sslvit.objectives.objective import Batch as Batch, Objective as Objective
    from sslvit.objectives.segmentation import Segmentation as Segmentation
    from sslvit.objectives.simclr import SimCLR as SimCLR
    from sslvit.objectives.simmim import SimMIM as SimMIM
    from sslvit.objectives.supervised import Supervised as Supervised
    from sslvit.objectives.vicreg import VICReg as VICReg

PLACES = {
    "models.vit": ("ViT",),
    "models.resnet": ("BiT",),
    "models.readout": ("Classifier", "Encoded"),
    "objectives.objective": ("Objective", "Batch"),
    **{f"objectives.{name}": (known.class_name,) for name, known in OBJECTIVES.items()},
    "objectives.segmentation": ("Segmentation",),
    "api.images": ("open_images",),
    "api.runs": ("pretrain", "finetune", "Run"),
    "config": ("TrainConfig",),
    "api.features": ("extract_features", "knn", "few_shot", "logistic_regression", "linear_probe"),
    "api.dense": ("probe_dense", "Dense"),
    "api.seen": ("pca_of_patches", "nearest_patches"),
    "evaluate.features": ("Features",),
    "api.robust": ("robustness", "corrupt"),
    "api.models": ("load_model", "save_model", "export_model", "push_to_hub"),
    "errors": ("Error",),
}
MODULES = ("views", "recipes")
PLACE_OF = {name: place for place, names in PLACES.items() for name in names}
__all__ = [*PLACE_OF, *MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{PLACE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
