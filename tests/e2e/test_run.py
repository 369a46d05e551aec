"""The whole pipeline through the command line at a small budget, undisturbed, and killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.run_processes import kill_marked, marked
from avrt_lib.tables import MANIFEST, read_json
from avrt_lib.workspace import read_reports

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TRAIN, VALIDATION, TEST = 96, 32, 40
#: Small enough for minutes; so few samples and steps prove the path, not the learning.
BUDGET = {
    "data.train.count": TRAIN,
    "data.validation.count": VALIDATION,
    "data.test.count": TEST,
    "teachers.chunk_rows": 8,
    "merger.chunk_rows": 16,
    "validation.minimum_rows": 8,
    "validation.max_letter_share": 1.0,
    "validation.max_flagged_share": 1.0,
    "sft.max_steps": 6,
    "sft.warmup_steps": 0,
    "sft.per_device_batch": 8,
    "sft.validate_every_steps": 3,
    "sft.validation_samples": 16,
    "grpo.max_steps": 2,
    "grpo.per_device_batch": 16,
    "grpo.max_completion_tokens": 40,
    "evaluation.chunk_rows": 40,
}
WHOLE_TIMEOUT_S = 1800
WAIT_S = 900


def _command(runs: Path, *options: str, **settings: Any) -> list[str]:
    command = [sys.executable, "-m", "avrt_lib.cli.main", "run", "--runs-dir", str(runs), *options]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def _finish(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        command,
        env=_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WHOLE_TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        assert process is None or process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.1)


def _content(run: Path) -> dict[str, str]:
    """Content hashes of the tables that a run placed, by instance and output."""
    found = {}
    for instance, report in read_reports(run / "work").items():
        for output, place in (report.get("outputs") or {}).items():
            if output in ("samples", "traces", "merged"):
                found[f"{instance}.{output}"] = str(read_json(Path(place) / MANIFEST)["content_sha256"])
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """An undisturbed run: its folder, its summary, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    code, printed = _finish(_command(runs, **BUDGET))
    run = (runs / "latest").resolve()
    assert code == 0, printed[-4000:]
    yield run, json.loads((run / "summary.json").read_text(encoding="utf-8")), printed
    kill_marked(str(run))


def test_the_summary_adds_up(whole: tuple[Path, dict[str, Any], str]) -> None:
    summary = whole[1]
    assert summary["status"] == "succeeded"
    assert summary["failure"] is None
    assert summary["dataset"]["samples"] + summary["dataset"]["dropped"] == TRAIN + VALIDATION + TEST
    assert sum(summary["ledger"].values()) == TRAIN
    assert summary["merged"]["rows"] == summary["ledger"]["both"]
    assert summary["validation"]["passed"] is True


def test_every_step_took_its_time(whole: tuple[Path, dict[str, Any], str]) -> None:
    steps = whole[1]["steps"]
    promoted = whole[1]["promotion"]["promoted"]
    for name, step in steps.items():
        expected = "skipped" if name == "deployment" and not promoted else "succeeded"
        assert step["status"] == expected, name
        assert step["seconds"] > 0


def test_every_model_answered_every_test_question(whole: tuple[Path, dict[str, Any], str]) -> None:
    for role, model in whole[1]["models"].items():
        assert model["n"] == TEST, role
        assert model["ci95"][0] <= model["accuracy"] <= model["ci95"][1]
        assert set(model["by_kind"]) <= {"either", "both", "sound", "sight"}
        for condition in ("audio_only", "vision_only"):
            assert 0 <= model["conditions"][condition]["accuracy"] <= 1


def test_training_changed_the_weights(whole: tuple[Path, dict[str, Any], str]) -> None:
    grpo = whole[1]["grpo"]
    assert grpo["steps"] == BUDGET["grpo.max_steps"]
    assert grpo["weight_change"] > 0


def test_the_run_folder_is_complete(whole: tuple[Path, dict[str, Any], str]) -> None:
    run = whole[0]
    for name in ("config.yaml", "pipeline.yaml", "summary.json", "report.html", "logs/grpo.log", "logs/pipeline.log"):
        assert (run / name).stat().st_size > 0, name


def test_mlflow_has_the_run_and_each_step_below_it(whole: tuple[Path, dict[str, Any], str]) -> None:
    from mlflow import MlflowClient

    run = whole[0]
    uri = f"sqlite:///{run.parent / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("avrt")
    assert experiment is not None
    found = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
    parent = found.pop(run.name)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["sft.max_steps"] == str(BUDGET["sft.max_steps"])
    assert {each.path for each in client.list_artifacts(parent.info.run_id)} == {"summary.json", "report.html"}
    assert found.keys() == read_reports(run / "work").keys()
    for name, child in found.items():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id, name
        assert child.info.status == "FINISHED", name
        assert child.data.params, name
    assert found["grpo"].data.params["grpo.max_steps"] == str(BUDGET["grpo.max_steps"])
    documents = {
        "preflight": "checks/checks.json",
        "data_validation": "report/validation.json",
        "grpo": "model/manifest.json",
        "evaluation-sft": "predictions/metrics.json",
        "promotion": "champion/champion.json",
        "deployment": "check/check.json",
    }
    for name, document in documents.items():
        listed = client.list_artifacts(found[name].info.run_id, document.partition("/")[0])
        assert document in {each.path for each in listed}, name


def test_the_end_says_what_came_out(whole: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, printed = whole
    assert "held-out test questions" in printed
    assert "Report:" in printed
    assert ("avrt serve" in printed) == (summary["champion"] is not None)
    assert "Traceback" not in printed


def test_no_process_is_left(whole: tuple[Path, dict[str, Any], str]) -> None:
    assert marked(str(whole[0])) == []


def test_a_second_attempt_takes_everything_from_the_first(whole: tuple[Path, dict[str, Any], str]) -> None:
    run, summary, _ = whole
    before = _content(run)
    code, printed = _finish(_command(run.parent, "--resume", run.name))
    assert code == 0, printed[-4000:]
    again = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert _content(run) == before
    assert again["models"] == summary["models"]
    reports = read_reports(run / "work")
    assert all(reports[name]["reused"] for name in ("ingest", "merger", "sft", "grpo", "evaluation-grpo"))


def test_a_killed_run_goes_on_to_the_same_content(whole: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    # The gate refuses everything, so that the run ends behind the tables that are compared.
    command = _command(tmp_path, **BUDGET | {"validation.minimum_rows": 10_000})
    with open(tmp_path / "printed.log", "wb") as log:
        first = subprocess.Popen(command, env=_environment(), cwd=ROOT, stdout=log, stderr=log)
    run = tmp_path / "latest"
    try:
        _until(lambda: any(0 < done < TRAIN / 2 for done in _traces_done(run)), first)
        first.send_signal(signal.SIGKILL)
        first.wait()
        _until(lambda: not marked(str(run.resolve())))
        code, printed = _finish(_command(tmp_path, "--resume", "latest"))
    finally:
        first.kill()
        kill_marked(str(run.resolve()))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert code == 6, printed[-4000:]
    assert summary["failure"]["code"] == "validation_failed"
    assert summary["ledger"] == whole[1]["ledger"]
    assert summary["models"]["base"]["n"] == TEST
    assert summary["steps"]["sft"]["status"] == "skipped"
    assert _content(run) == _content(whole[0])


def _traces_done(run: Path) -> list[int]:
    """Rows that each teacher's shard has committed so far."""
    found = []
    for path in (run / "work" / "progress").glob("*_teacher-*.json"):
        try:
            found.append(int(json.loads(path.read_text(encoding="utf-8"))["done"]))
        except (OSError, ValueError):  # replaced just now
            continue
    return found


def test_an_interrupt_ends_everything_and_is_reported(tmp_path: Path) -> None:
    with open(tmp_path / "printed.log", "wb") as log:
        process = subprocess.Popen(_command(tmp_path, **BUDGET), env=_environment(), cwd=ROOT, stdout=log, stderr=log)
    run = tmp_path / "latest"
    try:
        _until(lambda: (run / "work" / "reports" / "ingest.json").exists(), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
        assert marked(str(run.resolve())) == []
    finally:
        process.kill()
        kill_marked(str(run.resolve()))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["status"], summary["failure"]["code"]) == ("failed", "interrupted")
