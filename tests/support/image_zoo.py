"""Odd image files, each with what should come of it: pixels by arithmetic, or the reason why it is refused.

Encoders of our own write what Pillow cannot (12 and 16 bits, colour keys, white is zero, broken headers), so that the
opener is not merely compared with itself. https://www.w3.org/TR/png-3 and the TIFF 6.0 specification.
"""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

H, W = 24, 40
LOSSLESS, ROUNDED, LOSSY = 0.0, 1.0, 3.0  # allowed mean error in 255ths
WHITE = "no agreed white"


class Animal(NamedTuple):
    name: str
    data: bytes
    pixels: np.ndarray | None  # uint8 H W 3
    error: float = LOSSLESS
    reason: str = ""


def scene(height: int = H, width: int = W) -> np.ndarray:
    """A smooth picture without any symmetry, every channel another: H W 3"""
    y, x = np.mgrid[0:height, 0:width]
    planes = (20 + 2 * x, 10 + 2 * y + x, 240 - x - y)
    return np.stack([plane % 251 for plane in planes], -1).astype(np.uint8)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1).astype(np.uint8)


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(np.float64)
    return np.rint(color * share + 255 * (1 - share)).astype(np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(samples: np.ndarray, bits: int, colour: int, *before: tuple[bytes, bytes], size=None) -> bytes:
    """samples: H W s, of `bits` each. before: chunks ahead of the pixels."""
    height, width = size or samples.shape[:2]
    flat = samples.reshape(samples.shape[0], -1)
    if bits == 16:
        rows = flat.astype(">u2").view(np.uint8).reshape(len(flat), -1)
    else:
        one_by_one = (flat[..., None].astype(np.uint8) >> np.arange(bits)[::-1]) & 1
        rows = np.packbits(one_by_one.reshape(len(flat), -1), axis=1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    middle = b"".join(chunk(kind, content) for kind, content in before)
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def tiff(samples: np.ndarray, tags: dict[int, int | tuple[int, ...]], order: str = "<") -> bytes:
    """One uncompressed strip. samples: an array whose bytes are the strip; tags: width, bits and so on, all SHORT but
    offset and size."""
    strip = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    tags = {278: 1 << 15, **tags}
    entries, extra = [], b""
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    for tag, value in sorted((tags | {273: None, 279: len(strip)}).items()):
        values = value if isinstance(value, tuple) else (value,)
        if tag in (273, 279):
            entries.append((tag, 4, values))
        else:
            entries.append((tag, 3, values))
    for _, kind, values in entries:
        if kind == 3 and len(values) > 2:
            extra += struct.pack(f"{order}{len(values)}H", *values)
    body = b""
    long_at = start
    for tag, kind, values in entries:
        if tag == 273:
            values = (start + len(extra),)
        if kind == 4:
            field = struct.pack(f"{order}I", values[0])
        elif len(values) > 2:
            field = struct.pack(f"{order}I", long_at)
            long_at += 2 * len(values)
        else:
            field = struct.pack(f"{order}{len(values)}H", *values).ljust(4, b"\0")
        body += struct.pack(f"{order}HHI", tag, kind, len(values)) + field
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(entries)) + body + struct.pack(f"{order}I", 0) + extra + strip


def save(image: np.ndarray | Image.Image, form: str, mode: str | None = None, **options) -> bytes:
    """By Pillow. mode: "CMYK" where four planes are not RGBA."""
    if mode is not None:
        image = Image.frombytes(mode, image.shape[1::-1], np.ascontiguousarray(image).tobytes())
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, form, **options)
    return stream.getvalue()


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What is stored when a camera held so takes `pixels`: the inverse of what a viewer must do."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels.swapaxes(0, 1)[::-1],
        7: pixels.swapaxes(0, 1)[::-1, ::-1],
        8: pixels.swapaxes(0, 1)[:, ::-1],
    }[orientation].copy()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def pngs() -> list[Animal]:
    rgb = scene()
    grey, alpha = rgb[..., 0], rgb[..., 1]
    wide = (grey.astype(np.uint16) * 257 + 77).clip(max=65535)
    shallow = {bits: grey >> (8 - bits) for bits in (1, 2, 4)}
    palette = scene(16, 16).reshape(256, 3)
    index = (np.arange(H * W).reshape(H, W) * 7 % 256).astype(np.uint8)
    holes = np.arange(256, dtype=np.uint8)[::-1]
    wide_rgb = rgb.astype(np.uint16) * 257
    key = int(grey[3, 5])
    animals = [
        Animal(f"grey {bits} bits", png(values[..., None], bits, 0), three(values.astype(int) * 255 // (2**bits - 1)))
        for bits, values in shallow.items()
    ]
    plte = (b"PLTE", palette.tobytes())
    return [
        *animals,
        Animal("grey 8 bits", png(grey[..., None], 8, 0), three(grey)),
        Animal("grey 16 bits", png(wide[..., None], 16, 0), three(np.rint(wide / 257)), ROUNDED / 100),
        Animal("rgb 8 bits", png(rgb, 8, 2), rgb),
        Animal("rgb 16 bits", png(wide_rgb, 16, 2), rgb, ROUNDED),
        Animal("palette 1 bit", png(index[..., None] & 1, 1, 3, (b"PLTE", palette[:2].tobytes())), palette[index & 1]),
        Animal(
            "palette 4 bits", png(index[..., None] & 15, 4, 3, (b"PLTE", palette[:16].tobytes())), palette[index & 15]
        ),
        Animal("palette 8 bits", png(index[..., None], 8, 3, plte), palette[index]),
        Animal(
            "palette with alpha",
            png(index[..., None], 8, 3, plte, (b"tRNS", holes.tobytes())),
            over_white(palette[index], holes[index] / 255),
            ROUNDED,
        ),
        Animal("grey with alpha", png(rgb[..., :2], 8, 4), over_white(three(grey), alpha / 255), ROUNDED),
        Animal("grey with alpha 16 bits", png(wide_rgb[..., :2], 16, 4), over_white(three(grey), alpha / 255), ROUNDED),
        Animal("rgba 8 bits", png(np.dstack([rgb, alpha]), 8, 6), over_white(rgb, alpha / 255), ROUNDED),
        Animal(
            "rgba 16 bits",
            png(np.dstack([wide_rgb, wide_rgb[..., 1]]), 16, 6),
            over_white(rgb, alpha / 255),
            ROUNDED,
        ),
        Animal("fully transparent", png(np.dstack([rgb, alpha * 0]), 8, 6), np.full_like(rgb, 255)),
        Animal(
            "transparent grey value",
            png(grey[..., None], 8, 0, (b"tRNS", struct.pack(">H", key))),
            three(np.where(grey == key, 255, grey)),
        ),
        Animal(
            "transparent 16 bit value",
            png(wide[..., None], 16, 0, (b"tRNS", struct.pack(">H", int(wide[3, 5])))),
            three(np.where(wide == wide[3, 5], 255, np.rint(wide / 257))),
            ROUNDED / 100,
        ),
        Animal(
            "transparent colour",
            png(rgb, 8, 2, (b"tRNS", struct.pack(">HHH", *map(int, rgb[3, 5])))),
            np.where((rgb == rgb[3, 5]).all(-1, keepdims=True), 255, rgb).astype(np.uint8),
        ),
        *(
            Animal(f"png {height} x {width}", png(scene(height, width), 8, 2), scene(height, width))
            for height, width in ((1, 1), (2, 2), (1, 5000), (5000, 1), (3, 7))
        ),
        Animal("animated png", save(rgb, "PNG", save_all=True, append_images=[Image.fromarray(rgb[::-1])]), rgb),
        Animal("damaged exif", png(rgb, 8, 2, (b"eXIf", b"II*\0\xff\xff\xff\xff")), rgb),
    ]


def orientations() -> list[Animal]:
    rgb, animals = scene(), []
    big = scene(64, 96)
    for orientation in range(1, 9):
        tag = exif(orientation)
        stored = turned(rgb, orientation)
        raw = tag.removeprefix(b"Exif\0\0")
        animals += [
            Animal(f"png orientation {orientation}", png(stored, 8, 2, (b"eXIf", raw)), rgb),
            Animal(f"webp orientation {orientation}", save(stored, "WEBP", lossless=True, exif=tag), rgb),
            Animal(f"tiff orientation {orientation}", tiff(stored, rgb_tags(stored) | {274: orientation}), rgb),
            Animal(
                f"jpeg orientation {orientation}",
                save(turned(big, orientation), "JPEG", quality=98, subsampling=0, exif=tag),
                big,
                LOSSY,
            ),
        ]
    return animals


def jpegs() -> list[Animal]:
    rgb = scene(64, 96)
    ink = np.dstack([rgb, rgb[::-1, :, 1] // 2])
    adobe = save(ink, "JPEG", "CMYK", quality=98, subsampling=0)
    marker = adobe.index(b"\xff\xee")
    plain = adobe[:marker] + adobe[marker + 2 + struct.unpack(">H", adobe[marker + 2 : marker + 4])[0] :]

    def printed(ink: np.ndarray) -> np.ndarray:
        share = 1 - ink.astype(float) / 255
        return np.rint(255 * share[..., :3] * share[..., 3:]).astype(np.uint8)

    # YCCK: the Adobe marker's last byte says that the first three planes are luma and chroma, of the inverted inks.
    y, x = np.mgrid[0:64, 0:96]
    luma, blue, red = 100 + y // 2, 128 + x // 8, 120 + y // 8
    stored = np.dstack([luma, blue, red, 255 - ink[..., 3]]).astype(np.uint8)
    ycck = bytearray(save(255 - stored, "JPEG", "CMYK", quality=98, subsampling=0))
    ycck[ycck.index(b"Adobe") + 11] = 2
    cyan, magenta = luma + 1.402 * (red - 128), luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128)
    yellow = luma + 1.772 * (blue - 128)
    return [
        Animal("jpeg", save(rgb, "JPEG", quality=98, subsampling=0), rgb, LOSSY),
        Animal("jpeg subsampled", save(rgb, "JPEG", quality=95), rgb, LOSSY),
        Animal("jpeg progressive", save(rgb, "JPEG", quality=98, subsampling=0, progressive=True), rgb, LOSSY),
        Animal("jpeg grey", save(rgb[..., 0], "JPEG", quality=98), three(rgb[..., 0]), LOSSY),
        # Adobe stores ink inverted. Without its marker a file's inks are as they are.
        Animal("jpeg cmyk of adobe", adobe, printed(ink), LOSSY),
        Animal("jpeg cmyk plain", plain, printed(255 - ink), LOSSY),
        Animal("jpeg ycck", bytes(ycck), printed(np.dstack([cyan, magenta, yellow, ink[..., 3]]).clip(0, 255)), LOSSY),
        Animal("jpeg with bytes after its end", save(rgb, "JPEG", quality=98) + b"trailing", rgb, LOSSY),
    ]


def rgb_tags(pixels: np.ndarray) -> dict[int, int | tuple[int, ...]]:
    return {256: pixels.shape[1], 257: pixels.shape[0], 258: (8, 8, 8), 259: 1, 262: 2, 277: 3}


def tiffs() -> list[Animal]:
    rgb = scene()
    grey = rgb[..., 0]
    wide = grey.astype(np.uint16) * 257
    share = grey / np.float32(255)
    one = {256: W, 257: H, 259: 1, 262: 1, 277: 1}
    twelve = (grey.astype(np.uint16) * 16 + 5).clip(max=4095)
    pairs = twelve.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1)
    lightness = np.broadcast_to(np.linspace(0, 255, W), (H, W)).astype(np.uint8)
    lab = np.dstack([lightness, lightness * 0, lightness * 0])
    f = (lightness * (100 / 255) + 16) / 116
    luminance = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    gamma = np.where(luminance <= 0.0031308, 12.92 * luminance, 1.055 * luminance ** (1 / 2.4) - 0.055)
    ink = np.dstack([rgb, rgb[::-1, :, 1] // 2])
    printed = np.rint(255 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)).astype(np.uint8)
    alpha = rgb[..., 1]
    four = rgb_tags(rgb) | {258: (8, 8, 8, 8), 277: 4}
    wide_rgb = rgb_tags(rgb) | {258: (16, 16, 16)}
    float_tags = one | {258: 32, 339: 3}
    broken = share.copy()
    broken[2, 3] = np.nan
    return [
        Animal("tiff rgb", tiff(rgb, rgb_tags(rgb)), rgb),
        Animal("tiff rgb big-endian", tiff(rgb, rgb_tags(rgb), ">"), rgb),
        *(
            Animal(f"tiff {how}", save(rgb, "TIFF", compression=how), rgb)
            for how in ("tiff_lzw", "tiff_deflate", "packbits")
        ),
        Animal("tiff fax", save(grey > 120, "TIFF", compression="group4"), three((grey > 120) * 255)),
        Animal("tiff big", save(rgb, "TIFF", big_tiff=True), rgb),
        Animal("tiff pages", save(rgb, "TIFF", save_all=True, append_images=[Image.fromarray(rgb[::-1])]), rgb),
        Animal("tiff grey", tiff(grey, one | {258: 8}), three(grey)),
        Animal("tiff white is zero", tiff(grey, one | {258: 8, 262: 0}), three(255 - grey)),
        Animal("tiff 12 bits", tiff(packed.astype(np.uint8), one | {258: 12}), three(np.rint(twelve / 4095 * 255))),
        Animal("tiff 16 bits", tiff(wide, one | {258: 16}), three(grey)),
        Animal("tiff 16 bits big-endian", tiff(wide, one | {258: 16}, ">"), three(grey)),
        Animal("tiff 16 bits white is zero", tiff(wide, one | {258: 16, 262: 0}), three(255 - grey)),
        Animal("tiff rgb 16 bits", tiff(rgb.astype(np.uint16) * 257, wide_rgb), rgb, ROUNDED),
        Animal("tiff float", tiff(share, float_tags), three(grey)),
        Animal("tiff float big-endian", tiff(share, float_tags, ">"), three(grey)),
        Animal("tiff float to 255", tiff(share * 255, float_tags), None, reason="floats must lie in"),
        Animal("tiff float with NaN", tiff(broken, float_tags), None, reason="floats must lie in"),
        Animal(
            "tiff 32 bit integers", tiff(wide.astype(np.int32), one | {258: 32, 339: 2}), None, reason="no agreed white"
        ),
        Animal(
            "tiff signed 16 bits", tiff(wide.astype(np.int16), one | {258: 16, 339: 2}), None, reason="no agreed white"
        ),
        Animal("tiff cmyk", tiff(ink, four | {262: 5}), printed, ROUNDED),
        Animal("tiff rgba", tiff(np.dstack([rgb, alpha]), four | {338: 2}), over_white(rgb, alpha / 255), ROUNDED),
        Animal("tiff lab", tiff(lab, rgb_tags(lab) | {262: 8}), three(np.rint(gamma * 255)), ROUNDED),
        Animal("tiff palette", save(painted()[0], "TIFF"), painted()[1]),
    ]


def painted() -> tuple[Image.Image, np.ndarray]:
    """An image of 256 palette colours, and its pixels."""
    index, colours = np.arange(H * W).reshape(H, W) * 7 % 256, scene(16, 16)
    image = Image.fromarray(index.astype(np.uint8), "L")
    image.putpalette(colours.tobytes())
    return image, colours.reshape(256, 3)[index]


def others() -> list[Animal]:
    rgb = scene()
    grey, alpha = rgb[..., 0], rgb[..., 1]
    image, colours = painted()
    rgba = np.dstack([rgb, alpha])
    index = np.asarray(image)
    last = Image.fromarray(np.full((H, W), 9, np.uint8), "L")
    clear = three(index == 7).astype(bool)
    rows = np.pad(rgb[::-1, :, ::-1].reshape(H, -1), ((0, 0), (0, -3 * W % 4)))
    bmp = b"BM" + struct.pack("<IHHI", 54 + rows.size, 0, 0, 54)
    bmp += struct.pack("<IiiHHIIiiII", 40, W, H, 1, 24, 0, rows.size, 0, 0, 0, 0) + rows.tobytes()
    down = bmp[:22] + struct.pack("<i", -H) + bmp[26:54] + rows[::-1].tobytes()
    return [
        Animal("webp lossless", save(rgb, "WEBP", lossless=True), rgb),
        Animal("webp lossy", save(scene(64, 96), "WEBP", quality=95), scene(64, 96), LOSSY),
        Animal("webp rgba", save(rgba, "WEBP", lossless=True, exact=True), over_white(rgb, alpha / 255), ROUNDED),
        Animal(
            "webp animated",
            save(rgb, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(rgb[::-1])]),
            rgb,
        ),
        Animal("gif", save(image, "GIF"), colours),
        Animal("gif interlaced", save(image, "GIF", interlace=1), colours),
        Animal("gif animated", save(image, "GIF", save_all=True, append_images=[last]), colours),
        Animal("gif transparent", save(image, "GIF", transparency=7), np.where(clear, 255, colours).astype(np.uint8)),
        Animal("bmp", bmp, rgb),
        Animal("bmp top down", down, rgb),
        Animal("bmp palette", save(image, "BMP"), colours),
        Animal("bmp grey", save(grey, "BMP"), three(grey)),
        Animal("bmp 1 bit", save(grey > 120, "BMP"), three((grey > 120) * 255)),
    ]


def refused() -> list[Animal]:
    rgb = scene(64, 96)
    files = {
        "png": png(rgb, 8, 2),
        "jpeg": save(rgb, "JPEG"),
        "progressive jpeg": save(rgb, "JPEG", progressive=True),
        "webp": save(rgb, "WEBP", lossless=True),
        "gif": save(painted()[0], "GIF"),
        "bmp": save(rgb, "BMP"),
        "tiff": tiff(rgb, rgb_tags(rgb)),
        "lzw tiff": save(rgb, "TIFF", compression="tiff_lzw"),
    }
    wrong = bytearray(files["png"])
    wrong[60] ^= 255
    return [
        Animal("empty", b"", None, reason="empty file"),
        Animal("text", b"this is not an image\n" * 20, None, reason="not JPEG, PNG"),
        Animal("html", b"<!DOCTYPE html><html>404</html>", None, reason="not JPEG, PNG"),
        Animal("zeros", bytes(5000), None, reason="not JPEG, PNG"),
        *(Animal(f"half a {name}", data[: len(data) // 2], None, reason="decoded") for name, data in files.items()),
        *(Animal(f"beginning of a {name}", data[:14], None, reason="decoded") for name, data in files.items()),
        Animal("png with a wrong checksum", bytes(wrong), None, reason="decoded"),
        Animal("png of no size", png(rgb, 8, 2, size=(0, 0)), None, reason="decoded"),
        Animal("jpeg without a picture", b"\xff\xd8\xff\xd9", None, reason="decoded"),
    ]


def bombs() -> list[Animal]:
    """A few bytes or kilobytes that claim more than 64 million pixels."""
    line = np.zeros((1, 1, 3), np.uint8)
    tiny = np.zeros((1, 1), np.uint8)
    animals = [
        Animal(f"png bomb {side}", png(line, 8, 2, size=(side, side)), None)
        for side in (8001, 9000, 13300, 30000, 2**31 - 1)
    ]
    webp = bytearray(save(line.repeat(2, 0), "WEBP", lossless=True))
    at = webp.index(b"VP8L") + 9
    webp[at : at + 4] = struct.pack("<I", 11999 | 11999 << 14)
    larger = webp.copy()
    larger[at : at + 4] = struct.pack("<I", 16383 | 16383 << 14)
    gif = bytearray(save(tiny, "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    jpeg = bytearray(save(line, "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 65535, 65535)
    bmp = bytearray(save(line, "BMP"))
    bmp[18:26] = struct.pack("<ii", 20000, 20000)
    tags = rgb_tags(line)
    animals += [
        Animal("webp bomb", bytes(webp), None),
        Animal("gif bomb", bytes(gif), None),
        Animal("jpeg bomb", bytes(jpeg), None),
        Animal("bmp bomb", bytes(bmp), None),
        Animal("tiff bomb striped", tiff(line, tags | {256: 65535, 257: 65535, 278: 1}), None),
        Animal("tiff bomb", tiff(line, tags | {256: 14000, 257: 14000}), None),
    ]
    animals = [animal._replace(reason="px > limit") for animal in animals]
    return [*animals, Animal("larger webp bomb", bytes(larger), None, reason="exceeds limit|px > limit")]


def zoo() -> list[Animal]:
    return pngs() + orientations() + jpegs() + tiffs() + others() + refused() + bombs()
