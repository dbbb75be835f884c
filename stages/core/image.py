"""Decode one image of any kind to RGB, and bring it to the square that the packed arrays hold."""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from stages.core.errors import InputError

# What Pillow may open: the raster formats that people keep photographs in.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
# Above it, an image is taken for a decompression bomb (Pillow's own error limit, 179 megapixels).
MAX_PIXELS = 178_956_970

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
    """The pixels of `decode_image`: (size, size, 3) RGB, uint8."""
    return np.asarray(decode_image(content, name, size, crop_mode, interpolation))


def decode_image(
    content: bytes,
    name: str,
    size: int,
    crop_mode: CropMode = "center",
    interpolation: Interpolation = "bilinear",
) -> Image.Image:
    """Decode an encoded image to an RGB image of (size, size), with its EXIF orientation applied.

    `crop_mode` has timm's meaning: center (shorter side to `size`, then the middle), squash (both sides to
    `size`), border (longer side to `size`, the rest filled with grey). An image that has the size already is not
    resampled. Raises InputError naming `name` when it cannot be decoded in full.
    """
    with warnings.catch_warnings(), _open(content, name) as image:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        try:
            full_size = image.size
            # The JPEG decoder can scale by 1/2, 1/4, 1/8 for free: never below twice what is needed.
            image.draft(None, (2 * size, 2 * size))
            rgb = _plain_jpeg(image, content) if image.size == full_size else None
            if rgb is None:
                image.load()  # verify() would let a truncated JPEG pass
                ImageOps.exif_transpose(image, in_place=True)
                rgb = _to_rgb(image)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise InputError(f"{name}: cannot be decoded: {error}") from None
    return rgb if rgb.size == (size, size) else _to_square(rgb, size, crop_mode, INTERPOLATIONS[interpolation])


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
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError) as error:
        raise InputError(f"{name}: cannot be read as an image: {error}") from None
    if image.width * image.height > MAX_PIXELS or not image.width * image.height:
        raise InputError(f"{name}: {image.width}x{image.height} pixels; the limit is {MAX_PIXELS}")
    return image


def _plain_jpeg(image: Image.Image, content: bytes) -> Image.Image | None:
    """A JPEG without peculiarities, decoded at nearly twice Pillow's speed to the same pixels; None: ask Pillow."""
    if image.format != "JPEG" or image.mode != "RGB" or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    try:
        return Image.fromarray(simplejpeg.decode_jpeg(content, strict=True))
    except ValueError:  # it calls every remark of libjpeg an error, of which Pillow forgives some
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Grayscale, palette, CMYK, alpha (over white) and 16-bit to RGB; the first frame of an animation."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips here (a 16-bit image would come out white): scale the format's range instead.
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixel values are not finite")
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        full = 1.0 if high <= 1 and image.mode == "F" else 255.0 if high <= 255 and image.mode == "F" else 65535.0
        if low < 0 or high > full:
            raise ValueError(f"pixel values from {low:g} to {high:g}; expected 0 to {full:g}")
        return Image.fromarray(np.round(values * (255 / full)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def _to_square(image: Image.Image, size: int, crop_mode: CropMode, resample: Image.Resampling) -> Image.Image:
    if crop_mode == "center":
        return ImageOps.fit(image, (size, size), method=resample)
    if crop_mode == "border":
        return ImageOps.pad(image, (size, size), method=resample, color=(128, 128, 128))
    return image.resize((size, size), resample)
