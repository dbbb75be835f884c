"""Predictions as a person asks for them, by the real onnxruntime: the evaluate stage's, in any form, from anywhere."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from stages import evaluate, export
from stages.core import model
from stages.core.errors import InputError
from stages.core.params import load_params
from tests.helpers import PATIENCE, encoded, run, start, truncated, wait_until
from tools.predict import command as predict
from tools.registry import command as registry


@pytest.fixture(scope="module")
def lively(finished_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished repository whose classifier has an opinion: a head of large weights, evaluated and exported."""
    folder = tmp_path_factory.mktemp("lively") / "repository"
    shutil.copytree(finished_repository, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        enliven()
        evaluate.main(load_params(evaluate.Params))
    (folder / "val").mkdir()
    run(folder, "tar", "-x", "-f", "data/raw/val.tar", "-C", "val")  # tarfile of Python before 3.11.4 has no filters
    return folder


def enliven() -> None:
    network, spec = model.load(model.CLASSIFIER, torch.device("cpu"))
    torch.manual_seed(3)
    head = network.get_classifier()  # type: ignore[operator]
    torch.nn.init.normal_(head.weight, std=2.0)
    with torch.inference_mode():
        head.bias -= network(network_input(spec)).mean(dim=0)  # else one class would be everybody's
    model.save(model.CLASSIFIER, network, spec)
    export.main(load_params(export.Params))


def network_input(spec: model.ModelSpec) -> Tensor:
    """The validation images as the network takes them, by the formula."""
    pixels = torch.from_numpy(np.load("data/processed/val_images.npy")).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(spec.mean).view(1, 3, 1, 1)) / torch.tensor(spec.std).view(1, 3, 1, 1)


@pytest.fixture
def here(lively: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lively repository as working directory. Tests leave it as it was."""
    monkeypatch.chdir(lively)
    return lively


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> list[dict[str, str]]:
    capsys.readouterr()
    assert predict.main(list(arguments)) == status
    return rows(capsys.readouterr().out)


# --- the same as the evaluate stage -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["data/raw/val.tar", "val", "data/processed/val_images.npy"])
def test_predictions_are_those_of_the_evaluate_stage(
    place: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = json.loads(Path("data/processed/files.json").read_text())["val"]
    confusion = rows(Path("plots/evaluate/confusion.csv").read_text())
    expected = {name: row["predicted"] for name, row in zip(names, confusion, strict=True)}
    assert len(set(expected.values())) >= 3, "the model tells classes apart"
    found = predicted(capsys, place)
    if place.endswith(".npy"):
        assert [row["path"] for row in found] == [f"{place}[{number}]" for number in range(60)]
        assert [row["class"] for row in found] == [expected[name] for name in names]
    else:
        assert {row["path"][len(place) + 1 :]: row["class"] for row in found} == expected


def test_probabilities_are_those_of_the_network_in_order_and_any_batch(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, spec = model.load(model.CLASSIFIER, torch.device("cpu"))
    with torch.inference_mode():
        shares = torch.softmax(network(network_input(spec)).double(), dim=1)
    for options in ([], ["--batch", "1"], ["--batch", "7", "--threads", "3"]):
        found = predicted(capsys, "data/processed/val_images.npy", "--top", "10", *options)
        table = np.array([float(row["probability"]) for row in found]).reshape(60, 10)
        np.testing.assert_allclose(table, np.sort(shares.numpy(), axis=1)[:, ::-1], atol=2e-5)
        assert [row["class"] for row in found[::10]] == [spec.classes[label] for label in shares.argmax(dim=1)]


# --- light --------------------------------------------------------------------------------------------------------


def test_pytorch_is_not_imported_and_start_up_is_short(here: Path) -> None:
    """Neither is anything else that takes long; CPU seconds, because the tests' machine may be busy."""
    image = str(next(Path("val").rglob("*.jpg")))
    result = run(here, sys.executable, "-X", "importtime", "-m", "tools.predict", image)
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert {"onnxruntime", "numpy", "PIL", "tools"} <= loaded
    assert not loaded & {
        "torch",
        "torchvision",
        "timm",
        "scipy",
        "sklearn",
        "pandas",
        "matplotlib",
        "dvc",
        "gto",
        "onnx",
    }
    before = os.times()
    run(here, sys.executable, "-m", "tools.predict", image, "--threads", "1")
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


# --- forms --------------------------------------------------------------------------------------------------------


def test_every_form_says_the_same(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = predicted(capsys, "val", "--top", "3")
    assert len(expected) == 180
    assert predict.main(["val", "--top", "3", "--output", str(tmp_path / "new" / "p.json")]) == 0
    assert capsys.readouterr().out == ""
    objects = json.loads((tmp_path / "new" / "p.json").read_text())
    assert [(row["path"], guess["class"], guess["probability"]) for row in objects for guess in row["top"]] == [
        (row["path"], row["class"], float(row["probability"])) for row in expected
    ]
    assert all(row["class"] == row["top"][0]["class"] for row in objects)
    assert predict.main(["val", "--top", "3", "--format", "table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["path", "class", "probability"]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == [expected[0]["path"], expected[0]["class"], f"{float(expected[0]['probability']):.3f}"]
    assert len(lines) == 181
    assert predict.main(["val", "--format", "json"]) == 0
    assert set(json.loads(capsys.readouterr().out)[0]) == {"path", "class", "probability"}


def test_a_failed_run_leaves_the_old_file(here: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.csv"
    output.write_text("old")
    with pytest.raises(InputError, match="no image was predicted"):
        predict.main([str(tmp_path / "nothing"), "--output", str(output)])
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
    assert output.read_text() == "old"
    with pytest.raises(InputError, match="--output: .*: File name too long"):
        predict.main(["val", "--output", str(tmp_path / ("p" * 300))])
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


# --- places -------------------------------------------------------------------------------------------------------


def test_files_folders_patterns_and_archives(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_path = {row["path"]: row for row in predicted(capsys, "val")}
    some = sorted(path for path in by_path if path.startswith("val/c"))
    for places in (some, ["val/c*"], ["val/c*/*.jpg"], ["val/**/c*/**"], [str(Path("val/c*/*"))]):
        found = predicted(capsys, *places)
        assert [row["path"] for row in found] == some, places
        assert found == [by_path[path] for path in some]
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for path in Path("val/circle").iterdir():
            archive.writestr(path.name, path.read_bytes())
    found = predicted(capsys, str(tmp_path / "some.zip"), some[-1])
    circles = [row["class"] for path, row in by_path.items() if path.startswith("val/circle/")]
    assert [row["class"] for row in found] == [*circles, by_path[some[-1]]["class"]]


def test_paths_on_standard_input_and_odd_names(here: Path, tmp_path: Path) -> None:
    odd = [tmp_path / 'a, "b".jpg', tmp_path / "no suffix", tmp_path / "ü 1.jpg"]
    for path in odd:
        shutil.copy(next(Path("val/star").iterdir()), path)
    given = "\n".join(map(str, [odd[0], tmp_path / "gone.jpg", odd[1], tmp_path, odd[2]]))
    result = subprocess.run(
        [sys.executable, "-m", "tools.predict", "-", "--batch", "2"], input=given, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    found = rows(result.stdout)
    assert [row["path"] for row in found] == [str(path) for path in odd]
    assert len({row["class"] for row in found}) == 1
    told = result.stderr.splitlines()
    assert len(told) == 2
    assert told[0].startswith(f"predict: left out: {tmp_path}/gone.jpg: ")
    assert told[1].startswith(f"predict: left out: {tmp_path}: ")


def test_bad_files_are_told_of_and_left_out(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = encoded(Image.new("RGB", (64, 64), "red"))
    contents = {"a.jpg": photo, "b.jpg": truncated(photo), "c.png": b"", "d.jpg": b"hello", "e.jpg": photo}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "words.txt").write_text("no image")
    found = predicted(capsys, str(tmp_path), status=1)
    assert [Path(row["path"]).name for row in found] == ["a.jpg", "e.jpg"]
    predict.main([str(tmp_path / "*"), str(tmp_path / "words.txt"), "nowhere"])
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2].rpartition("/")[2] for line in told] == [
        "words.txt",
        "nowhere",
        "b.jpg",
        "c.png",
        "d.jpg",
    ]
    assert "no image, folder, or archive that can be read" in told[0]
    assert "Truncated" in told[2]
    assert "is empty" in told[3]


def test_a_reader_that_has_enough_ends_it(here: Path) -> None:
    result = run(here, "bash", "-o", "pipefail", "-c", "python -m tools.predict val val val val --batch 1 | head -1")
    assert (result.stdout, result.stderr) == ("path,class,probability\n", "")


def test_a_full_disk_behind_standard_output_is_an_error(here: Path) -> None:
    command = f"{sys.executable} -m tools.predict val > /dev/full"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=here)
    assert ended.returncode == 2
    assert ended.stderr == "predict: error: standard output: No space left on device; what it has is cut off\n"


# --- models -------------------------------------------------------------------------------------------------------


def test_a_registered_model_predicts_whatever_lies_in_the_workspace(
    repository: Path, lively: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    run(repository, "git", "status")  # the copies' times go into the index
    images = str(lively / "val")
    before = predicted(capsys, images)
    registry.register()
    registry.promote("prod", None)
    enliven()
    workspace = predicted(capsys, images)
    assert workspace != before
    for name in ("prod", "v0.0.1", "HEAD"):
        assert predicted(capsys, images, "--model", name) == before
    assert predicted(capsys, images, "--model", "models/onnx/model.onnx") == workspace
    assert predicted(capsys, images, "--model", str(lively / "models/onnx")) == predicted(capsys, images)
    shutil.rmtree("models")
    assert predicted(capsys, images, "--model", "prod") == before
    with pytest.raises(InputError, match=r"models/onnx/model\.json: not found; run `dvc repro export`"):
        predict.main([images])
    with pytest.raises(InputError, match=r"--model: 'prud' is no folder with .*named 'prud' \(did you mean prod\?\)"):
        predict.main([images, "--model", "prud"])


# --- drift --------------------------------------------------------------------------------------------------------


def test_the_monitor_is_asked_about_the_same_images(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    folder = tmp_path / "noise"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    for number, image in enumerate(noise):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    status = predict.main([str(folder), "--monitor"])
    said = capsys.readouterr()
    assert len(rows(said.out)) == 12
    verdict = {10: "benign", 20: "harmful"}[status]
    assert f"monitor: {verdict}: drift" in said.err
    assert "in 12 images" in said.err
    assert f"strangest: {folder}/" in said.err


def test_sigterm_ends_it_with_its_monitor_and_leaves_nothing_temporary(here: Path, tmp_path: Path) -> None:
    command = ["python", "-m", "tools.predict", "data/processed/val_images.npy", "--monitor"]
    process = start(here, *command, environment={"TMPDIR": str(tmp_path)})
    monitors: list[psutil.Process] = []

    def is_asked() -> bool:
        assert process.poll() is None, process.communicate()[0]
        children = psutil.Process(process.pid).children()
        monitors.extend(child for child in children if "tools.monitor" in child.cmdline())
        return bool(monitors)

    wait_until(is_asked)
    assert [path for path in tmp_path.iterdir() if path.name.startswith("predict-")]
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert output.splitlines()[-1] == "predict: stopped by SIGTERM; run the same command again"
    assert "Traceback" not in output
    assert not monitors[0].is_running()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("predict-")]


@pytest.mark.slow
def test_a_registered_model_is_monitored_by_its_own_detector(
    repository: Path, lively: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    run(repository, "git", "status")
    registry.register()
    registry.promote("prod", None)
    shutil.rmtree("models")
    Path("prod").mkdir()  # no model is in it
    assert predict.main([str(lively / "val"), "--model", "prod", "--monitor"]) in (0, 10, 20)
    assert "in 60 images" in capsys.readouterr().err
    assert sorted(path.name for path in Path(".dvc/tmp/models").glob("*/*")) == ["classifier", "drift", "onnx"]


@pytest.mark.slow
def test_the_monitor_says_why_it_has_no_verdict_and_the_predictions_stand(
    repository: Path, lively: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    image = str(next((lively / "val").rglob("*.jpg")))
    with pytest.raises(InputError, match=r"--monitor: no verdict: these images: 1 readable image; nothing can be said"):
        predict.main([image, "--monitor"])
    assert len(rows(capsys.readouterr().out)) == 1


def test_a_temporary_folder_that_is_full_leaves_the_predictions_as_they_are(here: Path, tmp_path: Path) -> None:
    command = "ulimit -f 8; exec python -m tools.predict data/processed/val_images.npy --monitor"  # files of 8 KiB
    said = run(here, "bash", "-c", command, check=False, environment={"TMPDIR": str(tmp_path)})
    assert said.returncode == 2
    assert len(rows(said.stdout)) == 60
    assert said.stderr.splitlines()[-1] == (
        f"predict: error: --monitor: no verdict: {tmp_path}: File too large; free some space there, or set TMPDIR to "
        "another place; the predictions are not affected"
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("predict-")]


def test_no_place_for_temporary_files_is_said_before_anything_is_predicted(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(InputError, match=r"--monitor: no place for temporary files: No such file.*; set TMPDIR to one"):
        predict.main(["data/processed/val_images.npy", "--monitor"])
    assert not capsys.readouterr().out


# --- refusals -----------------------------------------------------------------------------------------------------


def test_nothing_to_predict_ends_with_2(here: Path, tmp_path: Path) -> None:
    result = run(here, "python", "-m", "tools.predict", str(tmp_path), check=False)
    assert (result.returncode, result.stdout) == (2, "")
    told = result.stderr.splitlines()
    assert told[0].startswith(f"predict: left out: {tmp_path}: no images in it")
    assert told[1:] == ["predict: error: no image was predicted, for the reasons above"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--top", "11"], "--top: 11 is more than the 10 classes of models/onnx"), (["--model", "val"], "--model: 'val'")],
)
def test_wrong_options_are_refused_by_name(options: list[str], message: str, here: Path) -> None:
    with pytest.raises(InputError, match=message):
        predict.main(["val", *options])
