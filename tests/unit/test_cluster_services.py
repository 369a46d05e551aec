"""Preflight's checks of the object store and MLflow, the store being a real SeaweedFS."""

from __future__ import annotations

import http.server
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import store
from avrt_lib.cluster.profile import VARIABLE, Profile, TrackingAccess, load_profile
from avrt_lib.config import Config, load
from avrt_lib.models import write_manifest
from avrt_lib.preflight import services
from avrt_lib.preflight.cluster import cluster_checks
from avrt_lib.preflight.services import manifests_check, store_check, tracking_check
from avrt_lib.store import LocalObjectServer

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalObjectServer]:
    with LocalObjectServer(tmp_path_factory.mktemp("run") / "store") as running:
        yield running


@pytest.fixture
def in_pod(server: LocalObjectServer, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def profile(endpoint: str = "127.0.0.1:1", **pools: dict[str, Any]) -> Profile:
    document = load_profile(CONFIGS / "clusters" / "test.yaml").model_dump()
    document["store"] |= {"endpoint": endpoint, "secure": False}
    for role, changes in pools.items():
        document["pools"][role] |= changes
    return Profile.model_validate(document)


def config(**settings: Any) -> Config:
    return load(CONFIGS / "miniature.yaml", settings)


def test_a_bucket_that_can_be_written_to(in_pod: pytest.MonkeyPatch) -> None:
    check = store_check(config(), profile(), None, inside=True)
    assert check.status == "ok"
    assert list(store.client().list_objects("avrt", "preflight/", recursive=True)) == [], "the probe is gone again"


def test_wrong_credentials_name_the_secret_and_stay_unsaid(in_pod: pytest.MonkeyPatch) -> None:
    in_pod.setenv("AVRT_S3_SECRET_KEY", "hunter2")
    check = store_check(config(), profile(), None, inside=True)
    assert check.status == "failed"
    assert "refuses the credentials" in check.found
    assert "avrt-store" in check.mend
    assert "hunter2" not in check.line()
    assert not check.coming_up


def test_a_store_that_is_away(in_pod: pytest.MonkeyPatch) -> None:
    in_pod.setenv("AVRT_S3_ENDPOINT", "127.0.0.1:1")
    check = store_check(config(), profile(), None, inside=True)
    assert (check.status, "cannot be reached" in check.found) == ("failed", True)
    assert check.coming_up, "it may only just have been started"


def test_a_pod_without_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AVRT_S3_ENDPOINT", "AVRT_S3_ACCESS_KEY", "AVRT_S3_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    check = store_check(config(), profile(), None, inside=True)
    assert (check.status, check.mend) == ("failed", "make the secret avrt-store")


def test_from_outside_the_store_is_asked_with_the_secret(server: LocalObjectServer) -> None:
    settings = server.settings
    secret = {"access_key": settings.access_key, "secret_key": settings.secret_key}
    outside = profile(settings.endpoint)
    assert store_check(config(), outside, secret, inside=False).status == "ok"
    check = store_check(config(**{"store.bucket": "not-there"}), outside, secret, inside=False)
    assert (check.status, "there is no not-there" in check.found) == ("warning", True)
    assert store_check(config(), outside, None, inside=False).status == "not checked"
    inner = profile("avrt-store.avrt.svc.cluster.local:8333")
    assert store_check(config(), inner, secret, inside=False).status == "not checked"
    away = store_check(config(), profile("127.0.0.1:1"), secret, inside=False)
    assert (away.status, away.coming_up) == ("failed", False)


def test_models_must_be_there_and_fit_on_the_disk(in_pod: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"w" * 2_000_000)
    write_manifest(folder, {})
    place = store.publish_model(folder, "teacher", config().store)
    settings = {"merger.engine": {"kind": "vllm", "model": place.uri}}
    assert store_check(config(**settings), profile(), None, inside=True).status == "ok"
    check = store_check(config(**settings), profile(merger={"scratch": "1M"}), None, inside=True)
    assert (check.name, check.status) == ("Disk merger.engine", "failed")
    gone = {"merger.engine": {"kind": "vllm", "model": "s3://avrt/models/teacher/" + "0" * 64}}
    check = store_check(config(**gone), profile(), None, inside=True)
    assert (check.name, check.status) == ("Model merger.engine", "failed")


class _Tracking(http.server.BaseHTTPRequestHandler):
    """Knows one login, and experiments."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Basic dTpw"  # u:p
        answers = {"api": 200, "starting": 503}
        self.send_response(answers.get(self.path.split("/")[1], 404) if known else 401)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def tracking() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Tracking) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("login", "path", "status", "coming_up"),
    [
        ({"username": "u", "password": "p"}, "", "ok", False),
        ({"username": "u", "password": "x"}, "", "failed", False),
        ({"username": "u", "password": "p"}, "/wrong", "failed", False),
        ({"username": "u", "password": "p"}, "/starting", "failed", True),
        (None, "", "not checked", False),
    ],
)
def test_mlflow_is_asked_as_promotion_will(
    tracking: str,
    monkeypatch: pytest.MonkeyPatch,
    login: dict[str, str] | None,
    path: str,
    status: str,
    coming_up: bool,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    access = TrackingAccess(uri=tracking + path, secret="avrt-mlflow")
    check = tracking_check(access, login, inside=True)
    assert (check.status, check.coming_up) == (status, coming_up)


def test_mlflow_that_is_away() -> None:
    check = tracking_check(TrackingAccess(uri="http://127.0.0.1:1"), None, inside=True)
    assert (check.status, "cannot be reached" in check.found) == ("failed", True)
    inner = TrackingAccess(uri="http://avrt-mlflow.avrt.svc.cluster.local:5000")
    assert tracking_check(inner, None, inside=False).status == "not checked"


@pytest.fixture
def first_pod(in_pod: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a run's first pod, with a login for MLflow, and short waits."""
    in_pod.setenv("KUBECONFIG", "/nonexistent")
    in_pod.setenv(VARIABLE, "{}")
    in_pod.setenv("MLFLOW_TRACKING_USERNAME", "u")
    in_pod.setenv("MLFLOW_TRACKING_PASSWORD", "p")
    in_pod.setattr(services, "ASK_EVERY_S", 0.1)
    return in_pod


def with_tracking(uri: str) -> Profile:
    return Profile.model_validate(profile().model_dump() | {"tracking": {"uri": uri, "secret": "avrt-mlflow"}})


def test_a_pod_waits_for_an_mlflow_that_is_still_starting(first_pod: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    servers: list[http.server.ThreadingHTTPServer] = []

    def start() -> None:
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", port), _Tracking))
        servers[0].serve_forever()

    timer = threading.Timer(1.0, start)
    timer.start()
    checks = {check.name: check for check in cluster_checks(config(), with_tracking(f"http://127.0.0.1:{port}"))}
    servers[0].shutdown()
    servers[0].server_close()
    assert (checks["MLflow"].status, checks["Bucket"].status) == ("ok", "ok")


def test_store_and_mlflow_are_waited_for_together_and_not_for_ever(first_pod: pytest.MonkeyPatch) -> None:
    first_pod.setenv("AVRT_S3_ENDPOINT", "127.0.0.1:1")
    first_pod.setattr(services, "COMING_UP_S", 1.0)
    asked = time.monotonic()
    checks = {check.name: check for check in cluster_checks(config(), with_tracking("http://127.0.0.1:1"))}
    assert (checks["MLflow"].status, checks["Bucket"].status) == ("failed", "failed")
    assert time.monotonic() - asked >= 1.0


def test_what_will_not_mend_itself_is_asked_once(first_pod: pytest.MonkeyPatch, tracking: str) -> None:
    first_pod.setenv("AVRT_S3_SECRET_KEY", "wrong")
    first_pod.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    first_pod.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    checks = {check.name: check for check in cluster_checks(config(), with_tracking(tracking))}
    assert (checks["MLflow"].status, checks["Bucket"].status) == ("failed", "failed")


@pytest.mark.parametrize(
    ("url", "branch", "status"), [("", "main", "ok"), ("", "gone", "failed"), ("/nonexistent", "main", "failed")]
)
def test_the_repository_of_manifests(tmp_path: Path, url: str, branch: str, status: str) -> None:
    repository = tmp_path / "manifests"
    author = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(repository)], check=True)
    subprocess.run(
        ["git", "-C", str(repository), *author, "commit", "--quiet", "--allow-empty", "--message=first"], check=True
    )
    settings = {
        "deployment.target": "git",
        "deployment.manifests_url": url or str(repository),
        "deployment.manifests_branch": branch,
    }
    assert manifests_check(config(**settings)).status == status
