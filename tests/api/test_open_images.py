"""Images that a program holds: the same pixels, labels and errors as of the same images in files."""

import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import sslvit
from sslvit.data.readers.encoded import EncodedSource
from sslvit.data.source import ArraySource, Source
from sslvit.errors import DataError, NoInput

SIZE = 20
ARRAY = np.random.default_rng(0).integers(0, 256, (SIZE, 16, 16, 3), np.uint8)
TENSOR = torch.from_numpy(ARRAY).permute(0, 3, 1, 2)
PIXELS = TENSOR.numpy()
NAMED = ["dog" if i % 2 else "cat" for i in range(SIZE)]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


class Items(Dataset):
    """Tensors in [0, 1] as ToTensor makes them, with numbers. Items of `broken` cannot be read."""

    def __init__(self, broken: tuple[int, ...] = (), change: float = 0):
        self.broken, self.change = broken, change

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if i in self.broken:
            raise OSError("no such image")
        return (TENSOR[i] / 255 + (self.change if i == 7 else 0)).clamp(0, 1), torch.tensor(i % 4)


class Unnumbered(Dataset):
    """As torch allows it: without a length."""

    def __getitem__(self, i: int) -> torch.Tensor:
        return TENSOR[i]


def table() -> datasets.Dataset:
    pictures = [Image.fromarray(one) for one in ARRAY]
    cells = datasets.Dataset.from_dict({"picture": pictures, "label": [i % 4 for i in range(SIZE)]})
    return cells.cast_column("picture", datasets.Image())


def read(source: Source) -> np.ndarray:
    return source.read(np.arange(len(source))).pixels.numpy()


@pytest.mark.parametrize(
    "images",
    [
        ARRAY,
        PIXELS,
        torch.from_numpy(ARRAY),
        TENSOR,
        TENSOR / 255,
        (TENSOR / 255).half(),
        list(ARRAY),
        [Image.fromarray(one) for one in ARRAY],
        [(Image.fromarray(one), i) for i, one in enumerate(ARRAY)],
        TensorDataset(TENSOR, torch.arange(SIZE)),
        Items(),
        table(),
        datasets.DatasetDict({"train": table()}),
    ],
    ids=lambda images: type(images).__name__,
)  # fmt: skip
def test_the_same_images_in_any_form_are_the_same_pixels(images):
    source = sslvit.open_images(images, image_size=16)
    assert isinstance(source, ArraySource)
    np.testing.assert_array_equal(read(source), PIXELS)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (Items(), [i % 4 for i in range(SIZE)]),
        (list(zip(ARRAY, NAMED, strict=True)), [i % 2 for i in range(SIZE)]),
        (TensorDataset(TENSOR, torch.arange(SIZE)), list(range(SIZE))),
        (table(), [i % 4 for i in range(SIZE)]),
        (list(ARRAY), None),
        (ARRAY, None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_labels_are_those_of_the_items(images, labels):
    source = sslvit.open_images(images, image_size=16)
    assert (None if source.labels is None else source.labels.tolist()) == labels
    given = sslvit.open_images(images, labels=NAMED, image_size=16)
    assert given.labels.tolist() == [i % 2 for i in range(SIZE)]
    assert given.classes == ("cat", "dog")
    numbered = sslvit.open_images(images, labels=NAMED, classes=("dog", "bird", "cat"), image_size=16)
    assert numbered.labels.tolist() == [0 if i % 2 else 2 for i in range(SIZE)]


def test_grey_arrays_have_one_channel_and_masks_are_black_and_white():
    assert sslvit.open_images(ARRAY[..., 0]).channels == 1
    np.testing.assert_array_equal(read(sslvit.open_images(ARRAY[..., 0] > 127))[:, 0], 255 * (ARRAY[..., 0] > 127))


def test_an_item_that_cannot_be_read_is_treated_like_an_unreadable_file():
    source = sslvit.open_images(Items(broken=(3, 5)), image_size=16)
    assert len(source) == SIZE
    samples = source.read(np.arange(SIZE))
    assert [(bad.id, bad.path, bad.reason) for bad in samples.bad] == [
        (3, "item 3", "OSError: no such image"),
        (5, "item 5", "OSError: no such image"),
    ]
    for bad in samples.bad:
        np.testing.assert_array_equal(samples.pixels[bad.id], PIXELS[bad.substitute])
        assert samples.labels[bad.id] == bad.substitute % 4
    vit = sslvit.ViT.variant("mu/8", image_size=16)
    assert sslvit.extract_features(vit, source).unreadable.tolist() == [3, 5]
    with pytest.raises(DataError, match=r"Items.*none|cannot be used"):
        sslvit.open_images(Items(broken=tuple(range(SIZE))), image_size=16).read(np.arange(2))


def test_images_of_several_sizes_are_decoded_when_they_are_read_and_workers_get_the_same():
    items = [(Image.fromarray(np.pad(one, ((0, 7 * i), (0, 0), (0, 0)))), i) for i, one in enumerate(ARRAY)]
    source = sslvit.open_images(items, image_size=16)
    assert isinstance(source, EncodedSource)
    samples, theirs = (one.read(np.arange(SIZE)) for one in (source, pickle.loads(pickle.dumps(source))))
    assert torch.equal(samples.pixels, theirs.pixels)
    assert samples.extents[:, 0].tolist() == [min(16 + 7 * i, 64) for i in range(SIZE)]
    np.testing.assert_array_equal(samples.pixels[2, :, :16, :16], PIXELS[2])
    vit = sslvit.ViT.variant("mu/8", image_size=16)
    alone, beside = (sslvit.extract_features(vit, source, workers=workers) for workers in (0, 1))
    assert torch.equal(alone.x, beside.x)
    assert torch.equal(alone.y, torch.arange(SIZE))


@pytest.mark.parametrize("make", [lambda x: x, list, lambda x: [Image.fromarray(one) for one in x]])
def test_a_fingerprint_changes_with_one_pixel_and_with_nothing_else(make):
    changed = ARRAY.copy()
    changed[7, 3, 3, 1] ^= 1
    first, again, other = (sslvit.open_images(make(one), image_size=16) for one in (ARRAY, ARRAY.copy(), changed))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert sslvit.open_images(Items()).fingerprint != sslvit.open_images(Items(change=0.2)).fingerprint


def test_a_fingerprint_of_a_table_in_memory_changes_with_its_images():
    changed = ARRAY.copy()
    changed[7, 3, 3, 1] ^= 1
    cells = [{"image": {"bytes": sslvit_bytes(one), "path": None}} for one in (ARRAY[7], changed[7])]
    first, other = (datasets.Dataset.from_list([cell]).cast_column("image", datasets.Image()) for cell in cells)
    assert len(cells[0]["image"]["bytes"]) == len(cells[1]["image"]["bytes"])  # so that sizes do not tell
    assert sslvit.open_images(first).fingerprint != sslvit.open_images(other).fingerprint


def sslvit_bytes(pixels: np.ndarray) -> bytes:
    from sslvit.data.objects import as_file

    return as_file(Image.fromarray(pixels))


class Random(Items):
    def __getitem__(self, i: int) -> np.ndarray:
        return np.random.default_rng().integers(0, 256, (8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        (Random(), {}, "another image each time: leave out its random transforms"),
        (ARRAY / 256, {}, "not n / 255"),
        (torch.randn(4, 3, 8, 8), {}, "not n / 255: give images as they are"),
        ([torch.randn(3, 8, 8)], {}, "not n / 255"),
        ([np.zeros((8, 8, 3), np.int32)], {}, "holds int32"),
        ([{"image": ARRAY[0]}], {}, "an item is a dict"),
        ([np.zeros((8, 8, 5), np.uint8)], {}, "neither 1 nor 3 channels"),
        ([], {}, "the list is empty"),
        (ARRAY[:0], {}, "no pixels"),
        (7, {}, "images are a int"),
        (iter([]), {}, "with a length"),
        (ARRAY, {"split": "test"}, "an array has no splits"),
        (list(ARRAY), {"split": "test"}, "a list has no splits"),
        (ARRAY, {"labels": [1, 2]}, "2 labels for 20 images"),
        (Unnumbered(), {}, "images are a Unnumbered: .* with a length"),
        (ARRAY, {"labels": 3}, "labels are '3', a int: give one per image"),
        (ARRAY, {"labels": torch.tensor(3)}, "labels are '3', a Tensor: give one per image"),
        (ARRAY, {"labels": "abcdefghijklmnopqrst"}, "a str: give one per image"),
        (ARRAY, {"labels": [0.5] * SIZE}, "labels are integers or text"),
        (ARRAY, {"labels": NAMED, "classes": ("cat",)}, "'dog': not one of 1 classes"),
        (ARRAY, {"channels": 1}, "channels 1: array"),
        (ARRAY, {"only_classes": (1,)}, "for images that are named by a text"),
        ("shapes", {"labels": [1]}, "labels= is for images that are given as such"),
        (sslvit.open_images(ARRAY), {"split": "test"}, "is open already"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(images, options, said):
    with pytest.raises((DataError, ValueError), match=said) as error:
        sslvit.open_images(images, **options)
    assert "--" not in str(error.value)


def test_text_is_as_of_the_command_line_and_a_misspelt_argument_names_the_nearest(tmp_path):
    Image.fromarray(ARRAY[0]).save(tmp_path / "0.png")
    np.testing.assert_array_equal(read(sslvit.open_images(tmp_path, image_size=16))[0], PIXELS[0])
    assert sslvit.open_images(f"folder:{tmp_path}", image_size=16, channels=1).channels == 1
    with pytest.raises(NoInput, match="no test split"):
        sslvit.open_images(tmp_path, "test")
    with pytest.raises(TypeError, match="did you mean max_pixels"):
        sslvit.open_images(tmp_path, maxpixels=7)
    with pytest.raises(ValueError, match="split must be train or test"):
        sslvit.open_images(tmp_path, "valid")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train").symlink_to("/tmp")
    with pytest.raises(DataError, match="follow_links=True goes there"):
        sslvit.open_images(tmp_path / "x")
