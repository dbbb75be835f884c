"""Fixtures: folders and repositories to work in."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stages import extract, preprocess
from stages.core.params import load_params
from tests.ci.github_api import Repository, serve
from tests.helpers import STARTED, TINY, commit_all, copy_of_checkout, default_params, run


def pytest_runtest_setup() -> None:
    """Begin no test after the time (seconds since the epoch) that .ci/run has for them."""
    if time.time() > float(os.environ.get("CI_TESTS_UNTIL", "inf")):
        pytest.skip("left out: CI_TESTS_UNTIL is over")


@pytest.fixture(autouse=True)
def _end_what_a_failed_test_left() -> Iterator[None]:
    """Processes of `start` would slow the tests that follow, and their pipes be complained of in one of these."""
    before = len(STARTED)
    yield
    for process in STARTED[before:]:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    del STARTED[before:]


@pytest.fixture(scope="session")
def make_repository(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a git repository of this checkout with tiny params, its cache_dir inside the test's own folder."""

    def make(commit: bool = True, **overrides: Any) -> Path:
        folder = copy_of_checkout(tmp_path_factory.mktemp("repository"))
        cache = {"runtime.cache_dir": str(tmp_path_factory.mktemp("cache"))}
        default_params(folder, TINY | cache | {k.replace("__", "."): v for k, v in overrides.items()})
        (folder / "dvc.lock").unlink(missing_ok=True)
        run(folder, "git", "init", "-q")
        run(folder, "git", "config", "user.name", "t")
        run(folder, "git", "config", "user.email", "t@example.com")
        if commit:
            commit_all(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def finished_repository(make_repository: Callable[..., Path]) -> Path:
    """A tiny repository whose pipeline has run and is committed. Tests leave it as it was: `repository` is a copy."""
    folder = make_repository()
    run(folder, "dvc", "repro")
    commit_all(folder)
    return folder


@pytest.fixture
def repository(finished_repository: Path, tmp_path: Path) -> Path:
    """A copy of the finished repository, to change at will."""
    folder = tmp_path / "repository"
    shutil.copytree(finished_repository, folder, symlinks=True)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory, with this repository's params.yaml made tiny."""
    default_params(tmp_path, TINY | {"runtime.cache_dir": str(tmp_path / "cache")})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def packed(workspace: Path) -> Path:
    """A workspace whose images are packed: what train starts from."""
    extract.main(load_params(extract.Params))
    preprocess.main(load_params(preprocess.Params))
    return workspace


@pytest.fixture
def github() -> Iterator[Repository]:
    """A stand-in of GitHub's API."""
    with serve() as repository:
        yield repository
