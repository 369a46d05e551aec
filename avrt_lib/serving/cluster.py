"""The API server as serving needs it: InferenceServices of one namespace, what they are made of, Leases and routes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from avrt_lib.cluster.kubeconfig import client_settings
from avrt_lib.errors import EnvironmentProblem, ServingError

Document = dict[str, Any]

#: Label that KServe puts on a predictor's pods.
POD_LABEL = "serving.kserve.io/inferenceservice"
_KSERVE = ("serving.kserve.io", "v1beta1")
_SERVICES = "inferenceservices"
_LEASES = ("coordination.k8s.io", "v1")
_ROUTES = ("gateway.networking.k8s.io", "v1")
_CALL_S = (10, 30)  # connecting, reading
_LOG_LINES = 20


class Conflict(ServingError):
    """Somebody else changed or made the object first."""


@dataclass(frozen=True, slots=True)
class Documents:
    """An InferenceService and what it is made of, as the API server gives them.

    Attributes:
        service: the InferenceService, or None where there is none.
        deployment: its predictor's Deployment, or None.
        pods: its pods.
        events: the namespace's events of it and of its pods.
        logs: last log line of a crashed container, by pod and container, where its status has no message.
    """

    service: Document | None
    deployment: Document | None = None
    pods: list[Document] = field(default_factory=list)
    events: list[Document] = field(default_factory=list)
    logs: dict[tuple[str, str], str] = field(default_factory=dict)


class Cluster:
    """One namespace of the cluster that KUBECONFIG names, or of the one that this pod runs in.

    Every method raises EnvironmentProblem where the API server does not answer or cannot, has no KServe or forbids the
    call, and ServingError with its own words where it refuses an object.

    Raises:
        EnvironmentProblem: where nothing says which cluster is meant.
    """

    def __init__(self, namespace: str) -> None:
        from kubernetes import client

        self.namespace = namespace
        api = client.ApiClient(client_settings())
        self._objects = client.CustomObjectsApi(api)
        self._apps = client.AppsV1Api(api)
        self._core = client.CoreV1Api(api)

    def service(self, name: str) -> Document | None:
        """The InferenceService of this name, or None."""
        return self._get(*_KSERVE, _SERVICES, name)

    def create(self, service: Document) -> Document:
        """Make an InferenceService.

        Raises:
            Conflict: where there is one of this name.
        """
        method = self._objects.create_namespaced_custom_object
        made: Document = self._call("create inferenceservices", method, *_KSERVE, self.namespace, _SERVICES, service)
        return made

    def replace(self, service: Document) -> Document:
        """Store an InferenceService that was read before, with its changes.

        Raises:
            Conflict: where it was changed since it was read.
        """
        method, name = self._objects.replace_namespaced_custom_object, service["metadata"]["name"]
        where = (*_KSERVE, self.namespace, _SERVICES, name)
        stored: Document = self._call("update inferenceservices", method, *where, service)
        return stored

    def delete(self, name: str) -> None:
        """Delete an InferenceService; one that is gone is fine."""
        method = self._objects.delete_namespaced_custom_object
        self._call("delete inferenceservices", method, *_KSERVE, self.namespace, _SERVICES, name, absent_is_fine=True)

    def pods(self, name: str) -> list[Document]:
        """The pods of an InferenceService, those that are being ended included."""
        method, selector = self._core.list_namespaced_pod, f"{POD_LABEL}={name}"
        return list(self._call("list pods", method, self.namespace, label_selector=selector, raw=True)["items"])

    def documents(self, name: str) -> Documents:
        """Everything that tells how an InferenceService is doing."""
        service = self.service(name)
        if service is None:
            return Documents(None)
        deployment = self._call(
            "get deployments",
            self._apps.read_namespaced_deployment,
            f"{name}-predictor",
            self.namespace,
            raw=True,
            absent_is_fine=True,
        )
        pods = self.pods(name)
        # Not by name: events outlive what they are about by an hour, and a candidate's name comes again.
        ours = {each["metadata"]["uid"] for each in (service, *pods)}
        events = self._call("list events", self._core.list_namespaced_event, self.namespace, raw=True)["items"]
        return Documents(
            service,
            deployment,
            pods,
            [event for event in events if event["involvedObject"].get("uid") in ours],
            dict(self._last_words(pods)),
        )

    def lease(self, name: str) -> Document | None:
        """The Lease of this name, or None."""
        return self._get(*_LEASES, "leases", name)

    def put_lease(self, lease: Document) -> Document:
        """Make a Lease, or store one that was read before.

        Raises:
            Conflict: where somebody else made or changed it.
        """
        where = (*_LEASES, self.namespace, "leases")
        stored: Document
        if "resourceVersion" in lease["metadata"]:
            method, name = self._objects.replace_namespaced_custom_object, lease["metadata"]["name"]
            stored = self._call("update leases", method, *where, name, lease)
        else:
            stored = self._call("create leases", self._objects.create_namespaced_custom_object, *where, lease)
        return stored

    def route(self, name: str) -> Document | None:
        """The HTTPRoute of this name, or None."""
        return self._get(*_ROUTES, "httproutes", name)

    def set_rules(self, route: Document, rules: list[Document], *, dry_run: bool = False) -> None:
        """Store other rules of an HTTPRoute that was read before.

        Args:
            dry_run: whether to ask only if the API server would take them.

        Raises:
            Conflict: where it was changed since it was read.
        """
        method, metadata = self._objects.patch_namespaced_custom_object, route["metadata"]
        where = (*_ROUTES, self.namespace, "httproutes", metadata["name"])
        change = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "spec": {"rules": rules}}
        asked = "All" if dry_run else None
        self._call("patch httproutes", method, *where, change, field_manager="avrt-rollout", dry_run=asked)

    def _get(self, group: str, version: str, plural: str, name: str) -> Document | None:
        method = self._objects.get_namespaced_custom_object
        where = (group, version, self.namespace, plural, name)
        found: Document | None = self._call(f"get {plural}", method, *where, absent_is_fine=True)
        return found

    def _last_words(self, pods: list[Document]) -> Iterator[tuple[tuple[str, str], str]]:
        """The last log lines of containers that ended without a message (``terminationMessagePolicy: File``)."""
        for pod in pods:
            for container in container_statuses(pod):
                ended = terminated(pod, container)
                if ended is None or ended.get("message"):
                    continue
                name = pod["metadata"]["name"]
                said = self._call(
                    "get pods/log",
                    self._core.read_namespaced_pod_log,
                    name,
                    self.namespace,
                    container=container["name"],
                    previous="running" in container["state"],
                    tail_lines=_LOG_LINES,
                    text=True,
                    absent_is_fine=True,
                    refusal_is_fine=True,
                )
                if said and said.strip():
                    yield (name, container["name"]), said.strip().splitlines()[-1]

    def _call(
        self,
        what: str,
        method: Callable[..., Any],
        *arguments: Any,
        raw: bool = False,
        text: bool = False,
        absent_is_fine: bool = False,
        refusal_is_fine: bool = False,
        **more: Any,
    ) -> Any:
        """What the API server answers; None where there is no such object and that is fine.

        Args:
            what: the permission that the call needs, for the error.
            raw: whether to take the answer's JSON as it is instead of the client's classes.
            text: whether the answer is text.
        """
        import urllib3
        from kubernetes.client import ApiException

        if raw or text:
            more["_preload_content"] = False
        try:
            answer = method(*arguments, _request_timeout=_CALL_S, **more)
            if text:  # the client would turn a line of JSON into Python's notation
                return answer.data.decode(errors="replace")
            return json.loads(answer.data) if raw else answer
        except ApiException as error:
            message = _message(error)
            if error.status == 404 and message is None:
                kind = what.split()[1]
                needed = "the Gateway API, or unset deployment.route" if kind == "httproutes" else "KServe"
                raise EnvironmentProblem(
                    f"The cluster does not know {kind}: install {needed} (docs/serving.md)."
                ) from error
            away = error.status >= 500 or error.status == 429  # also a node that does not give its logs
            if (error.status == 404 and absent_is_fine) or (refusal_is_fine and (away or error.status in (400, 404))):
                return None
            if error.status == 409:
                raise Conflict(f"The cluster refused to {what}: {message}") from error
            said = message or f"{error.status} {error.reason}"
            if away:  # no word on the object: nothing is to be taken back for it
                raise EnvironmentProblem(
                    f"The API server could not {what} in {self.namespace} ({said}): try again."
                ) from error
            if error.status == 401:
                raise EnvironmentProblem(
                    f"The API server does not take the credentials of KUBECONFIG ({said}): log in again."
                ) from error
            if error.status == 403 and "admission webhook" not in (message or ""):
                raise EnvironmentProblem(
                    f"This account may not {what} in {self.namespace}: bind the Role avrt-deployer to it "
                    f"(manifests/base). {said}"
                ) from error
            raise ServingError(f"The cluster refused to {what} in {self.namespace}: {said}") from error
        except urllib3.exceptions.HTTPError as error:
            reason = " ".join(str(error).split())[:200]
            raise EnvironmentProblem(f"The API server does not answer ({reason}): look at KUBECONFIG.") from error


def container_statuses(pod: Document) -> list[Document]:
    """The states of a pod's containers, those that run before the others first."""
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def terminated(pod: Document, container: Document) -> Document | None:
    """How a container of a pod failed last, or None where it did not or is well again: exit code, reason, message.

    One that runs before the others is to end; of the others an end is a failure whatever its exit code, since a server
    that its probe has ended says 0.
    """
    if container.get("ready"):
        return None
    is_to_end = container in ((pod.get("status") or {}).get("initContainerStatuses") or [])
    for state in (container.get("state") or {}, container.get("lastState") or {}):
        ended: Document | None = state.get("terminated")
        if ended and (ended.get("exitCode") or not is_to_end):
            return ended
    return None


def _message(error: Any) -> str | None:
    """The API server's own words; None for an address that it does not know."""
    try:
        return " ".join(str(json.loads(error.body)["message"]).split())
    except (ValueError, KeyError, TypeError):
        return None
