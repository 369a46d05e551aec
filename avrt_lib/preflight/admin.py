"""What an administrator decides about a run's pods: Kueue's queues, Argo's retries, quotas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from avrt_lib.cluster.profile import Pool, Profile, amount
from avrt_lib.preflight.api import Cluster, NotSeen
from avrt_lib.preflight.checks import FAILED, OK, UNKNOWN, WARNING, Check

_KUEUE = "kueue.x-k8s.io"
_ARGO_SETTINGS = "workflow-controller-configmap"


def kueue(cluster: Cluster, profile: Profile) -> Iterator[Check]:
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


def retries(cluster: Cluster, profile: Profile) -> Iterator[Check]:
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


def quotas(cluster: Cluster, profile: Profile) -> Iterator[Check]:
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
