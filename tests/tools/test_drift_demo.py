"""The demonstration refuses what it cannot show. That it ends well takes minutes: `make drift-demo`."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import run, set_params


def test_other_data_and_unknown_drift_are_refused(repository: Path) -> None:
    result = run(repository, "python", "-m", "tools.drift_demo", "frog:5", check=False)
    assert result.returncode == 2
    assert "'frog:5' is not KIND:SEVERITY (kinds: gaussian_noise" in result.stderr
    set_params(repository / "params.yaml", {"data.source": "imagenette2-160"})
    result = run(repository, "python", "-m", "tools.drift_demo", check=False)
    assert result.returncode == 2
    assert "data.source: this needs the generated sample" in result.stderr
