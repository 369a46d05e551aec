"""Tracking against a real MLflow on sqlite."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from avrt_lib import local_run, tracking
from avrt_lib.config import load
from avrt_lib.errors import StoreError
from avrt_lib.run_signals import Interrupted
from avrt_lib.runs import create

CONFIG = load(Path(__file__).parents[2] / "configs/miniature.yaml", {"store.kind": "local"})
SUCCEEDED: dict[str, Any] = {"status": "succeeded", "failure": None}
FAILED: dict[str, Any] = {"status": "failed", "failure": {"step": "sft", "code": "training", "message": "no"}}
STOPPED: dict[str, Any] = {"status": "failed", "failure": {"step": "sft", "code": "interrupted", "message": "stopped"}}


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
    environment = tracking.start_parent(CONFIG, runs / request.node.name[:80], uri=uri, data_hash="d")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield environment["AVRT_MLFLOW_PARENT"]
    tracking.end_parent(CONFIG, SUCCEEDED, environment)


def attached(client: MlflowClient, run_id: str) -> set[str]:
    """Paths of all artifacts of a run."""

    def walk(folder: str | None) -> Iterator[str]:
        for found in client.list_artifacts(run_id, folder):
            if found.is_dir:
                yield from walk(found.path)
            else:
                yield found.path

    return set(walk(None))


def test_a_step_is_a_child_with_parameters_metrics_and_artifacts(
    parent: str, client: MlflowClient, tmp_path: Path
) -> None:
    output = tmp_path / "making"
    with tracking.step_run("grpo", CONFIG.to_json(), ("grpo", "seed"), {"model": output}) as run:
        assert run is not None
        assert os.environ["MLFLOW_RUN_ID"] == run.run_id
        for step in range(1, 301):
            tracking.log_metrics({"grpo/loss": 1 / step, "grpo/kl": 0.1}, step)
        output.mkdir()
        (output / "metrics.json").write_text('{"steps": 300}')
        (output / "tokenizer.json").write_bytes(bytes(2**20 + 1))
        (output / "model.safetensors").write_bytes(b"weights")
    assert "MLFLOW_RUN_ID" not in os.environ
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == parent
    assert found.data.params["grpo.group_size"] == "8"
    assert {key.split(".")[0] for key in found.data.params} == {"grpo", "seed"}
    history = client.get_metric_history(run.run_id, "grpo/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(s, 1 / s) for s in range(1, 301)]
    assert attached(client, run.run_id) == {"model/metrics.json"}
    assert client.get_run(parent).data.params.keys() == tracking.flat(CONFIG).keys()


def test_no_name_costs_the_other_metrics(parent: str, client: MlflowClient) -> None:
    odd = ["by_kind.Who, what (and where)?", "a//b", "../c", "/d", "..e", ".", "k" * 300, f"{'l' * 249}/m", "Fête 1"]
    with tracking.step_run("evaluation-base", CONFIG) as run:
        assert run is not None
        run.log_metrics(dict.fromkeys([*odd, "accuracy"], 0.5), step=0)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics.keys() == {tracking.metric_name(name) for name in [*odd, "accuracy"]}
    assert {"accuracy", "by_kind.Who_ what _and where__", "a/b", "c", "d", "_e", "Fête 1"} <= found.data.metrics.keys()


def test_a_failed_step_is_marked_and_goes_on_in_its_run(parent: str, client: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "validation.json").write_text('{"passed": false}')
    step = ("sft", CONFIG, ("sft",), {"report": tmp_path})
    with pytest.raises(ValueError, match="broken"), tracking.step_run(*step) as first:
        raise ValueError("broken")
    assert first is not None
    assert client.get_run(first.run_id).info.status == "FAILED"
    assert attached(client, first.run_id) == {"report/validation.json"}
    with pytest.raises(Interrupted), tracking.step_run(*step) as stopped:
        raise Interrupted(signal.SIGTERM)
    assert stopped is not None
    assert client.get_run(stopped.run_id).info.status == "KILLED"
    with tracking.step_run(*step) as second:
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


def test_a_resumed_run_goes_on_in_its_parent_and_ends_as_the_summary_says(runs: Path, client: MlflowClient) -> None:
    uri = f"sqlite:///{runs / 'mlflow.db'}"
    parents = set()
    for summary, status in ((STOPPED, "KILLED"), (FAILED, "FAILED"), (SUCCEEDED, "FINISHED")):
        environment = tracking.start_parent(CONFIG, runs / "resumed", uri=uri)
        parents.add(parent := environment["AVRT_MLFLOW_PARENT"])
        assert client.get_run(parent).info.status == "RUNNING"
        tracking.end_parent(CONFIG, summary, environment)
        assert client.get_run(parent).info.status == status
    assert len(parents) == 1


def test_a_pod_ends_the_parent_that_its_steps_opened(
    parent: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AVRT_MLFLOW_PARENT")
    with tracking.step_run("run_summary", CONFIG) as run:
        tracking.end_parent(CONFIG, SUCCEEDED)
    assert run is not None
    assert client.get_run(run.run_id).data.tags["mlflow.parentRunId"] == parent
    assert client.get_run(parent).info.status == "FINISHED"


@pytest.fixture
def given(client: MlflowClient, monkeypatch: pytest.MonkeyPatch, runs: Path) -> str:
    """A run that the caller of `avrt run` made, in an experiment of its own."""
    name = "theirs"
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name, (runs / "theirs").as_uri())
    run_id = str(client.create_run(experiment).info.run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    return run_id


def test_a_run_that_the_caller_made_is_the_parent_and_is_left_open(
    given: str, runs: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tracking.start_parent(CONFIG, runs / "joined", uri=f"sqlite:///{runs / 'mlflow.db'}")
    assert environment["AVRT_MLFLOW_PARENT"] == given
    with monkeypatch.context() as pod:
        pod.delenv("MLFLOW_RUN_ID")
        for name, value in environment.items():
            pod.setenv(name, value)
        with tracking.step_run("evaluation-base", CONFIG) as one:
            pass
        with tracking.step_run("evaluation-sft", CONFIG) as other:
            pass
    assert one is not None
    assert other is not None
    assert len({given, one.run_id, other.run_id}) == 3
    for run in (one, other):
        assert client.get_run(run.run_id).data.tags["mlflow.parentRunId"] == given
    tracking.end_parent(CONFIG, SUCCEEDED, environment)
    found = client.get_run(given)
    assert found.info.status == "RUNNING"
    assert found.data.tags["avrt.run"] == "joined"


def test_a_local_run_gives_its_steps_the_parent_and_attaches_its_results_to_it(
    given: str, runs: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(local_run, "_compile", lambda *_: None)
    monkeypatch.setattr(local_run, "_pipeline", lambda folder, environment, *_: seen.append(environment))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{runs / 'mlflow.db'}")
    local_run.execute(create(runs, CONFIG), CONFIG, "d", lambda: None)
    (environment,) = seen
    assert "MLFLOW_RUN_ID" not in environment
    assert environment["AVRT_MLFLOW_PARENT"] == given
    assert attached(client, given) == {"summary.json", "report.html"}


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
    environment = tracking.start_parent(CONFIG, tmp_path / "r", uri="http://127.0.0.1:9")
    assert environment == {"AVRT_RUN_ID": "r", "AVRT_DATA_HASH": ""}
    tracking.end_parent(CONFIG, SUCCEEDED, environment)
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


@pytest.mark.parametrize("store", ["nosuch://place", "s3://bucket", "http://{refusing}", "http://{silent}"])
def test_an_artifact_store_out_of_reach_costs_a_step_a_warning_and_little_time(
    store: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "MLFLOW_RUN_ID", "AVRT_MLFLOW_PARENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setattr(tracking, "_ATTACH_S", 2.0)
    (tmp_path / "metrics.json").write_text("{}")
    uri = f"sqlite:///{runs / 'mlflow.db'}"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        location = store.format(refusing="127.0.0.1:9", silent=f"127.0.0.1:{silent.getsockname()[1]}")
        client = MlflowClient(uri, uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment(location, location))
        with caplog.at_level(logging.WARNING), tracking.step_run("sft", CONFIG, (), {"model": tmp_path}) as run:
            started = time.monotonic()
        assert time.monotonic() - started < 5
    assert run is not None
    assert caplog.text.count("attaching artifacts failed") == 1
    assert client.get_run(run.run_id).info.status == "FINISHED"
