"""Frozen patch features and the classes of pixels."""

import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from sslvit.api.calls import check_names, public
from sslvit.api.models import Model, backbone_of, load_model
from sslvit.config import check_bounds
from sslvit.evaluate.dense.options import DenseOptions, MaskedConfig
from sslvit.evaluate.dense.probe import check_models, probed
from sslvit.objectives.objective import Objective
from sslvit.processes.collectives import start
from sslvit.processes.traces import without_trace

OPTIONS = set(DenseOptions.__dataclass_fields__)
READING = set(MaskedConfig.__dataclass_fields__) - {"data"}


class Dense(NamedTuple):
    """Segmentation by frozen patches. IoU is NaN of a class that is neither predicted nor true.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=32)
    >>> found = sslvit.probe_dense(vit, heads=("knn",), limit_train=20, limit_test=10, patches=300)
    >>> found["knn"].interval[0] < found["knn"].mean_iou < found["knn"].interval[1], len(found["knn"].iou)
    (True, 22)
    """

    mean_iou: float  # in [0, 1]
    interval: tuple[float, float]  # of 95%, over test images
    pixel_accuracy: float
    iou: dict[str, float]  # by class


@public
def probe_dense(
    model: Model | Objective | str | Path,
    images: str = "shapes:scenes",
    *,
    image_size: int | None = None,
    heads: tuple[Literal["knn", "logistic"], ...] = ("knn", "logistic"),
    **options: Any,
) -> dict[str, Dense]:
    """Mean IoU of the model's frozen patch features, by nearest neighbours and by logistic regression.

    images: with masks, as `sslvit probe-dense --data` takes them. image_size: of the windows, by default the model's.
    options: those of the command, such as limit_train, patches, blocks, mask_column.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=32)
    >>> found = sslvit.probe_dense(vit, limit_train=20, limit_test=10, patches=300)
    >>> list(found), 0 < found["knn"].mean_iou < 1
    (['knn', 'logistic'], True)
    """
    check_names(options, OPTIONS | READING, "probe_dense")
    backbone, _ = backbone_of(load_model(model) if isinstance(model, str | Path) else model)
    size = image_size or max(backbone.image_size)
    models: dict[str, nn.Module] = {"model": backbone}
    check_models(models, size, options.get("blocks", 1))
    chosen = {name: value for name, value in options.items() if name in OPTIONS}
    reading = {name: value for name, value in options.items() if name in READING}
    dense = DenseOptions(image_size=size, heads=heads, **chosen)
    check_bounds(dense)
    if not heads or isinstance(heads, str) or set(heads) - {"knn", "logistic"}:
        raise ValueError(f'heads is {heads!r}: give ("knn",), ("logistic",) or both')
    before = next(backbone.parameters()).device
    with without_trace(), tempfile.TemporaryDirectory(prefix="sslvit-") as folder:
        accelerator = start()
        train, test, _ = MaskedConfig(data=images, **reading).open_images(size)
        try:
            counts = dict(probed(models, train, test, dense, accelerator.device, Path(folder)))
        finally:
            backbone.to(before)
    found = {}
    for row, one in counts.items():
        _, low, high = one.interval()
        iou = dict(zip(test.classes, one.iou.tolist(), strict=True))
        found[row.removeprefix("model, ")] = Dense(one.mean_iou, (low, high), one.pixel_accuracy, iou)
    return found
