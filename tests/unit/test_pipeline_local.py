"""The graph on Kubeflow Pipelines' local runner, with steps that only say what they were given."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def _fakes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_steps", ROOT / "tests" / "fake_steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(tmp_path: Path, **fake: Any) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    environment = _fakes().install(tmp_path / "fakes", **fake)
    command = [sys.executable, "-W", "error::UserWarning", "-m", "pipelines.run_local"]
    command += ["--config", str(ROOT / "configs" / "miniature.yaml"), "--work", str(tmp_path / "work")]
    command += ["--root", str(tmp_path / "artifacts"), "--data-hash", "d1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    reports = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "work" / "reports").glob("*.json")}
    return done, reports


def _seen(tmp_path: Path, instance: str) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "work" / f"seen-{instance}.json").read_text()))


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A run that ends at the gate, and a second attempt in the same folder: the folder, and the reports of both."""
    folder = tmp_path_factory.mktemp("run")
    gate = {"data_validation": ["ValidationFailedError", "expectation rows_enough failed in rows 1, 2"]}
    done, stopped = _run(folder, fail=gate)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    done, finished = _run(folder, facts={"promotion": {"promoted": True, "uri": "s3://avrt/m", "sha256": "abc"}})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, stopped, finished


@pytest.fixture(scope="module")
def whole(attempts: tuple[Path, dict[str, Any], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    return attempts[0], attempts[2]


def test_every_step_runs_once(whole: tuple[Path, dict[str, Any]]) -> None:
    from avrt_lib.config import load
    from avrt_lib.runs import instances

    expected = {name for names in instances(load(ROOT / "configs" / "miniature.yaml")).values() for name in names}
    assert set(whole[1]) == expected
    assert {report["status"] for report in whole[1].values()} == {"succeeded"}


@pytest.mark.parametrize(
    ("instance", "inputs", "params"),
    [
        ("ingest", {}, {"data_hash": "d1"}),
        ("vision_teacher-1", {"samples": ["ingest.samples"]}, {"shard": 1}),
        ("audio_teacher-0", {"samples": ["ingest.samples"]}, {"shard": 0}),
        (
            "merger",
            {
                "samples": ["ingest.samples"],
                "vision_traces": ["vision_teacher-0.traces", "vision_teacher-1.traces"],
                "audio_traces": ["audio_teacher-0.traces", "audio_teacher-1.traces"],
            },
            {},
        ),
        ("data_validation", {"samples": ["ingest.samples"], "merged": ["merger.merged"]}, {}),
        ("sft", {"samples": ["ingest.samples"], "merged": ["merger.merged"]}, {}),
        ("grpo", {"samples": ["ingest.samples"], "sft_model": ["sft.model"]}, {}),
        ("evaluation-base", {"samples": ["ingest.samples"]}, {"role": "base"}),
        ("evaluation-sft", {"samples": ["ingest.samples"], "model": ["sft.model"]}, {"role": "sft"}),
        ("evaluation-grpo", {"samples": ["ingest.samples"], "model": ["grpo.model"]}, {"role": "grpo"}),
        (
            "promotion",
            {
                "base_predictions": ["evaluation-base.predictions"],
                "sft_predictions": ["evaluation-sft.predictions"],
                "grpo_predictions": ["evaluation-grpo.predictions"],
                "sft_model": ["sft.model"],
                "grpo_model": ["grpo.model"],
            },
            {},
        ),
        (
            "deployment",
            {"samples": ["ingest.samples"], "champion": ["promotion.champion"], "grpo_model": ["grpo.model"]},
            {},
        ),
    ],
)
def test_each_step_gets_what_it_needs(
    whole: tuple[Path, dict[str, Any]], instance: str, inputs: dict[str, list[str]], params: dict[str, Any]
) -> None:
    seen = _seen(whole[0], instance)
    assert seen == {"inputs": inputs, "params": params}


def test_outputs_are_placed_below_the_root(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, reports = whole
    for report in reports.values():
        for place in report["outputs"].values():
            assert Path(place).is_relative_to(folder / "artifacts")
            assert any(Path(place).iterdir())


def test_the_gate_ends_the_run_but_the_base_is_evaluated(
    attempts: tuple[Path, dict[str, Any], dict[str, Any]],
) -> None:
    stopped = attempts[1]
    assert stopped["data_validation"]["failure"] == {
        "step": "data_validation",
        "code": "validation_failed",
        "message": "expectation rows_enough failed in rows 1, 2",
    }
    assert stopped["evaluation-base"]["status"] == "succeeded"
    assert not {"sft", "grpo", "evaluation-sft", "promotion", "deployment"} & set(stopped)


def test_a_second_attempt_takes_what_is_finished(attempts: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    _, stopped, finished = attempts
    reused = {name for name, report in finished.items() if report.get("reused")}
    assert reused == {name for name, report in stopped.items() if report["status"] == "succeeded"} - {"preflight"}
