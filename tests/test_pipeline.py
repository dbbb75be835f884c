"""dvc.yaml tells the truth: what each stage declares is what its code imports, opens and reads."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.core.closure import code_closure
from tests.helpers import ROOT, run

PIPELINE: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
STAGES: dict[str, dict[str, Any]] = PIPELINE["stages"]


def paths(entries: list[Any]) -> set[str]:
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def outputs(stage: str) -> set[str]:
    return set().union(*(paths(STAGES[stage].get(kind, [])) for kind in ("outs", "metrics", "plots")))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_exactly_the_files_that_it_imports(stage: str) -> None:
    declared = {path for path in paths(STAGES[stage]["deps"]) if path.endswith(".py")}
    assert declared == code_closure(ROOT, f"stages.{stage}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_exactly_the_params_that_it_reads(stage: str) -> None:
    model = importlib.import_module(f"stages.{stage}").Params
    reads = set(model.model_fields)
    # runtime.* changes no result by intent (DESIGN): only the profile, which measures it, depends on it.
    # wandb.* changes no file.
    assert set(STAGES[stage].get("params", [])) == ((reads if stage == "profile" else reads - {"runtime"}) - {"wandb"})


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_a_description_and_runs_as_a_module(stage: str) -> None:
    assert STAGES[stage]["desc"]
    assert STAGES[stage]["cmd"] == f"python -m stages.{stage}"


def test_every_stage_file_is_in_the_pipeline() -> None:
    files = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert files == set(STAGES)


def test_imports_go_one_way() -> None:
    for stage in STAGES:
        others = {f"stages/{other}.py" for other in STAGES if other != stage}
        assert not code_closure(ROOT, f"stages.{stage}") & others, "a stage imports a stage"
    for path in (ROOT / "stages/core").glob("*.py"):
        imported = code_closure(ROOT, f"stages.core.{path.stem}")
        assert all(name.startswith("stages/core/") for name in imported), f"{path.name} imports a stage or a tool"
    for path in (*ROOT.glob("stages/**/__init__.py"), *ROOT.glob("tools/**/__init__.py")):
        assert not path.read_text(), f"{path} is not empty"


def test_every_comment_and_key_of_params_yaml_is_there() -> None:
    """Each key carries a comment on its line or is under a section that explains it."""
    text = (ROOT / "params.yaml").read_text()
    lines = [line for line in text.splitlines() if re.match(r"  \w+:", line)]
    without = [line for line in lines if "#" not in line]
    known = {"seed", "epochs", "batch_size", "source", "train_images", "val_images"}
    assert {re.match(r"  (\w+)", line)[1] for line in without} <= known  # type: ignore[index]


def test_the_committed_lock_belongs_to_the_committed_code_and_params() -> None:
    """Whoever changes code or params runs `dvc repro` and commits what it wrote."""
    result = run(ROOT, "dvc", "status", "--json")
    stale = {
        stage: changes
        for stage, entries in json.loads(result.stdout).items()
        for entry in entries
        if isinstance(entry, dict)
        for kind, changes in entry.items()
        if kind == "changed deps" and any(str(path).endswith((".py", "params.yaml")) for path in changes)
    }
    assert not stale, "dvc.lock is older than the code: run `dvc repro` and commit"


# Recorded by an audit hook in every Python process that a stage starts (workers included).
HOOK = """
import os, sys
root, log = os.environ["AUDIT_ROOT"], os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(args[0]))
        writes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if path.startswith(root + os.sep) and os.path.isfile(path) and not writes:
            os.write(log, f"{os.path.relpath(path, root)}\\n".encode())
sys.addaudithook(hook)
"""


# Times differ from run to run: what holds them is no output of DVC's.
UNHASHED = {"profile": {"data/profile", "metrics/profile.json"}, "export": {"metrics/export_speed.json"}}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_opens_exactly_what_it_declares(stage: str, repository: Path, tmp_path: Path) -> None:
    """The files that its processes open, seen by the interpreter itself, are its deps and its outs."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "log"
    environment = {"PYTHONPATH": str(tmp_path / "hook"), "AUDIT_ROOT": str(repository), "AUDIT_LOG": str(log)}
    run(repository, sys.executable, "-m", f"stages.{stage}", environment=environment)
    compiled = re.compile(r"__pycache__/(\w+)\.[\w-]+\.pyc$")  # Python reads it instead of the source
    reads = {compiled.sub(r"\1.py", path) for path in log.read_text().splitlines()}
    declared = paths(STAGES[stage]["deps"])

    def covered(path: str, by: set[str]) -> bool:
        return any(path == name or path.startswith(f"{name}/") for name in by)

    # DVCLive looks at the repository that it runs in.
    internal = re.compile(r"\.dvc/|\.git/|\.git$|\.gitignore$|\.dvcignore$|dvc\.yaml$|dvc\.lock$")
    written = outputs(stage) | UNHASHED.get(stage, set())
    temporary = {re.sub(r"([^/]+)$", rf".\1.{suffix}", path) for path in written for suffix in ("new", "old")}
    undeclared = {
        path
        for path in reads
        if not covered(path, declared | written | temporary | {"params.yaml"})
        and not internal.search(path)
        and "__init__" not in path
    }
    assert not undeclared, f"{stage} reads what dvc.yaml does not declare"
    unread = {name for name in declared if not any(covered(path, {name}) for path in reads)}
    assert not unread, f"{stage} declares what it does not read"


def test_changing_a_module_makes_stale_exactly_the_stages_that_import_it(repository: Path) -> None:
    for module in ("ema", "metrics", "sample", "labels", "params"):
        path = repository / f"stages/core/{module}.py"
        original = path.read_text()
        path.write_text(original + "\n# changed\n")
        status = json.loads(run(repository, "dvc", "status", "--json").stdout)
        expected = {stage for stage in STAGES if f"stages/core/{module}.py" in code_closure(ROOT, f"stages.{stage}")}
        assert set(status) == expected, module
        path.write_text(original)


def test_line_ends_are_the_committed_ones_whatever_git_is_set_to(repository: Path, tmp_path: Path) -> None:
    """Hashes in dvc.lock are of bytes; Git for Windows sets core.autocrlf."""
    run(tmp_path, "git", "clone", "-q", "-c", "core.autocrlf=true", str(repository), "clone")
    for name in run(repository, "git", "ls-files").stdout.splitlines():
        assert (tmp_path / "clone" / name).read_bytes() == (repository / name).read_bytes(), name


@pytest.mark.parametrize("stage", STAGES)
def test_small_results_are_for_git_and_large_ones_for_dvc(stage: str) -> None:
    for kind in ("metrics", "plots"):
        for entry in STAGES[stage].get(kind, []):
            assert all(options["cache"] is False for options in entry.values())
    for path in paths(STAGES[stage].get("outs", [])):
        assert path.startswith(("data/", "models/"))


def test_metrics_plots_and_artifacts_exist_after_a_run(finished_repository: Path) -> None:
    for path in PIPELINE["metrics"]:
        json.loads((finished_repository / path).read_text())
    for entry in PIPELINE["plots"]:
        files = next(iter(entry.values()))["y"]
        assert all((finished_repository / path).stat().st_size for path in files)
    for artifact in PIPELINE["artifacts"].values():
        assert (finished_repository / artifact["path"]).exists()
        assert artifact["type"]
        assert artifact["desc"]
        assert artifact["labels"]


def test_a_commit_has_every_metrics_file(finished_repository: Path) -> None:
    """One that lacks some is marked with '!' by `dvc exp show`, and read anew every time."""
    tracked = run(finished_repository, "git", "ls-files", "metrics").stdout.split()
    assert set(PIPELINE["metrics"]) <= set(tracked)
    assert "!" not in run(finished_repository, "dvc", "exp", "show", "--csv").stdout


def test_no_two_metrics_files_have_a_key_in_common(finished_repository: Path) -> None:
    """`dvc exp show` would put the file's name before both."""
    shown = json.loads(run(finished_repository, "dvc", "metrics", "show", "--json").stdout)[""]["data"]
    keys = [key for path, content in shown.items() for key in content["data"] if "train" not in path]
    assert len(keys) == len(set(keys)) > 10
