"""Tests on whatever cluster KUBECONFIG names; without one they are skipped.

They make namespaces and nodes of their own, and remove them again.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
import urllib3
from kubernetes import client, config

from tests.cluster.simulated import is_ready, simulate_node, wait_for

HOW_TO_SIMULATE = (
    "nothing plays simulated nodes: start KWOK with "
    "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake beside the cluster"
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow_cluster: waits for KServe's deadline of 600 s (make cluster-test-slow)")


@pytest.fixture(scope="session")
def core() -> client.CoreV1Api:
    """The cluster that KUBECONFIG names."""
    if "KUBECONFIG" not in os.environ:
        pytest.skip("KUBECONFIG names no cluster (docs/operations.md tells how to make one)")
    config.load_kube_config()
    api = client.CoreV1Api()
    try:
        api.list_namespace(limit=1, _request_timeout=10)
    except (client.ApiException, urllib3.exceptions.HTTPError) as error:
        pytest.skip(f"the cluster of KUBECONFIG={os.environ['KUBECONFIG']} does not answer: {error}")
    return api


@pytest.fixture
def namespace(core: client.CoreV1Api) -> Iterator[str]:
    """An empty namespace."""
    name = f"avrt-test-{uuid.uuid4().hex[:8]}"
    core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=name)))
    yield name
    core.delete_namespace(name)


@pytest.fixture(scope="session")
def simulated(core: client.CoreV1Api) -> None:
    """Skips where no simulated node comes up."""
    name = f"avrt-probe-{uuid.uuid4().hex[:8]}"
    simulate_node(core, name, {}, [client.V1Taint(key="probe", effect="NoSchedule")], {"cpu": "1", "pods": "1"})
    try:
        if not wait_for(lambda: is_ready(core.read_node(name)), 15):
            pytest.skip(HOW_TO_SIMULATE)
    finally:
        core.delete_node(name)
