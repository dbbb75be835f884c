"""Stage drift: calibrate the drift detector on clean images, and measure it on simulated drift.

Inputs   models/classifier/, data/processed/ (validation images, which are never trained on); params `drift`
Outputs  models/drift/         the detector (stages/core/detector.py)
         metrics/drift.json    false alarms, detection by kind, severity and window, estimated against true accuracy
         plots/drift/          severity curves, power by window size, estimates, and every corruption in one picture
Command  python -m stages.drift
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from pydantic import Field, field_validator

from stages.core.errors import InputError
from stages.core.mirror import WandbParams, open_mirror
from stages.core.params import Section, load_params
from stages.core.recipe import Precision, Probability
from stages.core.runtime import RuntimeParams, cache_dir
from stages.core.stopping import run_stage

if TYPE_CHECKING:
    from stages.core.drift_check import Parts

METRICS = Path("metrics/drift.json")
PLOTS = Path("plots/drift")
FEWEST_IMAGES = 20  # clean ones that a detector can be made of
FEW_IMAGES = 200  # with fewer, clean windows are alarmed at more often than alpha says
CLEAN, MET = "clean", "met before"  # conditions that are not simulated


class DriftParams(Section):
    """The `drift` section of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    alpha: Annotated[float, Field(ge=0.0001, le=0.2)]
    max_drop: Annotated[float, Field(gt=0, lt=1)]
    window_sizes: Annotated[list[Annotated[int, Field(ge=2, le=256)]], Field(min_length=1)]
    axes: Annotated[int, Field(ge=1, le=256)]
    null_windows: Annotated[int, Field(ge=99, le=100_000)]
    images_per_condition: Annotated[int, Field(ge=2)]
    fit_images: Annotated[int, Field(ge=2)]
    resplits: Annotated[int, Field(ge=1)]
    contamination: list[Probability]
    precision: Precision

    @field_validator("window_sizes")
    @classmethod
    def _ascend(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError(f"{value} must be different sizes, the smallest first")
        return value


class Params(Section):
    """What this stage reads."""

    drift: DriftParams
    runtime: RuntimeParams
    wandb: WandbParams


def main(params: Params) -> None:
    """Write models/drift/, metrics/drift.json and plots/drift/."""
    import numpy as np

    from stages.core import detector as detectors
    from stages.core import device, drift_check, drift_figures, drift_summary, model, precision
    from stages.core.damage import fit_baselines, fit_confusion
    from stages.core.dataset import check_images, load_file_names, load_meta, load_split
    from stages.core.drift_check import Condition
    from stages.core.features import Extractor
    from stages.core.image import CropMode, Interpolation
    from stages.core.measures import fit_projection
    from stages.core.output import write_bytes, write_json, write_text
    from stages.core.progress import progress, stage_summary
    from stages.core.source import is_extra
    from stages.core.tables import as_csv
    from stages.core.two_sample import population_of

    knobs = params.drift
    meta = load_meta()
    split = load_split("val", meta)
    check_images(split)
    images, labels = split.images, split.labels
    # Clean images are those of the source. Among them, those of data.extra, which are drifted ones, would make a window
    # of clean images look like another mixture, and so an alarm.
    is_of_extra = np.array([is_extra(name) for name in load_file_names("val")])
    of_source, of_extra = np.flatnonzero(~is_of_extra), np.flatnonzero(is_of_extra)
    where = device.set_up(params.runtime)
    network, spec = model.load(model.CLASSIFIER, where)
    if spec.class_ids != meta.class_ids:
        raise InputError(f"{model.CLASSIFIER} was trained on other classes than data/processed has; run `dvc repro`")
    if len(of_source) < FEWEST_IMAGES:
        others = f", {len(of_source)} of them not of data.extra" if len(of_source) < len(labels) else ""
        raise InputError(
            f"data/processed: {len(labels)} validation images{others}; a detector needs at least {FEWEST_IMAGES}"
        )
    mirrored = open_mirror("drift", params.wandb, cache_dir(params.runtime), params, model=model.CLASSIFIER)
    with stage_summary("drift") as made, mirrored as mirror:
        extractor = Extractor(network, spec, precision.resolve(knobs.precision, where, key="drift.precision"), where)
        clean = extractor.features(images)
        rng = np.random.default_rng(knobs.seed)
        parts = drift_check.Parts(*(of_source[part] for part in drift_check.split(len(of_source), rng)))
        known = np.concatenate([parts.reference, parts.threshold])

        # Reference images teach the damage estimate, check images measure everything: under each condition, both. Drift
        # that has been met, with labels, teaches it, too.
        fit_on = rng.permutation(parts.reference)[: knobs.fit_images]
        check_on = rng.permutation(parts.check)[: knobs.images_per_condition]
        sizes = drift_check.possible_sizes(knobs.window_sizes, parts, len(check_on))
        for remark in _remarks(len(of_source), parts, knobs, sizes):
            print(f"drift: {remark}", file=sys.stderr)
        fit_groups = {size: len(fit_on) for size in sizes}
        check_groups = drift_check.adapted_images(sizes, len(check_on))
        conditions = [Condition(CLEAN, 0, fit_on, fit_groups)]
        if len(of_extra):
            met = rng.permutation(of_extra)[: knobs.fit_images]
            conditions.append(Condition(MET, 0, met, dict.fromkeys(sizes, len(met))))
        as_they_are = len(conditions)
        for kind, severity in drift_check.kinds_and_severities():
            conditions.append(Condition(kind, severity, fit_on, fit_groups))
            conditions.append(Condition(kind, severity, check_on, check_groups))
        looked_at = drift_check.simulate(images, conditions, extractor, knobs.seed)
        drifted = list(progress(looked_at, "drift: simulate", len(conditions), "condition"))
        fitting = [*drifted[:as_they_are], *drifted[as_they_are::2]]
        checking = drifted[as_they_are + 1 :: 2]

        fits = {size: drift_check.fit_sized_damage(fitting, labels, size) for size in sizes}
        projection = fit_projection(clean.rows(parts.reference), knobs.axes)
        detector = detectors.build(
            detectors.DetectorSpec(
                class_ids=spec.class_ids,
                classifier_sha256=spec.sha256,
                image_size=meta.image_size,
                crop_mode=cast(CropMode, meta.crop_mode),
                interpolation=cast(Interpolation, meta.interpolation),
                precision=knobs.precision,
                alpha=knobs.alpha,
                max_drop=knobs.max_drop,
                null_windows=knobs.null_windows,
                seed=knobs.seed,
                baselines=fit_baselines(clean.logits[known], labels[known]),
                confusion=fit_confusion(clean.logits[known], labels[known]),
                damage=[sized for sized, _ in fits.values()],
                adapts=drifted[0].adapted[sizes[0]] is not None,
            ),
            projection,
            population_of(clean.rows(parts.threshold), projection),
            labels[parts.threshold],
        )
        detectors.save(detectors.DETECTOR, detector)

        check = clean.rows(parts.check)
        unseen = {size: without for size, (_, without) in fits.items()}
        gauge = drift_check.gauge(detector, sizes, check, labels, unseen)
        shown = progress(checking, "drift: detect", len(checking), "condition")
        measured = [drift_check.measure_condition(one, gauge, knobs.contamination) for one in shown]
        alarms = drift_check.false_alarms(
            *(clean.rows(of_source), sizes, knobs.axes, knobs.alpha, knobs.resplits),
            *(detector.num_windows(knobs.alpha), knobs.seed),
        )
        accuracy = float((clean.logits[parts.check].argmax(axis=1) == labels[parts.check]).mean())
        summary = drift_summary.summary(detector.spec, accuracy, alarms, measured)
        severities = drift_summary.severity_rows(measured)
        powers = drift_summary.power_rows(measured, alarms)
        estimates = drift_summary.estimate_rows(measured)
        write_json(METRICS, summary)
        for name, rows in (("severity", severities), ("power", powers), ("estimates", estimates)):
            write_text(PLOTS / f"{name}.csv", as_csv(rows))
        write_bytes(PLOTS / "severity.png", drift_figures.severity_curves(severities, accuracy))
        write_bytes(PLOTS / "power.png", drift_figures.power_curves(powers, knobs.alpha))
        write_bytes(PLOTS / "estimates.png", drift_figures.estimates(estimates))
        write_bytes(PLOTS / "corruptions.png", drift_figures.contact_sheet(images[check_on[0]], knobs.seed))
        mirror.results(METRICS, PLOTS)
        made.extend(drift_summary.lines(summary))


def _remarks(num_images: int, parts: Parts, knobs: DriftParams, sizes: Sequence[int]) -> Iterator[str]:
    """What few images, or few of them a condition, cost."""
    from stages.core.drift_check import possible_sizes

    calibrated = possible_sizes(knobs.window_sizes, parts, len(parts.check))
    for missing, enough, why in (
        ({*knobs.window_sizes}.difference(calibrated), calibrated, f"{num_images:,} validation images are"),
        ({*calibrated}.difference(sizes), sizes, f"drift.images_per_condition: {knobs.images_per_condition} is"),
    ):
        if missing:
            yield (
                f"windows of {_listed(sorted(missing))} images are left out (drift.window_sizes): {why} enough for "
                f"{_listed(enough)}"
            )
    if num_images < FEW_IMAGES:
        yield (
            f"{num_images} validation images are few: clean ones may raise several times as many alarms as drift.alpha "
            f"says; have {FEW_IMAGES} or more"
        )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


if __name__ == "__main__":
    run_stage(lambda: main(load_params(Params)), "drift")
