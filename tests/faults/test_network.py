"""Downloads through the extract stage, from a server on this machine that misbehaves."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages import extract
from stages.core.errors import InputError
from tests.faults.hostile_archives import FILES
from tests.faults.reliability import case
from tests.faults.test_archives import params
from tests.helpers import encoded, files
from tests.stages.core.test_archive import tar

pytestmark = [pytest.mark.slow, pytest.mark.faults]


class Server(ThreadingHTTPServer):
    """Serves `content` in the way that the path names; remembers what was asked."""

    content = b""
    asked: list[tuple[str, str | None]]
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        content = self.server.content
        way = self.path.split("/")[1]
        if way == "status":
            self.send_error(int(self.path.split("/")[2]))
        elif way == "loop":
            self._answer(302, b"", Location=self.path)
        elif way == "moved":
            self._answer(302, b"", Location="/whole/set.tgz")
        elif way == "page":
            self._answer(200, b"<html>please log in</html>")
        elif way == "long":
            self._answer(200, content, **{"Content-Length": str(len(content) + 1000)})
        elif way == "slow":
            self._answer(200, b"", **{"Content-Length": str(len(content))})
            for start in range(0, len(content), 1 + len(content) // 10):
                self.wfile.write(content[start : start + 1 + len(content) // 10])
                time.sleep(0.1)
        elif way == "cut":
            start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].rstrip("-"))
            rest = content[start:]
            self._answer(206 if start else 200, rest[: len(content) // 3], **{"Content-Length": str(len(rest))})
        elif way == "empty":
            self._answer(200, b"")
        else:
            self._answer(200, content)

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)  # which no gzip makes smaller
        large = {"train/cat/noise.png": encoded(Image.fromarray(noise), "PNG")}
        server.content = tar(tmp_path / "set.tgz", FILES | large, "w:gz").read_bytes()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(server: Server, path: str, tmp_path: Path, **overrides: Any) -> dict[str, bytes]:
    """Extract from that address; what is in data/ then."""
    source = f"http://127.0.0.1:{server.server_port}{path}"
    keys = {"data.source": source, "runtime.cache_dir": str(tmp_path / "cache")}
    extract.main(params(keys | {key.replace("__", "."): value for key, value in overrides.items()}))
    return files(Path("data"))


REFUSED = {
    "404": ("/status/404/set.tgz", "answered 404", "Refused with the status."),
    "500": ("/status/500/set.tgz", "answered 500", "Refused with the status."),
    "redirects in a circle": ("/loop/set.tgz", "cannot be downloaded: .*redirect", "Refused; nothing hangs."),
    "login page": ("/page/set.tgz", "not a tar, tgz or zip", "HTML where an archive should be is refused."),
    "empty answer": ("/empty/set.tgz", "not a tar, tgz or zip|no folder has", "Refused."),
    "length that lies": ("/long/set.tgz", "bytes came|cannot be downloaded", "Fewer bytes than announced: refused."),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=case(name, promise), id=name) for name, (_, _, promise) in REFUSED.items()]
)
def test_refused(name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, message, _ = REFUSED[name]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = get(server, "/whole/set.tgz", tmp_path)
    with pytest.raises(InputError, match=message):
        get(server, path, tmp_path)
    assert files(Path("data")) == before


TAKEN = {
    "moved": ("/moved/set.tgz", "A redirect is followed."),
    "slow": ("/slow/set.tgz", "A server that drips is waited for."),
    "cut": ("/cut/set.tgz", "A connection that breaks is taken up where it broke, until the file is whole."),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=case(name, promise), id=name) for name, (_, promise) in TAKEN.items()]
)
def test_taken(name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    expected = get(server, "/whole/set.tgz", tmp_path)
    assert get(server, TAKEN[name][0], tmp_path) == expected
    if name == "cut":
        assert [asked for path, asked in server.asked if path.startswith("/cut")][1:], "never resumed"


@case("wrong checksum", "A download whose checksum differs is refused, and not kept: mending it fetches anew.")
def test_a_wrong_checksum(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"sha256 is .*, expected 0+ \(data\.sha256\)"):
        get(server, "/whole/set.tgz", tmp_path, data__sha256="0" * 64)
    right = hashlib.sha256(server.content).hexdigest()
    assert get(server, "/whole/set.tgz", tmp_path, data__sha256=right)
    assert len(server.asked) == 2
