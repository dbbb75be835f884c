"""A pipeline that takes no time, for tools that look at any pipeline's files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import commit_all, run, write_files

_FILES = {
    "dvc.yaml": """\
stages:
  make:
    cmd: python make.py
    deps: [make.py]
    params: [make.count]
    outs: [data/numbers]
    metrics:
      - metrics/count.json:
          cache: false
  total:
    cmd: python total.py
    deps: [total.py, data/numbers]
    outs: [models/total.txt]
""",
    "params.yaml": "make:\n  count: 3\n",
    "make.py": """\
import pathlib
count = int(pathlib.Path("params.yaml").read_text().split()[-1])
folder = pathlib.Path("data/numbers/deep")
folder.mkdir(parents=True)
for i in range(count):
    (folder.parent if i == 0 else folder).joinpath(f"{i}.txt").write_text(f"{i * i}\\n" * 100)
pathlib.Path("metrics").mkdir(exist_ok=True)
pathlib.Path("metrics/count.json").write_text(f'{{"count": {count}}}\\n')
""",
    "total.py": """\
import pathlib
values = [int(line) for path in pathlib.Path("data/numbers").rglob("*.txt") for line in path.read_text().split()]
pathlib.Path("models").mkdir(exist_ok=True)
pathlib.Path("models/total.txt").write_text(f"{sum(values)}\\n")
""",
    ".gitignore": "/data/\n/models/\n",
}


@pytest.fixture(scope="session")
def small_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "repository"
    folder.mkdir()
    write_files(folder, {name: text.encode() for name, text in _FILES.items()})
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.name", "t")
    run(folder, "git", "config", "user.email", "t@example.com")
    run(folder, "dvc", "init", "-q")
    run(folder, "dvc", "config", "core.analytics", "false")
    run(folder, "dvc", "repro", "-q")
    commit_all(folder)
    return folder


@pytest.fixture
def small(small_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a finished pipeline of two stages (outputs: a folder, a file, a metric), to work in."""
    folder = tmp_path / "small"
    shutil.copytree(small_template, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder
