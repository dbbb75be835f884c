"""What the documents name exists: params keys, files, make verbs, dvc commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.helpers import ROOT, run

DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "SECURITY.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
PARAMS = YAML(typ="safe").load((ROOT / "params.yaml").read_text())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_params_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(rf"\b({'|'.join(PARAMS)})\.(\w+)\b(?!\()", text))
    suffixes = {"py", "json", "yaml", "yml", "npy", "tar", "safetensors", "onnx"}  # model.json is a file
    missing = {f"{section}.{key}" for section, key in named if key not in PARAMS[section] and key not in suffixes}
    assert not missing


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "docs/RELIABILITY.md"])  # of archives
def test_files_that_are_named_exist(document: str, finished_repository: Path) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    named = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|yaml|md|txt|toml|lock))`", text)
    named += re.findall(r"\]\((?!http)([^)#]+)\)", text)
    roots = [ROOT, ROOT / "stages/core", finished_repository, finished_repository / "data/profile", ROOT / "tests"]
    roots += [path.parent for path in ROOT.glob("tools/*/__init__.py")]
    shown = {"stages/NAME.py", "tools/NAME/", "tools/NAME.py", "train/<class>"}  # patterns
    shown |= {".venv/", "report/report.html", "report/report.md"}  # made by make
    shown |= {".secrets/", ".secrets/gdrive-key.json", ".dvc/config.local"}  # the user's, ignored by git
    shown |= {"/workspace", "/run/secrets/gdrive-key.json"}  # in the container
    roots.append((ROOT / document).parent)
    missing = {name for name in named if name not in shown and not any((root / name).exists() for root in roots)}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_verbs_that_are_named_exist(document: str) -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", (ROOT / document).read_text(), flags=re.MULTILINE))
    assert {first or second for first, second in named} <= verbs


def test_modules_that_are_run_exist() -> None:
    """In documents, the Makefile, workflows, and the messages and docstrings of the code itself."""
    files = run(
        ROOT, "git", "ls-files", "*.md", "*.py", "*.sh", "*.yml", "*.yaml", "*.ipynb", "Makefile"
    ).stdout.split()
    text = "\n".join((ROOT / name).read_text() for name in files)
    named = set(re.findall(r"""-m"?,? "?((?:stages|tools)(?:\.[a-z]\w*)+)""", text))
    assert len(named) > 20
    for name in named:
        path = ROOT.joinpath(*name.split("."))
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert path.is_file(), name
        assert 'if __name__ == "__main__":' in path.read_text(), name


def test_make_help_lists_every_verb() -> None:
    listed = set(re.findall(r"make ([a-z-]+)", run(ROOT, "make", "help").stdout))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    assert listed == set(phony[1].split())


def test_every_dvc_command_that_is_shown_is_one() -> None:
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    commands = set(
        re.findall(r"(?:^\$ |`)dvc ([a-z]+(?: (?:run|show|diff|start|status|list|apply))?)\b", text, re.MULTILINE)
    )
    assert len(commands) > 5
    for command in commands:
        run(ROOT, "dvc", *command.split(), "--help")
