"""Two runs side by side: which numbers are better, and whether chance alone would explain it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tools.report.data import Number, Run

CHANCE = 0.05  # a difference with a larger p-value is called within chance


@dataclass(frozen=True)
class Metric:
    """A number of metrics/FILE.json. `better`: 1 where more is better, -1 where less is, 0 where neither."""

    file: str
    name: str
    label: str
    kind: str  # share, number, count, speed, giga (shown in 10^9)
    better: int = 0


@dataclass(frozen=True)
class Difference:
    """A line of the summary, its numbers as text.

    `mark`: better, worse, same, within chance, other images, or nothing.
    """

    label: str
    value: str
    baseline: str
    change: str
    mark: str
    key: str


@dataclass(frozen=True)
class Verdict:
    """The first thing to read: a headline, the sentence behind it, and a colour's name (good, bad, neutral)."""

    headline: str
    detail: str
    colour: str


def metrics_of(run: Run) -> list[Metric]:
    """The numbers of the summary: those of drift at the largest window that this run has measured."""
    windows = [
        name.split(".")[1] for name in run.metrics.get("metrics/drift.json", {}) if name.startswith("detection.")
    ]
    window = max(windows, key=int, default="50")
    at = f"{window} images"
    return [
        Metric("evaluate", "top1", "Top-1 accuracy", "share", 1),
        Metric("evaluate", "macro_f1", "Macro F1", "number", 1),
        Metric("evaluate", "nll", "Negative log-likelihood", "number", -1),
        Metric("evaluate", "ece", "Calibration error", "share", -1),
        Metric("evaluate", "num_images", "Validation images", "count"),
        Metric("train", "train.loss", "Training loss, last record", "number"),
        Metric("train", "step", "Training steps", "count"),
        Metric("drift", f"false_alarms.{window}.mean", f"False alarms, {at}", "share"),
        Metric("drift", f"detection.{window}", f"Drift detected, {at}", "share", 1),
        Metric("drift", f"detection_of_harmful.{window}", f"Harmful drift detected, {at}", "share", 1),
        Metric("drift", f"estimate_error.adapted.{window}", f"Error of estimated accuracy, {at}", "share", -1),
        Metric("drift", f"decisions.{window}.f1", f"Harmful or benign, F1, {at}", "number", 1),
        Metric("profile", "images_per_second", "Training images per second", "speed", 1),
        Metric("profile", "step_ms_p50", "Training step, median (ms)", "speed", -1),
        Metric("profile", "data_wait_share", "Waiting for data", "share", -1),
        Metric("profile", "peak_memory_mb", "Peak memory (MB)", "speed", -1),
        Metric("profile", "flops_per_image", "GFLOP per training image", "giga"),
    ]


def summary(run: Run, baseline: Run | None) -> list[Difference]:
    """The lines of the summary that at least one of the two runs has."""
    lines = []
    for metric in metrics_of(run):
        file = "train/metrics" if metric.file == "train" else metric.file
        new, old = run.metric(file, metric.name), baseline.metric(file, metric.name) if baseline else None
        if new is None and old is None:
            continue
        mark = _mark(metric, new, old)
        if baseline and mark in ("better", "worse"):
            if metric.name in ("top1", "macro_f1") and chance(run, baseline) > CHANCE:
                mark = "within chance"
            elif metric.file in ("evaluate", "drift") and metric.name != "top1" and not same_data(run, baseline):
                mark = "other images"
        lines.append(
            Difference(
                metric.label, written(new, metric.kind), written(old, metric.kind), _change(metric, new, old), mark,
                metric.name,
            )
        )  # fmt: skip
    return lines


def all_metrics(run: Run, baseline: Run | None) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Every number of every metrics file: (file, (name, value, baseline))."""
    files = dict.fromkeys([*run.metrics, *(baseline.metrics if baseline else ())])
    found = []
    for file in files:
        new, old = run.metrics.get(file, {}), baseline.metrics.get(file, {}) if baseline else {}
        rows = [(name, _exact(new.get(name)), _exact(old.get(name))) for name in dict.fromkeys([*new, *old])]
        found.append((file, rows))
    return found


def changed_params(run: Run, baseline: Run) -> list[tuple[str, str, str]]:
    """(name, value, value of the baseline) of the params that differ; '—' where there is none."""
    missing = object()
    found = []
    for name in dict.fromkeys([*run.params, *baseline.params]):
        new, old = run.params.get(name, missing), baseline.params.get(name, missing)
        if new != old:
            texts = ["—" if value is missing else yaml_value(value) for value in (new, old)]
            found.append((name, texts[0], texts[1]))
    return found


def yaml_value(value: Any) -> str:
    """A value as params.yaml has it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def verdict(run: Run, baseline: Run | None) -> Verdict:
    """Top-1 of the run, and what it is worth against the baseline's."""
    top1, num_images = run.metric("evaluate", "top1"), run.metric("evaluate", "num_images")
    if top1 is None or not num_images:
        return Verdict("No result yet", "There is no metrics/evaluate.json: run `dvc repro`.", "neutral")
    low, high = interval(top1, num_images)
    alone = f"Top-1 {top1:.2%} of {num_images:,.0f} validation images (95% interval {low:.1%} to {high:.1%})."
    old = baseline.metric("evaluate", "top1") if baseline else None
    if baseline is None or old is None:
        return Verdict(f"Top-1 {top1:.2%}", alone, "neutral")
    points = 100 * (top1 - old)
    if pairs := paired(run, baseline):
        gained, lost = pairs
        if gained == lost == 0:
            return Verdict("Same predictions", f"{alone} Every image is judged as by the baseline.", "neutral")
        evidence = f"{gained:,} images that the baseline has wrong are right, {lost:,} the other way round"
    else:
        evidence = (
            "the validation images are not the same ones, so that the two numbers are compared as those of two samples"
        )
    p = chance(run, baseline)
    likely = "< 0.001" if p < 0.001 else f"= {p:.2g}"
    evidence = f"{alone} The baseline has {old:.2%}; {evidence} (p {likely})."
    if p > CHANCE or points == 0:
        return Verdict("No clear difference", f"{evidence} Chance alone explains such a difference easily.", "neutral")
    size = f"{abs(points):.1f} points of top-1"
    return (
        Verdict(f"Better by {size}", evidence, "good") if points > 0 else Verdict(f"Worse by {size}", evidence, "bad")
    )


def same_data(run: Run, baseline: Run) -> bool:
    """Whether both used the same images, as far as dvc.lock tells; they may be packed in another size or crop."""
    outs = ("data/raw", "data/processed")
    return any(run.hashes.get(out) is not None and run.hashes[out] == baseline.hashes.get(out) for out in outs)


def paired(run: Run, baseline: Run) -> tuple[int, int] | None:
    """Images right here and wrong in the baseline, and the reverse; None where the validation images may be others."""
    ours, theirs = run.confusion, baseline.confusion
    if (
        not ours
        or not theirs
        or not same_data(run, baseline)
        or (ours.classes, ours.actual) != (theirs.classes, theirs.actual)
    ):
        return None
    right = [(a == new, a == old) for a, new, old in zip(ours.actual, ours.predicted, theirs.predicted, strict=True)]
    return right.count((True, False)), right.count((False, True))


def chance(run: Run, baseline: Run) -> float:
    """p-value of the difference in top-1.

    On the same images McNemar's exact test; otherwise the normal test of two proportions.
    """
    if (pairs := paired(run, baseline)) is not None:
        return sign_test(*pairs)
    shares = [run.metric("evaluate", "top1"), baseline.metric("evaluate", "top1")]
    counts = [run.metric("evaluate", "num_images"), baseline.metric("evaluate", "num_images")]
    if None in shares or not all(counts):
        return 1.0
    (a, b), (n, m) = [float(share or 0) for share in shares], [float(count or 0) for count in counts]
    pooled = (a * n + b * m) / (n + m)
    deviation = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    return math.erfc(abs(a - b) / deviation / math.sqrt(2)) if deviation else 1.0


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of so uneven a split, were wins and losses equally likely; ties do not count."""
    total, fewer = wins + losses, min(wins, losses)
    ways = tail = 1
    for k in range(fewer):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * (tail / (1 << total)))


def interval(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` images."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def written(value: Number | None, kind: str) -> str:
    """A number as a person reads it; '—' where there is none."""
    if value is None:
        return "—"
    if kind == "share":
        return f"{value:.2%}"
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "giga":
        return f"{value / 1e9:,.3f}"
    return f"{value:.4f}" if kind == "number" else f"{value:,.1f}"


def _exact(value: Number | None) -> str:
    return "—" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _change(metric: Metric, new: Number | None, old: Number | None) -> str:
    if new is None or old is None:
        return ""
    if metric.kind == "share":
        return f"{100 * (new - old):+.2f} points"
    if metric.kind in ("speed", "giga"):
        return f"{new / old - 1:+.1%}" if old else ""
    return f"{new - old:+,.0f}" if metric.kind == "count" else f"{new - old:+.4f}"


def _mark(metric: Metric, new: Number | None, old: Number | None) -> str:
    if new is None or old is None:
        return ""
    if written(new, metric.kind) == written(old, metric.kind):
        return "same"
    if not metric.better:
        return ""
    return "better" if (new > old) == (metric.better > 0) else "worse"
