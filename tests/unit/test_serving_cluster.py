"""What serving makes of an API server's refusals, and of a cluster that cannot be found; the answers are recorded."""

from __future__ import annotations

import http.server
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from avrt_lib.cli import main as cli
from avrt_lib.cli import serving as commands
from avrt_lib.errors import AvrtError, EnvironmentProblem, ServingError
from avrt_lib.serving import rollout
from avrt_lib.serving.cluster import Cluster, Conflict
from avrt_lib.serving.inference_service import SOURCE
from tests.kubeconfig import write_kubeconfig

SERVICE = {"metadata": {"name": "champion", "uid": "1"}, "spec": {}}
ENDED = {"name": "kserve-container", "state": {"terminated": {"exitCode": 3}}}


class _ApiServer(http.server.BaseHTTPRequestHandler):
    """Answers by path; what is not set is an empty list."""

    answers: ClassVar[dict[str, tuple[int, object]]] = {}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/apis").removeprefix("/api")
        status, document = self.answers.get(path, (200, {"items": []}))
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[int, object]]]:
    """What the API server answers, by path; KUBECONFIG names it."""
    monkeypatch.setattr(_ApiServer, "answers", {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _ApiServer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv(
            "KUBECONFIG", write_kubeconfig(tmp_path / "config", f"http://127.0.0.1:{running.server_port}")
        )
        yield _ApiServer.answers
        running.shutdown()


CHAMPION = "/serving.kserve.io/v1beta1/namespaces/avrt/inferenceservices/champion"


@pytest.mark.parametrize(
    ("status", "message", "kind", "said"),
    [
        (401, "Unauthorized", EnvironmentProblem, r"does not take the credentials of KUBECONFIG \(Unauthorized\)"),
        (403, "User x cannot get", EnvironmentProblem, "may not get inferenceservices in avrt: bind the Role"),
        (403, 'admission webhook "a" denied', ServingError, "refused to get inferenceservices"),
        (409, "the object has been modified", Conflict, "the object has been modified"),
        (422, "spec: Invalid value", ServingError, "spec: Invalid value"),
        (429, "too many requests", EnvironmentProblem, "could not get inferenceservices in avrt .*try again"),
        (500, "etcdserver: leader changed", EnvironmentProblem, "leader changed.*try again"),
        (503, "apiserver is shutting down", EnvironmentProblem, "shutting down.*try again"),
    ],
)
def test_a_refusal_is_told_from_a_server_that_cannot(
    answers: dict[str, tuple[int, object]], status: int, message: str, kind: type[AvrtError], said: str
) -> None:
    answers[CHAMPION] = (status, {"message": message})
    with pytest.raises(kind, match=said) as caught:
        Cluster("avrt").service("champion")
    assert type(caught.value) is kind


def test_a_node_that_does_not_give_logs_is_no_hindrance(answers: dict[str, tuple[int, object]]) -> None:
    pod = {"metadata": {"name": "p", "uid": "2"}, "status": {"containerStatuses": [ENDED]}}
    answers[CHAMPION] = (200, SERVICE)
    answers["/v1/namespaces/avrt/pods"] = (200, {"items": [pod]})
    answers["/v1/namespaces/avrt/pods/p/log"] = (500, {"message": "dial tcp 10.0.0.1:10250: no route to host"})
    found = Cluster("avrt").documents("champion")
    assert (found.pods, found.logs) == ([pod], {})


def test_events_of_one_that_had_the_name_before_are_left_out(answers: dict[str, tuple[int, object]]) -> None:
    events = [{"involvedObject": {"name": "champion", "uid": uid}} for uid in ("0", "1")]
    answers[CHAMPION] = (200, SERVICE)
    answers["/v1/namespaces/avrt/events"] = (200, {"items": events})
    assert Cluster("avrt").documents("champion").events == events[1:]


def test_kubeconfig_may_name_several_files(
    answers: dict[str, tuple[int, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(
        "KUBECONFIG", f"{tmp_path / 'config'}:{write_kubeconfig(tmp_path / 'second', 'http://127.0.0.1:9')}"
    )
    answers[CHAMPION] = (200, SERVICE)
    assert Cluster("avrt").service("champion") == SERVICE
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", [None, "clusters: [", "apiVersion: v1\nkind: Config\n", "nothing", "- a\n"])
def test_a_kubeconfig_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(EnvironmentProblem, match=f"no cluster to talk to .* correct KUBECONFIG, which is {path}"):
        Cluster("avrt")


def test_without_any_cluster_nothing_but_the_error_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="set KUBECONFIG"):
        Cluster("avrt")
    assert capsys.readouterr().out == ""


@pytest.fixture
def avrt(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Calls `avrt serving`; returns the exit code and both outputs, each as one line."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["serving", *arguments])
        seen, code = capsys.readouterr(), ended.value.code
        return code if isinstance(code, int) else 0, " ".join(seen.out.split()), " ".join(seen.err.split())

    return call


def deployment(ready: int) -> dict[str, Any]:
    template = {"metadata": {"annotations": {SOURCE: "s3://m"}}}
    status = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": ready}
    return {"metadata": {"generation": 1}, "spec": {"template": template}, "status": status}


@pytest.mark.parametrize(
    ("ready", "asked", "code", "said"),
    [
        (1, (), 0, "avrt/champion is serving (s3://m)."),
        (0, (), 75, "avrt/champion is rolling out (s3://m): 0 of 1 pods ready."),
        (1, ("--uri", "s3://other"), 11, "avrt/champion is set to another model (s3://other): it is set to s3://m."),
        (None, (), 11, "avrt/champion is absent. To do: deploy it"),
    ],
)
def test_the_exit_code_of_status_says_what_it_does(
    answers: dict[str, tuple[int, object]],
    avrt: Callable[..., tuple[int, str, str]],
    ready: int | None,
    asked: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    answers[CHAMPION] = (404, {"message": "not found"})
    if ready is not None:
        spec = {"predictor": {"model": {"storageUri": "s3://m"}}}
        answers[CHAMPION] = (200, {**SERVICE, "spec": spec})
        answers["/apps/v1/namespaces/avrt/deployments/champion-predictor"] = (200, deployment(ready))
    ended, out, _ = avrt("status", "champion", *asked)
    assert (ended, out[: len(said)]) == (code, said)


@pytest.mark.parametrize("command", ["rollout --uri s3://m", "rollback"])
def test_a_time_that_is_none_is_refused(avrt: Callable[..., tuple[int, str, str]], command: str) -> None:
    code, _, err = avrt(*command.split(), "--timeout-s", "-3")
    assert (code, "--timeout-s" in err) == (2, True)


def test_a_rollout_that_is_stopped_says_how_it_goes_on(
    answers: dict[str, tuple[int, object]],
    avrt: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    spec = {"predictor": {"model": {"storageUri": "s3://m"}}}
    metadata = {"name": "champion"}
    answers[CHAMPION] = (200, {"apiVersion": "v", "kind": "k", "metadata": metadata, "spec": spec})
    monkeypatch.setattr(rollout, "rollout", stopped)
    monkeypatch.setattr(commands, "_questions", lambda *_: [])
    code, _, err = avrt("rollout", "champion", "--uri", "s3://n", "--config", "miniature")
    assert code == 128 + signal.SIGTERM
    assert "the same command goes on, avrt serving rollback champion --namespace avrt gives it up." in err
