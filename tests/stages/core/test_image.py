from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image

from stages.core.errors import InputError
from stages.core.image import check_is_image, decode
from tests.helpers import encoded, picture


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_lossless_formats_decode_to_the_exact_pixels(format: str) -> None:
    image = picture(size=(16, 16))
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(decode(encoded(image, format, **options), "x", 16), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "RGBA", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = picture(size=(16, 16))
    if mode == "I;16":
        grey = np.asarray(image.convert("L"), dtype=np.uint16) * 257
        content, expected = encoded(Image.fromarray(grey), "PNG"), image.convert("L").convert("RGB")
    elif mode in ("CMYK", "YCbCr"):
        content, expected = encoded(image.convert(mode), "TIFF"), image.convert(mode).convert("RGB")
    elif mode == "LA":
        content, expected = encoded(image.convert("L").convert("LA"), "PNG"), image.convert("L").convert("RGB")
    else:
        content, expected = encoded(image.convert(mode), "PNG"), image.convert(mode).convert("RGB")
    pixels = decode(content, "x", 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= 1


def test_transparent_pixels_lie_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode(encoded(image, "PNG"), "x", 8) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (32, 32), "black")
    upright.paste((255, 255, 255), (0, 0, 16, 8))  # a mark that no turn or mirror maps to itself
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(stored, "JPEG", quality=95, exif=exif.tobytes()), "x", 32)
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 4
    # Where EXIF was stripped and XMP kept.
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    content = encoded(stored, "JPEG", quality=95, xmp=xmp)
    assert b"Exif" not in content
    assert np.array_equal(decode(content, "x", 32), pixels)


def test_the_modes_of_cropping() -> None:
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste((0, 0, 255), (10, 0, 30, 20))  # the middle square is blue
    content = encoded(wide, "PNG")
    assert (decode(content, "x", 20, "center") == (0, 0, 255)).all()
    squashed = decode(content, "x", 20, "squash")
    assert (squashed[10, 0] == (255, 0, 0)).all()
    assert (squashed[10, 10] == (0, 0, 255)).all()
    padded = decode(content, "x", 20, "border")
    assert (padded[0] == 128).all()
    assert (padded[10, 0] == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(3000, 20), (20, 3000), (129, 1), (1, 128)])
def test_what_is_left_of_a_very_long_image_is_a_line(size: tuple[int, int]) -> None:
    padded = decode(encoded(Image.new("RGB", size, "red"), "PNG"), "x", 64, "border")
    line = padded[31:33] if size[0] > size[1] else padded[:, 31:33]
    assert (line == (255, 0, 0)).all(axis=2).sum() == 64
    assert (padded == 128).all(axis=2).sum() == 63 * 64


@pytest.mark.parametrize(("white", "low", "high"), [(1, -0.05, 1.02), (255, -8, 260), (1, 0, 1), (255, 0, 255)])
def test_floats_have_the_range_that_they_nearly_keep_to(white: float, low: float, high: float) -> None:
    values = np.full((16, 16), 0.5 * white, dtype=np.float32)
    values[0, :2] = low, high
    pixels = decode(encoded(Image.fromarray(values), "TIFF"), "x", 16)
    assert (pixels[1:] == 128).all()
    assert pixels[0, :2, 0].tolist() == [0, 255]
    values[0, 1] = -0.3 * white
    with pytest.raises(InputError, match=f"pixel values from -.*; expected 0 to {white}"):
        decode(encoded(Image.fromarray(values), "TIFF"), "x", 16)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(content, "x", 8) == (255, 0, 0)).all()


@pytest.mark.parametrize("side", [7, 16, 30, 31, 32, 33, 61, 64, 65, 100])
def test_a_jpeg_without_exif_is_read_as_one_with_it(side: int) -> None:
    image = picture(size=(128, 131))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    plain, described = (encoded(image, "JPEG", quality=90, **options) for options in ({}, {"exif": exif.tobytes()}))
    assert b"Exif" in described
    assert b"Exif" not in plain
    assert np.array_equal(decode(plain, "x", side), decode(described, "x", side))


def test_a_large_jpeg_is_reduced_faithfully() -> None:
    """The decoder's own scaling must not show."""
    image = picture(3, size=(640, 480))
    fast = decode(encoded(image, "JPEG", quality=95), "x", 64, "squash").astype(int)
    slow = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(fast - slow).mean() < 1.5


@pytest.mark.parametrize(
    "options",
    [{"subsampling": s, "quality": q} for s in (0, 1, 2) for q in (30, 95)]
    + [{"progressive": True}, {"restart_marker_blocks": 2}, {"keep_rgb": True}, {"dpi": (72, 72), "comment": b"x"}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_have_the_pixels_that_pillow_decodes(mode: str, options: dict[str, Any]) -> None:
    if mode != "RGB" and "keep_rgb" in options:
        options = {}
    content = encoded(picture(7, size=(61, 61), mode=mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(decode(content, "x", 61), expected)


def test_a_jpeg_that_pillow_forgives_is_decoded() -> None:
    """libjpeg remarks on stray bytes before a marker; the picture is whole."""
    content = encoded(picture(7, size=(61, 61)), "JPEG")
    stray = content[:-2] + bytes(9) + content[-2:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(stray)
    assert np.array_equal(decode(stray, "x", 61), decode(content, "x", 61))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_images_are_refused_by_name(format: str, share: float) -> None:
    content = encoded(picture(size=(64, 64)), format)
    with pytest.raises(InputError, match=r"cats/7\.jpg"):
        decode(content[: int(len(content) * share)], "cats/7.jpg", 16)


def test_bytes_flipped_anywhere_give_pixels_or_a_refusal() -> None:
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        content = encoded(picture(size=(32, 32)), format)
        for _ in range(60):
            damaged = bytearray(content)
            for position in rng.integers(0, len(content), size=4):
                damaged[position] ^= int(rng.integers(1, 256))
            try:
                pixels = decode(bytes(damaged), "name", 16)
            except InputError as error:
                assert "name" in str(error)  # noqa: PT017
            else:
                assert pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"hello, I am a text", bytes(100)])
def test_what_is_no_image_is_refused_by_name(content: bytes) -> None:
    for function in (check_is_image, lambda content, name: decode(content, name, 16)):
        with pytest.raises(InputError, match=r"cats/7\.jpg: is (empty|not an image)"):
            function(content, "cats/7.jpg")


def test_a_claim_of_huge_dimensions_is_refused_before_memory_is_taken() -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    with pytest.raises(InputError, match="x: "):
        check_is_image(buffer.getvalue(), "x")
