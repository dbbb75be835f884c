"""A local stand-in of Google's token endpoint and of the Drive v2 API, behind an HTTPS proxy that answers for both.

The real client is sent here by its environment alone: `https_proxy`, and the authority's certificate to trust.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.gdrive.drive import Drive, Refusal
from tests.gdrive.keys import Certificates

HOSTS = ("oauth2.googleapis.com", "www.googleapis.com")
SCOPE = "https://www.googleapis.com/auth/drive"
_CHUNK = 256 * 1024  # resumable uploads come in multiples of it


@dataclass
class Fault:
    """What goes wrong at the next `times` calls of a kind."""

    call: str  # token, metadata, list, folder, upload, chunk, download, trash
    kind: str  # 503, 403, 401, corrupt, drop, stall
    times: int = 1
    min_bytes: int = 0  # of the file that is sent
    after: str | None = None  # a call of this kind


class StandIn(ThreadingHTTPServer):
    """The server; `drive` is what it serves, `faults` what goes wrong, `calls` what was asked."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, certificates: Certificates) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificates.server)
        self.authority = certificates.authority
        self.drive = Drive()
        self.lock = threading.RLock()
        self.reset()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def is_exhausted(self) -> bool:
        """Whether all that should go wrong has."""
        return all(fault.times == 0 for fault in self.faults)

    def reset(self) -> None:
        """As on the first day: an empty Drive, no accounts, no faults."""
        self.drive.reset()
        self.accounts: dict[str, rsa.RSAPublicKey] = {}  # by e-mail address
        self.tokens: set[str] = set()
        self.uploads: dict[str, tuple[dict[str, Any], bytearray]] = {}
        self.faults: list[Fault] = []
        self.calls: list[str] = []
        self.clock_offset = 0.0  # seconds by which the clients' clock is behind
        self.is_api_enabled = True
        self.released = threading.Event()  # ends stalled connections

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which httplib2 and requests come here and trust what they meet."""
        proxy = f"http://127.0.0.1:{self.server_address[1]}"
        trust = {name: str(self.authority) for name in ("HTTPLIB2_CA_CERTS", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")}
        return trust | {"https_proxy": proxy, "HTTPS_PROXY": proxy, "no_proxy": "", "NO_PROXY": ""}

    def fault(self, call: str, num_bytes: int) -> str | None:
        """Note a call; the kind of fault that is due at it."""
        with self.lock:
            self.calls.append(call)
            for fault in self.faults:
                if fault.after is not None and fault.after not in self.calls:
                    continue
                if fault.call == call and fault.times > 0 and num_bytes >= fault.min_bytes:
                    fault.times -= 1
                    return fault.kind
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away: killed, timed out."""


class _Handler(BaseHTTPRequestHandler):
    """One connection: CONNECT, TLS, then requests to the host that was asked for."""

    protocol_version = "HTTP/1.1"
    server: StandIn
    timeout = 60

    def do_CONNECT(self) -> None:
        host = self.path.partition(":")[0]
        if host not in HOSTS:
            self.send_error(502, f"the stand-in does not stand in for {host}")
            return
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.close_connection = False

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()
        self.connection.close()

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(None)

    do_PUT = do_POST  # noqa: N815
    do_DELETE = do_GET  # noqa: N815
    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """The calls are noted in the server."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() + self.server.clock_offset, usegmt=True)

    def _answer(self, body: bytes | None) -> None:
        url = urlsplit(self.path)
        call, answer = self._route(url.path, {key: values[-1] for key, values in parse_qs(url.query).items()})
        size = int(self.headers.get("Content-Length") or 0)
        item = self.server.drive.items.get(url.path.rpartition("/")[2])
        fault = self.server.fault(call, len(item.content) if item else size)
        if fault == "drop" and size:  # in the middle of what is sent here
            self.rfile.read(size // 2)
            self._drop()
            return
        self.body = self.rfile.read(size) if body is None else body
        try:
            if fault == "503":
                raise Refusal(503, "backendError", "Backend Error")
            if fault == "403":
                raise Refusal(403, "userRateLimitExceeded", "User Rate Limit Exceeded")
            if call not in ("token", "chunk", "unknown"):
                self._check_token(revoke=fault == "401")
            with self.server.lock:
                status, headers, content = answer()
        except Refusal as refusal:
            status, headers, content = refusal.status, {}, _json(refusal.body)
        if fault == "corrupt" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        self._send(status, headers, content, cut=fault if fault in ("drop", "stall") else None)

    def _send(self, status: int, headers: dict[str, str], content: bytes, cut: str | None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            content = b""
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        if cut == "stall":
            self.server.released.wait(1800)
        if cut:
            self._drop()

    def _drop(self) -> None:
        """Leave without a word."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _check_token(self, revoke: bool) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if revoke:
            self.server.tokens.discard(token)
        if token not in self.server.tokens:
            raise Refusal(401, "authError", "Invalid Credentials")
        if not self.server.is_api_enabled:
            message = "Google Drive API has not been used in project driftline-tests before or it is disabled."
            raise Refusal(403, "accessNotConfigured", message)

    def _route(self, path: str, query: dict[str, str]) -> tuple[str, Callable[[], tuple[int, dict[str, str], bytes]]]:
        """The kind of call that a request is, and what answers it."""
        host = (self.headers.get("Host") or "").partition(":")[0]
        if host == "oauth2.googleapis.com" and path == "/token":
            return "token", self._token
        if path == "/drive/v2/about":
            return "about", self._about
        if path == "/drive/v2/files" and self.command == "GET":
            return "list", lambda: self._list(query)
        if path == "/drive/v2/files":
            return "folder", lambda: self._insert_folder(query)
        if path == "/upload/drive/v2/files" and self.command == "POST":
            return "upload", lambda: self._begin_upload(query)
        if path == "/upload/drive/v2/files" and self.command == "PUT":
            return "chunk", lambda: self._chunk(query["upload_id"])
        if match := re.fullmatch(r"/drive/v2/files/([\w-]+)(/trash)?", path):
            id, trash = match.groups()
            if trash or self.command == "DELETE":
                return "trash", lambda: self._remove(id, trash is not None)
            if query.get("alt") == "media":
                return "download", lambda: self._download(id)
            return "metadata", lambda: self._metadata(id, query)
        return "unknown", lambda: _fail(404, f"no such address: {self.command} {host}{path}")

    def _token(self) -> tuple[int, dict[str, str], bytes]:
        """Trade a signed assertion (RFC 7523) for an access token."""
        if self.command != "POST":
            return 404, {}, b"{}"
        form = {key: values[0] for key, values in parse_qs(self.body.decode()).items()}
        assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
        header, claims, signature = form["assertion"].split(".")
        assert json.loads(_decode(header))["alg"] == "RS256"
        claim = json.loads(_decode(claims))
        assert claim["aud"] == "https://oauth2.googleapis.com/token"
        assert SCOPE in claim["scope"].split()
        public = self.server.accounts.get(claim["iss"])
        if public is None:
            return 400, {}, _json({"error": "invalid_grant", "error_description": "Invalid grant: account not found"})
        try:
            public.verify(_decode(signature), f"{header}.{claims}".encode(), padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            return 400, {}, _json({"error": "invalid_grant", "error_description": "Invalid JWT Signature."})
        now = time.time() + self.server.clock_offset
        if not claim["iat"] - 300 <= now <= claim["exp"] or claim["exp"] - claim["iat"] > 3700:
            message = "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe."
            message += " Check your iat and exp values in the JWT claim."
            return 400, {}, _json({"error": "invalid_grant", "error_description": message})
        token = secrets.token_urlsafe(24)
        self.server.tokens.add(token)
        return 200, {}, _json({"access_token": token, "expires_in": 3599, "token_type": "Bearer"})

    def _about(self) -> tuple[int, dict[str, str], bytes]:
        drive = self.server.drive
        total = drive.quota if drive.quota is not None else 15 * 2**30
        used = str(drive.used)
        about = {"quotaBytesTotal": str(total), "quotaBytesUsed": used, "quotaBytesUsedAggregate": used}
        return 200, {}, _json(about)

    def _list(self, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        drive = self.server.drive
        if drive.drive_id and query.get("includeItemsFromAllDrives") != "true":
            return 200, {}, _json({"items": []})
        if drive.drive_id and query.get("corpora") == "drive" and query.get("driveId") != drive.drive_id:
            raise Refusal(404, "notFound", f"Shared drive not found: {query.get('driveId')}")
        found = drive.search(query["q"])
        start = int(query.get("pageToken", 0))
        size = min(drive.page_size, int(query.get("maxResults", 100)))
        page: dict[str, Any] = {"items": [drive.describe(item) for item in found[start : start + size]]}
        if start + size < len(found):
            page["nextPageToken"] = str(start + size)
        return 200, {}, _json(page)

    def _metadata(self, id: str, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        self._check_all_drives(query, id)
        resource = self.server.drive.describe(self.server.drive.get(id))
        wanted = re.sub(r"\([^)]*\)", "", query.get("fields", "")).split(",")
        if wanted not in ([""], ["*"]):
            resource = {name: value for name, value in resource.items() if name in wanted}
        return 200, {}, _json(resource)

    def _download(self, id: str) -> tuple[int, dict[str, str], bytes]:
        content = self.server.drive.get(id).content
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        kind = {"Content-Type": "application/octet-stream"}
        if match is None:
            return 200, kind, content
        first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return 416, kind | {"Content-Range": f"bytes */{len(content)}"}, b""
        return 206, kind | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]

    def _insert_folder(self, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        metadata = json.loads(self.body)
        self._check_all_drives(query, metadata["parents"][0]["id"])
        return 200, {}, _json(self.server.drive.describe(self.server.drive.insert(metadata)))

    def _begin_upload(self, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        assert query["uploadType"] == "resumable"
        metadata = json.loads(self.body)
        parent = metadata["parents"][0]["id"]
        self._check_all_drives(query, parent)
        self.server.drive.check_write(parent, int(self.headers["X-Upload-Content-Length"]))
        name = secrets.token_urlsafe(12)
        self.server.uploads[name] = (metadata, bytearray())
        address = f"https://www.googleapis.com/upload/drive/v2/files?uploadType=resumable&upload_id={name}"
        return 200, {"Location": address}, b""

    def _chunk(self, name: str) -> tuple[int, dict[str, str], bytes]:
        """Bytes of a resumable upload, or the question how many have come."""
        if name not in self.server.uploads:
            raise Refusal(404, "notFound", "upload not found")
        metadata, received = self.server.uploads[name]
        total = len(self.body)
        if match := re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.headers.get("Content-Range", "")):
            first, last, total = map(int, match.groups())
            assert (first, last + 1) == (len(received), len(received) + len(self.body))
            assert last + 1 == total or len(self.body) % _CHUNK == 0
        elif match := re.fullmatch(r"bytes \*/(\d+)", self.headers.get("Content-Range", "")):
            total = int(match[1])
        received += self.body
        if len(received) < total:
            return 308, {"Range": f"bytes=0-{len(received) - 1}"} if received else {}, b""
        del self.server.uploads[name]
        return 200, {}, _json(self.server.drive.describe(self.server.drive.insert(metadata, bytes(received))))

    def _remove(self, id: str, trash: bool) -> tuple[int, dict[str, str], bytes]:
        item = self.server.drive.get(id)
        if trash:
            item.trashed = True
            return 200, {}, _json(self.server.drive.describe(item))
        if self.server.drive.drive_id:  # only a manager of a Shared Drive may, and we are a content manager
            raise Refusal(
                403, "insufficientFilePermissions", "The user does not have sufficient permissions for this file."
            )
        self.server.drive.remove(id)
        return 204, {}, b""

    def _check_all_drives(self, query: dict[str, str], id: str) -> None:
        if self.server.drive.drive_id and query.get("supportsAllDrives") != "true":
            raise Refusal(404, "notFound", f"File not found: {id}")


def _fail(status: int, message: str) -> Any:
    raise Refusal(status, "notFound", message)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _decode(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
