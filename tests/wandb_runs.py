"""What the tests of the mirror share: reading a run's file back, and servers that behave badly."""

from __future__ import annotations

import http.server
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from wandb.proto import wandb_internal_pb2

KEY = "0123456789abcdef0123456789abcdef01234567"  # of the right form, and nobody's
_BLOCK, _HEADER = 32768, 7


class Run(NamedTuple):
    folder: Path
    facts: Any  # wandb's RunRecord: group, job type, tags, ...
    config: dict[str, Any]
    history: list[dict[str, Any]]  # with `_step`
    summary: dict[str, Any]
    artifacts: list[Any]
    num_samples: int  # of the system's metrics
    exit_code: int | None


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, content = _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        position += _HEADER
        content += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(content)
            content = b""
            yield record


def read_run(folder: Path) -> Run:
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    artifacts, facts, samples, exit_code = [], None, 0, None
    (path,) = folder.glob("*.wandb")
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            facts = record.run
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            history.append(values(record.history.item))
        elif kind == "summary":
            summary |= values(record.summary.update)
        elif kind == "artifact":
            artifacts.append(record.artifact)
        elif kind == "stats":
            samples += 1
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return Run(folder, facts, config, history, summary, artifacts, samples, exit_code)


def values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def run_folders(cache: Path) -> list[Path]:
    """Folders of runs, the oldest first."""
    return sorted((cache / "wandb").glob("*run-*_*"), key=lambda path: path.name.split("run-")[1])


def runs(cache: Path) -> list[Run]:
    return [read_run(folder) for folder in run_folders(cache)]


@contextmanager
def bad_server(behaviour: str) -> Iterator[str]:
    """The address of a server that answers 401 or 500, hangs, trickles, or (late) opens a run and then hangs."""
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if behaviour.isdigit():
                self.send_error(int(behaviour))
                return
            if behaviour == "trickle":
                self.send_response(200)
                self.end_headers()
                while not over.wait(0.2):
                    try:
                        self.wfile.write(b" ")
                    except OSError:
                        return
            answer = opened(json.loads(body)) if behaviour == "late" and self.path == "/graphql" else None
            if answer is None:
                over.wait(60)
                return
            content = json.dumps({"data": answer}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST  # noqa: N815

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def opened(question: dict[str, Any]) -> dict[str, Any] | None:
    """What W&B answers until a run is open; None to everything else."""
    query = question["query"]
    if "viewer { id }" in query:
        return {"viewer": {"id": "x"}}
    if "mutation UpsertBucket" in query:
        project = {"id": "p", "name": "driftline", "entity": {"id": "e", "name": "me"}}
        name = question["variables"]["name"]
        bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": True}}
    return {} if "CoreWeave" in query else None


def processes_of_wandb(cache: Path) -> list[str]:
    """Command lines of the mirror's and wandb's processes that were started for runs under `cache`."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if "mirror_process" in command or "wandb-core" in command:
                environment = process.environ()
                if str(cache) in environment.get("WANDB_DATA_DIR", "") or "mirror_process" in command:
                    found.append(f"{process.cwd()}: {command}")
        except psutil.Error:
            continue
    return found
