"""The service account's key for Google Drive: where it is, and whether it can be one.

dvc takes the key file that its configuration names, even when it is missing, and else the text in the variable
GDRIVE_CREDENTIALS_DATA. Of a wrong one it says "Expecting value: line 1 column 1" or "DECODER routines"; here every
mistake has a message that says what to do. None of them shows any of the key.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.core.errors import InputError

VARIABLE = "GDRIVE_CREDENTIALS_DATA"
FOLDER = Path(".secrets")  # ignored by git and Docker
CONFIGURED = "gdrive_service_account_json_file_path"
_SERVICE = "gdrive_use_service_account"
_FIELDS = ("client_email", "client_id", "private_key_id", "private_key", "token_uri")
_HOW = "docs/REMOTE.md shows how to make one"


@dataclass(frozen=True)
class Key:
    """A service account's key. `text` and `info` are secret, and left out of the representation."""

    origin: str  # as messages call it
    file: Path | None
    text: str = field(repr=False)
    info: dict[str, str] = field(repr=False)

    @property
    def email(self) -> str:
        """Address of the service account, with which folders are shared."""
        return self.info["client_email"]

    @property
    def id(self) -> str:
        """Name of the key, as the console lists it. It is no secret."""
        return self.info["private_key_id"]


def load_key(name: str, settings: dict[str, Any]) -> Key:
    """The key that dvc would use for a remote, or that it could be told to use; InputError when it cannot be one.

    `settings` are those of the remote `name` in dvc's merged configuration. Google is not asked.
    """
    if not settings.get(_SERVICE):
        raise InputError(
            f"{_SERVICE} is off for the remote {name}, so dvc would open a browser: "
            f"dvc remote modify {name} {_SERVICE} true, and commit .dvc/config"
        )
    if configured := settings.get(CONFIGURED):
        path = Path(configured)
        if not path.exists():
            raise InputError(
                f"the key file {_shown(path)} is missing, which dvc's configuration names (and prefers to {VARIABLE}): "
                f"put it there, or dvc remote modify --local --unset {name} {CONFIGURED}"
            )
        return _read(path)
    if text := os.environ.get(VARIABLE):
        return parse(text, VARIABLE)
    return _read(_only_key_file())


def parse(text: str, origin: str, file: Path | None = None) -> Key:
    """Check a key's text; InputError says what it is instead, and calls it `origin`."""
    try:
        info = json.loads(text)
    except ValueError:
        raise InputError(_no_json(text, origin)) from None
    if not isinstance(info, dict):
        kind = "a list" if isinstance(info, list) else "a string" if isinstance(info, str) else "a number or a constant"
        raise InputError(f"{origin} is {kind} in JSON, not a key's object {{...}}: give the key file's text as it is")
    if info.get("type") != "service_account":
        raise InputError(
            f"{origin} is {_kind(info)}, not the key of a service account: make one in the console under IAM & Admin > "
            f"Service Accounts > Keys > Add key > JSON ({_HOW})"
        )
    if missing := [name for name in _FIELDS if not isinstance(info.get(name), str) or not info[name]]:
        raise InputError(f"{origin} lacks {', '.join(missing)}: give the whole key file, as the console made it")
    _check_private_key(info["private_key"], origin)
    return Key(origin, file, text, info)


def _only_key_file() -> Path:
    """The one key in .secrets/."""
    try:
        files = sorted(FOLDER.glob("*.json"))
    except OSError as error:
        raise InputError(f"{FOLDER} cannot be read ({error.strerror}): make it yours, chmod 700 {FOLDER}") from None
    if not files:
        raise InputError(
            f"no key for Google Drive: put the service account's key file into {FOLDER}/ (its name ends in .json), or "
            f"its text into {VARIABLE}; {_HOW}"
        )
    if len(files) > 1:
        raise InputError(
            f"{FOLDER}/ has several key files ({', '.join(file.name for file in files)}): say which one with "
            f"python -m tools.remote save-key FILE"
        )
    return files[0]


def _read(path: Path) -> Key:
    shown = _shown(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{shown} is no text: give the JSON key, not the .p12 one ({_HOW})") from None
    except IsADirectoryError:
        raise InputError(f"{shown} is a folder: put the key file itself there") from None
    except OSError as error:
        raise InputError(
            f"{shown} cannot be read ({error.strerror}): it must be yours and readable, chown $(id -u) {shown} && "
            f"chmod 600 {shown}"
        ) from None
    return parse(text, shown, path)


def _shown(path: Path) -> str:
    """A path as the user would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _no_json(text: str, origin: str) -> str:
    text = text.strip()
    if origin == VARIABLE and _is_path(text):
        return f'{VARIABLE} holds a path, and must hold the file\'s text: export {VARIABLE}="$(cat "${VARIABLE}")"'
    try:
        if base64.b64decode("".join(text.split()), validate=True).lstrip().startswith(b"{"):
            decode = (
                f'export {VARIABLE}="$(printf %s "${VARIABLE}" | base64 -d)"'
                if origin == VARIABLE
                else f"base64 -d < {origin} > key.json && mv key.json {origin}"
            )
            return f"{origin} is base64, and must be the JSON text itself: {decode}"
    except ValueError:
        pass
    if not text:
        return f"{origin} is empty: give the service account's JSON key ({_HOW})"
    return f"{origin} is not JSON: give the text of the service account's key file as it is, from {{ to }} ({_HOW})"


def _is_path(text: str) -> bool:
    if "\n" in text or len(text) > 1000 or text.startswith("{"):
        return False
    return text.endswith(".json") or text.startswith(("/", "~/", "./", "../")) or Path(text).is_file()


def _kind(info: dict[str, Any]) -> str:
    if "installed" in info or "web" in info:
        return "an OAuth client"
    if info.get("type") == "authorized_user" or "refresh_token" in info:
        return "a person's login"
    return f"JSON of the type {info['type']!r}" if isinstance(info.get("type"), str) else "some other JSON"


def _check_private_key(pem: str, origin: str) -> None:
    """Sign something, with the library that dvc's client signs with."""
    from oauth2client.crypt import Signer

    try:
        Signer.from_string(pem).sign(b"")
    except Exception:  # of whichever parser it has
        lost = "its line breaks are \\\\n and must be \\n" if "\\n" in pem else "it is cut, or its line breaks are lost"
        raise InputError(
            f"private_key in {origin} is damaged ({lost}): copy the whole key file again, or make a new key ({_HOW})"
        ) from None
