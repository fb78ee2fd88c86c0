"""Where images come from, by one line of text.

    shapes                  the built-in set, labelled by shape; shapes:texture by texture; shapes:n=50000 for more
    idx:/dir                MNIST's format, gzipped or not
    npz:/file.npz           arrays
    folder:/dir[,/dir]      images labelled by sub-folder, flat or nested; an existing folder's bare path means the same

A source gives images by number as uint8 on a canvas of one size. Labels are optional everywhere.
"""

from pathlib import Path

from sslvit.data.arrays import open_idx
from sslvit.data.encoded import EncodedSource, choose_canvas
from sslvit.data.files import FolderStore, nearest
from sslvit.data.image import MAX_PIXELS
from sslvit.data.samples import ArraySource, Bad, Samples, ShapesSource, Source
from sslvit.errors import NoInput

__all__ = ["ArraySource", "Bad", "EncodedSource", "Samples", "ShapesSource", "Source", "open_source"]

SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}
SHAPES_TEST = 1 << 40  # test images are numbered from here: no size of the training split reaches it


def open_source(
    spec: str,
    *,
    split: str = "train",
    image_size: int | tuple[int, int],
    channels: int | None = None,
    canvas: int | None = None,
    max_pixels: int = MAX_PIXELS,
    follow_links: bool = False,
) -> Source:
    """The source that a line of text names. canvas: the side of the square that images too large are scaled to."""
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split {split!r} is neither train nor test")
    side = max(image_size) if isinstance(image_size, tuple) else image_size
    kind, colon, rest = spec.partition(":")
    if kind == "shapes":
        return _shapes(rest, split, side)
    if kind == "idx" and colon:
        return open_idx(Path(rest), split)
    if kind == "folder" and colon:
        path = rest
    elif colon and not Path(spec).exists():
        raise ValueError(f"data {spec!r}: the kinds are shapes, idx, npz, folder, list, hf, disk, parquet, webdataset")
    else:
        path = spec
    roots = [Path(path)] if Path(path).exists() else [Path(part) for part in path.split(",")]
    roots = [_split_folder(root, split) for root in roots]
    store = FolderStore(roots, follow_links=follow_links)
    box = (canvas or 2 * side,) * 2
    return EncodedSource(
        store,
        name=f"folder:{','.join(map(str, roots))}",
        canvas=choose_canvas(store, box, max_pixels),
        channels=channels or 3,
        max_pixels=max_pixels,
    )


def _shapes(options: str, split: str, side: int) -> Source:
    size, by = {"train": 20_000, "test": 4_000}[split], "shape"
    for option in filter(None, options.split(",")):
        name, _, value = option.partition("=")
        if option in ("texture", "shape"):
            by = option
        elif name == "n" and value.isdecimal() and int(value) > 0:
            size = int(value) if split == "train" else size
        else:
            raise ValueError(f"shapes:{option} is unknown: shapes:texture, shapes:n=50000 or both with a comma between")
    return ShapesSource(size, image_size=side, first=0 if split == "train" else SHAPES_TEST, by=by)


def _split_folder(root: Path, split: str) -> Path:
    """root/train and root/val where a folder is laid out so; a folder without them is the train split itself."""
    if not root.is_dir():
        raise NoInput(f"data {root} does not exist: {nearest(root)}" if not root.exists() else f"data {root} is a file")
    for name in SPLIT_FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    if split == "test":
        raise NoInput(f"{root} has no test split: none of {', '.join(SPLIT_FOLDERS[split])} is in it")
    return root
