"""The record of a run: DVCLive files that DVC shows, plots and compares."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from dvclive import Live
from scmrepo.exceptions import SCMError

from stages.core.mirror import Mirror, NoMirror


class Record(NamedTuple):
    """Metrics at an optimizer step; without `history` only their latest values are kept."""

    step: int
    metrics: dict[str, float]
    history: bool


class NoTracker:
    """Stands in where another process keeps the record."""

    records: tuple[Record, ...] = ()

    def log(self, step: int, metrics: dict[str, float], history: bool = True) -> None:
        """Nothing to do."""


class Tracker:
    """Logs metrics by optimizer step into `folder`: metrics.json (latest) and plots/metrics/**.tsv (history).

    `mirror` is told the same. `records` is all that was logged: logging it again gives the same files, which is how a
    resumed run starts.
    DVCLive must not touch dvc.yaml (our stages own it) nor make an experiment of its own (DVC makes them).
    """

    def __init__(self, folder: Path, mirror: Mirror | NoMirror) -> None:
        self._live = _Live(str(folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)
        self._mirror = mirror
        self.records: list[Record] = []

    def log(self, step: int, metrics: dict[str, float], history: bool = True) -> None:
        """Record the metrics at `step`; without `history` only the latest value is kept."""
        self.records.append(Record(step, metrics, history))
        self._live.step = step
        for name, value in metrics.items():
            self._live.log_metric(name, value, plot=history)
        self._live.make_summary()  # type: ignore[no-untyped-call]  # or metrics.json would tell nothing before the end
        self._mirror.log(step, metrics, history)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.end()  # type: ignore[no-untyped-call]


class _Live(Live):
    """DVCLive 3.49 asks git for the current commit even when it need not, and fails where there is none yet."""

    def _init_dvc(self) -> None:
        with suppress(SCMError):
            super()._init_dvc()
