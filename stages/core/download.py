"""Fetch a file once: resumed after a break, checked, and kept in a cache that every clone shares."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from tqdm import tqdm

from stages.core.errors import InputError
from stages.core.runtime import make_cache_dir

_CHUNK = 1 << 16  # bytes; what a break can lose
_TIMEOUT = (10, 60)  # seconds to connect, and between two bytes
_ATTEMPTS = 5


def fetch(url: str, folder: Path, md5: str | None = None, sha256: str | None = None, key_prefix: str = "data.") -> Path:
    """The local copy of `url` in `folder`, downloaded unless a checked copy is there.

    A download that breaks off is taken up where it stopped, within this call and by the next one, unless the server
    says that the file has changed. Raises InputError when the address does not answer with the file, or when a checksum
    (lower-case hex) differs.
    """
    make_cache_dir(folder)
    name = os.path.basename(urlsplit(url).path) or "download"
    # One entry per address and checksum: a new checksum asks for a new download.
    key = hashlib.sha256(f"{url}\n{md5}\n{sha256}".encode()).hexdigest()[:12]
    path = folder / f"{key}-{name}"
    partial = path.with_name(f"{path.name}.part")
    with FileLock(f"{path}.lock"):  # two experiments at once download once
        if path.exists():
            return path
        _download(url, partial)
        try:
            check(partial, md5=md5, sha256=sha256, shown=url, key_prefix=key_prefix)
        except InputError:
            partial.unlink()  # resuming it could never end well
            _validator_file(partial).unlink(missing_ok=True)
            raise
        partial.replace(path)
        _validator_file(partial).unlink(missing_ok=True)
    return path


def check(
    path: Path,
    md5: str | None = None,
    sha256: str | None = None,
    shown: str | None = None,
    key_prefix: str = "data.",
) -> None:
    """Raise InputError when the file's checksum is not the one asked for; None is not checked.

    `key_prefix` starts the name of the key in params.yaml that asks for it.
    """
    for algorithm, expected in (("md5", md5), ("sha256", sha256)):
        if expected is None:
            continue
        found = file_hash(path, algorithm)
        if found != expected.lower():
            raise InputError(
                f"{shown or path}: {algorithm} is {found}, expected {expected.lower()} ({key_prefix}{algorithm}); "
                "the file is damaged or another one: fetch it again, or mend the checksum"
            )


def file_hash(path: Path, algorithm: str) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _download(url: str, partial: Path) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _continue_download(url, partial)
            return
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            size = partial.stat().st_size if partial.exists() else 0
            if attempt == _ATTEMPTS or size == 0:
                kept = f"; {size:,} bytes are kept and the next run goes on from there" if size else ""
                raise InputError(f"{url}: cannot be downloaded: {_reason(error)}{kept}") from None
        except requests.RequestException as error:  # redirects in a circle, an address that is none
            raise InputError(f"{url}: cannot be downloaded: {_reason(error)}") from None


def _continue_download(url: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    kept = _validator_file(partial)
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if kept.exists():
            headers["If-Range"] = kept.read_text()  # of a file that has changed, all is sent
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if start and _is_of_another_file(response, start, headers.get("If-Range")):
            partial.unlink()
            response.close()
            _continue_download(url, partial)
            return
        if response.status_code == 416 and start:  # nothing left: it broke off after the last byte
            return
        if not response.ok:
            raise InputError(f"{url}: the server answered {response.status_code} {response.reason}")
        resumed = response.status_code == 206
        length = int(response.headers.get("Content-Length", 0))
        total = length + (start if resumed else 0) or None
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(
                desc=os.path.basename(urlsplit(url).path), total=total, initial=start if resumed else 0, unit="B",
                unit_scale=True, unit_divisor=1024, disable=None, leave=False,
            ) as bar,
        ):  # fmt: skip
            if not resumed:  # the partial file is empty: at no time does it lie beside another one's validator
                kept.unlink(missing_ok=True)
                if validator := _validator(response):
                    kept.write_text(validator)
            # The file itself is wanted, and servers call a .tgz an encoding of its tar.
            response.raw.headers.discard("Content-Encoding")
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and partial.stat().st_size < total:
        raise requests.ConnectionError(f"{partial.stat().st_size:,} of {total:,} bytes came")


def _is_of_another_file(response: requests.Response, start: int, validator: str | None) -> bool:
    """Whether the answer to a request for the rest says that the first `start` bytes are not of this file."""
    if response.status_code == 416:
        return response.headers.get("Content-Range", "").replace(" ", "") != f"bytes*/{start}"
    # There are servers that do not know If-Range.
    return response.status_code == 206 and None not in (validator, found := _validator(response)) and found != validator


def _validator(response: requests.Response) -> str | None:
    """What tells this version of the file from another one, as If-Range takes it (RFC 9110, 13.1.5)."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")  # W/"...": a weak tag


def _validator_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.validator")


def _reason(error: Exception) -> str:
    return str(error).split("(Caused by ")[-1].rstrip(")")
