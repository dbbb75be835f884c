"""Are the outputs that dvc.lock names whole, in the workspace and in DVC's cache? Every byte is read.

`dvc status` and `dvc checkout` believe what they know of a file (its time, its size, that it is read-only): a file that
was damaged in the cache is checked out without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from stages.core.progress import progress
from stages.core.runtime import num_cpus

WORKSPACE, CACHE = "workspace", "cache"
LISTING = ""  # stands for the list of the files of a folder, which DVC keeps as a file of its own in the cache


@dataclass(frozen=True)
class Problem:
    """One file that is not as dvc.lock says."""

    file: str  # path below the output; LISTING: the output itself, or the list of its files
    where: str  # workspace or cache
    what: str  # missing, altered, extra (workspace only), damaged (cache only), unknown (its listing is lost)
    digest: str = ""  # what it should be: DVC's name of it in the cache


@dataclass
class State:
    """An output of the pipeline, and what is wrong with it."""

    path: str  # from the repository's root
    stage: str  # that makes it, as dvc calls it
    kept_by: str  # dvc (in the cache) or git
    digest: str  # MD5 that dvc.lock has; empty: the stage has not run
    num_files: int = 0
    size: int = 0  # bytes that dvc.lock has
    problems: list[Problem] = field(default_factory=list)
    expected: dict[str, str] = field(default_factory=dict)  # MD5 by path below the output; empty where nobody knows

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        return self.digest.endswith(".dir")

    def found(self, where: str) -> list[Problem]:
        """Its problems in one place."""
        return [problem for problem in self.problems if problem.where == where]


def inspect(repo: Any, paths: Iterable[str] = ()) -> list[State]:
    """Hash the outputs of a dvc.repo.Repo, or those named, in workspace and cache; in the order that stages run."""
    wanted = set(paths)
    outs = [out for stage in ordered_stages(repo) for out in stage.outs if out.is_in_repo]
    outs = [out for out in outs if not wanted or str(out) in wanted]
    listings = {out: _listing(out) for out in outs}
    files = {out: _workspace_files(out) for out in outs}
    to_hash: dict[str, str] = {}  # path -> DVC's name of the algorithm
    for out in outs:
        to_hash |= dict.fromkeys(files[out].values(), out.hash_name)
        if out.use_cache and out.hash_info.value:
            digests = [out.hash_info.value, *(listings[out] or {}).values()]
            objects = [out.cache.oid_to_path(digest) for digest in digests]
            to_hash |= dict.fromkeys(filter(os.path.isfile, objects), out.hash_name)
    hashes = _hash_all(to_hash)
    return [_compare(out, listings[out], files[out], hashes) for out in outs]


def ordered_stages(repo: Any) -> list[Any]:
    """The stages, each after those that it depends on."""
    by_name = {stage.addressing: stage for stage in repo.index.stages}
    before: dict[str, set[str]] = {name: set() for name in by_name}
    for stage, dependency in repo.index.graph.edges:
        before[stage.addressing].add(dependency.addressing)
    return [by_name[name] for name in TopologicalSorter(before).static_order()]


def folder_tree(hashes: dict[str, str], name: str = "md5") -> Any:
    """DVC's listing (dvc_data.hashfile.tree.Tree) of a folder whose files have these hashes; `.oid` is its digest."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree: Any = Tree()  # type: ignore[no-untyped-call]
    for path, digest in hashes.items():
        tree.add(tuple(path.split("/")), None, HashInfo(name, digest))
    tree.digest()
    return tree


def _listing(out: Any) -> dict[str, str] | None:
    """MD5 of each file below an output, as dvc.lock and the cache have it; None where the listing is lost."""
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.errors import ObjectFormatError

    digest = out.hash_info.value
    if not digest:
        return {}
    if not digest.endswith(".dir"):
        return {LISTING: digest}
    if not out.use_cache:
        return None
    try:
        tree = Tree.load(out.cache, out.hash_info)
        listing = {"/".join(key): hash_info.value for key, _, hash_info in tree}
    except (OSError, ObjectFormatError, KeyError, AttributeError, TypeError, ValueError):  # of damaged JSON
        return None
    return listing if folder_tree(listing).oid == digest else None


def _workspace_files(out: Any) -> dict[str, str]:
    """Path of each file in the workspace, by its path below the output."""
    if out.fs.isdir(out.fs_path):
        found = out.dvcignore.find(out.fs, out.fs_path) if out.dvcignore else out.fs.find(out.fs_path)
        return {Path(path).relative_to(out.fs_path).as_posix(): path for path in found if os.path.isfile(path)}  # noqa: PTH113
    return {LISTING: out.fs_path} if os.path.isfile(out.fs_path) else {}  # noqa: PTH113


def _hash_all(algorithms: dict[str, str]) -> dict[str, str]:
    """The hash of every file; hard links to one file are read once."""
    from dvc_data.hashfile.hash import file_md5

    same: dict[tuple[int, int], list[str]] = {}
    for path in algorithms:
        found = os.stat(path)  # noqa: PTH116
        same.setdefault((found.st_dev, found.st_ino), []).append(path)
    with ThreadPoolExecutor(num_cpus()) as pool:
        names = list(same.values())
        results = pool.map(lambda paths: file_md5(paths[0], name=algorithms[paths[0]]), names)
        hashes = list(progress(results, "verify", len(names), "file"))
    return {path: digest for paths, digest in zip(names, hashes, strict=True) for path in paths}


def _compare(out: Any, listing: dict[str, str] | None, files: dict[str, str], hashes: dict[str, str]) -> State:
    digest = out.hash_info.value or ""
    state = State(str(out), out.stage.addressing, "dvc" if out.use_cache else "git", digest, size=out.meta.size or 0)
    if not digest:
        return state
    here = {name: hashes[path] for name, path in files.items()}
    if listing is None and LISTING not in here and folder_tree(here).oid == digest:
        listing = here  # the list is lost, but this is what it said
    state.expected = listing or {}
    state.num_files = len(state.expected)
    if listing is None:
        what = "unknown" if here else "missing"
        state.problems.append(Problem(LISTING, WORKSPACE, what, digest))
    else:
        for name, expected in listing.items():
            if here.get(name) != expected:
                state.problems.append(Problem(name, WORKSPACE, "altered" if name in here else "missing", expected))
        state.problems += [Problem(name, WORKSPACE, "extra") for name in sorted(here.keys() - listing.keys())]
    if out.use_cache:
        named = {LISTING: digest} | (state.expected if state.is_folder else {})
        for name, expected in named.items():
            found = hashes.get(out.cache.oid_to_path(expected))
            if found != expected.removesuffix(".dir"):
                state.problems.append(Problem(name, CACHE, "missing" if found is None else "damaged", expected))
    return state
