"""The monitor as a person runs it: verdicts and exit status, pages, streams, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages.core import detector as detectors
from stages.core.corruptions import corrupt
from stages.core.errors import InputError
from stages.core.features import Extractor
from tests.helpers import PATIENCE, encoded, run, set_params, start, truncated, wait_until, write_files
from tools.monitor import command as monitor
from tools.monitor import stream
from tools.monitor.stream import growing_folder, stream_alpha


@pytest.fixture
def production(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as working directory, and a folder of clean images of any size."""
    monkeypatch.chdir(repository)
    folder = tmp_path / "production"
    folder.mkdir()
    save(folder, np.load("data/processed/val_images.npy")[::5])
    return folder


def save(folder: Path, images: NDArray[np.uint8]) -> None:
    for number, image in enumerate(images):
        side = 32 + 8 * (number % 3)
        Image.fromarray(image).resize((side, side)).save(folder / f"{number:03}.png")


def noisy(count: int) -> NDArray[np.uint8]:
    images = np.load("data/processed/val_images.npy")[:count]
    return corrupt(images, "impulse_noise", 5, np.arange(count))


def test_drifted_images_raise_an_alarm_and_say_what_moved(production: Path, tmp_path: Path) -> None:
    drifted = tmp_path / "drifted"
    drifted.mkdir()
    for number, image in enumerate(noisy(12)):
        Image.fromarray(image).save(drifted / f"{number}.png")
    status = monitor.main([str(drifted), "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["status"] in ("benign", "harmful")
    assert status == monitor.EXIT_STATUS[report["status"]]
    assert report["p_value"] <= report["alpha"]
    assert report["num_images"] == 12
    assert {row["measure"] for row in report["moved"]} & {"noise", "colour_noise", "speckles", "image_distance"}
    assert report["interval"][0] <= report["estimated_accuracy"] <= report["interval"][1]
    assert (tmp_path / "r.html").read_text().count("data:image/jpeg;base64") == 12


def test_clean_images_do_not(production: Path, tmp_path: Path) -> None:
    packed = tmp_path / "clean.npy"
    np.save(packed, np.load("data/processed/val_images.npy")[1::9])
    assert monitor.main([str(packed)]) == 0


def test_the_exit_status_reaches_the_shell(production: Path, repository: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "noise.npy", noisy(12))
    ended = run(repository, "python", "-m", "tools.monitor", str(tmp_path / "noise.npy"), check=False)
    assert ended.returncode in (10, 20), ended.stderr
    assert "estimated accuracy" in ended.stdout


def test_a_corrupt_file_among_good_ones_is_left_out_by_name(
    production: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (production / "bad.jpg").write_bytes(truncated(encoded(Image.new("RGB", (64, 64), "red"))))
    archive = tmp_path / "all.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(production, "images")
    for place in (production, archive):
        monitor.main([str(place), "--json", str(tmp_path / "r.json")])
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["num_images"] == 12
        assert len(report["skipped"]) == 1
        assert "  1 left out, cannot be read: " in capsys.readouterr().out
        assert "bad.jpg" in report["skipped"][0]["path"]
        assert "cannot be" in report["skipped"][0]["reason"]


def test_more_images_than_can_be_tested_are_thinned(production: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "all.npy", np.load("data/processed/val_images.npy"))
    monitor.main([str(tmp_path / "all.npy"), "--json", str(tmp_path / "r.json")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["num_images"] == 60
    assert report["num_tested"] < 60


def test_what_is_listed_is_left_out(production: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "listed"
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(production.iterdir())]
    listed.write_text("\n".join(digests[:4]))
    monitor.main([str(production), "--leave-out", str(listed), "--json", str(tmp_path / "r.json")])
    assert "4 left out, listed by --leave-out" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["listed"], report["num_images"]) == (4, len(digests) - 4)
    listed.write_text("\n".join(digests))
    with pytest.raises(InputError, match="--leave-out: all 12 images are listed in .*listed"):
        monitor.main([str(production), "--leave-out", str(listed)])
    with pytest.raises(InputError, match="--leave-out: .*no-list: .*No such file"):
        monitor.main([str(production), "--leave-out", str(tmp_path / "no-list")])


def test_the_model_is_adapted_to_about_as_many_images_as_its_estimate_was_fitted_to(
    production: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more at once, the adapted model is a better one than the estimate knows."""
    sizes: list[int] = []
    adapted = Extractor._adapted_logits

    def noted(self: Extractor, groups: Iterable[NDArray[np.uint8]]) -> Any:
        groups = list(groups)
        sizes.extend(map(len, groups))
        return adapted(self, groups)

    monkeypatch.setattr(Extractor, "_adapted_logits", noted)
    largest = max(sized.window for sized in detectors.load().spec.damage)
    monitor.main(["data/processed/val_images.npy"])
    assert len(np.load("data/processed/val_labels.npy")) > largest
    assert len(sizes) > 1
    assert 0.7 * largest <= min(sizes) <= max(sizes) <= 1.5 * largest


@pytest.mark.parametrize("options", [[], ["--stream", "--window", "4", "--run-length", "400", "--idle", "0"]])
def test_the_status_tells_where_nobody_reads_on(options: list[str], production: Path, repository: Path) -> None:
    (production / "last.png").write_bytes(b"bad")
    command = [sys.executable, "-m", "tools.monitor", str(production), *options]
    whole = run(repository, *command, check=False)
    shell = f"{shlex.join(command)} | true; exit ${{PIPESTATUS[0]}}"
    unread = run(repository, "bash", "-c", shell, check=False)
    assert (unread.returncode, unread.stderr) == (whole.returncode, whole.stderr)
    assert whole.returncode in (0, 10, 20)


def test_constant_images_are_judged(production: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "grey.npy", np.full((8, 40, 30, 3), 127, dtype=np.uint8))
    assert monitor.main([str(tmp_path / "grey.npy")]) in (10, 20)


def test_copies_count_once(
    production: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same place twice, and the same images in another place; but not a camera that stands still."""

    def judged(*places: Path) -> dict[str, Any]:
        capsys.readouterr()
        monitor.main([*map(str, places), "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")])
        report: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
        return report

    once = judged(production)
    assert once["copies"] == {"number": 0, "left_out": False}
    assert judged(production, production / "../" / production.name, production / "000.png") == once
    shutil.copytree(production, tmp_path / "again")
    twice = judged(production, tmp_path / "again")
    assert "12 copies of other images were left out" in capsys.readouterr().out
    assert "12 copies of other images were left out" in (tmp_path / "r.html").read_text()
    assert twice == once | {"copies": {"number": 12, "left_out": True}}
    for number in range(8):
        shutil.copy(production / "000.png", tmp_path / f"again/still{number}.png")
    assert judged(tmp_path / "again")["copies"] == {"number": 8, "left_out": False}
    assert "8 of the images are copies, many of one: does a camera stand still?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "no such file"),
        ("empty", {}, "no images in it"),
        ("one", {"a.png": b"good"}, "1 readable image; nothing can be said"),
        ("broken", {"a.png": b"bad", "b.jpg": b"bad"}, "0 readable images.*a.png"),
        ("words.txt", b"words", "no image, folder, or archive"),
    ],
)
def test_what_nothing_can_be_said_of_is_refused(
    name: str, content: dict[str, bytes] | bytes | None, message: str, production: Path, tmp_path: Path
) -> None:
    place = tmp_path / name
    if isinstance(content, bytes):
        place.write_bytes(content)
    elif content is not None:
        place.mkdir()
        good = encoded(Image.new("RGB", (40, 40), "red"), "PNG")
        for file, kind in content.items():
            (place / file).write_bytes(good if kind == b"good" else kind)
    with pytest.raises(InputError, match=f"(?s){name}.*{message}"):
        monitor.main([str(place)])


def test_a_detector_of_another_class_set_or_none_is_refused(production: Path) -> None:
    spec = json.loads(Path("models/classifier/model.json").read_text())
    spec["class_ids"] = spec["class_ids"][::-1]
    Path("models/classifier/model.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="was calibrated for 10 classes"):
        monitor.main([str(production)])
    shutil.rmtree("models/drift")
    with pytest.raises(InputError, match="detector.json: not found; run `dvc repro drift`"):
        monitor.main([str(production)])


def test_a_detector_of_the_model_before_is_refused(production: Path) -> None:
    """`dvc repro evaluate` trains another classifier, of the same classes, and leaves the detector."""
    set_params(Path("params.yaml"), {"train.lr": 0.005})
    run(Path(), "dvc", "repro", "evaluate")
    with pytest.raises(InputError, match="calibrated for another classifier than models/classifier.*`dvc repro drift`"):
        monitor.main([str(production)])


def test_a_stream_of_paths_is_judged_window_by_window(
    production: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drifted = tmp_path / "drifted"
    drifted.mkdir()
    for number, image in enumerate(noisy(8)):
        Image.fromarray(image).save(drifted / f"{number}.png")
    (tmp_path / "paths").write_text(
        "".join(f"{path}\n" for path in [*sorted(production.iterdir())[:4], *drifted.iterdir()])
    )
    with (tmp_path / "paths").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        status = monitor.main(["-", "--stream", "--window", "4", "--run-length", "400"])
    said = capsys.readouterr().out
    assert "alpha 0.01" in said
    assert said.count("\nwindow ") == 3
    assert status in (10, 20)
    assert "window 3" in said.splitlines()[-1]
    assert ": ok" not in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "1000"], "--window: 1000; this detector can test windows of 2 to"),
        (["--window", "4", "--run-length", "5"], "--run-length: 5 images must be at least two windows"),
        (
            ["--window", "4", "--run-length", "40001"],
            "--run-length: 40,001 is more than 40,000, the longest for windows of 4",
        ),
        (["--json", "r.json"], "--json: a stream has no report"),
        (["--html", "r.html"], "--html: a stream has no report"),
        (["--top", "3"], "--top: a stream has no report"),
        (["--leave-out", "list"], "--leave-out: a stream has no report"),
        (["--window", "2", "--run-length", "2000"], "--window: 26 clean images make 325 different windows of 2, too"),
    ],
)
def test_a_stream_that_cannot_be_calibrated_is_refused(options: list[str], message: str, production: Path) -> None:
    with pytest.raises(InputError, match=message):
        monitor.main([str(production), "--stream", *options])


@pytest.mark.parametrize("option", ["--window", "--run-length", "--idle"])
def test_what_is_of_a_stream_is_refused_without_one(option: str, production: Path) -> None:
    with pytest.raises(InputError, match=f"^{option}: this is of a stream"):
        monitor.main([str(production), option, "4"])


def test_a_time_without_an_image_is_of_a_folder(production: Path) -> None:
    with pytest.raises(InputError, match="^--idle: paths on stdin end when stdin does"):
        monitor.main(["-", "--stream", "--idle", "4"])


@pytest.mark.parametrize("window", [2, 3, 5])
def test_the_longest_run_length_takes_as_many_clean_windows_as_are_allowed(window: int, production: Path) -> None:
    detector = detectors.load()
    detector = replace(detector, threshold=detector.threshold.rows(np.tile(np.arange(len(detector.threshold)), 50)))
    with pytest.raises(InputError, match="--run-length") as refused:
        stream_alpha(detector, window, 10**9)
    longest = int(str(refused.value).split(" is more than ")[1].split(", the longest")[0].replace(",", ""))
    assert detector.num_windows(stream_alpha(detector, window, longest)) <= 100_000
    assert detector.num_windows(window / (longest + 1)) > 100_000


def stream_of(paths: list[Path], repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A stream of paths, each a line, until they end."""
    command = [sys.executable, "-m", "tools.monitor", "-", "--stream", "--run-length", "400", *options]
    given = "".join(f"{path}\n" for path in paths)
    return subprocess.run(command, input=given, cwd=repository, capture_output=True, text=True)


def test_a_stream_that_ends_before_its_first_window_has_no_verdict(
    production: Path, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"bad")
    files = sorted(production.iterdir())
    for paths, said in (
        (files[:3], "the stream ended after 3 images; a window needs 4"),
        (
            [*files[:3], tmp_path / "bad.png"],
            "the stream ended after 4 images, 1 of which cannot be read; a window needs 4",
        ),
        ([], "the stream ended after 0 images; a window needs 4"),
    ):
        ended = stream_of(paths, repository, "--window", "4")
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1] == f"monitor: error: no verdict: {said}"
        assert ("monitor: left out " in ended.stderr) == (len(paths) == 4)


def test_images_at_the_end_that_fill_no_window_are_counted(production: Path, repository: Path) -> None:
    files = sorted(production.iterdir())
    for count, said in ((4, ""), (5, "1 image at the end fills"), (7, "3 images at the end fill")):
        ended = stream_of(files[:count], repository, "--window", "4")
        assert ended.returncode in (0, 10, 20)
        assert ended.stdout.count("\nwindow ") == 1
        assert ended.stderr == (f"monitor: {said} no window of 4; not judged\n" if said else "")


def test_a_folder_is_watched_whatever_its_clock_says_and_whoever_removes_some(
    production: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = tmp_path / "growing"
    for hour in ("1", "2"):
        shutil.copytree(production, growing / hour, ignore=lambda _, names: sorted(names)[3:])
    for hour, seconds in (("1", 10_000), ("2", -10_000)):  # from now
        for path in (growing / hour).iterdir():
            os.utime(path, (time.time() + seconds,) * 2)
    found = growing_folder(growing, idle=1.0)
    assert {Path(next(found).name).parent.name for _ in range(3)} == {"2"}
    walk = os.walk

    def walk_late(folder: Path, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for parent, folders, names in walk(folder, **options):
            if Path(parent).name == "1" and len(names) == 3:
                (Path(parent) / names[0]).unlink()  # listed, and gone
            yield parent, folders, names

    monkeypatch.setattr(os, "walk", walk_late)
    assert [Path(file.name).parent.name for file in found] == ["1", "1"]


def test_a_file_that_is_written_anew_is_another_image_and_one_that_moves_is_not(tmp_path: Path) -> None:
    growing = tmp_path / "growing"
    write_files(growing, {"latest.png": b"one"})
    found = growing_folder(growing, idle=1.5)
    assert next(found).read() == b"one"
    (growing / "latest.png").write_bytes(b"two")
    assert next(found).read() == b"two"
    (growing / "done").mkdir()
    (growing / "latest.png").rename(growing / "done/1.png")
    (growing / "latest.png").write_bytes(b"three")
    assert [file.read() for file in found] == [b"three"]


def test_a_folder_that_goes_away_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one on a disk that is unmounted, and comes back."""
    growing = tmp_path / "growing"
    write_files(growing, {"a.png": b"a"})
    found = growing_folder(growing, idle=3.0)
    next(found)
    growing.rename(tmp_path / "away")
    back = threading.Timer(1.5, lambda: write_files(growing, {"b.png": b"b"}))
    back.start()
    assert [file.read() for file in found] == [b"b"]
    back.join()
    assert capsys.readouterr().err.splitlines() == [
        f"monitor: {growing} cannot be listed; waiting for it",
        f"monitor: {growing} is back",
    ]


def test_a_file_that_was_taken_unfinished_comes_again(tmp_path: Path) -> None:
    growing = tmp_path / "growing"
    write_files(growing, {"a.png": b"half"})
    found = growing_folder(growing, idle=1.5)
    assert next(found).read() == b"half"
    with (growing / "a.png").open("ab") as file:
        file.write(b" and half")
    assert [file.read() for file in found] == [b"half and half"]


def test_a_file_that_moves_before_it_is_read_comes_again(tmp_path: Path) -> None:
    growing = tmp_path / "growing"
    write_files(growing, {"a.png": b"a"})
    found = growing_folder(growing, idle=1.5)
    first = next(found)
    (growing / "a.png").rename(growing / "b.png")
    with pytest.raises(FileNotFoundError):
        first.read()
    assert [(file.name, file.read()) for file in found] == [(str(growing / "b.png"), b"a")]


def test_what_is_gone_is_forgotten_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = tmp_path / "growing"
    for memory, again in ((3600, False), (0.5, True)):
        monkeypatch.setattr(stream, "_MEMORY_SECONDS", memory)
        write_files(growing, {"a.png": b"a"})
        os.utime(growing / "a.png", (1e9, 1e9))
        found = growing_folder(growing, idle=2.5)
        next(found)
        (growing / "a.png").rename(tmp_path / "away.png")
        timer = threading.Timer(1.5, (tmp_path / "away.png").rename, [growing / "a.png"])
        timer.start()
        assert len(list(found)) == again
        timer.join()


def test_images_of_a_stream_are_read_when_they_come(
    production: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever else takes them from the folder need not wait for a window to be full."""
    files = sorted(production.iterdir())[:4]

    def consumed() -> Iterator[str]:
        for path in files:
            yield f"{path}\n"
            path.unlink()

    monkeypatch.setattr("sys.stdin", consumed())
    assert monitor.main(["-", "--stream", "--window", "4", "--run-length", "400"]) in (0, 10, 20)
    said = capsys.readouterr().out
    assert said.count("\nwindow ") == 1
    assert "left out" not in said


def test_nul_between_paths_is_refused_with_what_to_do(production: Path, repository: Path) -> None:
    given = "\0".join(map(str, sorted(production.iterdir())))
    for command in (
        ["tools.monitor", "-", "--stream", "--window", "4", "--run-length", "400"],
        ["tools.predict", "-", "--model", "models/onnx"],
    ):
        ended = subprocess.run(
            [sys.executable, "-m", *command], input=given, cwd=repository, capture_output=True, text=True
        )
        assert ended.returncode == 2, ended.stderr
        assert "leave -print0 out" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_growing_folder_is_watched(production: Path, repository: Path, tmp_path: Path) -> None:
    growing = tmp_path / "growing"
    growing.mkdir()
    log = tmp_path / "log"
    command = f"python -u -m tools.monitor {growing} --stream --window 4 --run-length 400 --idle 8 > {log} 2>&1"
    process = start(repository, "bash", "-c", command)
    wait_until(lambda: log.exists() and "windows of 4" in log.read_text())
    for path in sorted(production.iterdir())[:4]:
        shutil.copy(path, growing)
    wait_until(lambda: "window 1" in log.read_text())
    for number, image in enumerate(noisy(4)):
        Image.fromarray(image).save(growing / f"noisy-{number}.png")
    wait_until(lambda: "window 2" in log.read_text())
    process.communicate(timeout=PATIENCE)
    _, clean, drifted = log.read_text().splitlines()
    assert clean.startswith(f"window 1, {growing}/000.png to {growing}/003.png: ok (p = ")
    status = "harmful" if process.returncode == 20 else "benign"
    assert drifted.startswith(f"window 2, {growing}/noisy-0.png to {growing}/noisy-3.png: {status} (p = ")
    assert process.returncode in (10, 20)
