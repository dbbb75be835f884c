"""Would Google Drive take this key for this folder? Asked before dvc is, whose own answer names no fix."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import quote

from stages.core.errors import InputError
from tools.remote.drive_key import Key

_API = "https://www.googleapis.com/drive/v2"
_SCOPES = ["https://www.googleapis.com/auth/drive"]
_FOLDER = "application/vnd.google-apps.folder"
_FIELDS = "id,title,mimeType,driveId,labels(trashed),capabilities(canAddChildren)"
_SECONDS = 20.0  # to wait for an answer
_PAUSES = (0.5, 1.0, 2.0, 4.0)  # between questions that Google is too busy to answer
_SHARED_DRIVE = "a service account has no storage of its own, so use a folder in a Shared Drive (docs/REMOTE.md)"
QUOTA_REASONS = ("storageQuotaExceeded", "quotaExceeded", "FileLimitExceeded", "do not have storage quota")


@dataclass(frozen=True)
class Access:
    """What a key may do with a folder."""

    title: str
    is_shared_drive: bool
    is_writable: bool


def check_access(key: Key, folder: str, writing: bool) -> Access:
    """Log in and look at the folder; InputError names what the user has to do.

    ConnectionError when Google cannot be reached, or has no time for us.
    """
    answer = _ask(key, f"files/{folder}", _FIELDS)
    if answer is None:
        raise InputError(
            f"the folder {folder} is not there, or not shared with {key.email}: share it with this address as "
            f"Content manager (Editor in My Drive), or name another: make remote-gdrive FOLDER=..."
        )
    if answer["mimeType"] != _FOLDER:
        raise InputError(f"{answer['title']} ({folder}) is a file, not a folder: make remote-gdrive FOLDER=...")
    if answer["labels"]["trashed"]:
        raise InputError(f"the folder {answer['title']} is in the trash: take it out of there, or name another")
    access = Access(answer["title"], "driveId" in answer, answer["capabilities"]["canAddChildren"])
    if writing and not access.is_writable:
        raise InputError(
            f"{key.email} may only read the folder {access.title}: share it as Content manager (Editor in My Drive)"
        )
    if writing and not access.is_shared_drive:
        _check_quota(key)
    return access


def quota_message(key: Key) -> str:
    """What to do when there is no room."""
    return f"no storage is left for {key.email} where the folder is: {_SHARED_DRIVE}, or make room there"


def _check_quota(key: Key) -> None:
    about = _ask(key, "about", "quotaBytesTotal,quotaBytesUsedAggregate") or {}
    total, used = (int(about.get(name, 0)) for name in ("quotaBytesTotal", "quotaBytesUsedAggregate"))
    if used >= total:
        raise InputError(quota_message(key))


def _ask(key: Key, path: str, fields: str) -> dict[str, Any] | None:
    """The Drive API's answer to a service account, or None where it knows nothing of the kind.

    Asked with the libraries of dvc's client, so that a proxy or a certificate counts here as it does there.
    """
    import httplib2
    from oauth2client.service_account import ServiceAccountCredentials

    connections = httplib2.Http(timeout=_SECONDS)
    http = ServiceAccountCredentials.from_json_keyfile_dict(key.info, scopes=_SCOPES).authorize(connections)
    num_broken = 0
    try:
        for pause in (*_PAUSES, None):
            try:
                status, answer = _get(http, key, f"{_API}/{path}?supportsAllDrives=true&fields={quote(fields)}")
            except ConnectionError:
                num_broken += 1
                if pause is None or num_broken > 2:
                    raise
                time.sleep(pause)
                continue
            if status == 200:
                return answer
            if status == 404:
                return None
            reason, message = _error(answer)
            if reason in ("accessNotConfigured", "SERVICE_DISABLED"):
                raise InputError(
                    f"the Google Drive API is off in the project of {key.email}: enable it at "
                    f"https://console.cloud.google.com/apis/library/drive.googleapis.com, and wait a minute"
                )
            if pause is None or (status not in (403, 429) and status < 500):
                break
            time.sleep(pause)
    finally:
        connections.close()
    raise ConnectionError(f"Google Drive answers with status {status}: {message}")


def _get(http: Any, key: Key, url: str) -> tuple[int, dict[str, Any]]:
    """One answer; what keeps us from any becomes an error that says so."""
    import httplib2
    from oauth2client.client import HttpAccessTokenRefreshError

    try:
        response, content = http.request(url)
    except HttpAccessTokenRefreshError as error:
        if error.status is not None and int(error.status) >= 500:
            return int(error.status), {}
        raise _refused(key, str(error)) from None
    except (httplib2.HttpLib2Error, HTTPException, OSError) as error:
        raise ConnectionError(f"Google Drive cannot be reached ({type(error).__name__}: {error})") from None
    try:
        answer = json.loads(content)
    except ValueError:
        answer = {}
    return response.status, answer if isinstance(answer, dict) else {}


def _refused(key: Key, answer: str) -> Exception:
    """What is behind Google's refusal to log us in."""
    if "reasonable timeframe" in answer or "iat and exp" in answer:
        return InputError(f"this machine's clock is wrong{_clock_error(key)}: set it (timedatectl set-ntp true)")
    if "invalid_grant" in answer or "Invalid JWT" in answer:
        return InputError(
            f"Google does not know the key {key.id[:12]} of {key.email} in {key.origin} (deleted, disabled, or of "
            f"another account): make a new key in the console (docs/REMOTE.md)"
        )
    return ConnectionError(f"Google does not log {key.email} in ({answer[:200]})")


def _clock_error(key: Key) -> str:
    """How far the clock is off, by the date in Google's answer."""
    import httplib2

    connections = httplib2.Http(timeout=_SECONDS)
    try:
        response, _ = connections.request(key.info["token_uri"], method="HEAD")
        date = parsedate_to_datetime(response["date"])
    except (httplib2.HttpLib2Error, HTTPException, OSError, KeyError, ValueError):
        return ""
    finally:
        connections.close()
    seconds = (datetime.now(timezone.utc) - date).total_seconds()
    return f" by {abs(seconds) / 60:.0f} minutes ({'fast' if seconds > 0 else 'slow'})"


def _error(answer: dict[str, Any]) -> tuple[str, str]:
    """Reason and message of the API's error."""
    try:
        return str(answer["error"]["errors"][0]["reason"]), str(answer["error"]["message"])
    except (KeyError, IndexError, TypeError):
        return "", "no reason given"
