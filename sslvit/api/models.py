"""Models in and out."""

from pathlib import Path
from typing import Any

from torch import nn

from sslvit.api.calls import public
from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.objectives.objective import Objective
from sslvit.weights import hub
from sslvit.weights.exports.export import export
from sslvit.weights.folder import load_classifier, save_backbone
from sslvit.weights.foreign.open import open_backbone

Model = ViT | BiT | Classifier


@public
def load_model(path: str | Path, *, head: bool = False, revision: str | None = None, **facts: Any) -> Any:
    """The model at a place, in evaluation mode: a ViT or a BiT, which take images in [0, 1].

    path: a run's folder, finished or not, or its model's; somebody's checkpoint of timm, torchvision, transformers,
    Google, MoCo v3, DINO, MAE, DINOv2, DINOv3 or CLIP; OWNER/NAME on the Hub, of ours.
    head: the Classifier of a fine-tuned model, with its head. revision: on the Hub.
    facts: what such a checkpoint does not say, e.g. family="mae", heads=6, leave_head=True.

    >>> import sslvit
    >>> sslvit.save_model(sslvit.ViT.variant("mu/8", image_size=16), "model", readout="mean")
    >>> vit = sslvit.load_model("model")
    >>> vit.name, vit.declared
    ('mu/8', 'mean')
    """
    place = hub.here(path, revision)
    if head:
        return load_classifier(place)
    backbone, about = open_backbone(place, **facts)
    backbone.declared = about["readout"]
    return backbone


@public
def save_model(model: Model | Objective, folder: str | Path, *, readout: str | None = None, **about: str) -> None:
    """Writes a model's folder, which `load_model`, timm and, through timm, transformers open.

    readout: cls, mean or both, by default what the model declares. about: further entries, e.g. data="my images".

    >>> import sslvit
    >>> sslvit.save_model(sslvit.BiT.variant("R20x0.5", image_size=16), "resnet", data="none: random weights")
    """
    backbone, declared = backbone_of(model)
    head = {n: t for n, t in model.state_dict().items() if not n.startswith("backbone.")}
    head = head if isinstance(model, Classifier) else model.head_state_dict() if isinstance(model, Objective) else {}
    save_backbone(backbone, folder, {**about, "readout": readout or declared}, head=head)


@public
def export_model(
    model: Model | Objective | str | Path, out: str | Path, to: str = "timm", *, readout: str | None = None,
    any_size: bool = False,
) -> str:  # fmt: skip
    """Writes a model in another layout, which is read back and compared; returns a sentence about it.

    model: as of `load_model`, or its path. out: a new folder. to: timm, transformers, torchvision, onnx, torch_export.
    readout: what is recorded and what a program (onnx, torch_export) returns. any_size: of such a program's images.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)
    >>> report = sslvit.export_model(vit, "exported", to="torchvision")
    >>> sslvit.load_model("exported").name
    'mu/8'
    """
    chosen = load_model(model) if isinstance(model, str | Path) else model
    backbone, declared = backbone_of(chosen)
    whole = chosen if isinstance(chosen, Classifier) else backbone
    return export(whole, {"readout": readout or declared}, out, to, any_size=any_size)


@public
def push_to_hub(folder: str | Path, repo: str, *, private: bool = True) -> str:
    """Uploads the model of a run's or a model's folder, with its card; returns its address. The token is
    huggingface_hub's own (`hf auth login`).

    >>> import sslvit
    >>> sslvit.push_to_hub("not/there", "me/mine")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    sslvit.errors.NoInput: not/there: no model can be read: No such file or directory (...)
    """
    return hub.push_to_hub(folder, repo, private=private)


def backbone_of(model: nn.Module) -> tuple[Any, str]:
    """The backbone, and the readout that it declares; of a backbone that does not know, the class token if it has one,
    as that of a classifier by default."""
    if isinstance(model, Objective | Classifier):
        return model.backbone, model.readout
    if not isinstance(model, ViT | BiT):
        raise ValueError(
            f"a {type(model).__name__} is no model of sslvit: a ViT, a BiT, a Classifier or an objective is"
        )
    return model, model.declared or ("cls" if "cls" in model.readouts else "mean")
