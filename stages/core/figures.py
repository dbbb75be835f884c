"""Pictures of the evaluation, drawn with Matplotlib; the same input gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import NDArray

_DPI = 110
_OWN_FONT = "DejaVu Sans"  # Matplotlib's, which comes with it
_LONGEST_LABEL = 20  # characters of a class's name in a picture
# The common ones of Linux, macOS and Windows, for what Matplotlib's own font lacks.
_FONTS_OF_OTHER_SCRIPTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Arial Unicode MS",
    "Hiragino Sans",
    "PingFang SC",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Nirmala UI",
)


def confusion_matrix(counts: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """PNG of a confusion matrix (num_classes, num_classes), rows are the true classes, as shares of each row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    num_classes = len(classes)
    side = min(16.0, max(5.0, 1.8 + 0.52 * num_classes))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix (share of the true class, %)")
    if num_classes <= 40:
        # Names are names: Matplotlib takes what is between two $ for a formula.
        names = labels(classes)
        axes.set_xticks(range(num_classes), names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(num_classes), names, parse_math=False)
    if num_classes <= 20:
        for row in range(num_classes):
            for column in range(num_classes):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    percent = f"{100 * shares[row, column]:.0f}"
                    axes.text(column, row, percent, ha="center", va="center", color=colour, fontsize=9)
    return png(figure)


def reliability_diagram(rows: Sequence[dict[str, Any]], ece: float) -> bytes:
    """PNG of accuracy against confidence by bin (rows of metrics.reliability), with the share of images below."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5, 5.6), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    confidence = [row["confidence"] for row in rows]
    top.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="perfect")
    top.plot(confidence, [row["accuracy"] for row in rows], marker="o", label="measured")
    top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"Reliability (calibration error {100 * ece:.1f} %)")
    top.legend(loc="upper left")
    bottom.bar(confidence, [row["num_images"] for row in rows], width=0.03, color="tab:grey")
    bottom.set(xlabel="confidence", ylabel="images")
    return png(figure)


def mistakes(images: NDArray[np.uint8], captions: Sequence[str], columns: int = 6) -> bytes:
    """PNG of images (N, H, W, 3) in a grid with a caption each; N may be 0."""
    rows = max(1, -(-len(images) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.75 * columns, 2.15 * rows + 0.4), layout="constrained", squeeze=False
    )
    figure.suptitle("Most confident mistakes" if len(images) else "No mistakes")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(caption, fontsize=8, parse_math=False)
    return png(figure)


def labels(classes: Sequence[str]) -> list[str]:
    """The names of classes (numbered from 0) as pictures have room for them, and a font.

    Long ones are cut in the middle; after their number where two are then the same. What no font here has is `class N`.
    """
    own, others = _fonts()
    found = []
    for number, name in enumerate(classes):
        missing = [character for character in name if not _is_in(own, character)]
        if not all(any(_is_in(path, character) for path in others.values()) for character in missing):
            found.append(f"class {number}")
            continue
        if missing:
            plt.rcParams["font.family"] = [_OWN_FONT, *others]
        found.append(_cut(name))
    return [
        f"{number}: {classes[number]}"[: _LONGEST_LABEL - 1] + "…" if found.count(label) > 1 else label
        for number, label in enumerate(found)
    ]


def _cut(name: str) -> str:
    short = f"{name[: _LONGEST_LABEL // 2]}…{name[1 - _LONGEST_LABEL // 2 :]}"
    return short if len(name) > _LONGEST_LABEL else name


@cache
def _fonts() -> tuple[str, dict[str, str]]:
    """The file of Matplotlib's own font, and by name those of other scripts that are installed."""
    listed = {entry.name for entry in font_manager.fontManager.ttflist}
    others: dict[str, str] = {}
    for name in (name for name in _FONTS_OF_OTHER_SCRIPTS if name in listed):
        with suppress(ValueError, OSError):  # listed, and removed since
            others[name] = font_manager.findfont(name, fallback_to_default=False)
    return font_manager.findfont(_OWN_FONT), others


def _is_in(font: str, character: str) -> bool:
    return bool(font_manager.get_font(font).get_char_index(ord(character)))


def memory_timeline(milliseconds: Sequence[float], megabytes: Sequence[float]) -> bytes:
    """PNG of allocated memory (10^6 bytes) over time."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.fill_between(milliseconds, megabytes, step="post", alpha=0.4)
    axes.plot(milliseconds, megabytes, drawstyle="steps-post", linewidth=0.8)
    axes.set(xlabel="time (ms)", ylabel="allocated (MB)", title="Memory of the recorded steps", ylim=(0, None))
    return png(figure)


def png(figure: Figure) -> bytes:
    """Draw a figure and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
