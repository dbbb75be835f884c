"""Images as a broken download, an odd camera or an attacker makes them."""

# ruff: noqa: E501  # tables

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from tests.helpers import encoded, picture

Refusal = Literal["extract", "preprocess"]
RED, WHITE, GREY = (255, 0, 0), (255, 255, 255), (128, 128, 128)


class HostileImage(NamedTuple):
    """An image file; the stage that refuses it, or the colour (RGB) that its upper left quarter has when it is taken."""

    name: str
    promise: str
    content: Callable[[], bytes]
    ends: Refusal | tuple[int, int, int] | None  # None: some pixels, whichever
    suffix: str = "jpg"

    @property
    def file(self) -> str:
        return f"{self.name.replace(' ', '-').replace(',', '')}.{self.suffix}"


def _red(mode: str = "RGB") -> Image.Image:
    """Red above, black below."""
    image = Image.new("RGB", (40, 40))
    image.paste(RED, (0, 0, 40, 20))
    return image.convert(mode)


def _grey16(values: object) -> Image.Image:
    return Image.fromarray(np.full((40, 40), values, dtype=np.uint16))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, pixels: bytes, interlaced: bool = False) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")
    )


def _interlaced(num_rows_missing: int) -> bytes:
    """An 8 x 8 PNG, red, in Adam7's seven passes (columns, rows)."""
    rows = [
        columns for columns, count in ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)) for _ in range(count)
    ]
    pixels = [b"\0" + bytes(RED) * columns for columns in rows]
    return _png(8, 8, b"".join(pixels[: len(pixels) - num_rows_missing]), interlaced=True)


def _exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to see it upright
    left = Image.new("RGB", (40, 40))
    left.paste(RED, (0, 20, 20, 40))  # comes to lie in the upper left quarter
    return encoded(left, "JPEG", quality=95, exif=exif.tobytes())


def _junk_exif() -> bytes:
    return encoded(_red(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(range(64)))


def _flipped(format: str, seed: int) -> bytes:
    content = bytearray(encoded(picture(size=(64, 64)), format))
    rng = np.random.default_rng(seed)
    for position in rng.integers(len(content) // 3, len(content), 12):
        content[position] ^= int(rng.integers(1, 256))
    return bytes(content)


def _bmp_of(width: int, height: int) -> bytes:
    content = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    struct.pack_into("<ii", content, 18, width, height)
    return bytes(content)


def _animation(format: str) -> bytes:
    frames = [Image.new("RGB", (40, 40), colour) for colour in (RED, "blue", "green")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], lossless=True)
    return buffer.getvalue()


def _palette() -> bytes:
    return encoded(_red().quantize(4), "PNG")


def _truncated(format: str) -> bytes:
    content = encoded(picture(size=(64, 64)), format)
    return content[: int(0.7 * len(content))]


def _text_bomb() -> bytes:
    """A PNG with a compressed comment of 300 MB."""
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(300 << 20), 9))
    plain = encoded(_red(), "PNG")
    return plain[:33] + text + plain[33:]


IMAGES = [
    HostileImage("zero bytes", "Refused as empty.", lambda: b"", "extract"),
    HostileImage("HTML page", "A page named .jpg is refused with the bytes that it starts with.",
                 lambda: b"<!DOCTYPE html><html>", "extract"),
    HostileImage("noise", "Random bytes named .jpg are refused.", lambda: np.random.default_rng(0).bytes(5000), "extract"),
    HostileImage("vector image", "SVG is refused: it is no raster image.", lambda: b"<svg xmlns='x'/>" * 9, "extract", "png"),
    HostileImage("PostScript", "EPS, for which Pillow would start Ghostscript, is refused.",
                 lambda: encoded(_red(), "EPS"), "extract"),
    HostileImage("icon", "A format that photographs are not kept in is refused.", lambda: encoded(_red(), "ICO"), "extract"),
    HostileImage("header only", "A JPEG that ends after its first bytes is refused.",
                 lambda: encoded(_red(), "JPEG")[:8], "extract"),
    HostileImage("huge dimensions, PNG", "A claim of 60,000 x 60,000 pixels is refused before memory is taken.",
                 lambda: _png(60_000, 60_000, b""), "extract", "png"),
    HostileImage("huge dimensions, BMP", "The same in a BMP.", lambda: _bmp_of(50_000, 50_000), "extract", "bmp"),
    HostileImage("zero width", "An image without pixels is refused.", lambda: _png(0, 40, b""), "extract", "png"),
    HostileImage("negative size", "A BMP of negative width is refused.", lambda: _bmp_of(-8, -8), "extract", "bmp"),
    HostileImage("truncated JPEG", "Refused, where a check of the header would pass it.",
                 lambda: _truncated("JPEG"), "preprocess"),
    HostileImage("truncated PNG", "The same.", lambda: _truncated("PNG"), "preprocess", "png"),
    HostileImage("truncated WebP", "The same.", lambda: _truncated("WEBP"), "extract", "webp"),
    HostileImage("truncated TIFF", "The same.", lambda: _truncated("TIFF"), "preprocess", "tif"),
    HostileImage("truncated GIF", "The same.", lambda: _truncated("GIF"), "preprocess", "gif"),
    HostileImage("short IDAT", "A PNG with fewer pixels than it says, on which other decoders crash, is refused.",
                 lambda: _png(40, 40, bytes(121)), "preprocess", "png"),
    HostileImage("short IDAT, interlaced", "The same, with one row of seven passes missing.",
                 lambda: _interlaced(1), "preprocess", "png"),
    HostileImage("interlaced PNG", "Taken, when it is whole.", lambda: _interlaced(0), RED, "png"),
    HostileImage("flipped bytes, PNG", "Refused: PNG has checksums.", lambda: _flipped("PNG", 1), "preprocess", "png"),
    HostileImage("flipped bytes, JPEG", "Decoded to wrong pixels or refused (JPEG has no checksum); never a crash.",
                 lambda: _flipped("JPEG", 2), None),
    HostileImage("flipped bytes, WebP", "The same.", lambda: _flipped("WEBP", 3), None, "webp"),
    HostileImage("flipped bytes, TIFF", "The same.", lambda: _flipped("TIFF", 4), None, "tif"),
    HostileImage("comment bomb", "A PNG whose comment inflates to 300 MB is refused before it does.",
                 _text_bomb, "extract", "png"),
    HostileImage("16 bits", "Scaled to 8 bits, not clipped to white.", lambda: encoded(_grey16(128 * 257), "PNG"), GREY, "png"),
    HostileImage("16-bit TIFF", "The same.", lambda: encoded(_grey16(128 * 257), "TIFF"), GREY, "tif"),
    HostileImage("float TIFF", "Numbers from 0 to 1 are scaled to 8 bits.",
                 lambda: encoded(Image.fromarray(np.full((40, 40), 128 / 255, dtype=np.float32)), "TIFF"), GREY, "tif"),
    HostileImage("NaN pixels", "A float TIFF with NaN is refused.",
                 lambda: encoded(Image.fromarray(np.full((40, 40), np.nan, dtype=np.float32)), "TIFF"), "preprocess", "tif"),
    HostileImage("infinite pixels", "The same with infinity.",
                 lambda: encoded(Image.fromarray(np.full((40, 40), np.inf, dtype=np.float32)), "TIFF"), "preprocess", "tif"),
    HostileImage("pixels out of range", "A float TIFF with numbers below 0 is refused.",
                 lambda: encoded(Image.fromarray(np.full((40, 40), -5, dtype=np.float32)), "TIFF"), "preprocess", "tif"),
    HostileImage("CMYK", "Converted to RGB.", lambda: encoded(_red("CMYK"), "TIFF"), RED, "tif"),
    HostileImage("CMYK JPEG", "Converted to RGB, Adobe's inversion seen to.",
                 lambda: encoded(_red("CMYK"), "JPEG", quality=98), RED),
    HostileImage("palette", "Converted to RGB.", _palette, RED, "png"),
    HostileImage("one bit", "Converted to RGB.", lambda: encoded(Image.new("1", (40, 40), 1), "PNG"), WHITE, "png"),
    HostileImage("transparent", "Transparent pixels lie on white.",
                 lambda: encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "PNG"), WHITE, "png"),
    HostileImage("animated GIF", "The first frame is taken.", lambda: _animation("GIF"), RED, "gif"),
    HostileImage("animated WebP", "The same.", lambda: _animation("WEBP"), RED, "webp"),
    HostileImage("EXIF rotated", "Turned as its EXIF says.", _exif_rotated, RED),
    HostileImage("junk in EXIF", "Metadata that cannot be read are left out; the pixels are taken.", _junk_exif, RED),
    HostileImage("wrong extension", "A PNG named .jpg is taken for what it is.", lambda: encoded(_red(), "PNG"), RED),
    HostileImage("one pixel", "Enlarged.", lambda: encoded(Image.new("RGB", (1, 1), RED), "PNG"), RED, "png"),
    HostileImage("one line", "1 x 2,000 pixels: the middle is enlarged.",
                 lambda: encoded(Image.new("RGB", (2000, 1), RED), "PNG"), RED, "png"),
    HostileImage("bytes after the end", "What follows the end of a JPEG is left out.",
                 lambda: encoded(_red(), "JPEG", quality=95) + b"MZ" * 5000, RED),
]  # fmt: skip
