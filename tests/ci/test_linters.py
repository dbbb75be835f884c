"""No finding of the public linters: workflows, shell, Dockerfile, Python, secrets. All run without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.ci.workflows import SCRIPTS, WORKFLOWS, Step, run_steps
from tests.helpers import BIN, ROOT, run

IN_THE_REPOSITORY = ("git", "ls-files", "-z")


def tracked() -> list[str]:
    return [name for name in run(ROOT, *IN_THE_REPOSITORY).stdout.split("\0") if name and (ROOT / name).is_file()]


def test_zizmor() -> None:
    run(ROOT, "zizmor", "--offline", "--no-progress", ".github")


def test_zizmor_finds_what_it_should(tmp_path: Path) -> None:
    workflow = (ROOT / ".github/workflows/train.yml").read_text()
    (tmp_path / "train.yml").write_text(workflow.replace("bash .github/scripts/train.sh", 'echo "${{ inputs.name }}"'))
    result = run(tmp_path, "zizmor", "--offline", "--no-progress", "train.yml", check=False)
    assert result.returncode != 0
    assert "template-injection" in result.stdout


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("custom.github-workflows-require-timeout", WORKFLOWS),
        ("vendor.dependabot", [ROOT / ".github/dependabot.yml"]),
        ("vendor.compose-spec", [ROOT / "compose.yaml"]),
    ],
)
def test_schemas(schema: str, files: list[Path]) -> None:
    run(ROOT, "check-jsonschema", "--builtin-schema", schema, *map(str, files))


def test_compose_makes_no_folder_as_root() -> None:
    """Docker makes a missing source of a volume in the short syntax, which the container's user cannot write to."""
    services = YAML(typ="safe").load((ROOT / "compose.yaml").read_text())["services"]
    for service in services.values():
        sources = [volume if isinstance(volume, str) else volume["source"] for volume in service["volumes"]]
        assert sources == [".:/workspace", "${HOME}/.cache/driftline"]
        assert service["volumes"][1]["bind"] == {"create_host_path": False}


@pytest.mark.parametrize("step", run_steps(), ids=lambda step: f"{step.workflow}: {step.name}")
def test_shellcheck_of_every_run_block(step: Step) -> None:
    assert "${{" not in step.run, "inputs reach a script through env only"
    result = subprocess.run(
        [BIN / "shellcheck", "--shell=bash", "--severity=style", "-"], input=step.run, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_shellcheck_of_scripts() -> None:
    scripts = [*map(str, SCRIPTS), "docker-entrypoint.sh", ".ci/run", ".ci/docker"]
    run(ROOT, "shellcheck", "--severity=style", *scripts)


def test_hadolint() -> None:
    run(ROOT, "hadolint", "Dockerfile")


def test_bandit() -> None:
    run(ROOT, "bandit", "--quiet", "--recursive", "--configfile", "pyproject.toml", "stages", "tools")


@pytest.mark.slow
def test_the_oldest_python_has_what_is_used(tmp_path: Path) -> None:
    """Lint and types are checked for the Python of the lock; an older one lacks some of the standard library."""
    result = run(
        ROOT, *("mypy", "--python-version", "3.10", "--cache-dir", str(tmp_path), "stages", "tools"), check=False
    )
    # NumPy's stubs are for newer ones: what it returns is not known here.
    others = re.compile(r"\[no-any-return\]$|\[unused-ignore\]$|^Found ")
    assert [line for line in result.stdout.splitlines() if not others.search(line)] == []
    assert 'requires-python = ">=3.10,' in (ROOT / "pyproject.toml").read_text()


def test_no_secret_that_the_baseline_does_not_know(tmp_path: Path) -> None:
    """The baseline has what was looked at and is none: hashes, and keys made up for tests."""
    excluded = re.compile(r"^(dvc\.lock|requirements\.txt|\.secrets\.baseline)$|\.(png|ipynb)$")
    names = [name for name in tracked() if not excluded.search(name)]
    baseline = shutil.copy(str(ROOT / ".secrets.baseline"), str(tmp_path))  # which the hook writes line numbers into
    result = run(ROOT, "detect-secrets-hook", "--baseline", baseline, *names, check=False)
    assert result.returncode in (0, 3), result.stdout  # 3: known ones are at other lines


def test_a_key_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text(
        json.dumps({"private_key": "-----BEGIN PRIVATE" + " KEY-----\nMIIEvQIBADANBg\n"})
    )
    found = run(tmp_path, "detect-secrets", "scan", "--all-files", "key.json").stdout
    assert "Private Key" in found
