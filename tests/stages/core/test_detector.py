"""The detector: what it says of clean, drifted and sorted windows, and that a saved one says the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy import stats

from stages.core import detector as detectors
from stages.core.damage import damage_inputs, fit_confusion, fit_damage
from stages.core.detector import Detector, SizedDamage, Status, nearest_size, verdict
from stages.core.errors import InputError
from stages.core.features import Features
from stages.core.image_statistics import STATISTICS
from stages.core.measures import OUTPUTS, fit_projection
from stages.core.two_sample import Population, population_of
from tests.synthetic import CENTRES, NUM_CLASSES, classes_of, detector, features


@pytest.fixture(scope="module")
def calm() -> Detector:
    """Takes every prediction to be right."""
    return detector(accuracy=1.0)


@pytest.fixture(scope="module")
def worried() -> Detector:
    """Takes every other prediction to be wrong."""
    return detector(accuracy=0.5)


def test_clean_windows_are_ok(calm: Detector) -> None:
    judgements = [calm.judge(features(40, 50 + seed), None) for seed in range(15)]
    assert [judgement.status for judgement in judgements].count("ok") >= 13
    assert not all(judgement.p_value > 0.9 for judgement in judgements)
    for judgement in judgements:
        assert judgement.num_tested == 40
        assert 0 < judgement.p_value <= 1
        assert 0 < judgement.class_p_value <= 1


@pytest.mark.parametrize(("looks", "inside"), [(1.0, 0.0), (0.0, 1.5)])
def test_drift_is_harmful_by_the_estimated_drop(looks: float, inside: float, calm: Detector, worried: Detector) -> None:
    window = features(40, 50, looks, inside)
    harmless, harmful = calm.judge(window, None), worried.judge(window, None)
    assert (harmless.status, harmful.status) == ("benign", "harmful")
    assert harmless.p_value == harmful.p_value <= 0.01
    assert harmful.accuracy == pytest.approx(0.5, abs=0.01)
    assert harmful.drop == pytest.approx(worried.spec.baselines.accuracy - harmful.accuracy)
    assert harmless.drop < 0.1 < harmful.drop


def test_without_drift_a_low_estimate_is_ok(worried: Detector) -> None:
    judgement = worried.judge(features(40, 51), None)
    assert judgement.drop > worried.spec.max_drop
    assert judgement.status == "ok"


def test_sorted_images_are_a_shift_of_classes_and_no_drift(calm: Detector) -> None:
    for label in range(NUM_CLASSES):
        judgement = calm.judge(features(40, 60 + label, classes=np.full(40, label)), None)
        assert judgement.class_shift
        assert judgement.same_mix
        assert judgement.class_p_value == pytest.approx(1 / 1000)
        assert judgement.status == "ok"
        assert 30 <= judgement.num_tested <= 40


def test_sorted_images_that_drifted_are_still_found(calm: Detector) -> None:
    judgement = calm.judge(features(40, 60, looks=1.0, classes=np.full(40, 2)), None)
    assert judgement.class_shift
    assert judgement.status == "benign"


def test_matched_p_values_keep_their_level(calm: Detector) -> None:
    """Windows of two classes, of fresh images: p-values are spread over the unit interval."""
    p_values = []
    for seed in range(60):
        classes = np.where(np.arange(30) < 20, 0, 1)
        matched = calm.matched_p_value(calm.population(features(30, 300 + seed, classes=classes)))
        assert matched is not None
        assert matched[1] == 30
        p_values.append(matched[0])
    low, high = stats.binom.ppf([0.0005, 0.9995], 60, 0.2)
    assert low <= sum(p_value <= 0.2 for p_value in p_values) <= high


def test_what_is_predicted_wrong_is_no_drift_when_the_mix_is_another() -> None:
    """In a window of one class, the images predicted as others are not as those classes are."""
    reference, threshold = _blurred(400, 1), _blurred(2400, 2)
    projection = fit_projection(reference, 4)
    labels = classes_of(2400, 2)
    base = detector()
    spec = base.spec.model_copy(update={"confusion": fit_confusion(threshold.logits, labels), "null_windows": 199})
    judge = detectors.build(spec, projection, population_of(threshold, projection), labels)
    p_values = []
    for seed in range(60):
        window = judge.population(_blurred(100, 500 + seed, np.full(100, seed % NUM_CLASSES)))
        matched = judge.matched_p_value(window, 0.05)
        assert matched is not None
        p_values.append(matched[0])
    assert sum(p_value <= 0.05 for p_value in p_values) <= stats.binom.ppf(0.9995, 60, 0.05)


def _blurred(count: int, seed: int, classes: NDArray[np.int64] | None = None) -> Features:
    """Features of classes so close to each other that a third is predicted wrong."""
    rng = np.random.default_rng([seed, 7])
    classes = classes_of(count, seed) if classes is None else classes
    embedding = CENTRES[classes] + 5 * rng.normal(size=(count, CENTRES.shape[1]))
    logits = -0.25 * ((embedding[:, None] - CENTRES) ** 2).sum(axis=2)
    looks = rng.normal(size=(count, len(STATISTICS)))
    return Features(*(values.astype(np.float32) for values in (logits, embedding, looks)))


def test_without_enough_clean_images_of_its_classes_a_window_has_no_match(calm: Detector) -> None:
    rare = calm.threshold.classes == 3
    few = calm.threshold.rows(np.concatenate([np.flatnonzero(~rare), np.flatnonzero(rare)[:6]]))
    judge = detectors.build(calm.spec, calm.projection, few, few.classes)
    window = features(30, 300, classes=np.full(30, 3))
    assert judge.matched_p_value(judge.population(window)) is None
    judgement = judge.judge(window, None)
    assert judgement.class_shift
    assert not judgement.same_mix
    assert judgement.num_tested == 30


def test_a_large_window_of_a_rare_class_is_compared_with_the_few_of_its_like(calm: Detector) -> None:
    """Fewer than a quarter of the window match; against all classes it would be taken for drift."""
    rare = calm.threshold.classes == 3
    few = calm.threshold.rows(np.concatenate([np.flatnonzero(~rare), np.flatnonzero(rare)[:30]]))
    judge = detectors.build(calm.spec, calm.projection, few, few.classes)
    for seed in range(5):
        judgement = judge.judge(features(80, 300 + seed, classes=np.full(80, 3)), None)
        assert judgement.class_shift
        assert 10 <= judgement.num_tested < 20
        assert judgement.status == "ok"
    assert judge.judge(features(80, 310, looks=1.0, classes=np.full(80, 3)), None).status != "ok"


def test_more_images_than_can_be_tested_are_thinned(calm: Detector) -> None:
    """The estimate takes all of them; the test takes evenly spaced ones, so that a window's end counts as its start."""
    assert calm.largest_window == 100
    clean, drifted = features(300, 70), features(300, 71, looks=1.5)
    halves = Features(
        *(np.concatenate([a[:150], b[150:]]) for a, b in zip(astuple(clean), astuple(drifted), strict=True))
    )
    for window in (halves, halves.rows(np.arange(300)[::-1])):
        judgement = calm.judge(window, None)
        assert judgement.num_tested == 100
        assert judgement.status == "benign"
    assert calm.judge(clean, None).status == "ok"


@pytest.mark.parametrize(("window", "run_length"), [(30, 10_000), (25, 10_000), (7, 1_000), (3, 1_000), (4, 40_000)])
def test_the_rate_asked_for_is_that_of_the_clean_windows(window: int, run_length: int, calm: Detector) -> None:
    """Ten p-values are at most alpha, and they are next to it."""
    alpha = window / run_length
    count = calm.num_windows(alpha) + 1
    assert count == -(-10 * run_length // window)
    assert 10 / count <= alpha < 11 / count
    assert 10 / count == pytest.approx(alpha, rel=1e-3)


def test_the_class_mix_of_clean_windows_is_no_shift() -> None:
    """At 1 %, in windows of a tenth of the threshold images."""
    judge = detector(null_windows=999)
    found = [
        judge.class_p_value(window)
        for seed in range(20)
        for window in judge.population(features(400, 400 + seed)).classes.reshape(10, 40)
    ]
    assert (np.array(found) <= 0.01).mean() < 0.04


def test_the_class_mix_of_the_largest_clean_windows_is_no_shift() -> None:
    """The largest window that is tested is a quarter of the threshold images."""
    alarms = []
    for seed in range(10):
        judge = detector(null_windows=499)
        threshold = judge.population(features(400, 700 + seed))
        judge = detectors.build(judge.spec, judge.projection, threshold, threshold.classes)
        fresh = judge.population(features(2000, 800 + seed)).classes
        alarms += [judge.class_p_value(window) <= 0.05 for window in fresh.reshape(20, 100)]
    assert np.mean(alarms) <= stats.binom.ppf(0.9995, 200, 0.05) / 200


@pytest.mark.parametrize("num_classes", [10, 200, 1000])
def test_the_class_mix_of_many_classes_is_no_shift(num_classes: int, calm: Detector) -> None:
    """Of more classes than images, too, and of rare ones: 200 windows at 5 %."""
    rng = np.random.default_rng(num_classes)
    shares = 1 / np.arange(1, num_classes + 1)
    spec = calm.spec.model_copy(update={"class_ids": [str(i) for i in range(num_classes)], "null_windows": 199})

    def draw(number: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
        return rng.choice(num_classes, number, p=shares / shares.sum())

    def judge_of(number: int) -> Detector:
        population = Population(np.zeros((number, 1), dtype=np.float32), draw(number, shares))
        return detectors.Detector(spec, calm.projection, population, population.classes, calm.comparison)

    alarms = [judge_of(637).class_p_value(draw(159, shares), 0.05) <= 0.05 for _ in range(200)]
    assert np.mean(alarms) <= stats.binom.ppf(0.9995, 200, 0.05) / 200
    assert judge_of(637).class_p_value(draw(159, shares[::-1]), 0.001) <= 0.001, "a mix that is another"


def test_a_given_calibration_and_alpha_are_used(calm: Detector) -> None:
    window = features(40, 50)
    plain = calm.judge(window, None)
    assert calm.judge(window, None, calibration=calm.calibration(40)) == plain
    assert calm.judge(window, None, alpha=1.0).status != "ok"
    more = calm.judge(window, None, calibration=calm.calibration(40, 0.001)).p_value
    assert more == pytest.approx(plain.p_value, abs=0.1)


def test_an_alarm_is_possible_at_any_alpha() -> None:
    """Where `null_windows` are too few for p-values of alpha, more are drawn."""
    strict = detector(null_windows=99, alpha=0.0005)
    assert strict.judge(features(40, 50, looks=2.0), None).p_value <= 0.0005
    one_class = features(40, 51, looks=2.0, classes=np.zeros(40, dtype=np.int64))
    judgement = strict.judge(one_class, None)
    assert judgement.class_shift
    assert judgement.p_value <= 0.0005


def test_what_moved_is_named_with_its_direction(calm: Detector) -> None:
    window = features(60, 80)
    window.statistics[:, STATISTICS.index("noise")] += 2
    window.statistics[:, STATISTICS.index("haze")] -= 1
    moved = calm.judge(window, None).moved
    assert [one.name for one in moved if one.name in STATISTICS][:2] == ["noise", "haze"]
    by_name = {one.name: one for one in moved}
    assert by_name["noise"].shift == pytest.approx(2, abs=0.5)
    assert by_name["haze"].shift == pytest.approx(-1, abs=0.4)
    assert [one.evidence for one in moved] == sorted((one.evidence for one in moved), reverse=True)
    assert set(by_name) == {*STATISTICS, *OUTPUTS, "image_distance", "embedding_distance", "embedding_residual"}


def test_oddness_is_one_for_usual_images(calm: Detector) -> None:
    assert calm.oddness(calm.population(features(500, 90))).mean() == pytest.approx(1, abs=0.1)
    odd = calm.oddness(calm.population(features(500, 90, looks=2)))
    assert odd.min() > 1


def test_the_estimate_is_the_mean_probability_with_its_interval() -> None:
    """Adapted logits take part; counting 100 images and the error on unseen families add up."""
    rng = np.random.default_rng(0)
    logits, adapted = (rng.normal(0, 2, (100, 4)).astype(np.float32) for _ in range(2))
    inputs = damage_inputs(logits, adapted)
    right = logits.argmax(axis=1) == adapted.argmax(axis=1)
    model = fit_damage(inputs, right)
    accuracy, low, high = detector(damage=[SizedDamage(window=50, model=model, error=0.03)]).estimate(logits, adapted)
    assert accuracy == pytest.approx(right.mean(), abs=0.01)
    standard = (inputs - np.array(model.mean)) / np.array(model.scale)
    chances = 1 / (1 + np.exp(-(standard @ np.array(model.weights) + model.bias)))
    margin = 1.96 * (0.03**2 + (chances * (1 - chances)).sum() / 100**2) ** 0.5
    assert (low, high) == pytest.approx((accuracy - margin, accuracy + margin))


def test_intervals_stay_between_nothing_and_everything() -> None:
    for accuracy in (0.0, 1.0):
        _, low, high = detector(accuracy=accuracy).estimate(features(10, 0).logits, None)
        assert 0 <= low <= high <= 1


def test_the_estimate_of_the_nearest_size_is_taken() -> None:
    sized = detector().spec.damage
    assert [nearest_size(sized, size).window for size in (1, 10, 22, 23, 50, 4000)] == [10, 10, 10, 50, 50, 50]


def test_verdicts() -> None:
    cases = [(False, 0.5), (True, 0.05), (True, 0.1), (True, 0.11), (True, -0.1)]
    found = [verdict(drifted, drop, 0.1) for drifted, drop in cases]
    assert found == ["ok", "benign", "benign", "harmful", "benign"]
    assert set(found) == set(get_args(Status))


def test_a_saved_detector_judges_the_same(tmp_path: Path, worried: Detector) -> None:
    folder = tmp_path / "drift"
    detectors.save(folder, worried)
    assert sorted(path.name for path in folder.iterdir()) == ["arrays.safetensors", "detector.json"]
    loaded = detectors.load(folder)
    digest = hashlib.sha256((folder / "arrays.safetensors").read_bytes()).hexdigest()
    assert loaded.spec == worried.spec.model_copy(update={"sha256": digest})
    for window in (features(40, 1), features(40, 2, looks=0.7), features(30, 3, classes=np.zeros(30, dtype=np.int64))):
        assert loaded.judge(window, None) == worried.judge(window, None)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    detectors.save(folder, loaded)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


def test_missing_and_damaged_detectors_are_refused_by_file(tmp_path: Path, calm: Detector) -> None:
    folder = tmp_path / "drift"
    with pytest.raises(InputError, match=r"drift/detector\.json: not found; run `dvc repro drift`"):
        detectors.load(folder)
    detectors.save(folder, calm)
    arrays, spec = folder / "arrays.safetensors", folder / "detector.json"
    whole, text = arrays.read_bytes(), spec.read_text()
    for content in (b"", b"words", whole[:100], whole[: len(whole) // 2]):
        arrays.write_bytes(content)
        with pytest.raises(InputError, match=r"arrays\.safetensors: cannot be read.*dvc repro drift"):
            detectors.load(folder)
    arrays.write_bytes(whole)
    some = load_file(arrays)
    del some["threshold.values"]
    save_file(some, arrays)
    with pytest.raises(InputError, match=r"arrays\.safetensors: cannot be read: .*threshold\.values"):
        detectors.load(folder)
    arrays.unlink()
    with pytest.raises(InputError, match=r"arrays\.safetensors: cannot be read"):
        detectors.load(folder)
    arrays.write_bytes(whole)
    for wrong in ("", "{}", text[:50], json.dumps(json.loads(text) | {"more": 1})):
        spec.write_text(wrong)
        with pytest.raises(InputError, match=r"detector\.json: not written by this version"):
            detectors.load(folder)
    spec.write_text(text)
    assert detectors.load(folder).spec.baselines == calm.spec.baselines
    arrays.chmod(0o644)
    arrays.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"arrays\.safetensors: altered since drift wrote it"):
        detectors.load(folder)


def test_known_accuracy_is_that_of_the_classes(calm: Detector) -> None:
    fresh = features(2000, 5)
    right = (calm.population(fresh).classes == classes_of(2000, 5)).mean()
    assert calm.spec.baselines.accuracy == pytest.approx(right, abs=0.02)
