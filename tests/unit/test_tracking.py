"""Tracking where it is off, and what it makes of a configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from avrt_lib import tracking
from avrt_lib.config import load

CONFIG = load(Path(__file__).parents[2] / "configs/miniature.yaml")


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "AVRT_MLFLOW_PARENT"):
        monkeypatch.delenv(name, raising=False)


def test_without_an_address_nothing_is_tracked_and_nothing_fails(tmp_path: Path) -> None:
    with tracking.step_run("sft", CONFIG.to_json(), ("sft",), {"model": tmp_path}) as run:
        assert run is None
        tracking.log_metrics({"loss": 1.0}, 1)
    assert tracking.register_champion("s3://b/m", "m", {}) is None
    tracking.end_parent(CONFIG, {"status": "succeeded", "failure": None})


def test_importing_tracking_and_an_untracked_step_load_no_mlflow() -> None:
    code = (
        "import sys; from avrt_lib import tracking\n"
        "with tracking.step_run('sft', None): tracking.log_metrics({'a': 1}, 0)\n"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_parameters_have_dotted_names_and_no_empty_values() -> None:
    params = tracking.flat(CONFIG)
    assert params["grpo.reward.length_mean_words"] == 18
    assert params["teachers.vision.engine.model"] == "builtin:vision_teacher"
    assert "data.all" not in params
    assert all(value is not None for value in params.values())
