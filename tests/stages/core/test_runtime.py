"""How much of the machine a process may use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stages.core import runtime
from stages.core.params import load_params
from stages.core.runtime import cpu_quota, num_cpus, num_readers
from stages.evaluate import Params
from tests.helpers import ROOT, run, set_params

STAGES = ("train", "evaluate", "profile", "drift", "export")
UNSET = ("env", "-u", "GOMP_SPINCOUNT", "-u", "OMP_WAIT_POLICY")


@pytest.mark.parametrize("stage", STAGES)
def test_threads_do_not_spin_for_long(stage: str) -> None:
    code = f"import stages.{stage}, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    assert run(ROOT, *UNSET, sys.executable, "-c", code).stdout == "10000 False\n", "set, and before torch reads it"


def test_what_the_user_says_about_waiting_threads_holds() -> None:
    code = "import stages.train, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    for name, value, expected in (("GOMP_SPINCOUNT", "7", "7"), ("OMP_WAIT_POLICY", "ACTIVE", "None")):
        assert run(ROOT, *UNSET, f"{name}={value}", sys.executable, "-c", code).stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.25),
    ],
)
def test_the_limit_of_a_container(tmp_path: Path, files: dict[str, str], cpus: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [(None, 4), (0.25, 1), (1.5, 1), (3.0, 3), (64.0, 4)])
def test_cpus_are_those_of_the_affinity_mask_that_a_container_may_use(
    quota: float | None, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda pid: {1, 2, 5, 7}, raising=False)
    monkeypatch.setattr(runtime, "cpu_quota", lambda: quota)
    assert num_cpus() == cpus


@pytest.mark.parametrize(
    ("workers", "cpus", "processes", "readers"),
    [("auto", 2, 1, 2), ("auto", 64, 1, 8), ("auto", 64, 16, 4), ("auto", 2, 4, 1), (0, 64, 1, 0), (12, 2, 2, 12)],
)
def test_a_few_threads_read_ahead(
    workers: int | str, cpus: int, processes: int, readers: int, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds batches in memory: 64 CPUs must not fill it."""
    set_params(workspace / "params.yaml", {"runtime.workers": workers})
    monkeypatch.setattr(runtime, "num_cpus", lambda: cpus)
    assert num_readers(load_params(Params).runtime, processes) == readers
