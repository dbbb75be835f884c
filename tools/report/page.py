"""A report out of one run or two: a page that needs nothing beside it, and its twin in Markdown."""

from __future__ import annotations

import base64
import functools
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from tools.report import compare, figures
from tools.report.data import Confusion, Run
from tools.report.profile import Profile

PICTURE_BYTES = 350_000  # of one picture, before base64 makes a third more of it
_SHOWN_ROWS = 30  # of the per-class table; the others are folded
_MANY = 10  # rows of a short list
_DRIFT_ROWS = (  # label, and the metric, @ for the window
    ("false alarms on clean images, mean", "false_alarms.@.mean"),
    ("the same, worst re-split", "false_alarms.@.worst"),
    ("drift detected", "detection.@"),
    ("harmful drift detected", "detection_of_harmful.@"),
    ("drift detected by softmax KS", "public_methods.bbsds_ks.@"),
    ("drift detected by embedding MMD", "public_methods.embedding_mmd.@"),
    ("error of the estimated accuracy", "estimate_error.adapted.@"),
    ("the same, by mean confidence", "estimate_error.average_confidence.@"),
    ("estimates whose interval holds the truth", "interval_coverage.@"),
    ("harmful or benign, precision", "decisions.@.precision"),
    ("harmful or benign, recall", "decisions.@.recall"),
)


def page(run: Run, baseline: Run | None, profile: Profile | None, environment: list[tuple[str, str]], date: str) -> str:
    """The HTML page."""
    confusion, common = run.confusion, _common(run, baseline, environment, date)
    return _templates().get_template("page.html.j2").render(
        common,
        curves=figures.curves(run, baseline),
        confusion_maps=figures.confusion_maps(run, baseline),
        num_classes=len(confusion.classes) if confusion else 0,
        reliability=figures.reliability(run, baseline),
        power=figures.power(run),
        severity=figures.severity(run),
        estimates=figures.estimates(run),
        profile=profile,
        category_bars=[(name, ms, f"{ms:.1f} ms") for name, ms in profile.categories] if profile else [],
        operator_bars=[
            (name.removeprefix("aten::"), ms, f"{ms:.1f} ms, {calls:g} calls")
            for name, ms, calls in (profile.operators[:_MANY] if profile else ())
        ],
        confused_bars=[(f"{true} as {other}", count, str(count)) for true, other, count in common["confused"]],
        speed=_speed(run),
        drift_rows=_drift_rows(run, baseline, common["windows"]),
        operators=run.operators[:_MANY],
        pictures={name: _inline(content) for name, content in run.pictures.items()},
    )  # fmt: skip


def markdown(run: Run, baseline: Run | None, environment: list[tuple[str, str]], date: str) -> str:
    """The twin, in GitHub's Markdown."""
    text = _templates().get_template("twin.md.j2").render(_common(run, baseline, environment, date))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _common(run: Run, baseline: Run | None, environment: list[tuple[str, str]], date: str) -> dict[str, Any]:
    """What both templates show."""
    drift = run.metrics.get("metrics/drift.json", {})
    params = compare.changed_params(run, baseline) if baseline else []
    windows = sorted((name.split(".")[1] for name in drift if name.startswith("detection.")), key=int)
    return {
        "run": run,
        "baseline": baseline,
        "verdict": compare.verdict(run, baseline),
        "summary": compare.summary(run, baseline),
        "all_metrics": compare.all_metrics(run, baseline),
        "params": [one for one in params if "—" not in one[1:]],
        "new_params": [one for one in params if "—" in one[1:]],
        "states": [_state(one) for one in (run, baseline) if one],
        "same_data": baseline is None or compare.same_data(run, baseline),
        "per_class": _per_class(run, baseline),
        "shown_rows": _SHOWN_ROWS,
        "confused": _confused(run.confusion)[:_MANY] if run.confusion else [],
        "drift": drift,
        "windows": windows,
        "has_profile": "metrics/profile.json" in run.metrics,
        "environment": environment,
        "date": date,
    }


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": code, "fenced": fenced, "percent": lambda share: f"{share:.1%}"}
    return environment


def code(text: object) -> Markup:
    """Text as code in Markdown, inside a table too: whatever it holds, it is no markup, link, mention or HTML.

    A code span cannot hold every text, so this is HTML's element with every sign that means something escaped.
    """
    words = " ".join(str(text).split())
    words = words if len(words) <= 160 else f"{words[:159]}…"
    special = r"(?i)(?<=www)\.|[^\w /,.;=%?+-]|(?<![^\W_])_|_(?![^\W_])"  # an underscore inside a word is harmless
    escaped = re.sub(special, lambda match: f"&#{ord(match[0])};", words)
    return Markup(f"<code>{escaped}</code>")  # noqa: S704  # nosec B704  # every sign that means something is escaped


def fenced(text: str) -> Markup:
    """Text as a fenced block of Markdown, the fence longer than any inside it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}yaml\n{text.rstrip()}\n{fence}")  # noqa: S704  # nosec B704  # a fenced block knows no markup


def _state(run: Run) -> dict[str, Any]:
    """Which state of the repository a run is."""
    source = run.source
    at = f"HEAD {source.commit[:7]}" if source.is_workspace else source.commit[:7]
    return {
        "name": source.experiment or (source.name if len(source.name) < 40 else source.commit[:7]),
        "kind": "workspace" if source.is_workspace else "experiment" if source.experiment else "revision",
        "commit": at if source.commit else "no commit yet",
        "subject": source.subject,
        "date": source.date,
        "changed": source.changed,
        "hashes": run.hashes,
    }


def _confused(confusion: Confusion) -> list[tuple[str, str, int]]:
    """(true, predicted, images), the most frequent first."""
    pairs = Counter((a, p) for a, p in zip(confusion.actual, confusion.predicted, strict=True) if a != p)
    names = confusion.classes
    return [(names[a], names[p], count) for (a, p), count in sorted(pairs.items(), key=lambda one: (-one[1], one[0]))]


def _per_class(run: Run, baseline: Run | None) -> list[dict[str, Any]]:
    """Rows of the table, the lowest F1 first, with the change of F1."""
    before = {row["class"]: row["f1"] for row in baseline.per_class} if baseline else {}
    rows = [row | {"change": row["f1"] - before[row["class"]] if row["class"] in before else None}
            for row in run.per_class]  # fmt: skip
    return sorted(rows, key=lambda row: row["f1"])


def _speed(run: Run) -> str:
    """The numbers of metrics/profile.json in a sentence; '' where there are none."""
    phrases = {
        "images_per_second": "{:,.0f} training images a second",
        "step_ms_p50": "{:,.0f} ms a step (median)",
        "step_ms_p95": "{:,.0f} ms at the 95th percentile",
        "data_wait_share": "{:.1%} of it waiting for data",
        "peak_memory_mb": "{:,.0f} MB at the peak",
    }
    found = [(phrase, run.metric("profile", name)) for name, phrase in phrases.items()]
    return ", ".join(phrase.format(value) for phrase, value in found if value is not None)


def _drift_rows(run: Run, baseline: Run | None, windows: list[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(label, a value and the baseline's by window); '' where the baseline has none."""
    rows = []
    for label, name in _DRIFT_ROWS:
        names = [name.replace("@", window) for window in windows]
        old = [baseline.metric("drift", name) if baseline else None for name in names]
        new = [compare.written(run.metric("drift", name), "share") for name in names]
        cells = [(a, "" if b is None else compare.written(b, "share")) for a, b in zip(new, old, strict=True)]
        rows.append((label, cells))
    return rows


def _inline(content: bytes) -> str | None:
    """A picture as a data URI of at most PICTURE_BYTES of WebP; None where it is no picture."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = opened.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    image.thumbnail((1600, 16000))
    for quality in (86, 60):
        if len(encoded := _webp(image, quality)) <= PICTURE_BYTES:
            break
    while len(encoded) > PICTURE_BYTES:
        scale = 0.95 * (PICTURE_BYTES / len(encoded)) ** 0.5
        image = image.resize((max(1, int(scale * image.width)), max(1, int(scale * image.height))))
        encoded = _webp(image, quality)
    return f"data:image/webp;base64,{base64.b64encode(encoded).decode()}"


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()
