"""What a run needs of a cluster, looked for before a GPU is asked for.

The same checks run in the first step's pod and on the machine of whoever submits. Neither may read everything: what
cannot be seen from there is ``not checked``, with the reason. All of it together takes less than a minute, or two
where a store or an MLflow that is still starting is waited for.
"""

from __future__ import annotations

import base64
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from avrt_lib.cluster.profile import VARIABLE, Pool, Profile, amount, secret_variables
from avrt_lib.config import Config
from avrt_lib.errors import EnvironmentProblem
from avrt_lib.preflight.checks import FAILED, OK, UNKNOWN, WARNING, Check, endpoints
from avrt_lib.preflight.fit import fit
from avrt_lib.preflight.nodes import pool_check

#: For all questions to the API server together, and for one.
TIME_LIMIT_S, CALL_S = 35.0, 5.0
#: The check that fails where the cluster cannot be seen at all.
CLUSTER = "Cluster"
_KSERVE = "serving.kserve.io"
_KUEUE = "kueue.x-k8s.io"
_GATEWAY = "gateway.networking.k8s.io"
_ARGO_SETTINGS = "workflow-controller-configmap"
#: Annotation of a Job: the secrets that it makes, as NAMESPACE/NAME (manifests/components/credentials).
MAKES_SECRETS = "avrt/makes-secrets"
_SERVICE_ADDRESS = re.compile(r"(?P<name>[a-z0-9-]+)\.(?P<namespace>[a-z0-9-]+)\.svc(\..*)?")


def cluster_checks(config: Config, profile: Profile) -> list[Check]:
    """Everything that a run of this configuration asks of the cluster of this profile.

    Args:
        config: the run's configuration, with the profile's ``overrides``.
        profile: the cluster's.

    Returns:
        The checks; one that ``failed`` makes the run impossible. No secret's value is in any of them.
    """
    from avrt_lib.preflight import services

    inside = VARIABLE in os.environ
    variables = {name for keys in secret_variables(profile).values() for name in keys.values()}
    checks = list(fit(config, profile, variables | set(profile.environment)))
    checks += endpoints(config, inside=inside)
    credentials: dict[str, dict[str, str]] = {}
    try:
        cluster = Cluster(inside=inside)
        cluster.groups()
    except (EnvironmentProblem, NotSeen) as problem:
        mend = "set KUBECONFIG, or look at the cluster: kubectl get namespaces"
        checks.append(Check(CLUSTER, FAILED, str(problem).rstrip("."), mend))
    else:
        for part in (
            _secrets(cluster, config, profile, credentials),
            _objects(cluster, profile),
            _services(cluster, profile),
            _serving(cluster, config, profile),
            _kueue(cluster, profile),
            _retries(cluster, profile),
            _quotas(cluster, profile),
            _pools(cluster, profile),
        ):
            checks += part
    deadline = time.monotonic() + (services.COMING_UP_S if inside else 0.0)
    key = credentials.get(profile.store.secret)
    checks.append(services.until_up(lambda: services.store_check(config, profile, key, inside=inside), deadline))
    if config.deployment.target == "git" and inside:
        checks.append(services.manifests_check(config))
    if tracking := profile.tracking:
        login = credentials.get(tracking.secret or "")
        checks.append(services.until_up(lambda: services.tracking_check(tracking, login, inside=inside), deadline))
    return checks


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
        from kubernetes import client, config

        self.inside = inside
        settings = client.Configuration()
        try:
            named = os.environ.get("KUBECONFIG")
            if named or Path("~/.kube/config").expanduser().exists():
                config.load_kube_config(named or None, client_configuration=settings)
            else:
                config.load_incluster_config(client_configuration=settings)
        except (config.ConfigException, OSError, yaml.YAMLError) as error:
            raise EnvironmentProblem(f"there is no access to a cluster ({' '.join(str(error).split())})") from error
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


@dataclass(frozen=True)
class _Wanted:
    """An object that must be there: how a check calls it, and what to do where it is not."""

    label: str
    method: Callable[..., Any]
    name: str
    namespace: str
    mend: str


def _secrets(
    cluster: Cluster, config: Config, profile: Profile, credentials: dict[str, dict[str, str]]
) -> Iterator[Check]:
    """The secrets with their keys; the values found are put to ``credentials``, by secret and key."""
    namespace = profile.pipelines.namespace
    needed = secret_variables(profile)
    if config.deployment.target != "kserve" and profile.api_key_secret not in (None, *profile.secret_env):
        needed.pop(str(profile.api_key_secret))
    being_made = _being_made(cluster, config)  # asked first: what ends in between has made them
    for secret, keys in needed.items():
        label = f"Secret {secret}"
        literals = " ".join(f"--from-literal={key}=…" for key in keys)
        mend = f"kubectl --namespace {namespace} create secret generic {secret} {literals}"
        try:
            found = cluster.ask(cluster.core.read_namespaced_secret, secret, namespace)
        except NotSeen as reason:
            yield _unseen_secret(label, keys, inside=cluster.inside, reason=str(reason))
            continue
        if found is None and f"{namespace}/{secret}" in being_made:
            where = config.deployment.namespace
            mend = f"look at it: kubectl --namespace {where} get jobs,pods,events"
            yield Check(label, FAILED, f"is not in {namespace} yet; a Job in {where} makes it", mend, coming_up=True)
            continue
        if found is None:
            yield Check(label, FAILED, f"is not in {namespace}; its keys are {', '.join(keys)}", mend)
            continue
        values = {key: base64.b64decode(value).decode(errors="replace") for key, value in (found.data or {}).items()}
        credentials[secret] = values
        missing = [key for key in keys if not values.get(key)]
        if missing:
            found = f"in {namespace} has no {' and no '.join(missing)}"
            yield Check(label, FAILED, found, f"add it: {', '.join(missing)}")
        else:
            yield Check(label, OK, f"in {namespace}, with {', '.join(keys)}")


def _being_made(cluster: Cluster, config: Config) -> set[str]:
    """The secrets, as NAMESPACE/NAME, that a Job which has not ended says it makes."""
    try:
        jobs = cluster.ask(cluster.batch.list_namespaced_job, config.deployment.namespace).items
    except NotSeen:
        return set()
    return {
        place
        for job in jobs
        if not any(each.type in ("Complete", "Failed") for each in job.status.conditions or [])
        for place in (job.metadata.annotations or {}).get(MAKES_SECRETS, "").split()
    }


def _unseen_secret(label: str, keys: Mapping[str, str], *, inside: bool, reason: str) -> Check:
    """A pod that may not read a secret still sees what its environment took from it."""
    if not inside:
        return Check(label, UNKNOWN, reason)
    missing = [key for key, variable in keys.items() if not os.environ.get(variable)]
    if missing:
        return Check(label, FAILED, f"gives this pod no {' and no '.join(missing)}", "make it, with all of its keys")
    return Check(label, OK, f"gives this pod {', '.join(keys)}")


def _objects(cluster: Cluster, profile: Profile) -> Iterator[Check]:
    """Service account, image pull secrets, config map and claims."""
    namespace, core = profile.pipelines.namespace, cluster.core
    account = profile.pipelines.service_account
    wanted = []
    if not cluster.inside:  # a pod of the run is there by it
        mend = "correct pipelines.service_account of the profile, or install Kubeflow Pipelines there"
        method = core.read_namespaced_service_account
        wanted.append(_Wanted(f"Service account {account}", method, account, namespace, mend))
    for secret in profile.image_pull_secrets:
        mend = f"kubectl --namespace {namespace} create secret docker-registry {secret} …"
        wanted.append(_Wanted(f"Image pull secret {secret}", core.read_namespaced_secret, secret, namespace, mend))
    if profile.store.ca_config_map:
        name = profile.store.ca_config_map
        mend = f"kubectl --namespace {namespace} create configmap {name} --from-file={profile.store.ca_key}"
        wanted.append(_Wanted(f"Config map {name}", core.read_namespaced_config_map, name, namespace, mend))
    for volume in profile.volumes:
        wanted.append(
            _Wanted(
                f"Claim {volume.claim}",
                core.read_namespaced_persistent_volume_claim,
                volume.claim,
                namespace,
                "make it, or take it out of the profile's volumes",
            )
        )
    for each in wanted:
        try:
            found = cluster.ask(each.method, each.name, each.namespace)
        except NotSeen as reason:
            yield Check(each.label, UNKNOWN, str(reason))
            continue
        if found is None:
            yield Check(each.label, FAILED, f"is not in {each.namespace}", each.mend)
        elif each.label.startswith("Claim") and found.status.phase == "Lost":
            yield Check(each.label, FAILED, "has lost its volume", each.mend)
        elif each.label.startswith("Config map") and not (found.data or {}).get(profile.store.ca_key):
            yield Check(each.label, FAILED, f"in {each.namespace} has no {profile.store.ca_key}", each.mend)
        else:
            yield Check(each.label, OK, f"in {each.namespace}")


def _services(cluster: Cluster, profile: Profile) -> Iterator[Check]:
    """Whether pods stand behind the store's and MLflow's addresses, where these are Services of the cluster.

    A pod of the run asks them itself.
    """
    hosts = [urlsplit(f"//{profile.store.endpoint}").hostname]
    hosts += [urlsplit(profile.tracking.uri).hostname] if profile.tracking else []
    for address in () if cluster.inside else filter(None, (_SERVICE_ADDRESS.fullmatch(host or "") for host in hosts)):
        name, namespace = address["name"], address["namespace"]
        label, of_service = f"Service {name}", f"kubernetes.io/service-name={name}"
        try:
            service = cluster.ask(cluster.core.read_namespaced_service, name, namespace)
            slices = cluster.ask(
                cluster.discovery.list_namespaced_endpoint_slice, namespace, label_selector=of_service
            ).items
        except NotSeen as reason:
            yield Check(label, UNKNOWN, f"in {namespace}: {reason}")
            continue
        ready = any(
            endpoint.conditions is None or endpoint.conditions.ready is not False
            for each in slices
            for endpoint in each.endpoints or []
        )
        if service is None:
            mend = "apply an overlay of manifests, or correct the address in the profile"
            yield Check(label, FAILED, f"is not in {namespace}", mend)
        elif not ready and service.spec.type != "ExternalName":
            mend = f"look at them: kubectl --namespace {namespace} get pods,events"
            yield Check(label, FAILED, f"has no pod in {namespace} that is ready", mend, coming_up=True)
        else:
            yield Check(label, OK, f"in {namespace}")


def _serving(cluster: Cluster, config: Config, profile: Profile) -> Iterator[Check]:
    """What ``deployment.target=kserve`` needs: KServe, the runtime, the model's service account, and permission."""
    if config.deployment.target != "kserve":
        return
    deployment, pipelines = config.deployment, profile.pipelines
    if _KSERVE not in cluster.groups():
        mend = "install KServe, or set deployment.target to git (or to local for a run that deploys nothing)"
        yield Check("KServe", FAILED, f"the cluster has no {_KSERVE} (its CRDs are missing)", mend)
        return
    yield Check("KServe", OK, f"{_KSERVE}/{cluster.groups()[_KSERVE]}")
    namespace, runtime = deployment.namespace, deployment.runtime
    try:
        found = cluster.custom(_KSERVE, "v1alpha1", "servingruntimes", runtime, namespace) or cluster.custom(
            _KSERVE, "v1alpha1", "clusterservingruntimes", runtime
        )
        yield (
            Check("Serving runtime", OK, runtime)
            if found
            else Check(
                "Serving runtime",
                FAILED,
                f"{runtime} is not in {namespace}",
                "apply manifests/base there, or correct deployment.runtime",
            )
        )
    except NotSeen as reason:
        yield Check("Serving runtime", UNKNOWN, f"{runtime} {reason}")
    label, account = "Model's service account", deployment.service_account
    try:
        if cluster.ask(cluster.core.read_namespaced_service_account, account, namespace) is None:
            mend = "apply manifests/base there, or correct deployment.service_account"
            yield Check(label, FAILED, f"{account} is not in {namespace}", mend)
        else:
            yield Check(label, OK, f"{account} in {namespace}")
    except NotSeen as reason:
        yield Check(label, UNKNOWN, f"{account} {reason}")
    runs_as = f"system:serviceaccount:{pipelines.namespace}:{pipelines.service_account}"
    # What a rollout does (avrt_lib.serving.cluster).
    needed = [(verb, _KSERVE, "inferenceservices") for verb in ("get", "create", "update", "delete")]
    needed += [(verb, "coordination.k8s.io", "leases") for verb in ("get", "create", "update")]
    needed += [("get", "apps", "deployments"), ("list", "", "pods"), ("list", "", "events")]
    if deployment.route:
        needed += [(verb, _GATEWAY, "httproutes") for verb in ("get", "patch")]
        yield _route(cluster, namespace, deployment.route)
    try:
        missing = [
            f"{verb} {resource}"
            for verb, group, resource in needed
            if not cluster.may(runs_as, verb, group, resource, namespace)
        ]
        mend = f"bind the Role avrt-deployer in {namespace} to it (manifests/base)"
        yield (
            Check("Permission", FAILED, f"{runs_as} may not {', '.join(missing)} in {namespace}", mend)
            if missing
            else Check("Permission", OK, f"{runs_as} may deploy to {namespace}")
        )
    except NotSeen as reason:
        yield Check("Permission", UNKNOWN, f"of {runs_as}: {reason}")


def _route(cluster: Cluster, namespace: str, route: str) -> Check:
    if _GATEWAY not in cluster.groups():
        mend = "install the Gateway API and a controller for it, or unset deployment.route"
        return Check("Route", FAILED, f"the cluster has no {_GATEWAY} (its CRDs are missing)", mend)
    try:
        if cluster.custom(_GATEWAY, "v1", "httproutes", route, namespace) is None:
            mend = "apply manifests/components/gateway-api, or correct deployment.route"
            return Check("Route", FAILED, f"there is no HTTPRoute {route} in {namespace}", mend)
    except NotSeen as reason:
        return Check("Route", UNKNOWN, f"{route} {reason}")
    return Check("Route", OK, f"{route} in {namespace}")


def _kueue(cluster: Cluster, profile: Profile) -> Iterator[Check]:
    if profile.kueue is None:
        return
    queue, namespace = profile.kueue.queue, profile.pipelines.namespace
    version = cluster.groups().get(_KUEUE)
    if version is None:
        mend = "install Kueue, or take kueue out of the profile"
        yield Check("Kueue", WARNING, "is not installed: pods do not wait for the queue", mend)
        return
    try:
        found = cluster.custom(_KUEUE, version, "localqueues", queue, namespace)
        conditions = {c["type"]: c for c in ((found or {}).get("status") or {}).get("conditions") or []}
        active = conditions.get("Active", {"status": "True"})
        if found is None:
            mend = "make it, or correct kueue.queue: pods would wait for ever"
            yield Check("Kueue queue", FAILED, f"there is no LocalQueue {queue} in {namespace}", mend)
        elif active["status"] != "True":
            mend = "look at its ClusterQueue: pods would wait for ever"
            yield Check("Kueue queue", FAILED, f"{queue} is not active ({active.get('message', '')})", mend)
        else:
            yield Check("Kueue queue", OK, f"{queue} in {namespace}")
    except NotSeen as reason:
        yield Check("Kueue queue", UNKNOWN, f"{queue} {reason}")
    name = profile.kueue.priority_class
    if name is None:
        return
    try:
        if cluster.custom(_KUEUE, version, "workloadpriorityclasses", name) is None:
            mend = "make it, or correct kueue.priority_class"
            yield Check("Kueue priority", FAILED, f"there is no WorkloadPriorityClass {name}", mend)
    except NotSeen as reason:
        yield Check("Kueue priority", UNKNOWN, f"{name} {reason}")


def _retries(cluster: Cluster, profile: Profile) -> Iterator[Check]:
    """Whether Argo retries a failed step at all, which its stock settings do not."""
    if not any(pool.retries for pool in profile.pools.values()):
        return
    fixed = profile.pipelines.retries_are_fixed
    mend = "apply manifests/components/kfp-admin, or set retries of the profile's pools to 0"
    try:
        settings = None
        for namespace in dict.fromkeys((profile.pipelines.namespace, "kubeflow")):
            settings = settings or cluster.ask(cluster.core.read_namespaced_config_map, _ARGO_SETTINGS, namespace)
    except NotSeen as reason:
        settings, said = None, str(reason)
    else:
        said = "is not there"
    if settings is None:
        found = f"config map {_ARGO_SETTINGS} {said}"
        if fixed:
            yield Check("Retries", UNKNOWN, f"{found}; the profile says that the administrator has set them")
        else:
            mend += ", and set pipelines.retries_are_fixed where it is done"
            yield Check("Retries", WARNING, f"a failed step may not be tried again ({found})", mend)
        return
    policy = retry_policy(settings.data or {})
    if policy != "Always":
        found = f"Argo's retryPolicy is {policy}, so that not every failed step is tried again"
        yield Check("Retries", WARNING, found, mend)
    else:
        hint = "" if fixed else "; pipelines.retries_are_fixed can be true"
        yield Check("Retries", OK, f"Argo's retryPolicy is Always{hint}")


def retry_policy(settings: Mapping[str, str]) -> str:
    """The retry policy that Argo's controller gives to steps which ask for retries without naming one."""
    try:
        defaults = yaml.safe_load(settings.get("workflowDefaults", "")) or {}
        if not defaults and "config" in settings:
            defaults = (yaml.safe_load(settings["config"]) or {}).get("workflowDefaults") or {}
        strategy = defaults["spec"]["templateDefaults"]["retryStrategy"]
        return str(strategy.get("retryPolicy", "OnFailure"))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return "OnFailure"


def _quotas(cluster: Cluster, profile: Profile) -> Iterator[Check]:
    """The quotas of the runs' namespace against the largest pod."""
    namespace = profile.pipelines.namespace
    try:
        quotas = cluster.ask(cluster.core.list_namespaced_resource_quota, namespace).items
    except NotSeen as reason:
        yield Check("Quota", UNKNOWN, f"of {namespace}: {reason}")
        return
    checks = [
        check
        for quota in quotas
        if not (quota.spec.scopes or quota.spec.scope_selector)
        for check in _quota(quota, profile)
    ]
    yield from checks or [Check("Quota", OK, f"{len(quotas)} in {namespace}" if quotas else f"none in {namespace}")]


def _quota(quota: Any, profile: Profile) -> Iterator[Check]:
    from kubernetes.utils import parse_quantity

    name, used = quota.metadata.name, (quota.status.used if quota.status else None) or {}
    for resource, text in (quota.spec.hard or {}).items():
        needs = {role: _asked(pool, resource) for role, pool in profile.pools.items()}
        if resource in ("limits.cpu", "limits.memory") and None in needs.values():
            roles = ", ".join(role for role, need in needs.items() if need is None)
            field = f"{resource.removeprefix('limits.')}_limit"
            mend = f"set {field} of pools {roles}"
            yield Check(f"Quota {name}", WARNING, f"it counts {resource}, and refuses pods without it", mend)
        role, need = max(((role, need or 0.0) for role, need in needs.items()), key=lambda each: each[1])
        hard, taken = float(parse_quantity(text)), float(parse_quantity(used.get(resource, 0)))
        if need > hard:
            mend = f"raise the quota, or lower pools.{role}"
            yield Check(f"Quota {name}", FAILED, f"{resource} is {text}, but one pod of {role} asks for more", mend)
        elif need > hard - taken:
            found = f"{used[resource]} of {text} {resource} are taken, so that a pod of {role} waits"
            yield Check(f"Quota {name}", WARNING, found, "end what is not needed any more")


def _asked(pool: Pool, resource: str) -> float | None:
    """What a pod of a pool counts for in a quota; None: no limit where one counts."""
    if resource in ("cpu", "requests.cpu"):
        return amount(pool.cpu_request)
    if resource in ("memory", "requests.memory"):
        return amount(pool.memory_request)
    if resource == "limits.cpu":
        return amount(pool.cpu_limit) if pool.cpu_limit else None
    if resource == "limits.memory":
        return amount(pool.memory_limit) if pool.memory_limit else None
    return float(pool.gpus) if resource == f"requests.{pool.gpu_resource}" else 0.0


def _pools(cluster: Cluster, profile: Profile) -> Iterator[Check]:
    """The nodes against the pools; pools that are alike are one check."""
    try:
        nodes = cluster.ask(cluster.core.list_node).items
    except NotSeen as reason:
        yield Check("Pools", UNKNOWN, f"the nodes: {reason}")
        return
    alike: dict[str, list[str]] = {}
    for role, pool in profile.pools.items():
        alike.setdefault(pool.model_dump_json(), []).append(role)
    autoscaled = _autoscaled(cluster)
    for roles in alike.values():
        pool = profile.pools[roles[0]]  # type: ignore[index]
        yield pool_check(", ".join(roles), pool, nodes, autoscaled=autoscaled)


def _autoscaled(cluster: Cluster) -> bool:
    """Whether something adds nodes when pods wait for them, so that a pool may have none just now."""
    if {"karpenter.sh", "autoscaling.openshift.io"} & set(cluster.groups()):
        return True
    try:
        status = cluster.ask(cluster.core.read_namespaced_config_map, "cluster-autoscaler-status", "kube-system")
    except NotSeen:
        return False
    return status is not None
