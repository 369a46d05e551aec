"""Whether a cluster has nodes for a pool: the scheduler's own questions, asked of an empty cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from avrt_lib.cluster.profile import AffinityTerm, Pool, Profile, Toleration, amount
from avrt_lib.preflight.api import Cluster, NotSeen
from avrt_lib.preflight.checks import FAILED, GIB, OK, UNKNOWN, WARNING, Check


def pools(cluster: Cluster, profile: Profile) -> Iterator[Check]:
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


def pool_check(roles: str, pool: Pool, nodes: Sequence[Any], *, autoscaled: bool) -> Check:
    """Check one pool.

    Args:
        roles: whose pool it is, for the message.
        pool: the pool.
        nodes: the cluster's nodes (``V1Node``).
        autoscaled: whether nodes are added when pods wait for them; then a pool may have none now.
    """
    label, key = f"Pool {roles}", f"pools.{roles.split(', ')[0]}"
    wanted = " and ".join(_selection(pool)) or "any label"
    chosen = [node for node in nodes if selected(node, pool)]
    if not chosen:
        found = f"no node has {wanted}"
        if autoscaled:
            return Check(label, WARNING, found, f"right where the autoscaler adds some; else correct {key}")
        return Check(label, FAILED, found, f"label the nodes, or correct node_selector and affinity of {key}")
    open_ = [node for node in chosen if not repelling(node, pool.tolerations)]
    if not open_:
        taints = sorted({taint for node in chosen for taint in repelling(node, pool.tolerations)})
        found = f"every node with {wanted} keeps its pods away ({', '.join(taints)})"
        return Check(label, FAILED, found, f"add tolerations to {key}, or make the nodes ready")
    equipped = [node for node in open_ if not pool.gpus or _has(node, pool.gpu_resource) > 0]
    if not equipped:
        mend = f"install the device plugin there, or correct gpu_resource of {key}"
        return Check(label, FAILED, f"no node with {wanted} has {pool.gpu_resource}", mend)
    if not any(_fits(node, pool) for node in equipped):
        offered = "; ".join(sorted({_size(node, pool) for node in equipped})[:3])
        asked = _text(pool.gpus, pool.gpu_resource, amount(pool.cpu_request), amount(pool.memory_request))
        return Check(label, FAILED, f"no node is large enough for {asked}: they have {offered}", f"lower {key}")
    if pool.scratch and all(_has(node, "ephemeral-storage") < amount(pool.scratch) for node in equipped):
        largest = max(_has(node, "ephemeral-storage") for node in equipped) / GIB
        found = f"no node has {pool.scratch} of disk for scratch, but {largest:.0f} GiB at most"
        return Check(label, WARNING, found, f"give the nodes larger disks, or lower scratch of {key}")
    if not pool.gpus and (wasted := [node.metadata.name for node in open_ if _has(node, "nvidia.com/gpu") > 0]):
        found = f"steps without a GPU may land on GPU nodes ({', '.join(wasted[:3])})"
        return Check(label, WARNING, found, f"taint these nodes, or set node_selector of {key}")
    return Check(label, OK, f"{len(equipped)} nodes with {wanted}")


def selected(node: Any, pool: Pool) -> bool:
    """Whether a node has the labels that a pool asks for, and takes pods."""
    labels = node.metadata.labels or {}
    if node.spec.unschedulable:
        return False
    return all(labels.get(key) == value for key, value in pool.node_selector.items()) and all(
        _matches(labels, term) for term in pool.affinity
    )


def _matches(labels: dict[str, str], term: AffinityTerm) -> bool:
    value = labels.get(term.key)
    if term.operator == "Exists":
        return value is not None
    if term.operator == "DoesNotExist":
        return value is None
    if term.operator == "NotIn":
        return value not in term.values
    if value is None:
        return False
    if term.operator == "In":
        return value in term.values
    if not (value.isdecimal() and term.values[0].isdecimal()):
        return False
    number, bound = int(value), int(term.values[0])
    return number > bound if term.operator == "Gt" else number < bound


def repelling(node: Any, tolerations: Iterable[Toleration]) -> list[str]:
    """The taints of a node that keep pods with these tolerations away."""
    return [
        f"{taint.key}={taint.value}:{taint.effect}" if taint.value else f"{taint.key}:{taint.effect}"
        for taint in node.spec.taints or []
        if taint.effect != "PreferNoSchedule" and not any(_stands(each, taint) for each in tolerations)
    ]


def _stands(toleration: Toleration, taint: Any) -> bool:
    if toleration.effect not in (None, taint.effect) or toleration.key not in (None, taint.key):
        return False
    return toleration.operator == "Exists" or (toleration.value or "") == (taint.value or "")


def _has(node: Any, resource: str) -> float:
    from kubernetes.utils import parse_quantity

    return float(parse_quantity(((node.status and node.status.allocatable) or {}).get(resource, 0)))


def _fits(node: Any, pool: Pool) -> bool:
    return (
        _has(node, pool.gpu_resource) >= pool.gpus
        and _has(node, "cpu") >= amount(pool.cpu_request)
        and _has(node, "memory") >= amount(pool.memory_request)
    )


def _size(node: Any, pool: Pool) -> str:
    gpus = _has(node, pool.gpu_resource) if pool.gpus else 0
    return _text(gpus, pool.gpu_resource, _has(node, "cpu"), _has(node, "memory"))


def _text(gpus: float, resource: str, cpu: float, memory: float) -> str:
    return (f"{gpus:g} {resource}, " if gpus else "") + f"{cpu:g} CPU, {memory / GIB:.1f} GiB"


def _selection(pool: Pool) -> list[str]:
    terms = [f"{term.key} {term.operator} {' '.join(term.values)}".strip() for term in pool.affinity]
    return [*(f"{key}={value}" for key, value in pool.node_selector.items()), *terms]
