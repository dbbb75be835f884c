"""The benchmark's results as a picture."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_COLUMNS = 2


def chart(report: dict[str, Any]) -> bytes:
    """PNG with a panel a comparison: two bars (medians), a dot a round, the ratio and its target above."""
    results = report["results"]
    rows = -(-len(results) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(11.5, 1.5 * rows + 0.7), layout="constrained", squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, result in zip(axes.flat, results, strict=False):
        _panel(axis, result)
    machine, settings = report["machine"], report["settings"]
    title = (
        f"{settings['model']} at {settings['train']['image_size']} px, batch {settings['train']['batch_size']}, "
        f"{machine['dtype']} on {machine['device']}; {machine['num_cpus']} CPUs ({machine['cpu']}), "
        f"torch {machine['torch']}, {report['date'][:10]}"
    )
    figure.suptitle(textwrap.fill(title, 130), fontsize=9, color="dimgrey")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _panel(axis: Axes, result: dict[str, Any]) -> None:
    ours, baseline, ratio, target = result["ours"], result["baseline"], result["ratio"], result["target"]
    axis.barh([1, 0], [ours["median"], baseline["median"]], color=["tab:blue", "lightgrey"], height=0.66)
    for y, side in ((1, ours), (0, baseline)):
        axis.plot(side["rounds"], [y] * len(side["rounds"]), "|", color="black", markersize=9, alpha=0.6)
        value = f"{side['median']:,.0f}" if side["median"] >= 100 else f"{side['median']:.3g}"
        axis.text(1.01 * max(side["rounds"]), y, f" {value}", va="center", fontsize=9)
    axis.set_yticks([1, 0], [ours["what"], baseline["what"]], fontsize=9)
    axis.set_xlim(0, 1.18 * max(ours["rounds"] + baseline["rounds"]))
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    goal = ""
    if target is not None:
        goal = f", target {'≤' if target['at_most'] else '≥'} {target['value']:g}"
        goal += " ✓" if target["reached"] else " (missed)"
    title = f"{result['name']} ({result['unit']}): ratio {ratio['median']:.2f}{goal}"
    axis.set_title(title, fontsize=9.5, loc="right", x=1.0)
