"""Have the data a place: DVC's cache and how files get out of it, disk space, and the remote."""

from __future__ import annotations

import os
import queue
import re
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.core.errors import InputError
from tools.doctor.finding import Finding, fail, ok, warn
from tools.doctor.settings import section
from tools.shared.addresses import masked

_LINKS = ["reflink", "hardlink", "symlink"]  # the best first
_PLACEHOLDER = "gdrive://FOLDER_ID"  # until `make remote-gdrive` names a folder
_NEW_URL = "dvc remote modify {} url ..."
_OWNER = "ask its owner, where you have something to push"
_SECONDS_TO_ANSWER = 30.0  # that a remote has
_MUCH = 2e9  # bytes of outputs from which copies instead of links matter
_SPARE = 1e9  # bytes for checkpoints, traces and the like


def cache() -> Finding:
    """How outputs get from DVC's cache into the workspace: the first link type of `cache.type` that works here."""
    from dvc.repo import Repo
    from dvc_objects.fs.generic import test_links

    with Repo() as repo:
        odb, folder = repo.cache.local, repo.cache.local_cache_dir
        wanted = list(odb.cache_types)
        size = sum(out.meta.size or 0 for out in repo.index.outs if out.use_cache)
        try:
            links = test_links(_LINKS, odb.fs, folder, repo.fs, repo.fs.join(repo.root_dir, "link"))
        except OSError as error:
            return fail(f"DVC's cache {folder} is not writable ({error.strerror})", "dvc cache dir --local .dvc/cache")
    possible = [*links, "copy"]
    usable = [link for link in wanted if link in possible]
    if not usable:
        return fail(
            f"cache.type is {','.join(wanted)}, and between {folder} and this folder only {', '.join(possible)} work",
            f"dvc config --local cache.type {','.join(possible)}",
        )
    if usable[0] == "copy" and links and size > _MUCH:
        return warn(
            f"outputs are copied out of {folder}: {_gigabytes(size)} twice on the disk",
            f"dvc config --local cache.type {','.join(links)} && dvc checkout --relink",
        )
    how = {"copy": "copies", "reflink": "reflinks", "hardlink": "hard links", "symlink": "symbolic links"}[usable[0]]
    return ok(f"{how} of {_gigabytes(size)} in {folder}")


def disk() -> Finding:
    """Free space against what running everything again would write."""
    from dvc.repo import Repo

    with Repo() as repo:
        folder = repo.cache.local_cache_dir
        size = sum(out.meta.size or 0 for out in repo.index.outs)
    places = {"this folder": Path.cwd(), "DVC's cache": Path(folder), "runtime.cache_dir": _cache_dir()}
    by_device: dict[int, list[str]] = {}
    free: dict[int, float] = {}
    for name, path in places.items():
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        device = existing.stat().st_dev
        by_device.setdefault(device, []).append(name)
        free[device] = shutil.disk_usage(existing).free
    for device, names in by_device.items():
        need = size * sum(name != "runtime.cache_dir" for name in names) + _SPARE
        if free[device] < need:
            where = f"{' and '.join(names)} ({next(str(places[name]) for name in names)})"
            return fail(
                f"{_gigabytes(free[device])} free for {where}, and a new run writes about {_gigabytes(need)}",
                "dvc gc --all-commits --all-experiments (keeps what these use), or: dvc cache dir --local /larger/disk",
            )
    return ok(f"{_gigabytes(min(free.values()))} free, a new run writes about {_gigabytes(2 * size + _SPARE)}")


def remote() -> Finding:
    """Whether DVC's default remote is there and answers."""
    from dvc.exceptions import DvcException
    from dvc.fs import get_cloud_fs
    from dvc.repo import Repo

    with Repo() as repo:
        config = repo.config
        name = config["core"].get("remote")
        if not name:
            known = sorted(one for one, found in config["remote"].items() if found["url"] != _PLACEHOLDER)
            return warn(
                "there is no default remote for `dvc push` and `dvc pull`",
                f"dvc remote default {known[0]}" if known else "make remote-local",
            )
        if name not in config["remote"]:
            return fail(f"the default remote {name} is not configured", f"dvc remote add {name} /path/to/folder")
        url = config["remote"][name]["url"]
        try:
            cls, settings, path = get_cloud_fs(config, name=name)
        except (DvcException, ImportError) as error:  # a plugin that is not installed, say
            return fail(f"the remote {name} ({masked(url)}): {_words(error)}", _NEW_URL.format(name))
    if cls.protocol == "local":
        return _folder(name, Path(path), settings)
    if cls.protocol == "gdrive":
        return _gdrive(name, url, config["remote"][name])
    if cls.protocol in ("http", "https"):
        return _answers(name, url, lambda: _ask_http(url, config["remote"][name]))
    return _answers(name, url, lambda: cls(**settings).exists(path))


def _folder(name: str, path: Path, settings: dict[str, Any]) -> Finding:
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            return fail(f"the remote {name}: you may not read {path}", f"ask its owner, or: {_NEW_URL.format(name)}")
        if not settings.get("verify"):
            return _unverified(name)
        if not os.access(path, os.W_OK):
            return warn(f"the remote {name}: you may not write into {path}, so pull works and push does not", _OWNER)
        return ok(f"{name}: the folder {path}")
    if path.exists():
        return fail(f"the remote {name}: {path} is no folder", f"dvc remote modify {name} url /path/to/folder")
    return warn(
        f"the remote {name}: there is no folder {path} (a disk that is not mounted?); `dvc push` would make it",
        f"mkdir -p {shlex.quote(str(path))}",
    )


def _unverified(name: str) -> Finding:
    return warn(
        f"the remote {name} does not verify: a damaged download is taken without a word",
        f"dvc remote modify {name} verify true",
    )


def _gdrive(name: str, url: str, settings: dict[str, Any]) -> Finding:
    if not settings.get("gdrive_use_service_account"):
        return fail(
            f"the remote {name} does not use the service account",
            f"dvc remote modify {name} gdrive_use_service_account true",
        )
    if not settings.get("verify"):
        return _unverified(name)
    found = re.fullmatch(r"gdrive://([\w-]{10,})/?", url)
    if found is None:
        return fail(f"the remote {name}: {url} names no folder of Google Drive", "make remote-gdrive FOLDER=...")
    return _answers(name, url, lambda: _ask_google(name, settings, found[1]))


def _ask_google(name: str, settings: dict[str, Any], folder: str) -> None:
    """InputError when the key or the folder is wrong, with what to do about it; nothing is written."""
    from tools.remote.drive_access import check_access
    from tools.remote.drive_key import load_key

    check_access(load_key(name, dict(settings)), folder, writing=False)


def _ask_http(url: str, settings: dict[str, Any]) -> None:
    """ConnectionError and the like when nobody answers, or the server refuses; asked with the remote's own password."""
    import requests

    kind, user, password = (settings.get(key) for key in ("auth", "user", "password"))
    header = settings.get("custom_auth_header")
    if kind == "digest":
        raise InputError("remote: dvc does not know auth = digest any more: use basic over https, or another remote")
    needed = ("custom_auth_header" if kind == "custom" else "user", "password")
    if kind and not settings.get("ask_password") and not all(settings.get(key) for key in needed):
        raise InputError(
            f"remote: auth is {kind}, and its {needed[0]} or password is not set: dvc remote modify --local ..."
        )
    with requests.Session() as session:
        if kind == "basic" and password:
            session.auth = (str(user), password)
        elif kind == "custom" and password:
            session.headers[str(header)] = password
        session.verify = settings.get("ssl_verify", True)

        def status(address: str) -> int:
            return session.head(address, timeout=_SECONDS_TO_ANSWER, allow_redirects=True).status_code

        answer = status(url)
        if answer == 401 and settings.get("ask_password"):
            return  # as dvc will
        if answer == 403:  # of the listing of a folder, perhaps: a file that is not there says more
            answer = status(f"{url.rstrip('/')}/files/md5/00/{30 * '0'}")
        if answer in (401, 403) or answer >= 500:
            raise ConnectionError(f"the server answers with status {answer}")


def _answers(name: str, url: str, ask: Callable[[], object]) -> Finding:
    """Ask a remote, and give it so long to answer: dvc itself can wait for ever."""
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            ask()
        except Exception as error:  # whatever the libraries of some cloud raise
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=run, daemon=True).start()
    try:
        error = answers.get(timeout=_SECONDS_TO_ANSWER)
    except queue.Empty:
        error = TimeoutError(f"no answer within {_SECONDS_TO_ANSWER:g} s")
    url = masked(url)
    if error is None:
        return ok(f"{name}: {url} answers")
    if isinstance(error, InputError):  # its words say what to type
        raise error
    return fail(
        f"the remote {name} ({url}) cannot be reached: {masked(_words(error))}",
        f"look at the network and the proxy; where the address is wrong: {_NEW_URL.format(name)}",
    )


def _cache_dir() -> Path:
    from stages.core.runtime import cache_dir

    return cache_dir(section("runtime"))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
