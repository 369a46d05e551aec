"""The miniature's champion on real vLLM behind KServe, in overlays/test: served, replaced, and taken back.

Needs, beside the images of ``make images`` on the node, KServe and a finished run of the miniature with a champion
(``runs/latest``, or the folder that AVRT_TEST_RUN names).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from kubernetes import config as kubernetes_config

from avrt_lib.cluster.profile import load_profile
from avrt_lib.config import Config, load
from avrt_lib.engine.messages import student_messages
from avrt_lib.errors import UsageError
from avrt_lib.runs import RunFolder, find
from avrt_lib.serving import deployment
from avrt_lib.serving.cluster import Cluster as Served
from avrt_lib.serving.inference_service import State, status
from avrt_lib.store import publish_model
from avrt_lib.tables import read_json
from avrt_lib.workspace import Workspace, read_reports
from scripts import manifests
from tests.cluster.kserve import Prober, forwarded, require_kserve
from tests.manifests.conftest import Cluster, secret

pytestmark = pytest.mark.slow

START_S = 900.0
NAMESPACE = "avrt"
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


@pytest.fixture(scope="module")
def run() -> RunFolder:
    """A finished run."""
    try:
        found = find(manifests.ROOT / "runs", os.environ.get("AVRT_TEST_RUN", "latest"))
    except UsageError:
        pytest.skip("no finished run: make run, or name one in AVRT_TEST_RUN")
    if not (found.path / "summary.json").exists() or read_json(found.path / "summary.json")["champion"] is None:
        pytest.skip(f"{found.path} has no champion")
    return found


@pytest.fixture(scope="module")
def made(run: RunFolder) -> dict[str, Path]:
    """The run's folders: ``samples``, ``champion``, ``sft``, ``grpo``."""
    outputs = {name: report["outputs"] for name, report in read_reports(run.work).items() if report.get("outputs")}
    return {
        "samples": Path(outputs["ingest"]["samples"]),
        "champion": Path(outputs["promotion"]["champion"]),
        "sft": Path(outputs["sft"]["model"]),
        "grpo": Path(outputs["grpo"]["model"]),
    }


@pytest.fixture(scope="module")
def config() -> Config:
    """The miniature's, as the test cluster's profile has it."""
    profile = load_profile(manifests.ROOT / "configs/clusters/test.yaml")
    return load(manifests.ROOT / "configs/miniature.yaml", profile.overrides)


@pytest.fixture(scope="module")
def core(running: Cluster) -> Iterator[client.CoreV1Api]:
    """The cluster, with KServe, kubectl on the path, and the served model's key in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{manifests.TOOLS / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("AVRT_API_KEY", secret(running, "avrt-api-key")["api_key"])
        kubernetes_config.load_kube_config()
        require_kserve()
        yield client.CoreV1Api()


@pytest.fixture(scope="module")
def published(core: client.CoreV1Api, running: Cluster, made: dict[str, Path], config: Config) -> dict[str, str]:
    """The addresses of the run's two trained models, in the store of the cluster."""
    name, key = config.promotion.model_name, secret(running, "avrt-store")
    with forwarded(NAMESPACE, "service/avrt-store", 8333) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVRT_S3_ENDPOINT", endpoint)
        patch.setenv("AVRT_S3_SECURE", "0")
        patch.setenv("AVRT_S3_ACCESS_KEY", key["access_key"])
        patch.setenv("AVRT_S3_SECRET_KEY", key["secret_key"])
        return {role: publish_model(made[role], name, config.store).uri for role in ("sft", "grpo")}


@pytest.fixture(scope="module")
def champion(
    published: dict[str, str],
    made: dict[str, Path],
    config: Config,
    tmp_path_factory: pytest.TempPathFactory,
    observed: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """The champion that the deployment step has brought up: its name, what the step found, the addresses of it and of
    the other model."""
    uri = read_json(made["champion"] / "champion.json")["uri"]
    (other,) = set(published.values()) - {uri}
    assert uri in published.values()
    root = tmp_path_factory.mktemp("deployment")
    started = time.monotonic()
    facts = deployment.run(
        config,
        workspace=Workspace(root, "deployment", root / "scratch"),
        samples=made["samples"],
        champion=made["champion"],
        check=root / "check",
    )
    observed(f"real vLLM: served from the store and asked in {time.monotonic() - started:.0f} s: {facts}")
    name = config.promotion.model_name
    yield name, {**facts, **read_json(root / "check" / "check.json")}, {"champion": uri, "other": other}
    Served(NAMESPACE).delete(name)


@pytest.fixture
def prober(
    core: client.CoreV1Api,
    running: Cluster,
    champion: tuple[str, Any, Any],
    config: Config,
    made: dict[str, Path],
    observed: Callable[[str], None],
) -> Iterator[Prober]:
    """Asks the champion's Service a held-out question with picture and sound all the time."""
    (sample,) = deployment.probe_questions(made["samples"], 1)
    asked = student_messages(config.student.prompt, sample)
    assert asked is not None
    script = (manifests.ROOT / "tests/cluster/standin/prober.py").read_text(encoding="utf-8")
    data = {"prober.py": script, "content.json": json.dumps(asked[-1]["content"])}
    core.create_namespaced_config_map(NAMESPACE, {"metadata": {"name": "prober"}, "data": data})
    image = json.loads((manifests.ROOT / "build/images.json").read_text(encoding="utf-8"))["images"]["pipeline"]
    counting = Prober(
        core,
        NAMESPACE,
        champion[0],
        image=image["reference"],
        command=("python", "/probe/prober.py"),
        options=("--content", "/probe/content.json", "--pause", "0.5", "--timeout", "60"),
        key={"valueFrom": {"secretKeyRef": {"name": "avrt-api-key", "key": "api_key"}}},
        pod={"volumes": [{"name": "probe", "configMap": {"name": "prober"}}]},
        container={
            "volumeMounts": [{"name": "probe", "mountPath": "/probe"}],
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
            "securityContext": RESTRICTED,
        },
    )
    yield counting
    counting.remove()
    core.delete_namespaced_config_map("prober", NAMESPACE)


def avrt(*arguments: str, observed: Callable[[str], None]) -> str:
    """What the command line says; it must end with 0."""
    started = time.monotonic()
    command = [sys.executable, "-c", "from avrt_lib.cli.main import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * START_S)
    assert done.returncode == 0, done.stderr[-3000:]
    observed(f"real vLLM: avrt {' '.join(arguments[:2])}: {time.monotonic() - started:.0f} s")
    return done.stdout


def test_it_answers_questions_with_picture_and_sound(champion: tuple[str, dict[str, Any], dict[str, str]]) -> None:
    _, facts, _ = champion
    assert facts["ok"] is True
    assert [reply["error"] for reply in facts["questions"]] == [None] * facts["answers"]
    assert facts["answers"] >= 3
    assert 3 * facts["well_formed"] >= 2 * facts["answers"]


def test_a_candidate_takes_its_place_and_goes_back_and_no_request_fails(
    champion: tuple[str, dict[str, Any], dict[str, str]],
    prober: Prober,
    run: RunFolder,
    observed: Callable[[str], None],
) -> None:
    name, _, uris = champion
    place = ("--namespace", NAMESPACE)
    questions = ("--runs-dir", str(run.path.parent), "--run", run.path.name)
    model = ("--uri", uris["other"], "--version", "2", "--timeout-s", str(START_S))
    said = avrt("serving", "rollout", name, *place, *model, *questions, observed=observed)
    assert "is serving" in said
    assert status(Served(NAMESPACE), name, uris["other"]).state is State.SERVING

    said = avrt("serving", "rollback", name, *place, "--timeout-s", str(START_S), observed=observed)
    assert "is serving" in said
    assert status(Served(NAMESPACE), name, uris["champion"]).state is State.SERVING

    time.sleep(5)
    counted = prober.counted()
    observed(f"real vLLM: {sum(counted['answers'].values())} requests answered, {len(counted['failures'])} failed")
    assert counted["failures"] == []
    # Before, during and after: the models differ in what they say about this question, or it is one answer.
    assert counted["order"][0] == counted["order"][-1]
