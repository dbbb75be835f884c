"""Image statistics: known values of images made by formula, and the response to the corruption that each is for."""

from __future__ import annotations

import colorsys
import io
import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages.core.corruptions import SEVERITIES, corrupt
from stages.core.image_statistics import STATISTICS, image_statistics
from tests.synthetic import clouds

FLOOR = 1e-3


def of(image: NDArray[np.uint8]) -> dict[str, float]:
    """Statistics of one image (H, W, 3), or grey (H, W)."""
    pixels = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
    return dict(zip(STATISTICS, image_statistics(pixels[None])[0].tolist(), strict=True))


def grey_noise(sigma: float, size: int = 128, channels: int = 1) -> NDArray[np.uint8]:
    values = np.random.default_rng(0).normal(128, sigma, (size, size, channels))
    levels = np.rint(values).clip(0, 255).astype(np.uint8)
    return np.broadcast_to(levels, (size, size, 3))


def board(cell: int, size: int = 64) -> NDArray[np.uint8]:
    y, x = np.mgrid[:size, :size] // cell
    levels: NDArray[np.uint8] = (255 * ((x + y) % 2)).astype(np.uint8)
    return levels


def test_a_constant_image() -> None:
    level, nothing = 100 / 255, math.log(FLOOR)
    expected = dict.fromkeys(STATISTICS, 0.0)
    expected |= dict.fromkeys(("brightness", "shadows", "highlights", "haze"), level)
    expected |= dict.fromkeys(("noise", "colour_noise", "sharpness", "detail", "structure"), nothing)
    assert of(np.full((32, 32), 100, dtype=np.uint8)) == pytest.approx(expected | {"flatness": 1.0}, abs=1e-3)


def test_a_ramp_has_no_noise_and_one_direction() -> None:
    ramp = np.broadcast_to(np.arange(0, 128, 2, dtype=np.uint8), (64, 64))
    found, step = of(ramp), 2 / 255
    assert found["brightness"] == pytest.approx(63 / 255, abs=1e-5)
    assert found["contrast"] == pytest.approx((ramp / 255).std(ddof=1), abs=1e-5)
    assert found["shadows"] == pytest.approx(0.05 * 126 / 255, abs=0.015)
    assert found["highlights"] == pytest.approx(0.95 * 126 / 255, abs=0.015)
    assert found["noise"] == pytest.approx(math.log(FLOOR), abs=1e-3)
    assert found["direction"] == pytest.approx(math.log((step + FLOOR) / FLOOR), abs=1e-3)
    assert found["flatness"] == pytest.approx(0.5)
    assert found["blocks"] == pytest.approx(0, abs=1e-3)
    turned = of(np.ascontiguousarray(ramp.T))
    assert turned == pytest.approx(found, abs=0.02)


@pytest.mark.parametrize("sigma", [3, 8, 20])
def test_noise_is_its_standard_deviation(sigma: float) -> None:
    rounded = (sigma**2 + 1 / 12) ** 0.5 / 255
    grey = of(grey_noise(sigma))
    assert grey["noise"] == pytest.approx(math.log(rounded + FLOOR), abs=0.03)
    assert grey["colour_noise"] == pytest.approx(math.log(FLOOR), abs=1e-3)
    assert of(grey_noise(sigma, channels=3))["colour_noise"] == pytest.approx(
        math.log(2**0.5 * rounded + FLOOR), abs=0.03
    )
    assert grey["direction"] < 0.4, "steps along and across are sqrt(2) as far apart as their neighbours' distance"
    assert grey["contrast"] == pytest.approx(rounded, rel=0.03)


def test_quantiles_of_uniform_noise() -> None:
    found = of(np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8))
    assert found["shadows"] == pytest.approx(0.05, abs=0.02)
    assert found["highlights"] == pytest.approx(0.95, abs=0.02)


def test_a_colour_cast_by_hand() -> None:
    found = of(np.broadcast_to(np.array([200, 100, 50], dtype=np.uint8), (16, 16, 3)))
    red, green, blue = (value / 255 + FLOOR for value in (200, 100, 50))
    assert found["red_cast"] == pytest.approx(math.log(red / green), abs=1e-4)
    assert found["blue_cast"] == pytest.approx(math.log(blue / green), abs=1e-4)
    assert found["haze"] == pytest.approx(50 / 255)
    assert found["saturation"] == pytest.approx(150 / 200, rel=0.005)
    assert found["brightness"] == pytest.approx((0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255, abs=1e-5)


def test_saturation_is_that_of_colorsys() -> None:
    image = np.random.default_rng(0).integers(20, 256, (16, 20, 3), dtype=np.uint8)
    expected = np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in (image.reshape(-1, 3) / 255).tolist()])
    assert of(image)["saturation"] == pytest.approx(expected, rel=0.005)


def test_octaves_hold_the_cells_of_their_size() -> None:
    names = ("sharpness", "detail", "structure")
    for octave, name in enumerate(names):
        found = of(board(2**octave))
        assert found[name] == pytest.approx(math.log(0.5), abs=0.02)
        for coarser in names[octave + 1 :]:
            assert found[coarser] == pytest.approx(math.log(FLOOR), abs=0.02)


def test_steps_on_the_grid_of_jpeg_are_blocks() -> None:
    """Fields of 8 pixels: all steps lie on the grid; four pixels on, all lie between."""
    image = board(8)
    most = math.log((2.0 + FLOOR) / FLOOR)
    assert of(image)["blocks"] == pytest.approx(most, abs=0.01)
    assert of(image[4:, 4:])["blocks"] == pytest.approx(-most, abs=0.01)


def test_jpeg_has_blocks() -> None:
    for image in clouds(4, 64, 80):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=8)
        assert of(np.asarray(Image.open(buffer)))["blocks"] > of(image)["blocks"] + 0.2


def test_stripes_have_a_direction_and_isotropic_texture_has_none() -> None:
    wave = np.rint(128 + 60 * np.sin(np.arange(64) / 3)).astype(np.uint8)
    across = np.broadcast_to(wave, (64, 64))
    diagonal = np.rint(128 + 60 * np.sin(np.add.outer(np.arange(64), np.arange(64)) / 4)).astype(np.uint8)
    for stripes in (across, across.T, diagonal, diagonal[:, ::-1]):
        assert of(np.ascontiguousarray(stripes))["direction"] > 2
    y, x = np.mgrid[:65, :65] - 32
    rings = np.rint(128 + 60 * np.sin(np.hypot(x, y) / 3)).astype(np.uint8)
    assert of(rings)["direction"] < 0.1


@pytest.mark.parametrize(("height", "expected"), [(200, 5), (20, 5), (110, 0), (90, 0)])
def test_single_pixels_that_stand_out_are_speckles(height: int, expected: int) -> None:
    """Grey 100; 26 grey levels are a tenth of the range."""
    image = np.full((32, 48), 100, dtype=np.uint8)
    image[4:29:6, 10] = height
    assert of(image)["speckles"] == pytest.approx(expected / (30 * 46))
    image[4:29:6, 11] = height
    assert of(image)["speckles"] == 0, "pairs are no speckles"


@pytest.mark.parametrize(
    ("kind", "name", "sign"),
    [
        ("gaussian_noise", "noise", 1),
        ("gaussian_noise", "colour_noise", 1),
        ("impulse_noise", "speckles", 1),
        ("gaussian_blur", "sharpness", -1),
        ("contrast", "contrast", -1),
        ("brightness", "brightness", 1),
        ("brightness", "haze", 1),
        ("darkness", "brightness", -1),
        ("jpeg_compression", "blocks", 1),
    ],
)
def test_each_grows_with_the_severity_of_its_corruption(kind: str, name: str, sign: int) -> None:
    images = clouds(6, 64, 64)
    if sign < 0 and name == "sharpness":
        images = np.random.default_rng(0).integers(60, 196, images.shape, dtype=np.uint8)
    stages = [images, *(corrupt(images, kind, severity, np.arange(6)) for severity in SEVERITIES)]
    means = [sign * image_statistics(stage)[:, STATISTICS.index(name)].mean() for stage in stages]
    assert all(after > before for before, after in itertools.pairwise(means)), means


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = np.concatenate([clouds(60, 24, 20), corrupt(clouds(10, 24, 20), "gaussian_noise", 3, np.arange(10))])
    whole = image_statistics(images)
    assert whole.shape == (70, len(STATISTICS))
    assert whole.dtype == np.float32
    for row in (0, 63, 64, 69):
        np.testing.assert_allclose(image_statistics(images[row : row + 1])[0], whole[row], atol=1e-5)
    np.testing.assert_allclose(image_statistics(images[::-1])[::-1], whole, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (16, 61), (61, 16), (33, 47), (224, 100)])
def test_any_shape(shape: tuple[int, int]) -> None:
    images = clouds(3, *shape)
    images.setflags(write=False)
    found = image_statistics(images)
    assert found.shape == (3, len(STATISTICS))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(
        found[:, 0], images.astype(np.float64).mean((1, 2)) @ (0.299, 0.587, 0.114) / 255, atol=1e-5
    )


def test_black_white_and_no_images() -> None:
    for level in (0, 255):
        assert np.isfinite(image_statistics(np.full((2, 16, 16, 3), level, dtype=np.uint8))).all()
    assert image_statistics(np.zeros((0, 16, 16, 3), dtype=np.uint8)).shape == (0, len(STATISTICS))
