"""Hostile archives through extract and through the monitor's reader."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from stages import extract
from stages.core.errors import InputError
from stages.core.params import check_params
from stages.core.production import find_images, read_images
from tests.faults.hostile_archives import ARCHIVES, FILES, Hostile, build
from tests.faults.reliability import case
from tests.faults.settings import document
from tests.helpers import ROOT, default_params, files, run, write_files

pytestmark = [pytest.mark.slow, pytest.mark.faults]

# Those that could take all memory run in a process that may not have it (KiB of address space).
_MEMORY = 1_500_000
_HUNGRY = {"zip that lies about a size", "claim of a terabyte", "bomb by overlap", "bomb by ratio, tgz"}


def params(overrides: dict[str, Any]) -> extract.Params:
    sections = document(overrides)
    return check_params(extract.Params, {name: sections[name] for name in ("data", "sample", "runtime")}, "params.yaml")


@pytest.fixture
def images_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A working directory with data/raw of a good set, which a refusal must leave alone."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    extract.main(params({"data.source": str(write_files(tmp_path / "good", FILES))}))
    return files(Path("data"))


@pytest.mark.parametrize(
    "hostile", [pytest.param(each, marks=case(each.name, each.promise), id=each.name) for each in ARCHIVES]
)
def test_a_hostile_archive(hostile: Hostile, images_before: dict[str, bytes], tmp_path: Path) -> None:
    path = build(hostile, tmp_path / "hostile")
    overrides = {f"data.{key}": value for key, value in hostile.limits.items()} | {"data.source": str(path)}
    if hostile.name in _HUNGRY:
        said = extract_in_little_memory(overrides)
        assert re.search(hostile.message or "extract: ", said)
        assert "Traceback" not in said
        assert files(Path("data")) == images_before
    elif hostile.message is None:
        extract.main(params(overrides))
        expected = sum(1 for name in read_names(path) if name.startswith("train/"))
        assert len(read_names(Path("data/raw/train.tar"))) == expected > len(FILES) // 2
    else:
        with pytest.raises(InputError, match=hostile.message) as caught:
            extract.main(params(overrides))
        assert "\x1b" not in str(caught.value)
        assert files(Path("data")) == images_before
    assert {entry.name for entry in Path("data").iterdir()} == {"raw"}, "something was left behind"
    if hostile.name not in _HUNGRY:
        monitor_reads(path)


def monitor_reads(path: Path) -> None:
    """The monitor takes what it can read of any images, or refuses by name."""
    try:
        window = read_images(find_images([str(path)]), 8, "center", "bilinear")
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert len(window.images) + len(window.skipped) > 0


def extract_in_little_memory(overrides: dict[str, Any]) -> str:
    default_params(Path.cwd(), overrides)
    command = f"ulimit -v {_MEMORY}; exec {sys.executable} -m stages.extract"
    ended = run(Path.cwd(), "bash", "-c", command, check=False, environment={"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 2, ended.stderr
    return ended.stderr


def read_names(path: Path) -> list[str]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    with tarfile.open(path) as tar:
        return tar.getnames()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param(name, message, marks=case(f"monitor: {name}", promise), id=f"monitor-{name}")
        for name, message, promise in (
            ("bomb by ratio, tgz", "times its size; taken for a bomb", "The monitor refuses it before memory is full."),
            ("zip that lies about a size", "", "The monitor leaves the member out, in 1.5 GB of address space."),
            ("claim of a terabyte", "memory|truncated|can be read", "The monitor refuses it."),
            ("bomb by overlap", "", "The monitor reads such members one by one, and leaves out what is no image."),
        )
    ],
)
def test_the_monitor_in_little_memory(name: str, message: str, tmp_path: Path) -> None:
    path = build(next(each for each in ARCHIVES if each.name == name), tmp_path / "hostile")
    script = f"""if True:
        from stages.core.errors import run_main
        from stages.core.production import find_images, read_images
        def main():
            window = read_images(find_images([{str(path)!r}]), 8, "center", "bilinear")
            print(len(window.images), "read", len(window.skipped), "left out", window.skipped[:1])
        run_main(main, "monitor")
    """
    command = ["bash", "-c", f'ulimit -v {_MEMORY}; exec {sys.executable} -c "$0"', script]
    ended = run(tmp_path, *command, check=False, environment={"PYTHONPATH": str(ROOT)})
    assert "Traceback" not in ended.stderr
    if message:
        assert ended.returncode == 2
        assert re.search(message, ended.stderr)
    else:
        assert ended.returncode == 0, ended.stderr
        assert re.search(r"^6 read \d+ left out", ended.stdout), ended.stdout
