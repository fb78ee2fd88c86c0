"""The pictures and numbers of a look into one ViT, and the page that shows those of several."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from sslvit import rng
from sslvit.data.source import Source
from sslvit.evaluate import analysis, seen
from sslvit.evaluate.features import extract, unreadable
from sslvit.models.vit import ViT
from sslvit.reports import figures, page, sheets
from sslvit.reports.pictures import attending
from sslvit.reports.run import CAPTIONS as CAPTIONS_OF_A_RUN
from sslvit.runs.public import markdown
from sslvit.storage import durable
from sslvit.views.pretraining import EvalView

Pictures = dict[str, Image.Image]
KEPT, MOST = 1 << 27, 1000  # bytes of patches, and images, that are seen together
NEAREST = 11  # patches beside the chosen one
CAPTIONS = {
    "patches": CAPTIONS_OF_A_RUN["patches.png"],
    "nearest": "A chosen patch, framed, and the most similar patch of each other image by cosine, the most similar "
    "first.",
    "map": "Images that are alike to the model lie close together. Where there is room, the image stands for its "
    "point; the color is that of its label.",
    **{name: CAPTIONS_OF_A_RUN[f"{name}.png"] for name in ("heads", "attention", "filters", "positions")},
}
DISTANCES = "distances.svg"


class Look(NamedTuple):
    """What is found in one model."""

    numbers: dict[str, Any]
    pictures: Pictures
    missing: list[str]  # sentences about what the model does not have


class Together(NamedTuple):
    """The images that are seen together, and how."""

    source: Source
    ids: np.ndarray
    view: EvalView
    accelerator: Accelerator

    def images(self, ids: np.ndarray) -> Iterator[Tensor]:
        return readable(self.source, ids, self.view, self.accelerator.device)


def readable(source: Source, ids: np.ndarray, view: EvalView, device: torch.device) -> Iterator[Tensor]:
    """These images, a few at a time: b c H W. Those that cannot be read are left out, not replaced by others."""
    for some in np.array_split(ids, -(-len(ids) // 32)):
        samples = source.read(some)
        (images,) = view(samples.pixels, rng.key(0, samples.ids), samples.extents)
        good = ~unreadable(samples)
        if good.any():
            yield images[good].to(device)


def first_of(batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """The first so many images, or fewer if there are no more."""
    for images in batches:
        yield images[:count]
        count -= len(images)
        if count <= 0:
            return


def at_once(vit: ViT, image_size: tuple[int, int], shown: int) -> int:
    """How many images are seen together at most, so that their patches fit into KEPT."""
    h, w = vit.config.grid_of(*image_size)
    return max(shown, min(MOST, KEPT // (4 * h * w * vit.width)))


def look_inside(vit: ViT, batches: Iterator[Tensor], shown: Tensor) -> Look:
    """The ViT paper's figures."""
    distances, maps, missing = analysis.mean_attention_distance(vit, batches), analysis.attention_maps(vit, shown), []
    by_kind = {name: value.tolist() for name, value in distances._asdict().items() if name != "images"}
    numbers: dict[str, Any] = {"attention distance": by_kind, "images": distances.images}
    pictures = {"heads": sheets.head_sheet(shown, maps.last, attending(vit))}
    pictures["attention"] = figures.attention_sheet(shown, {"rollout": maps.rollout, "last layer": maps.last.mean(1)})
    try:
        filters = analysis.filters(vit)
        numbers["filter variance"] = filters.variance.tolist()
        pictures["filters"] = figures.filter_sheet(filters.components)
    except ValueError as error:
        missing.append(f"No filters: {error}")
    try:
        similarity = analysis.position_similarity(vit)
        numbers["position similarity"] = analysis.position_structure(similarity)
        pictures["positions"] = figures.similarity_tiles(similarity)
    except ValueError as error:
        missing.append(f"No positions: {error}")
    return Look(numbers, pictures, missing)


def check_patch(patch: tuple[int, int, int], images: int, grid: tuple[int, int]) -> None:
    """Image, row and column, from 1."""
    for name, number, most in zip(("image", "row", "column"), patch, (images, *grid), strict=True):
        if not 1 <= number <= most:
            raise ValueError(
                f"--patch {' '.join(map(str, patch))}: {name} {number} is not one of 1 to {most}; it chooses among "
                f"{images} images of {grid[0]} rows and {grid[1]} columns of patches"
            )


def what_it_sees(
    vit: ViT, readout: str, together: Together, shown: Tensor, patch: tuple[int, int, int] | None
) -> tuple[Look, tuple[int, int, int]]:
    """Of the first images, shown, and all that are seen together. Also the chosen patch: by default that of the largest
    first component in the first image."""
    source, ids, view, accelerator = together
    features = extract(vit, source, view, accelerator, ids=ids, readouts=(readout, "patches"))
    ids, grid, patches = features.ids.numpy(), vit.grid_of(shown), features.by_readout["patches"]
    colors = seen.pca_of_patches(patches, grid)
    if patch is None:
        row, column = divmod(int(colors.first[0].argmax()), grid[1])
        patch = (1, row + 1, column + 1)
    image, chosen = patch[0] - 1, (patch[1] - 1) * grid[1] + patch[2] - 1
    nearest = seen.nearest_patches(patches, image, chosen, NEAREST)
    framed = torch.cat([shown[[image]], *images_of(nearest.images.numpy(), ids, together)])
    placed = seen.image_map(features.by_readout[readout])
    thumbs = torch.cat([F.adaptive_avg_pool2d(some, thumb_size(some)).cpu() for some in together.images(ids)])
    pictures = {
        "patches": sheets.patch_sheet(shown, colors, grid),
        "nearest": sheets.nearest_sheet(framed, chosen, nearest, grid),
        "map": sheets.map_sheet(placed, thumbs, features.labels, source.classes),
    }
    numbers = {
        "patches": {
            "images": len(ids),
            "variance": colors.variance.tolist(),
            "foreground": colors.foreground.double().mean().item(),
        },
        "chosen patch": {"image": int(ids[image]), "row": patch[1], "column": patch[2]},
        "nearest patches": [
            {"image": int(ids[i]), "row": place // grid[1] + 1, "column": place % grid[1] + 1, "cosine": cosine}
            for i, place, cosine in zip(*(each.tolist() for each in nearest), strict=True)
        ],
        "map": placed.method,
    }
    return Look(numbers, pictures, []), patch


def images_of(numbers: np.ndarray, ids: np.ndarray, together: Together) -> list[Tensor]:
    """The images of these numbers, in their order."""
    return [next(together.images(ids[[number]])) for number in numbers]


def thumb_size(images: Tensor) -> tuple[int, int]:
    scale = min(1, sheets.THUMB / max(images.shape[2:]))
    return max(1, round(scale * images.shape[2])), max(1, round(scale * images.shape[3]))


def write(
    out: Path, title: str, sentences: list[str], table: list[list[str]], numbers: dict[str, Any], chart: str,
    pictures: dict[str, Pictures],
) -> None:  # fmt: skip
    """analysis.json, the pictures, and report.html and report.md, which show them. sentences: the first is about
    distances. pictures: by model, the one that matters first, and by name."""
    files = {name: {what: f"{name.split()[0]}-{what}.png" for what in made} for name, made in pictures.items()}
    durable.replace_text(out / "analysis.json", json.dumps(numbers, indent=1) + "\n")
    durable.replace_text(out / DISTANCES, page.alone(chart))
    for name, made in pictures.items():
        for what, picture in made.items():
            durable.replace_picture(out / files[name][what], picture)
    far, *rest = sentences
    sections, lines = [page.bullets(rest)], [f"# {markdown(title)}", "", *(f"- {markdown(text)}" for text in rest)]
    for i, (name, known) in enumerate(files.items()):
        captions = [(what, CAPTIONS[what]) for what in CAPTIONS if what in known]
        patches, nearest, placed, *inside = (page.picture(out / known[what], caption) for what, caption in captions)
        shown = page.columns(patches, nearest + placed, *inside)
        lines += ["", f"## {name.capitalize()}"]
        lines += [line for what, caption in captions for line in ("", f"![{caption}]({known[what]})", "", caption)]
        sections += [page.folded(name.capitalize(), shown)] if i else [page.heading("What it sees"), shown]
    header, *rows = table
    sections += [page.heading("How far it looks"), page.chart(chart, CAPTIONS_OF_A_RUN[DISTANCES])]
    sections += [page.table(header, rows), page.paragraph(far)]
    lines += ["", "## How far it looks", "", f"![{CAPTIONS_OF_A_RUN[DISTANCES]}]({DISTANCES})", ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + ["", markdown(far)]
    durable.replace_text(out / "report.html", page.page(title, sections))
    durable.replace_text(out / "report.md", "\n".join(lines) + "\n")
