"""A report out of one run or two: a page that needs nothing beside it, and its twin in Markdown."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from tools import report_compare as compare
from tools.report_charts import Series, chart, heat_map
from tools.report_data import Confusion, Run
from tools.report_profile import Profile

PICTURE_BYTES = 350_000  # of one picture, before base64 makes a third more of it
_MAX_CLASSES = 40  # of a confusion matrix that is drawn; beyond, the list of confused pairs says more
_MAX_DOTS = 2000
_SHOWN_ROWS = 30  # of the per-class table; the others are folded
_MANY = 10  # rows of a short list
_CURVES = (
    ("train/loss", "Training loss", "cross-entropy, nats", False),
    ("val/loss", "Validation loss", "cross-entropy, nats", False),
    ("val/top1", "Validation top-1", "share of images", True),
    ("train/lr", "Learning rate", "", False),
)
_METHODS = (("detected", "driftline", "ours"), ("bbsds_ks", "softmax KS", "other"), ("embedding_mmd", "embedding MMD", "baseline"))  # fmt: skip
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
    ("harmful or benign, F1", "decisions.@.f1"),
)


def page(
    run: Run, baseline: Run | None, profile: Profile | None, environment: list[tuple[str, str]], date: str
) -> str:
    """The HTML page."""
    confusion, common = run.confusion, _common(run, baseline, environment, date)
    return _templates().get_template("report.html.j2").render(
        common,
        curves=_curves(run, baseline),
        confusion_maps=_confusion_maps(run, baseline) if confusion else [],
        num_classes=len(confusion.classes) if confusion else 0,
        reliability=_reliability(run, baseline),
        power=_power(run),
        severity=_severity(run),
        estimates=_estimates(run),
        profile=profile,
        category_bars=[(name, ms, f"{ms:.1f} ms") for name, ms in profile.categories] if profile else [],
        operator_bars=[
            (name.removeprefix("aten::"), ms, f"{ms:.1f} ms, {calls:g} calls")
            for name, ms, calls in (profile.operators[:_MANY] if profile else ())
        ],
        confused_bars=[(f"{true} as {other}", count, str(count)) for true, other, count in common["confused"]],
        drift_rows=_DRIFT_ROWS,
        operators=run.operators[:_MANY],
        pictures={name: _inline(content) for name, content in run.pictures.items()},
    )  # fmt: skip


def markdown(run: Run, baseline: Run | None, environment: list[tuple[str, str]], date: str) -> str:
    """The twin, in GitHub's Markdown."""
    text = _templates().get_template("report.md.j2").render(_common(run, baseline, environment, date))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _common(run: Run, baseline: Run | None, environment: list[tuple[str, str]], date: str) -> dict[str, Any]:
    """What both templates show."""
    drift = run.metrics.get("metrics/drift.json", {})
    windows = sorted((name.split(".")[1] for name in drift if name.startswith("detection.")), key=int)
    return {
        "run": run,
        "baseline": baseline,
        "verdict": compare.verdict(run, baseline),
        "summary": compare.summary(run, baseline),
        "all_metrics": compare.all_metrics(run, baseline),
        "params": compare.changed_params(run, baseline) if baseline else [],
        "states": [_state(one) for one in (run, baseline) if one],
        "same_data": baseline is None or run.hashes.get("data/processed") == baseline.hashes.get("data/processed"),
        "per_class": _per_class(run, baseline),
        "shown_rows": _SHOWN_ROWS,
        "confused": _confused(run.confusion)[:_MANY] if run.confusion else [],
        "drift": drift,
        "windows": windows,
        "has_profile": "metrics/profile.json" in run.metrics,
        "environment": environment,
        "date": date,
    }


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )  # nosec: the Markdown template escapes by its own filters
    environment.filters |= {"code": code, "fenced": fenced, "percent": lambda share: f"{share:.1%}"}
    return environment


def code(text: object) -> str:
    """Text as code in Markdown, inside a table too: whatever it holds, it is no markup, link, mention or HTML.

    A code span cannot hold every text, so this is HTML's element with every sign that means something escaped.
    """
    words = " ".join(str(text).split())
    words = words if len(words) <= 160 else f"{words[:159]}…"
    escaped = re.sub(r"[^\w /,;=%?-]|_", lambda match: f"&#{ord(match[0])};", words)
    return f"<code>{escaped}</code>"


def fenced(text: str) -> str:
    """Text as a fenced block of Markdown, the fence longer than any inside it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


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


def _curves(run: Run, baseline: Run | None) -> list[Markup]:
    drawn = []
    for name, title, unit, percent in _CURVES:
        series = []
        if baseline and name in baseline.curves:
            series.append(Series("baseline", baseline.curves[name], "baseline"))
        if name in run.curves:
            series.append(Series("this run", run.curves[name]))
        if series:
            drawn.append(chart(title, "step", unit, series, percent=percent))
    return drawn


def _confusion_maps(run: Run, baseline: Run | None) -> list[Markup]:
    """The matrix as shares of the true class, and its difference to the baseline's where classes are the same."""
    confusion = run.confusion
    if confusion is None or len(confusion.classes) > _MAX_CLASSES:
        return []
    ours = _shares(confusion)
    text = [[f"{100 * share:.0f}" if share else "" for share in row] for row in ours]
    classes = confusion.classes
    maps = [heat_map("Share of the true class, %", classes, classes, ours, text, "predicted", "true")]
    if baseline and baseline.confusion and baseline.confusion.classes == confusion.classes:
        theirs = _shares(baseline.confusion)
        change = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(ours, theirs, strict=True)]
        # Off the diagonal more is worse: the sign is turned there, so that one colour is good everywhere.
        tone = [
            [4 * (value if row == column else -value) for column, value in enumerate(values)]
            for row, values in enumerate(change)
        ]
        text = [[f"{100 * value:+.0f}" if abs(value) >= 0.005 else "" for value in row] for row in change]
        tone = [[value if said else 0.0 for value, said in zip(*rows, strict=True)]
                for rows in zip(tone, text, strict=True)]  # fmt: skip
        title = "Change against the baseline, points"
        maps.append(
            heat_map(title, classes, classes, tone, text, "predicted", "true", style="change")
        )
    return maps


def _shares(confusion: Confusion) -> list[list[float]]:
    return [[count / max(1, sum(row)) for count in row] for row in confusion.counts()]


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


def _reliability(run: Run, baseline: Run | None) -> list[Markup]:
    if not run.reliability:
        return []
    whole = (0.0, 1.0)
    series = [Series("perfect", [(0, 0), (1, 1)], "ideal")]
    if baseline and baseline.reliability:
        series.append(Series("baseline", [(row["confidence"], row["accuracy"]) for row in baseline.reliability], "baseline"))  # fmt: skip
    series.append(Series("this run", [(row["confidence"], row["accuracy"]) for row in run.reliability]))
    counts = [Series(name, [(row["confidence"], row["num_images"]) for row in one.reliability], style)
              for one, name, style in ((baseline, "baseline", "baseline"), (run, "this run", "ours")) if one]  # fmt: skip
    return [
        chart("Reliability", "mean confidence of the bin", "right", series, whole, whole, percent=True),
        chart("Images by confidence", "mean confidence of the bin", "images", counts, whole),
    ]


def _power(run: Run) -> list[Markup]:
    """Detection against severity, a chart a window size."""
    windows = sorted({row["window"] for row in run.power})
    return [
        chart(
            f"Windows of {window:.0f} images",
            "severity of the drift",
            "with an alarm",
            [
                Series(name, [(row["severity"], row[column]) for row in run.power if row["window"] == window], style)
                for column, name, style in reversed(_METHODS)
            ],
            y_range=(0, 1),
            percent=True,
        )
        for window in windows
    ]


def _severity(run: Run) -> Markup | None:
    """Accuracy by kind and severity of drift; the colour is the loss against clean images."""
    if not run.severity:
        return None
    clean = run.metric("drift", "clean_accuracy") or 1.0
    kinds = list(dict.fromkeys(row["kind"] for row in run.severity))
    levels = sorted({row["severity"] for row in run.severity})
    found = {(row["kind"], row["severity"]): row["accuracy"] for row in run.severity}
    accuracy = [[found.get((kind, level)) for level in levels] for kind in kinds]
    loss = [[min(0.0, value - clean) if value is not None else 0.0 for value in row] for row in accuracy]
    text = [["" if value is None else f"{100 * value:.0f}" for value in row] for row in accuracy]
    names = [kind.replace("_", " ") for kind in kinds]
    title = "Accuracy under simulated drift, %"
    return heat_map(title, names, [f"{level:.0f}" for level in levels], loss, text, x_label="severity", tall_labels=False)  # fmt: skip


def _estimates(run: Run) -> Markup | None:
    """Estimated against true accuracy, a dot a window, of the largest windows."""
    if not run.estimates:
        return None
    window = max(row["window"] for row in run.estimates)
    points = [(row["true"], min(1.0, max(0.0, row["estimated"]))) for row in run.estimates if row["window"] == window]
    points = points[:: -(-len(points) // _MAX_DOTS)]
    series = [Series("exact", [(0, 0), (1, 1)], "ideal"), Series("a window", points, "ours", joined=False)]
    title = f"Accuracy of windows of {window:.0f}"
    return chart(title, "true accuracy", "estimated", series, (0, 1), (0, 1), percent=True)


def _inline(content: bytes) -> str | None:
    """A picture as a data URI of at most PICTURE_BYTES of WebP; None where it is no picture."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = opened.convert("RGB")
    except (OSError, Image.DecompressionBombError):
        return None
    image.thumbnail((1600, 16000))
    quality = 86
    while True:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=4)
        if buffer.tell() <= PICTURE_BYTES:
            return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if quality > 50:
            quality -= 12
        else:
            image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))
