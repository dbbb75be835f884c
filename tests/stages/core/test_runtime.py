from __future__ import annotations

import sys

import pytest

from tests.helpers import ROOT, run

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
