"""The figures of a report: which numbers of a run go into which chart. None or no charts where the run lacks them."""

from __future__ import annotations

from markupsafe import Markup

from tools.report.charts import Series, chart, heat_map
from tools.report.data import Confusion, Run

_MAX_CLASSES = 40  # of a confusion matrix that is drawn; beyond, the list of confused pairs says more
_MAX_DOTS = 2000
_CURVES = (
    ("train/loss", "Training loss", "cross-entropy, nats", False),
    ("val/loss", "Validation loss", "cross-entropy, nats", False),
    ("val/top1", "Validation top-1", "share of images", True),
    ("train/lr", "Learning rate", "", False),
)
_METHODS = (  # column of power.csv, name, style
    ("detected", "driftline", "ours"),
    ("bbsds_ks", "softmax KS", "other"),
    ("embedding_mmd", "embedding MMD", "baseline"),
)


def curves(run: Run, baseline: Run | None) -> list[Markup]:
    """Loss, accuracy and learning rate by step."""
    drawn = []
    for name, title, unit, percent in _CURVES:
        series = []
        if name in run.curves:
            series.append(Series("this run", run.curves[name]))
        if baseline and name in baseline.curves:  # its dashes lie above, so that both are seen where they are the same
            series.append(Series("baseline", baseline.curves[name], "baseline"))
        if series:
            drawn.append(chart(title, "step", unit, series, percent=percent))
    return drawn


def confusion_maps(run: Run, baseline: Run | None) -> list[Markup]:
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
        title = "Change against the baseline, points (green: better)"
        maps.append(heat_map(title, classes, classes, tone, text, "predicted", "true", style="change"))
    return maps


def _shares(confusion: Confusion) -> list[list[float]]:
    return [[count / max(1, sum(row)) for count in row] for row in confusion.counts()]


def reliability(run: Run, baseline: Run | None) -> list[Markup]:
    """Accuracy by confidence, and how many images have it."""
    if not run.reliability:
        return []
    whole = (0.0, 1.0)
    runs = [("this run", "ours", run), *([("baseline", "baseline", baseline)] if baseline else [])]
    accuracy = [Series("perfect", [(0, 0), (1, 1)], "ideal")]
    shares = []
    for name, style, one in runs:
        rows, total = one.reliability, sum(row["num_images"] for row in one.reliability)
        accuracy.append(Series(name, [(row["confidence"], row["accuracy"]) for row in rows], style))
        shares.append(Series(name, [(row["confidence"], row["num_images"] / total) for row in rows], style))
    x_label = "mean confidence of the bin"
    return [
        chart("Right by confidence", x_label, "share of the bin", accuracy, whole, whole, percent=True),
        chart("Images by confidence", x_label, "share of all images", shares, whole, percent=True),
    ]


def power(run: Run) -> list[Markup]:
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


def severity(run: Run) -> Markup | None:
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
    columns = [f"{level:.0f}" for level in levels]
    return heat_map(title, names, columns, loss, text, x_label="severity", tall_labels=False)


def estimates(run: Run) -> Markup | None:
    """Estimated against true accuracy, a dot a window, of the largest windows."""
    if not run.estimates:
        return None
    window = max(row["window"] for row in run.estimates)
    points = [(row["true"], min(1.0, max(0.0, row["estimated"]))) for row in run.estimates if row["window"] == window]
    points = points[:: -(-len(points) // _MAX_DOTS)]
    series = [Series("exact", [(0, 0), (1, 1)], "ideal"), Series("a window", points, "ours", joined=False)]
    title = f"Accuracy of windows of {window:.0f}"
    return chart(title, "true accuracy", "estimated", series, (0, 1), (0, 1), percent=True)
