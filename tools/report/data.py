"""What a report shows of one run, read into dataclasses. What a run lacks is None or empty; what is damaged is told."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tools.report.source import Source
from tools.shared.addresses import masked

Number = int | float
Result = TypeVar("Result")

_PROFILE = "metrics/profile.json"
_PROFILED = {"model": "model.name", "image_size": "train.image_size", "batch_size": "train.batch_size"}
_METRICS = ("metrics/evaluate.json", "metrics/train/metrics.json", "metrics/drift.json", _PROFILE)
_CURVES = ("train/loss", "val/loss", "val/top1", "train/lr")
_PICTURES = {
    "mistakes": "plots/evaluate/mistakes.png",
    "corruptions": "plots/drift/corruptions.png",
    "memory": "data/profile/memory-1.png",
}


@dataclass(frozen=True)
class Confusion:
    """Predictions of the validation images, in their order, as indices of `classes`."""

    classes: tuple[str, ...]
    actual: tuple[int, ...]
    predicted: tuple[int, ...]

    def counts(self) -> list[list[int]]:
        """Images by true class (row) and predicted class (column)."""
        table = [[0] * len(self.classes) for _ in self.classes]
        for a, p in zip(self.actual, self.predicted, strict=True):
            table[a][p] += 1
        return table


@dataclass(frozen=True)
class Run:
    """One run.

    `metrics` by file and dotted name; the `params` that it ran with (`stale`: where params.yaml has others by now);
    `curves` as (step, value); `hashes` of DVC's outs by path.
    """

    source: Source
    metrics: dict[str, dict[str, Number]]
    params: dict[str, Any]
    params_text: str
    curves: dict[str, list[tuple[float, float]]]
    confusion: Confusion | None
    per_class: list[dict[str, Any]]
    reliability: list[dict[str, Any]]
    power: list[dict[str, Any]]
    severity: list[dict[str, Any]]
    estimates: list[dict[str, Any]]
    operators: list[dict[str, Any]]
    pictures: dict[str, bytes]
    hashes: dict[str, str]
    stale: list[str]
    problems: list[str] = field(default_factory=list)

    def metric(self, file: str, name: str) -> Number | None:
        """A number of metrics/FILE.json by its dotted name, if there."""
        return self.metrics.get(f"metrics/{file}.json", {}).get(name)


def read_run(source: Source) -> Run:
    """Read all that a run left; a file that cannot be read becomes an entry of `problems`."""
    problems: list[str] = []

    def parsed(path: str, parse: Callable[[str], Result], otherwise: Result) -> Result:
        if (content := source.read(path)) is None:
            return otherwise
        try:
            return parse(content.decode())
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error, YAMLError) as error:
            problems.append(f"{path}: cannot be read: {' '.join(str(error).split())}")
            return otherwise

    def table(path: str, *numbers: str) -> list[dict[str, Any]]:
        return parsed(path, lambda text: _rows(text, numbers), [])

    pipeline: dict[str, Any] = parsed("dvc.yaml", _yaml, {})
    metrics: dict[str, dict[str, Number]] = {}
    for path in dict.fromkeys([*_METRICS, *_declared_metrics(pipeline)]):
        none: dict[str, Number] = {}
        if numbers := parsed(path, lambda text: flat_numbers(json.loads(text)), none):
            metrics[path] = numbers
    curves = {}
    for name in _CURVES:
        column = name.split("/")[1]
        rows = table(f"metrics/train/plots/metrics/{name}.tsv", "step", column)
        if points := [(row["step"], row[column]) for row in rows if math.isfinite(row[column])]:
            curves[name] = points
    per_class = table("plots/evaluate/per_class.csv", "precision", "recall", "f1", "average_precision", "num_images")
    edited: dict[str, Any] = parsed("params.yaml", lambda text: flat(_yaml(masked(text))), {})
    lock: dict[str, Any] = parsed("dvc.lock", lambda text: _yaml(masked(text)), {})
    ran_with = _params_of_lock(lock)
    pictures = {name: content for name, path in _PICTURES.items() if (content := source.read(path)) is not None}
    params = {name: ran_with.get(name, value) for name, value in edited.items()}
    profiled: dict[str, Any] = parsed(_PROFILE, json.loads, {}) if _PROFILE in metrics else {}
    of = {name: profiled[key] for key, name in _PROFILED.items() if key in profiled and name in params}
    if other := [f"{name} {value}" for name, value in of.items() if value != params[name]]:
        problems.append(
            f"{_PROFILE}: of another run ({', '.join(other)}): dvc repro --force --single-item profile renews it"
        )
        metrics.pop(_PROFILE, None)
        pictures.pop("memory", None)
    return Run(
        source=source,
        metrics=metrics,
        params=params,
        params_text=masked((source.read("params.yaml") or b"").decode(errors="replace")),
        curves=curves,
        confusion=parsed(
            "plots/evaluate/confusion.csv", lambda text: _confusion(text, [row["class"] for row in per_class]), None
        ),
        per_class=per_class,
        reliability=parsed("plots/evaluate/reliability.json", _reliability, []),
        power=table("plots/drift/power.csv", "window", "severity", "detected", "bbsds_ks", "embedding_mmd"),
        severity=table("plots/drift/severity.csv", "severity", "accuracy", "estimated"),
        estimates=table("plots/drift/estimates.csv", "window", "true", "estimated"),
        operators=table("data/profile/operators.csv", "calls_per_step", "flops_per_step"),
        pictures=pictures,
        hashes=_hashes(lock),
        stale=[
            f"{name} (ran with {ran_with[name]}, now {value})"
            for name, value in edited.items()
            if name in ran_with and ran_with[name] != value
        ],
        problems=problems,
    )


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted names; lists are values."""
    if not isinstance(value, dict):
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def flat_numbers(value: Any) -> dict[str, Number]:
    """The finite numbers of a nested mapping by dotted names."""
    return {
        name: number
        for name, number in flat(value).items()
        if isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
    }


def _yaml(text: str) -> dict[str, Any]:
    document = YAML(typ="safe", pure=True).load(text)
    if not isinstance(document, dict):
        raise ValueError("expected keys and values")
    return document


def _rows(text: str, numbers: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of a CSV or TSV with a header; the columns in `numbers` as floats."""
    delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    return [row | {name: float(row[name]) for name in numbers} for row in rows]


def _confusion(text: str, known: list[str]) -> Confusion | None:
    pairs = [(row["actual"], row["predicted"]) for row in csv.DictReader(io.StringIO(text))]
    classes = tuple(dict.fromkeys([*known, *(name for pair in pairs for name in pair)]))
    index = {name: number for number, name in enumerate(classes)}
    if not pairs:
        return None
    return Confusion(classes, tuple(index[a] for a, _ in pairs), tuple(index[p] for _, p in pairs))


def _reliability(text: str) -> list[dict[str, Any]]:
    names = ("confidence", "accuracy", "num_images")
    return [{name: float(row[name]) for name in names} for row in json.loads(text)]


def _declared_metrics(pipeline: dict[str, Any]) -> list[str]:
    """The JSON files under `metrics:` of dvc.yaml, of the whole and of its stages."""
    sections = [pipeline, *(pipeline.get("stages") or {}).values()]
    entries = [entry for section in sections for entry in section.get("metrics") or ()]
    paths = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
    return [path for path in paths if path.endswith(".json")]


def _hashes(lock: dict[str, Any]) -> dict[str, str]:
    """MD5 of the outs that DVC caches, by path: data and models, not metrics and plots."""
    outs = [out for stage in (lock.get("stages") or {}).values() for out in stage.get("outs", ())]
    return {out["path"]: out["md5"] for out in outs if out["path"].startswith(("data/", "models/"))}


def _params_of_lock(lock: dict[str, Any]) -> dict[str, Any]:
    """The params that the stages ran with, by dotted names.

    Of `profile`, which also reads those of train, the others' have precedence: it may have run at another time.
    """
    stages = sorted((lock.get("stages") or {}).items(), key=lambda one: one[0] != "profile")
    sections = [(stage.get("params") or {}).get("params.yaml") or {} for _, stage in stages]
    return {name: value for section in sections for name, value in flat(section).items()}
