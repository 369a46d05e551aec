"""What Argo CD follows, on an API server with KServe's webhook and controller: it is stored as it is written, a second
apply changes nothing, and the autoscalers are the ones that were chosen.

Run against the cluster that KUBECONFIG names, which must have KServe (Standard mode) and no namespace ``avrt`` of its
own; skipped without them. Kinds that the cluster does not know are left out, but for those that must be there.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from scripts.manifest_policies import CLUSTER_KINDS, Build, Object
from tests.manifests.conftest import Cluster, one

SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"
NAME = "avrt-3b"
PREDICTOR = f"{NAME}-predictor"
#: What Argo CD or an administrator applies, and a kind of each that must be there.
BUILDS = {
    "serving/staging": "InferenceService",
    "serving/production": "InferenceService",
    "components/autoscaling-hpa": "InferenceService",
    "components/modelcar": "InferenceService",
    "components/llm-inference-service": "LLMInferenceService",
    "components/model-cache": "LocalModelNamespaceCache",
    "components/model-cache-nodes": "LocalModelNodeGroup",
    "argocd/bootstrap/production": "AppProject",
    "argocd/applications/production": "Application",
}


@pytest.fixture(scope="module")
def kserve(cluster: Cluster, rendered: dict[str, Build]) -> Iterator[Cluster]:
    """The cluster with KServe, production's runtime, accounts and quota, and the secret of the download."""
    if not cluster.has("-n", "kserve", "deployment", "kserve-controller-manager"):
        pytest.skip("the cluster has no KServe")
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "avrt-models-s3", "namespace": "avrt"},
        "stringData": {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "none"},
    }
    kinds = ("ResourceQuota", "ServiceAccount", "ServingRuntime")
    needed = [secret, *(d for d in rendered["production"].objects if d["kind"] in kinds)]
    made_argocd = not cluster.has("namespace", "argocd")
    if made_argocd:
        cluster.kubectl("create", "namespace", "argocd")
    apply(cluster, [*needed, *rendered["components/kserve-admin"].objects])
    yield cluster
    cluster.kubectl("-n", "avrt", "delete", "inferenceservices", "--all", "--timeout=100s")
    apply(cluster, [d for d in rendered["test"].objects if d["kind"] == "ResourceQuota"])
    if made_argocd:
        cluster.kubectl("delete", "namespace", "argocd", "--wait=false")


def apply(cluster: Cluster, objects: list[Object]) -> None:
    """Server-side apply, as Argo CD does it."""
    result = cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", objects=objects, check=False)
    assert result.returncode == 0, result.stderr


def live(cluster: Cluster, document: Object) -> Object:
    """The object as the API server has it."""
    place = [] if document["kind"] in CLUSTER_KINDS else ["-n", document["metadata"]["namespace"]]
    group, _, version = document["apiVersion"].partition("/")
    what = f"{document['kind']}.{version}.{group}" if version else document["kind"]
    found: Object = json.loads(cluster.kubectl(*place, "get", what, document["metadata"]["name"], "-o", "json").stdout)
    return found


def differences(written: Any, stored: Any, path: str = "") -> list[str]:
    """Where an object does not hold what was written; fields that were not written do not count."""
    if isinstance(written, dict) and isinstance(stored, dict):
        return [line for key in written for line in differences(written[key], stored.get(key), f"{path}.{key}")]
    if isinstance(written, list) and isinstance(stored, list) and len(written) == len(stored):
        pairs = enumerate(zip(written, stored, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}[{i}]")]
    return [] if written == stored and type(written) is type(stored) else [f"{path}: {written!r} became {stored!r}"]


@pytest.fixture
def applied(
    kserve: Cluster, rendered: dict[str, Build], request: pytest.FixtureRequest
) -> Iterator[tuple[Cluster, list[Object]]]:
    """A build's objects, applied once."""
    objects = [d for d in rendered[request.param].objects if kserve.knows(d)]
    if BUILDS[request.param] not in {d["kind"] for d in objects}:
        pytest.skip(f"the cluster does not know {BUILDS[request.param]}: AVRT_CRD_DIR")
    apply(kserve, objects)
    yield kserve, objects
    kserve.kubectl("delete", "--ignore-not-found", "--timeout=100s", "-f", "-", objects=objects)


@pytest.mark.parametrize("applied", BUILDS, indirect=True)
def test_it_is_stored_as_it_is_written(applied: tuple[Cluster, list[Object]]) -> None:
    cluster, objects = applied
    assert [line for d in objects for line in differences(d, live(cluster, d), d["kind"])] == []


@pytest.mark.parametrize("applied", BUILDS, indirect=True)
def test_a_second_apply_changes_nothing(applied: tuple[Cluster, list[Object]]) -> None:
    cluster, objects = applied
    before = [live(cluster, d)["metadata"].get("generation") for d in objects]
    # The API server and the webhook run for the comparison, as for Argo CD's ServerSideDiff.
    found = cluster.kubectl("diff", "--server-side", "--force-conflicts", "-f", "-", objects=objects, check=False)
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
    apply(cluster, objects)
    assert [live(cluster, d)["metadata"].get("generation") for d in objects] == before


def set_field(*path: str | int, value: object) -> Callable[[Any], None]:
    """A change of one field of an InferenceService."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_field("metadata", "annotations", "serving.kserve.io/deploymentMode", value="RawDeployment"),
        set_field("spec", "predictor", "model", "resources", "limits", "cpu", value="1000m"),
        set_field("spec", "predictor", "model", "resources", "limits", "nvidia.com/gpu", value=1),
    ],
)
def test_other_spellings_would_be_drift(
    kserve: Cluster, rendered: dict[str, Build], change: Callable[[Object], None]
) -> None:
    document = copy.deepcopy(one(rendered["serving/staging"], "InferenceService", NAME))
    document["metadata"]["name"] = "spelled"
    change(document)
    apply(kserve, [document])
    found = differences(document, live(kserve, document))
    kserve.kubectl("-n", "avrt", "delete", "inferenceservice", "spelled", "--timeout=100s")
    assert len(found) == 1


def promoted(build: Build, sha256: str) -> list[Object]:
    """The build's objects after a promotion."""
    objects = copy.deepcopy(build.objects)
    for document in objects:
        if document["kind"] == "InferenceService":
            document["metadata"]["annotations"].pop("serving.kserve.io/stop", None)
            document["spec"]["predictor"]["model"]["storageUri"] = f"s3://avrt/models/{NAME}/{sha256}"
    return objects


def wait_for(what: str, look: Callable[[], Any]) -> Any:
    """What ``look`` finds, within a minute."""
    deadline = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < deadline, f"no {what} within a minute"
        time.sleep(0.5)
    return found


def get(cluster: Cluster, *arguments: str) -> Any:
    """An object or a list of the namespace, or None where there is none."""
    text = cluster.kubectl("-n", "avrt", "get", *arguments, "--ignore-not-found", "-o", "json").stdout
    return json.loads(text) if text.strip() else None


def rolled(cluster: Cluster, sha256: str) -> Callable[[], Any]:
    """Looks for a Deployment whose pods fetch this model."""

    def look() -> Any:
        found = get(cluster, "deployment", PREDICTOR)
        if not found:
            return None
        annotations = found["spec"]["template"]["metadata"].get("annotations", {})
        return found if annotations.get(SOURCE, "").endswith(sha256) else None

    return look


@pytest.fixture
def champion(
    kserve: Cluster, rendered: dict[str, Build], request: pytest.FixtureRequest
) -> Iterator[tuple[Cluster, Build]]:
    """A build's champion, promoted."""
    build = rendered[request.param]
    objects = [d for d in promoted(build, "a" * 64) if kserve.knows(d)]
    apply(kserve, objects)
    wait_for("Deployment", rolled(kserve, "a" * 64))
    yield kserve, build
    kserve.kubectl("delete", "--ignore-not-found", "--timeout=100s", "-f", "-", objects=objects)
    wait_for("end of the Deployment", lambda: not get(kserve, "deployment", PREDICTOR))


@pytest.mark.parametrize("champion", ["serving/staging"], indirect=True)
def test_the_champions_pod_is_let_in_and_has_what_it_needs(champion: tuple[Cluster, Build]) -> None:
    cluster, _ = champion
    selector = f"--selector=serving.kserve.io/inferenceservice={NAME}"
    # Pod Security, the quota and KServe's pod webhook have passed it; without a GPU node it waits.
    pod = wait_for("pod", lambda: (get(cluster, "pods", selector) or {}).get("items"))[0]["spec"]
    (download,) = [c for c in pod["initContainers"] if c["name"] == "storage-initializer"]
    assert download["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    (container,) = [c for c in pod["containers"] if c["name"] == "kserve-container"]
    assert container["command"] == ["python", "-m", "avrt_lib.serving.launcher"]
    assert container["args"][:2] == ["--model=/mnt/models", f"--served-model-name={NAME}"]
    assert container["args"][-1].startswith("--video-longest-side-px=")
    assert container["lifecycle"]["preStop"] == {"sleep": {"seconds": 8}}
    assert pod["terminationGracePeriodSeconds"] == 60
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    shared = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
    assert shared == [{"medium": "Memory", "sizeLimit": "2Gi"}]
    # The account's token is in none of its volumes.
    assert not [v for v in pod["volumes"] if "projected" in v]


@pytest.mark.parametrize("champion", ["serving/staging"], indirect=True)
def test_without_autoscaling_there_is_no_autoscaler(champion: tuple[Cluster, Build]) -> None:
    cluster, _ = champion
    assert get(cluster, "deployment", PREDICTOR)["spec"]["replicas"] == 1
    assert get(cluster, "hpa", PREDICTOR) is None


@pytest.mark.parametrize("champion", ["components/autoscaling-hpa"], indirect=True)
def test_the_hpa_is_the_one_that_was_written(champion: tuple[Cluster, Build]) -> None:
    cluster, build = champion
    written = one(build, "HorizontalPodAutoscaler", NAME)["spec"]
    assert written["scaleTargetRef"]["name"] == PREDICTOR
    assert differences(written, get(cluster, "hpa", NAME)["spec"]) == []
    assert get(cluster, "hpa", PREDICTOR) is None  # KServe's own


@pytest.mark.parametrize("champion", ["serving/production"], indirect=True)
def test_kserve_leaves_replicas_to_keda_also_when_a_model_is_promoted(champion: tuple[Cluster, Build]) -> None:
    cluster, build = champion
    assert get(cluster, "hpa", PREDICTOR) is None
    # As KEDA's autoscaler does it.
    cluster.kubectl("-n", "avrt", "scale", "deployment", PREDICTOR, "--replicas=2")
    apply(cluster, [d for d in promoted(build, "b" * 64) if d["kind"] == "InferenceService"])
    wait_for("rollout", rolled(cluster, "b" * 64))
    time.sleep(5)  # another look of the controller
    assert get(cluster, "deployment", PREDICTOR)["spec"]["replicas"] == 2
