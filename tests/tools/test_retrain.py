"""Retraining with the real git, dvc, torch and monitor: what is promoted, what is left as it was, what is taken up."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from dvc.utils.hydra import apply_overrides
from numpy.typing import NDArray
from PIL import Image

from stages import extract
from stages.core.archive import Limits
from stages.core.corruptions import corrupt
from stages.core.dataset import PROCESSED, load_meta, load_split
from stages.core.errors import InputError, Stopped
from stages.core.output import write_json
from stages.core.params import load_params
from tests.helpers import (
    PATIENCE,
    ROOT,
    encoded,
    files,
    image_files,
    picture,
    run,
    set_params,
    start,
    wait_until,
    write_files,
)
from tools.retrain import experiment, kept, labelled
from tools.retrain.command import _ask_monitor
from tools.retrain.judgement import Accuracies, Trial, count, doubt, no_damage, objection
from tools.retrain.params import Params, RetrainParams

LIMITS = Limits(files=10_000, total_bytes=10**9, ratio=200)
PARAMS = RetrainParams(
    epochs=4, lr=0.003, warmup_epochs=0.5, held_out=0.3, simulated_share=1.0, min_recovered=0.7, max_clean_loss=0.02
)


# --- the decision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clean", "drifted", "why"),
    [
        ((0.90, 0.90), (0.40, 0.80), None),
        ((0.90, 0.88), (0.40, 0.75), None),  # both limits are met exactly
        ((0.90, 0.90), (0.40, 0.74), r"68% of the lost accuracy came back \(0\.4000 to 0\.7400"),
        ((0.90, 0.87), (0.40, 0.90), r"clean top-1 fell by 0\.0300 \(0\.9000 to 0\.8700\)"),
        ((0.90, 0.10), (0.40, 0.30), r"-20% of the lost .*; clean top-1 fell"),
    ],
)
def test_a_model_is_promoted_if_it_wins_back_enough_and_loses_little(
    clean: tuple[float, float], drifted: tuple[float, float], why: str | None
) -> None:
    reason = objection(Accuracies(*clean, *drifted, clean[0], 100, 100, 100), PARAMS)
    if why is None:
        assert reason is None
    else:
        assert reason is not None
        assert re.search(why, reason)


@pytest.mark.parametrize(
    ("drifted", "num_held_out", "why"),
    [
        (0.40, 100, None),
        (0.85, 300, None),  # 5 points, three standard errors
        (0.90, 300, "the labelled images show no damage: .* or the alarm was false"),
        (0.95, 300, "the labelled images show no damage"),
        (0.896, 300, r"do not show damage: top-1 is 0\.8960 on the 300 held-out ones and 0\.9000 .* may be chance"),
        (0.0, 1, r"may be chance \(p = 0\.10, Fisher's exact test\); label more images"),
    ],
)
def test_what_may_be_chance_is_no_damage(drifted: float, num_held_out: int, why: str | None) -> None:
    reason = no_damage(Accuracies(0.9, 0.9, drifted, drifted, 0.9, 2000, num_held_out, 2000))
    assert (reason is None) == (why is None)
    assert why is None or re.search(why, reason or "")


def test_a_harder_class_is_no_damage() -> None:
    """Half of class 1 are misread, clean or not: where production sees nothing else, that is no drift."""
    clean = np.repeat([0, 1], [900, 100])
    clean_right = (clean == 0) | (np.arange(1000) % 2 == 0)
    for drifted, drifted_right, lost, is_damage in (
        (np.full(100, 1), np.arange(100) % 2 == 0, 0.0, False),
        (np.full(100, 1), np.arange(100) % 4 == 0, 0.25, True),
        (clean[::10], clean_right[::10], 0.0, False),
    ):
        found = count(clean, drifted, (clean_right, drifted_right), (clean_right, drifted_right))
        assert found.lost == pytest.approx(lost, abs=0.06)
        assert (no_damage(found) is None) == is_damage
    assert (found.num_clean, found.num_matched) == (1000, 1000)
    alone = count(clean, np.full(100, 1), (clean_right, clean_right[:100]), (clean_right, clean_right[:100]))
    assert (alone.clean_before, alone.matched_before, alone.num_matched) == (0.95, 0.5, 100)


@pytest.mark.parametrize("num_classes", range(2, 40))
def test_rounding_is_no_damage(num_classes: int) -> None:
    """Nothing is misread, or the same share of every class; the classes' shares are no round numbers."""
    drifted = np.repeat(np.arange(num_classes), np.arange(num_classes) % 5 + 12)
    clean = np.repeat(np.arange(num_classes), 12)
    for every in (1, 3):
        right = np.arange(len(drifted)) % every == 0
        found = count(drifted, drifted, (right, right), (right, right))
        assert found.lost == 0
        assert "show no damage" in (no_damage(found) or "")
    perfect = (np.full(len(clean), True), np.full(len(drifted), True))
    assert count(clean, drifted, perfect, perfect).lost == 0


@pytest.mark.parametrize(
    ("status", "high", "refused"),
    [("harmful", 0.84, True), ("harmful", 0.86, False), ("benign", 0.84, False), ("ok", 0.84, False)],
)
def test_the_monitor_forbids_a_promotion_where_even_the_upper_end_is_harm(
    status: str, high: float, refused: bool
) -> None:
    verdict = {"status": status, "interval": [0.7, high], "clean_accuracy": 0.9, "max_drop": 0.05}
    assert (doubt(verdict) is not None) == refused


# --- labelled images ----------------------------------------------------------------------------------------------


def open_labelled(path: Path, tmp_path: Path, held_out: float = 0.3) -> labelled.LabelledSet:
    with labelled.open_folder(path, LIMITS, tmp_path, ["cat", "cow", "dog"], held_out) as images:
        return images


def flat(count: int = 40) -> dict[str, bytes]:
    return {
        f"{name}/{i}.jpg": encoded(picture(100 * k + i)) for k, name in enumerate(("cat", "dog")) for i in range(count)
    }


def test_images_by_class_are_split_by_a_hash_of_their_content(tmp_path: Path) -> None:
    images = open_labelled(write_files(tmp_path / "labels", flat()), tmp_path)
    held_out = {image[1:3] for image in images.images if image.split == "val"}
    assert 14 <= len(held_out) <= 34  # 24 of 80 expected
    assert images.count("train") == 80 - len(held_out)
    # half of the images, one folder down, in an archive: the same sides
    some = {f"mine/{name}": content for name, content in flat(20).items()}
    with tarfile.open(tmp_path / "labels.tgz", "w:gz") as tar:
        tar.add(write_files(tmp_path / "some", some), arcname=".")
    again = open_labelled(tmp_path / "labels.tgz", tmp_path)
    kept = {(name.split("/")[1], name.split("/")[2]) for name in some}
    assert {image[1:3] for image in again.images if image.split == "val"} == held_out & kept
    assert again.key != images.key
    # copies under other names are on the side of the first
    copies = {name.replace("/", "/copy-"): content for name, content in flat().items()}
    more = open_labelled(write_files(tmp_path / "copies", copies), tmp_path)
    assert {(c, name.removeprefix("copy-")) for split, c, name, *_ in more.images if split == "val"} == held_out


def test_images_that_are_split_already_are_taken_as_they_are(tmp_path: Path) -> None:
    images = open_labelled(write_files(tmp_path / "labels", image_files(num_train=3, num_val=2)), tmp_path)
    assert (images.count("train"), images.count("val")) == (6, 4)


BAD_LABELS: dict[str, tuple[dict[str, bytes], str]] = {
    "unknown class": (flat() | {"cou/0.jpg": encoded(picture())}, r"unknown class cou \(the source's: cat, cow, dog\)"),
    "a text": (flat() | {"cat/text.jpg": b"<html>"}, r"cat/text\.jpg: is not an image"),
    "no classes": ({f"{i}.jpg": encoded(picture(i)) for i in range(3)}, "no image found"),
    "too deep": (flat() | {"cat/more/0.jpg": encoded(picture())}, r"'cat/more/0\.jpg' is not at <class>/<image>"),
    "too few": ({"cat/0.jpg": encoded(picture())}, r"1 labelled images, none of them to (train on|hold out)"),
    "nothing held out": (image_files() | {"val/cat/.DS_Store": b""}, "none of them to hold out"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_refused_by_name(case: str, tmp_path: Path) -> None:
    content, message = BAD_LABELS[case]
    if case == "nothing held out":
        content = {name: image for name, image in content.items() if name.startswith("train") or "DS_Store" in name}
    with pytest.raises(InputError, match=message):
        open_labelled(write_files(tmp_path / "labels", content), tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--labels: .*nowhere: no such file or folder"):
        open_labelled(tmp_path / "nowhere", tmp_path)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def test_the_archive_is_named_by_its_content_and_keeps_earlier_images(tmp_path: Path) -> None:
    with labelled.open_folder(write_files(tmp_path / "a", flat()), LIMITS, tmp_path, ["cat", "dog"], 0.3) as first:
        one = labelled.write_archive(first, [], tmp_path / "cache")
        assert labelled.write_archive(first, [], tmp_path / "other").path.name == one.path.name
        earlier = [labelled.LabelledImage("val", "dog", "01234567-0.jpg", lambda: b"earlier")]
        both = labelled.write_archive(first, earlier, tmp_path / "cache")
    assert one.path.name == f"labelled-{one.sha256[:16]}.tar"
    assert members(both.path) == members(one.path) | {"val/dog/01234567-0.jpg": b"earlier"}
    for name, content in members(one.path).items():
        assert Path(name).name.startswith(f"{hashlib.sha256(content).hexdigest()[:8]}-")
    # a folder that has grown, beside what an earlier retraining has added of it: everything once
    files = flat() | {"cat/new.jpg": encoded(picture(999))}
    present = present_of(one.path)
    with labelled.open_folder(write_files(tmp_path / "b", files), LIMITS, tmp_path, ["cat", "dog"], 0.3) as grown:
        more = labelled.write_archive(grown, present, tmp_path / "grown")
    assert len(members(more.path)) == len(files) == len(members(one.path)) + 1
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted([one.path.name, both.path.name])


def present_of(archive: Path) -> list[labelled.LabelledImage]:
    """What `current_extra` has when the archive has been promoted."""
    images = []
    for path, content in members(archive).items():
        split, class_name, name = path.split("/")
        digest = hashlib.sha256(content).hexdigest()
        images.append(labelled.LabelledImage(split, class_name, name, partial(bytes, content), digest=digest))
    return images


def test_an_image_stays_on_the_side_where_an_earlier_retraining_had_it(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "labels", flat())
    with labelled.open_folder(folder, LIMITS, tmp_path, ["cat", "dog"], 0.3) as first:
        one = labelled.write_archive(first, [], tmp_path / "cache")
    write_files(folder, {f"cat/new-{i}.jpg": encoded(picture(900 + i)) for i in range(40)})
    with labelled.open_folder(folder, LIMITS, tmp_path, ["cat", "dog"], 0.9, present_of(one.path)) as again:
        two = labelled.write_archive(again, present_of(one.path), tmp_path / "cache")
        sides = {image[1:3]: image.split for image in again.images}
    before, after = members(one.path), members(two.path)
    assert before.items() <= after.items()
    assert {sides[image[1:3]] for image in first.images if image.split == "train"} == {"train"}
    assert len(after) == len(before) + 40
    assert sum(name.startswith("val/") for name in after) > sum(name.startswith("val/") for name in before) + 20


def test_an_image_that_an_earlier_retraining_had_on_both_sides_is_trained_on(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "labels", flat())
    with labelled.open_folder(folder, LIMITS, tmp_path, ["cat", "dog"], 0.3) as first:
        one = labelled.write_archive(first, [], tmp_path / "cache")
    present = present_of(one.path)
    present.append(next(image for image in present if image.split == "train")._replace(split="val"))
    with labelled.open_folder(folder, LIMITS, tmp_path, ["cat", "dog"], 0.3, present) as again:
        assert [image[:3] for image in again.images] == [image[:3] for image in first.images]


def test_a_label_that_was_corrected_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "labels", flat())
    with labelled.open_folder(folder, LIMITS, tmp_path, ["cat", "dog"], 0.3) as first:
        one = labelled.write_archive(first, [], tmp_path / "cache")
    (folder / "cat/3.jpg").rename(folder / "dog/was-a-cat.jpg")
    with labelled.open_folder(folder, LIMITS, tmp_path, ["cat", "dog"], 0.3, present_of(one.path)) as again:
        two = labelled.write_archive(again, present_of(one.path), tmp_path / "cache")
    assert sorted(members(two.path).values()) == sorted(members(one.path).values())
    (moved,) = members(two.path).keys() - members(one.path).keys()
    assert moved.endswith("-was-a-cat.jpg")
    assert moved.split("/")[1] == "dog"


def test_what_is_trained_on_cannot_be_held_out(tmp_path: Path) -> None:
    files = image_files(num_train=3, num_val=2)
    on_both_sides = files | {"val/cat/copy.jpg": files["train/cat/1.jpg"]}
    with pytest.raises(InputError, match=r"val/cat/copy\.jpg is to be held out, and is trained on, too"):
        open_labelled(write_files(tmp_path / "labels", on_both_sides), tmp_path)
    with labelled.open_folder(write_files(tmp_path / "a", files), LIMITS, tmp_path, ["cat", "dog"], 0.3) as first:
        one = labelled.write_archive(first, [], tmp_path / "cache")
    swapped = {
        name.replace("train", "x").replace("val", "train").replace("x", "val"): content
        for name, content in files.items()
    }
    folder = write_files(tmp_path / "b", swapped)
    with (
        pytest.raises(
            InputError, match=r"val/cat/0\.jpg is to be held out, and is trained on, too, here or by an earl"
        ),
        labelled.open_folder(folder, LIMITS, tmp_path, ["cat", "dog"], 0.3, present_of(one.path)),
    ):
        pass


def test_earlier_images_are_taken_from_what_extract_wrote(workspace: Path) -> None:
    further = write_files(
        workspace / "more", {"train/star/1.jpg": encoded(picture()), "val/star/1.jpg": encoded(picture(1))}
    )
    set_params(workspace / "params.yaml", {"data.extra": str(further)})
    extract.main(load_params(extract.Params))
    assert [image[:3] for image in labelled.current_extra()] == [("train", "star", "1.jpg"), ("val", "star", "1.jpg")]
    path = Path("data/raw/train.tar")
    content = bytearray(path.read_bytes())
    content[-11_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="data/raw: altered since extract wrote it"):
        labelled.current_extra()


def test_an_archive_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def read() -> bytes:
        raise OSError("gone")

    bad = labelled.LabelledSet("a", "a" * 8, [labelled.LabelledImage("train", "cat", "1.jpg", read)])
    with pytest.raises(OSError, match="gone"):
        labelled.write_archive(bad, [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_simulated_images_are_the_packs_corrupted_and_lossless(packed: Path) -> None:
    simulated = labelled.simulate("fog", 4, 1.0)
    meta = load_meta()
    assert {split: simulated.count(split) for split in ("train", "val")} == meta.num_images
    archive = labelled.write_archive(simulated, [], packed / "cache")
    assert labelled.write_archive(labelled.simulate("fog", 4, 1.0), [], packed / "cache") == archive
    pixels, labels, _ = load_split("val", meta)
    content = members(archive.path)[
        f"val/{meta.class_ids[labels[3]]}/{simulated.images[len(load_split('train', meta).labels) + 3].key}-0000003.png"
    ]
    expected = corrupt(pixels[3:4], "fog", 4, np.array([3]), 2)[0]
    assert (np.asarray(Image.open(io.BytesIO(content))) == expected).all()
    fewer = labelled.simulate("fog", 4, 0.5)
    assert 0.25 < fewer.count("train") / meta.num_images["train"] < 0.75
    assert fewer.count("val") == meta.num_images["val"]
    assert fewer.key != simulated.key


def test_another_simulation_of_a_kind_adds_no_image_twice(packed: Path) -> None:
    """A promotion changes the pack, as it holds what was added."""
    fewer = labelled.simulate("fog", 4, 0.5)
    present = present_of(labelled.write_archive(fewer, [], packed / "cache").path)
    meta = json.loads((PROCESSED / "meta.json").read_text())
    write_json(PROCESSED / "meta.json", meta | {"sha256": "0" * 64})
    everything = labelled.simulate("fog", 4, 1.0)
    both = members(labelled.write_archive(everything, present, packed / "cache").path)
    assert len(both) == len(everything.images)
    other = labelled.write_archive(labelled.simulate("fog", 3, 1.0), present, packed / "cache").path
    assert len(members(other)) == len(everything.images) + len(fewer.images)


def test_a_class_without_clean_images_is_named(packed: Path) -> None:
    """Where all of the source's are skipped as bad ones, and data.extra has some."""
    images = labelled.simulate("fog", 4, 1.0)
    assert len(Trial(images, load_params(Params)).clean.labels) == load_meta().num_images["val"]
    names = json.loads((PROCESSED / "files.json").read_text())
    one = load_meta().class_ids[1]
    hidden = [name.replace("/", "/extra-") if name.startswith(f"{one}/") else name for name in names["val"]]
    write_json(PROCESSED / "files.json", names | {"val": hidden})
    with pytest.raises(InputError, match=f"no clean validation image of {one} is left"):
        Trial(images, load_params(Params))


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["~/a b/c=d,e.tar", "it's [1]{2}", None, True, 3, 1e-05, 0.003])
def test_values_reach_params_yaml_as_they_are(value: experiment.Value, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("data:\n  extra:\n")
    apply_overrides(path, [f"data.extra={experiment._quoted(value)}"])
    yaml: dict[str, Any] = experiment.YAML(typ="safe").load(path.read_text())
    assert yaml == {"data": {"extra": value}}


def test_the_name_of_an_experiment_tells_what_goes_into_it() -> None:
    name = experiment.experiment_name("a" * 40, {"data.extra": "x", "train.lr": 0.1})
    assert name == experiment.experiment_name("a" * 40, {"train.lr": 0.1, "data.extra": "x"})
    assert name != experiment.experiment_name("b" * 40, {"data.extra": "x", "train.lr": 0.1})
    assert name != experiment.experiment_name("a" * 40, {"data.extra": "x", "train.lr": 0.2})


# --- repositories -------------------------------------------------------------------------------------------------


def state(repository: Path) -> dict[str, Any]:
    """All that a run must leave alone unless it promotes."""
    return {
        "git": [run(repository, "git", *words).stdout for words in (["status", "--porcelain"], ["rev-parse", "HEAD"],
                ["tag"], ["branch"], ["stash", "list"])],
        "files": files(repository / "models", repository / "data/raw", repository / "data/processed"),
        "params": (repository / "params.yaml").read_text(),
    }  # fmt: skip


def retrain_command(images: Path, labels: Path, summary: Path | None = None, *more: str) -> list[str]:
    out = ["--json", str(summary)] if summary else []
    return ["python", "-m", "tools.retrain", str(images), "--labels", str(labels), *out, *more]


def test_changes_that_are_not_committed_are_refused_by_name(repository: Path, tmp_path: Path) -> None:
    labels = write_files(tmp_path / "labels", {f"circle/{i}.jpg": encoded(picture(i)) for i in range(20)})
    set_params(repository / "params.yaml", {"train.epochs": 3})
    before = state(repository)
    result = run(repository, *retrain_command(labels, labels), check=False)
    assert result.returncode == 2
    assert result.stderr == "retrain: error: changes that are not committed: params.yaml; commit or stash them first\n"
    assert state(repository) == before
    run(repository, "git", "checkout", "-q", "params.yaml")
    run(repository, "git", "rm", "-q", "--cached", "metrics/evaluate.json")
    run(repository, "git", "commit", "-qm", "forgotten")
    result = run(repository, *retrain_command(labels, labels), check=False)
    assert result.returncode == 2
    assert "results that git does not track yet: metrics/evaluate.json; commit them first" in result.stderr
    run(repository, "git", "add", "metrics")
    set_params(repository / "params.yaml", {"train.epochs": 3})
    run(repository, "git", "commit", "-qam", "not run")
    result = run(repository, *retrain_command(labels, labels), check=False)
    assert result.returncode == 2
    assert "data and models are not those of the last commit: train" in result.stderr


def child_of(process: subprocess.Popen[str], *words: str) -> psutil.Process:
    """The child that runs a command with these words, once it is there."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        assert process.poll() is None, process.communicate()[0]
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if set(words) <= set(child.cmdline()):
                    found.append(child)
        return bool(found)

    wait_until(is_there)
    return found[0]


def test_sigterm_ends_it_with_its_monitor_and_leaves_nothing_temporary(repository: Path, tmp_path: Path) -> None:
    labels = write_files(tmp_path / "labels", {f"circle/{i}.jpg": encoded(picture(i)) for i in range(20)})
    scratch = repository / ".dvc/tmp/retrain/scratch"
    write_files(scratch, {"of-a-killed-run/source.tar": b"old"})
    before = state(repository)
    process = start(repository, *retrain_command(labels, labels))
    monitor = child_of(process, "tools.monitor")
    assert [path.name for path in scratch.iterdir() if path.name != "of-a-killed-run"] != []
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (143, "retrain: stopped by SIGTERM; run the same command again\n")
    assert not monitor.is_running()
    assert not list(scratch.iterdir())
    assert state(repository) == before


RUN_EXPERIMENT = """
from tools.retrain import experiment
from tools.shared.process import run_tool

def main():
    with experiment.only_run() as lock:
        head = experiment.check_repository()
        print(experiment.run_experiment("retrain-x", head, {"train.epochs": 3}, lock), flush=True)

run_tool(main, "retrain")
"""


@pytest.mark.slow
def test_sigterm_to_the_tool_leaves_its_dvc_at_work_and_the_next_run_waits_for_it(repository: Path) -> None:
    before = state(repository)
    process = start(repository, sys.executable, "-c", RUN_EXPERIMENT)
    dvc = child_of(process, "dvc", "exp", "run")
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 143
    assert dvc.is_running()
    again = start(repository, sys.executable, "-c", RUN_EXPERIMENT)
    words = process.communicate(timeout=PATIENCE)[0]  # dvc writes into the same pipe: until it has ended
    assert "retrain: dvc is still at work on retrain-x; the same command waits for it\n" in words
    assert "retrain: stopped by SIGTERM; run the same command again\n" in words
    assert "Traceback" not in words
    words = again.communicate(timeout=PATIENCE)[0]
    assert "retrain: another run is under way here, or its experiment still is; waiting for it\n" in words
    assert "retrain: experiment retrain-x has ended before; it is taken as it is\n" in words
    assert again.returncode == 0
    assert state(repository) == before


def test_told_to_stop_in_the_moment_in_which_dvc_begins(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal may come before the call that starts dvc has returned: dvc goes on, and the tool says so."""
    begun: list[subprocess.Popen[bytes]] = []

    class Signalled(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if "dvc" in args[0]:  # and not git
                signal.raise_signal(signal.SIGINT)
                begun.append(self)

    monkeypatch.chdir(repository)
    before = state(repository)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest ignore it
    try:
        with experiment.only_run() as lock:
            head = experiment.check_repository()
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(subprocess, "Popen", Signalled)
                experiment.run_experiment("retrain-x", head, {"train.no_such_key": 3}, lock)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().out == "retrain: dvc is still at work on retrain-x; the same command waits for it\n"
    assert begun[0].wait(timeout=PATIENCE) > 0  # of its own: the key is refused
    assert state(repository) == before


def test_a_killed_dvc_leaves_no_overrides_behind(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For some moments, `dvc exp run --temp` has its overrides in the workspace."""
    monkeypatch.chdir(repository)
    before = state(repository)
    for also in ({}, {"train.seed": 9}):
        with experiment.only_run():
            (repository / ".dvc/tmp/retrain/overrides.json").write_text(json.dumps({"train.lr": 0.5}))
            set_params(repository / "params.yaml", {"train.lr": 0.5} | also)
            run(repository, "git", "add", "params.yaml")
            if also:  # somebody's own change: not ours to take back
                with pytest.raises(InputError, match=r"not committed: params\.yaml"):
                    experiment.check_repository()
            else:
                experiment.check_repository()
                assert state(repository) == before


def test_a_lock_that_somebody_changed_is_not_taken_back(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    with experiment.only_run():
        (repository / ".dvc/tmp/retrain/overrides.json").write_text(json.dumps({"train.lr": 0.5}))
        own = (repository / "dvc.lock").read_text() + "# mine\n"
        (repository / "dvc.lock").write_text(own)
        with pytest.raises(InputError, match=r"not committed: dvc\.lock"):
            experiment.check_repository()
    assert (repository / "dvc.lock").read_text() == own


def test_only_folders_of_the_same_experiment_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dvc leaves the folders of killed runs, some of them before params.yaml was whole."""
    monkeypatch.chdir(tmp_path)
    root = ".dvc/tmp/exps/standalone"
    others = [b"", b"train: {lr", b"train:\n  lr: 0.4\n", b"train: 3\n", b"\xff"]
    write_files(tmp_path, {f"{root}/tmp{i}/params.yaml": content for i, content in enumerate(others)})
    write_files(tmp_path, {f"{root}/tmp6/params.yaml": b"train:\n  lr: 0.5\n  seed: 0\n"})
    experiment._remove_leftovers({"train.lr": 0.5})
    assert sorted(path.name for path in Path(root).iterdir()) == [f"tmp{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("ends", "kind", "says"),
    [
        ("kill -9 $$", Stopped, r"the monitor was ended by signal 9 \(out of memory\?\); run the same command again"),
        (
            "echo 'monitor: error: No space left on device' >&2; exit 1",
            ConnectionError,
            "^monitor: error: No space left",
        ),
        ("echo 'Traceback' >&2; exit 1", RuntimeError, "the monitor ended with exit status 1: Traceback"),
        ("echo 'monitor: error: no images' >&2; exit 2", InputError, "^no images$"),
    ],
)
def test_a_monitor_without_a_verdict(
    ends: str, kind: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = tmp_path / "python"
    monitor.write_text(f"#!/bin/sh\n{ends}\n")
    monitor.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(monitor))
    with pytest.raises(kind, match=says):
        _ask_monitor("images", tmp_path)


def break_off(repository: Path, at: str, facts: dict[str, Any]) -> str:
    """Leave a promotion as it is when it is killed at some point; returns the commit that was to be promoted."""
    write_files(repository, {"retrain/labelled-0000000000000000.tar": b"old"})
    run(repository, "dvc", "add", "-q", "retrain/labelled-0000000000000000.tar")
    run(repository, "git", "add", "-A")
    run(repository, "git", "commit", "-qm", "an earlier retraining")
    head = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    set_params(repository / "params.yaml", {"evaluate.num_bins": 10})
    run(repository, "dvc", "repro", "evaluate")
    (repository / "new.txt").write_text("added by the experiment")
    run(repository, "git", "rm", "-q", "retrain/labelled-0000000000000000.tar.dvc")
    write_files(repository, {"retrain/labelled-11507a0e2f5e69d5.tar": b"new"})
    run(repository, "dvc", "add", "-q", "retrain/labelled-11507a0e2f5e69d5.tar")
    run(repository, "git", "add", "-A")
    run(repository, "git", "commit", "-qm", "experiment")
    commit = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    run(repository, "git", "reset", "-q", "--hard", head)
    (repository / "retrain/labelled-11507a0e2f5e69d5.tar").write_text("overwritten meanwhile")
    whole = run(repository, "git", "show", f"{commit}:params.yaml").stdout
    (repository / ".dvc/tmp/retrain").mkdir(parents=True, exist_ok=True)
    (repository / ".dvc/tmp/retrain/promotion.json").write_text(
        json.dumps({"head": head, "commit": commit, "facts": facts})
    )
    if at == "half-written":
        (repository / "params.yaml").write_text(whole[: len(whole) // 2])
        (repository / "new.txt").write_text("added by")
        (repository / "retrain/labelled-11507a0e2f5e69d5.tar.dvc").write_text("outs:")
        (repository / "retrain/labelled-11507a0e2f5e69d5.tar").unlink()
        (repository / "dvc.lock").unlink()
    elif at != "before":
        run(repository, "git", "merge", "--ff-only", "-q", commit)
    if at == "tagged":
        run(repository, "gto", "register", "classifier", commit)
    return commit


@pytest.mark.slow
@pytest.mark.parametrize("at", ["before", "half-written", "merged", "tagged"])
def test_a_promotion_that_was_broken_off_is_finished(
    at: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    facts = {"experiment": "retrain-x"}
    commit = break_off(repository, at, facts)
    run(repository, "git", "config", "merge.verifySignatures", "true")  # a commit of ours has none
    with experiment.only_run():
        assert experiment.finish_promotion() == facts | {"commit": commit, "tag": "classifier@v0.0.1"}
        assert experiment.finish_promotion() == facts | {"commit": commit, "tag": "classifier@v0.0.1"}
        experiment.forget_promotion()
        assert experiment.finish_promotion() is None
    assert run(repository, "git", "rev-parse", "HEAD").stdout.strip() == commit
    assert run(repository, "git", "tag").stdout.split() == ["classifier@v0.0.1"]
    assert run(repository, "git", "status", "--porcelain").stdout == ""
    assert run(repository, "dvc", "status", "train", "evaluate").stdout.strip() == "Data and pipelines are up to date."
    kept_now = files(repository / "retrain")
    assert {name: kept_now[name] for name in kept_now if name.endswith(".tar")} == {
        "labelled-11507a0e2f5e69d5.tar": b"new"
    }


@pytest.mark.slow
def test_the_same_command_finishes_a_promotion_that_left_half_of_params_yaml(repository: Path, tmp_path: Path) -> None:
    command = retrain_command(tmp_path / "images", tmp_path / "labels", tmp_path / "summary.json")
    asked = {"images": str(tmp_path / "images"), "labels": str(tmp_path / "labels"), "simulate": None}
    facts = {**asked, "start": "current", "experiment": "retrain-x", "decision": "promoted", "reason": "it is better"}
    commit = break_off(repository, "half-written", facts)
    result = run(repository, *command)
    assert "the promotion of retrain-x, which was broken off, is finished" in result.stdout
    assert json.loads((tmp_path / "summary.json").read_text())["commit"] == commit
    assert run(repository, "git", "rev-parse", "HEAD").stdout.strip() == commit
    assert run(repository, "git", "status", "--porcelain").stdout == ""


def test_a_file_that_somebody_changed_meanwhile_is_not_overwritten(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    head = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    set_params(repository / "params.yaml", {"evaluate.num_bins": 10})
    run(repository, "git", "commit", "-qam", "experiment")
    commit = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    run(repository, "git", "reset", "-q", "--hard", head)
    set_params(repository / "params.yaml", {"evaluate.num_bins": 11})
    with experiment.only_run():
        (repository / ".dvc/tmp/retrain/promotion.json").write_text(
            json.dumps({"head": head, "commit": commit, "facts": {"experiment": "retrain-x"}})
        )
        with pytest.raises(InputError, match=r"params\.yaml was changed during a promotion"):
            experiment.finish_promotion()
    assert "num_bins: 11" in (repository / "params.yaml").read_text()


def test_nothing_is_promoted_over_work_that_was_done_meanwhile(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    head = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    set_params(repository / "params.yaml", {"evaluate.num_bins": 11})
    before = state(repository)
    with pytest.raises(experiment.ExperimentError, match=r"params\.yaml changed while the experiment ran"):
        experiment.promote(head, head, "message", {"experiment": "retrain-x"})
    assert state(repository) == before
    run(repository, "git", "commit", "-qam", "work")
    with pytest.raises(experiment.ExperimentError, match="HEAD moved while the experiment ran"):
        experiment.promote(head, head, "message", {"experiment": "retrain-x"})
    (repository / "new.txt").write_text("mine")
    head = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    run(repository, "git", "add", "new.txt")
    run(repository, "git", "commit", "-qm", "experiment")
    added = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    run(repository, "git", "reset", "-q", head)
    with pytest.raises(experiment.ExperimentError, match=r"new\.txt: not tracked by git, and in the way"):
        experiment.promote(head, added, "message", {"experiment": "retrain-x"})
    assert experiment.finish_promotion() is None


def test_the_pointers_are_those_of_dvc_add_and_the_workspace_stays_as_it_was(small: Path, tmp_path: Path) -> None:
    written = {
        "labelled-0000000000000000.tar.dvc": b"outs: []\n",
        "labelled-21b2eed1e328a2c6.tar": b"images",
        "weights-e3b0c44298fc1c14.safetensors": b"",
    }
    written |= {"labelled-mine.tar.dvc": b"outs: []\n", "ä/labelled-c.tar.dvc": b"outs: []\n"}
    write_files(small / "retrain", {".gitignore": (ROOT / "retrain/.gitignore").read_bytes()} | written)
    run(small, "git", "add", "-A")
    run(small, "git", "commit", "-qm", "before")
    (tmp_path / "scratch").mkdir()
    needed = [Path("retrain/labelled-21b2eed1e328a2c6.tar"), Path("retrain/weights-e3b0c44298fc1c14.safetensors")]
    assert kept.altered(needed) == []
    tree = kept.tree_with_pointers("HEAD", kept.into_cache(needed), tmp_path / "scratch")
    assert run(small, "git", "status", "--porcelain").stdout == ""
    assert not any((tmp_path / "scratch").iterdir())
    changes = run(
        small, "git", "-c", "core.quotePath=off", "diff", "--name-status", "--no-renames", "HEAD", tree
    ).stdout
    assert changes.splitlines() == [
        "D\tretrain/labelled-0000000000000000.tar.dvc",
        "A\tretrain/labelled-21b2eed1e328a2c6.tar.dvc",
        "A\tretrain/weights-e3b0c44298fc1c14.safetensors.dvc",
    ]
    for file in needed:
        run(small, "dvc", "add", "--quiet", str(file))
        assert run(small, "git", "show", f"{tree}:{file}.dvc").stdout == Path(f"{file}.dvc").read_text()


def test_a_promotion_hands_its_files_to_dvc_and_the_next_one_takes_their_place(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)

    def git(*words: str) -> str:
        return run(repository, "git", *words).stdout.strip()

    for number in ("1", "2"):
        head = git("rev-parse", "HEAD")
        needed = Path(f"retrain/labelled-{hashlib.sha256(number.encode()).hexdigest()[:16]}.tar")
        write_files(repository, {"note.txt": number.encode(), str(needed): number.encode()})
        git("add", "note.txt")
        git("commit", "-qm", "experiment")
        made = git("rev-parse", "HEAD")
        git("reset", "-q", "--hard", head)
        with experiment.only_run():
            assert experiment.promote(head, made, "message", {"experiment": "x"}, [needed])["tag"]
            experiment.forget_promotion()
        assert git("status", "--porcelain") == ""
        assert {path.name for path in Path("retrain").iterdir()} == {
            ".gitignore",
            needed.name,
            f"{needed.name}.dvc",
        }
        needed.unlink()
        run(repository, "dvc", "checkout", "--quiet")
        assert needed.read_text() == number
    # what somebody changed meanwhile is not handed on
    needed.write_text("other")
    with pytest.raises(experiment.ExperimentError, match=f"{needed} changed while the experiment ran"):
        experiment.promote(git("rev-parse", "HEAD"), made, "message", {"experiment": "x"}, [needed])
    assert not (repository / ".dvc/tmp/retrain/promotion.json").exists()
    run(repository, "dvc", "checkout", "--quiet", "--force")
    git("reset", "-q", "--hard", "HEAD~1")
    run(repository, "dvc", "checkout", "--quiet", "retrain/labelled-6b86b273ff34fce1.tar.dvc")
    assert Path("retrain/labelled-6b86b273ff34fce1.tar").read_text() == "1"


# --- the whole loop -----------------------------------------------------------------------------------------------

CLASSES = ("bars", "checks", "rungs", "slants")
KIND, SEVERITY = "darkness", 5  # a model trained on bright images loses half of its accuracy to it


def pattern(label: int, seed: int, size: int = 32) -> NDArray[np.uint8]:
    """Stripes of a class's direction in two random colours: learnt in seconds."""
    rng = np.random.default_rng([label, seed])
    y, x = np.mgrid[:size, :size]
    period, phase = rng.uniform(6, 10), rng.uniform(0, 6)
    waves = [np.sin(2 * np.pi * t / period + phase) for t in (x, y, (x + y) / 2**0.5)]
    share = (
        0.5
        + 0.5 * {"bars": waves[0], "rungs": waves[1], "slants": waves[2], "checks": waves[0] * waves[1]}[CLASSES[label]]
    )
    first = rng.uniform(0, 1, 3)
    second = (first + rng.uniform(0.3, 0.7, 3)) % 1
    pixels = share[..., None] * first + (1 - share[..., None]) * second + rng.normal(0, 0.03, (size, size, 3))
    image: NDArray[np.uint8] = np.clip(255 * pixels, 0, 255).astype(np.uint8)
    return image


def patterns(folder: Path, count: int, first: int, corruption: tuple[str, int] | None = None, shift: int = 0) -> Path:
    """Write `count` images of each class under <class>/, all wrong ones where `shift` is not 0."""
    for label, name in enumerate(CLASSES):
        (folder / CLASSES[(label + shift) % len(CLASSES)]).mkdir(parents=True, exist_ok=True)
        for seed in range(first, first + count):
            pixels = pattern(label, seed)[None]
            if corruption is not None:
                pixels = corrupt(pixels, *corruption, np.array([seed]), seed=3)
            Image.fromarray(pixels[0]).save(folder / CLASSES[(label + shift) % len(CLASSES)] / f"{name}-{seed}.png")
    return folder


@pytest.fixture(scope="session")
def at_work(make_repository: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository whose good model is at work (`repository`), and images that it meets."""
    folder = tmp_path_factory.mktemp("at-work")
    patterns(folder / "source/train", 100, 0)
    patterns(folder / "source/val", 100, 1000)
    patterns(folder / "clean", 15, 2000)
    patterns(folder / "drifted", 15, 3000, (KIND, SEVERITY))
    patterns(folder / "labels", 60, 4000, (KIND, SEVERITY))
    patterns(folder / "wrong-labels", 60, 4000, (KIND, SEVERITY), shift=1)
    made = make_repository(
        data__source=str(folder / "source"),
        train__epochs=8,
        train__log_every=10,
        runtime__checkpoint_steps=5,
        drift__window_sizes=[10, 30],
        drift__axes=32,
        drift__null_windows=199,
        drift__images_per_condition=20,
        drift__fit_images=60,
        drift__resplits=2,
    )
    run(made, "dvc", "repro")
    run(made, "git", "add", "-A")
    run(made, "git", "commit", "-qm", "at work")
    shutil.move(made, folder / "repository")
    return folder


@pytest.fixture
def own(at_work: Path, tmp_path: Path) -> Path:
    """A copy of the repository."""
    shutil.copytree(at_work / "repository", tmp_path / "own", symlinks=True)
    run(tmp_path / "own", "git", "status")  # the copies' times go into the index
    return tmp_path / "own"


@pytest.fixture(scope="session")
def promoted(at_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which the whole loop has run, with some of the labelled images among production's (`met`).

    These, and summary.json, lie beside it.
    """
    folder = tmp_path_factory.mktemp("promoted") / "repository"
    shutil.copytree(at_work / "repository", folder, symlinks=True)
    met = shutil.copytree(at_work / "drifted", folder.parent / "met")
    for path in (at_work / "labels").glob("*/*-400[0-3].png"):
        shutil.copy(path, met)
    run(folder, *retrain_command(met, at_work / "labels", folder.parent / "summary.json"))
    return folder


def tree(repository: Path) -> str:
    return run(repository, "git", "rev-parse", "HEAD^{tree}").stdout.strip()


@pytest.mark.slow
def test_harmful_drift_ends_in_a_promoted_model(promoted: Path, at_work: Path, tmp_path: Path) -> None:
    summary = json.loads((promoted.parent / "summary.json").read_text())
    assert (summary["decision"], summary["tag"]) == ("promoted", "classifier@v0.0.1")
    assert summary["monitor"]["status"] == "harmful"
    assert summary["confirmation"]["status"] != "harmful"
    found = summary["accuracy"]
    assert found["clean_before"] - found["drifted_before"] > 0.3
    assert summary["recovered_share"] >= 0.7
    assert summary["clean_loss"] <= 0.02
    assert (found["num_clean"], found["num_drifted"]) == (400, summary["labelled"]["num_held_out"])
    # what the new model was trained on is no proof that it reads what production sees
    archive = members(promoted / summary["overrides"]["data.extra"])
    trained_on = {content for name, content in archive.items() if name.startswith("train/")}
    met = [path.read_bytes() in trained_on for path in (promoted.parent / "met").rglob("*.png")]
    assert (summary["monitor"]["num_images"], sum(met)) == (len(met), sum(met) or "some")
    assert summary["confirmation"]["num_images"] == met.count(False)
    # one commit, of exactly what the experiment made and what DVC keeps; the workspace is what it says

    def git(*words: str) -> str:
        return run(promoted, "git", *words).stdout.strip()

    assert git("rev-list", "--count", f"{summary['commit_before']}..HEAD") == "1"
    assert git("rev-parse", "HEAD") == summary["commit"] == git("rev-parse", "classifier@v0.0.1^{commit}")
    needed = [summary["overrides"][key] for key in ("data.extra", "model.weights")]
    assert git("diff", "--name-only", summary["experiment_commit"], "HEAD").split() == [
        f"{name}.dvc" for name in needed
    ]
    assert git("status", "--porcelain") == ""
    assert run(promoted, "dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    assert summary["experiment"] in run(promoted, "dvc", "exp", "list", "--name-only", "--rev", "HEAD~1").stdout
    # and the alarm is over
    before = state(promoted)
    again = run(promoted, *retrain_command(at_work / "drifted", at_work / "labels", tmp_path / "again.json"))
    assert "retrain: nothing to do: " in again.stdout
    assert json.loads((tmp_path / "again.json").read_text())["decision"] == "nothing to do"
    assert state(promoted) == before


@pytest.mark.slow
def test_another_clone_pulls_what_a_retraining_started_from_and_makes_the_same(promoted: Path, tmp_path: Path) -> None:
    summary = json.loads((promoted.parent / "summary.json").read_text())
    run(promoted, "dvc", "remote", "add", "--local", "--default", "--force", "store", str(tmp_path / "store"))
    run(promoted, "dvc", "push", "--quiet")
    run(tmp_path, "git", "clone", "--quiet", str(promoted), "clone")
    clone = tmp_path / "clone"
    run(clone, "dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    refused = run(clone, "dvc", "repro", "--quiet", check=False)
    assert refused.returncode != 0
    assert (
        summary["overrides"]["model.weights"] in refused.stderr or summary["overrides"]["data.extra"] in refused.stderr
    )
    run(clone, "python", "-m", "tools.remote", "pull")
    for stage in ("extract", "preprocess", "train"):
        run(clone, "dvc", "repro", "--quiet", "--force", "--single-item", stage)
    assert run(clone, "git", "status", "--porcelain").stdout == ""
    # an experiment in a folder of its own finds the files, too, unless dvc is told to look after one stage only
    again = ("dvc", "exp", "run", "--temp", "-S", "data.max_files=1000000")
    assert "Running stage 'extract'" in run(clone, *again).stdout
    named = run(clone, *again, "--force", "extract", check=False)
    assert named.returncode != 0
    extra = summary["overrides"]["data.extra"]
    assert f"data.extra: '{extra}' is not here; DVC keeps it: `make pull` or `dvc checkout {extra}.dvc`" in named.stderr
    # our own commands name the files to dvc beside the stage
    for number, way in ((900000, "--temp"), (800000, "--queue")):
        run(clone, "python", "-m", "tools.exp", way, "--name", f"run{number}", f"data.max_files={number}", "extract")
    run(clone, "dvc", "exp", "run", "--run-all")
    assert {"run900000", "run800000"} <= {*run(clone, "dvc", "exp", "list", "--name-only").stdout.split()}
    assert run(clone, "git", "status", "--porcelain").stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["all", "tool", "tool, asked to stop"])
def test_a_run_that_is_killed_in_mid_train_ends_as_if_it_was_not(
    victim: str, own: Path, promoted: Path, at_work: Path, tmp_path: Path
) -> None:
    command = retrain_command(promoted.parent / "met", at_work / "labels", tmp_path / "summary.json")
    checkpoints = Path(load_params(Params, own / "params.yaml").runtime.cache_dir) / "checkpoints"
    process = start(own, *command)
    wait_until(lambda: any(checkpoints.glob("*/step-*.pt")))
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:  # dvc lives on, and the next run waits for it
        process.kill() if victim == "tool" else process.terminate()
    assert process.wait() == (143 if victim == "tool, asked to stop" else -signal.SIGKILL)
    result = run(own, *command)
    said = "train: goes on after step" if victim == "all" else "another run is under way here"
    assert said in result.stdout
    assert process.stdout is not None
    process.stdout.close()
    assert tree(own) == tree(promoted)
    assert run(own, "git", "tag").stdout == run(promoted, "git", "tag").stdout
    assert run(own, "git", "status", "--porcelain").stdout == ""
    ours, theirs = (json.loads((path.parent / "summary.json").read_text()) for path in (own, promoted))
    assert {**ours, "commit": None, "experiment_commit": None} == {**theirs, "commit": None, "experiment_commit": None}


@pytest.mark.slow
def test_a_recovery_that_fails_leaves_everything_as_it_was(own: Path, at_work: Path, tmp_path: Path) -> None:
    before = state(own)
    command = retrain_command(at_work / "drifted", at_work / "wrong-labels", tmp_path / "summary.json")
    result = run(own, *command, check=False)
    assert result.returncode == 1, result.stderr
    assert state(own) == before
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["decision"] == "not promoted"
    assert summary["reason"] in result.stdout
    assert "commit" not in summary
    assert "tag" not in summary


@pytest.mark.slow
def test_an_experiment_whose_stage_breaks_is_a_failure_and_no_verdict(own: Path, at_work: Path, tmp_path: Path) -> None:
    set_params(own / "params.yaml", {"retrain.lr": 1e30})
    run(own, "git", "commit", "-qam", "A learning rate that breaks training")
    before = state(own)
    command = retrain_command(at_work / "drifted", at_work / "labels", tmp_path / "summary.json")
    result = run(own, *command, check=False)
    assert result.returncode == 1, result.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["decision"] == "failed"
    assert "the model at work stays" in result.stdout
    assert state(own) == before


@pytest.mark.slow
def test_labelled_images_without_damage_start_nothing(own: Path, at_work: Path, tmp_path: Path) -> None:
    before = state(own)
    patterns(tmp_path / "labels", 60, 0)  # of the training set: not one is misread
    command = retrain_command(at_work / "drifted", tmp_path / "labels", tmp_path / "summary.json")
    result = run(own, *command, check=False)
    assert result.returncode == 1, result.stderr
    assert "the labelled images show no damage" in result.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy"]["drifted_before"] >= summary["accuracy"]["clean_before"] > 0.9
    assert state(own) == before
    assert run(own, "dvc", "exp", "list", "--name-only").stdout.strip() == ""


@pytest.mark.slow
def test_images_that_are_all_trained_on_prove_nothing_and_start_nothing(
    own: Path, at_work: Path, tmp_path: Path
) -> None:
    before = state(own)
    patterns(tmp_path / "labels/train", 15, 4000, (KIND, SEVERITY))
    patterns(tmp_path / "labels/val", 15, 5000, (KIND, SEVERITY))
    command = retrain_command(tmp_path / "labels/train", tmp_path / "labels", tmp_path / "summary.json")
    result = run(own, *command, check=False)
    assert result.returncode == 1, result.stderr
    said = "IMAGES leave nothing to prove the new model with, once those that it is trained on are left out"
    assert said in result.stdout
    assert "all 60 images are listed" in json.loads((tmp_path / "summary.json").read_text())["reason"]
    assert state(own) == before
    assert run(own, "dvc", "exp", "list", "--name-only").stdout.strip() == ""


@pytest.mark.slow
def test_drift_that_does_no_harm_starts_nothing(own: Path, at_work: Path, tmp_path: Path) -> None:
    before = state(own)
    patterns(tmp_path / "mild", 15, 5000, ("colour_cast", 5))
    patterns(tmp_path / "shifted", 40, 6000)
    for name in CLASSES[1:]:
        shutil.rmtree(tmp_path / "shifted" / name)
    verdicts = {}
    for images in (at_work / "clean", tmp_path / "mild", tmp_path / "shifted"):
        result = run(own, *retrain_command(images, at_work / "labels", tmp_path / "summary.json"))
        assert "retrain: nothing to do: " in result.stdout
        verdicts[images.name] = json.loads((tmp_path / "summary.json").read_text())["monitor"]
    assert {name: verdict["status"] for name, verdict in verdicts.items()} == {
        "clean": "ok",
        "mild": "benign",
        "shifted": "ok",
    }
    assert verdicts["shifted"]["label_shift"]["detected"]
    assert state(own) == before
    assert run(own, "dvc", "exp", "list", "--name-only").stdout.strip() == ""


@pytest.mark.slow
def test_bad_input_is_refused_before_anything_runs(own: Path, at_work: Path, tmp_path: Path) -> None:
    before = state(own)
    bad = write_files(tmp_path / "bad", {"bars/0.png": b"text", "bars/1.png": b""})
    for command, message in (
        (retrain_command(at_work / "drifted", bad), r"retrain: error: .*bars/\d\.png: is (empty|not an image)"),
        (retrain_command(at_work / "drifted", tmp_path / "nowhere"), r"retrain: error: --labels: .*no such file"),
        (retrain_command(tmp_path / "nowhere", at_work / "labels"), r"retrain: error: "),
    ):
        result = run(own, *command, check=False)
        assert result.returncode == 2
        assert re.match(message, result.stderr)
        assert "Traceback" not in result.stderr
    assert state(own) == before
