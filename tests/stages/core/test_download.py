"""Downloads from a real HTTP server on this machine that breaks off, redirects, lies and refuses."""

from __future__ import annotations

import gzip
import hashlib
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stages.core import download
from stages.core.download import fetch
from stages.core.errors import InputError

CONTENT = bytes(range(256)) * 20_000  # 5 MB
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`; remembers the requests; `break_after` bytes of a response it hangs up, so many times."""

    requests: list[tuple[str, str | None]]
    conditions: list[str | None]  # If-Range, by request
    content = CONTENT
    validators: dict[str, str]  # headers
    knows_if_range = True
    breaks = 0
    break_after = 2_000_000
    ranges = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        self.server.requests.append((self.path, asked))
        self.server.conditions.append(condition)
        if self.path == "/missing.tgz":
            self.send_error(404)
            return
        if self.path == "/moved.tgz":
            self.send_response(302)
            self.send_header("Location", "/set.tgz")
            self.end_headers()
            return
        content = self.server.content
        start = int(asked.split("=")[1].rstrip("-")) if asked and self.server.ranges else 0
        if condition and self.server.knows_if_range and condition not in self.server.validators.values():
            start = 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in self.server.validators.items():
            self.send_header(name, value)
        self.end_headers()
        if self.server.breaks > 0:
            self.server.breaks -= 1
            body = body[: self.server.break_after]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requests, server.conditions, server.validators = [], [], {}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def url(server: Server, name: str = "set.tgz") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        path = fetch(url(server), tmp_path, md5=MD5)
        assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert not list(tmp_path.glob("*.part"))


def test_another_checksum_asks_again(server: Server, tmp_path: Path) -> None:
    fetch(url(server), tmp_path)
    with pytest.raises(InputError, match="md5 is"):
        fetch(url(server), tmp_path, md5="0" * 32)


def test_a_file_that_is_called_an_encoding_is_kept_as_it_is(server: Server, tmp_path: Path) -> None:
    """Apache's `AddEncoding x-gzip .tgz`: the file itself is what is wanted, resumed or not."""
    server.content = gzip.compress(random.Random(0).randbytes(3_000_000))
    server.validators = {"Content-Encoding": "x-gzip"}
    server.breaks = 1
    digest = hashlib.sha256(server.content).hexdigest()
    assert fetch(url(server), tmp_path, sha256=digest).read_bytes() == server.content
    assert len(server.requests) == 2


def test_a_break_is_resumed_where_it_was(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    assert fetch(url(server), tmp_path, md5=MD5).read_bytes() == CONTENT
    starts = [int(asked.strip("bytes=-")) if asked else 0 for _, asked in server.requests]
    assert starts[0] == 0
    assert 1_900_000 < starts[1] <= 2_000_000
    assert 3_800_000 < starts[2] <= 4_000_000


def test_a_download_given_up_is_resumed_by_the_next_call(server: Server, tmp_path: Path) -> None:
    server.breaks, server.break_after = 5, 200_000
    with pytest.raises(InputError, match=r"[89]\d\d,\d\d\d bytes are kept and the next run goes on from there"):
        fetch(url(server), tmp_path, md5=MD5)
    kept = next(tmp_path.glob("*.part")).stat().st_size
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tgz"]
    assert fetch(url(server), tmp_path, md5=MD5).read_bytes() == CONTENT
    assert server.requests[-1][1] == f"bytes={kept}-"


TAG, WEAK, DATE = {"ETag": '"one"'}, {"ETag": 'W/"one"'}, {"Last-Modified": "Wed, 25 Nov 2026 10:00:00 GMT"}


@pytest.mark.parametrize(
    ("validators", "sent"),
    [
        (TAG | DATE, '"one"'),
        (WEAK | DATE, DATE["Last-Modified"]),
        (DATE, DATE["Last-Modified"]),
        (WEAK, None),
        ({}, None),
    ],
)
def test_a_resumed_download_names_the_version_that_it_has(
    validators: dict[str, str], sent: str | None, server: Server, tmp_path: Path
) -> None:
    server.validators, server.breaks = validators, 1
    assert fetch(url(server), tmp_path, md5=MD5).read_bytes() == CONTENT
    assert server.conditions == [None, sent]
    assert server.requests[1][1] is not None, "resumed"
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".tgz"}


def give_up(server: Server, folder: Path) -> int:
    """Let a download of CONTENT break off until it is given up; returns the bytes that are kept."""
    server.breaks, server.break_after = 5, 200_000
    with pytest.raises(InputError, match="the next run goes on from there"):
        fetch(url(server), folder)
    server.breaks = 0
    return next(folder.glob("*.part")).stat().st_size


@pytest.mark.parametrize("knows_if_range", [True, False])
@pytest.mark.parametrize(
    "validators", [(TAG, {"ETag": '"two"'}), (DATE, {"Last-Modified": "Thu, 26 Nov 2026 10:00:00 GMT"})]
)
def test_a_file_that_changed_between_two_attempts_is_not_joined_of_two(
    validators: tuple[dict[str, str], dict[str, str]], knows_if_range: bool, server: Server, tmp_path: Path
) -> None:
    server.knows_if_range = knows_if_range
    server.validators = validators[0]
    give_up(server, tmp_path)
    server.content, server.validators = CONTENT[::-1], validators[1]
    assert fetch(url(server), tmp_path).read_bytes() == CONTENT[::-1]
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".tgz"}


def test_the_version_that_is_named_is_the_last_one(server: Server, tmp_path: Path) -> None:
    """After a file has changed and the download of the new one has broken off, too."""
    server.validators = TAG
    give_up(server, tmp_path)
    server.content, server.validators, server.breaks = CONTENT[::-1], {"ETag": '"two"'}, 2
    assert fetch(url(server), tmp_path).read_bytes() == CONTENT[::-1]
    assert server.conditions[-3:] == ['"one"', '"two"', '"two"']
    server.content, server.validators = CONTENT, TAG
    (tmp_path / "other").mkdir()
    give_up(server, tmp_path / "other")
    server.content, server.validators, server.breaks = CONTENT[::-1], {}, 1  # a server that names none any more
    assert fetch(url(server), tmp_path / "other").read_bytes() == CONTENT[::-1]
    assert server.conditions[-2:] == ['"one"', None]


@pytest.mark.parametrize(("size", "asked_again"), [(len(CONTENT), False), (len(CONTENT) + 1, True)])
def test_nothing_left_is_complete_only_where_the_size_is_the_files(
    size: int, asked_again: bool, server: Server, tmp_path: Path
) -> None:
    give_up(server, tmp_path)
    partial = next(tmp_path.glob("*.part"))
    partial.write_bytes((CONTENT + b"!")[:size])
    server.requests.clear()
    assert fetch(url(server), tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [f"bytes={size}-", *[None] * asked_again]
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".tgz"}


def test_a_file_that_became_shorter_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    kept = give_up(server, tmp_path)
    server.content = CONTENT[: kept // 2]
    assert fetch(url(server), tmp_path).read_bytes() == CONTENT[: kept // 2]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, 1
    assert fetch(url(server), tmp_path, md5=MD5).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    for algorithm, digest in (("md5", "0" * 32), ("sha256", "0" * 64)):
        with pytest.raises(InputError, match=rf"{algorithm} is [0-9a-f]+, expected 0+ \(data\.{algorithm}\)"):
            fetch(url(server), tmp_path, **{algorithm: digest})
        assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}


def test_redirects_are_followed(server: Server, tmp_path: Path) -> None:
    assert fetch(url(server, "moved.tgz"), tmp_path, sha256=hashlib.sha256(CONTENT).hexdigest()).exists()


def test_refusals_name_the_address(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:\d+/missing\.tgz: the server answered 404"):
        fetch(url(server, "missing.tgz"), tmp_path)
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"http://127.*cannot be downloaded.*refused"):
        fetch(url(server), tmp_path)


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(download, "_TIMEOUT", (1, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(InputError, match="timed out"):
        fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/set.tgz", tmp_path)


def test_two_downloads_at_once_fetch_once(server: Server, tmp_path: Path) -> None:
    threads = [threading.Thread(target=fetch, args=(url(server), tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1
