"""Folders of images and masks: which files belong together."""

from pathlib import Path

import numpy as np

from sslvit.data.readers.folders import SPLITS, FileStore, nearest, open_folders, printable
from sslvit.errors import DataError, NoInput

IMAGE_FOLDERS = ("images", "image", "imgs", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "annotations", "labels", "SegmentationClass")
SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("val", "validation", "valid", "test")}
MASKED = {"train": "train", "test": "masked test"}  # of SPLITS


def open_pairs(root: Path, masks: str, split: str, follow_links: bool) -> tuple[FileStore, FileStore, np.ndarray, str]:
    """The two stores, the rows of both that belong together, and a name."""
    if not root.is_dir():
        raise NoInput(f"data {root} is not a folder: {nearest(root)}")
    listed, lists = None, root / "ImageSets" / "Segmentation"
    if lists.is_dir():  # VOC
        of_images, of_masks = root / "JPEGImages", Path(masks).expanduser() if masks else root / "SegmentationClass"
        files = [lists / f"{name}.txt" for name in SPLITS[MASKED[split]]]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise NoInput(f"{root} has no {split} split: {lists} holds {', '.join(p.name for p in lists.iterdir())}")
        listed = set(file.read_bytes().split())
    else:
        found = _named(root, IMAGE_FOLDERS, split)
        of_images = found or _split(root, split)
        beside = _split(Path(masks).expanduser(), split) if masks else _named(root, MASK_FOLDERS, split)
        if beside is None or not (found or masks):
            raise NoInput(
                f"{root} has no folder {' or '.join(IMAGE_FOLDERS[:2])} beside a folder {', '.join(MASK_FOLDERS[:3])}: "
                f"--masks names the folder of the masks"
            )
        of_masks = beside
    images, stored = (open_folders([path], follow_links=follow_links) for path in (of_images, of_masks))
    rows = {_stem(stored.names[row]): row for row in range(len(stored))}
    stems = [(row, _stem(images.names[row])) for row in range(len(images))]
    if listed is not None:
        stems = [(row, stem) for row, stem in stems if stem in listed]
        if absent := listed - {stem for _, stem in stems}:
            raise DataError(
                f"{of_images} lacks {len(absent):,} of the {len(listed):,} images that {root} lists for {split}, "
                f"e.g. {printable(min(absent))}"
            )
    if not stems:
        raise DataError(f"{root} lists no images for {split}")
    lacking = [row for row, stem in stems if stem not in rows]
    if lacking:
        raise DataError(
            f"{len(lacking):,} of {len(stems):,} images have no mask of the same name in {of_masks}, "
            f"e.g. {images.where(lacking[0])}"
        )
    pairs = np.array([(row, rows[stem]) for row, stem in stems], np.int64)
    return images, stored, pairs, f"folder:{root} ({split})"


def _stem(name: bytes) -> bytes:
    """The path without its ending."""
    return name.rpartition(b".")[0]


def _named(root: Path, names: tuple[str, ...], split: str) -> Path | None:
    """The folder of one of these names: inside the split's folder, or itself with the split's folder inside."""
    for base in [root / part for part in SPLIT_FOLDERS[split]]:
        for name in names:
            if (base / name).is_dir():
                return base / name
    found = next((root / name for name in names if (root / name).is_dir()), None)
    return found and _split(found, split)


def _split(folder: Path, split: str) -> Path:
    """The folder of the split inside, if there are any; a folder without is the train split itself."""
    inside = {
        name: [folder / part for part in parts if (folder / part).is_dir()] for name, parts in SPLIT_FOLDERS.items()
    }
    if inside[split]:
        return inside[split][0]
    if split == "test" or inside["test"]:
        raise NoInput(f"{folder} has no {split} split: none of {', '.join(SPLIT_FOLDERS[split])} is in it")
    return folder
