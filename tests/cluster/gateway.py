"""HTTPRoutes for the tests, and the stand-in for a Gateway (standin/gateway.py) that takes them up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, utils

from avrt_lib.serving.cluster import Document
from tests.cluster.simulated import wait_for
from tests.kubeconfig import account_token

STANDIN = Path(__file__).parent / "standin" / "gateway.py"
RBAC = Path(__file__).parents[2] / "manifests" / "base" / "rbac.yaml"
GROUP = ("gateway.networking.k8s.io", "v1")
ROUTE = "users"
_ACCOUNT = "gateway"


def has_routes() -> bool:
    """Whether the API server knows HTTPRoutes."""
    try:
        client.CustomObjectsApi().list_cluster_custom_object(*GROUP, "httproutes")
    except client.ApiException:
        return False
    return True


@contextmanager
def routes() -> Iterator[None]:
    """HTTPRoutes on a cluster. Where it has no Gateway API, by a definition that checks nothing, removed afterwards."""
    definitions, name = client.ApiextensionsV1Api(), f"httproutes.{GROUP[0]}"
    if has_routes():
        yield
        return
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": GROUP[1],
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": anything, "status": anything}}},
        "subresources": {"status": {}},
    }
    # The API server wants an approval for groups of kubernetes' own.
    approval = {"api-approved.kubernetes.io": "unapproved, a definition for tests"}
    utils.create_from_dict(
        client.ApiClient(),
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": name, "annotations": approval},
            "spec": {
                "group": GROUP[0],
                "scope": "Namespaced",
                "names": {"plural": "httproutes", "singular": "httproute", "kind": "HTTPRoute"},
                "versions": [version],
            },
        },
    )
    try:
        assert wait_for(has_routes, 30)
        yield
    finally:
        definitions.delete_custom_resource_definition(name)


def make_route(namespace: str, champion: str, **more: Any) -> None:
    """A route to a champion; shaped as manifests/components/gateway-api."""
    reference = {"group": "", "kind": "Service", "name": f"{champion}-predictor", "port": 80, "weight": 100}
    matches = [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    route = {
        "apiVersion": "/".join(GROUP),
        "kind": "HTTPRoute",
        "metadata": {"name": ROUTE},
        "spec": {
            "parentRefs": [{"group": GROUP[0], "kind": "Gateway", "name": "standin"}],
            "rules": [{"matches": matches, "backendRefs": [reference]}],
            **more,
        },
    }
    client.CustomObjectsApi().create_namespaced_custom_object(*GROUP, namespace, "httproutes", route)


def weights(namespace: str) -> dict[str, int]:
    """The weights of the route's first rule, by Service."""
    route = client.CustomObjectsApi().get_namespaced_custom_object(*GROUP, namespace, "httproutes", ROUTE)
    return {ref["name"]: ref["weight"] for ref in route["spec"]["rules"][0]["backendRefs"]}


def allow(namespace: str, account: str, rules: list[Document]) -> None:
    """A service account with a role of its own."""
    metadata = {"name": account}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account}
    rights = client.RbacAuthorizationV1Api()
    client.CoreV1Api().create_namespaced_service_account(namespace, {"metadata": metadata})
    rights.create_namespaced_role(namespace, {"metadata": metadata, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    binding = {"metadata": metadata, "roleRef": reference, "subjects": [subject]}
    rights.create_namespaced_role_binding(namespace, binding)


def deployer_rules() -> list[Document]:
    """What manifests/base gives to whoever rolls out."""
    for document in yaml.safe_load_all(RBAC.read_text(encoding="utf-8")):
        if (document["kind"], document["metadata"]["name"]) == ("Role", "avrt-deployer"):
            rules: list[Document] = document["rules"]
            return rules
    raise AssertionError("manifests/base has no Role avrt-deployer")


def _gateway_account(namespace: str) -> None:
    rules = [
        {"apiGroups": [GROUP[0]], "resources": ["httproutes"], "verbs": ["get"]},
        {"apiGroups": [GROUP[0]], "resources": ["httproutes/status"], "verbs": ["patch"]},
        {"apiGroups": [""], "resources": ["services"], "verbs": ["get"]},
    ]
    allow(namespace, _ACCOUNT, rules)


@contextmanager
def gateway_process(namespace: str, folder: Path) -> Iterator[None]:
    """The stand-in beside the cluster: it takes the route up; nobody sends it requests."""
    _gateway_account(namespace)
    (folder / "token").write_text(account_token(namespace, _ACCOUNT), encoding="utf-8")
    settings = client.Configuration.get_default_copy()
    line = [sys.executable, str(STANDIN), ROUTE, f"--namespace={namespace}", f"--api={settings.host}", "--port=0"]
    line += [f"--token={folder / 'token'}", f"--ca={settings.ssl_ca_cert}"]
    with subprocess.Popen(line) as process:
        try:
            yield
        finally:
            process.kill()


def gateway_pod(core: client.CoreV1Api, namespace: str, image: str) -> str:
    """The stand-in in the cluster.

    Returns:
        Its address there.
    """
    _gateway_account(namespace)
    core.create_namespaced_config_map(
        namespace, {"metadata": {"name": "gateway"}, "data": {"gateway.py": STANDIN.read_text(encoding="utf-8")}}
    )
    labels = {"app": "gateway"}
    container = {
        "name": "gateway",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-u", "/gateway/gateway.py", ROUTE, "--host=0.0.0.0"],
        "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
        "volumeMounts": [{"name": "script", "mountPath": "/gateway"}],
    }
    spec = {
        "serviceAccountName": _ACCOUNT,
        "containers": [container],
        "volumes": [{"name": "script", "configMap": {"name": "gateway"}}],
        "terminationGracePeriodSeconds": 0,
    }
    core.create_namespaced_pod(namespace, {"metadata": {"name": "gateway", "labels": labels}, "spec": spec})
    service = {"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]}
    core.create_namespaced_service(namespace, {"metadata": {"name": "gateway"}, "spec": service})
    return f"http://gateway.{namespace}.svc.cluster.local"
