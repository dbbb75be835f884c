"""The workflows as the tests read them, and a step's commands run as a runner of GitHub Actions would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from tests.helpers import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SCRIPTS = sorted((ROOT / ".github/scripts").glob("*.sh"))


class Step(NamedTuple):
    """A step that runs commands."""

    workflow: str
    name: str
    run: str
    env: tuple[str, ...]


def read(path: Path) -> dict[str, Any]:
    """A YAML file; `on` stays a word."""
    document: dict[str, Any] = YAML(typ="safe").load(path.read_text())
    return document


def all_steps() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every step as (workflow, job, step)."""
    for path in WORKFLOWS:
        for job, content in read(path)["jobs"].items():
            for step in content["steps"]:
                yield path.stem, job, step


def run_steps() -> list[Step]:
    """Every step that runs commands."""
    return [
        Step(workflow, step["name"], step["run"], tuple(step.get("env", {})))
        for workflow, _, step in all_steps()
        if "run" in step
    ]


def step(workflow: str, name: str) -> Step:
    """The one step of that name."""
    (found,) = [each for each in run_steps() if (each.workflow, each.name) == (workflow, name)]
    return found


class Runner:
    """A checkout with what a runner adds: the files for outputs, summary and PATH, a folder for temporary files.

    The virtual environment of the checkout is the one that runs the tests, so `make setup` finds it in place.
    """

    def __init__(self, checkout: Path, temporary: Path) -> None:
        self.checkout = checkout
        self.temporary = temporary
        self._files = {
            name: temporary / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_PATH")
        }
        link_environment(checkout)

    def execute(self, found: Step, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a step's commands, which must succeed."""
        result = self.attempt(found, **env)
        assert result.returncode == 0, f"{found.name}: rc {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def attempt(self, found: Step, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a step's commands by `bash -e -o pipefail`, with the variables that it declares and GitHub's own."""
        assert set(found.env) <= env.keys(), f"{found.name} declares {found.env}"
        for file in self._files.values():
            file.touch()
        path = [*reversed(self._files["GITHUB_PATH"].read_text().split()), "/usr/local/bin", "/usr/bin", "/bin"]
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", found.run],
            cwd=self.checkout,
            env={
                "HOME": os.environ["HOME"],
                "PATH": os.pathsep.join(path),
                "OMP_NUM_THREADS": "1",
                "RUNNER_TEMP": str(self.temporary),
                "GITHUB_REPOSITORY": "Owner/Driftline",
                "GITHUB_REF_NAME": "main",
                "GITHUB_RUN_ID": "77",
                **{name: str(path) for name, path in self._files.items()},
                **env,
            },
            capture_output=True,
            text=True,
            timeout=900,
        )

    @property
    def outputs(self) -> dict[str, str]:
        """What steps gave to later ones."""
        return dict(line.split("=", 1) for line in self._files["GITHUB_OUTPUT"].read_text().splitlines())

    @property
    def summary(self) -> str:
        """The page of the job."""
        return self._files["GITHUB_STEP_SUMMARY"].read_text()


def link_environment(checkout: Path) -> None:
    """Make this process's virtual environment that of a checkout, up to date in the eyes of make."""
    (checkout / ".venv").mkdir()
    (checkout / ".venv/bin").symlink_to(Path(sys.executable).parent)
    for name in ("lib", "lib64", "pyvenv.cfg"):
        if (Path(sys.prefix) / "pyvenv.cfg").exists() and (Path(sys.prefix) / name).exists():
            (checkout / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (checkout / ".venv/.installed").touch()
