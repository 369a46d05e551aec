"""The API server, as far as a check may ask it: within a time limit, and with the rights of whoever runs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from avrt_lib.cluster.kubeconfig import client_settings

#: For all questions to the API server together, and for one.
TIME_LIMIT_S, CALL_S = 35.0, 5.0


class NotSeen(Exception):
    """Something that cannot be read from here; the message says why."""


class Cluster:
    """The API server, as whoever runs this may use it.

    Args:
        inside: whether this is a pod of the cluster.

    Raises:
        EnvironmentProblem: where nothing says which cluster is meant.
    """

    def __init__(self, *, inside: bool) -> None:
        from kubernetes import client

        self.inside = inside
        settings = client_settings()
        settings.retries = False
        api = client.ApiClient(settings)
        self.core = client.CoreV1Api(api)
        self.objects = client.CustomObjectsApi(api)
        self.rights = client.AuthorizationV1Api(api)
        self.batch = client.BatchV1Api(api)
        self.discovery = client.DiscoveryV1Api(api)
        self._api_groups = client.ApisApi(api)
        self._groups: dict[str, str] | None = None
        self._deadline = time.monotonic() + TIME_LIMIT_S

    def ask(self, method: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """What the API server answers, or None where there is no such thing.

        Raises:
            NotSeen: where it refuses, or does not answer in time.
        """
        import urllib3
        from kubernetes.client import ApiException

        left = self._deadline - time.monotonic()
        if left <= 0:
            raise NotSeen(f"the API server took more than {TIME_LIMIT_S:g} s for what was asked before")
        try:
            # Connecting and reading, each; the client ignores a single number that is no int.
            return method(*arguments, _request_timeout=(min(CALL_S, left), min(CALL_S, left)), **more)
        except ApiException as error:
            if error.status == 404:
                return None
            reason = "may not be read from here" if error.status == 403 else f"{error.status} {error.reason}"
            raise NotSeen(reason) from error
        except urllib3.exceptions.HTTPError as error:
            raise NotSeen(f"the API server does not answer ({' '.join(str(error).split())[:200]})") from error

    def groups(self) -> dict[str, str]:
        """The API groups that the server has, each with its preferred version."""
        if self._groups is None:
            found = self.ask(self._api_groups.get_api_versions)
            if found is None:
                raise NotSeen("what KUBECONFIG names answers, but not as an API server")
            self._groups = {group.name: group.preferred_version.version for group in found.groups}
        return self._groups

    def custom(self, group: str, version: str, plural: str, name: str, namespace: str | None = None) -> Any:
        """A custom object, or None."""
        if namespace is None:
            return self.ask(self.objects.get_cluster_custom_object, group, version, plural, name)
        return self.ask(self.objects.get_namespaced_custom_object, group, version, namespace, plural, name)

    def may(self, account: str, verb: str, group: str, resource: str, namespace: str) -> bool:
        """Whether the runs' service account may do something; in a pod that is who we are."""
        from kubernetes import client

        attributes = client.V1ResourceAttributes(verb=verb, group=group, resource=resource, namespace=namespace)
        if self.inside:
            spec = client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
            review = client.V1SelfSubjectAccessReview(spec=spec)
            answer = self.ask(self.rights.create_self_subject_access_review, review)
        else:
            _, _, home, _ = account.split(":")
            groups = ["system:serviceaccounts", f"system:serviceaccounts:{home}", "system:authenticated"]
            other = client.V1SubjectAccessReviewSpec(user=account, groups=groups, resource_attributes=attributes)
            answer = self.ask(self.rights.create_subject_access_review, client.V1SubjectAccessReview(spec=other))
        return bool(answer.status.allowed)
