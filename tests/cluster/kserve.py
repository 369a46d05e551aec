"""A namespace with a stand-in for vLLM behind KServe, and a store with stand-in models. No model is served."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, utils
from minio import Minio

from avrt_lib.child_servers import ChildServer
from avrt_lib.serving.cluster import Cluster
from avrt_lib.serving.inference_service import State, Status, status

IMAGE = "AVRT_STANDIN_IMAGE"
BUCKET, KEY, SECRET, API_KEY = "avrt", "STANDINKEY", "standin-secret", "standin-api-key"
GROUP = ("serving.kserve.io", "v1beta1")
RUNTIME = "standin"


def standin_image() -> str:
    """The image of tests/cluster/standin; skips where none is named."""
    if IMAGE not in os.environ:
        pytest.skip(f"{IMAGE} names no image of tests/cluster/standin (docs/serving.md tells how to build it)")
    return os.environ[IMAGE]


def require_kserve() -> None:
    """Skips where the cluster has no KServe that answers."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is needed to reach services of the cluster")
    probe = {
        "apiVersion": "/".join(GROUP),
        "kind": "InferenceService",
        "metadata": {"name": "probe"},
        "spec": {"predictor": {"model": {"modelFormat": {"name": "standin"}, "storageUri": "s3://avrt/probe"}}},
    }
    try:
        client.CustomObjectsApi().create_namespaced_custom_object(
            *GROUP, "default", "inferenceservices", probe, dry_run="All"
        )
    except client.ApiException as error:
        pytest.skip(f"the cluster has no KServe that answers: {error.status} {' '.join(str(error.body).split())[:200]}")


class Place:
    """A namespace with the store, the runtime and the accounts that the tests need.

    Attributes:
        namespace: its name, short: KServe makes host names of it.
        cluster: what is tested, for this namespace.
    """

    def __init__(self, core: client.CoreV1Api, labels: dict[str, str] | None = None) -> None:
        self.core = core
        self.namespace = f"avrt-{uuid.uuid4().hex[:6]}"
        core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=self.namespace, labels=labels)))
        self.cluster = Cluster(self.namespace)
        self._objects = client.CustomObjectsApi()

    def remove(self) -> None:
        """Delete it; the InferenceServices first, while KServe's controller still takes their finalizers off."""
        self._objects.delete_collection_namespaced_custom_object(*GROUP, self.namespace, "inferenceservices")
        self.core.delete_namespace(self.namespace)

    def apply(self, *documents: dict[str, Any]) -> None:
        """Make objects of the core and of KServe."""
        for document in documents:
            group, _, version = document["apiVersion"].rpartition("/")
            if group == GROUP[0]:
                plural = document["kind"].lower() + "s"
                self._objects.create_namespaced_custom_object(group, version, self.namespace, plural, document)
            else:
                utils.create_from_dict(client.ApiClient(), document, namespace=self.namespace)

    def set(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change an InferenceService."""
        for _ in range(20):
            service = self.cluster.service(name)
            assert service is not None
            change(service)
            try:
                self._objects.replace_namespaced_custom_object(
                    *GROUP, self.namespace, "inferenceservices", name, service
                )
            except client.ApiException as error:
                if error.status != 409:
                    raise
                continue
            return
        raise AssertionError("the object is changed all the time")

    def until(self, name: str, wanted: Callable[[Status], bool], timeout_s: float, uri: str | None = None) -> Status:
        """Wait for an answer; gives the last one, whatever it is."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = status(self.cluster, name, uri)
            if wanted(found) or time.monotonic() > deadline:
                return found
            time.sleep(1.0)


def uri(model: str) -> str:
    """The address of a stand-in model."""
    return f"s3://{BUCKET}/models/{model}"


def isvc(name: str, model: str = "v1", **more: Any) -> dict[str, Any]:
    """An InferenceService of the stand-in.

    Args:
        name: its name.
        model: a stand-in model, or an address.
        more: ``annotations``; the rest goes into the predictor, and there ``model`` is merged.
    """
    spec: dict[str, Any] = {
        "runtime": RUNTIME,
        "modelFormat": {"name": "standin"},
        "storageUri": model if "://" in model else uri(model),
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
    }
    annotations = {"serving.kserve.io/deploymentMode": "Standard", "serving.kserve.io/autoscalerClass": "none"}
    annotations |= more.pop("annotations", {})
    spec |= more.pop("model_spec", {})
    predictor = {"serviceAccountName": "models", "minReplicas": 1, "maxReplicas": 1, "model": spec, **more}
    return {
        "apiVersion": "/".join(GROUP),
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"predictor": predictor},
    }


def runtime(name: str = RUNTIME, **container: Any) -> dict[str, Any]:
    """A ServingRuntime of the stand-in; shaped as manifests/base/serving-runtime.yaml."""
    made: dict[str, Any] = {
        "name": "kserve-container",
        "image": os.environ.get(IMAGE, ""),
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "/app/server.py"],
        "args": ["--model=/mnt/models", "--served-model-name={{.Name}}", "--port=8080"],
        "env": [{"name": "AVRT_API_KEY", "value": API_KEY}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [{"name": "http1", "containerPort": 8080, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8080}, "periodSeconds": 1},
        # The Service forgets the pod before the server ends.
        "lifecycle": {"preStop": {"sleep": {"seconds": 3}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **container,
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": name},
        "spec": {
            "supportedModelFormats": [{"name": name, "version": "1"} for name in ("standin", "vLLM")],
            "protocolVersions": ["v2", "v1"],
            "containers": [made],
        },
    }


def account(name: str, secret: str | None) -> dict[str, Any]:
    """A ServiceAccount that fetches models with a secret."""
    secrets = [{"name": secret}] if secret else []
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}, "secrets": secrets}


def credentials(name: str, endpoint: str, key: str = KEY, secret: str = SECRET) -> dict[str, Any]:
    """A secret for KServe's download."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "annotations": {
                "serving.kserve.io/s3-endpoint": endpoint,
                "serving.kserve.io/s3-usehttps": "0",
                "serving.kserve.io/s3-region": "us-east-1",
                "serving.kserve.io/s3-useanoncredential": "false",
            },
        },
        "stringData": {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret},
    }


def store() -> list[dict[str, Any]]:
    """SeaweedFS in a pod, without a volume."""
    actions = ["Admin", "Read", "Write", "List"]
    identities = [{"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": actions}]
    labels = {"app": "store"}
    command = ["weed", "mini", "-dir=/data", "-ip=127.0.0.1", "-ip.bind=0.0.0.0", f"-bucket={BUCKET}", "-disableHttp"]
    command += ["-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.config=/config/s3.json"]
    command += ["-s3.port=8333", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    container = {
        "name": "store",
        "image": standin_image(),
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "env": [{"name": "GOMEMLIMIT", "value": "256MiB"}],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8333}, "periodSeconds": 1},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "config", "mountPath": "/config"}],
    }
    volumes = [{"name": "data", "emptyDir": {}}, {"name": "config", "secret": {"secretName": "store"}}]
    spec = {"containers": [container], "volumes": volumes, "securityContext": {"fsGroup": 1000}}
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "store"},
            "stringData": {"s3.json": json.dumps({"identities": identities})},
        },
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "store", "labels": labels}, "spec": spec},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "store"},
            "spec": {"selector": labels, "ports": [{"port": 8333}]},
        },
    ]


@contextmanager
def forwarded(namespace: str, target: str, port: int) -> Iterator[str]:
    """A loopback address of something in the cluster."""
    command = ["kubectl", "port-forward", f"--namespace={namespace}", target, f":{port}"]
    with tempfile.TemporaryDirectory() as folder:
        child = ChildServer(command, os.environ, Path(folder) / "log")
        try:
            deadline = time.monotonic() + 30
            while not (heard := re.search(r"127\.0\.0\.1:(\d+)", child.tail())):
                assert child.returncode is None, child.tail()
                assert time.monotonic() < deadline, child.tail()
                time.sleep(0.2)
            yield f"127.0.0.1:{heard[1]}"
        finally:
            child.stop(5)


def publish(place: Place, models: dict[str, dict[str, Any]]) -> None:
    """Put stand-in models into the store."""
    with forwarded(place.namespace, "pod/store", 8333) as endpoint:
        minio = Minio(endpoint, KEY, SECRET, secure=False, region="us-east-1")
        for name, model in models.items():
            data = json.dumps({"version": name, **model}).encode()
            minio.put_object(BUCKET, f"models/{name}/standin.json", io.BytesIO(data), len(data))


@contextmanager
def standins(core: client.CoreV1Api, models: dict[str, dict[str, Any]]) -> Iterator[Place]:
    """A namespace in which the stand-in can be served."""
    standin_image()
    require_kserve()
    place = Place(core)
    try:
        endpoint = f"store.{place.namespace}.svc.cluster.local:8333"
        place.apply(*store(), credentials("models-s3", endpoint), account("models", "models-s3"), runtime())
        ready = ["kubectl", "wait", "--for=condition=Ready", "pod/store", f"--namespace={place.namespace}"]
        subprocess.run([*ready, "--timeout=90s"], check=True, capture_output=True)
        publish(place, models)
        yield place
    finally:
        place.remove()


class Prober:
    """Asks the champion's Service all the time, from a pod of tests/cluster/standin/prober.py.

    Args:
        namespace: the champion's.
        name: the champion.
        url: the address to ask in the Service's place.
        image: with Python.
        command: runs the script.
        options: of the script, after the address and the model.
        key: the API key as an environment variable of the pod, without its name.
        pod: merged into the pod's specification.
        container: merged into its container.
    """

    def __init__(
        self,
        core: client.CoreV1Api,
        namespace: str,
        name: str,
        *,
        image: str,
        url: str | None = None,
        command: Sequence[str] = ("python3", "/app/prober.py"),
        options: Sequence[str] = (),
        key: Mapping[str, Any] | None = None,
        pod: Mapping[str, Any] | None = None,
        container: Mapping[str, Any] | None = None,
    ) -> None:
        self._core, self._namespace, self._pod = core, namespace, f"prober-{uuid.uuid4().hex[:6]}"
        url = url or f"http://{name}-predictor.{namespace}.svc.cluster.local"
        made = {
            "name": "prober",
            "image": image,
            "imagePullPolicy": "IfNotPresent",
            "command": [*command, f"{url}/v1/chat/completions", name, *options],
            "env": [{"name": "AVRT_API_KEY", **(key or {"value": API_KEY})}],
            **(container or {}),
        }
        # Started anew it would have forgotten what failed.
        spec = {"containers": [made], "restartPolicy": "Never", "terminationGracePeriodSeconds": 0, **(pod or {})}
        core.create_namespaced_pod(namespace, {"metadata": {"name": self._pod}, "spec": spec})
        # A Service that has just been made may not be routed yet: what counts begins with the first answer.
        self._before = 0
        deadline = time.monotonic() + 60
        while not (counted := self.counted())["answers"]:
            assert time.monotonic() < deadline, counted
            time.sleep(0.5)
        self._before = len(counted["failures"])

    def counted(self) -> dict[str, Any]:
        """What it has counted so far: ``answers`` by text, ``failures``, ``order`` of the texts."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                # The client would turn a line of JSON into Python's notation.
                answer = self._core.read_namespaced_pod_log(
                    self._pod, self._namespace, tail_lines=1, _preload_content=False
                )
                lines = answer.data.decode()
            except client.ApiException:
                lines = ""
            if lines.strip():
                counted: dict[str, Any] = json.loads(lines)
                counted["failures"] = counted["failures"][self._before :]
                return counted
            time.sleep(0.5)
        raise AssertionError("the prober does not come up")

    def versions(self) -> list[str]:
        """The models that have answered, in their order."""
        time.sleep(1.5)
        return [
            found[1] if (found := re.search("<think>(.*)</think>", text)) else text for text in self.counted()["order"]
        ]

    def remove(self) -> None:
        self._core.delete_namespaced_pod(self._pod, self._namespace)


def is_serving(found: Status) -> bool:
    return found.state is State.SERVING
