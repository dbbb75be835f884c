"""Hostile images through extract, preprocess, the monitor and predict, in processes that they could crash."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from stages import extract, preprocess
from stages.core.errors import InputError
from stages.core.params import check_params
from tests.faults.hostile_images import IMAGES, HostileImage
from tests.faults.reliability import case
from tests.faults.settings import document
from tests.helpers import ROOT, default_params, encoded, files, image_files, picture, run, write_files

pytestmark = [pytest.mark.slow, pytest.mark.faults]

SIDE = 32  # pixels, of the packed images


def environment() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT)}


class Packed(NamedTuple):
    """What one run of the stages made of all the images that have a header."""

    skipped: list[str]  # file names
    pixels: dict[str, NDArray[np.uint8]]


@pytest.fixture(scope="session")
def packed_images(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """extract and preprocess with worker processes, bad images skipped."""
    folder = tmp_path_factory.mktemp("images")
    hostile = {f"train/odd/{each.file}": each.content() for each in IMAGES if each.ends != "extract"}
    good = image_files(num_train=60, num_val=2, classes=("good", "odd"))
    default_params(folder, {
        "data.source": str(write_files(folder / "set", good | hostile)), "preprocess.image_size": SIDE,
        "preprocess.on_bad_image": "skip", "runtime.workers": 2,
    })  # fmt: skip
    for stage in ("extract", "preprocess"):
        run(folder, sys.executable, "-m", f"stages.{stage}", environment=environment())
    meta = json.loads((folder / "data/processed/meta.json").read_text())
    names = json.loads((folder / "data/processed/files.json").read_text())["train"]
    images = np.load(folder / "data/processed/train_images.npy")
    return Packed(
        [Path(name).name for name in meta["skipped"]["train"]],
        {Path(name).name: image for name, image in zip(names, images, strict=True)},
    )


@pytest.fixture(scope="session")
def production(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of them, and good ones with odd names."""
    folder = tmp_path_factory.mktemp("production") / "images"
    good = {f"good-{number}.png": encoded(picture(number), "PNG") for number in range(8)}
    write_files(folder, good | {each.file: each.content() for each in IMAGES})
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.jpg")).write_bytes(encoded(picture(8), "PNG"))
    (folder / "\x1b[2J.jpg").write_bytes(encoded(picture(9), "PNG"))
    return folder


@pytest.fixture(scope="session")
def predicted(finished_repository: Path, production: Path) -> tuple[set[str], str]:
    """File names that one run of predict over all of them has a class for, and what it said on stderr."""
    ended = run(finished_repository, "python", "-m", "tools.predict", str(production), "--format", "json", check=False)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "\x1b" not in ended.stderr
    return {Path(row["path"]).name for row in json.loads(ended.stdout)}, ended.stderr


@pytest.fixture(scope="session")
def monitored(finished_repository: Path, production: Path) -> dict[str, Any]:
    """The report of one run of the monitor over all of them."""
    folder = production.parent
    ended = run(
        finished_repository, "python", "-m", "tools.monitor", str(production), "--json", str(folder / "report.json"),
        "--html", str(folder / "report.html"), "--top", "1000", check=False,
    )  # fmt: skip
    assert ended.returncode in (0, 10, 20), ended.stderr
    assert "\x1b" not in ended.stdout
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    num_copies = report["copies"]["number"] if report["copies"]["left_out"] else 0  # many of them are plain red
    assert len(report["images"]) + len(report["skipped"]) + num_copies == len(list(production.iterdir()))
    return report


def sections(overrides: dict[str, Any], *names: str) -> dict[str, Any]:
    changed = document(overrides)
    return {name: changed[name] for name in (*names, "runtime")}


def run_extract(source: Path) -> None:
    some = sections({"data.source": str(source)}, "data", "sample")
    extract.main(check_params(extract.Params, some, "params.yaml"))


def run_preprocess() -> None:
    some = sections({"preprocess.image_size": SIDE}, "preprocess")
    preprocess.main(check_params(preprocess.Params, some, "params.yaml"))


@pytest.mark.parametrize(
    "hostile", [pytest.param(each, marks=case(each.name, each.promise), id=each.name) for each in IMAGES]
)
def test_a_hostile_image(
    hostile: HostileImage, packed_images: Packed, monitored: dict[str, Any], predicted: tuple[set[str], str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    left_out = {Path(each["path"]).name: each["reason"] for each in monitored["skipped"]}
    seen = {Path(each["path"]).name for each in monitored["images"]}
    names, said = predicted
    assert (hostile.file in left_out) != (hostile.file in names)
    assert hostile.file in names or hostile.file not in seen
    assert (f"/{hostile.file}: " in said) == (hostile.file in left_out)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    good = image_files(num_train=2, num_val=1)
    source = write_files(tmp_path / "set", good | {f"train/cat/{hostile.file}": hostile.content()})
    if hostile.ends == "extract":
        assert left_out[hostile.file]
        with pytest.raises(InputError, match=f"train/cat/{hostile.file}: "):
            run_extract(source)
        assert not list(Path("data").iterdir())
    elif hostile.ends == "preprocess":
        assert hostile.file in packed_images.skipped
        assert left_out[hostile.file]
        run_extract(write_files(tmp_path / "good", good))
        run_preprocess()
        before = files(Path("data/processed"))
        run_extract(source)
        with pytest.raises(InputError, match=f"train/cat/{hostile.file}: .*; mend or remove it"):
            run_preprocess()
        assert files(Path("data/processed")) == before
    elif hostile.ends is None:
        assert (hostile.file in packed_images.skipped) == (hostile.file in left_out)
    else:
        assert hostile.file in names
        corner = packed_images.pixels[hostile.file][2 : SIDE // 2 - 2, 2 : SIDE // 2 - 2]
        assert np.abs(corner.astype(int) - hostile.ends).max() <= 12


@case("name not UTF-8", "Extract refuses it; monitor and predict take the image, its name shown with a mark.")
def test_a_name_that_is_not_utf8(
    monitored: dict[str, Any], predicted: tuple[set[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_files(tmp_path / "set", image_files(num_train=2, num_val=1))
    Path(os.fsdecode(os.fsencode(source) + b"/train/cat/\xff\xfe.jpg")).write_bytes(encoded(picture()))
    with pytest.raises(InputError, match="not UTF-8"):
        run_extract(source)
    assert any("�" in each["path"] for each in monitored["images"])
    assert any("�" in name for name in predicted[0])


@case("terminal escapes in a name", "What the monitor prints cannot steer a terminal; its JSON has the true name.")
def test_a_name_that_steers_terminals(monitored: dict[str, Any]) -> None:
    assert any("\x1b" in each["path"] for each in monitored["images"])
