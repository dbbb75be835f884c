"""The model registry: versions of the model are commits, named by GTO's tags, and stages say which one is where.

    python -m tools.registry register                  make the last commit the next version (make register)
    python -m tools.registry promote STAGE [VERSION]   put a version, by default the newest, into a stage (make promote)
    python -m tools.registry show                      versions, stages, and how good each is
    python -m tools.registry push                      copy the data of all versions to DVC's remote
    python -m tools.registry fetch NAME                a folder with the model of a stage, version, experiment, revision

Nothing is stored twice: a version is a commit whose code, params and dvc.lock make the model again, and whose data DVC
holds. docs/REGISTRY.md explains.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from stages.core.errors import InputError, run_main
from tools.registry import revision
from tools.registry.revision import model_folder
from tools.registry.versions import ARTIFACT, Registry, nearest, read_registry
from tools.shared.commands import dvc, git, gto

_CONFIG = Path(".gto")  # names the stages
_MODELS = "models"
_PUSH = "share it: python -m tools.registry push && git push && git push --tags"


@dataclass(frozen=True)
class Registered:
    """A version, and whether it is new."""

    version: str
    is_new: bool

    @property
    def tag(self) -> str:
        """The git tag that makes the version."""
        return f"{ARTIFACT}@{self.version}"


def register_commit(commit: str) -> Registered:
    """Make a commit the next version, if it is none yet."""
    if version := read_registry().version_of(commit):
        return Registered(version, False)
    gto("register", ARTIFACT, commit)
    version = read_registry().version_of(commit)
    assert version is not None
    return Registered(version, True)


def register() -> None:
    """Register HEAD; InputError unless its model can be made again and is in DVC's cache."""
    from tools.shared import committed

    commit = committed.check_repository()
    committed.check_files()
    if version := read_registry().version_of(commit):
        print(f"registry: commit {commit[:7]} is {version} already")
        return
    if missing := json.loads(dvc("data", "status", "--json", "--granular", _MODELS)).get("not_in_cache"):
        raise InputError(
            f"not in DVC's cache: {', '.join(missing[:5])}; `dvc repro`, `dvc pull` or `dvc commit` brings it there"
        )
    committed.check_results()
    registered = register_commit(commit)
    print(f"registry: commit {commit[:7]} is {registered.version} now{_quality(commit)} (tag {registered.tag})")
    print(f"          {_PUSH}; put it to work: make promote STAGE=prod")


def promote(stage: str, version: str | None) -> None:
    """Put a version into a stage, whose earlier one leaves it. An older version goes back in the same way."""
    from tools.shared import committed

    committed.check_repository()
    stages = _stages()
    if stage not in stages:
        raise InputError(f"unknown stage {stage!r}{nearest(stage, stages)}; {_CONFIG} names {', '.join(stages)}")
    registry = read_registry()
    if not registry.versions:
        raise InputError("no version is registered yet: make register")
    version = version or list(registry.versions)[-1]
    commit = registry.versions.get(version)
    if commit is None:
        known = list(registry.versions)
        raise InputError(f"unknown version {version!r}{nearest(version, known)}; registered are {', '.join(known)}")
    before = registry.stages.get(stage)
    if before == commit:
        print(f"registry: {version} is in {stage} already")
        return
    _wait_for_a_later_second(registry)
    # gto calls a second promotion of a version to a stage a mistake, unless it is forced: rolling back is one.
    gto("assign", ARTIFACT, "--version", version, "--stage", stage, "--force")
    was = f", where {registry.version_of(before) or before[:7]} was" if before else ""
    print(f"registry: {version} is in {stage} now{was}{_quality(commit)}")
    print(f"          {_PUSH}; get it anywhere: python -m tools.registry fetch {stage}")


def show() -> None:
    """Print the versions, the newest first."""
    registry = read_registry()
    if not registry.versions:
        print("registry: no version is registered yet: make register")
        return
    rows = [("version", "stages", "commit", "date", "top1", "subject")]
    for version, commit in reversed(registry.versions.items()):
        date, _, subject = git("show", "--no-show-signature", "--no-patch", "--format=%cs %s", commit).partition(" ")
        top1 = _top1(commit)
        stages = " ".join(registry.stages_of(commit))
        rows.append((version, stages, commit[:7], date, "" if top1 is None else f"{top1:.4f}", subject))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(_PUSH)


def push() -> None:
    """Copy the data of all versions to DVC's remote."""
    versions = read_registry().versions
    if not versions:
        raise InputError("no version is registered yet: make register")
    count, remote = revision.push(list(versions.values()))
    print(f"registry: the data of {', '.join(versions)} is on the remote {remote} ({count} files new there)")


def _stages() -> list[str]:
    from ruamel.yaml import YAML

    if not _CONFIG.exists():
        raise InputError(f"{_CONFIG} is missing, which names the stages: git checkout {_CONFIG}")
    stages: list[str] = YAML(typ="safe", pure=True).load(_CONFIG.read_text())["stages"]
    return stages


def _wait_for_a_later_second(registry: Registry) -> None:
    """The times of tags, which order them, are whole seconds: of two in one second, gto would take either."""
    ahead = registry.last_change + 1 - time.time()
    if ahead > 60:
        raise InputError(f"the last tag of {ARTIFACT} is {ahead:.0f} s in the future; set this machine's clock")
    time.sleep(max(ahead, 0))


def _top1(commit: str) -> float | None:
    metrics = git("show", f"{commit}:metrics/evaluate.json", check=False)
    return json.loads(metrics)["top1"] if metrics else None


def _quality(commit: str) -> str:
    top1 = _top1(commit)
    return "" if top1 is None else f", top1 {top1:.4f}"


def main(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if not Path(".git").exists():
        raise InputError("no git repository here; run this from the root of the repository")
    if arguments.command == "register":
        register()
    elif arguments.command == "promote":
        promote(arguments.stage, arguments.version)
    elif arguments.command == "push":
        push()
    elif arguments.command == "fetch":
        print(model_folder(arguments.name, arguments.path))
    else:
        show()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="registry", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("register", help="make the last commit the next version")
    promotion = commands.add_parser("promote", help="put a version into a stage, or back into it")
    promotion.add_argument("stage", help=f"one of those that {_CONFIG} names")
    promotion.add_argument("version", nargs="?", help="for example v0.0.2 (the newest)")
    commands.add_parser("show", help="list versions and stages")
    commands.add_parser("push", help="copy the data of all versions to DVC's remote")
    fetching = commands.add_parser("fetch", help="get a model, and print its folder")
    fetching.add_argument("name", help="a stage, a version, an experiment or a git revision")
    fetching.add_argument("--path", default="models/classifier", help="what of it (models/classifier)")
    return parser.parse_args()


def run() -> None:
    """The body of the process."""
    run_main(lambda: main(_parse()), "registry")
