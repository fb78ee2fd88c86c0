"""Images with masks: folders of several layouts, columns, the built-in scenes; and what is refused."""

import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.data.image import open_mask
from sslvit.data.masks import IGNORED, Masking, open_masked
from sslvit.data.readers import scenes
from sslvit.data.spec import open_source
from sslvit.errors import DataError, NoInput
from sslvit.evaluate.dense.options import MaskedConfig

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3)).astype(np.uint8)
MASKS = np.random.default_rng(1).integers(0, 4, (6, 20, 30)).astype(np.uint8)


def write(folder, name, array, palette=False):
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image = image.convert("L").copy()
        image = Image.fromarray(array, mode="P")
        image.putpalette([value for k in range(256) for value in (255 - k, k, 128)])
    image.save(folder / f"{name}.png")


def ade20k(root, palette=False):
    for split, rows in (("training", range(4)), ("validation", range(4, 6))):
        for row in rows:
            write(root / "images" / split, f"a{row}", PIXELS[row])
            write(root / "annotations" / split, f"a{row}", MASKS[row], palette)
    return root


def by_split(root):
    for split, rows in (("train", range(4)), ("val", range(4, 6))):
        for row in rows:
            write(root / split / "images", f"a{row}", PIXELS[row])
            write(root / split / "masks", f"a{row}", MASKS[row])
    return root


def voc(root):
    for row in range(6):
        write(root / "JPEGImages", f"a{row}", PIXELS[row])
        write(root / "SegmentationClass", f"a{row}", MASKS[row], palette=True)
    write(root / "JPEGImages", "unlabelled", PIXELS[0])
    names = root / "ImageSets" / "Segmentation"
    names.mkdir(parents=True)
    (names / "train.txt").write_text("a0\na1\na2\na3\n")
    (names / "val.txt").write_text("a4\na5\n")
    return root


def elsewhere(root):
    ade20k(root)
    (root / "annotations").rename(root.parent / "elsewhere")
    return root


@pytest.mark.parametrize("layout", [ade20k, by_split, voc, elsewhere])
def test_pairs_of_every_layout_are_those_that_were_written(tmp_path, layout):
    root = layout(tmp_path / "set")
    masks = str(tmp_path / "elsewhere") if layout is elsewhere else ""
    found = [open_masked(f"folder:{root}", split=split, image_size=32, masks=masks) for split in ("train", "test")]
    assert [len(source) for source in found] == [4, 2]
    assert found[0].classes == ("0", "1", "2", "3")
    for source, first in zip(found, (0, 4), strict=True):
        for id in range(len(source)):
            image, mask = source.pair(id)
            assert np.array_equal(image.permute(1, 2, 0), PIXELS[first + id])
            assert np.array_equal(mask, MASKS[first + id])


def test_the_lists_of_voc_hold_for_masks_elsewhere_and_what_they_name_must_be_there(tmp_path):
    root = voc(tmp_path / "set")
    (root / "SegmentationClass").rename(tmp_path / "other")
    assert len(open_masked(f"folder:{root}", image_size=32, masks=str(tmp_path / "other"))) == 4
    (root / "JPEGImages" / "a2.png").unlink()
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("")
    with pytest.raises(DataError, match="lists no images for test"):
        open_masked(f"folder:{root}", image_size=32, masks=str(tmp_path / "other"), split="test")
    with pytest.raises(DataError, match=r"JPEGImages lacks 1 of the 4 images that .* lists for train, e.g. a2"):
        open_masked(f"folder:{root}", image_size=32, masks=str(tmp_path / "other"))


def test_masks_of_test_images_may_be_elsewhere_too(tmp_path):
    by_split(tmp_path)
    places = {}
    for split in ("train", "val"):
        (tmp_path / split / "masks").rename(tmp_path / f"{split}_masks")
        (tmp_path / split / "images").rename(tmp_path / f"{split}_images")
        places[split] = [str(tmp_path / f"{split}_{kind}") for kind in ("images", "masks")]
    (images, masks), (test_data, test_masks) = places["train"], places["val"]
    config = MaskedConfig(data=images, masks=masks, test_data=test_data, test_masks=test_masks)
    train, test, _ = config.open_images(32)
    assert (len(train), len(test)) == (4, 2)
    assert np.array_equal(test.pair(0)[1], MASKS[4])


def test_palette_indices_are_the_classes_not_their_colours(tmp_path):
    source = open_masked(f"folder:{ade20k(tmp_path, palette=True)}", image_size=32)
    assert np.array_equal(source.pair(2)[1], MASKS[2])


def test_columns_of_a_dataset_as_scene_parse_150_has_them(tmp_path):
    rows = {"image": [Image.fromarray(p) for p in PIXELS], "annotation": [Image.fromarray(m) for m in MASKS]}
    rows["scene_category"] = [0, 1, 0, 1, 0, 1]
    features = {"image": datasets.Image(), "annotation": datasets.Image()}
    features["scene_category"] = datasets.ClassLabel(names=["a", "b"])
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "train-0.parquet")
    source = open_masked(f"parquet:{tmp_path}", image_size=32)
    assert np.array_equal(source.pair(3)[1], MASKS[3])
    assert np.array_equal(source.pair(3)[0].permute(1, 2, 0), PIXELS[3])
    assert len(open_masked(f"parquet:{tmp_path}", image_size=32, mask_column="annotation")) == 6
    with pytest.raises(ValueError, match="mask_column nothing must be one of image"):
        open_masked(f"parquet:{tmp_path}", image_size=32, image_column="image", mask_column="nothing")


def test_a_batch_has_the_mask_as_its_last_channel_and_ignores_what_is_outside(tmp_path):
    write(tmp_path / "images", "a", PIXELS[0])
    write(tmp_path / "masks", "a", MASKS[0])
    write(tmp_path / "images", "b", PIXELS[1][:10])
    write(tmp_path / "masks", "b", MASKS[1][:10])
    source = open_masked(str(tmp_path), image_size=32)
    samples = source.read(np.array([0, 1]))
    assert samples.extents.tolist() == [[20, 30], [10, 30]]
    assert np.array_equal(samples.pixels[1, 3, :10, :30], MASKS[1][:10])
    assert (samples.pixels[1, 3, 10:] == IGNORED).all()
    assert (samples.pixels[0, 3, :, 30:] == IGNORED).all()


def test_an_image_larger_than_the_canvas_keeps_exact_classes(tmp_path):
    big = np.kron(MASKS[0], np.ones((20, 20), np.uint8))
    write(tmp_path / "images", "a", np.kron(PIXELS[0], np.ones((20, 20, 1), np.uint8)))
    write(tmp_path / "masks", "a", big)
    source = open_masked(str(tmp_path), image_size=8, canvas=30)
    samples = source.read(np.array([0]))
    assert samples.pixels.shape == (1, 4, 20, 30)
    assert np.array_equal(samples.pixels[0, 3], MASKS[0])


def test_zero_and_ignored_values_become_ignored():
    values = np.array([[0, 1, 2, 255, 7]])
    assert Masking(ignore=7).read(values).tolist() == [[0, 1, 2, 255, -1]]
    assert Masking(reduce_zero_label=True).read(values).tolist() == [[-1, 0, 1, -1, 6]]  # as in mmsegmentation


def test_a_mask_of_two_or_four_bits_has_its_numbers(tmp_path):
    """As optimizers of PNG files write grey of few values: by hand, since Pillow does not."""
    for bits in (1, 2, 4):
        values = np.arange(2**bits, dtype=np.uint8).repeat(16 // 2**bits)
        packed = np.packbits(np.unpackbits(values[:, None], 1)[:, -bits:].flatten()).tobytes()
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", 16, 1, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" + packed))]
        data = b"\x89PNG\r\n\x1a\n"
        for kind, content in [*chunks, (b"IEND", b"")]:
            data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        assert open_mask(data)[0].tolist() == values.tolist(), bits


def test_black_and_white_masks_are_two_classes_if_asked(tmp_path):
    folder = broken(tmp_path, MASKS[0] // 2 * 255, name="a.png")
    with pytest.raises(DataError, match="1 class, and at least 2 are needed; if 255 marks an object, give --binary"):
        open_masked(folder, image_size=32)
    source = open_masked(folder, image_size=32, masking=Masking(classes=2, binary=True))
    assert np.array_equal(source.pair(0)[1], MASKS[0] // 2)


def test_the_validation_split_comes_before_a_test_split_whose_masks_are_kept(tmp_path):
    by_split(tmp_path)
    write(tmp_path / "test" / "images", "hidden", PIXELS[0])
    assert len(open_masked(str(tmp_path), image_size=32, split="test")) == 2


def broken(root, array=MASKS[0], name="a", mode=None):
    write(root / "images", "a", PIXELS[0])
    folder = root / "masks"
    folder.mkdir(parents=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(folder / name)
    return str(root)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "b.png"}, "1 of 1 images have no mask of the same name"),
        ({"name": "a.jpg"}, "a mask as JPEG, which does not keep numbers exactly"),
        ({"name": "a.png", "mode": "RGB"}, "one class number per pixel, and this is RGB"),
        ({"name": "a.png", "array": MASKS[0][:, :10]}, "a.png is 20 x 10 px, and its image .*a.png is 20 x 30 px"),
        ({"name": "a.png", "array": MASKS[0] * 0}, "its masks have 1 class, and at least 2 are needed"),
    ],
)
def test_a_bad_mask_gets_one_sentence(tmp_path, change, sentence):
    with pytest.raises(DataError, match=sentence):
        open_masked(broken(tmp_path, **change), image_size=32).pair(0)


def test_an_unknown_value_names_the_file_and_the_way_out(tmp_path):
    source = open_masked(broken(tmp_path, name="a.png"), image_size=32, masking=Masking(classes=3))
    with pytest.raises(DataError, match=r"a.png has the value 3, beyond 3 classes and the ignored 255: .*--ignore 3"):
        source.pair(0)


def test_missing_folders_and_splits_are_named(tmp_path):
    write(tmp_path / "images", "a", PIXELS[0])
    with pytest.raises(NoInput, match="--masks names the folder of the masks"):
        open_masked(str(tmp_path), image_size=32)
    write(tmp_path / "masks", "a", MASKS[0])
    with pytest.raises(NoInput, match="has no test split"):
        open_masked(str(tmp_path), image_size=32, split="test")
    with pytest.raises(ValueError, match="is a variable of the shell unset"):
        open_masked("folder:", image_size=32)
    with pytest.raises(ValueError, match="shapes:scenes has"):
        open_masked("shapes:texture", image_size=64)


def test_scenes_do_not_depend_on_batches_and_their_parts_agree():
    ids = torch.arange(40)
    together = scenes.make(ids, 64)
    for i in (0, 17, 39):
        assert torch.equal(together.images[i], scenes.make(ids[i : i + 1], 64).images[0])
    ground = together.objects < 0
    assert torch.equal(ground, together.masks < 10)
    for image, (objects, masks) in enumerate(zip(together.objects, together.masks, strict=True)):
        for index in objects[objects >= 0].unique().tolist():
            assert (masks[objects == index] == 10 + together.kinds[image, index]).all()
    number = (together.kinds >= 0).sum(1)
    assert (number.min(), number.max()) == (2, 5)
    assert len(together.masks[ground].unique()) == 10


def test_a_larger_scene_is_the_same_scene():
    small, large = (scenes.make(torch.arange(30), size) for size in (64, 192))
    same = small.masks == large.masks[:, 1::3, 1::3]
    assert same.double().mean() > 0.999
    close = (small.images.float() - torch.nn.functional.avg_pool2d(large.images.float(), 3)).abs()
    assert close.mean() < 4


def test_scenes_can_be_read_as_plain_images():
    images, masked = open_source("shapes:scenes,n=50", image_size=64), open_masked("shapes:scenes,n=50", image_size=64)
    assert images.labels is None
    assert torch.equal(images.read(np.arange(5)).pixels, masked.read(np.arange(5)).pixels[:, :3])
    with pytest.raises(DataError, match="they have masks, no labels"):
        images.required_labels()


def test_the_splits_of_the_scenes_share_none():
    train, test = (open_masked("shapes:scenes,n=50", split=split, image_size=64) for split in ("train", "test"))
    assert len(train) == 50
    pixels = train.read(np.arange(50)).pixels, test.read(np.arange(50)).pixels
    assert not (pixels[0].flatten(1)[:, None] == pixels[1].flatten(1)).all(-1).any()
