"""Rendered overlays, and the cluster that KUBECONFIG names."""

from __future__ import annotations

import base64
import copy
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import manifests
from scripts.manifest_policies import Build, Object, containers, pods, split_image

#: A namespace of ours that holds this label was made by these tests, and may be used and emptied by them.
MARK = "avrt/made-by-tests"


@pytest.fixture(scope="session")
def rendered() -> dict[str, Build]:
    """All builds by name."""
    manifests.install_tools()
    return {build.name: build for build in manifests.builds()}


def one(build: Build, kind: str, name: str, namespace: str | None = "avrt") -> Object:
    """The object of this name."""
    (found,) = [
        d
        for d in build.objects
        if (d["kind"], d["metadata"]["name"], d["metadata"].get("namespace")) == (kind, name, namespace)
    ]
    return found


def with_images(build: Build, references: dict[str, str]) -> Build:
    """The build with these references for its images, by name, whatever tags it has."""
    changed = copy.deepcopy(build)
    for _, pod in pods(changed):
        for container in containers(pod):
            container["image"] = references[split_image(container["image"])[0]]
    return changed


@dataclass
class Cluster:
    """kubectl on the cluster of KUBECONFIG."""

    kinds: set[tuple[str, str]] = field(default_factory=set)

    def kubectl(
        self, *arguments: str, objects: list[Object] | None = None, stdin: str | None = None, check: bool = True
    ) -> Any:
        """Run kubectl; ``objects``, or else ``stdin``, go to its standard input."""
        result = subprocess.run(
            [str(manifests.TOOLS / "bin" / "kubectl"), *arguments],
            input=yaml.safe_dump_all(objects) if objects else stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and result.returncode != 0:
            pytest.fail(f"kubectl {' '.join(arguments)}: {result.stderr.strip()}")
        return result

    def has(self, *arguments: str) -> bool:
        """Whether ``kubectl get`` finds it."""
        return self.kubectl("get", *arguments, check=False).returncode == 0

    def learn_kinds(self) -> None:
        """What kinds the API server knows."""
        self.kinds = set()
        for line in self.kubectl("api-resources", "--no-headers").stdout.splitlines():
            *_, version, _, kind = line.split()
            self.kinds.add((version, kind))

    def knows(self, document: Object) -> bool:
        """Whether the API server has this object's kind."""
        return (document["apiVersion"], document["kind"]) in self.kinds


@pytest.fixture(scope="session")
def cluster(rendered: dict[str, Build]) -> Iterator[Cluster]:
    """A cluster with a namespace ``avrt`` of these tests alone, KServe's definitions, and the runs' account."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    result = Cluster()
    if result.kubectl("get", "--raw", "/readyz", check=False).returncode != 0:
        pytest.skip("the cluster of KUBECONFIG does not answer")
    found = result.kubectl("get", "namespace", "avrt", "--ignore-not-found", "-o", "json").stdout
    if found and MARK not in json.loads(found)["metadata"].get("labels", {}):
        pytest.skip("the cluster has a namespace avrt, which these tests would change: use an empty cluster")
    made_kubeflow = not result.has("namespace", "kubeflow")
    _install_definitions(result)
    result.learn_kinds()
    guards = [d for d in rendered["test"].objects if d["kind"] in ("Namespace", "ResourceQuota")]
    names = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kubeflow"}}] if made_kubeflow else []
    result.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", objects=names + guards)
    result.kubectl("label", "--overwrite", "namespace", "avrt", f"{MARK}=true")
    if not result.has("-n", "kubeflow", "serviceaccount", "pipeline-runner"):
        result.kubectl("-n", "kubeflow", "create", "serviceaccount", "pipeline-runner")
    yield result
    # Without a controller manager a namespace would hang in Terminating: it stays then, marked as ours.
    if result.has("-n", "kube-system", "lease", "kube-controller-manager"):
        result.kubectl("delete", "namespace", "avrt", "--wait=false")
        if made_kubeflow:
            result.kubectl("delete", "namespace", "kubeflow", "--wait=false")


@pytest.fixture(scope="module")
def running(cluster: Cluster, rendered: dict[str, Build]) -> Iterator[Cluster]:
    """overlays/test, applied and ready; for each module anew, since others use the same names for their own secrets."""
    if "True" not in cluster.kubectl("get", "nodes", "-o", "jsonpath={..conditions[-1:].status}").stdout:
        pytest.skip("the cluster has no node that is ready")
    listed = manifests.ROOT / "build" / "images.json"
    if not listed.exists():
        pytest.skip("no images: make images, and bring them to the node")
    built = json.loads(listed.read_text(encoding="utf-8"))["images"]
    objects = with_images(rendered["test"], {image["name"]: image["reference"] for image in built.values()}).objects
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", objects=objects)
    try:
        for what in ("statefulset/avrt-store", "deployment/avrt-mlflow"):
            for _ in range(6):
                done = cluster.kubectl("-n", "avrt", "rollout", "status", what, "--timeout=100s", check=False)
                if done.returncode == 0:
                    break
            assert done.returncode == 0, cluster.kubectl("-n", "avrt", "get", "pods,events").stdout
        yield cluster
    finally:
        mine = [d for d in objects if d["kind"] not in ("Namespace", "ResourceQuota")]
        cluster.kubectl("delete", "--ignore-not-found", "--timeout=100s", "-f", "-", objects=mine)


def secret(cluster: Cluster, name: str) -> dict[str, str]:
    """A secret's values, in the order of its keys."""
    data = json.loads(cluster.kubectl("-n", "avrt", "get", "secret", name, "-o", "json").stdout)["data"]
    return {key: base64.b64decode(data[key]).decode() for key in sorted(data)}


#: Definitions that a cluster may lack; the objects of these kinds are then only stored.
DEFINITIONS = (
    "serving.kserve.io_servingruntimes",
    "serving.kserve.io_inferenceservices",
    "serving.kserve.io_clusterstoragecontainers",
    "serving.kserve.io_llminferenceservices",
    "serving.kserve.io_localmodelnodegroups",
    "serving.kserve.io_localmodelnamespacecaches",
    "keda.sh_scaledobjects",
    "argoproj.io_appprojects",
    "argoproj.io_applications",
)


def _install_definitions(cluster: Cluster) -> None:
    default = manifests.ROOT.parent / "shared" / "crds"
    folders = os.environ.get("AVRT_CRD_DIR", str(default) if default.is_dir() else "")
    for folder in filter(None, folders.split(os.pathsep)):
        for definition in DEFINITIONS:
            group, _, plural = definition.partition("_")
            path = Path(folder) / f"{definition}.yaml"
            if path.exists() and not cluster.has("crd", f"{plural}.{group}"):
                cluster.kubectl("apply", "--server-side", "-f", str(path))
                _wait_until_established(cluster, f"{plural}.{group}")


def _wait_until_established(cluster: Cluster, name: str) -> None:
    # `kubectl wait` fails at once on a definition that has no conditions yet.
    path = '{.status.conditions[?(@.type=="Established")].status}'
    deadline = time.monotonic() + 120
    while cluster.kubectl("get", "crd", name, "-o", f"jsonpath={path}", check=False).stdout != "True":
        assert time.monotonic() < deadline, f"{name} is not established"
        time.sleep(0.5)
