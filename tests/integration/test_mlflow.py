"""Tracking against a real MLflow on sqlite."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from avrt_lib import tracking
from avrt_lib.config import load
from avrt_lib.errors import StoreError

CONFIG = load(Path(__file__).parents[2] / "configs/miniature.yaml")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def client(runs: Path) -> MlflowClient:
    uri = f"sqlite:///{runs / 'mlflow.db'}"
    return MlflowClient(uri, uri)


@pytest.fixture
def parent(runs: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    uri = f"sqlite:///{runs / 'mlflow.db'}"
    with tracking.start_parent(CONFIG, runs / request.node.name, uri=uri, data_hash="d") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield environment["AVRT_MLFLOW_PARENT"]


def test_a_step_is_a_child_with_parameters_metrics_and_artifacts(
    parent: str, client: MlflowClient, runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("seen")
    with tracking.step_run("grpo", CONFIG.to_json()) as run:
        assert run is not None
        assert os.environ["MLFLOW_RUN_ID"] == run.run_id
        for step in range(1, 301):
            tracking.log_metrics({"grpo/loss": 1 / step, "grpo/kl": 0.1}, step)
        tracking.log_params({"weights": "abc"})
        tracking.log_artifact(tmp_path / "note.txt", "notes")
    assert "MLFLOW_RUN_ID" not in os.environ
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == parent
    assert found.data.params == {"weights": "abc"}
    history = client.get_metric_history(run.run_id, "grpo/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(s, 1 / s) for s in range(1, 301)]
    assert list((runs / "mlartifacts").rglob("notes/note.txt"))
    assert client.get_run(parent).data.params["grpo.group_size"] == "8"


def test_a_failed_step_is_marked_and_goes_on_in_its_run(parent: str, client: MlflowClient) -> None:
    with pytest.raises(ValueError, match="broken"), tracking.step_run("sft", CONFIG) as first:
        raise ValueError("broken")
    assert first is not None
    assert client.get_run(first.run_id).info.status == "FAILED"
    with tracking.step_run("sft", CONFIG) as second:
        assert second is not None
        assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "FINISHED"
    with tracking.step_run("evaluation-sft", CONFIG) as other:
        assert other is not None
        assert other.run_id != first.run_id


def test_a_run_that_the_platform_made_is_joined_and_left_open(
    parent: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = client.get_experiment_by_name("avrt")
    assert experiment is not None
    given = client.create_run(experiment.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    with tracking.step_run("sft", CONFIG):
        tracking.log_metrics({"loss": 2.0}, 1)
    found = client.get_run(given)
    assert found.info.status == "RUNNING"
    assert found.data.metrics == {"loss": 2.0}
    assert os.environ["MLFLOW_RUN_ID"] == given


def test_a_resumed_run_goes_on_in_its_parent(runs: Path, client: MlflowClient) -> None:
    uri = f"sqlite:///{runs / 'mlflow.db'}"
    with pytest.raises(KeyboardInterrupt), tracking.start_parent(CONFIG, runs / "resumed", uri=uri) as first:
        raise KeyboardInterrupt
    assert client.get_run(first["AVRT_MLFLOW_PARENT"]).info.status == "KILLED"
    with tracking.start_parent(CONFIG, runs / "resumed", uri=uri) as second:
        assert second["AVRT_MLFLOW_PARENT"] == first["AVRT_MLFLOW_PARENT"]
    assert client.get_run(first["AVRT_MLFLOW_PARENT"]).info.status == "FINISHED"


def test_the_alias_moves_and_a_known_model_keeps_its_version_and_its_run(
    parent: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = os.environ["AVRT_RUN_ID"]
    assert tracking.register_champion("s3://avrt/models/m/1", "m", {"sha256": "1"}) == 1
    assert tracking.register_champion("s3://avrt/models/m/2", "m", {"sha256": "2"}) == 2
    monkeypatch.setenv("AVRT_RUN_ID", "a-later-run")
    assert tracking.register_champion("s3://avrt/models/m/1", "m", {"sha256": "1"}) == 1
    champion = client.get_model_version_by_alias("m", "champion")
    assert (int(champion.version), champion.source) == (1, "s3://avrt/models/m/1")
    assert champion.tags == {"sha256": "1", "run": first}


def test_a_store_that_is_down_fails_no_step_but_a_promotion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    with caplog.at_level(logging.WARNING), tracking.step_run("sft", CONFIG) as run:
        assert run is None
        tracking.log_metrics({"loss": 1.0}, 1)
    assert "sft is not tracked" in caplog.text
    with tracking.start_parent(CONFIG, tmp_path / "r", uri="http://127.0.0.1:9") as environment:
        assert environment == {"AVRT_RUN_ID": "r", "AVRT_DATA_HASH": ""}
    with pytest.raises(StoreError, match="did not register m"):
        tracking.register_champion("s3://avrt/models/m/1", "m", {})


def test_a_store_that_breaks_within_a_step_is_given_up(
    parent: str, runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), tracking.step_run("merger", CONFIG) as run:
        assert run is not None
        known, run.run_id = run.run_id, "0" * 32
        for step in range(5):
            run.log_metrics({"a": 1.0}, step)
            run.flush()
        run.run_id = known
    assert caplog.text.count("logging metrics failed") == 3
    assert "no further attempts" in caplog.text
