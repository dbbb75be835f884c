"""Would Google Drive take this key for this folder? Asked before dvc is, whose own answer names no fix."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from stages.core.errors import InputError
from tools.drive_key import Key

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
    answer = _Drive(key).get(f"files/{folder}", _FIELDS)
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
    about = _Drive(key).get("about", "quotaBytesTotal,quotaBytesUsedAggregate") or {}
    total, used = (int(about.get(name, 0)) for name in ("quotaBytesTotal", "quotaBytesUsedAggregate"))
    if used >= total:
        raise InputError(quota_message(key))


class _Drive:
    """Questions to the Drive API in the name of a service account."""

    def __init__(self, key: Key) -> None:
        from google.auth.transport.requests import AuthorizedSession
        from google.oauth2.service_account import Credentials

        self.key = key
        credentials: Any = Credentials.from_service_account_info(key.info, scopes=_SCOPES)  # type: ignore[no-untyped-call]
        self.session: Any = AuthorizedSession(credentials, refresh_timeout=_SECONDS)  # type: ignore[no-untyped-call]

    def get(self, path: str, fields: str) -> dict[str, Any] | None:
        """The API's answer, or None where it knows nothing of the kind."""
        import requests
        from google.auth.exceptions import GoogleAuthError, RefreshError

        for pause in (*_PAUSES, None):
            try:
                response = self.session.get(
                    f"{_API}/{path}", params={"supportsAllDrives": "true", "fields": fields}, timeout=_SECONDS
                )
            except RefreshError as error:
                raise _refused(self.key, error) from None
            except (GoogleAuthError, requests.RequestException) as error:
                raise ConnectionError(f"Google Drive cannot be reached ({_cause(error)})") from None
            if response.status_code == 200:
                answer: dict[str, Any] = response.json()
                return answer
            if response.status_code == 404:
                return None
            reason, message = _error(response)
            if reason in ("accessNotConfigured", "SERVICE_DISABLED"):
                raise InputError(
                    f"the Google Drive API is off in the project of {self.key.email}: enable it at "
                    f"https://console.cloud.google.com/apis/library/drive.googleapis.com, and wait a minute"
                )
            if response.status_code not in (403, 429) and response.status_code < 500:
                break
            if pause is not None:
                time.sleep(pause)
        raise ConnectionError(f"Google Drive answers with status {response.status_code}: {message}")


def _refused(key: Key, error: Exception) -> Exception:
    """What is behind Google's refusal to log us in."""
    text = str(error.args[0] if error.args else error)
    if "reasonable timeframe" in text or "iat and exp" in text:
        return InputError(f"this machine's clock is wrong{_clock_error(key)}: set it (timedatectl set-ntp true)")
    if "account not found" in text or "Invalid JWT Signature" in text or "invalid_grant" in text:
        return InputError(
            f"Google does not know the key {key.id[:12]} of {key.email} in {key.origin} (deleted, disabled, or of "
            f"another account): make a new key in the console (docs/REMOTE.md)"
        )
    return ConnectionError(f"Google does not log {key.email} in ({text[:200]})")


def _clock_error(key: Key) -> str:
    """How far the clock is off, by the date in Google's answer."""
    import requests

    try:
        date = requests.head(key.info["token_uri"], timeout=_SECONDS).headers["Date"]
        seconds = (datetime.now(timezone.utc) - parsedate_to_datetime(date)).total_seconds()
    except (requests.RequestException, KeyError, ValueError):
        return ""
    return f" by {abs(seconds) / 60:.0f} minutes ({'fast' if seconds > 0 else 'slow'})"


def _error(response: Any) -> tuple[str, str]:
    """Reason and message of the API's error."""
    try:
        error = response.json()["error"]
        return str(error["errors"][0]["reason"]), str(error["message"])
    except (ValueError, KeyError, IndexError, TypeError):
        return "", str(response.reason)


def _cause(error: BaseException) -> str:
    """The innermost reason, in a line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
