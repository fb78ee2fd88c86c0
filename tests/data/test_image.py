import io
import os
import socket
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from image_zoo import Animal, bombs, chunk, exif, painted, png, rgb_tags, save, scene, tiff, turned, zoo
from peak import costs
from PIL import Image, ImageFile

from sslvit.data.image import WHITE, ImageError, fitted, measure, open_image, read_file

ZOO = zoo()


def shown(data: bytes, **options) -> np.ndarray:
    return open_image(data, **options).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_an_odd_file_gives_the_pixels_or_the_reason_that_it_should(animal: Animal):
    if animal.pixels is None:
        with pytest.raises(ImageError, match=animal.reason):
            open_image(animal.data)
        return
    pixels = open_image(animal.data)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, *animal.pixels.shape[:2])
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - animal.pixels)
    assert difference.mean() <= animal.error
    assert measure(animal.data)[2:] == animal.pixels.shape[:2]


def test_sixteen_bits_keep_every_level_where_pillow_clips():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = shown(png(ramp[..., None], 16, 0))[..., 0].astype(int).ravel()
    assert len(np.unique(grey)) == 256
    assert (np.diff(grey) >= 0).all()
    assert np.abs(grey - np.arange(65536) / 257).max() <= 0.5
    assert (np.asarray(Image.open(io.BytesIO(png(ramp[..., None], 16, 0))).convert("L")) == 255).mean() > 0.99


def test_alpha_is_laid_on_white():
    clear = np.zeros((2, 3, 4), np.uint8)
    assert (shown(save(clear, "PNG")) == WHITE).all()


def test_one_channel_is_the_luma_of_the_colours():
    rgb = scene().astype(np.float64)
    luma = rgb @ [0.299, 0.587, 0.114]
    grey = open_image(png(scene(), 8, 2), channels=1)
    assert grey.shape == (1, *luma.shape)
    assert np.abs(grey[0].numpy() - luma).max() <= 0.51


def test_other_channel_counts_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match=r"--channels must be 1 .* got 4"):
        open_image(png(scene(), 8, 2), channels=4)


def test_fit_keeps_small_images_and_shrinks_large_ones_whole():
    assert fitted(100, 50, (200, 200)) == (100, 50)
    assert fitted(375, 500, (448, 448)) == (336, 448)
    assert fitted(1, 5000, (512, 512)) == (1, 512)
    small = scene()
    assert (shown(png(small, 8, 2), fit=(512, 512)) == small).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("box", [(100, 100), (64, 300), (31, 17)])
def test_a_shrunken_image_is_pillows_to_two_levels(form, box):
    rgb = np.asarray(Image.fromarray(scene(12, 16)).resize((640, 480), Image.Resampling.BICUBIC))
    data = save(rgb, form, **({"lossless": True} if form == "WEBP" else {"quality": 98} if form == "JPEG" else {}))
    size = fitted(480, 640, box)
    expected = np.asarray(Image.fromarray(rgb).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    result = shown(data, fit=box).astype(int)
    assert result.shape == expected.shape
    assert np.abs(result - expected).mean() <= 2
    assert np.abs(result - expected)[2:-2, 2:-2].max() <= 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fit_is_of_the_turned_image(orientation):
    rgb = np.asarray(Image.fromarray(scene(12, 16)).resize((320, 240), Image.Resampling.BICUBIC))
    data = save(turned(rgb, orientation), "JPEG", quality=98, exif=exif(orientation))
    expected = np.asarray(Image.fromarray(rgb).resize((64, 48), Image.Resampling.BICUBIC)).astype(int)
    result = shown(data, fit=(100, 64)).astype(int)
    assert result.shape == (48, 64, 3)
    assert np.abs(result - expected).mean() <= 3


def test_a_large_jpeg_is_decoded_at_reduced_size():
    rgb = np.zeros((4000, 4000, 3), np.uint8)
    data = save(rgb, "JPEG")
    start = time.process_time()
    open_image(data)
    whole = time.process_time() - start
    start = time.process_time()
    open_image(data, fit=(500, 500))
    assert time.process_time() - start < whole / 2


def test_files_cut_short_stay_refused_for_everybody():
    data = save(scene(64, 96), "JPEG")
    with pytest.raises(ImageError, match="cannot be decoded"):
        open_image(data[: len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def large_png(side: int, bits: int, colour: int, pixels: bytes = bytes(range(251))) -> bytes:
    """Colour 0 is grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha. Its rows all repeat `pixels`."""
    length = side * bits * {0: 1, 2: 3, 4: 2, 6: 4}[colour] // 8
    row = b"\0" + (pixels * (length // len(pixels) + 1))[:length]
    pressed = zlib.compressobj(1)
    body = b"".join(pressed.compress(row) for _ in range(side)) + pressed.flush()
    head = chunk(b"IHDR", side.to_bytes(4, "big") * 2 + bytes((bits, colour, 0, 0, 0)))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.processes
def test_bombs_are_refused_in_no_time_and_no_memory(tmp_path):
    data = {f"{number} {bomb.name}": bomb.data for number, bomb in enumerate(bombs())}
    data["9000 x 9000 zeros"] = large_png(9000, 8, 0, b"\0")
    files = [tmp_path / name.replace("/", "-") for name in data]
    for file, content in zip(files, data.values(), strict=True):
        file.write_bytes(content)
    for file, cost in zip(files, costs(files), strict=True):
        assert cost.refused, file.name
        assert cost.seconds < 0.05, file.name
        assert cost.grown < 50_000_000, file.name


@pytest.mark.processes
def test_the_memory_of_a_bomb_that_is_let_in_is_seen(tmp_path):
    (tmp_path / "zeros.png").write_bytes(data := large_png(9000, 8, 0, b"\0"))
    (cost,) = costs([tmp_path / "zeros.png"], channels=1, max_pixels=81_000_000, fit=(9, 9))
    assert (cost.refused, cost.grown > 80_000_000) == ("", True)
    with pytest.raises(ImageError, match="81,000,000 px > limit 80,000,000"):
        open_image(data, max_pixels=80_000_000)


@pytest.mark.slow
@pytest.mark.processes
def test_64_million_pixels_of_any_kind_are_opened_in_256_mb(tmp_path):
    files = []
    for bits, colour in ((8, 6), (16, 0)):
        files.append(tmp_path / f"{bits} bits, colour {colour}.png")
        files[-1].write_bytes(large_png(8000, bits, colour))
    for file, cost in zip(files, costs(files, fit=(512, 512)), strict=True):
        assert not cost.refused
        assert 100 << 20 < cost.grown <= 256 << 20, file.name


@pytest.mark.parametrize(("bits", "colour"), [(8, 4), (8, 6), (16, 0), (16, 6)])
def test_conversion_in_strips_changes_no_pixel(monkeypatch, bits, colour):
    data = large_png(90, bits, colour)
    for box in ((90, 90), (50, 50), (7, 11)):
        whole = open_image(data, fit=box)
        with monkeypatch.context() as patch:
            patch.setattr("sslvit.data.image.STRIP", 1)
            assert torch.equal(open_image(data, fit=box), whole)


def test_a_tile_larger_than_its_image_counts_as_it_is_decoded():
    tags = rgb_tags(scene()) | {322: 20000, 323: 20000}
    with pytest.raises(ImageError, match="400,000,000 px > limit"):
        open_image(tiff(scene(), tags))


# Prefixes by which Pillow knows formats that it can read but does not write.
MAGIC = {
    "FITS": b"SIMPLE  =                    T",
    "PSD": b"8BPS\0\1" + bytes(40),
    "FLI": b"\x80\0\0\0\x11\xaf" + bytes(200),
    "SUN": b"\x59\xa6\x6a\x95" + bytes(60),
    "CUR": b"\0\0\2\0\1\0" + bytes(60),
    "MPEG": b"\0\0\1\xb3" + bytes(60),
    "XVTHUMB": b"P7 332\n#END_OF_COMMENTS\n4 4 255\n" + bytes(16),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(60),
    "GRIB": b"GRIB\0\0\0\1" + bytes(60),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "BUFR": b"BUFR" + bytes(60),
    "PIXAR": b"\x80\xe8\0\0" + bytes(600),
    "PCD": bytes(2048) + b"PCD_" + bytes(100),
    "FTEX": b"FTEX" + bytes(60),
    "GBR": b"\0\0\0\x20\0\0\0\2" + bytes(60),
    "DCX": b"\xb1\x68\xde\x3a" + bytes(60),
    "FPX": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "MCIDAS": b"\0\0\0\0\0\0\0\4" + bytes(300),
    "XPM": b"/* XPM */\nstatic char *x[] = {\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "HEIF": b"\0\0\0\x18ftypheic" + bytes(60),
    "JXL": b"\xff\x0a" + bytes(60),
}
ALLOWED = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF"}  # MPO: several JPEGs in a row, the first is shown


def others() -> dict[str, bytes]:
    Image.init()
    files = dict(MAGIC)
    for form in sorted(set(Image.SAVE) - ALLOWED - {"WMF", "GRIB", "HDF5", "BUFR"}):
        for image in (Image.fromarray(scene(64, 64)), painted()[0], Image.fromarray(scene()[..., 0] > 99)):
            try:
                files[form] = save(image, form)
            except (OSError, ValueError, KeyError):
                continue
            break
    return files


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of some formats that Pillow will write no longer
def test_other_formats_are_refused_whatever_their_name(tmp_path):
    files = others()
    assert {"EPS", "PDF", "PPM", "ICO", "TGA", "JPEG2000", "AVIF", "PSD", "FITS"} <= set(files)
    assert len(files) >= 37
    for data in files.values():
        (tmp_path / "picture.jpg").write_bytes(data)
        with pytest.raises(ImageError, match="not JPEG"):
            open_image(read_file(tmp_path / "picture.jpg"))


def test_no_process_is_started_for_postscript():
    started, watching = [], [True]  # an audit hook cannot be taken away, only told to look no more
    events = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "os.fork")
    sys.addaudithook(lambda event, _: started.append(event) if watching and event in events else None)
    with pytest.raises(ImageError):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    watching.clear()
    assert started == []


def mutant(seed: int, seeds: list[bytes]) -> bytes:
    draw = np.random.default_rng(seed)
    data = bytearray(seeds[draw.integers(len(seeds))])
    for _ in range(draw.integers(1, 8)):
        place = int(draw.integers(len(data)))
        if draw.random() < 0.3:
            place = min(place, int(draw.integers(48)))  # headers are where the decisions are
        how = draw.integers(6)
        if how == 0:
            data[place] ^= 1 << int(draw.integers(8))
        elif how == 1:
            data[place] = int(draw.choice([0, 1, 127, 128, 255]))
        elif how == 2 and place > 20 and draw.random() < 0.3:
            del data[place:]
        elif how == 3:
            other = int(draw.integers(len(data)))
            data[place:place] = data[other : other + int(draw.integers(1, 40))]
        elif how == 4 and len(data) > 60:
            del data[place : place + int(draw.integers(1, 20))]
    return bytes(data)


def repaired(data: bytes) -> bytes:
    """A mutated PNG with its checksums made right, so that it gets beyond them."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    whole, place = data[:8], 8
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        whole += chunk(data[place + 4 : place + 8], data[place + 8 : place + 8 + length])
        place += 12 + length
    return whole


def check_mutants(seeds: range) -> None:
    files = [animal.data for animal in ZOO if animal.pixels is not None and len(animal.data) < 60_000]
    good = refused = 0
    for seed in seeds:
        data = mutant(seed, files)
        start = time.process_time()
        try:
            pixels = open_image(repaired(data) if seed % 2 else data, fit=(64, 64))
            good += 1
            assert pixels.dtype == torch.uint8
            assert pixels.shape[0] == 3
            assert 0 < max(pixels.shape[1:]) <= 64
        except ImageError:
            refused += 1
        assert time.process_time() - start < 1, seed
    assert good + refused == len(seeds)
    assert min(good, refused) > 0.05 * len(seeds)  # the mutations are neither too harsh nor too mild


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says what it found odd before it goes on
def test_300_mutated_files_crash_nothing_and_hang_nothing():
    check_mutants(range(300))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_2000_mutated_files_crash_nothing_and_hang_nothing():
    check_mutants(range(300, 2300))


def test_a_flipped_bit_anywhere_in_a_png_is_noticed_or_harmless():
    data, rgb = png(scene(), 8, 2), scene()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 4
        try:
            assert (shown(bytes(changed)) == rgb).all()
        except ImageError:
            continue


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.jpg"))
        start = time.perf_counter()
        for name, reason in {
            "fifo.jpg": "FIFO",
            "folder.jpg": "folder",
            "socket.jpg": "socket",
            "loop.jpg": "symbolic links",
            "missing.jpg": "No such file",
        }.items():
            with pytest.raises(ImageError, match=reason):
                read_file(tmp_path / name)
        with pytest.raises(ImageError, match="device"):
            read_file("/dev/zero")
    assert time.perf_counter() - start < 10


def test_a_file_beyond_any_image_of_the_budget_is_not_read(tmp_path):
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageError, match="bytes > limit 256,000,000"):
        read_file(tmp_path / "sparse.jpg")


def test_an_animation_of_many_frames_opens_by_its_first(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value % 256, np.uint8)) for value in range(2000)]
    data = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    shown(save(frames[0], "GIF"))  # Pillow's own start
    start = time.process_time()
    assert (shown(data) == 0).all()
    assert time.process_time() - start < 0.1
