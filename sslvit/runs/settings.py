"""Settings as a run saves them: under the names of now, and beside those of a run that is resumed."""

import json
from dataclasses import asdict
from typing import Any

from sslvit.config import EVALUATION, FREE, LENGTH, ROUNDING, rules
from sslvit.views.batching import Size, to_pair
from sslvit.views.pretraining import THUMBNAIL

# Options by the names that they had in version 0.1, on the command line and in saved settings of runs, comparisons and
# studies; and the value that has another name.
RENAMED = {
    "start": "init_from",
    "only": "only_classes",
    "spares": "no_weight_decay",
    "drop": "mask_ratio",
    "normalise_targets": "norm_pix_loss",
    "min_scale": "smallest_crop",
    "smoothing": "label_smoothing",
    "colour": "color",
    "centre_momentum": "center_momentum",
    "held_epochs": "freeze_last_layer_epochs",
    "parts": "chunks",
}
RENAMED_BUDGET = {"operations": "flops"}


def plain(value: Any) -> Any:
    """JSON's view of a configuration, so that a saved one and a new one compare."""
    return json.loads(json.dumps(value, default=str))


def configuration(config: Any) -> dict[str, Any]:
    return plain(asdict(config))


def as_now(saved: dict[str, Any], image_size: Size) -> dict[str, Any]:
    """Settings saved by an earlier version: under their names of now, and with what was done before --eval_crop
    existed, when whole images were squeezed. Of square thumbnails that is what is done now."""
    renamed = {RENAMED.get(name, name): value for name, value in saved.items()}
    if "budget" in renamed:
        renamed["budget"] = RENAMED_BUDGET.get(renamed["budget"], renamed["budget"])
    return ({"eval_crop": 0.0} if max(to_pair(image_size)) > THUMBNAIL else {}) | renamed


def check_unchanged(saved: dict[str, Any], config: Any) -> list[str]:
    """Refuses to resume a run that would compute something else; returns warnings about what changes rounding or
    evaluation only."""
    now, known = configuration(config), rules(type(config))
    refused, warnings = [], []
    for name in sorted(saved.keys() | now.keys()):
        fate = known[name]["resume"] if name in known else "fixed"
        if saved.get(name) == now.get(name) or fate in (FREE, LENGTH):
            continue
        today = f"is now {now[name]!r}" if name in now else "and this version has no such option"
        change = f"{name} was {saved.get(name)!r}, {today}"
        if fate == ROUNDING:
            warnings.append(f"{change}: the run goes on, but rounds differently from here")
        elif fate == EVALUATION:
            warnings.append(f"{change}: the run goes on, but evaluations from here do not compare with those before")
        else:
            refused.append(change)
    if refused:
        preset, hint = saved.get("preset"), "give the old values"
        if preset and preset != now.get("preset"):
            hint = f"add --preset {preset} and {hint}"
        raise ValueError(
            f"--resume would continue a different run: {'; '.join(refused)}. To resume, {hint}; or start anew with "
            f"another --out or --overwrite"
        )
    return warnings
