"""The lock in a virtual environment of its own, installed by `make setup`: its dvc pushes to Google Drive."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.gdrive.conftest import command
from tests.gdrive.server import StandIn
from tests.helpers import ROOT, copy_of_checkout, files, run


def explained() -> list[str]:
    """What docs/REMOTE.md says that `pip check` says."""
    shown = re.search(r"^\$ python -m pip check\n(.*?)^```", (ROOT / "docs/REMOTE.md").read_text(), re.M | re.S)
    assert shown is not None
    return shown[1].splitlines()


@pytest.mark.slow  # minutes: it installs all packages
def test_a_fresh_environment_pushes_and_its_complaints_are_explained(
    small: Path, google: StandIn, tmp_path: Path
) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    run(checkout, "make", "setup")
    fresh = checkout / ".venv/bin"
    alone = {"PATH": f"{fresh}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}  # and not of this environment
    imported = "import dvc, dvc_gdrive, pydrive2.fs; print(dvc.__file__, dvc_gdrive.__file__, pydrive2.fs.__file__)"
    for path in run(small, str(fresh / "python"), "-c", imported, environment=alone).stdout.split():
        assert Path(path).is_relative_to(checkout / ".venv")

    result = run(small, str(fresh / "python"), "-m", "pip", "check", check=False, environment=alone)
    assert sorted(result.stdout.splitlines()) == sorted(explained())

    pushed = command(google, small, str(fresh / "dvc"), "push", PATH=alone["PATH"], PYTHONPATH="").stdout
    assert "6 files pushed" in pushed
    assert google.drive.files().items() <= files(small / ".dvc/cache").items()
    assert len(google.drive.files()) == 6
