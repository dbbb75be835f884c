"""Decode one image of any kind to RGB, and bring it to the square that the packed arrays hold."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from stages.core.errors import InputError

# What Pillow may open: the raster formats that people keep photographs in.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# Above it, an image is taken for a decompression bomb (Pillow's own error limit, 179 megapixels).
MAX_PIXELS = 178_956_970
# What Pillow raises of damaged bytes (each was seen, or is raised by its plugins).
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# PNG: numbers a pixel by colour type, and the passes of an interlaced one (left, top, columns apart, rows apart).
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_OVERSHOOT = 0.2  # share of the range, on either side
_BAND = 1 << 22  # pixels that are scaled at once

CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]
INTERPOLATIONS: dict[Interpolation, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


def check_is_image(content: bytes, name: str) -> None:
    """Raise InputError naming `name` unless the header is that of an image format in FORMATS."""
    with _open(content, name):
        pass


def decode(
    content: bytes, name: str, size: int, crop_mode: CropMode = "center", interpolation: Interpolation = "bilinear"
) -> NDArray[np.uint8]:
    """Pixels uint8 (size, size, 3), RGB, of an encoded image, its EXIF orientation applied.

    `crop_mode` has timm's meaning: center (shorter side to `size`, then the middle), squash (both sides to
    `size`), border (longer side to `size`, the rest filled with grey). An image that has the size already is not
    resampled. Raises InputError naming `name` when it cannot be decoded in full.
    """
    pixels = _simple_jpeg(content, size)
    if pixels is not None and pixels.shape == (size, size, 3):
        return pixels
    image = Image.fromarray(pixels) if pixels is not None else _open_and_decode(content, name, size)
    if image.size != (size, size):
        image = _to_square(image, size, crop_mode, INTERPOLATIONS[interpolation])
    return np.asarray(image)


def _open_and_decode(content: bytes, name: str, size: int) -> Image.Image:
    """An image of any kind in RGB, as large as it is, or scaled down to no less than twice `size`."""
    with warnings.catch_warnings(), _open(content, name) as image:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        try:
            full_size = image.size
            # The JPEG decoder can scale by 1/2, 1/4, 1/8 for free: never below twice what is needed.
            image.draft(None, (2 * size, 2 * size))
            if image.size == full_size and _is_plain_jpeg(image) and (pixels := _decode_jpeg(content)) is not None:
                return Image.fromarray(pixels)
            image.load()  # verify() would let a truncated JPEG pass
            if image.format == "PNG":
                _check_png_is_whole(content)
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
        except _DAMAGED as error:
            raise InputError(f"{name}: cannot be decoded: {error or type(error).__name__}") from None


def _open(content: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and sizes: the limit below decides
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:
        start = content[:16].decode("ascii", "replace").replace("\n", " ")
        what = "is empty" if not content else f"is not an image (it starts with {start!r})"
        raise InputError(f"{name}: {what}; readable formats: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {error}") from None
    except _DAMAGED as error:
        raise InputError(f"{name}: cannot be read as an image: {error or type(error).__name__}") from None
    if image.width * image.height > MAX_PIXELS or not image.width * image.height:
        raise InputError(f"{name}: {image.width}x{image.height} pixels; the limit is {MAX_PIXELS}")
    return image


def _simple_jpeg(content: bytes, size: int) -> NDArray[np.uint8] | None:
    """A colour JPEG that is not to be turned or scaled down, without Pillow's 60 us to look at it; or None."""
    # An orientation is in EXIF, or in XMP, as Pillow has it.
    if not content.startswith(b"\xff\xd8\xff") or b"Exif" in content or b"tiff:Orientation" in content:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content, strict=True)
    except ValueError:
        return None
    if colours != "YCbCr" or width * height > MAX_PIXELS or min(width, height) // (2 * size) >= 2:
        return None
    return _decode_jpeg(content)


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _decode_jpeg(content: bytes) -> NDArray[np.uint8] | None:
    """Pixels (H, W, 3) of a colour JPEG at nearly twice Pillow's speed, and the same as Pillow's; None: ask Pillow."""
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, strict=True)
    except ValueError:  # it calls every remark of libjpeg an error, of which Pillow forgives some
        return None
    return pixels


def _check_png_is_whole(content: bytes) -> None:
    """ValueError when a PNG's data end before its last row: Pillow takes the missing rows for black."""
    width, height, depth, colour, _, _, is_interlaced = struct.unpack(">IIBBBBB", content[16:29])
    bits = depth * _PNG_CHANNELS[colour]
    missing = 0
    for left, top, across, down in _ADAM7 if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        missing += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    inflate, position = zlib.decompressobj(), 8
    while missing > 0 and position + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        data = content[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        while data and missing > 0 and not inflate.eof:
            missing -= len(inflate.decompress(data, 1 << 20))
            data = inflate.unconsumed_tail
        position += 12 + length
    if missing > 0 and len(inflate.flush()) < missing:
        raise ValueError("the data end before the last row of pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Grayscale, palette, CMYK, alpha (over white) and 16-bit to RGB; the first frame of an animation."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips here (a 16-bit image would come out white): scale the format's range instead.
        return _scaled(np.asarray(image), image.mode == "F").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def _scaled(values: NDArray[Any], is_float: bool) -> Image.Image:
    """Numbers (H, W) of a 16-bit or float image as 8-bit grey, in bands: a large one as float64 takes gigabytes."""
    if not np.isfinite(values).all():
        raise ValueError("pixel values are not finite")
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    # Interpolation overshoots: floats may be a little outside of what is black and white.
    beyond = _OVERSHOOT if is_float else 0.0
    full = next((full for full in (1.0, 255.0) if is_float and high <= (1 + beyond) * full), 65535.0)
    if low < -beyond * full or high > (1 + beyond) * full:
        raise ValueError(f"pixel values from {low:g} to {high:g}; expected 0 to {full:g}")
    grey = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _BAND // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        scaled = np.round(values[top : top + rows].astype(np.float64) * (255 / full))
        grey[top : top + rows] = scaled.clip(0, 255)
    return Image.fromarray(grey)


def _to_square(image: Image.Image, size: int, crop_mode: CropMode, resample: Image.Resampling) -> Image.Image:
    if crop_mode == "center":
        return ImageOps.fit(image, (size, size), method=resample)
    if crop_mode == "border":
        if 2 * size * min(image.size) <= max(image.size):  # less than half a pixel, which Pillow leaves out
            image = image.resize((size, 1) if image.width > image.height else (1, size), resample)
        return ImageOps.pad(image, (size, size), method=resample, color=(128, 128, 128))
    return image.resize((size, size), resample)
