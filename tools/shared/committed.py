"""Is the workspace what the last commit says? What is registered or retrained has to be made again from a commit."""

from __future__ import annotations

import json
from pathlib import Path

from ruamel.yaml import YAML

from stages.core.errors import InputError
from tools.shared.commands import dvc, git


def check_repository() -> str:
    """The commit that HEAD is at; InputError when there is none, or git could not make another one."""
    if not Path(".git").exists() or not Path(".dvc").is_dir():
        raise InputError("no git repository with DVC here; run this from the root of the repository")
    head = git("rev-parse", "--verify", "--quiet", "HEAD", check=False)
    if not head:
        raise InputError("the repository has no commit yet; commit first")
    git("var", "GIT_COMMITTER_IDENT")
    return head


def check_files() -> None:
    """InputError when tracked files differ from HEAD, or results are not tracked."""
    if changed := changed_files():
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise InputError(f"changes that are not committed: {', '.join(changed[:5])}{more}; commit or stash them first")
    if untracked := _untracked_results():
        raise InputError(f"results that git does not track yet: {', '.join(untracked[:5])}; commit them first")


def check_results() -> None:
    """InputError when data and models are not those that HEAD's code and params make."""
    stale = set(json.loads(dvc("status", "--json"))) - {"profile"}  # its times belong to a machine, not to a commit
    if stale:
        raise InputError(
            f"data and models are not those of the last commit: {', '.join(sorted(stale))} "
            f"{'is' if len(stale) == 1 else 'are'} stale; run `dvc repro` (or `dvc checkout`, or `make pull`) and "
            "commit first"
        )


def changed_files() -> list[str]:
    """Tracked files that differ from HEAD. Untracked ones are no part of an experiment and are left alone."""
    lines = git("status", "--porcelain", "-z", "--untracked-files=no", "--no-renames", strip=False).split("\0")
    return sorted(line[3:] for line in lines if line)


def _untracked_results() -> list[str]:
    """Outputs of the pipeline that lie in the workspace untracked: git would have to overwrite them."""
    lock = YAML(typ="safe", pure=True).load(Path("dvc.lock")) if Path("dvc.lock").exists() else {"stages": {}}
    outputs = {out["path"] for stage in lock["stages"].values() for out in stage.get("outs", ())}
    untracked = git("ls-files", "--others", "--exclude-standard", "-z", strip=False).split("\0")
    return sorted(outputs.intersection(untracked))
