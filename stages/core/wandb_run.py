"""What W&B is told about a stage: a run with its params, metrics by step, pictures, tables and the model.

`wandb` is imported in functions, because stages import this module (for dvc.yaml's sake) but do not use it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from stages.core.wandb_access import SECONDS_TO_ANSWER

_SECONDS_TO_TAKE = 2.0  # that W&B has for a question about an artifact
_FLUSH_SECONDS = 0.2  # between two times that wandb writes to the disk
_MAX_ROWS = 10_000  # of a table


def open_run(start: dict[str, Any], mode: Literal["offline", "online"]) -> Any:
    """Start a run of the stage."""
    import wandb

    model = Path(start["model"]) if start["model"] else None
    sha256 = hash_of(model) if model else None
    group = start["group"] or _group_of(Path(start["folder"]), str(sha256))
    experiment = os.environ.get("DVC_EXP_NAME")
    revision = _git("rev-parse", "HEAD")
    facts = {
        "dvc": {"experiment": experiment, "baseline": os.environ.get("DVC_EXP_BASELINE_REV"), "stage": start["stage"]},
        "git": {"revision": revision, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))},
        "model_sha256": sha256,
    }
    settings = wandb.Settings(
        console="off",
        silent=True,
        init_timeout=SECONDS_TO_ANSWER,
        finish_timeout=start["timeout"],
        save_code=False,
        program=f"stages/{start['stage']}.py",
        x_stats_pid=start["pid"],
        x_stats_sampling_interval=5.0,
        x_transaction_log_flush_interval=_FLUSH_SECONDS,
    )
    return wandb.init(
        mode=mode,
        project=start["project"],
        entity=start["entity"],
        dir=start["folder"],
        group=group,
        job_type=start["stage"],
        name=f"{start['stage']} {experiment or (revision or group)[:7]}",
        tags=[start["stage"], *([experiment[:64]] if experiment else [])],
        config=start["params"] | facts,
        settings=settings,
    )


def log(run: Any, start: dict[str, Any], message: dict[str, Any]) -> None:
    """Metrics at a step."""
    if message["history"]:
        run.log(message["metrics"], step=message["step"])
    else:
        run.summary.update(message["metrics"])


def results(run: Any, start: dict[str, Any], message: dict[str, Any]) -> None:
    """The numbers of a JSON file, and a folder's pictures and tables."""
    import wandb

    shown: dict[str, Any] = dict(flat(json.loads(Path(message["metrics"]).read_text()), start["stage"]))
    for path in sorted(Path(message["plots"]).iterdir()):
        key = f"{start['stage']}/{path.stem}"
        if path.suffix == ".png":
            shown[key] = wandb.Image(str(path))
        elif path.suffix in (".csv", ".json"):
            columns, rows = table(path)
            shown[f"{key}_table"] = wandb.Table(columns=list(columns), data=rows[:_MAX_ROWS])
    run.log(shown)


def model(run: Any, start: dict[str, Any], message: dict[str, Any]) -> None:
    """The model that the stage made, as an artifact; remember whose it is."""
    folder = Path(message["folder"])
    sha256 = hash_of(folder)
    groups = Path(start["folder"]) / "wandb/groups"
    groups.mkdir(parents=True, exist_ok=True)
    (groups / sha256).write_text(start["group"])
    run.config.update({"model_sha256": sha256}, allow_val_change=True)
    artifact = _artifact(folder)
    patiently(lambda: run.log_artifact(artifact, aliases=["latest", sha256[:12]]), "the model")


def end(run: Any, start: dict[str, Any], message: dict[str, Any]) -> None:
    """Finish the run; the time that this may take is watched elsewhere."""
    import wandb

    if not run.offline:  # if sending gets stuck, all metrics are on the disk: while it finishes, wandb writes nothing
        run.log({}, commit=True)
        time.sleep(2 * _FLUSH_SECONDS)
    try:
        # Offline, wandb cannot say what a run uses; there model_sha256 links the runs.
        if start["model"] and not run.offline and message["exit_code"] == 0:
            artifact = _artifact(Path(start["model"]))
            patiently(lambda: run.use_artifact(artifact), "the link to the model")
    finally:
        run.finish(exit_code=message["exit_code"])
        wandb.teardown()  # only then is everything on the disk


def patiently(call: Callable[[], object], what: str) -> None:
    """Make a call that waits for W&B, but not long: what comes after it must reach the disk in any case."""
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            call()
            ended.put(None)
        except Exception as error:
            ended.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        error = ended.get(timeout=_SECONDS_TO_TAKE)
    except queue.Empty:
        raise TimeoutError(f"W&B did not take {what} within {_SECONDS_TO_TAKE:g} s") from None
    if error is not None:
        raise error


VERBS = {"log": log, "results": results, "model": model, "end": end}


def flat(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """The numbers of nested JSON, each with its path."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat(inner, f"{key}/{name}")
    elif isinstance(value, int | float):
        yield key, value


def table(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a CSV file, or of a JSON list of objects; what looks like a number is one."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else json.load(file)
    columns = list(rows[0]) if rows else []
    kinds = {name: _kind([row[name] for row in rows]) for name in columns}
    return columns, [[kinds[name](row[name]) for name in columns] for row in rows]


def _kind(values: list[Any]) -> Any:
    try:
        for value in values:
            float(value)
    except (TypeError, ValueError):
        return str
    return float


def hash_of(folder: Path) -> str:
    """SHA-256 of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _group_of(cache_dir: Path, sha256: str) -> str:
    with suppress(OSError):
        return (cache_dir / "wandb/groups" / sha256).read_text()
    return f"model-{sha256[:12]}"  # made elsewhere, or without a mirror


def _artifact(folder: Path) -> Any:
    import wandb

    artifact = wandb.Artifact(folder.name, type="model")
    artifact.add_dir(str(folder), skip_cache=True)
    return artifact


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return result.stdout.strip() if result.returncode == 0 else None
