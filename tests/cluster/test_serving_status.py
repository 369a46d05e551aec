"""What is said of InferenceServices of all kinds, on a real KServe controller; the stand-in takes vLLM's place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from avrt_lib.serving.inference_service import State, status
from tests.cluster.kserve import (
    KEY,
    Place,
    account,
    credentials,
    is_serving,
    isvc,
    require_kserve,
    runtime,
    standin_image,
    standins,
    uri,
)

#: Seconds in which the cause must have been found.
SOON_S = 120

MODELS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"start_s": 5},
    "slow": {"start_s": 3600},
    "crash": {"crash": True},
}


def template(name: str, /, **container: Any) -> dict[str, Any]:
    made = runtime(name)
    made["spec"]["containers"][0] |= container
    return made


RUNTIMES = [
    template("no-image", image="registry.invalid/nothing:1"),
    template("other-container", name="server"),
    template("bad-template", args=["--model={{.Nothing}}"]),
    template("last-log-line", terminationMessagePolicy="FallbackToLogsOnError"),
    template("no-secret", env=[{"name": "K", "valueFrom": {"secretKeyRef": {"name": "gone", "key": "k"}}}]),
]
KNATIVE = {"serving.kserve.io/deploymentMode": "Knative"}

#: case: (InferenceService, a part of the cause)
FAILED: dict[str, tuple[dict[str, Any], str]] = {
    "key-absent": (isvc("key-absent", "nope"), "No model found in models/nope"),
    "bucket-absent": (isvc("bucket-absent", "s3://nobucket/x"), "nobucket"),
    "wrong-key": (isvc("wrong-key", serviceAccountName="wrong-key"), "403"),
    "secret-absent": (isvc("secret-absent", serviceAccountName="no-secret"), 'secrets "gone" not found'),
    "account-absent": (isvc("account-absent", serviceAccountName="nosuch"), "nosuch"),
    "unknown-scheme": (isvc("unknown-scheme", "foo://x/y"), "foo://x/y"),
    "runtime-absent": (isvc("runtime-absent", model_spec={"runtime": "nosuch"}), "RuntimeNotRecognized"),
    "format-unknown": (
        isvc("format-unknown", model_spec={"modelFormat": {"name": "other"}}),
        "NoSupportingRuntime: Specified runtime does not support",
    ),
    "no-runtime-fits": (
        isvc("no-runtime-fits", model_spec={"runtime": None, "modelFormat": {"name": "other"}}),
        "NoSupportingRuntime: No runtime found",
    ),
    "other-container": (isvc("other-container", model_spec={"runtime": "other-container"}), "kserve-container"),
    "bad-template": (isvc("bad-template", model_spec={"runtime": "bad-template"}), "replace placeholders"),
    "deployment-refused": (
        isvc("deployment-refused", deploymentStrategy={"type": "Blue"}),
        "spec.strategy: Unsupported value",
    ),
    "long-name": (isvc("long-name-" + 32 * "x"), "must be no more than 63 characters"),
    "no-image": (isvc("no-image", model_spec={"runtime": "no-image"}), "registry.invalid/nothing:1 cannot be fetched"),
    "no-gpu": (
        isvc("no-gpu", model_spec={"resources": {"limits": {"nvidia.com/gpu": "1000"}}}),
        "Insufficient nvidia.com/gpu",
    ),
    "no-api-key": (isvc("no-api-key", model_spec={"runtime": "no-secret"}), 'secret "gone" not found'),
    "crash": (isvc("crash", "crash"), "exit code 3"),
    "crash-with-message": (
        isvc("crash-with-message", "crash", model_spec={"runtime": "last-log-line"}),
        "ValueError: the stand-in was told to crash",
    ),
    "scaled-to-nothing": (isvc("scaled-to-nothing", minReplicas=0), "scaled to no pod"),
    "stopped": (isvc("stopped", annotations={"serving.kserve.io/stop": "true"}), "stopped"),
    "no-keda": (isvc("no-keda", annotations={"serving.kserve.io/autoscalerClass": "keda"}), "ScaledObject"),
    "no-knative": (isvc("no-knative", annotations=KNATIVE), "Knative"),
    "nonsense-mode": (
        isvc("nonsense-mode", annotations={"serving.kserve.io/deploymentMode": "Foo"}),
        "unsupported deployment mode",
    ),
}


@pytest.fixture(scope="module")
def place(core: client.CoreV1Api) -> Iterator[Place]:
    """The namespace, with every failing InferenceService in it: they fail side by side."""
    with standins(core, MODELS) as made:
        endpoint = f"store.{made.namespace}.svc.cluster.local:8333"
        made.apply(credentials("wrong", endpoint, key=KEY, secret="nonsense"), account("wrong-key", "wrong"))
        made.apply(account("no-secret", "gone"), *RUNTIMES)
        made.apply(isvc("champion"))
        for each, _ in FAILED.values():
            model = each["spec"]["predictor"]["model"]
            each["spec"]["predictor"]["model"] = {key: value for key, value in model.items() if value is not None}
            made.apply(each)
        yield made


@pytest.mark.parametrize("case", FAILED)
def test_the_cause_of_a_failure(place: Place, case: str) -> None:
    service, cause = FAILED[case]
    name = service["metadata"]["name"]
    found = place.until(name, lambda f: f.state is State.FAILED and cause in f.detail, SOON_S)
    print(found.line)
    assert found.state is State.FAILED, found.line
    assert cause in found.detail
    assert found.mend


def test_a_crash_is_not_forgotten_between_its_restarts(place: Place) -> None:
    place.until("crash", lambda f: f.state is State.FAILED, SOON_S)
    for _ in range(20):
        assert status(place.cluster, "crash").state is State.FAILED
        time.sleep(1)


def test_it_serves(place: Place) -> None:
    found = place.until("champion", is_serving, SOON_S)
    assert found.state is State.SERVING, found.line
    assert found.served == (uri("v1"),)


def test_another_model_is_asked_for_than_it_is_set_to(place: Place) -> None:
    assert status(place.cluster, "champion", uri("v2")).state is State.OTHER


def test_nothing_is_there(place: Place) -> None:
    assert status(place.cluster, "nobody").state is State.ABSENT


def test_autoscaling_does_not_confuse_it(place: Place) -> None:
    """The InferenceService's generation and the observed one differ then."""
    place.apply(isvc("scaled", annotations={"serving.kserve.io/autoscalerClass": "hpa"}, minReplicas=2, maxReplicas=3))
    place.until("scaled", is_serving, SOON_S)
    place.set("scaled", lambda s: s["spec"]["predictor"].update(maxReplicas=4, timeout=77))
    found = place.until("scaled", is_serving, SOON_S)
    assert found.state is State.SERVING, found.line


def test_a_new_model_is_served_only_when_its_pods_are_ready(place: Place) -> None:
    place.apply(isvc("updated"))
    assert place.until("updated", is_serving, SOON_S).state is State.SERVING
    place.set("updated", lambda s: s["spec"]["predictor"]["model"].update(storageUri=uri("v2")))
    seen: list[State] = []
    deadline = time.monotonic() + SOON_S
    while not seen or seen[-1] is not State.SERVING:
        assert time.monotonic() < deadline
        found = status(place.cluster, "updated", uri("v2"))
        seen.append(found.state)
        if found.state is State.SERVING:
            assert found.served == (uri("v2"),)
        else:
            assert found.served
    assert set(seen) == {State.ROLLING_OUT, State.SERVING}


def test_an_update_to_nothing_and_back(place: Place) -> None:
    """The old pod serves meanwhile, and what failed is forgotten afterwards, though KServe keeps it in the status."""
    place.apply(isvc("back"))
    assert place.until("back", is_serving, SOON_S).state is State.SERVING
    place.set("back", lambda s: s["spec"]["predictor"]["model"].update(storageUri=uri("nope")))
    found = place.until("back", lambda f: f.state is State.FAILED, SOON_S)
    assert "No model found in models/nope" in found.detail
    assert found.served == (uri("v1"),)
    place.set("back", lambda s: s["spec"]["predictor"]["model"].update(storageUri=uri("v1")))
    assert place.until("back", is_serving, SOON_S).state is State.SERVING
    service = place.cluster.service("back")
    assert service is not None
    assert "lastFailureInfo" in service["status"]["modelStatus"]


@pytest.fixture
def bare(core: client.CoreV1Api, request: pytest.FixtureRequest) -> Iterator[Place]:
    """A namespace with these labels, the runtime and an account without secrets."""
    standin_image()
    require_kserve()
    made = Place(core, labels=getattr(request, "param", None))
    made.apply(account("models", None), runtime())
    yield made
    made.remove()


def test_a_quota_without_room(bare: Place) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none"},
        "spec": {"hard": {"requests.nvidia.com/gpu": "0"}},
    }
    bare.apply(quota)
    resources = {"limits": {"nvidia.com/gpu": "1", "cpu": "1", "memory": "64Mi"}}
    bare.apply(isvc("quota", model_spec={"resources": resources}))
    found = bare.until("quota", lambda f: f.state is State.FAILED, SOON_S)
    assert "exceeded quota: none" in found.detail, found.line
    assert "ResourceQuota" in found.mend


@pytest.mark.parametrize("bare", [{"pod-security.kubernetes.io/enforce": "restricted"}], indirect=True)
def test_a_restricted_namespace_without_hardened_download(bare: Place) -> None:
    kind = ("serving.kserve.io", "v1alpha1", "clusterstoragecontainers", "default")
    shipped = client.CustomObjectsApi().get_cluster_custom_object(*kind)
    if shipped["spec"]["container"].get("securityContext"):
        pytest.skip("KServe's download container is hardened on this cluster")
    bare.apply(isvc("hard"))
    found = bare.until("hard", lambda f: f.state is State.FAILED, SOON_S)
    assert 'container "storage-initializer"' in found.detail, found.line
    assert "kserve-admin" in found.mend


@pytest.mark.slow_cluster
def test_after_the_deadline(place: Place) -> None:
    """KServe gives a Deployment 600 s; the causes stay, and a model that only loads slowly has not failed."""
    place.apply(isvc("late"), isvc("slow", "slow"))
    place.until("late", is_serving, SOON_S)
    place.set("late", lambda s: s["spec"]["predictor"]["model"].update(storageUri=uri("nope")))
    began = time.monotonic()
    found = place.until("slow", lambda f: "by now" in f.detail, 700)
    assert found.state is State.ROLLING_OUT, found.line
    assert time.monotonic() - began > 500
    late = place.until("late", lambda f: f.state is State.FAILED, 60)
    assert "No model found in models/nope" in late.detail
    assert late.served == (uri("v1"),)
    crash = status(place.cluster, "crash")
    assert (crash.state, "exit code 3" in crash.detail) == (State.FAILED, True)
