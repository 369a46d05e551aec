"""What an InferenceService is said to do, by documents as KServe 0.17 and a newer build were seen to write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.errors import EnvironmentProblem, ServingError
from avrt_lib.serving import inference_service, lease
from avrt_lib.serving.cluster import Documents
from avrt_lib.serving.inference_service import ARGO, SOURCE, STOP, State, Status, judge, wait
from avrt_lib.serving.reach import reached

OLD, NEW = "s3://avrt/models/old", "s3://avrt/models/new"
PROGRESSING = {"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated"}
NO_MINIMUM = {
    "status": "False",
    "reason": "MinimumReplicasUnavailable",
    "message": "Deployment does not have minimum availability.",
}


def service(uri: str | None = NEW, ready: dict[str, Any] | None = None, **model_status: Any) -> dict[str, Any]:
    ready = {"status": "True"} if ready is None else ready
    return {
        "metadata": {"name": "champion", "annotations": {"avrt/model-version": "7"}},
        "spec": {"predictor": {"model": {"storageUri": uri} if uri else {}}},
        "status": {
            "conditions": [{"type": "PredictorReady", **ready}, {"type": "Ready", **ready}],
            "modelStatus": model_status,
        },
    }


def deployment(
    uri: str = NEW,
    *conditions: dict[str, Any],
    observed: int = 3,
    wanted: int = 1,
    version: str = "7",
    **numbers: int,
) -> dict[str, Any]:
    copied = {SOURCE: uri, "avrt/model-version": version}
    numbers = numbers or {"replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}
    return {
        "metadata": {"generation": 3},
        "spec": {"replicas": wanted, "template": {"metadata": {"annotations": copied}}},
        "status": {"observedGeneration": observed, "conditions": list(conditions or (PROGRESSING,)), **numbers},
    }


def pod(
    uri: str = NEW, *, ready: bool = False, made: str = "2026-11-26T10:00:00Z", template: str = "", **status: Any
) -> dict[str, Any]:
    short = uri.rpartition("/")[2]
    return {
        "metadata": {
            "name": f"champion-predictor-{short}-{made[11:13]}",
            "annotations": {SOURCE: uri},
            "labels": {"pod-template-hash": template or short + made},
            "creationTimestamp": made,
        },
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [],
            **status,
        },
    }


def container(name: str = "kserve-container", restarts: int = 0, **states: Any) -> dict[str, Any]:
    return {"name": name, "image": "avrt/vllm:1", "ready": False, "restartCount": restarts, "lastState": {}, **states}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def event(reason: str, message: str, of: str = "champion", at: str = "2026-11-26T10:00:00Z") -> dict[str, Any]:
    return {
        "type": "Warning",
        "reason": reason,
        "message": message,
        "involvedObject": {"name": of},
        "lastTimestamp": at,
    }


def ended(code: int, message: str = "", reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, **({"message": message} if message else {})}}


STARTING = {"replicas": 1, "updatedReplicas": 1}
UPDATING = {"replicas": 2, "updatedReplicas": 1, "availableReplicas": 1}

SERVING = {
    "after a first roll-out": Documents(service(), deployment(), [pod(ready=True)]),
    "with the failure of an earlier try in its status": Documents(
        service(transitionStatus="UpToDate", lastFailureInfo={"reason": "ModelLoadFailed", "message": "No model"}),
        deployment(),
    ),
    "while the autoscaler waits for one more pod": Documents(
        service(), deployment(wanted=2, replicas=2, updatedReplicas=2, availableReplicas=1), [pod(ready=True), pod()]
    ),
    "while Ready lags behind": Documents(service(ready=NO_MINIMUM, transitionStatus="InProgress"), deployment()),
}


@pytest.mark.parametrize("name", SERVING)
def test_it_serves(name: str) -> None:
    assert judge("champion", "avrt", SERVING[name], NEW).state is State.SERVING


ROLLING_OUT = {
    "in its first half second": Documents({**service(), "status": {}}),
    "before the controller took the change up, Ready of the old": Documents(service(), deployment(OLD), [pod(OLD)]),
    "before the controller took up a change of anything but the model": Documents(service(), deployment(version="6")),
    "before the Deployment's controller saw it": Documents(service(), deployment(observed=2), [pod(OLD, ready=True)]),
    "with the old pod still there, Ready and UpToDate (KServe after 0.20)": Documents(
        service(transitionStatus="UpToDate"), deployment(NEW, **UPDATING), [pod(OLD, ready=True), pod()]
    ),
    "with no pod ready": Documents(service(ready=NO_MINIMUM), deployment(NEW, **STARTING), [pod()]),
    "with a model that loads for longer than the deadline": Documents(
        service(ready={"status": "False", "reason": "ProgressDeadlineExceeded"}, transitionStatus="InProgress"),
        deployment(
            NEW,
            {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"},
            **STARTING,
        ),
        [pod(containerStatuses=[container(state={"running": {}})])],
    ),
    "after events that a healthy one has too": Documents(
        service(ready={"status": "Unknown"}),
        None,
        [],
        [event("InternalError", "fails to update: the object has been modified; please apply your changes")],
    ),
    "with a pod in place of one that was evicted": Documents(
        service(ready=NO_MINIMUM),
        deployment(NEW, **STARTING),
        [
            pod(template="t", phase="Failed", reason="Evicted", containerStatuses=[container(state=ended(137))]),
            pod(template="t", made="2026-11-26T11:00:00Z", containerStatuses=[container(state={"running": {}})]),
        ],
    ),
    "with a model that is fetched anew after its node has started again": Documents(
        service(ready=NO_MINIMUM),
        deployment(NEW, **STARTING),
        [
            pod(
                initContainerStatuses=[
                    container("storage-initializer", 1, state={"running": {}}, lastState=ended(0, reason="Completed"))
                ]
            )
        ],
    ),
    "without trace of an older model's failed pod": Documents(
        service(transitionStatus="BlockedByFailedLoad"),
        deployment(NEW, **STARTING),
        [pod(OLD, initContainerStatuses=[container("storage-initializer", **waiting("CrashLoopBackOff"))]), pod()],
    ),
}


@pytest.mark.parametrize("name", ROLLING_OUT)
def test_it_is_rolling_out(name: str) -> None:
    assert judge("champion", "avrt", ROLLING_OUT[name], NEW).state is State.ROLLING_OUT


def starting(*conditions: dict[str, Any], **status: Any) -> Documents:
    return Documents(
        service(ready=NO_MINIMUM, transitionStatus="InProgress"),
        deployment(NEW, *conditions, **STARTING),
        [pod(**status)],
    )


def refused(message: str) -> Documents:
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    return Documents(
        service(ready={"status": "False", "reason": "FailedCreate", "message": message}),
        deployment(NEW, PROGRESSING, condition, replicas=0),
    )


def invalid(reason: str, message: str) -> Documents:
    info = {"reason": reason, "message": message}
    return Documents(service(ready={"status": "Unknown"}, transitionStatus="InvalidSpec", lastFailureInfo=info))


def fetching(message: str) -> Documents:
    return starting(
        initContainerStatuses=[
            container(
                "storage-initializer", 3, **waiting("CrashLoopBackOff", "back-off 40s"), lastState=ended(1, message)
            )
        ]
    )


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
}
#: case: (what is found, a part of the cause, a part of what is to be done, whether it may pass)
FAILED: dict[str, tuple[Documents, str, str, bool]] = {
    "key absent": (
        fetching("INFO Copying\nERROR Storage initialization failed: No model found in avrt/nope."),
        "cannot be fetched (exit code 1): ERROR Storage initialization failed: No model found in avrt/nope",
        "address",
        False,
    ),
    "wrong key": (fetching("ERROR Storage initialization failed: S3 error [403]: Forbidden"), "403", "secret", False),
    "Secret of the account absent": (
        refused('admission webhook "x.pod-mutator" denied the request: secrets "gone" not found'),
        'secrets "gone" not found',
        "make what is missing",
        True,
    ),
    "account absent": (
        refused('pods "champion-" is forbidden: serviceaccount "nosuch" not found'),
        "nosuch",
        "make what is missing",
        True,
    ),
    "restricted namespace": (
        refused('pods "champion-" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation'),
        "violates PodSecurity",
        "kserve-admin",
        False,
    ),
    "quota": (
        refused('pods "champion-" is forbidden: exceeded quota: avrt, requested: requests.nvidia.com/gpu=1'),
        "exceeded quota",
        "ResourceQuota",
        True,
    ),
    "KServe's webhook down": (
        refused('Internal error occurred: failed calling webhook "pod-mutator": no endpoints available'),
        "failed calling webhook",
        "controller",
        True,
    ),
    "unknown scheme": (
        Documents(
            service(ready={"status": "Unknown"}, transitionStatus=""),
            None,
            [],
            [event("InternalError", "StorageURI not supported: StorageUri [foo://x/y] is not supported")],
        ),
        "foo://x/y",
        "correct",
        False,
    ),
    "mode without Knative": (
        Documents(
            service(ready={"status": "Unknown"}, transitionStatus=""),
            None,
            [],
            [event("ServerlessModeRejected", "It is not possible to use Knative deployment mode")],
        ),
        "Knative",
        "correct",
        False,
    ),
    "runtime absent": (
        invalid("RuntimeNotRecognized", "Waiting for runtime to become available"),
        "RuntimeNotRecognized: Waiting for runtime",
        "runtime",
        False,
    ),
    "format unsupported": (
        invalid("NoSupportingRuntime", "Specified runtime does not support specified framework/version"),
        "NoSupportingRuntime",
        "modelFormat",
        False,
    ),
    "Deployment refused": (
        Documents(
            service(
                ready={
                    "status": "False",
                    "reason": "ReconcileFailed",
                    "message": 'fails to reconcile predictor: Deployment.apps "z" is invalid: spec.strategy',
                }
            )
        ),
        "spec.strategy",
        "correct the InferenceService",
        False,
    ),
    "autoscaler absent, pods running": (
        Documents(
            service(
                ready={
                    "status": "False",
                    "reason": "ReconcileFailed",
                    "message": 'failed to get existing KEDA autoscaler: no matches for kind "ScaledObject"',
                }
            ),
            deployment(),
            [pod(ready=True)],
        ),
        "KEDA",
        "correct the InferenceService",
        False,
    ),
    "image": (
        starting(containerStatuses=[container(**waiting("ImagePullBackOff", "Back-off pulling image"))]),
        "the image avrt/vllm:1 cannot be fetched: ImagePullBackOff",
        "push the image",
        True,
    ),
    "GPU": (
        starting(phase="Pending", conditions=[UNSCHEDULABLE]),
        "Insufficient nvidia.com/gpu",
        "free a node",
        True,
    ),
    "crash loop": (
        starting(
            containerStatuses=[
                container(restarts=2, **waiting("CrashLoopBackOff"), lastState=ended(3, "ValueError: no such model"))
            ]
        ),
        "exit code 3, 2 restarts: ValueError: no such model",
        "kubectl logs",
        False,
    ),
    "crash loop in its next try": (
        starting(containerStatuses=[container(restarts=2, state={"running": {}}, lastState=ended(3))]),
        "exit code 3",
        "kubectl logs",
        True,
    ),
    "out of memory": (
        starting(
            containerStatuses=[
                container(restarts=1, **waiting("CrashLoopBackOff"), lastState=ended(137, reason="OOMKilled"))
            ]
        ),
        "ran out of its memory",
        "deployment.memory",
        False,
    ),
    "a server that its probe ends again and again": (
        starting(
            containerStatuses=[
                container(restarts=4, **waiting("CrashLoopBackOff"), lastState=ended(0, reason="Completed"))
            ]
        ),
        "exit code 0, 4 restarts",
        "kubectl logs",
        False,
    ),
    "out of memory in the download": (
        starting(
            initContainerStatuses=[
                container(
                    "storage-initializer", 1, **waiting("CrashLoopBackOff"), lastState=ended(137, reason="OOMKilled")
                )
            ]
        ),
        "the download of the model ran out of its memory",
        "ClusterStorageContainer",
        False,
    ),
    "key of the API's secret absent": (
        starting(
            containerStatuses=[container(**waiting("CreateContainerConfigError", 'secret "avrt-api-key" not found'))]
        ),
        'secret "avrt-api-key" not found',
        "make what is missing",
        True,
    ),
    "evicted": (
        starting(
            phase="Failed",
            reason="Evicted",
            message="The node was low on resource: ephemeral-storage.",
            containerStatuses=[container(state=ended(137))],
        ),
        "ephemeral-storage",
        "node",
        True,
    ),
    "scaled to nothing": (
        Documents(service(), deployment(wanted=0, replicas=0, updatedReplicas=0, availableReplicas=0)),
        "no pod",
        "minReplicas",
        True,
    ),
    "no address": (Documents(service(None)), "names no storageUri", "storageUri", False),
}


@pytest.mark.parametrize("case", FAILED)
def test_it_has_failed(case: str) -> None:
    found, cause, mend, may_pass = FAILED[case]
    answer = judge("champion", "avrt", found)
    assert answer.state is State.FAILED
    assert cause in answer.detail
    assert mend in answer.mend
    assert answer.may_pass is may_pass


def test_it_is_stopped() -> None:
    stopped = service()
    stopped["metadata"]["annotations"][inference_service.STOP] = "true"
    assert judge("champion", "avrt", Documents(stopped)).detail == "it is stopped"


def test_what_is_being_deleted_does_not_count_as_served() -> None:
    leaving = service()
    leaving["metadata"]["deletionTimestamp"] = "2026-11-26T10:00:00Z"
    for found in (Documents(leaving, deployment(), [pod(ready=True)]), Documents(leaving)):
        answer = judge("champion", "avrt", found)
        assert (answer.state, answer.detail) == (State.FAILED, "it is being deleted")


def test_the_log_tells_where_the_status_does_not() -> None:
    crashed = pod(containerStatuses=[container(restarts=1, **waiting("CrashLoopBackOff"), lastState=ended(3))])
    logs = {(crashed["metadata"]["name"], "kserve-container"): "ValueError: no such model"}
    found = Documents(service(ready=NO_MINIMUM), deployment(NEW, **STARTING), [crashed], [], logs)
    assert "ValueError: no such model" in judge("champion", "avrt", found).detail


def test_a_mount_that_fails_is_in_the_events() -> None:
    stuck = pod(phase="Pending", containerStatuses=[container(**waiting("ContainerCreating"))])
    told = event("FailedMount", 'MountVolume.SetUp failed: configmap "ca" not found', of=stuck["metadata"]["name"])
    found = Documents(service(ready=NO_MINIMUM), deployment(NEW, **STARTING), [stuck], [told])
    assert 'configmap "ca" not found' in judge("champion", "avrt", found).detail


def test_pods_of_an_earlier_try_are_not_the_cause() -> None:
    crashed = pod(containerStatuses=[container(restarts=2, **waiting("CrashLoopBackOff"), lastState=ended(3))])
    fresh = pod(made="2026-11-26T11:00:00Z", containerStatuses=[container(state={"running": {}})])
    found = Documents(service(ready=NO_MINIMUM), deployment(NEW, **UPDATING), [crashed, fresh])
    assert judge("champion", "avrt", found).state is State.ROLLING_OUT


def test_the_old_model_serves_meanwhile() -> None:
    found = fetching("No model found.")
    pods = [*found.pods, pod(OLD, ready=True)]
    line = judge("champion", "avrt", Documents(found.service, found.deployment, pods)).line
    assert f"Meanwhile its ready pods serve {OLD}." in line


def test_another_model_than_asked_for() -> None:
    answer = judge("champion", "avrt", Documents(service(OLD), deployment(OLD), [pod(OLD, ready=True)]), NEW)
    assert (answer.state, answer.version) == (State.OTHER, None)
    assert answer.mend == f"avrt serving rollout champion --namespace avrt --uri {NEW}"


@pytest.mark.parametrize(("set_to", "more"), [(OLD, {}), (NEW, {STOP: "true"})])
def test_what_argo_cd_keeps_is_changed_in_git(set_to: str, more: dict[str, str]) -> None:
    kept = service(set_to)
    kept["metadata"]["annotations"] |= {ARGO: "a:b", **more}
    mend = judge("champion", "avrt", Documents(kept, deployment(set_to)), NEW).mend
    assert "Argo CD" in mend
    assert "kubectl" not in mend
    assert "rollout" not in mend


def test_a_stopped_one_is_started_where_it_is() -> None:
    stopped = service()
    stopped["metadata"]["annotations"] |= {STOP: "true"}
    mend = judge("champion", "other", Documents(stopped, deployment()), NEW).mend
    assert mend == f"kubectl annotate --namespace other inferenceservice champion {STOP}-"


def test_nothing_is_there() -> None:
    assert judge("champion", "avrt", Documents(None), NEW).state is State.ABSENT


def test_what_is_served_is_named_in_one_line() -> None:
    line = judge("champion", "avrt", Documents(service(), deployment(), [pod(ready=True)])).line
    assert line == f"avrt/champion is serving (version 7, {NEW})."


@pytest.mark.parametrize(
    ("url", "address"),
    [
        (None, "http://champion-predictor.avrt.svc.cluster.local/v1"),
        (
            "http://champion-stable-predictor.avrt.svc.cluster.local/",
            "http://champion-stable-predictor.avrt.svc.cluster.local/v1",
        ),
    ],
)
def test_the_address(url: str | None, address: str) -> None:
    found = service()
    found["status"]["address"] = {"url": url}
    assert judge("champion", "avrt", Documents(found, deployment())).address == address


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Series:
    """A namespace whose documents change with the clock: what is found from a second on."""

    namespace = "avrt"

    def __init__(self, clock: Clock, *found: tuple[float, Documents | EnvironmentProblem]) -> None:
        self._clock = clock
        self._found = found

    def documents(self, name: str) -> Documents:
        now = [found for since, found in self._found if since <= self._clock.now][-1]
        if isinstance(now, EnvironmentProblem):
            raise now
        return now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(inference_service, "time", made)
    return made


SERVED = Documents(service(), deployment(), [pod(ready=True)])


def waited(clock: Clock, *found: tuple[float, Documents | EnvironmentProblem]) -> Status:
    return wait(Series(clock, *found), "champion", NEW, timeout_s=300)  # type: ignore[arg-type]


def test_a_download_that_succeeds_at_its_second_try_is_waited_for(clock: Clock) -> None:
    assert waited(clock, (0, fetching("timeout")), (12, SERVED)).state is State.SERVING


def test_a_download_that_goes_on_failing_is_not(clock: Clock) -> None:
    with pytest.raises(ServingError, match="No model found"):
        waited(clock, (0, fetching("No model found.")), (60, SERVED))
    assert clock.now == pytest.approx(inference_service.PATIENCE_S, abs=inference_service.POLL_S)


def test_room_is_waited_for(clock: Clock) -> None:
    assert waited(clock, (0, FAILED["quota"][0]), (200, SERVED)).state is State.SERVING


def test_the_cause_is_told_when_time_is_up(clock: Clock) -> None:
    with pytest.raises(ServingError, match=r"Insufficient nvidia.com/gpu.*300 s"):
        waited(clock, (0, FAILED["GPU"][0]))


AWAY = EnvironmentProblem("The API server does not answer")
LOADING = ROLLING_OUT["with no pod ready"]


def test_an_api_server_that_is_away_for_a_moment_is_waited_for(clock: Clock) -> None:
    assert waited(clock, (0, LOADING), (4, AWAY), (10, SERVED)).state is State.SERVING


def test_an_api_server_that_stays_away_is_not(clock: Clock) -> None:
    with pytest.raises(EnvironmentProblem):
        waited(clock, (0, LOADING), (4, AWAY))
    assert clock.now < lease.DURATION_S


def test_an_api_server_that_never_answered_is_not_waited_for(clock: Clock) -> None:
    with pytest.raises(EnvironmentProblem):
        waited(clock, (0, AWAY))
    assert clock.now == 0


def test_a_change_by_somebody_else_ends_the_wait(clock: Clock) -> None:
    with pytest.raises(ServingError, match="set to another model"):
        waited(clock, (0, Documents(service(OLD), deployment(OLD))))
    assert clock.now == 0


def test_from_outside_the_models_own_pod_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of the model before, which is ready for a while yet when it is being ended."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\necho Forwarding from 127.0.0.1:4321\nexec sleep 60\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    old, new = pod(OLD, ready=True, made="2026-11-26T09:00:00Z"), pod(ready=True)
    old["metadata"]["deletionTimestamp"] = "2026-11-26T10:30:00Z"
    found = judge("champion", "avrt", Documents(service(), deployment(), [old, new]), NEW)
    with reached(found) as address:
        assert address == "http://127.0.0.1:4321/v1"
    assert f"pod/{new['metadata']['name']} :http1" in (tmp_path / "asked").read_text()


def test_without_a_pod_of_the_model_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubectl").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = judge("champion", "avrt", Documents(service(), deployment(), [pod(OLD, ready=True)]), NEW)
    with pytest.raises(ServingError, match=f"is ready with {NEW}"), reached(found):
        pass
