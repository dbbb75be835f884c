"""DVC's remote: set it up, ask whether it works, and push and pull with patience.

    python -m tools.remote setup-local [DIR]      a folder as the remote, without any account (make remote-local)
    python -m tools.remote setup-gdrive FOLDER    a Google Drive folder as everybody's remote (make remote-gdrive)
    python -m tools.remote save-key [FILE]        keep a key, or that of the variable, in .secrets/, for dvc to find
    python -m tools.remote check                  would a push work?
    python -m tools.remote push                   copy data and models to the remote (make push)
    python -m tools.remote pull                   get them from there (make pull)

docs/REMOTE.md explains.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.core.errors import InputError, run_main
from tools.remote.drive_access import QUOTA_REASONS, Access, check_access, quota_message
from tools.remote.drive_key import CONFIGURED, FOLDER, VARIABLE, Key, load_key, parse
from tools.remote.transfer import ATTEMPTS, PATIENCE, final_reason, transfer
from tools.shared.addresses import masked
from tools.shared.arguments import at_least
from tools.shared.commands import git

_GDRIVE = "gdrive"  # names of the two remotes that are set up here
_LOCAL = "local"
_PLACEHOLDER = "FOLDER_ID"
_DEFAULT_DIRECTORY = Path("../driftline-remote")
_SAVED_KEY = FOLDER / "gdrive-key.json"


def setup_local(directory: Path) -> None:
    """Make a folder the remote of this clone alone."""
    try:
        directory = directory.expanduser()  # make hands on what some shells leave as it is: DIR=~/remote
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of no user
        raise InputError(
            f"{directory} cannot be the remote ({getattr(error, 'strerror', error)}): name a folder that you may write"
        ) from None
    with _config().edit("local") as config:
        config["remote"][_LOCAL] = {"url": str(directory.resolve()), "verify": "true"}
        config["core"]["remote"] = _LOCAL
    print(
        f"remote: {directory} is this clone's remote now (.dvc/config.local): make push; in another clone, make "
        f"remote-local DIR={shlex.quote(str(directory.resolve()))}, then make pull"
    )


def setup_gdrive(folder: str) -> None:
    """Make a Google Drive folder everybody's remote, in the tracked configuration."""
    folder_id = _folder_id(folder)
    with _config().edit("local") as config:
        if config.get("core", {}).get("remote") == _LOCAL:
            del config["core"]["remote"]
    with _config().edit("repo") as config:
        config["remote"][_GDRIVE] = {
            "gdrive_use_service_account": "true",
            "gdrive_trash_only": "true",  # a content manager of a Shared Drive may not delete
            "verify": "true",  # otherwise dvc accepts a damaged download
            **config["remote"].get(_GDRIVE, {}),
            "url": f"gdrive://{folder_id}",
        }
        config["core"]["remote"] = _GDRIVE
    print(f"remote: gdrive://{folder_id} is the remote now; share it: git add .dvc/config && git commit")
    check()


def save_key(file: Path | None) -> None:
    """Keep a key as a file that only its owner may read, and name it in .dvc/config.local.

    Stages inherit the environment, so that a key in the variable would be in theirs; dvc prefers the file.
    """
    if file is not None:
        try:
            text, origin = file.expanduser().read_text("utf-8-sig"), str(file)
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read ({error}): name the key file that the console made") from None
    else:
        text, origin = os.environ.get(VARIABLE, ""), VARIABLE
        if not text:
            raise InputError(f"{VARIABLE} is not set: python -m tools.remote save-key FILE takes a key file")
    key = parse(text, origin)
    if git("ls-files", str(FOLDER), check=False):
        raise InputError(
            f"git tracks files in {FOLDER}: git rm -r --cached {FOLDER}, then delete those keys in the console"
        )
    config = _config()
    name = config["core"].get("remote", _GDRIVE)
    if not _is_gdrive(config["remote"].get(name, {"url": ""})):
        name = _GDRIVE
    if name not in config["remote"]:
        raise InputError("no remote of Google Drive is configured: make remote-gdrive FOLDER=<its address> first")
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    temporary = _SAVED_KEY.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as target:
        target.write(key.text)
    temporary.replace(_SAVED_KEY)
    _name_key(name, _SAVED_KEY)
    print(f"remote: the key of {key.email} is in {_SAVED_KEY}, where dvc finds it; {VARIABLE} is not needed")


def check() -> None:
    """Say what the remote is and whether it would take a push."""
    name, settings = _remote()
    if not _is_gdrive(settings):
        _check_folder(name, settings, writing=True)
        print(f"remote: {name} is {masked(settings['url'])}")
        return
    key, access = _ask(name, settings, writing=True)
    place = "in a Shared Drive" if access.is_shared_drive else "in My Drive"
    print(f"remote: {name} is the folder {access.title} {place}, and {key.email} may write there (key {key.id[:12]})")


def move(command: str, patience: float, attempts: int, allow_missing: bool = False) -> None:
    """Push or pull the pipeline's outputs, but those that are made again in no time (`push: false` in dvc.yaml).

    With `allow_missing`, it is no fault when the remote lacks something.
    """
    name, settings = _remote()
    writing = command == "push"
    pushed = _pushed_outputs()  # for a push, too: it refuses a conflict, which dvc would be asked about again and again
    targets = [] if writing else pushed  # dvc knows what is not to be pushed
    if not writing and not targets:
        print("remote: dvc.lock names nothing to pull: nothing has run yet; dvc repro does")
        return
    words = [command, "--remote", name, *(["--allow-missing"] if allow_missing else []), *targets]
    if not _is_gdrive(settings):
        _check_folder(name, settings, writing)

        def explain_folder(reasons: str) -> None:
            final_reason(reasons)
            if "://" not in settings["url"] and "CheckoutError" in reasons:
                raise InputError(
                    f"the remote {name} has a damaged file, which was not taken: remove it from {settings['url']} (the "
                    "MD5 hash of a file's content is its path there), and push again where it was made"
                )

        transfer(words, patience, attempts, explain_folder, {})
        return
    key, _ = _ask(name, settings, writing)

    def explain(reasons: str) -> None:
        final_reason(reasons)
        if any(reason in reasons for reason in QUOTA_REASONS):
            raise InputError(quota_message(key))
        with suppress(ConnectionError):  # then the network is away, and another try is not useless
            check_access(key, _drive_folder(name, settings), writing)

    variables = {VARIABLE: key.text} if key.file is None else {}
    transfer(words, patience, attempts, explain, variables)


def _check_folder(name: str, settings: dict[str, Any], writing: bool) -> None:
    """InputError for a remote that is a folder, and not there: dvc would make it, below an empty mount point, say."""
    if "://" in settings["url"]:
        return
    path = Path(settings["url"])  # dvc's configuration has made it absolute
    if not path.is_dir():
        raise InputError(
            f"the remote {name}: there is no folder {path}: mount its disk, or make it; in a container, mount it at "
            f"this path, too (DOCKER_OPTS='--volume {path}:{path}')"
        )
    if not os.access(path, os.R_OK | os.X_OK | (os.W_OK if writing else 0)):
        raise InputError(f"the remote {name}: you may not {'write into' if writing else 'read'} {path}: ask its owner")


def _ask(name: str, settings: dict[str, Any], writing: bool) -> tuple[Key, Access]:
    """Key and access of a Google Drive remote; dvc is told where the key is."""
    folder = _drive_folder(name, settings)
    key = load_key(name, settings)
    access = check_access(key, folder, writing)
    if key.file is not None and CONFIGURED not in settings:
        _name_key(name, key.file)
    if key.file is not None and key.file.stat().st_mode & 0o077:
        print(f"remote: others may read the key {key.origin}: chmod 600 {key.origin}", file=sys.stderr)
    return key, access


def _name_key(name: str, file: Path) -> None:
    """Name the key file in .dvc/config.local, where dvc looks for it."""
    with _config().edit("local") as config:
        config["remote"].setdefault(name, {})[CONFIGURED] = str(file)  # kept relative, so it holds in a container too


def _remote() -> tuple[str, dict[str, Any]]:
    """Name and settings of the default remote."""
    config = _config()
    name = config["core"].get("remote")
    if not name:
        raise InputError(
            "no remote is set up: make remote-gdrive FOLDER=... for Google Drive, or make remote-local for a folder"
        )
    if name not in config["remote"]:
        raise InputError(f"the default remote {name} is not in dvc's configuration: dvc remote add {name} URL")
    return name, dict(config["remote"][name])


def _config() -> Any:
    from dvc.config import Config, ConfigError

    if not Path(".dvc").is_dir():
        raise InputError("no DVC repository here; run this from the root of the repository")
    try:
        return Config.from_cwd(validate=True)
    except ConfigError as error:
        raise InputError(f"dvc's configuration is damaged: {error}") from None


def _is_gdrive(settings: dict[str, Any]) -> bool:
    return str(settings["url"]).startswith("gdrive://")


def _drive_folder(name: str, settings: dict[str, Any]) -> str:
    """The folder's id of a Google Drive remote."""
    folder_id = str(settings["url"]).removeprefix("gdrive://").strip("/")
    if folder_id in ("", _PLACEHOLDER):
        raise InputError(f"the folder of the remote {name} is not set yet: make remote-gdrive FOLDER=...")
    if "/" in folder_id:
        raise InputError(
            f"the remote {name} is a path below a folder ({folder_id}), which dvc does not make: open that folder in "
            f"the browser, and make remote-gdrive FOLDER=<its address>"
        )
    return folder_id


def _folder_id(folder: str) -> str:
    """The id in a folder's address, or the id itself."""
    match = re.search(r"/folders/([\w-]+)|[?&]id=([\w-]+)", folder)
    folder_id = next(filter(None, match.groups())) if match else folder.removeprefix("gdrive://").strip("/")
    if not re.fullmatch(r"[\w-]{10,}", folder_id):
        raise InputError(
            f"FOLDER is {folder!r}, which is no folder of Google Drive: give the address that the browser shows "
            f"(https://drive.google.com/drive/folders/...), or what stands after folders/ in it"
        )
    return folder_id


def _pushed_outputs() -> list[str]:
    """What a push would have copied: the paths to ask dvc for in a pull."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(".") as repo:
            outputs = [out for out in repo.index.outs if out.use_cache and out.can_push and out.hash_info]
            return sorted(os.path.relpath(out.fs_path) for out in outputs)
    except DvcException as error:  # a conflict in dvc.lock, say
        raise InputError(f"dvc cannot read the pipeline: {' '.join(str(error).split())}") from None


def main(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if arguments.command == "setup-local":
        setup_local(arguments.directory)
    elif arguments.command == "setup-gdrive":
        setup_gdrive(arguments.folder)
    elif arguments.command == "save-key":
        save_key(arguments.file)
    elif arguments.command == "check":
        check()
    else:
        move(arguments.command, arguments.patience, arguments.attempts, arguments.allow_missing)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="remote", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    local = commands.add_parser("setup-local", help="a folder as this clone's remote: no account is needed")
    local.add_argument("directory", nargs="?", type=Path, default=_DEFAULT_DIRECTORY, help=f"({_DEFAULT_DIRECTORY})")
    gdrive = commands.add_parser("setup-gdrive", help="a Google Drive folder as everybody's remote")
    gdrive.add_argument("folder", help="its address in the browser, or its id")
    saving = commands.add_parser("save-key", help=f"keep a key in {FOLDER}/, where dvc finds it")
    saving.add_argument("file", nargs="?", type=Path, help=f"the key file (what {VARIABLE} holds)")
    commands.add_parser("check", help="would a push work?")
    for name, text in (("push", "copy data and models to the remote"), ("pull", "get them from there")):
        moving = commands.add_parser(name, help=text)
        moving.add_argument("--patience", type=float, default=PATIENCE, help=f"seconds without progress ({PATIENCE:g})")
        moving.add_argument("--attempts", type=at_least(1), default=ATTEMPTS, help=f"tries in all ({ATTEMPTS})")
        moving.set_defaults(allow_missing=False)
    pulling = commands.choices["pull"]
    pulling.add_argument("--allow-missing", action="store_true", help="what the remote lacks will be made here")
    return parser.parse_args()


def run() -> None:
    """The body of the process."""
    run_main(lambda: main(_parse()), "remote")
