"""Where images come from, by one line of text.

    shapes                    the built-in set, labelled by shape; shapes:texture by texture; shapes:n=50000 is larger;
                              shapes:scenes has several objects in an image, and no labels but masks (masks.py)
    idx:/dir                  MNIST's format, gzipped or not
    npz:/file.npz             arrays
    folder:/dir[,/dir]        images, labelled by sub-folder or not, flat or nested; a folder's bare path means the same
    list:/file.txt[,/root]    the files that a list names, with labels or without
    csv:/labels.csv[,/root]   the files that a CSV file names, labelled by another of its columns
    hf:name[:configuration]   a set of the Hugging Face hub
    disk:/dir                 one written by Dataset.save_to_disk
    parquet:/dir/*.parquet    one in parquet files
    webdataset:/dir/*.tar     image tars

A source gives images by number, as uint8 on a canvas of one size. Labels are optional everywhere. The train split of a
folder is its sub-folder train, if it has one, and the test split test or val; the splits of parquet, tar and CSV files
are known by how their names begin, those of the rows of one CSV file by its column `split`. Small images of one size
are decoded once into a cache (cache.py); all others whenever they are read, in the loader's workers, onto a canvas from
which views are cut later, on any device.

Views are not cut while decoding. On one core, for JPEGs of 500 x 375 at 100 kB: onto a canvas and then two crops of
224 px for the whole batch 3.5 ms per image, decoding and cropping each by itself 4.3 ms; on a GPU the crops cost nearly
nothing. So photographs larger than the canvas (512 at 224 px) are reduced before a view is cut, unlike in the papers'
pipelines: of 1600 x 1200 an 8% crop has about 125 x 125 pixels left, and is enlarged to 224. A canvas that keeps them
(928 for 8%, 1184 for 5%) takes 2.4 and 3 times as long to fill, and 3.3 and 5.3 times the memory: so it is not the
default but --canvas, and a run says before it begins where it matters.
"""

import os
from pathlib import Path

import psutil

from sslvit.data.cache import cached, say
from sslvit.data.image import MAX_PIXELS
from sslvit.data.levels import Span, check_levels
from sslvit.data.masks import open_scenes
from sslvit.data.readers.arrays import open_idx, open_npz
from sslvit.data.readers.columns import ReadOptions
from sslvit.data.readers.csv_file import has_header, open_csv
from sslvit.data.readers.encoded import EncodedSource, Store, look_at_sample
from sslvit.data.readers.folders import lies_inside, nearest, open_folders, real_paths
from sslvit.data.readers.lists import checked_root, open_list
from sslvit.data.readers.tables import open_disk, open_hub, open_parquet
from sslvit.data.readers.tars import TarStore, tar_files
from sslvit.data.source import ShapesSource, Source, room
from sslvit.errors import DataError, NoInput
from sslvit.processes import collectives
from sslvit.views.batching import Size, to_pair

KINDS = ("shapes", "idx", "npz", "folder", "list", "csv", "hf", "disk", "parquet", "webdataset")
KIND_OF_FILE = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "list",
    ".npz": "npz",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
NO_COLUMNS = ("shapes", "idx", "npz", "folder")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}
SHAPES_SIZES = {"train": 20_000, "test": 4_000}
SHAPES_TEST = 1 << 40  # test images are numbered from here: no size of the training split reaches it
MANY = 20_000  # images from which on several processes decode into the cache
SMALL = 96  # pixels of a side up to which images of one size are decoded into the cache


def open_source(
    spec: str,
    *,
    split: str = "train",
    image_size: Size,
    channels: int | None = None,
    canvas: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    root: Path | str | None = None,
    classes: tuple[str, ...] | None = None,
    max_pixels: int = MAX_PIXELS,
    span: Span | None = None,
    follow_links: bool = False,
    cache: bool = True,
) -> Source:
    """The source that a line of text names.

    channels: 1 or 3 for image files, 3 if None; arrays have their own. canvas: the side of the square that larger
    images are scaled down to; 2.25 times the image size if None, 512 at 224. root: the folder of the files that
    lines or rows name. span: for images of more than eight bits, the values that become black and white; the whole
    range if None, and then a set that is dark in it is refused. classes: of the training set, for a test set whose
    labels are text or folders, so that equal numbers mean equal classes.
    """
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be train or test, got {split!r}")
    kind, rest = _kind_of(spec)
    options = ReadOptions(split, checked_root(root, kind), image_column, label_column, classes)
    side = max(to_pair(image_size))
    columns = {"image_column": image_column, "label_column": label_column}
    for name, value in columns.items():
        if value and kind in NO_COLUMNS and (kind != "folder" or os.path.isdir(rest)):
            raise ValueError(f"--{name} {value}: {kind}: has no columns")
    source: Source
    if kind == "shapes":
        scenes = rest.startswith("scenes")
        source = open_scenes(rest, split, side, masks=False) if scenes else _shapes(rest, split, side)
    elif kind == "idx":
        source = open_idx(Path(rest), split)
    elif kind == "npz":
        source = open_npz(Path(rest), split, classes, span)
    else:
        store, name = _store(kind, rest, options, follow_links)
        if store.skipped and collectives.rank() == 0:
            say(f"{name}: not read: {store.skipped}")
        encoded, small = on_canvas(store, name, canvas or room(side), channels or 3, max_pixels, span)
        workers = min(8, os.cpu_count() or 1) if len(encoded) >= MANY else 0
        source = cached(encoded, workers=workers) if cache and small else encoded
    if channels not in (None, source.channels):
        raise ValueError(
            f"the images of {spec} have {source.channels} channels, not {channels}: to train a model of {channels} "
            "channels on them, give --inflate mean"
        )
    return source


def on_canvas(
    store: Store, name: str, box: int, channels: int, max_pixels: int = MAX_PIXELS, span: Span | None = None
) -> tuple[EncodedSource, bool]:
    """The images on a canvas of this side at most, and whether they are small and all of one size."""
    canvas, unreduced, levels = look_at_sample(store, (box, box), max_pixels, decode=span is None)
    check_levels(levels, name)
    source = EncodedSource(store, name=name, canvas=canvas, channels=channels, max_pixels=max_pixels, span=span)
    return source, unreduced and max(canvas) <= SMALL


def _kind_of(spec: str) -> tuple[str, str]:
    """One of KINDS, and what follows it."""
    kind, colon, rest = spec.partition(":")
    if kind == "stream":
        raise ValueError(f"{spec}: streams are for pretraining only; without stream: its images are read by number")
    if not colon or kind not in KINDS or os.path.exists(spec):
        kind, rest = ("shapes", "") if spec == "shapes" else ("folder", spec)
        if colon and not os.path.exists(spec):
            raise ValueError(f"data {spec!r} is not a folder and does not begin with one of {', '.join(KINDS)}")
    if kind not in ("shapes", "hf"):
        rest = os.path.expanduser(rest)  # which a shell does not do behind a colon
    several = kind in ("folder", "list", "csv") and not os.path.exists(rest)
    if kind != "shapes" and not all(part.strip() for part in (rest.split(",") if several else [rest])):
        # An empty path would be the working directory.
        raise ValueError(f"data {spec!r} lacks a path or name: is a variable of the shell unset?")
    return kind, rest


def _store(kind: str, rest: str, options: ReadOptions, follow_links: bool) -> tuple[Store, str]:
    """The images, and their name."""
    store: Store
    split = options.split
    if kind == "folder":
        roots = [Path(rest)] if os.path.exists(rest) else [Path(folder) for folder in rest.split(",")]
        roots = [_split_folder(root, split, follow_links) for root in roots]
        store = open_folders(roots, follow_links=follow_links, classes=options.classes)
        return store, f"folder:{','.join(map(str, roots))}"
    if kind in ("list", "csv"):
        store = _listed(kind, rest, options)
    elif kind == "hf":
        store = open_hub(rest, options)
    elif kind == "disk":
        store = open_disk(Path(rest), options)
    elif kind == "parquet":
        store = open_parquet(rest, options)
    else:
        store = TarStore(tar_files(rest, split), options)
    return store, f"{kind}:{rest} ({split})"


def _listed(kind: str, rest: str, options: ReadOptions) -> Store:
    name, _, root = (rest, "", "") if os.path.exists(rest) else rest.partition(",")
    if root and options.root:
        raise ValueError(f"--root {options.root} and {kind}:{rest} both name a root: use one of them")
    if root:
        options = options._replace(root=Path(root))
    file = Path(name)
    if kind == "list" and file.is_file():
        with_header = file.suffix == ".tsv" and has_header(file, options.root or file.parent)
        kind = "csv" if file.suffix == ".csv" or with_header else "list"
    if kind == "csv":
        return open_csv(file, options)
    if options.split == "test":
        raise NoInput(f"list:{file} has no test split: a CSV file with a column called split has one, see csv:")
    return open_list(file, options.root, options.classes)


def _shapes(options: str, split: str, side: int) -> Source:
    size, by = SHAPES_SIZES[split], "shape"
    for option in filter(None, options.split(",")):
        name, _, value = option.partition("=")
        if option in ("texture", "shape"):
            by = option
        elif name == "n" and value.isdecimal() and 0 < int(value) < SHAPES_TEST:
            size = int(value) if split == "train" else size
        else:
            raise ValueError(f"shapes:{option} must be like shapes:texture, shapes:n=50000 or shapes:texture,n=50000")
    if size * 8 > psutil.virtual_memory().total:  # images are drawn as they are read, labels are not
        raise ValueError(f"shapes:n={size}: the labels of {size:,} images do not fit into this machine's memory")
    return ShapesSource(size, image_size=side, first=0 if split == "train" else SHAPES_TEST, by=by)


def beside_splits(root: Path) -> list[str]:
    """Folders that are neither hidden nor a split, such as classes beside one that is called train."""
    splits = set(sum(SPLIT_FOLDERS.values(), ()))
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    return [name for name in names if name not in splits and name[0] != "." and os.path.isdir(root / name)]


def _split_folder(root: Path, split: str, follow_links: bool) -> Path:
    """root/train and root/val where a folder is laid out so; a folder without them is the train split itself."""
    if not os.path.isdir(root):  # unlike Path.is_dir it is false where looking is not permitted
        kind = KIND_OF_FILE.get(root.suffix) if root.is_file() else None
        wrong = "is not a folder of images" if os.path.exists(root) else "does not exist"
        raise NoInput(f"data {root} {wrong}: {nearest(root)}{f'; use {kind}:{root}' if kind else ''}")
    for name in SPLIT_FOLDERS[split]:
        if os.path.isdir(root / name):
            real, own = real_paths([root / name, root])
            if not follow_links and not lies_inside(real, [own]):
                raise DataError(f"{root / name} is a link to {os.fsdecode(real)}: --follow_links goes there")
            if collectives.rank() == 0 and (others := beside_splits(root)):
                say(f"{root}: {name}/ is taken as its {split} split; not read: {', '.join(others[:5])}")
            return root / name
    if split == "test":
        raise NoInput(f"{root} has no test split: none of {', '.join(SPLIT_FOLDERS[split])} is in it")
    return root
