"""Which commits are versions of the model, and which version is in which stage: GTO's tags, read with one git call.

    classifier@v0.0.2       this commit is version v0.0.2             classifier@v0.0.2!    ... is no longer
    classifier#prod#4       this commit is put into stage prod        classifier#prod!#5    ... is taken out of it

gto itself takes longer to import than a prediction may take to start. The rules are its own: the last tag of a stage
counts, by the time of the tag, and tags without annotation do not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from stages.core.errors import InputError
from tools.shared.commands import git

ARTIFACT = "classifier"  # in `artifacts:` of dvc.yaml; a version of it is a version of all that its commit made
_TAG = re.compile(
    rf"{ARTIFACT}(?:@(?P<version>v\d+\.\d+\.\d+(?:-[\w.-]+)?(?:\+[\w.-]+)?)|#(?P<stage>[\w-]+))(?P<cancels>!?)(?:#(?P<counter>\d+))?"
)
_EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/([0-9a-f]{38})/([^/]+)")
_FORMAT = "%(refname:strip=2)%00%(objecttype)%00%(*objectname)%00%(taggerdate:unix)"


@dataclass(frozen=True)
class Registry:
    """What the tags say: commits by version, the oldest first, and by stage; `last_change` in seconds since 1970."""

    versions: dict[str, str] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    last_change: int = 0

    def version_of(self, commit: str) -> str | None:
        """The version that a commit is registered as."""
        return next((version for version, registered in self.versions.items() if registered == commit), None)

    def stages_of(self, commit: str) -> list[str]:
        """The stages that a commit is in now."""
        return sorted(stage for stage, assigned in self.stages.items() if assigned == commit)

    def describe(self) -> str:
        """Versions and stages in words, for messages."""
        versions = ", ".join(self.versions) or "none (make register)"
        stages = ", ".join(f"{stage} ({self.version_of(self.stages[stage]) or 'no version'})" for stage in self.stages)
        return f"versions: {versions}; stages: {stages or 'none (make promote)'}"


def read_registry() -> Registry:
    """Read the tags of this repository."""
    tags = []
    for line in git("for-each-ref", f"--format={_FORMAT}", f"refs/tags/{ARTIFACT}[@#]*").splitlines():
        name, kind, commit, seconds = line.split("\0")
        if kind == "tag" and (match := _TAG.fullmatch(name)):
            tags.append((int(seconds), int(match["counter"] or 0), commit, match))
    versions: dict[str, str] = {}
    stages: dict[str, dict[str, str]] = {}  # the commits that are in a stage, the last one last
    for _, _, commit, match in sorted(tags, key=lambda tag: tag[:2]):
        holders = versions if match["version"] else stages.setdefault(match["stage"], {})
        key = match["version"] or commit
        holders.pop(key, None)
        if not match["cancels"]:
            holders[key] = commit
    return Registry(
        {version: versions[version] for version in sorted(versions, key=_order)},
        {stage: list(commits)[-1] for stage, commits in sorted(stages.items()) if commits},
        max((tag[0] for tag in tags), default=0),
    )


def resolve(name: str) -> str:
    """The commit that a stage, a version, an experiment or a revision of git names, looked for in this order."""
    registry = read_registry()
    if commit := registry.stages.get(name) or registry.versions.get(name):
        return commit
    experiments = _experiments()
    if found := experiments.get(name):
        if len(found) == 1:
            return found[0]
        raise InputError(f"several experiments are named {name}; say which by its commit: {', '.join(found)}")
    revision = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", check=False)
    if revision:
        return revision
    known = [*registry.stages, *registry.versions, *experiments]
    raise InputError(
        f"no stage, version, experiment or git revision is named {name!r}{nearest(name, known)}; {registry.describe()}"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A guess at what was meant, in words; empty where nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _experiments() -> dict[str, list[str]]:
    """Commits of DVC's experiments by name; HEAD's own come first, and alone where it has one of that name."""
    head = git("rev-parse", "--verify", "--quiet", "HEAD", check=False)
    own: dict[str, list[str]] = {}
    all_of_them: dict[str, list[str]] = {}
    for line in git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").splitlines():
        commit, reference = line.split(" ", 1)
        if match := _EXPERIMENT.fullmatch(reference):
            all_of_them.setdefault(match[2], []).append(commit)
            if head.endswith(match[1]):
                own[match[2]] = [commit]
    return all_of_them | own


def _order(version: str) -> tuple[list[int], bool, list[tuple[bool, int, str]]]:
    """Semantic versions in their order: v0.0.9 before v0.0.10, v1.0.0-rc.2 before v1.0.0-rc.10 before v1.0.0."""
    core, _, pre_release = version[1:].partition("+")[0].partition("-")
    parts = [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in pre_release.split(".")]
    return [int(number) for number in core.split(".")], pre_release == "", parts
