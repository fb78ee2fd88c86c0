"""Images of more than eight bits: which values become black and white, and that dark sets do not pass unnoticed."""

import io
import sys
from pathlib import Path

import numpy as np
import preloaded
import pytest
import torch
from image_zoo import png
from PIL import Image

from sslvit import open_images
from sslvit.config import DataConfig, ImagesConfig
from sslvit.data.image import ImageError, levels, open_image
from sslvit.data.spec import open_source
from sslvit.data.summary import Summary
from sslvit.errors import DataError
from sslvit.runs.settings import check_unchanged, configuration

RECIPES = Path(__file__).parents[2] / "recipes"
TWELVE = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # every value of 12 bits, as a camera stores them in 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))


def folder_of(folder: Path, *images: np.ndarray) -> str:
    folder.mkdir()
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(png(image[..., None], 16, 0))
    return str(folder)


def tif(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return file.getvalue()


def test_a_range_is_numpys_linear_interpolation_and_keeps_all_256_levels_of_12_bits():
    grey = open_image(png(TWELVE[..., None], 16, 0), channels=1, span=(0, 4095))[0].numpy()
    assert np.array_equal(grey, np.rint(np.interp(TWELVE, [0, 4095], [0, 255])))
    assert len(np.unique(grey)) == 256
    assert len(np.unique(open_image(png(TWELVE[..., None], 16, 0), channels=1))) == 17


def test_values_beyond_the_range_are_black_and_white():
    grey = open_image(png(TWELVE[..., None], 16, 0), channels=1, span=(1000, 3000))[0].numpy()
    assert np.array_equal(grey, np.rint(np.interp(TWELVE, [1000, 3000], [0, 255])))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_with_a_range_floats_and_32_bit_integers_are_read_too(kind):
    values = (TWELVE.astype(np.int64) - 1000).astype(kind)  # say, Hounsfield units
    with pytest.raises(ImageError, match="--range"):
        open_image(tif(values))
    grey = open_image(tif(values), channels=1, span=(-1000, 3095))[0].numpy()
    assert np.array_equal(grey, np.rint(np.interp(values, [-1000, 3095], [0, 255])))


def test_images_of_8_bits_are_as_they_are_whatever_the_range():
    data = png(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 8, 0)
    assert torch.equal(open_image(data, span=(0, 4095)), open_image(data))


def test_the_whole_range_by_name_is_what_is_done_without_one():
    data = png(np.arange(65536, dtype=np.uint16).reshape(256, 256, 1), 16, 0)
    assert torch.equal(open_image(data, span=(0, 65535)), open_image(data))


def test_the_values_of_a_file_are_its_levels():
    assert levels(png(TWELVE[..., None], 16, 0))[:3] == (0, 4095, 65535)
    assert levels(png(np.zeros((4, 4, 1), np.uint8), 8, 0)) is None


def test_a_folder_whose_16_bit_images_hold_12_bits_is_refused_with_the_flag_to_give(tmp_path):
    data = folder_of(tmp_path / "set", TWELVE[:32], TWELVE[32:] - 84)
    with pytest.raises(DataError, match=r"0 to 4,011 of 65,535, of which 16 of 256 levels .*--range 0 4095"):
        open_source(data, image_size=32)
    source = ImagesConfig(data=data, image_size=32, range=(0, 4095)).source()
    pixels = source.read(np.arange(2)).pixels[:, 0].numpy()
    assert np.array_equal(pixels[0], np.rint(np.interp(TWELVE[:32], [0, 4095], [0, 255])))


def test_one_bright_image_of_the_looked_at_ones_is_enough(tmp_path):
    bright = TWELVE.copy()
    bright[0, 0] = 9000
    assert len(open_source(folder_of(tmp_path / "set", TWELVE, bright), image_size=32)) == 2


def test_an_array_of_12_bits_is_refused_likewise_and_is_mapped_with_a_range(tmp_path):
    np.savez(tmp_path / "set.npz", images=TWELVE[None])
    data = f"npz:{tmp_path / 'set.npz'}"
    with pytest.raises(DataError, match="--range 0 4095"):
        open_source(data, image_size=64)
    pixels = open_source(data, image_size=64, span=(0, 4095)).read(np.arange(1)).pixels[0, 0].numpy()
    assert np.array_equal(pixels, np.rint(np.interp(TWELVE, [0, 4095], [0, 255])))


def test_a_few_bright_pixels_do_not_make_a_dark_array_a_good_one(tmp_path):
    """Land up to 3,000, and clouds of 20,000 in one of a thousand pixels."""
    images = np.random.default_rng(0).integers(0, 3000, (20, 2, 50, 50)).astype(np.uint16)
    images[:, :, 0, 0] = 20_000
    with pytest.raises(DataError, match=r"of which 12 of 256 levels would remain: range 0 4095"):
        open_images(images, image_size=48)
    images[:, :, :10] = 20_000
    assert open_images(images, image_size=48).read(np.arange(1)).pixels[0, 0, 0, 0] == round(20_000 / 257)


def test_16_bit_colour_that_is_dark_is_refused_without_a_flag_that_would_not_help(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.png").write_bytes(png(np.stack([TWELVE] * 3, -1), 16, 2))
    with pytest.raises(DataError, match="store them as 8 bits"):
        open_source(str(tmp_path / "set"), image_size=32)
    with pytest.raises(ImageError, match="16-bit colour"):
        open_image(png(np.stack([TWELVE] * 3, -1), 16, 2), span=(0, 4095))


def test_the_look_before_training_says_which_values_there_are(tmp_path):
    data = folder_of(tmp_path / "set", TWELVE * 15 + 7)
    text = Summary(open_source(data, image_size=64, cache=False), image_size=64, batch_size=1).text()
    assert "values      7 to 61,432 of 65,535" in text
    assert "0 becomes black, 65,535 white" in text


def test_features_and_decoded_images_of_another_range_are_kept_apart(tmp_path):
    data = folder_of(tmp_path / "set", TWELVE, TWELVE[::-1])
    versions = {open_source(data, image_size=64, span=span).version for span in ((0, 4095), (0, 2047), (1, 4095))}
    assert len(versions) == 3
    first, second = (open_source(data, image_size=64, span=span).read(np.arange(1)) for span in ((0, 4095), (0, 2047)))
    assert not torch.equal(first.pixels, second.pixels)


def test_a_run_goes_on_with_its_range_only():
    saved = configuration(ImagesConfig(range=(0.0, 4095.0)))
    assert check_unchanged(saved, ImagesConfig(range=(0.0, 4095.0))) == []
    with pytest.raises(ValueError, match="range was"):
        check_unchanged(saved, ImagesConfig())


@pytest.mark.parametrize("options", [(5.0, 5.0), (9.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_that_is_none_is_refused(options):
    with pytest.raises(ValueError, match=r"--range is .* the first must be below the second"):
        DataConfig(range=options).open()


@pytest.mark.processes
def test_a_probe_on_12_bits_stops_with_the_flag_before_anything_is_computed(tmp_path):
    for split in ("train", "val"):
        for kind in ("a", "b"):
            (tmp_path / "set" / split).mkdir(parents=True, exist_ok=True)
            folder_of(tmp_path / "set" / split / kind, TWELVE, TWELVE[::-1])
    words = ["--preset", "small", "--data", f"folder:{tmp_path / 'set'}", "--out", str(tmp_path / "run")]
    done = preloaded.run([sys.executable, str(RECIPES / "mae.py"), *words, "--threads", "1"], text=True)
    assert done.returncode == 65
    assert "--range 0 4095" in done.stderr
    assert not (tmp_path / "run").exists()
