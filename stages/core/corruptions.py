"""Simulated drift: the corruptions of ImageNet-C, in five severities, and two kinds of our own, on uint8 batches.

After Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations"
(github.com/hendrycks/robustness, ImageNet-C/create_c). Written anew on NumPy, SciPy and Pillow: no OpenCV, no
ImageMagick and no pictures of frost. What differs from the original is said at each kind.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage

from stages.core.errors import InputError

Family = Literal["noise", "blur", "weather", "digital"]
Pixels = NDArray[np.float32]  # as an image: (H, W, 3), RGB, values 0 to 1

FAMILIES: dict[str, Family] = {
    "gaussian_noise": "noise",
    "shot_noise": "noise",
    "impulse_noise": "noise",
    "defocus_blur": "blur",
    "glass_blur": "blur",
    "motion_blur": "blur",
    "zoom_blur": "blur",
    "snow": "weather",
    "frost": "weather",
    "fog": "weather",
    "brightness": "weather",
    "contrast": "digital",
    "elastic_transform": "digital",
    "pixelate": "digital",
    "jpeg_compression": "digital",
    "speckle_noise": "noise",
    "gaussian_blur": "blur",
    "spatter": "weather",
    "saturate": "digital",
    "darkness": "digital",
    "colour_cast": "digital",
}
STANDARD_KINDS = tuple(FAMILIES)[:15]  # ImageNet-C's, in the paper's order
EXTRA_KINDS = tuple(FAMILIES)[15:]
SEVERITIES = (1, 2, 3, 4, 5)


class _Table(NamedTuple):
    """Parameters of a kind: a number or a row of numbers a severity, as published for 64 px and for 224 px."""

    small: Sequence[float | Sequence[float]]
    large: Sequence[float | Sequence[float]]
    lengths: tuple[int, ...] = ()  # the columns that are in pixels


_SMALL, _LARGE = 64, 224  # px: the sides that Tiny-ImageNet-C and ImageNet-C were made for

# make_tinyimagenet_c.py and make_imagenet_c.py, column by column, except where the function of a kind says otherwise.
_TABLES: dict[str, _Table] = {
    "gaussian_noise": _Table([0.04, 0.08, 0.12, 0.15, 0.18], [0.08, 0.12, 0.18, 0.26, 0.38]),
    "shot_noise": _Table([250, 100, 50, 30, 15], [60, 25, 12, 5, 3]),
    "impulse_noise": _Table([0.01, 0.02, 0.05, 0.08, 0.14], [0.03, 0.06, 0.09, 0.17, 0.27]),
    "defocus_blur": _Table([0.9, 1, 1.6, 2.5, 3], [3, 4, 6, 8, 10], lengths=(0,)),
    "glass_blur": _Table(
        [(0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)],
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        lengths=(0, 1),
    ),
    "motion_blur": _Table(
        [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
        lengths=(0, 1),
    ),
    "zoom_blur": _Table(
        [(0.05, 0.01), (0.1, 0.01), (0.15, 0.01), (0.2, 0.01), (0.25, 0.01)],
        [(0.1, 0.01), (0.15, 0.01), (0.2, 0.02), (0.24, 0.02), (0.3, 0.03)],
    ),
    "snow": _Table(
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ],
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
        lengths=(2, 4, 5),
    ),
    "frost": _Table(
        [(1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)],
        [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    ),
    "fog": _Table(
        [(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)], [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)]
    ),
    "brightness": _Table([0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]),
    "contrast": _Table([0.4, 0.3, 0.2, 0.1, 0.05], [0.4, 0.3, 0.2, 0.1, 0.05]),
    "elastic_transform": _Table(
        [(0.29, 1), (0.38, 1), (0.49, 1), (0.58, 1), (0.7, 1)],
        [(1.02, 2.24), (1.32, 2.24), (1.73, 2.24), (2.04, 2.24), (2.44, 2.24)],
        lengths=(0, 1),
    ),
    "pixelate": _Table([0.9, 0.8, 0.7, 0.6, 0.5], [0.6, 0.5, 0.4, 0.3, 0.25]),
    "jpeg_compression": _Table([65, 58, 50, 40, 25], [25, 18, 15, 10, 7]),
    "speckle_noise": _Table([0.15, 0.2, 0.25, 0.3, 0.35], [0.15, 0.2, 0.35, 0.45, 0.6]),
    "gaussian_blur": _Table([0.5, 0.75, 1, 1.25, 1.5], [1, 2, 3, 4, 6], lengths=(0,)),
    "spatter": _Table(
        [(0.7, 1.99, 0.6, 0), (0.8, 1.42, 0.6, 0), (1, 0.47, 0.6, 0), (0.7, 0.74, 0.6, 1), (0.5, 0.35, 0.6, 1)],
        [(4, 1.89, 0.6, 0), (3, 1.06, 0.6, 0), (2, 0.71, 0.5, 0), (1, 0, 1.5, 1), (1, -0.18, 1.5, 1)],
        lengths=(0,),
    ),
    "saturate": _Table(
        [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)], [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)]
    ),
    "darkness": _Table([0.75, 1.5, 2.25, 3.25, 4.5], [0.75, 1.5, 2.25, 3.25, 4.5]),
    "colour_cast": _Table([0.08, 0.16, 0.24, 0.34, 0.45], [0.08, 0.16, 0.24, 0.34, 0.45]),
}


def corrupt(
    images: NDArray[np.uint8], kind: str, severity: int, keys: NDArray[np.int64], seed: int = 0
) -> NDArray[np.uint8]:
    """Corrupt a batch: uint8 (N, H, W, 3) in, a new array of the same shape out.

    Every draw is keyed by (seed, kind, severity, key of the image), so that neither order nor batch can change an
    image. `keys`: integers (N,), not negative, such as the index of the image in its set. Parameters are those
    published for 64 and 224 px, by the shorter side: see `parameters`.
    """
    if kind not in FAMILIES:
        raise InputError(f"corruption {kind!r}: not one of {', '.join(FAMILIES)}")
    if severity not in SEVERITIES:
        raise InputError(f"severity {severity}: not one of {', '.join(map(str, SEVERITIES))}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 (N, H, W, 3), not {images.dtype} {images.shape}")
    if keys.shape != images.shape[:1] or not np.issubdtype(keys.dtype, np.integer):
        raise ValueError(f"keys must be integers ({len(images)},), one an image, not {keys.dtype} {keys.shape}")
    if len(keys) and min(int(keys.min()), seed) < 0:
        raise ValueError(f"keys and seed must be 0 or more, not {int(keys.min())} and {seed}")
    function, row = _FUNCTIONS[kind], parameters(kind, severity, min(images.shape[1:3]))
    kind_index = tuple(FAMILIES).index(kind)
    out = np.empty(images.shape, dtype=np.uint8)
    for image, key, target in zip(images, keys.tolist(), out, strict=True):
        generator = np.random.default_rng([seed, kind_index, severity, key])
        target[...] = _to_bytes(function(_from_bytes(image), row, generator))
    return out


def parameters(kind: str, severity: int, side: int) -> list[float]:
    """What `kind` uses at `severity` for images of `side` pixels.

    Linear in the side between the tables of Tiny-ImageNet-C (64 px) and ImageNet-C (224 px). Outside, the nearer table
    with its lengths scaled: above, with the side; below, with the root of the side and no further than at 32 px, since
    the lengths of CIFAR-10-C (make_cifar_c.py, 32 px) are about 0.5 to 1 times those of 64 px.
    """
    table = _TABLES[kind]
    small, large = (np.atleast_1d(np.array(rows[severity - 1], np.float64)) for rows in (table.small, table.large))
    row = small + (large - small) * min(max((side - _SMALL) / (_LARGE - _SMALL), 0), 1)
    if side < _SMALL:
        row[list(table.lengths)] *= math.sqrt(max(side, _SMALL // 2) / _SMALL)
    elif side > _LARGE:
        row[list(table.lengths)] *= side / _LARGE
    return [float(value) for value in row]


def _gaussian_noise(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    return image + np.float32(row[0]) * generator.standard_normal(image.shape, dtype=np.float32)


def _shot_noise(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """Photons counted: Poisson of `row[0]` at full white."""
    return (generator.poisson(image * row[0]) / row[0]).astype(np.float32)


def _impulse_noise(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """Salt and pepper in a share of all values, each channel on its own."""
    draws = generator.random(image.shape, dtype=np.float32)
    return np.where(draws < row[0] / 2, np.float32(0), np.where(draws < row[0], np.float32(1), image))


def _speckle_noise(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    return image + image * np.float32(row[0]) * generator.standard_normal(image.shape, dtype=np.float32)


def _defocus_blur(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """Mean over a disc of radius row[0] px, its edge antialiased.

    The radii below 2 px are those of discs with the variance of the published kernels, which are a few whole pixels.
    """
    reach, fine = math.ceil(row[0] + 0.5), 8
    squares = ((np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5) ** 2
    inside = squares[:, None] + squares <= row[0] ** 2
    return _convolve(image, inside.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).mean(axis=(1, 3)), "reflect")


def _glass_blur(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """Gaussian blur, pixels displaced at random, blurred again.

    The original walks backwards over the pixels, and each takes the value of a random neighbour as it then is. Here the
    whole walk is one gather: a pixel whose neighbour came earlier goes on to that one's source, found by doubling.
    """
    sigma, reach, iterations = row[0], row[1], round(row[2])
    (height, width), shape = image.shape[:2], image.shape
    pixels, own = _gaussian(image, sigma).reshape(-1, 3), np.arange(height * width)
    for _ in range(iterations):
        steps = np.floor(generator.uniform(-reach, reach, (2, height, width))).astype(np.int64)
        rows = (np.arange(height)[:, None] + steps[0]).clip(0, height - 1)
        chosen = (rows * width + (np.arange(width) + steps[1]).clip(0, width - 1)).ravel()
        last = np.maximum(chosen, own)
        while not np.array_equal(last, further := last[last]):
            last = further
        pixels = pixels[chosen[last]]
    return _gaussian(pixels.reshape(shape), sigma)


def _motion_blur(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    return _convolve(image, _trail(row[0], row[1], generator.uniform(-45, 45)), "edge")


def _zoom_blur(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """Mean of the image and of its zooms by 1, 1 + step, ..., 1 + row[0]."""
    height, width = image.shape[:2]
    picture, total = Image.fromarray(_to_bytes(image)), image.copy()
    zooms = np.linspace(1, 1 + row[0], round(row[0] / row[1]) + 1)
    for zoom in zooms.tolist():
        left, top = width * (1 - 1 / zoom) / 2, height * (1 - 1 / zoom) / 2
        box = (left, top, width - left, height - top)
        total += _from_bytes(picture.resize((width, height), Image.Resampling.BILINEAR, box))
    return total / np.float32(len(zooms) + 1)


def _gaussian_blur(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    return _gaussian(image, row[0])


def _snow(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """Thresholded noise, enlarged and blurred along its fall, added twice over a whitened image."""
    mean, deviation, zoom, threshold, radius, sigma, keep = row
    height, width = image.shape[:2]
    coarse = (math.ceil(height / max(zoom, 1)), math.ceil(width / max(zoom, 1)))
    flakes = mean + deviation * generator.standard_normal(coarse, dtype=np.float32)
    layer = np.asarray(Image.fromarray(flakes).resize((width, height), Image.Resampling.BILINEAR))
    layer = np.where(layer < threshold, np.float32(0), layer.clip(0, 1))
    layer = _convolve(layer[..., None], _trail(radius, sigma, generator.uniform(-135, -45)), "edge")
    white: Pixels = np.maximum(image, 1.5 * (image @ _LUMA)[..., None] + 0.5)
    return np.float32(keep) * image + np.float32(1 - keep) * white + layer + layer[::-1, ::-1]


def _frost(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """The image weighted down under ice, feathers in five directions, each prevailing in patches of its own.

    The original takes cut-outs of five photographs: their brightness, tint and contrast are drawn here, and the
    feathers are the ridges of noise that is smoother along a direction than across it. Lengths are shares of the side.
    """
    shape, side = image.shape[:2], min(image.shape[:2])
    v, u = np.fft.fftfreq(shape[0])[:, None] * side, np.fft.rfftfreq(shape[1]) * side  # cycles a side
    angles = (generator.uniform() + np.arange(5)[:, None, None]) * (math.pi / 5)
    along, across = u * np.cos(angles) + v * np.sin(angles), v * np.cos(angles) - u * np.sin(angles)
    feathers = ((1 + (0.25 * along) ** 2 + (0.05 * across) ** 2) ** -1.25).astype(np.float32)
    patches = np.exp(-0.5 * 0.3**2 * (u**2 + v**2)).astype(np.float32)
    spectra = fft.rfft2(generator.standard_normal((5, *shape), dtype=np.float32))
    ridges = -np.abs(_unit(fft.irfft2(spectra * feathers, shape)))
    ice = _unit((ridges + _unit(fft.irfft2(spectra * patches, shape))).max(axis=0))[..., None]
    brightness, contrast, tint = generator.uniform((0.45, 0.08, 0.3), (0.8, 0.18, 2))
    layer: Pixels = (brightness + contrast * ice + tint * np.array([-0.07, 0, 0.05])).clip(0, 1).astype(np.float32)
    return np.float32(row[0]) * image + np.float32(row[1]) * layer


def _fog(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    height, width = image.shape[:2]
    brightest: np.float32 = image.max()
    haze = _plasma(max(height, width), row[1], generator)[:height, :width, None]
    return (image + np.float32(row[0]) * haze) * (brightest / (brightest + np.float32(row[0])))


def _brightness(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """HSV's value raised by row[0]. At the same hue and saturation that is one factor for all three channels."""
    value: Pixels = image.max(axis=2, keepdims=True)
    raised: Pixels = np.minimum(value + np.float32(row[0]), 1)
    return np.where(value > 0, image * (raised / np.maximum(value, _TINY)), raised)


def _contrast(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    means: Pixels = image.mean(axis=(0, 1), keepdims=True)
    return (image - means) * np.float32(row[0]) + means


def _elastic_transform(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """Pixels displaced by a smooth random field: row[0] px (root mean square, an axis), correlated over row[1] px.

    Numbers of the package imagecorruptions, which left out ImageNet-C's random affine map (it falls with severity),
    at 64 px in proportion.
    """
    height, width = image.shape[:2]
    fields = generator.uniform(-1, 1, (2, height, width)).astype(np.float32)
    gain = row[0] * math.sqrt(3) * 2 * math.sqrt(math.pi) * row[1]  # of noise that a Gaussian filter has flattened
    fields = ndimage.gaussian_filter(fields, (0, row[1], row[1]), mode="reflect", truncate=3) * np.float32(gain)
    y = (np.arange(height, dtype=np.float32)[:, None] + fields[0]).clip(0, height - 1)
    x = (np.arange(width, dtype=np.float32) + fields[1]).clip(0, width - 1)
    top, left = y.astype(np.int64).clip(0, height - 2), x.astype(np.int64).clip(0, width - 2)
    down, right = (part.astype(np.float32)[..., None] for part in (y - top, x - left))
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    warped: Pixels = upper * (1 - down) + lower * down
    return warped


def _pixelate(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    height, width = image.shape[:2]
    small = Image.fromarray(_to_bytes(image)).resize((int(width * row[0]), int(height * row[0])), Image.Resampling.BOX)
    return _from_bytes(small.resize((width, height), Image.Resampling.BOX))


def _jpeg_compression(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(_to_bytes(image)).save(buffer, "JPEG", quality=round(row[0]))
    return _from_bytes(Image.open(buffer))


def _spatter(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """Drops of water (severities 1 to 3) or mud (4 and 5) where smooth noise exceeds row[1] standard deviations.

    The thresholds cover the published share of the image at any smoothness. Water is lit from one side by an emboss of
    the equalised distance to the rim, as in the original, where the rim is found by Canny's filter.
    """
    sigma, threshold, amount, is_mud = row
    noise = ndimage.gaussian_filter(generator.standard_normal(image.shape[:2], dtype=np.float32), sigma)
    liquid: NDArray[np.bool_] = noise * (2 * math.sqrt(math.pi) * sigma) > threshold
    if is_mud:
        cover = _gaussian(liquid[..., None].astype(np.float32), amount)
        cover *= cover >= 0.8
        return image * (1 - cover) + _MUD * cover
    rim = liquid & ~ndimage.binary_erosion(liquid, border_value=1)
    if not rim.any():
        return image
    distance = ndimage.distance_transform_edt(~rim).clip(max=20)
    levels = ndimage.uniform_filter(distance, 3).astype(np.int64)
    counts = np.bincount(levels.ravel(), minlength=21)
    equalised = (np.cumsum(counts) - counts[0]) / max(levels.size - counts[0], 1)
    lit = ndimage.correlate(equalised[levels], _EMBOSS).clip(0, 1)
    water: Pixels = (ndimage.uniform_filter(lit, 3) * liquid)[..., None].astype(np.float32)
    water *= np.float32(amount) / max(float(water.max()), 1e-6)
    return image + _WATER * water


def _saturate(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """HSV's saturation times row[0] plus row[1]; grey, whose hue is undefined, counts as red, as in the original."""
    value: Pixels = image.max(axis=2, keepdims=True)
    chroma: Pixels = value - image.min(axis=2, keepdims=True)
    saturation = chroma / np.maximum(value, _TINY)
    wanted: Pixels = (saturation * np.float32(row[0]) + np.float32(row[1])).clip(0, 1)
    depth: Pixels = np.where(chroma > 0, (value - image) / np.maximum(chroma, _TINY), _NOT_RED)
    return value * (1 - wanted * depth)


def _darkness(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """Under-exposure by row[0] stops: light halved as often, in values of gamma 2.2. Ours: the mirror of brightness."""
    return image * np.float32(2 ** (-row[0] / 2.2))


def _colour_cast(image: Pixels, row: list[float], generator: np.random.Generator) -> Pixels:
    """A white balance that is too warm: red up and blue down by row[0], the luma of grey kept. Ours; same for all."""
    gains = np.array([1 + row[0], 1, 1 - row[0]], dtype=np.float32)
    return image * (gains / (gains @ _LUMA))


_FUNCTIONS: dict[str, Callable[[Pixels, list[float], np.random.Generator], Pixels]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
    "darkness": _darkness,
    "colour_cast": _colour_cast,
}

_TINY = np.float32(1e-6)  # below any value of a pixel: keeps a division by zero out
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_NOT_RED = np.array([0, 1, 1], dtype=np.float32)
_WATER = np.array([175, 238, 238], dtype=np.float32) / np.float32(255)
_MUD = np.array([63, 42, 20], dtype=np.float32) / np.float32(255)
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


def _from_bytes(picture: NDArray[np.uint8] | Image.Image) -> Pixels:
    return np.asarray(picture, np.float32) / np.float32(255)


def _to_bytes(image: Pixels) -> NDArray[np.uint8]:
    scaled: Pixels = image.clip(0, 1) * np.float32(255)
    return np.rint(scaled).astype(np.uint8)


def _unit(values: Pixels) -> Pixels:
    """Mean 0 and standard deviation 1 over the last two axes."""
    centred = values - values.mean(axis=(-2, -1), keepdims=True)
    scaled: Pixels = centred / centred.std(axis=(-2, -1), keepdims=True)
    return scaled


def _gaussian(image: Pixels, sigma: float) -> Pixels:
    blurred: Pixels = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
    return blurred


def _convolve(image: Pixels, kernel: NDArray[np.float64], border: Literal["reflect", "edge"]) -> Pixels:
    """Convolution of every channel with a kernel of odd sides, scaled to sum 1, through the Fourier transform."""
    (height, width), (rows, columns) = image.shape[:2], (side // 2 for side in kernel.shape)
    planes = np.pad(image.transpose(2, 0, 1), ((0, 0), (rows, rows), (columns, columns)), border)
    shape = [fft.next_fast_len(side, real=True) for side in planes.shape[1:]]
    kernel = (kernel / kernel.sum()).astype(np.float32)
    product = fft.rfft2(planes, shape) * fft.rfft2(kernel, shape)
    out: Pixels = fft.irfft2(product, shape)[:, 2 * rows : 2 * rows + height, 2 * columns : 2 * columns + width]
    return out.transpose(1, 2, 0)


def _trail(radius: float, sigma: float, degrees: float) -> NDArray[np.float64]:
    """Kernel of motion: half a Gaussian over 2 radius + 1 px from the centre outwards, as in ImageMagick."""
    steps = np.arange(max(round(2 * radius) + 1, 2))
    reach, angle = len(steps) - 1, math.radians(degrees)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    rows, columns = (reach + np.rint(steps * part).astype(np.int64) for part in (-math.sin(angle), -math.cos(angle)))
    np.add.at(kernel, (rows, columns), np.exp(-0.5 * (steps / sigma) ** 2))
    return kernel


def _plasma(size: int, decay: float, generator: np.random.Generator) -> Pixels:
    """Heights 0 to 1 of a fractal (2**n, 2**n) that holds `size`, by diamond and square steps on a torus.

    Each level doubles the grid, and divides the noise by decay squared.
    """
    heights, noise = np.zeros((1, 1), dtype=np.float32), np.float32(1)
    while len(heights) < size:
        draws = noise * (2 * generator.random((3, *heights.shape), dtype=np.float32) - 1)
        below, right = np.roll(heights, -1, axis=0), np.roll(heights, -1, axis=1)
        centres = (heights + below + right + np.roll(below, -1, axis=1)) / 4 + draws[0]
        grown = np.empty((2 * len(heights), 2 * len(heights)), dtype=np.float32)
        grown[::2, ::2], grown[1::2, 1::2] = heights, centres
        grown[::2, 1::2] = (heights + right + centres + np.roll(centres, 1, axis=0)) / 4 + draws[1]
        grown[1::2, ::2] = (heights + below + centres + np.roll(centres, 1, axis=1)) / 4 + draws[2]
        heights, noise = grown, noise / np.float32(decay**2)
    lowest, highest = np.float32(heights.min()), np.float32(heights.max())
    return (heights - lowest) / (highest - lowest)
