"""The monitor's report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.monitor.command import what_copies_mean, what_shift_means

_COLOURS = {"ok": "#1a7f37", "benign": "#9a6700", "harmful": "#cf222e"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.verdict { display: inline-block; color: #fff; border-radius: .4rem; padding: .1rem .7rem }
table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.scale { position: relative; height: 2.6rem; background: #eaeef2; border-radius: .3rem; margin: .6rem 0 1.6rem }
.scale div { position: absolute; top: 0; bottom: 0 }
.scale span { position: absolute; top: 2.7rem; transform: translateX(-50%); font-size: .8rem; white-space: nowrap }
.bar { display: inline-block; height: .7rem; background: #0969da; border-radius: .2rem }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem }
figure { margin: 0; width: 8.5rem } figure img { width: 100%; image-rendering: auto; border-radius: .3rem }
figcaption { font-size: .75rem; overflow-wrap: anywhere; color: #59636e }
"""


def _images(report: dict[str, Any]) -> str:
    parts = [f"{report['num_images']}, of which {report['num_tested']} were compared with clean ones"]
    if report["copies"]["number"]:
        parts.append(what_copies_mean(report))
    if report["listed"]:
        parts.append(f"{report['listed']} left out, listed by --leave-out")
    if report["skipped"]:
        parts.append(f"{len(report['skipped'])} cannot be read")
    return "; ".join(parts)


def page(report: dict[str, Any], pictures: Sequence[NDArray[np.uint8]]) -> str:
    """The page; `pictures` (H, W, 3) belong to report["images"], in their order."""
    status = report["status"]
    low, high = report["interval"]
    rows = [
        ("images", _images(report)),
        ("p-value", f"{report['p_value']:.4f} (alarm at {report['alpha']:g} or below)"),
        ("estimated accuracy", f"{report['estimated_accuracy']:.1%} (95 %: {low:.1%} to {high:.1%})"),
        ("on clean images", f"{report['clean_accuracy']:.1%}; harm is a drop of more than {report['max_drop']:.1%}"),
        ("predicted classes", _classes(report)),
    ]
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    shown = [
        f"<figure><img src='{_inline(pixels)}' alt=''><figcaption title='{escape(image['path'])}'>"
        f"{escape(PurePath(image['path']).name)}<br>{escape(image['predicted'])}, oddness {image['oddness']:.1f}"
        "</figcaption></figure>"
        for image, pixels in zip(report["images"], pictures, strict=True)
    ]
    skipped = "".join(
        f"<tr><td>{escape(each['path'])}</td><td>{escape(each['reason'])}</td></tr>" for each in report["skipped"]
    )
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>Drift: {escape(status)}</title><style>{_STYLE}</style>",
        f"<h1>Drift report: <span class='verdict' style='background:{_COLOURS[status]}'>{escape(status)}</span></h1>",
        f"<table>{facts}</table>",
        "<h2>Accuracy</h2>",
        _scale(report),
        "<h2>What moved</h2>",
        _moved(report),
        "<h2>The strangest images</h2>",
        f"<div class='pictures'>{''.join(shown)}</div>",
    ]
    if skipped:
        parts += ["<h2>Left out</h2>", f"<table>{skipped}</table>"]
    return "\n".join(parts) + "\n</html>\n"


def _classes(report: dict[str, Any]) -> str:
    shift = report["label_shift"]
    said = "another mix than on clean images (label shift)" if shift["detected"] else "the mix of clean images"
    means = f"; {what_shift_means(report)}" if shift["detected"] and report["status"] != "ok" else ""
    return f"{said}, p = {shift['p_value']:.4f}{means}"


def _scale(report: dict[str, Any]) -> str:
    """A bar from 0 to 100 %: the interval, the estimate, the clean accuracy and the limit of harm."""
    low, high = report["interval"]
    clean, estimate = report["clean_accuracy"], report["estimated_accuracy"]
    limit = max(0.0, clean - report["max_drop"])
    colour = _COLOURS[report["status"]]
    return (
        f"<div class='scale'><div style='left:0;width:{limit:.2%};background:#ffebe9'></div>"
        f"<div style='left:{low:.2%};width:{high - low:.2%};background:{colour};opacity:.35'></div>"
        f"<div style='left:{estimate:.2%};width:3px;background:{colour}'></div>"
        f"<div style='left:{clean:.2%};width:2px;background:#1f2328'></div>"
        f"<span style='left:{min(0.9, max(0.1, estimate)):.2%};top:.5rem'><b>estimate {estimate:.1%}</b></span>"
        f"<span style='left:{min(0.9, clean):.2%}'>clean {clean:.1%}</span></div>"
    )


def _moved(report: dict[str, Any]) -> str:
    largest = max([row["evidence"] for row in report["moved"]] + [1.0])
    rows = "".join(
        f"<tr><td>{escape(row['measure'].replace('_', ' '))}</td><td class='number'>{row['shift']:+.2f}</td>"
        f"<td class='number'>{row['evidence']:.1f}</td>"
        f"<td><span class='bar' style='width:{12 * row['evidence'] / largest:.2f}rem'></span></td></tr>"
        for row in report["moved"]
    )
    head = "<tr><th>measure</th><th>shift (standard deviations)</th><th>-log10 p</th><th></th></tr>"
    return f"<table>{head}{rows}</table>"


def _inline(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
