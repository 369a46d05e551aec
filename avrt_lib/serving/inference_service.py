"""Is an InferenceService serving the model that was asked for?

Read from what is reliable: the rollout of the predictor's Deployment, the model's address in its pod template, and the
pods. Not from ``Ready``, which may stay true for the old model; not from ``observedGeneration``, which is the
Deployment's; not from ``lastFailureInfo`` alone, which is never cleared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any

from avrt_lib.errors import EnvironmentProblem, ServingError
from avrt_lib.promotion.manifest import MODEL_VERSION
from avrt_lib.serving.cluster import Cluster, Document, Documents, container_statuses, terminated

#: Annotation of a pod that names the model that it fetched.
SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"
STOP = "serving.kserve.io/stop"
#: Annotation of what Argo CD keeps as Git has it.
ARGO = "argocd.argoproj.io/tracking-id"

POLL_S = 2.0
#: A failure that waiting does not mend counts when it has lasted so long: the status lags, and a download may succeed
#: at its second try.
PATIENCE_S = 20.0
#: For so long the API server may be away, as when it is restarted. A rollout's lease lasts little longer.
AWAY_S = 10.0

_OURS = "avrt/"
_DOWNLOAD = "storage-initializer"
_NOISE = "the object has been modified"
_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_CONTAINER = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_SANDBOX = {"FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"}
_LONGEST = 400


class State(StrEnum):
    """What an InferenceService does with the model that was asked for."""

    SERVING = "serving"
    ROLLING_OUT = "rolling out"
    FAILED = "failed"
    OTHER = "set to another model"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a model is not served.

    Attributes:
        text: the cause, in the cluster's own words where it has some.
        mend: what to do.
        may_pass: whether waiting may mend it (room may be made, a node or a secret may come).
    """

    text: str
    mend: str
    may_pass: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """The answer.

    Attributes:
        state: serving, rolling out, failed, set to another model, or absent.
        name: the InferenceService.
        namespace: where it is.
        uri: the model that was asked for.
        version: its version in the registry, where the InferenceService tells it.
        served: the models of the pods that are ready now; during a rollout the old one.
        pod: a pod that is ready with the model that was asked for, or None.
        detail: how far it is, or why it failed.
        mend: what to do; empty where there is nothing to do but wait.
        may_pass: whether waiting may mend a failure.
        address: the OpenAI interface in the cluster, ending in ``/v1``.
    """

    state: State
    name: str
    namespace: str
    uri: str | None
    version: str | None
    served: tuple[str, ...]
    pod: str | None
    detail: str
    mend: str
    may_pass: bool
    address: str

    @property
    def line(self) -> str:
        """One line for people."""
        version = f"version {self.version}, " if self.version else ""
        what = f" ({version}{self.uri})" if self.uri else ""
        detail = f": {self.detail}" if self.detail else ""
        old = ""
        if self.state is not State.SERVING and (others := [uri for uri in self.served if uri != self.uri]):
            old = f" Meanwhile its ready pods serve {' and '.join(others)}."
        mend = f" To do: {self.mend}." if self.mend else ""
        return f"{self.namespace}/{self.name} is {self.state}{what}{detail.rstrip('.')}.{old}{mend}"


def status(cluster: Cluster, name: str, uri: str | None = None) -> Status:
    """How the cluster's InferenceService is doing.

    Args:
        cluster: its namespace.
        name: its name.
        uri: the model that it is to serve; None: the one that it is set to.
    """
    return judge(name, cluster.namespace, cluster.documents(name), uri)


def judge(name: str, namespace: str, found: Documents, uri: str | None = None) -> Status:
    """The answer for what was found; see ``status``."""
    service, deployment = found.service, found.deployment
    if service is None:
        mend = "deploy it: the deployment step with deployment.target=kserve, or a manifest in Git"
        return _status(name, namespace, found, uri, State.ABSENT, mend=mend)
    set_to = storage_uri(service)
    wanted = uri or set_to

    def answer(state: State, detail: str = "", mend: str = "", *, may_pass: bool = False) -> Status:
        return _status(name, namespace, found, wanted, state, detail, mend, may_pass=may_pass)

    if service["metadata"].get("deletionTimestamp"):
        mend = "make it anew when it is gone; while it stays, look at its finalizers and at KServe's controller"
        return answer(State.FAILED, "it is being deleted", mend)
    if wanted is None:
        return answer(State.FAILED, "it names no storageUri", "set spec.predictor.model.storageUri")
    if set_to != wanted:
        mend = f"avrt serving rollout {name} --namespace {namespace} --uri {wanted}"
        if ARGO in annotations_of(service):
            mend = "change it in Git, where Argo CD takes it from"
        return answer(State.OTHER, f"it is set to {set_to}", mend)
    if annotations_of(service).get(STOP) == "true":
        mend = f"kubectl annotate --namespace {namespace} inferenceservice {name} {STOP}-"
        if ARGO in annotations_of(service):
            mend = "promote a model: Argo CD keeps it as Git has it"
        return answer(State.FAILED, "it is stopped", mend)
    taken = deployment is not None and _template_uri(deployment) == wanted and _follows(deployment, service)
    if taken and deployment is not None:
        if deployment["spec"].get("replicas", 1) == 0:
            return answer(State.FAILED, "it is scaled to no pod", "set spec.predictor.minReplicas to 1", may_pass=True)
        if rolled_out(deployment, wanted):
            # Its pods serve, but what KServe makes after the Deployment (service, autoscaler) is missing.
            if problem := next(_reconciling(service), None):
                return answer(State.FAILED, problem.text, problem.mend)
            return answer(State.SERVING, _count(deployment) if _ready(deployment) < _wanted(deployment) else "")
    causes: Iterable[Problem] = _objects(found)
    if taken and deployment is not None:
        causes = chain(_pods(found, wanted), _creating(deployment), causes)
    if problem := next(iter(causes), None):
        return answer(State.FAILED, problem.text, problem.mend, may_pass=problem.may_pass)
    if deployment is None or not taken:
        return answer(State.ROLLING_OUT, "KServe's controller has not taken it up yet")
    return answer(State.ROLLING_OUT, f"{_count(deployment)}{_progress(found, wanted)}{_late(deployment)}")


def wait(
    cluster: Cluster,
    name: str,
    uri: str,
    *,
    timeout_s: float,
    told: Callable[[Status], None] = lambda _: None,
) -> Status:
    """Wait until an InferenceService serves a model.

    Args:
        timeout_s: how long it may take.
        told: called with every answer before the last.

    Raises:
        EnvironmentProblem: where the API server is away for longer than a moment.
        ServingError: where it fails for a reason that waiting does not mend, is set to another model or gone, or does
            not serve in time; the message holds the cause.
    """
    deadline = time.monotonic() + timeout_s
    failing_since = seen = None
    while True:
        try:
            found = status(cluster, name, uri)
        except EnvironmentProblem:
            if seen is None or time.monotonic() - seen > AWAY_S:
                raise
            time.sleep(POLL_S)
            continue
        seen = now = time.monotonic()
        if found.state is State.SERVING:
            return found
        if found.state in (State.OTHER, State.ABSENT):
            raise ServingError(found.line)
        if found.state is State.FAILED and not found.may_pass:
            failing_since = failing_since or now
            if now - failing_since >= PATIENCE_S:
                raise ServingError(found.line)
        else:
            failing_since = None
        if now >= deadline:
            raise ServingError(f"{found.line} It had {timeout_s:g} s (deployment.start_timeout_s).")
        told(found)
        time.sleep(min(POLL_S, deadline - now))


def storage_uri(service: Document) -> str | None:
    """The model that an InferenceService is set to."""
    found: str | None = service["spec"]["predictor"].get("model", {}).get("storageUri")
    return found


def annotations_of(document: Document) -> dict[str, str]:
    """An object's annotations."""
    return document["metadata"].get("annotations") or {}


def rolled_out(deployment: Document, uri: str) -> bool:
    """Whether a predictor's pods are all of this model, and one of them at least is ready.

    All pods that are wanted need not be ready: a model whose autoscaler waits for one more pod is being served.
    """
    found = deployment.get("status") or {}
    return (
        _has_taken(deployment, uri)
        and found.get("replicas", 0) > 0
        and found.get("updatedReplicas") == found.get("replicas")
        and _ready(deployment) > 0
    )


def came_up(deployment: Document, uri: str) -> bool:
    """Whether a predictor serves this model, or has served it and lost its pods since, to a node that failed, say."""
    complete = _condition(deployment, "Progressing").get("reason") == "NewReplicaSetAvailable"
    return rolled_out(deployment, uri) or (_has_taken(deployment, uri) and complete)


def _status(
    name: str,
    namespace: str,
    found: Documents,
    uri: str | None,
    state: State,
    detail: str = "",
    mend: str = "",
    *,
    may_pass: bool = False,
) -> Status:
    service = found.service or {"metadata": {}, "spec": {"predictor": {}}}
    address = ((service.get("status") or {}).get("address") or {}).get("url")
    asked = {pod["metadata"]["name"]: annotations_of(pod).get(SOURCE, "") for pod in found.pods if _is_asked(pod)}
    return Status(
        state=state,
        name=name,
        namespace=namespace,
        uri=uri,
        version=annotations_of(service).get(MODEL_VERSION) if uri == storage_uri(service) else None,
        served=tuple(sorted(set(asked.values()))),
        pod=next((pod for pod, model in asked.items() if model == uri), None),
        detail=detail,
        mend=mend,
        may_pass=may_pass,
        address=f"{(address or f'http://{name}-predictor.{namespace}.svc.cluster.local').rstrip('/')}/v1",
    )


def _template_uri(deployment: Document) -> str | None:
    found: str | None = (deployment["spec"]["template"]["metadata"].get("annotations") or {}).get(SOURCE)
    return found


def _has_taken(deployment: Document, uri: str) -> bool:
    """Whether a Deployment is made of this model, and its status tells of that."""
    observed = (deployment.get("status") or {}).get("observedGeneration")
    return _template_uri(deployment) == uri and observed == deployment["metadata"]["generation"]


def _follows(deployment: Document, service: Document) -> bool:
    """Whether a Deployment is made of the InferenceService as it is now: KServe copies the annotations to the pods."""
    copied = deployment["spec"]["template"]["metadata"].get("annotations") or {}
    ours = {key: value for key, value in annotations_of(service).items() if key.startswith(_OURS)}
    return all(copied.get(key) == value for key, value in ours.items())


def _wanted(deployment: Document) -> int:
    return int(deployment["spec"].get("replicas", 1))


def _ready(deployment: Document) -> int:
    return int((deployment.get("status") or {}).get("availableReplicas") or 0)


def _count(deployment: Document) -> str:
    found = deployment.get("status") or {}
    if found.get("observedGeneration") != deployment["metadata"]["generation"]:
        return "its pods are about to be replaced"
    if (updated := found.get("updatedReplicas") or 0) < found.get("replicas", 0):
        return f"{updated} of {_wanted(deployment)} new pods made, {found['replicas'] - updated} old ones still there"
    return f"{_ready(deployment)} of {_wanted(deployment)} pods ready"


def _late(deployment: Document) -> str:
    progressing = _condition(deployment, "Progressing")
    if progressing.get("reason") == "ProgressDeadlineExceeded":
        return f"; for longer than {deployment['spec'].get('progressDeadlineSeconds', 600)} s by now"
    return ""


def _condition(document: Document, kind: str) -> dict[str, Any]:
    conditions = (document.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), {})


def _is_ready(pod: Document) -> bool:
    return _condition(pod, "Ready").get("status") == "True"


def _is_asked(pod: Document) -> bool:
    """Whether requests go to a pod; one that is being ended gets none, ready or not."""
    return _is_ready(pod) and not pod["metadata"].get("deletionTimestamp")


def _short(text: str) -> str:
    """One line; of a long text the end, where the cause stands."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"…{line[-_LONGEST:]}"


def _reconciling(service: Document) -> Iterator[Problem]:
    """What the controller could not make of the InferenceService."""
    for kind in ("PredictorReady", "Ready"):
        condition = _condition(service, kind)
        text = condition.get("message", "")
        if condition.get("reason") == "ReconcileFailed" and _NOISE not in text:
            yield Problem(_short(text), "correct the InferenceService")


def _objects(found: Documents) -> Iterator[Problem]:
    """Why the controller made no Deployment of the InferenceService as it stands."""
    service = found.service or {}
    yield from _reconciling(service)
    model = (service.get("status") or {}).get("modelStatus") or {}
    info = model.get("lastFailureInfo") or {}
    if model.get("transitionStatus") == "InvalidSpec":
        text = f"{info.get('reason', 'InvalidSpec')}: {info.get('message', '')}"
        yield Problem(_short(text), "correct spec.predictor.model.runtime or modelFormat, or apply the serving runtime")
    if not _condition(service, "PredictorReady").get("reason"):
        # The controller gave up before it wrote a condition: the cause is in its events alone.
        told = [
            event
            for event in found.events
            if event["type"] == "Warning"
            and event["reason"] in ("InternalError", "ServerlessModeRejected")
            and _NOISE not in event["message"]
        ]
        if told:
            newest = max(told, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
            yield Problem(_short(newest["message"]), "correct the InferenceService")


def _creating(deployment: Document) -> Iterator[Problem]:
    """Why no pod could be made."""
    condition = _condition(deployment, "ReplicaFailure")
    if condition.get("status") != "True":
        return
    text = condition.get("message", "")
    if "exceeded quota" in text:
        mend, may_pass = "free something in the namespace, or raise its ResourceQuota", True
    elif "violates PodSecurity" in text:
        mend, may_pass = "apply manifests/components/kserve-admin: KServe's download container must be hardened", False
    elif "failed calling webhook" in text:
        mend, may_pass = "look at KServe's controller: its webhook does not answer", True
    elif "not found" in text:
        mend, may_pass = "make what is missing", True
    else:
        mend, may_pass = "correct the InferenceService or its serving runtime", False
    yield Problem(_short(text), mend, may_pass)


def _pods(found: Documents, uri: str) -> Iterator[Problem]:
    """What keeps the newest pods of a model from being ready."""
    for pod in _newest(found.pods, uri):
        if pod["status"].get("phase") == "Failed":  # not by its containers: they are started again
            text = f"its pod was ended: {pod['status'].get('message') or pod['status'].get('reason')}"
            yield Problem(_short(text), "look at the node", may_pass=True)
        yield from _containers(pod, found.logs)
        scheduled = _condition(pod, "PodScheduled")
        if scheduled.get("status") == "False":
            text = f"its pod cannot be placed: {scheduled.get('message') or scheduled.get('reason')}"
            yield Problem(_short(text), "free a node of that kind, or add one", may_pass=True)
        for event in found.events:
            if event["involvedObject"].get("name") == pod["metadata"]["name"] and event["reason"] in _SANDBOX:
                yield Problem(_short(event["message"]), "make what is missing", may_pass=True)


def _newest(pods: list[Document], uri: str) -> list[Document]:
    """The pods of the newest ReplicaSet of a model that are neither ready nor being ended."""
    ours = [
        pod
        for pod in pods
        if annotations_of(pod).get(SOURCE) == uri
        and not pod["metadata"].get("deletionTimestamp")
        and not _is_ready(pod)
    ]
    ours.sort(key=lambda pod: pod["metadata"]["creationTimestamp"], reverse=True)
    hashes = [(pod["metadata"].get("labels") or {}).get("pod-template-hash") for pod in ours]
    newest = [pod for pod, each in zip(ours, hashes, strict=True) if each == hashes[0]]
    # One that was ended (evicted, or with its node) stays behind for long: it counts until another is in its place.
    return [pod for pod in newest if pod is newest[0] or pod["status"].get("phase") != "Failed"]


def _containers(pod: Document, logs: dict[tuple[str, str], str]) -> Iterator[Problem]:
    for container in container_statuses(pod):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = waiting.get("reason"), waiting.get("message") or ""
        if reason in _IMAGE:
            text = f"the image {container['image']} cannot be fetched: {reason} {message}"
            yield Problem(_short(text), "push the image, correct its name, or name a pull secret", may_pass=True)
        elif reason in _CONTAINER:
            yield Problem(_short(f"the container cannot start: {message}"), "make what is missing", may_pass=True)
        elif ended := terminated(pod, container):
            yield _crashed(container, ended, logs.get((pod["metadata"]["name"], container["name"]), ""))


def _crashed(container: Document, ended: Document, log: str) -> Problem:
    lines = (ended.get("message") or log).strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    again = "running" in container["state"]  # the next try may succeed
    downloads = container["name"] == _DOWNLOAD
    if ended.get("reason") == "OOMKilled":
        if downloads:
            mend = f"raise the memory of container {_DOWNLOAD} in KServe's ClusterStorageContainer"
            return Problem("the download of the model ran out of its memory", mend, again)
        return Problem("the server ran out of its memory", "raise deployment.memory", again)
    if downloads:
        text = f"the model cannot be fetched (exit code {ended['exitCode']}){last}"
        return Problem(_short(text), "look at the address and at the secret of its service account", again)
    text = f"the server ended with exit code {ended['exitCode']}, {container['restartCount']} restarts{last}"
    return Problem(_short(text), f"kubectl logs --previous, container {container['name']}", again)


def _progress(found: Documents, uri: str) -> str:
    for pod in _newest(found.pods, uri):
        for container in container_statuses(pod):
            if "running" in (container.get("state") or {}):
                return ", the model is being fetched" if container["name"] == _DOWNLOAD else ", the model is loading"
    return ""
