"""What Kubernetes knows of a run and the backend's API does not tell: why a pod waits, and how a node ended."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import urllib3
from kubernetes import client

from avrt_lib.cluster.kubeconfig import client_settings
from avrt_lib.cluster.profile import RUN_LABEL
from avrt_lib.errors import EnvironmentProblem
from pipelines.progress import task_of

NODE_NAME = "workflows.argoproj.io/node-name"
NODE_ID = "workflows.argoproj.io/node-id"
#: Scheduling gates with this prefix are Kueue's: it has not let the pod in yet.
KUEUE = "kueue.x-k8s.io/"
TIMEOUT_S = 10
#: Reasons of a container that is on its way.
STARTING = ("ContainerCreating", "PodInitializing")


class PodsUnreadable(Exception):
    """There is no access to the run's pods; the message says why."""


@dataclass(frozen=True)
class Waiting:
    """A pod that does not run yet, or that could not even be made.

    Attributes:
        key: tells it from others.
        task: the task that it belongs to.
        reason: why, in the scheduler's or the kubelet's words.
        held: Kueue holds it, or it waits for GPUs that other pods of its run have; it may wait as long as that takes.
    """

    key: str
    task: str
    reason: str
    held: bool = False


@dataclass(frozen=True)
class _Gpus:
    """What a pod asks for of what a node has few of, by name, and the node selector that says of which nodes."""

    resources: frozenset[str]
    nodes: frozenset[tuple[str, str]]


def _gpus(pod: Any) -> _Gpus:
    """Extended resources, GPUs and MIG slices among them, have a domain in their names."""
    limits = [container.resources.limits or {} for container in pod.spec.containers if container.resources]
    names = frozenset(name for each in limits for name, count in each.items() if "/" in name and count != "0")
    return _Gpus(names, frozenset((pod.spec.node_selector or {}).items()))


class Pods:
    """The pods and the Workflow of runs, read with the user's own access (KUBECONFIG, or the pod's service account).

    Args:
        namespace: of the runs.

    Raises:
        PodsUnreadable: where there is no access at all.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        api = _connect()
        self._core = client.CoreV1Api(api)
        self._objects = client.CustomObjectsApi(api)

    def waiting(self, run_id: str, nodes: Sequence[dict[str, Any]] = ()) -> list[Waiting]:
        """The run's pods that wait, and those of its Workflow's nodes for which no pod could be made.

        Args:
            run_id: the run.
            nodes: as ``nodes`` gives them. A node that waits without a pod is one that a quota or an admission policy
                refuses; Argo tries again for ever.

        Raises:
            PodsUnreadable: where the cluster refuses or does not answer.
        """
        with _errors():
            pods = self._list(run_id)
        made = {(pod.metadata.annotations or {}).get(NODE_ID) for pod in pods}
        unmade = [
            Waiting(node["id"], task_of(node["name"]), _line(node.get("message") or "no pod could be made for it"))
            for node in nodes
            if node.get("type") == "Pod" and node.get("phase") == "Pending" and node["id"] not in made
        ]
        taken = [_gpus(pod) for pod in pods if pod.spec.node_name and pod.status.phase in ("Pending", "Running")]
        return [self._waiting(pod, taken) for pod in pods if pod.status.phase == "Pending"] + unmade

    def nodes(self, run_id: str) -> list[dict[str, Any]] | None:
        """The nodes of the run's Workflow, each with ``id``, ``name``, ``phase`` and ``message``; None without one.

        Raises:
            PodsUnreadable: where the cluster refuses or does not answer.
        """
        with _errors():
            found = self._objects.list_namespaced_custom_object(
                "argoproj.io",
                "v1alpha1",
                self.namespace,
                "workflows",
                label_selector=f"{RUN_LABEL}={run_id}",
                _request_timeout=TIMEOUT_S,
            )["items"]
        if not found:
            return None
        status = found[0].get("status") or {}
        packed = status.get("compressedNodes")  # Argo's form for large workflows
        nodes = json.loads(gzip.decompress(base64.b64decode(packed))) if packed else status.get("nodes") or {}
        return list(nodes.values())

    def running_logs(self, run_id: str, lines: int) -> dict[str, str]:
        """The last lines of the pods that run now, by task. The backend's API has logs only of pods that ended.

        Raises:
            PodsUnreadable: where the cluster refuses or does not answer.
        """
        found: dict[str, str] = {}
        with _errors():
            for pod in self._list(run_id):
                name = (pod.metadata.annotations or {}).get(NODE_NAME, pod.metadata.name)
                if pod.status.phase == "Running" and name.rpartition(".")[2].startswith("executor"):
                    found[task_of(name)] = self._core.read_namespaced_pod_log(
                        pod.metadata.name,
                        self.namespace,
                        container="main",
                        tail_lines=lines,
                        _request_timeout=TIMEOUT_S,
                    )
        return found

    def _list(self, run_id: str) -> list[Any]:
        selector = f"{RUN_LABEL}={run_id}"
        listed = self._core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=TIMEOUT_S)
        return list(listed.items)

    def _waiting(self, pod: Any, taken: Sequence[_Gpus]) -> Waiting:
        key = pod.metadata.name
        task = task_of((pod.metadata.annotations or {}).get(NODE_NAME, key))
        if any(gate.name.startswith(KUEUE) for gate in pod.spec.scheduling_gates or []):
            queue = (pod.metadata.labels or {}).get(f"{KUEUE}queue-name", "")
            return Waiting(key, task, f"Kueue holds it in the queue {queue}".rstrip(), held=True)
        for condition in pod.status.conditions or []:
            if condition.type == "PodScheduled" and condition.status == "False":
                reason = _line(f"{condition.reason}: {condition.message or ''}".rstrip(": "))
                short = [name for name in _gpus(pod).resources if f"Insufficient {name}" in reason]
                nodes = _gpus(pod).nodes
                if any(each.nodes == nodes and not each.resources.isdisjoint(short) for each in taken):
                    return Waiting(key, task, f"other steps of the run have the GPUs ({reason})", held=True)
                return Waiting(key, task, reason)
        statuses = [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]
        for status in statuses:
            state = status.state.waiting if status.state else None
            if state is not None and state.reason not in STARTING:
                return Waiting(key, task, _line(f"{state.reason}: {state.message or ''}".rstrip(": ")))
        return Waiting(key, task, f"its containers are being made{self._event(key)}")

    def _event(self, pod: str) -> str:
        """The last event of a pod, such as an image that is being pulled or a volume that is not there."""
        try:
            with _errors():
                events = self._core.list_namespaced_event(
                    self.namespace, field_selector=f"involvedObject.name={pod}", _request_timeout=TIMEOUT_S
                ).items
        except PodsUnreadable:
            return ""
        return f" ({_line(events[-1].message)})" if events else ""


def inference_services() -> list[dict[str, Any]]:
    """All InferenceServices of the cluster; none where KServe is not installed.

    Raises:
        PodsUnreadable: where the cluster refuses or does not answer.
    """
    objects = client.CustomObjectsApi(_connect())
    with _errors():
        try:
            listed = objects.list_cluster_custom_object(
                "serving.kserve.io", "v1beta1", "inferenceservices", _request_timeout=TIMEOUT_S
            )
        except client.ApiException as error:
            if error.status == 404:
                return []
            raise
    return list(listed["items"])


def _connect() -> Any:
    try:
        settings = client_settings()
    except EnvironmentProblem as problem:
        raise PodsUnreadable(_line(problem).rstrip(".")) from problem
    settings.retries = False
    return client.ApiClient(settings)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn what the client raises into ``PodsUnreadable``."""
    try:
        yield
    except client.ApiException as error:
        said = error.reason
        with contextlib.suppress(ValueError, AttributeError):
            said = json.loads(error.body or "").get("message") or said
        raise PodsUnreadable(f"the cluster refuses ({error.status}: {_line(said)})") from error
    except urllib3.exceptions.HTTPError as error:
        raise PodsUnreadable(f"the cluster does not answer ({_line(error).rpartition(': ')[2]})") from error


def _line(text: object) -> str:
    return " ".join(str(text).split())[:500]
