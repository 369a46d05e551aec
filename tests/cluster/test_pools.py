"""Every pod of a run lands on its own pool's nodes: the scheduler decides, over simulated nodes of all pools.

The pods are made of the compiled pipeline (``executor_pods``), the nodes of what the profile says of its pools.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client

from avrt_lib.cluster.profile import Profile, role_of
from tests.cluster.executor_pods import EXECUTOR_LABEL, pods, steps
from tests.cluster.simulated import Nodes, wait_for
from tests.golden.compiled import PROFILES, Case, compile_case, profile_of, read

SHARDS = 64

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("simulated")]


@pytest.fixture
def run() -> str:
    return f"run-{uuid.uuid4().hex[:6]}"


@pytest.fixture
def nodes(core: client.CoreV1Api, request: pytest.FixtureRequest, run: str) -> Iterator[Nodes]:
    found = Nodes(core, profile_of(request.getfixturevalue("profile")), run)
    yield found
    found.remove()


def claims(core: client.CoreV1Api, namespace: str, profile: Profile) -> list[str]:
    """Bound claims of the profile's volumes, without a storage class."""
    made = []
    for volume in profile.volumes:
        name = f"{namespace}-{volume.claim}"
        size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
        core.create_persistent_volume(
            client.V1PersistentVolume(
                metadata=client.V1ObjectMeta(name=name),
                spec=client.V1PersistentVolumeSpec(
                    capacity=size,
                    access_modes=modes,
                    host_path=client.V1HostPathVolumeSource(path="/nonexistent"),
                    claim_ref=client.V1ObjectReference(namespace=namespace, name=volume.claim),
                    storage_class_name="",
                ),
            )
        )
        made.append(name)
        core.create_namespaced_persistent_volume_claim(
            namespace,
            client.V1PersistentVolumeClaim(
                metadata=client.V1ObjectMeta(name=volume.claim),
                spec=client.V1PersistentVolumeClaimSpec(
                    access_modes=modes,
                    resources=client.V1VolumeResourceRequirements(requests=size),
                    volume_name=name,
                    storage_class_name="",
                ),
            ),
        )
    return made


def schedule(core: client.CoreV1Api, namespace: str, profile: Profile, made: list[client.V1Pod]) -> list[str]:
    """Create pods, those that fill a node first, and return the volumes that were made for them."""
    assert wait_for(lambda: bool(core.list_namespaced_service_account(namespace).items), 30)
    volumes = claims(core, namespace, profile)
    # A pod whose claim is not bound yet steps back, and pods made after it take the node that it would have filled.
    assert wait_for(lambda: all(map(_bound, core.list_namespaced_persistent_volume_claim(namespace).items)), 60)
    by_size = sorted(made, key=lambda pod: -max(map(int, _gpus(pod).values()), default=0))
    for pod in by_size:
        core.create_namespaced_pod(namespace, pod)
    return volumes


def _bound(claim: client.V1PersistentVolumeClaim) -> bool:
    return bool(claim.status.phase == "Bound")


def _gpus(pod: client.V1Pod) -> dict[str, str]:
    limits = pod.spec.containers[0].resources.limits or {}
    return {name: count for name, count in limits.items() if "/" in name}


def clean(core: client.CoreV1Api, namespace: str, volumes: list[str]) -> None:
    core.delete_collection_namespaced_pod(namespace, grace_period_seconds=0)
    for name in volumes:
        core.delete_persistent_volume(name)


@pytest.mark.parametrize("profile", PROFILES)
def test_each_pod_lands_on_its_own_pool(
    core: client.CoreV1Api, namespace: str, nodes: Nodes, profile: str, run: str, tmp_path: Path
) -> None:
    settings = {"teachers.shards": SHARDS, "teachers.parallelism": SHARDS}
    compile_case(Case(profile, "miniature"), tmp_path / "pipeline.yaml", **settings)
    compiled = read((tmp_path / "pipeline.yaml").read_bytes())
    made, step = list(pods(compiled, run)), steps(compiled)
    roles = {pod.metadata.name: role_of(step[pod.metadata.labels[EXECUTOR_LABEL]]) for pod in made}
    assert sum(role == "teacher" for role in roles.values()) == 2 * SHARDS
    assert set(step.values()) >= {"preflight", "merger", "sft", "grpo", "evaluation", "deployment", "run_summary"}
    needed = defaultdict(list)
    for role in roles.values():
        needed[nodes.group(role)].append(nodes.profile.pools[role])
    nodes.make(needed)
    volumes = schedule(core, namespace, nodes.profile, made)
    try:
        assert wait_for(lambda: all(pod.spec.node_name for pod in core.list_namespaced_pod(namespace).items), 120), (
            _waiting(core, namespace)
        )
        landed = {pod.metadata.name: pod.spec.node_name for pod in core.list_namespaced_pod(namespace).items}
    finally:
        clean(core, namespace, volumes)
    assert landed.keys() == roles.keys()
    allowed = {role: nodes.allowed(role) for role in set(roles.values())}
    elsewhere = {name: node for name, node in landed.items() if node not in allowed[roles[name]]}
    assert not elsewhere
    with_gpus = {
        node.metadata.name for node in core.list_node().items if node.metadata.name in nodes.made and _has_gpu(node)
    }
    assert not {name for name, node in landed.items() if roles[name] == "cpu" and node in with_gpus}


def _has_gpu(node: client.V1Node) -> bool:
    return any("/" in resource for resource in node.status.allocatable)


def _waiting(core: client.CoreV1Api, namespace: str) -> str:
    """Why the first pods wait, in the scheduler's words."""
    found = []
    for pod in core.list_namespaced_pod(namespace).items:
        if not pod.spec.node_name:
            reasons = [each.message for each in pod.status.conditions or [] if each.type == "PodScheduled"]
            found.append(f"{pod.metadata.name}: {reasons}")
    return "\n".join(found[:5])


@pytest.mark.parametrize(("profile", "role"), [("gke", "training"), ("eks", "teacher"), ("onprem-h100", "cpu")])
def test_pods_of_a_pool_without_nodes_wait_and_go_nowhere_else(
    core: client.CoreV1Api, namespace: str, nodes: Nodes, profile: str, role: str, run: str, tmp_path: Path
) -> None:
    compile_case(Case(profile, "miniature"), tmp_path / "pipeline.yaml", **{"teachers.shards": 1})
    compiled = read((tmp_path / "pipeline.yaml").read_bytes())
    made, step = list(pods(compiled, run)), steps(compiled)
    roles = {pod.metadata.name: role_of(step[pod.metadata.labels[EXECUTOR_LABEL]]) for pod in made}
    needed = defaultdict(list)
    for each in roles.values():
        needed[nodes.group(each)].append(nodes.profile.pools[each])
    nodes.make(needed, leave_out=nodes.group(role))
    waiting = {name for name, each in roles.items() if nodes.group(each) == nodes.group(role)}
    volumes = schedule(core, namespace, nodes.profile, made)

    def unscheduled() -> set[str]:
        return {pod.metadata.name for pod in core.list_namespaced_pod(namespace).items if _refused(pod)}

    try:
        assert wait_for(lambda: unscheduled() == waiting, 60), (unscheduled(), waiting)
        placed = {pod.metadata.name for pod in core.list_namespaced_pod(namespace).items if pod.spec.node_name}
    finally:
        clean(core, namespace, volumes)
    assert placed == roles.keys() - waiting


def _refused(pod: client.V1Pod) -> bool:
    return any(each.type == "PodScheduled" and each.reason == "Unschedulable" for each in pod.status.conditions or [])
