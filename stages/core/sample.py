"""The embedded data set: ten classes of shapes in busy little scenes, generated offline and deterministically.

Every image is a function of (seed, split, index) alone. Shapes vary in size, place, angle, colour and texture, lie
among distractors and under an occluder, so that a classifier has to learn outlines and a good recipe pays.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

_SUPERSAMPLING = 3


def _regular(num_corners: int, inner: float = 1.0) -> list[Point]:
    """Corners on the unit circle; with `inner` < 1 every second one lies at that radius (a star)."""
    num_points = num_corners if inner == 1.0 else 2 * num_corners
    radii = [1.0 if inner == 1.0 or i % 2 == 0 else inner for i in range(num_points)]
    angles = [2 * math.pi * i / num_points - math.pi / 2 for i in range(num_points)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _arc(start: float, end: float, radius: float, centre: Point = (0, 0), num_points: int = 48) -> list[Point]:
    angles = [math.radians(start + (end - start) * i / (num_points - 1)) for i in range(num_points)]
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _heart() -> list[Point]:
    ts = [2 * math.pi * i / 64 for i in range(64)]
    return [
        (math.sin(t) ** 3, (-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t)) / 16)
        for t in ts
    ]


def _cross(width: float = 0.36) -> list[Point]:
    w = width
    return [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]


def _crescent() -> list[Point]:
    return _arc(50, 310, 1.0) + _arc(288, 72, 0.8, centre=(0.42, 0))


def _drop() -> list[Point]:
    return [(0, -1), *_arc(-25, 205, 0.62, centre=(0, 0.36))]


def _arrow() -> list[Point]:
    return [(0, -1), (0.8, -0.1), (0.32, -0.1), (0.32, 1), (-0.32, 1), (-0.32, -0.1), (-0.8, -0.1)]


# The outline of each class in the unit square around the origin.
OUTLINES: dict[str, Callable[[], list[Point]]] = {
    "arrow": _arrow,
    "circle": lambda: _arc(0, 360, 0.95),
    "crescent": _crescent,
    "cross": _cross,
    "drop": _drop,
    "heart": _heart,
    "pentagon": lambda: _regular(5),
    "square": lambda: _regular(4),
    "star": lambda: _regular(5, inner=0.48),
    "triangle": lambda: _regular(3),
}
CLASSES = tuple(OUTLINES)


def render(seed: int, split: int, index: int, size: int) -> bytes:
    """One image as JPEG bytes; its class is CLASSES[index % 10]. `size` is the side in pixels."""
    rng = np.random.default_rng([seed, split, index])
    side = size * _SUPERSAMPLING
    scene = _background(rng, side)
    for _ in range(int(rng.integers(0, 4))):
        _distractor(rng, scene)
    label = index % len(CLASSES)
    # Like things in photographs, each class leans to a colour, and often has another one.
    typical = rng.random() < 0.6
    hue = (256 * label // len(CLASSES) + int(rng.integers(-12, 13))) % 256 if typical else int(rng.integers(256))
    _object(rng, scene, OUTLINES[CLASSES[label]](), hue)
    if rng.random() < 0.35:
        _occluder(rng, scene)
    small = np.asarray(scene.reduce(_SUPERSAMPLING), dtype=np.int16)
    noise = int(rng.integers(2, 16))
    small = small + rng.integers(-noise, noise + 1, size=small.shape, dtype=np.int16)
    encoded = io.BytesIO()
    Image.fromarray(small.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def _muted(rng: np.random.Generator) -> Colour:
    """A colour of backgrounds and clutter: dark to middling, hardly saturated."""
    level = int(rng.integers(40, 140))
    red, green, blue = (level + int(value) for value in rng.integers(-30, 31, size=3))
    return red, green, blue


def _vivid(rng: np.random.Generator, hue: int) -> Colour:
    """A colour of objects: bright, mostly saturated, of a hue (0 to 255)."""
    red, green, blue = colorsys.hsv_to_rgb(hue / 256, rng.uniform(0.25, 0.85), rng.uniform(0.7, 1.0))
    return int(255 * red), int(255 * green), int(255 * blue)


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    """A gradient with a few large soft patches."""
    angle = rng.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[0:side, 0:side] / side - 0.5
    along = (rows * math.sin(angle) + columns * math.cos(angle) + 0.7) / 1.4
    start, end = np.array(_muted(rng)), np.array(_muted(rng))
    pixels: NDArray[np.uint8] = (start + (end - start) * along[..., None]).clip(0, 255).astype(np.uint8)
    scene = Image.fromarray(pixels)
    draw = ImageDraw.Draw(scene, "RGBA")
    for _ in range(int(rng.integers(2, 6))):
        x, y = rng.uniform(0, side, size=2)
        radius = rng.uniform(0.12, 0.45) * side
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*_muted(rng), int(rng.integers(30, 110))))
    return scene


def _place(points: Sequence[Point], centre: Point, radius: float, angle: float, squeeze: float) -> list[Point]:
    cos, sin = math.cos(angle), math.sin(angle)
    return [
        (centre[0] + radius * (x * squeeze * cos - y * sin), centre[1] + radius * (x * squeeze * sin + y * cos))
        for x, y in points
    ]


def _distractor(rng: np.random.Generator, scene: Image.Image) -> None:
    """A small bar, dot or sliver: no outline of any class."""
    draw = ImageDraw.Draw(scene, "RGBA")
    side = scene.width
    x, y = (float(value) for value in rng.uniform(0, side, size=2))
    fill = (*_muted(rng), int(rng.integers(120, 256)))
    radius = float(rng.uniform(0.03, 0.11)) * side
    kind = int(rng.integers(3))
    if kind == 0:
        dx, dy = (float(value) for value in rng.uniform(-3, 3, size=2) * radius)
        draw.line((x, y, x + dx, y + dy), fill=fill, width=max(1, int(radius * 0.35)))
    elif kind == 1:
        radius *= 0.6
        draw.ellipse((x - radius, y - 0.6 * radius, x + radius, y + 0.6 * radius), fill=fill)
    else:
        corners = [(float(px), float(py)) for px, py in rng.uniform(-1, 1, size=(4, 2))]
        draw.polygon(_place(corners, (x, y), radius, 0.0, 1.0), fill=fill)


def _object(rng: np.random.Generator, scene: Image.Image, outline: list[Point], hue: int) -> None:
    """The shape that the label names: textured, shaded, with a soft drop shadow."""
    side = scene.width
    radius = float(rng.uniform(0.28, 0.45)) * side
    x, y = (float(value) for value in rng.uniform(0.9 * radius, side - 0.9 * radius, size=2))
    angle = float(rng.normal(0, 0.2))
    points = _place(outline, (x, y), radius, angle, float(rng.uniform(0.75, 1.2)))

    shift = 0.08 * radius
    shadow = [(px + shift, py + shift) for px, py in points]
    ImageDraw.Draw(scene, "RGBA").polygon(shadow, fill=(0, 0, 0, 70))

    mask = Image.new("L", scene.size)
    if rng.random() < 0.15:  # only the outline
        ImageDraw.Draw(mask).line([*points, *points[:2]], fill=255, width=max(2, int(0.16 * radius)), joint="curve")
    else:
        ImageDraw.Draw(mask).polygon(points, fill=255)
    scene.paste(_texture(rng, side, hue), (0, 0), mask)
    if rng.random() < 0.1:  # see-through, like glass
        faint = mask.point([int(value * 0.45) for value in range(256)])
        scene.paste(ImageChops.offset(scene, side // 3, side // 5), (0, 0), faint)


def _texture(rng: np.random.Generator, side: int, hue: int) -> Image.Image:
    """Plain, striped or dotted, in two shades."""
    base, second = _vivid(rng, hue), _vivid(rng, (hue + int(rng.integers(-30, 31))) % 256)
    texture = Image.new("RGB", (side, side), base)
    draw = ImageDraw.Draw(texture)
    kind = int(rng.integers(3))
    step = int(rng.integers(side // 16, side // 7))
    if kind == 1:
        slope = int(rng.integers(-side, side))
        for x in range(-side, 2 * side, 2 * step):
            draw.line((x, 0, x + slope, side), fill=second, width=max(1, step // 2))
    elif kind == 2:
        radius = step / 4
        for x in range(0, side, step):
            for y in range(0, side, step):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)
    return texture


def _occluder(rng: np.random.Generator, scene: Image.Image) -> None:
    side = scene.width
    x0, y0, x1, y1 = (float(value) for value in rng.uniform(0, side, size=4))
    draw = ImageDraw.Draw(scene, "RGBA")
    draw.line((x0, y0, x1, y1), fill=(*_muted(rng), 230), width=int(rng.uniform(0.03, 0.09) * side))
