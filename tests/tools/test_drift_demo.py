"""The demonstration refuses what it cannot show. That it ends well takes minutes: `make drift-demo`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import files, run, set_params
from tools.retrain import rehearsal


def test_the_clone_takes_the_model_out_of_the_cache_wherever_that_is(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (repository / ".dvc/cache").rename(tmp_path / "elsewhere")
    run(repository, "dvc", "cache", "dir", "--local", str(tmp_path / "elsewhere"))
    rehearsal.clone_and_run(repository, tmp_path / "clone", {})
    assert "Running stage 'train'" not in capfd.readouterr().out
    assert files(tmp_path / "clone/models") == files(repository / "models")


def test_other_data_and_unknown_drift_are_refused(repository: Path) -> None:
    result = run(repository, "python", "-m", "tools.drift_demo", "frog:5", check=False)
    assert result.returncode == 2
    assert "'frog:5' is not KIND:SEVERITY (kinds: gaussian_noise" in result.stderr
    set_params(repository / "params.yaml", {"data.source": "imagenette2-160"})
    result = run(repository, "python", "-m", "tools.drift_demo", check=False)
    assert result.returncode == 2
    assert "data.source: this needs the generated sample" in result.stderr
