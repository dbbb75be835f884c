"""Pictures of the drift stage, drawn with Matplotlib; the same input gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stages.core.corruptions import FAMILIES, SEVERITIES, STANDARD_KINDS, corrupt
from stages.core.figures import png

Row = dict[str, Any]
_COLUMNS = 7
_TILE, _LABEL_WIDTH = 64, 80  # pixels of the contact sheet


def severity_curves(rows: Sequence[Row], clean_accuracy: float) -> bytes:
    """PNG of true and estimated accuracy by severity, one panel a kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    height = -(-len(kinds) // _COLUMNS)
    figure, axes = plt.subplots(
        height,
        _COLUMNS,
        figsize=(14, 2.3 * height + 0.6),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(kinds) :]:
        axis.axis("off")
    for axis, kind in zip(axes.flat, kinds, strict=False):
        some = [row for row in rows if row["kind"] == kind]
        severities = [0, *(row["severity"] for row in some)]
        axis.plot(
            severities, [clean_accuracy, *(row["accuracy"] for row in some)], marker="o", markersize=4, label="true"
        )
        estimated = [row["estimated"] for row in some]
        axis.plot(severities[1:], estimated, marker="x", linestyle="--", label="estimated, its family unseen")
        axis.set_title(kind.replace("_", " "), fontsize=10)
        axis.set(ylim=(0, 1), xticks=severities)
        axis.grid(alpha=0.3)
    figure.supxlabel("severity (0: clean)")
    figure.supylabel("accuracy")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return png(figure)


def power_curves(rows: Sequence[Row], alpha: float) -> bytes:
    """PNG of the share of windows with an alarm against window size, one line a severity; ours and public methods."""
    methods = {"detected": "ours", "bbsds_ks": "softmax KS (BBSDs)", "embedding_mmd": "embedding MMD"}
    figure, axes = plt.subplots(1, len(methods), figsize=(12, 3.8), layout="constrained", sharey=True)
    colours = plt.get_cmap("viridis_r")(np.linspace(0.1, 1, len(SEVERITIES)))
    sizes = sorted({row["window"] for row in rows})
    for axis, (method, title) in zip(axes, methods.items(), strict=True):
        for severity, colour in zip(SEVERITIES, colours, strict=True):
            some = [row for row in rows if row["severity"] == severity]
            windows, rates = [row["window"] for row in some], [row[method] for row in some]
            axis.plot(windows, rates, marker="o", color=colour, label=str(severity))
        axis.axhline(alpha, color="grey", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel="images in the window", ylim=(0, 1.03), title=title)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"share of windows with an alarm, alpha {alpha:g}")
    axes[0].legend(title="severity", loc="lower right", fontsize=8)
    return png(figure)


def estimates(rows: Sequence[Row]) -> bytes:
    """PNG of estimated against true accuracy of the largest windows: ours by family, and the baselines beside it."""
    largest = max((row["window"] for row in rows), default=0)
    some = [row for row in rows if row["window"] == largest and row["kind"] in FAMILIES]
    others = {"average_thresholded_confidence": "ATC", "difference_of_confidences": "DoC"}
    figure, axes = plt.subplots(1, 1 + len(others), figsize=(12, 4.3), layout="constrained", sharex=True, sharey=True)
    for axis in axes:
        axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"true accuracy of {largest} images")
        axis.grid(alpha=0.3)
    for family in sorted(set(FAMILIES.values())):
        mine = [row for row in some if FAMILIES[row["kind"]] == family]
        true = np.array([row["true"] for row in mine])
        middle = np.array([row["estimated"] for row in mine])
        bars = np.abs([[row["estimated"] - row["low"], row["high"] - row["estimated"]] for row in mine]).T
        if len(mine):
            axes[0].errorbar(true, middle, yerr=bars, fmt="o", markersize=3, elinewidth=0.5, alpha=0.8, label=family)
            for axis, method in zip(axes[1:], others, strict=True):
                axis.plot(true, [row[method] for row in mine], "o", markersize=3, alpha=0.8)
    axes[0].set(ylabel="estimated accuracy", title="ours (each family unseen when fitted)")
    axes[0].legend(loc="upper left", fontsize=8)
    for axis, (method, title) in zip(axes[1:], others.items(), strict=True):
        error = np.mean([abs(row[method] - row["true"]) for row in some]) if some else 0.0
        axis.set_title(f"{title}, mean error {100 * error:.1f} points")
    return png(figure)


def contact_sheet(image: NDArray[np.uint8], seed: int) -> bytes:
    """PNG of an image (H, W, 3) under every kind (rows, in two halves) and severity (columns)."""
    kinds = list(FAMILIES)
    half = -(-len(kinds) // 2)
    wide, step = _LABEL_WIDTH + len(SEVERITIES) * (_TILE + 2), _TILE + 2
    sheet = Image.new("RGB", (2 * wide, half * step), "white")
    draw = ImageDraw.Draw(sheet)
    for number, kind in enumerate(kinds):
        left, top = wide * (number // half), step * (number % half)
        extra = "" if kind in STANDARD_KINDS else " *"
        draw.text((left + 4, top + _TILE // 3), kind.replace("_", "\n") + extra, "black")
        for column, severity in enumerate(SEVERITIES):
            tile = Image.fromarray(corrupt(image[None], kind, severity, np.zeros(1, dtype=np.int64), seed)[0])
            sheet.paste(tile.resize((_TILE, _TILE)), (left + _LABEL_WIDTH + column * step, top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
