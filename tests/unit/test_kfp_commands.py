"""The commands for runs on a cluster, over HTTP, against a server that answers as the backend does (kfp_api.py)."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from avrt_lib.cli import main as cli
from avrt_lib.cluster.profile import VARIABLE, Profile, load_profile
from avrt_lib.config import load
from avrt_lib.errors import EnvironmentProblem, UsageError
from avrt_lib.preflight import cluster as preflight_cluster
from avrt_lib.preflight.checks import FAILED, Check
from pipelines import backend, commands, housekeeping, pods, watch
from pipelines.commands import register
from pipelines.compile import compile_pipeline
from pipelines.progress import rows_of
from tests.kfp_api import KfpApi, KubernetesApi, pod

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "configs" / "miniature.yaml"
TEST = ROOT / "configs" / "clusters" / "test.yaml"
DONE = ("preflight", "ingest", "vision-teacher", "audio-teacher", "evaluation", "merger", "data-validation")
REST = ("sft", "evaluation-2", "grpo", "evaluation-3", "promotion", "deployment", "run-summary")
SUCCEEDED = dict.fromkeys((*DONE, *REST), "succeeded")
GATE = {
    **dict.fromkeys(DONE[:-1], "succeeded"),
    "data-validation": "failed",
    **dict.fromkeys(REST[:-1], "omitted"),
    "run-summary": "succeeded",
}
GATE_FAILURE = {"step": "data_validation", "code": "validation_failed", "message": "answers stand at A in 97 % of rows"}
GATE_LOG = f"""\
time="2026-11-26T10:00:00" level=info msg="capturing logs" argo=true
2026-11-26 10:00:04 avrt ERROR data_validation failed: answers stand at A in 97 % of rows
avrt-failure: {json.dumps(GATE_FAILURE)}
I1126 10:00:05.1 failed to execute component: exit status 1
"""


def summary(status: str = "succeeded") -> dict[str, Any]:
    model = {
        "n": 48,
        "accuracy": 0.75,
        "ci95": [0.6, 0.9],
        "invalid_rate": 0.0,
        "words_mean": 12.0,
        "by_kind": {"both": 0.75},
        "conditions": {"audio_only": {"accuracy": 0.5}, "vision_only": {"accuracy": 0.5}},
    }
    return {
        "status": status,
        "failure": None if status == "succeeded" else GATE_FAILURE,
        "models": {"base": model, "sft": model, "grpo": model},
        "champion": {"model": "grpo", "version": 3, "uri": "s3://avrt/models/avrt-student/ab", "sha256": "ab"},
        "promotion": {"promoted": True, "reason": ""},
    }


def summary_log(status: str = "succeeded") -> str:
    return f"writing the report\navrt-summary: {json.dumps(summary(status))}\nI1126 10:00:05.1 uploading\n"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The miniature's pipeline for the test cluster, as the backend keeps it."""
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    profile = load_profile(TEST)
    compile_pipeline(load(MINIATURE, profile.overrides), path, None, profile)
    return dict(zip(("pipeline_spec", "platform_spec"), yaml.safe_load_all(path.read_text()), strict=True))


@pytest.fixture
def api() -> Iterator[KfpApi]:
    with KfpApi() as running:
        yield running


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KubernetesApi]:
    with KubernetesApi() as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig(tmp_path / "kubeconfig")))
        yield running


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(cli.app)
    monkeypatch.setenv("AVRT_DEBUG", "")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))
    for name in ("KFP_ENDPOINT", "AVRT_S3_ENDPOINT", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(watch, "POLL_S", 0.02)
    monkeypatch.setattr(watch, "REPORT_AFTER_S", 0.05)
    monkeypatch.setattr(watch, "WORKFLOW_EVERY_S", 0.0)
    monkeypatch.setattr(watch, "RESTART_S", 1.0)
    monkeypatch.setattr(backend, "PATIENCE_S", 0.1)
    monkeypatch.chdir(tmp_path)


def avrt(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    code = ended.value.code
    seen = capsys.readouterr()
    return (code if isinstance(code, int) else 0 if code is None else 1), seen.out, seen.err


def follow(capsys: pytest.CaptureFixture[str], api: KfpApi, run: str, *more: str) -> tuple[int, str, str]:
    return avrt(capsys, "status", run, "--host", api.url, "--follow", *more)


def submit(capsys: pytest.CaptureFixture[str], api: KfpApi, *more: str) -> tuple[int, str, str]:
    options = ("--config", str(MINIATURE), "--cluster", str(TEST), "--host", api.url)
    return avrt(capsys, "submit", *options, *more)


# submit


def test_a_submitted_run_is_shown_to_its_end_with_its_table_and_summary(
    api: KfpApi, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = dict.fromkeys(DONE[:2], "succeeded")
    api.frames = [
        ("PENDING", {}),
        ("RUNNING", {"preflight": "starting"}),
        ("RUNNING", first | {"vision-teacher#0": "succeeded", "vision-teacher#1": "running"}),
        ("SUCCEEDED", SUCCEEDED),
    ]
    api.logs["run-summary"] = summary_log()
    code, out, err = submit(capsys, api, "--runs-dir", "kept")
    assert code == 0, err
    assert "vision_teacher: running 1/2" in out
    assert "evaluation-base: succeeded" in out
    assert "Champion: grpo version 3" in out
    (run_id,) = api.runs
    assert json.loads((tmp_path / "kept" / run_id / "summary.json").read_text()) == summary()


def test_nothing_is_submitted_where_the_cluster_cannot_run_it(api: KfpApi, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = submit(capsys, api, "--detach", "--set", "store.kind=local")
    assert code == EnvironmentProblem.exit_code
    assert "The cluster is not looked at from here" in err
    assert "set store.kind=s3" in " ".join(err.split())
    assert "Nothing was submitted" in err
    assert not api.runs
    code, _, err = submit(capsys, api, "--detach", "--set", "store.kind=local", "--no-checks")
    assert code == 0, err
    assert len(api.runs) == 1


SECRET = Check("Secret avrt-store", FAILED, "is not there yet", coming_up=True)
SERVICE = Check("Service avrt-mlflow", FAILED, "has no pod that is ready", coming_up=True)
WRONG = Check("Permission", FAILED, "may not deploy")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[list[Check]]:
    """What the cluster's checks find, one look after another; the last is found for ever."""
    found: list[list[Check]] = []
    monkeypatch.setattr(preflight_cluster, "cluster_checks", lambda *_: found.pop(0) if len(found) > 1 else found[0])
    monkeypatch.setattr(commands, "LOOK_EVERY_S", 0.01)
    return found


def test_what_was_only_just_applied_is_waited_for(
    api: KfpApi, looks: list[list[Check]], capsys: pytest.CaptureFixture[str]
) -> None:
    looks += [[SECRET, SERVICE], [SERVICE], [SERVICE], []]
    code, _, err = submit(capsys, api, "--detach")
    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith("Waiting for")] == [
        "Waiting for Secret avrt-store, Service avrt-mlflow (up to 180 s) …",
        "Waiting for Service avrt-mlflow (up to 180 s) …",
    ]
    assert len(api.runs) == 1


def test_what_is_no_api_server_is_said(cluster: KubernetesApi) -> None:
    checks = preflight_cluster.cluster_checks(load(MINIATURE), load_profile(TEST))
    (found,) = (check.found for check in checks if check.name == preflight_cluster.CLUSTER)
    assert "answers, but not as an API server" in found


def test_nothing_is_waited_for_where_something_else_is_wrong(
    api: KfpApi, looks: list[list[Check]], capsys: pytest.CaptureFixture[str]
) -> None:
    looks += [[SECRET, WRONG], []]
    code, _, err = submit(capsys, api, "--detach")
    assert (code, "Waiting" in err) == (EnvironmentProblem.exit_code, False)
    assert not api.runs


def test_what_does_not_come_up_is_told_in_the_end(
    api: KfpApi, looks: list[list[Check]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "COMING_UP_S", 0.1)
    looks += [[SERVICE]]
    code, _, err = submit(capsys, api, "--detach")
    assert (code, "Not ready: Service avrt-mlflow." in err) == (EnvironmentProblem.exit_code, True)
    assert not api.runs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "127.0.0.1:1"], "must start with http"),
        (["--host", "http://127.0.0.1:1", "--token-env", "NOT_SET"], "NOT_SET, which is not set"),
    ],
)
def test_a_wrong_address_or_token_is_said_before_anything_is_waited_for(
    looks: list[list[Check]], capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    looks += [[SERVICE], []]
    code, _, err = avrt(capsys, "submit", "--config", str(MINIATURE), "--cluster", str(TEST), *options)
    assert (code, said in err, "Waiting for" in err) == (2, True, False), err


def test_what_is_submitted_is_what_the_profile_says(api: KfpApi, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = submit(
        capsys, api, "--set", "seed=7", "--set", "deployment.memory=3Gi", "--detach", "--run-name", "x"
    )
    assert code == 0
    (run,) = api.runs.values()
    assert out.split() == [run["run_id"]]
    assert (run["display_name"], run["service_account"]) == ("x", "pipeline-runner")
    assert [each["display_name"] for each in api.experiments.values()] == ["avrt"]
    assert "platforms" in run["pipeline_spec"]["platform_spec"]
    config = json.loads(constant(run, "preflight", "config"))
    assert config["seed"] == 7
    # --set comes after the profile's overrides
    assert (config["deployment"]["target"], config["deployment"]["memory"]) == ("kserve", "3Gi")


def constant(run: dict[str, Any], task: str, parameter: str) -> str:
    """What a task of a submitted run is given."""
    spec = run["pipeline_spec"]["pipeline_spec"]
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    return str(tasks[task]["inputs"]["parameters"][parameter]["runtimeValue"]["constant"])


def test_data_that_the_cluster_alone_sees_gets_its_identity_from_the_user(
    api: KfpApi, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "{format: manifest, path: /data/mine.csv}"
    settings = [f"data.{name}={source}" for name in ("train", "validation", "test")]
    options = ["--detach", "--no-checks", *(part for each in settings for part in ("--set", each))]
    for more in ([], ["--data-hash", "v3"]):
        code, _, err = submit(capsys, api, *options, *more)
        assert code == 0, err
    hashes, cached = [], []
    for run in api.runs.values():
        spec = run["pipeline_spec"]["pipeline_spec"]
        hashes.append(spec["root"]["inputDefinitions"]["parameters"]["data_hash"]["defaultValue"])
        cached.append("ingest" in cached_tasks(spec))
    assert (hashes, cached) == (["", "v3"], [False, True])


def cached_tasks(spec: dict[str, Any]) -> set[str]:
    return {
        name
        for component in (spec["root"], *spec["components"].values())
        for name, task in component.get("dag", {}).get("tasks", {}).items()
        if task.get("cachingOptions", {}).get("enableCache")
    }


def test_no_cache_reaches_the_tasks_of_nested_pipelines(api: KfpApi, capsys: pytest.CaptureFixture[str]) -> None:
    submit(capsys, api, "--detach")
    submit(capsys, api, "--detach", "--no-cache")
    usual, without = (run["pipeline_spec"]["pipeline_spec"] for run in api.runs.values())
    assert {"vision-teacher", "sft"} <= cached_tasks(usual)
    assert cached_tasks(without) == set()


@pytest.mark.parametrize(("traces", "cached"), [("/data/traces.jsonl", False), (f"s3://avrt/traces/{'ab' * 32}", True)])
def test_traces_whose_place_does_not_tell_their_content_are_read_anew(
    api: KfpApi, capsys: pytest.CaptureFixture[str], traces: str, cached: bool
) -> None:
    code, _, err = submit(capsys, api, "--detach", "--pipeline", "train", "--traces", traces)
    assert code == 0, err
    (run,) = api.runs.values()
    found = cached_tasks(run["pipeline_spec"]["pipeline_spec"])
    assert ("import-traces" in found, "sft" in found) == (cached, True)


def test_a_multi_user_backend_is_told_the_namespace(api: KfpApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.multi_user = True
    code, _, err = submit(capsys, api, "--detach", "--namespace", "ada")
    assert code == 0, err
    assert [each["namespace"] for each in api.experiments.values()] == ["ada"]


def test_what_a_run_needs_is_looked_for_in_the_namespace_that_it_runs_in(
    api: KfpApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_in: list[str] = []

    def look(_: Any, profile: Profile, components: Sequence[str]) -> list[Check]:
        assert "sft" in components
        looked_in.append(profile.pipelines.namespace)
        return []

    monkeypatch.setattr(preflight_cluster, "cluster_checks", look)
    code, _, err = submit(capsys, api, "--detach", "--namespace", "ada")
    assert code == 0, err
    (run,) = api.runs.values()
    container = run["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]["exec-preflight"]["container"]
    (given,) = (each["value"] for each in container["env"] if each["name"] == VARIABLE)
    assert looked_in == [json.loads(given)["pipelines"]["namespace"]] == ["ada"]


# how a run fails


@pytest.mark.parametrize("twins", [True, False])
def test_a_failed_step_is_shown_as_a_run_on_this_machine_shows_it(
    api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any], twins: bool
) -> None:
    api.twins = twins
    api.frames = [("FAILED", GATE)]
    api.logs = {"data-validation": GATE_LOG, "run-summary": summary_log("failed")}
    code, out, err = follow(capsys, api, api.add_run(spec))
    lines = err.strip().splitlines()
    assert code == 6
    assert lines[-1] == "avrt: error in data_validation (validation_failed): answers stand at A in 97 % of rows"
    assert "ERROR data_validation failed" in lines[-2]
    assert "Accuracy in % on 48" in out


def test_a_run_that_was_cancelled_ends_with_the_code_that_is_shown(
    api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    api.frames = [("CANCELED", {})]
    code, _, err = follow(capsys, api, api.add_run(spec))
    assert (code, "avrt: error (interrupted): the run" in err) == (75, True)


def test_of_two_failures_the_first_is_named(
    api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    api.frames = [("FAILED", GATE | {"run-summary": "failed"})]
    api.logs = {
        "data-validation": GATE_LOG,
        "run-summary": 'avrt-failure: {"step": "run_summary", "code": "store_failed", "message": "away"}\n',
    }
    code, _, err = follow(capsys, api, api.add_run(spec))
    assert code == 6
    assert "in data_validation" in err.strip().splitlines()[-1]


def test_one_failed_shard_of_two(api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]) -> None:
    states = {"preflight": "succeeded", "vision-teacher#0": "succeeded", "vision-teacher#1": "failed"}
    line = 'avrt-failure: {"step": "vision_teacher", "code": "engine_failed", "message": "no answer"}\n'
    api.frames = [("FAILED", states)]
    api.logs = {"vision-teacher": ["fine\n", line]}
    code, _, err = follow(capsys, api, api.add_run(spec))
    assert code == 8
    assert err.strip().splitlines()[-1] == "avrt: error in vision_teacher (engine_failed): no answer"


def test_a_step_that_was_killed_has_no_error_of_its_own(
    api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    api.frames = [("FAILED", {"sft": "failed"})]
    api.logs = {"sft": "loading weights\nComponent failed to execute successfully: exit status 137\n"}
    code, _, err = follow(capsys, api, api.add_run(spec))
    assert code == 1
    assert "  loading weights" in err
    assert "avrt: error in sft (error)" in err
    assert "out of memory: raise memory_limit" in err


def test_a_failing_driver_is_the_error_of_its_step(
    api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    api.frames = [("FAILED", {"ingest": "succeeded", "merger": "driver-failed", "sft": "omitted"})]
    api.logs = {"merger-driver": "F1126 driver: failed to init podSpecPatch: quantities must match\n"}
    code, _, err = follow(capsys, api, api.add_run(spec))
    assert code == 1
    assert "quantities must match" in err
    assert "avrt: error in merger (error)" in err


def test_what_argo_says_of_a_failed_pod_is_told_where_the_cluster_may_be_read(
    api: KfpApi, cluster: KubernetesApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    message = "Pod was active on the node longer than the specified deadline"
    cluster.nodes = {"a": {"id": "a", "name": "w.sft.executor", "type": "Pod", "phase": "Failed", "message": message}}
    api.frames = [("FAILED", {"sft": "failed"})]
    _, _, err = follow(capsys, api, api.add_run(spec))
    assert message in err.strip().splitlines()[-1]


def test_a_pod_of_another_step_that_was_retried_is_not_the_reason(
    api: KfpApi, cluster: KubernetesApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    pods = [("sft", "preempted", "2026-11-01T10:00:00Z"), ("grpo", "old", "2026-11-01T11:00:00Z")]
    pods += [("grpo", "OOMKilled", "2026-11-01T12:00:00Z")]
    cluster.nodes = {
        f"{number}": {
            "id": f"{number}",
            "name": f"w.root(0).{step}(0).executor({number})",
            "type": "Pod",
            "phase": "Failed",
            "message": message,
            "finishedAt": at,
        }
        for number, (step, message, at) in enumerate(pods)
    }
    api.frames = [("FAILED", {"sft": "succeeded", "grpo": "failed"})]
    _, _, err = follow(capsys, api, api.add_run(spec))
    said = err.strip().splitlines()[-1]
    assert "OOMKilled" in said
    assert "preempted" not in said


@pytest.mark.parametrize("text", ["a: [", "- no mapping", None])
def test_a_kubeconfig_that_cannot_be_read_is_said_and_the_run_is_watched(
    api: KfpApi,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    spec: dict[str, Any],
    text: str | None,
) -> None:
    place = tmp_path / "config"
    if text is None:
        place.mkdir()
    else:
        place.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(place))
    api.frames = [("SUCCEEDED", {"sft": "succeeded"})]
    code, _, err = follow(capsys, api, api.add_run(spec))
    assert code == 0, err
    assert "There is no cluster to talk to" in err
    assert f"correct KUBECONFIG, which is {place}" in err
    checks = preflight_cluster.cluster_checks(load(MINIATURE), load_profile(TEST))
    assert [check.status for check in checks if check.name == preflight_cluster.CLUSTER] == ["failed"]


def test_a_success_without_a_summary_is_still_a_success(
    api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    api.frames = [("SUCCEEDED", SUCCEEDED | {"run-summary": "failed"})]
    code, _, err = follow(capsys, api, api.add_run(spec))
    assert code == 0
    assert "left no summary" in err


def test_the_run_of_a_schedule_has_its_steps_in_the_version(
    api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    api.versions["v"] = {"pipeline_version_id": "v", "pipeline_id": "p", "pipeline_spec": spec}
    reference = {"pipeline_id": "p", "pipeline_version_id": "v"}
    api.frames = [("SUCCEEDED", {})]
    run = api.add_run({}, pipeline_version_reference=reference)
    code, out, _ = avrt(capsys, "status", run, "--host", api.url)
    assert code == 0
    assert "evaluation-base" in out


# waiting pods


GPU = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
UNSCHEDULABLE = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": GPU}]
WAITING = ("RUNNING", {"preflight": "succeeded", "sft": "pending"})


def retried(capsys: pytest.CaptureFixture[str], api: KfpApi, run: str, limit: float = 0.3) -> tuple[int, str, str]:
    """Watch a run as `avrt submit` does, without the seconds of compiling."""
    return avrt(capsys, "retry", run, "--host", api.url, "--pending-limit-s", str(max(1, limit)))


def test_a_pod_that_waits_too_long_ends_the_run_with_the_schedulers_reason(
    api: KfpApi, cluster: KubernetesApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    cluster.pods = [pod("sft", conditions=UNSCHEDULABLE)]
    api.frames = [("FAILED", {})]
    api.after_retry = [WAITING]
    code, _, err = retried(capsys, api, api.add_run(spec))
    lines = err.strip().splitlines()
    assert code == 7
    assert any(line.startswith("sft has waited") and GPU in line for line in lines)
    assert lines[-1].startswith("avrt: error in sft (environment): sft waited")
    assert lines[-1].endswith(f"Unschedulable: {GPU}")
    assert len(api.asked("POST", r"/runs/[^/]+:terminate")) == 1


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            {
                "containerStatuses": [
                    {"name": "main", "state": {"waiting": {"reason": "ErrImagePull", "message": "no"}}}
                ]
            },
            "ErrImagePull: no",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "main",
                        "state": {
                            "waiting": {
                                "reason": "CreateContainerConfigError",
                                "message": 'secret "avrt-store" not found',
                            }
                        },
                    }
                ]
            },
            'CreateContainerConfigError: secret "avrt-store" not found',
        ),
    ],
)
def test_the_kubelets_reason_is_reported(cluster: KubernetesApi, found: dict[str, Any], said: str) -> None:
    for status in found["containerStatuses"]:
        status |= {"image": "i", "imageID": "", "ready": False, "restartCount": 0}
    cluster.pods = [pod("sft", **found), pod("grpo", phase="Running")]
    (waiting,) = pods.Pods("kubeflow").waiting("a-run")
    assert (waiting.task, waiting.reason, waiting.held) == ("sft", said, False)


def test_a_pod_that_cannot_be_made_waits_too(cluster: KubernetesApi) -> None:
    quota = 'pods "x" is forbidden: exceeded quota: gpu'
    nodes = [{"id": "n", "name": "w.root.sft(0).executor(0)", "type": "Pod", "phase": "Pending", "message": quota}]
    (waiting,) = pods.Pods("kubeflow").waiting("a-run", nodes)
    assert (waiting.task, waiting.reason) == ("sft", quota)


def on_gpus(found: dict[str, Any], *, node: str | None = None, resource: str = "nvidia.com/gpu") -> dict[str, Any]:
    """A pod that asks for a GPU, and has one where it has a node."""
    found["spec"]["containers"][0]["resources"] = {"limits": {resource: "1", "memory": "1Gi"}}
    found["spec"] |= {"nodeSelector": {"pool": "h100"}} | ({"nodeName": node} if node else {})
    return found


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({}, True),
        ({"phase": "Succeeded"}, False),
        ({"node": None, "phase": "Pending"}, False),
        ({"resource": "nvidia.com/mig-3g.40gb"}, False),
        ({"message": "0/1 nodes are available: 1 Insufficient cpu."}, False),
        ({"selector": {"pool": "l4"}}, False),
    ],
)
def test_a_pod_may_wait_for_the_gpus_that_its_own_run_has(
    cluster: KubernetesApi, change: dict[str, Any], held: bool
) -> None:
    conditions = [UNSCHEDULABLE[0] | {"message": change.get("message", GPU)}]
    other = on_gpus(
        pod("vision-teacher", phase=change.get("phase", "Running")),
        node=change.get("node", "node-1"),
        resource=change.get("resource", "nvidia.com/gpu"),
    )
    other["spec"]["nodeSelector"] = change.get("selector", {"pool": "h100"})
    cluster.pods = [on_gpus(pod("audio-teacher", conditions=conditions)), other]
    found = {each.task: each for each in pods.Pods("kubeflow").waiting("a-run")}
    assert found["audio-teacher"].held == held
    assert ("other steps of the run have the GPUs" in found["audio-teacher"].reason) == held


def test_without_access_to_pods_nothing_waits_too_long_while_another_step_runs(
    api: KfpApi, cluster: KubernetesApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    cluster.forbidden = True
    api.frames = [("FAILED", {})]
    busy = ("RUNNING", {"preflight": "succeeded", "sft": "pending", "evaluation": "running"})
    api.after_retry = [busy] * 60 + [("SUCCEEDED", SUCCEEDED)]
    code, _, err = retried(capsys, api, api.add_run(spec))
    assert code == 0, err
    assert not api.asked("POST", r"/runs/[^/]+:terminate")


def test_while_kueue_holds_a_pod_no_time_passes(
    api: KfpApi, cluster: KubernetesApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    cluster.pods = [pod("sft", gates=("kueue.x-k8s.io/admission",), conditions=UNSCHEDULABLE)]
    api.frames = [("FAILED", {})]
    api.after_retry = [WAITING] * 60 + [("SUCCEEDED", SUCCEEDED)]
    code, _, err = retried(capsys, api, api.add_run(spec))
    assert code == 0
    assert "sft waits: Kueue holds it" in err
    assert not api.asked("POST", r"/runs/[^/]+:terminate")


def test_without_access_to_pods_nothing_is_said_of_waiting_where_kueue_may_hold_them(
    api: KfpApi, cluster: KubernetesApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    cluster.forbidden = True
    api.frames = [WAITING] * 60 + [("SUCCEEDED", SUCCEEDED)]
    gke = str(TEST.with_name("gke.yaml"))
    code, _, err = follow(capsys, api, api.add_run(spec), "--cluster", gke)
    assert (code, "has waited" in err) == (0, False)


def test_without_access_to_pods_it_is_said_once_and_the_limit_still_counts(
    api: KfpApi, cluster: KubernetesApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    cluster.forbidden = True
    api.frames = [("FAILED", {})]
    api.after_retry = [WAITING]
    code, _, err = retried(capsys, api, api.add_run(spec))
    assert code == 7
    assert err.count("The pods of the run cannot be read (the cluster refuses (403: pods is forbidden") == 1
    assert "access to the run's pods through KUBECONFIG would" in err


def test_a_deleted_workflow_is_noticed(
    api: KfpApi, cluster: KubernetesApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    api.frames = [("RUNNING", {"sft": "running"})] * 1000 + [("SUCCEEDED", {})]
    run = api.add_run(spec)

    def remove() -> None:
        deadline = time.monotonic() + 30  # it must have been seen
        while sum("/workflows" in place for _, place, _ in cluster.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        cluster.nodes = None

    remover = threading.Thread(target=remove)
    remover.start()
    code, _, err = follow(capsys, api, run)
    remover.join()
    assert code == 7
    assert f"avrt cancel {run} --delete" in err


# the backend's refusals


@pytest.mark.parametrize(
    ("status", "message", "code", "said"),
    [
        (403, "User 'ada' is not authorized", 7, "kubeflow-pipelines-edit"),
        (400, "parameter(s) provided are not required by pipeline: y", 2, "not required by pipeline: y"),
        (409, "Failed to create a run", 2, "Give it another name"),
        (500, "etcdserver: request is too large", 7, "etcdserver: request is too large"),
    ],
)
def test_a_refusal_is_one_line_with_the_mend(
    api: KfpApi, capsys: pytest.CaptureFixture[str], status: int, message: str, code: int, said: str
) -> None:
    api.refuse = [("POST", "/runs", status, message)]
    found, _, err = submit(capsys, api)
    assert found == code
    assert err.strip().splitlines()[-1].startswith("avrt: error: Starting the run failed")
    assert said in err
    assert len(api.asked("POST", "/runs")) == 1


def test_a_backend_that_wants_a_token_gets_the_one_of_the_variable(
    api: KfpApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]
) -> None:
    api.token = "s3cret"
    run = api.add_run(spec)
    code, _, err = avrt(capsys, "status", run, "--host", api.url)
    assert (code, "--token-env" in err) == (7, True)
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    code, out, err = avrt(capsys, "status", run, "--host", api.url, "--token-env", "MY_TOKEN")
    assert code == 0, err
    assert "s3cret" not in out + err
    monkeypatch.setenv("MY_TOKEN", "s3\ncret")
    code, _, err = avrt(capsys, "status", run, "--host", api.url, "--token-env", "MY_TOKEN")
    assert (code, len(err.strip().splitlines())) == (3, 1)
    assert "MY_TOKEN holds a line break" in err
    assert "cret" not in err


def test_a_token_that_expires_leaves_the_run_and_says_how_to_go_on(
    api: KfpApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]
) -> None:
    api.frames = [("RUNNING", dict.fromkeys(DONE[:2], "succeeded"))] * 50
    run = api.add_run(spec)
    monkeypatch.setenv("MY_TOKEN", "first")
    api.token = "first"
    show = watch.Steps.update

    def expire(steps: Any, states: Any) -> None:
        show(steps, states)
        api.token = "second"

    monkeypatch.setattr(watch.Steps, "update", expire)
    code, _, err = follow(capsys, api, run, "--token-env", "MY_TOKEN", "--namespace", "ada")
    assert (code, "renew one that has expired" in err) == (7, True)
    assert f"The run {run} goes on: `avrt status {run} --follow --host {api.url} --namespace ada` shows it" in err
    assert not api.asked("POST", r"/runs/[^/]+:terminate")


def test_in_a_pod_the_projected_token_is_used_and_read_again(
    api: KfpApi,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    spec: dict[str, Any],
) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    api.token = "first"
    reached = backend.connect(backend.Access(host=api.url), None)
    file.write_text("second\n")
    api.token = "second"
    assert reached.run(api.add_run(spec)).state == "SUCCEEDED"


def test_a_login_page_wants_a_cookie(
    api: KfpApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]
) -> None:
    api.login = "oauth2_proxy_kubeflow=abc"
    run = api.add_run(spec)
    code, _, err = avrt(capsys, "status", run, "--host", api.url)
    assert (code, "--cookie-env" in err) == (7, True)
    monkeypatch.setenv("MY_COOKIE", api.login)
    assert avrt(capsys, "status", run, "--host", api.url, "--cookie-env", "MY_COOKIE")[0] == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--host", "127.0.0.1:1"], 2, "must start with http"),
        (["--host", "https://"], 2, "name a host"),
        (["--host", "http://backend:port"], 2, "has the form https://HOST:PORT"),
        (["--host", "http://127.0.0.1:1"], 7, "port-forward svc/ml-pipeline"),
        (["--host", "http://127.0.0.1:1", "--token-env", "NOT_SET"], 2, "NOT_SET, which is not set"),
        ([], 2, "KFP_ENDPOINT"),
    ],
)
def test_an_address_that_is_none(capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str) -> None:
    found, _, err = avrt(capsys, "status", "a-run", *options)
    assert (found, said in err) == (code, True), err


def test_a_password_in_the_address_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = avrt(capsys, "status", "a-run", "--host", "http://me:s3cret@127.0.0.1:1")
    assert (code, "must hold no password" in err) == (2, True)
    assert "s3cret" not in out + err


def test_names_that_are_too_long_are_refused_before_anything_is_sent(
    api: KfpApi, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = submit(capsys, api, "--run-name", "x" * 200)
    assert (code, "1 to 127 characters, not 200" in err) == (2, True)
    assert not api.asked("POST", ".*")


def test_an_unknown_run(api: KfpApi, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = avrt(capsys, "status", "nope", "--host", api.url)
    assert (code, "There is no run nope" in err) == (2, True)


def test_a_backend_that_is_away_for_a_moment_is_asked_again(
    api: KfpApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]
) -> None:
    monkeypatch.setattr(backend, "PATIENCE_S", 30.0)
    api.frames = [("RUNNING", {"sft": "running"})] * 3 + [("SUCCEEDED", SUCCEEDED)]
    run = api.add_run(spec)
    api.refuse = [("GET", "/runs/[^/]+", 503, "upstream connect error")]
    code, _, err = follow(capsys, api, run)
    assert code == 0
    assert "Trying again" in err


# Ctrl-C


def command(api: KfpApi, tmp_path: Path, *arguments: str) -> list[str]:
    program = "import sys; from avrt_lib.cli import main as cli\n"
    program += "from pipelines.commands import register\nfrom pipelines import watch\nwatch.POLL_S = 0.1\n"
    program += "register(cli.app)\n"
    program += f"cli.main({[*arguments, '--host', api.url]!r})\n"
    return [sys.executable, "-c", program]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "KUBECONFIG": str(tmp_path / "none"), "TERM": "xterm"}


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_without_a_terminal_leaves_the_run_and_says_how_to_go_on(
    api: KfpApi, tmp_path: Path, spec: dict[str, Any]
) -> None:
    api.frames = [("RUNNING", {"sft": "running"})]
    run = api.add_run(spec)
    child = subprocess.Popen(
        command(api, tmp_path, "status", run, "--follow"),
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: len(api.asked("GET", "/runs/[^/]+")) > 3)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 130
    assert f"avrt status {run} --follow" in err
    assert not api.asked("POST", r"/runs/[^/]+:terminate")


@pytest.mark.parametrize(("answer", "ended"), [("end", True), ("leave", False)])
def test_ctrl_c_on_a_terminal_asks(api: KfpApi, tmp_path: Path, spec: dict[str, Any], answer: str, ended: bool) -> None:
    api.frames = [("RUNNING", {"sft": "running"})]
    run = api.add_run(spec)
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        command(api, tmp_path, "status", run, "--follow"),
        env=environment(tmp_path),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""

    def read() -> bytes:
        nonlocal shown
        if select.select([ours], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # the other side is closed
                shown += os.read(ours, 65536)
        return shown

    try:
        wait_for(lambda: read() and len(api.asked("GET", "/runs/[^/]+")) > 3)
        child.send_signal(signal.SIGINT)
        wait_for(lambda: b"go on watching?" in read())
        os.write(ours, f"{answer}\n".encode())
        wait_for(lambda: read() and child.poll() is not None)
        read()
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    assert child.returncode == 130, shown
    assert bool(api.asked("POST", r"/runs/[^/]+:terminate")) == ended
    assert (b"was ended as asked" if ended else b"goes on") in shown


# retry, cancel, status


def test_a_retry_watches_the_new_attempt(api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]) -> None:
    # the handler of the first attempt is not run again, so what it printed is not this attempt's
    second = {"run-summary": "succeeded", **{task: "succeeded" for task in SUCCEEDED if task != "run-summary"}}
    api.frames = [("FAILED", GATE)]
    api.after_retry = [("FAILED", GATE), ("RUNNING", {"sft": "running"}), ("SUCCEEDED", second)]
    api.logs = {"run-summary": summary_log("failed")}
    code, out, err = avrt(capsys, "retry", api.add_run(spec), "--host", api.url)
    assert code == 0, err
    assert "needs a new run" in err
    assert "no summary of this attempt" in err
    assert "Accuracy" not in out


def test_only_a_failed_run_is_retried(api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]) -> None:
    run = api.add_run(spec)
    code, _, err = avrt(capsys, "retry", run, "--host", api.url)
    assert (code, "only a failed one can be retried" in err) == (2, True)
    assert not api.asked("POST", r"/runs/[^/]+:retry")


def test_cancel(api: KfpApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]) -> None:
    api.frames = [("RUNNING", {"sft": "running"})]
    run = api.add_run(spec)
    assert avrt(capsys, "cancel", run, "--host", api.url)[0] == 0
    assert api.runs[run]["frames"][-1][0] == "FAILED"
    assert avrt(capsys, "cancel", run, "--host", api.url, "--delete")[0] == 0
    assert not api.runs


def test_status_shows_every_step_and_the_logs_of_running_ones(
    api: KfpApi, cluster: KubernetesApi, capsys: pytest.CaptureFixture[str], spec: dict[str, Any]
) -> None:
    api.frames = [
        ("RUNNING", {"preflight": "succeeded", "ingest": "cached", "sft": "running", "audio-teacher#0": "succeeded"})
    ]
    cluster.pods = [pod("sft", phase="Running")]
    code, out, _ = avrt(capsys, "status", api.add_run(spec, "my run"), "--host", api.url, "--logs")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert "my run: RUNNING" in out
    assert ["ingest", "succeeded"] in [line[:2] for line in lines]
    assert ["audio_teacher", "running", "1/2"] in [line[:3] for line in lines]
    assert ["grpo", "waiting"] in [line[:2] for line in lines]
    assert "step 12 of 40" in out


def test_the_steps_of_a_pipeline_stand_in_an_order_in_which_they_run(spec: dict[str, Any]) -> None:
    shown = [row.shown for row in rows_of(spec)]
    assert shown[:2] == ["preflight", "ingest"]
    assert shown.index("merger") < shown.index("data_validation") < shown.index("sft") < shown.index("evaluation-sft")
    assert shown[-1] == "run_summary"
    assert {row.shown: row.instances for row in rows_of(spec)}["vision_teacher"] == 2


# schedules


def scheduled(capsys: pytest.CaptureFixture[str], api: KfpApi, *more: str) -> tuple[int, str, str]:
    options = ("--config", str(MINIATURE), "--cluster", str(TEST), "--host", api.url)
    return avrt(capsys, "schedule", *options, *more)


def test_a_schedule_is_made_listed_switched_and_deleted(api: KfpApi, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = scheduled(capsys, api, "--cron", "0 3 * * 1")
    assert code == 0, err
    ((schedule_id, made),) = api.schedules.items()
    assert out.split() == [schedule_id]
    assert made["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1"
    assert made["service_account"] == "pipeline-runner"
    version = api.versions[made["pipeline_version_reference"]["pipeline_version_id"]]
    ingest = version["pipeline_spec"]["pipeline_spec"]["components"]["comp-exit-handler-1"]["dag"]["tasks"]["ingest"]
    assert not ingest["cachingOptions"].get("enableCache")  # the sources are read anew in every run
    reach = ("--cluster", str(TEST), "--host", api.url)
    assert schedule_id[:8] in avrt(capsys, "schedule", "list", *reach)[1]
    assert avrt(capsys, "schedule", "disable", schedule_id, *reach)[0] == 0
    assert api.schedules[schedule_id]["status"] == "DISABLED"
    assert avrt(capsys, "schedule", "enable", schedule_id, *reach)[0] == 0
    assert api.schedules[schedule_id]["status"] == "ENABLED"
    assert avrt(capsys, "schedule", "delete", schedule_id, *reach)[0] == 0
    assert not api.schedules
    assert "There is no schedule" in avrt(capsys, "schedule", "delete", schedule_id, *reach)[2]


def test_the_same_content_is_uploaded_once(api: KfpApi, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert scheduled(capsys, api, "--cron", "0 3 * * *")[0] == 0
    assert (len(api.versions), len(api.schedules)) == (1, 2)


@pytest.mark.parametrize("text", ["0 3 * *", "0 0 3 * * * *", "0 3 * * ;", ""])
def test_a_cron_expression_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="five fields"):
        housekeeping.cron(text)


def test_schedule_without_its_options_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = avrt(capsys, "schedule")
    assert (code, "--cron, --config and --cluster" in err) == (2, True)
