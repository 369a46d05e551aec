"""Nodes that nobody has: KWOK plays them, and the scheduler takes them for real."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from kubernetes import client

from avrt_lib.cluster.profile import AffinityTerm, Pool, Profile, amount
from avrt_lib.preflight.nodes import repelling, selected

#: Annotation of the nodes that KWOK plays.
FAKE = "kwok.x-k8s.io/node"
GPUS_OF_A_NODE = 8
NODE = {"cpu": "192", "memory": "2Ti", "ephemeral-storage": "28Ti", "pods": "110"}


def wait_for(done: Callable[[], bool], seconds: float) -> bool:
    """Whether something comes true in time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def simulate_node(
    core: client.CoreV1Api, name: str, labels: dict[str, str], taints: list[client.V1Taint], has: dict[str, str]
) -> None:
    """Make a node that KWOK plays, with resources that nobody has."""
    core.create_node(
        client.V1Node(
            metadata=client.V1ObjectMeta(name=name, labels=labels, annotations={FAKE: "fake"}),
            spec=client.V1NodeSpec(taints=taints),
        )
    )
    core.patch_node_status(name, {"status": {"capacity": has, "allocatable": has}})


def is_ready(node: client.V1Node) -> bool:
    """Whether the node takes pods."""
    return any(each.type == "Ready" and each.status == "True" for each in node.status.conditions or [])


class Nodes:
    """Simulated nodes of a profile's pools; pools that choose alike share theirs.

    Args:
        core: the cluster.
        profile: whose pools.
        run: part of the nodes' names.
    """

    def __init__(self, core: client.CoreV1Api, profile: Profile, run: str) -> None:
        self.core, self.profile, self.run = core, profile, run
        self.made: list[str] = []

    def group(self, role: str) -> str:
        """The name of the nodes of a role: of the first role that chooses them in the same way."""
        wanted = _choice(self.profile.pools[role])  # type: ignore[index]
        return next(other for other, pool in self.profile.pools.items() if _choice(pool) == wanted)

    def make(self, needed: dict[str, list[Pool]], leave_out: str | None = None) -> None:
        """Make as many nodes as the pods of each group need.

        Args:
            needed: the pool of each pod, by group.
            leave_out: a group that gets none.
        """
        for group, pools in needed.items():
            if group == leave_out:
                continue
            has = {**NODE, **{pool.gpu_resource: str(GPUS_OF_A_NODE) for pool in pools if pool.gpus}}
            # Pods that fill a node are made first; the others share what is left.
            whole = sum(pool.gpus == GPUS_OF_A_NODE for pool in pools)
            shared = [pool for pool in pools if pool.gpus < GPUS_OF_A_NODE]
            loads = (
                sum(pool.gpus for pool in shared) / GPUS_OF_A_NODE,
                sum(amount(pool.cpu_request) for pool in shared) / amount(NODE["cpu"]),
                sum(amount(pool.memory_request) for pool in shared) / amount(NODE["memory"]),
                len(shared) / int(NODE["pods"]),
            )
            for number in range(whole + math.ceil(max(loads)) + 1):
                name = f"{self.run}-{group}-{number}"
                simulate_node(self.core, name, _labels(pools[0]), _taints(pools[0]), has)
                self.made.append(name)
        assert wait_for(lambda: all(is_ready(self.core.read_node(name)) for name in self.made), 60)

    def allowed(self, role: str) -> set[str]:
        """Where pods of a role may be: on the group's nodes, and on nodes of the cluster that the pool chooses too."""
        pool = self.profile.pools[role]  # type: ignore[index]
        return {
            node.metadata.name
            for node in self.core.list_node().items
            if (
                node.metadata.name.startswith(f"{self.run}-{self.group(role)}-")
                if node.metadata.name in self.made
                else selected(node, pool) and not repelling(node, pool.tolerations)
            )
        }

    def remove(self) -> None:
        for name in self.made:
            self.core.delete_node(name)


def _choice(pool: Pool) -> str:
    return pool.model_dump_json(include={"node_selector", "affinity", "tolerations"})


def _labels(pool: Pool) -> dict[str, str]:
    return {**pool.node_selector, **{term.key: _value(term) for term in pool.affinity if term.operator != "NotIn"}}


def _value(term: AffinityTerm) -> str:
    if term.operator in ("Gt", "Lt"):
        return str(int(term.values[0]) + (1 if term.operator == "Gt" else -1))
    return term.values[0] if term.values else "present"


def _taints(pool: Pool) -> list[client.V1Taint]:
    return [
        client.V1Taint(key=each.key, value=each.value or "present", effect=each.effect or "NoSchedule")
        for each in pool.tolerations
        if each.key
    ]
