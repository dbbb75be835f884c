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
    read: dict[tuple[int, int], str] = {}
    files = {out: _workspace_files(out) for out in outs}
    paths_of = {path: out.hash_name for out in outs for path in files[out].values()}
    hashes = _hash_all(paths_of, read, WORKSPACE)
    here = {out: {name: hashes[path] for name, path in files[out].items()} for out in outs}
    listings = {out: _listing(out, here[out]) for out in outs}
    paths_of = {path: out.hash_name for out in outs for path in _cache_files(out, listings[out]).values()}
    hashes = _hash_all(paths_of, read, CACHE)
    return [_compare(out, listings[out], here[out], hashes) for out in outs]


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


def _listing(out: Any, here: dict[str, str]) -> dict[str, str] | None:
    """MD5 of each file below an output, as dvc.lock says; None where that is lost.

    Of a folder, dvc.lock has only the MD5 of a listing. It is in the cache; and it is what lies `here` in the
    workspace, if that has the same MD5.
    """
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.errors import ObjectFormatError

    digest = out.hash_info.value
    if not digest:
        return {}
    if not digest.endswith(".dir"):
        return {LISTING: digest}
    if LISTING not in here and folder_tree(here).oid == digest:
        return here
    if not out.use_cache:
        return None
    try:
        tree = Tree.load(out.cache, out.hash_info)
        listing = {"/".join(key): hash_info.value for key, _, hash_info in tree}
    except (OSError, ObjectFormatError, KeyError, AttributeError, TypeError, ValueError):  # of damaged JSON
        return None
    return listing if folder_tree(listing).oid == digest else None


def _cache_files(out: Any, listing: dict[str, str] | None) -> dict[str, str]:
    """The files that there are in the cache for an output, by their digest."""
    if not (out.use_cache and out.hash_info.value):
        return {}
    digests = [out.hash_info.value, *(listing or {}).values()]
    paths = {digest: out.cache.oid_to_path(digest) for digest in digests}
    return {digest: path for digest, path in paths.items() if os.path.isfile(path)}  # noqa: PTH113


def _workspace_files(out: Any) -> dict[str, str]:
    """Path of each file in the workspace, by its path below the output."""
    if out.fs.isdir(out.fs_path):
        found = out.dvcignore.find(out.fs, out.fs_path) if out.dvcignore else out.fs.find(out.fs_path)
        return {Path(path).relative_to(out.fs_path).as_posix(): path for path in found if os.path.isfile(path)}  # noqa: PTH113
    return {LISTING: out.fs_path} if os.path.isfile(out.fs_path) else {}  # noqa: PTH113


def _hash_all(algorithms: dict[str, str], read: dict[tuple[int, int], str], what: str) -> dict[str, str]:
    """The hash of each path; `read` are those of files by device and inode: of hard links, one is read."""
    from dvc_data.hashfile.hash import file_md5

    inodes = {path: ((found := os.stat(path)).st_dev, found.st_ino) for path in algorithms}  # noqa: PTH116
    new = {inode: path for path, inode in inodes.items() if inode not in read}
    with ThreadPoolExecutor(num_cpus()) as pool:
        results = pool.map(lambda path: file_md5(path, name=algorithms[path]), new.values())
        read |= dict(zip(new, progress(results, f"verify {what}", len(new), "file"), strict=True))
    return {path: read[inode] for path, inode in inodes.items()}


def _compare(out: Any, listing: dict[str, str] | None, here: dict[str, str], cached: dict[str, str]) -> State:
    """`here`: MD5 by path below the output; `cached`: MD5 by path in the cache."""
    digest = out.hash_info.value or ""
    state = State(str(out), out.stage.addressing, "dvc" if out.use_cache else "git", digest, size=out.meta.size or 0)
    if not digest:
        return state
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
            found = cached.get(out.cache.oid_to_path(expected))
            if found != expected.removesuffix(".dir"):
                state.problems.append(Problem(name, CACHE, "missing" if found is None else "damaged", expected))
    return state
