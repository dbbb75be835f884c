"""A stand-in of the calls of GitHub's API that tools/github.py makes, over real HTTP: GitHub is out of reach here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "token-of-the-job"
PREFIX = "/repos/Owner/Driftline"


class Repository:
    """What the stand-in remembers."""

    def __init__(self) -> None:
        self.pulls: list[dict[str, Any]] = []
        self.issues: list[dict[str, Any]] = []
        self.comments: list[dict[str, Any]] = []
        self.dispatches: list[dict[str, Any]] = []
        self.failures: list[int] = []  # statuses of the next answers
        self.calls = 0
        self.url = ""

    @property
    def environment(self) -> dict[str, str]:
        return {"GITHUB_API_URL": self.url, "GITHUB_TOKEN": TOKEN, "GITHUB_REPOSITORY": "Owner/Driftline"}

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> tuple[int, Any]:
        """The status and the JSON of one call."""
        page, size = int(query.get("page", ["1"])[0]), int(query.get("per_page", ["30"])[0])
        some = slice((page - 1) * size, page * size)
        match [method, *path.strip("/").split("/")]:
            case ["GET", "pulls"]:
                wanted = query["head"][0].removeprefix("Owner:"), query["base"][0]
                return 200, [each for each in self.pulls if (each["branch"], each["base"]) == wanted]
            case ["POST", "pulls"]:
                return 201, self._add(self.pulls, **{**body, "branch": body["head"]})
            case ["PATCH", "pulls", number]:
                self._numbered(self.pulls, number).update(body)
                return 200, {}
            case ["GET", "pulls", number]:
                return 200, self._numbered(self.pulls, number)
            case ["GET", "issues"]:
                label = query["labels"][0]
                states = ("open", "closed") if query["state"] == ["all"] else query["state"]
                found = [each for each in self.issues if each["state"] in states and label in each["labels"]]
                return 200, found[some]
            case ["POST", "issues"]:
                return 201, self._add(self.issues, state="open", **body)
            case ["GET", "issues", number, "comments"]:
                return 200, [each for each in self.comments if each["issue"] == int(number)][some]
            case ["POST", "issues", number, "comments"]:
                self.comments.append(
                    {"id": len(self.comments) + 1, "issue": int(number), "user": {"type": "Bot"}, **body}
                )
                return 201, self.comments[-1]
            case ["PATCH", "issues", "comments", number]:
                self.comments[int(number) - 1].update(body)
                return 200, {}
            case ["POST", "actions", "workflows", name, "dispatches"]:
                self.dispatches.append({"workflow": name, **body})
                return 204, None
        return 404, {"message": "Not Found"}

    def _add(self, items: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        items.append({"number": 100 + len(self.pulls) + len(self.issues), **fields})
        return items[-1]

    @staticmethod
    def _numbered(items: list[dict[str, Any]], number: str) -> dict[str, Any]:
        return next(each for each in items if each["number"] == int(number))


@contextmanager
def serve() -> Iterator[Repository]:
    """The stand-in on a port of this machine."""
    repository = Repository()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            repository.calls += 1
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            address = urlsplit(self.path)
            status, content = 401, {"message": "Bad credentials"}
            if repository.failures:
                status, content = repository.failures.pop(0), {"message": "as the test wants it"}
            elif self.headers["Authorization"] == f"Bearer {TOKEN}" and re.match(PREFIX, address.path):
                path = unquote(address.path.removeprefix(PREFIX))
                status, content = repository.answer(self.command, path, parse_qs(address.query), body)
            payload = b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = do_PATCH = handle_any  # noqa: N815

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    repository.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield repository
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
