"""A stage that was told to stop, and whose dvc is gone by then, cleans up undisturbed."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.helpers import PATIENCE, ROOT, start

STAGE = """
import time
from pathlib import Path
from stages.core.stopping import run_stage

def main():
    try:
        Path("ready").touch()
        time.sleep(600)
    finally:
        time.sleep(3)  # longer than it takes to see that dvc is gone
        print("cleaned up", flush=True)

run_stage(main, "stage")
"""
DVC = """
import os, subprocess, sys, time

stage = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {"DVC_STAGE": "stage"})
while not os.path.exists("ready"):
    time.sleep(0.01)
stage.terminate()
os._exit(0)
"""


def test_the_end_of_dvc_does_not_break_into_that_of_a_stage(tmp_path: Path) -> None:
    process = start(tmp_path, sys.executable, "-c", DVC, STAGE, environment={"PYTHONPATH": str(ROOT)})
    output, _ = process.communicate(timeout=PATIENCE)  # the stage writes into the same pipe
    assert output == "cleaned up\nstage: stopped by SIGTERM; run the same command again\n"
