"""The drift stage: what it writes, that it repeats, and that a model of other classes is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages import drift
from stages.core import detector as detectors
from stages.core import drift_check
from stages.core.corruptions import FAMILIES, SEVERITIES
from stages.core.drift_check import Drifted
from stages.core.errors import InputError
from stages.core.params import load_params
from tests.helpers import ROOT, files, set_params
from tools.monitor.command import open_detector


def test_it_reports_every_condition_and_saves_a_detector_that_loads(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    metrics = json.loads(Path("metrics/drift.json").read_text())
    assert metrics["num_conditions"] == 75
    assert set(metrics["detection"]) == {"4"}
    assert 0 <= metrics["false_alarms"]["4"]["mean"] <= metrics["false_alarms"]["4"]["worst"] <= 1
    rows = list(csv.DictReader(Path("plots/drift/severity.csv").read_text().splitlines()))
    assert {(row["kind"], int(row["severity"])) for row in rows} == {(k, s) for k in FAMILIES for s in SEVERITIES}
    for name in ("severity", "power", "estimates", "corruptions"):
        with Image.open(f"plots/drift/{name}.png") as picture:
            picture.load()
    detector = detectors.load()
    assert detector.spec.alpha == metrics["alpha"]
    assert detector.spec.adapts
    assert [sized.window for sized in detector.spec.damage] == [4]


def test_it_repeats_to_the_bit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    before = files(Path("models/drift"), Path("plots/drift")) | {"metrics": Path("metrics/drift.json").read_bytes()}
    drift.main(load_params(drift.Params))
    after = files(Path("models/drift"), Path("plots/drift")) | {"metrics": Path("metrics/drift.json").read_bytes()}
    assert after == before


def test_the_clean_accuracy_is_that_of_the_source(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of data.extra are drifted ones: what is lost to drift is not counted from them."""
    monkeypatch.chdir(repository)
    path = Path("data/processed/files.json")
    names = json.loads(path.read_text())
    labels = np.load("data/processed/val_labels.npy")
    extra = labels < 5
    names["val"] = [
        name.replace("/", "/extra-") if is_extra else name for name, is_extra in zip(names["val"], extra, strict=True)
    ]
    path.write_text(json.dumps(names))
    knobs = load_params(drift.Params)
    drift.main(knobs)

    detector, extractor = open_detector(detectors.DETECTOR, Path("models/classifier"), knobs.runtime)
    right = extractor.features(np.load("data/processed/val_images.npy")).logits.argmax(axis=1) == labels
    parts = drift_check.split((~extra).sum(), np.random.default_rng(knobs.drift.seed))
    of_source = right[~extra]
    assert detector.spec.baselines.accuracy == of_source[[*parts.reference, *parts.threshold]].mean()
    assert json.loads(Path("metrics/drift.json").read_text())["clean_accuracy"] == of_source[parts.check].mean()
    # and clean windows are compared with clean images alone
    assert detector.labels.tolist() == labels[~extra][parts.threshold].tolist()
    assert len(detector.threshold) == len(parts.threshold)


def test_what_is_measured_is_no_image_that_was_fitted_to_and_none_of_data_extra(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    path = Path("data/processed/files.json")
    names = json.loads(path.read_text())
    names["val"][::3] = [name.replace("/", "/extra-") for name in names["val"][::3]]
    path.write_text(json.dumps(names))
    fitted: list[set[int]] = []
    measured: list[set[int]] = []
    fit, measure = drift_check.fit_sized_damage, drift_check.measure_condition

    def fit_sized_damage(simulated: Sequence[Drifted], *others: Any) -> Any:
        fitted.extend(set(one.indices.tolist()) for one in simulated)
        return fit(simulated, *others)

    def measure_condition(drifted: Drifted, *others: Any) -> Any:
        measured.append(set(drifted.indices.tolist()))
        return measure(drifted, *others)

    monkeypatch.setattr(drift_check, "fit_sized_damage", fit_sized_damage)
    monkeypatch.setattr(drift_check, "measure_condition", measure_condition)
    knobs = load_params(drift.Params)
    drift.main(knobs)
    extra = np.arange(0, len(names["val"]), 3)
    of_source = np.setdiff1d(np.arange(len(names["val"])), extra)
    parts = drift_check.split(len(of_source), np.random.default_rng(knobs.drift.seed))
    assert (len(fitted), len(measured)) == (107, 105)
    assert fitted[1] <= set(extra.tolist()), "drift that was met before teaches the estimate"
    assert set().union(fitted[0], *fitted[2:]) <= set(of_source[parts.reference].tolist())
    assert set().union(*measured) <= set(of_source[parts.check].tolist())


def test_sizes_that_no_condition_has_images_for_are_left_out(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    set_params(Path("params.yaml"), {"drift.window_sizes": [6], "drift.images_per_condition": 5})
    drift.main(load_params(drift.Params))
    assert set(json.loads(Path("metrics/drift.json").read_text())["detection"]) == {"5"}


@pytest.mark.parametrize(
    ("num_images", "images_per_condition", "said"),
    [
        (3925, 500, []),
        (3925, 100, ["windows of 200 images are left out (drift.window_sizes): drift.images_per_condition: 100 is"]),
        (1000, 500, ["windows of 200 images are left out (drift.window_sizes): 1,000 validation images are"]),
        (1000, 30, ["windows of 200 images are left out (drift.window_sizes): 1,000 validation images are",
                    "windows of 50 images are left out (drift.window_sizes): drift.images_per_condition: 30 is"]),
    ],
)  # fmt: skip
def test_why_windows_are_left_out_is_said(num_images: int, images_per_condition: int, said: list[str]) -> None:
    knobs = load_params(drift.Params, ROOT / "params.yaml").drift
    knobs = knobs.model_copy(
        update={"window_sizes": [10, 50, 200], "images_per_condition": images_per_condition}, deep=True
    )
    parts = drift_check.split(num_images, np.random.default_rng(0))
    sizes = drift_check.possible_sizes(knobs.window_sizes, parts, min(images_per_condition, len(parts.check)))
    remarks = list(drift._remarks(num_images, parts, knobs, sizes))
    assert [remark.partition(" enough for ")[0] for remark in remarks] == said
    for remark in remarks:
        assert "10" in remark.partition(" enough for ")[2]


def test_a_model_of_other_classes_is_refused_and_nothing_is_written(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    spec = json.loads(Path("models/classifier/model.json").read_text())
    spec["class_ids"][0] = "other"
    Path("models/classifier/model.json").write_text(json.dumps(spec))
    before = files(Path("models/drift"))
    with pytest.raises(InputError, match="other classes"):
        drift.main(load_params(drift.Params))
    assert files(Path("models/drift")) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("drift.window_sizes", [50, 10], "the smallest first"),
        ("drift.alpha", 0.5, "less than or equal to 0.2"),
        ("drift.max_drop", 0, "greater than 0"),
        ("drift.null_windows", 10, "greater than or equal to 99"),
        ("drift.contamination", [1.5], "less than or equal to 1"),
    ],
)
def test_wrong_params_are_refused_by_name(workspace: Path, key: str, value: object, message: str) -> None:
    set_params(workspace / "params.yaml", {key: value})
    with pytest.raises(InputError, match=f"{key}.*{message}"):
        load_params(drift.Params)
