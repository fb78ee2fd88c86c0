"""Bytes to pixels: the only place that opens an image.

Six formats, recognized by their first bytes, never by the file's name: JPEG, PNG, WebP, BMP, GIF and TIFF. Pillow would
open some forty, among them EPS, which runs Ghostscript. A size beyond the pixel budget is refused from the header,
before anything is decoded. The rules that turn a file into RGB or grey:

- rotated as its EXIF orientation says
- several frames or pages: the first
- alpha and transparent colours: laid on WHITE
- palettes are looked up, 1 bit becomes 0 and 255
- 12 and 16 bits are scaled to 8, white to white, where Pillow's own conversion clips at 255. Of 16-bit colour Pillow
  reads the upper 8 bits
- floats must lie in [0, 1]. Anything else, NaN too, is refused: no rule that looks at one image's values keeps the
  brightness of two images comparable. 32-bit integers have no agreed white and are refused likewise
- with --range, its ends become black and white instead of these two rules; impossible for 16-bit colour
- CMYK by (1 - ink)(1 - black), no colour profile; a JPEG's inks are inverted when its Adobe marker is there
- LAB by the sRGB profile; other colour profiles are ignored, as torchvision and every published recipe do
- grey from colour is ITU-R 601 luma, as in Pillow

The official code of MoCo v3, DINO and MAE differs in the first and the third: it reads by Pillow's convert("RGB"),
which ignores the orientation and drops alpha, so that what is transparent shows the colour underneath, often black.

A truncated file is refused: half a JPEG decodes to half an image of grey, and nothing later would notice. So is a PNG
whose checksums are wrong, which Pillow does not look at. Bit rot inside the other formats is not detectable.
"""

import os
import re
import stat
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.nn import functional as F

from sslvit.data.levels import Levels, Span, to_bytes

MAX_PIXELS = 64_000_000
WHITE = 255  # what alpha is laid on
STRIP = 1 << 18  # pixels that are converted at a time
BYTES_PER_PIXEL = 4  # a file of more than this, per pixel of the budget, is refused unread

ORIENTATION = 0x0112
TURNS = {  # the EXIF orientation says how the camera was held; each of these undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value
TILE_SIZE = 322, 323
PNG_BITS = 24  # where a PNG says how many bits a channel has
SIGNATURES: tuple[tuple[re.Pattern[bytes], type[ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImagePlugin.TiffImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
)
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes


class ImageError(ValueError):
    """Why an image cannot be used, in one line."""


def open_image(
    data: bytes,
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    fit: tuple[int, int] | None = None,
    span: Span | None = None,
) -> Tensor:
    """An image file's pixels as uint8, scaled down to lie within fit = (height, width) if it is larger: c H W

    span: the values that become 0 and 255, in files of more than eight bits."""
    if channels not in (1, 3):
        raise ValueError(f"--channels must be 1 (grey) or 3 (RGB) for image files, got {channels}")
    image: Image.Image = _open(data, max_pixels)
    if span and _largest(image, data) > WHITE and image.mode not in (*GREY_16, "I", "F"):
        raise ImageError("16-bit colour, of which only the upper 8 bits are read, so that --range cannot be kept")
    orientation = _orientation(image)
    size = _shown_size(image, orientation)
    target = size if fit is None else fitted(*size, fit)
    try:
        if target != size:
            # A JPEG's cosine transform can be evaluated at 1/2, 1/4 or 1/8 of the size: cheaper than all of it.
            image.draft(None, target if orientation in SIDEWAYS else target[::-1])
        image.load()
        height, width = target[::-1] if orientation in SIDEWAYS else target
        # Averaging blocks is cheap; to twice the size at least, what follows is still antialiased.
        factor = max(1, min(image.height // height, image.width // width) // 2)
        image = _reduced(image, "L" if channels == 1 else "RGB", factor, span)
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
    except ImageError:
        raise
    except Exception as error:  # on hostile bytes decoders raise anything: struct.error, KeyError, MemoryError, ...
        raise ImageError(_reason(error)) from error
    pixels = rearrange(array(image), "H W c -> c H W")
    if pixels.shape[1:] == target:
        return torch.from_numpy(pixels.copy())
    pixels = rearrange(torch.from_numpy(rearrange(pixels, "c H W -> H W c").copy()), "H W c -> c H W")
    # On uint8 this is Pillow's resize but for a rounding, at three times its speed.
    resized = F.interpolate(pixels[None], target, mode="bicubic", antialias=True)
    return rearrange(resized, "1 c H W -> c H W")


def open_mask(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The values of a file that has one number per pixel: palette indices, grey of 8 or 16 bits: H W"""
    image: Image.Image = _open(data, max_pixels)
    bits = data[PNG_BITS] if isinstance(image, PngImagePlugin.PngImageFile) and image.mode == "L" else 8
    if image.format == "JPEG":
        raise ImageError("a mask as JPEG, which does not keep numbers exactly: save it as PNG")
    if image.mode not in ("P", "L", "1", "I", *GREY_16):
        raise ImageError(f"a mask holds one class number per pixel, and this is {image.mode}: save it as grey PNG")
    orientation = _orientation(image)
    try:
        image.load()
        values = np.asarray(image.transpose(TURNS[orientation]) if orientation in TURNS else image)
    except Exception as error:  # as above
        raise ImageError(_reason(error)) from error
    return values.astype(np.int32) // (WHITE // (2**bits - 1) if bits < 8 else 1)  # Pillow spreads 2 and 4 bits to 255


def array(image: Image.Image) -> np.ndarray:
    """The pixels of an L or RGB image, not to be written to: H W c. Pillow's own memory, where it is one block:
    np.asarray copies line by line, which takes half as long as decoding."""
    try:
        values = pa.array(image).flatten().to_numpy() if image.mode == "RGB" else pa.array(image).to_numpy()
    except ValueError:  # several blocks
        return rearrange(np.asarray(image), "H W ... -> H W (...)")
    return values.reshape(image.height, image.width, -1)[..., : len(image.getbands())]


def fitted(height: int, width: int, box: tuple[int, int]) -> tuple[int, int]:
    """The size of an image scaled down, never up, to lie within box = (height, width), with its aspect ratio."""
    scale = min(1.0, box[0] / height, box[1] / width)
    return min(box[0], max(1, round(height * scale))), min(box[1], max(1, round(width * scale)))


def measure(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str | None, str, int, int]:
    """(format, Pillow mode, height, width as shown) from the header, nothing decoded."""
    image = _open(data, max_pixels)
    return image.format, image.mode, *_shown_size(image, _orientation(image))


def levels(data: bytes, max_pixels: int = MAX_PIXELS) -> Levels | None:
    """The values in a file of more than eight bits per channel; None for any other file."""
    image = _open(data, max_pixels)
    largest = _largest(image, data)
    if largest <= WHITE or image.mode in ("I", "F"):
        return None
    try:
        image.load()
        values = np.asarray(image)
    except Exception as error:  # as above
        raise ImageError(_reason(error)) from error
    grey = image.mode in GREY_16
    factor = 1 if grey else largest // WHITE
    return Levels(int(values.min()) * factor, int(values.max()) * factor, largest, grey)


def _largest(image: Image.Image, data: bytes) -> int:
    """The largest value that the file can hold."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        return 2 ** data[PNG_BITS] - 1
    return 2 ** getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))[0] - 1


def read_file(path: str | bytes, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a regular file. Opening a FIFO would wait forever, and a device may do anything."""
    limit = BYTES_PER_PIXEL * max_pixels
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
            raise ImageError(f"not a regular file but a {kinds.get(stat.S_IFMT(status.st_mode), 'device')}")
        if status.st_size > limit:
            raise ImageError(f"{status.st_size:,} bytes > limit {limit:,}")
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError("not a regular file")
            return file.read(limit + 1)
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error


def _open(data: bytes, max_pixels: int) -> ImageFile:
    """The file with its header read, by the class for its first bytes. Pillow's own Image.open only warns of bombs, up
    to 179 million pixels."""
    if not data:
        raise ImageError("empty file")
    opener = next((opener for signature, opener in SIGNATURES if signature.match(data)), None)
    if opener is None:
        raise ImageError(f"not JPEG, PNG, WebP, BMP, GIF or TIFF: begins with {data[:8]!r}")
    if opener is PngImagePlugin.PngImageFile:
        _check_png(data)
    try:
        image = opener(BytesIO(data))
        decoded = _decoded_pixels(image)
    except Exception as error:  # as above
        raise ImageError(_reason(error)) from error
    if decoded > max_pixels:
        raise ImageError(f"{decoded:,} px > limit {max_pixels:,}")
    return image


def _decoded_pixels(image: ImageFile) -> int:
    """A TIFF's tiles are decoded whole, and may be larger than the image."""
    tags = getattr(image, "tag_v2", {})
    tile_width, tile_height = (max(1, tags.get(tag, 1)) for tag in TILE_SIZE)
    return -(-image.width // tile_width) * tile_width * -(-image.height // tile_height) * tile_height


def _check_png(data: bytes) -> None:
    """The checksums of the chunks that a picture needs: those whose name begins with a capital."""
    place, kind = 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 8 + length
        if end + 4 > len(data):
            raise ImageError("cannot be decoded: the PNG file is truncated")
        checksum = int.from_bytes(data[end : end + 4], "big")
        if kind[:1].isupper() and zlib.crc32(memoryview(data)[place + 4 : end]) != checksum:
            raise ImageError(f"cannot be decoded: wrong checksum of the PNG chunk {kind.decode('latin-1')}")
        place = end + 4


def _reason(error: Exception) -> str:
    return f"cannot be decoded: {error or type(error).__name__}"


def _shown_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    return (image.width, image.height) if orientation in SIDEWAYS else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow turns these while loading, and reports their size as turned
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF does not spoil the picture: viewers show such files unturned
        return 1


def _reduced(image: Image.Image, mode: str, factor: int, span: Span | None) -> Image.Image:
    """As "RGB" or "L", every square of factor x factor pixels averaged. Conversion is done in strips: at once, 64
    million pixels with alpha or 16 bits would take 800 MB beside those of the image."""
    if image.mode == mode and "transparency" not in image.info:
        return image.reduce(factor) if factor > 1 else image
    reduced = Image.new(mode, (-(-image.width // factor), -(-image.height // factor)))
    rows = factor * max(1, STRIP // (factor * image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        reduced.paste(_flatten(strip, mode, image, span).reduce(factor), (0, top // factor))
    return reduced


def _flatten(image: Image.Image, mode: str, file: Image.Image, span: Span | None) -> Image.Image:
    """A strip of a file of any mode to "RGB" or "L" by the rules above."""
    if image.mode.startswith("I;16"):
        image = _from_16_bits(image, getattr(file, "tag_v2", {}), span)
    elif image.mode in ("F", "I") and span:
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ImageError("it contains NaN or inf")
        image = Image.fromarray(to_bytes(values, span))
    elif image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # false for NaN as well
            raise ImageError(f"floats must lie in [0, 1], got {low:g} to {high:g}: store them so, or use --range")
        image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    elif image.mode == "I":
        raise ImageError("32-bit or signed integers have no agreed white: store 8 or 16 bits, or use --range")
    elif image.mode == "CMYK" and file.format == "JPEG" and "adobe" not in image.info:
        image = Image.merge("CMYK", [band.point(lambda ink: 255 - ink) for band in image.split()])
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # which is so where an image is converted in place
        image = converted
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, (WHITE, WHITE, WHITE))
        ground.paste(image, mask=image.getchannel("A"))
        image = ground
    return image.convert(mode)


def _from_16_bits(image: Image.Image, tags: Mapping[int, Any], span: Span | None) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    white = 2**bits - 1
    grey = to_bytes(values, span) if span else (np.minimum(values, white) * 255 + white // 2) // white
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:  # one value stands for transparent
        grey[values == image.info["transparency"]] = WHITE
    return Image.fromarray(grey.astype(np.uint8))
