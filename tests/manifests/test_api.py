"""The manifests on a real API server: what it takes, what it refuses, and who may do what.

Run against the cluster that KUBECONFIG names, which must have no namespace ``avrt`` of its own; skipped without one.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator

import pytest

from avrt_lib.cluster import credentials
from avrt_lib.errors import ConfigError, EnvironmentProblem
from scripts.manifest_policies import Build, Object, pods
from tests.manifests.conftest import Cluster

STORE = "avrt-store.avrt.svc.cluster.local:8333"
#: Kinds of operators that need not be there; their fields are checked by schemas (test_overlays).
OPTIONAL = {"Certificate", "Issuer", "ExternalSecret", "PodMonitor", "PrometheusRule"}
OVERLAYS = ("dev", "staging", "production", "test")


@pytest.fixture(scope="module")
def quota(cluster: Cluster) -> None:
    """The quota's status; a bare API server has no controller that fills it in, and refuses every pod until then."""
    if not cluster.has("-n", "kube-system", "lease", "kube-controller-manager"):
        quota = ("-n", "avrt", "resourcequota", "avrt")
        text = cluster.kubectl("get", *quota, "-o", "jsonpath={.spec.hard}").stdout
        status = {"hard": json.loads(text), "used": dict.fromkeys(json.loads(text), "0")}
        patch = json.dumps({"status": status})
        cluster.kubectl("patch", *quota, "--subresource=status", "--type=merge", "-p", patch)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_takes_the_overlay(cluster: Cluster, rendered: dict[str, Build], overlay: str) -> None:
    known = [d for d in rendered[overlay].objects if cluster.knows(d)]
    assert {d["kind"] for d in rendered[overlay].objects if not cluster.knows(d)} <= OPTIONAL
    result = cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", objects=known, check=False)
    mine = [d for d in known if d["kind"] != "Namespace" and d["kind"] != "ResourceQuota"]
    cluster.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", objects=mine)
    assert result.returncode == 0, result.stderr
    # Pod Security says what it thinks of a pod template in a warning.
    assert "Warning" not in result.stderr
    assert result.stdout.count("serverside-applied") == len(known)


@pytest.fixture(scope="module")
def permissions(cluster: Cluster, rendered: dict[str, Build]) -> Iterator[None]:
    """The accounts and roles of overlays/test."""
    kinds = {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    objects = [d for d in rendered["test"].objects if d["kind"] in kinds]
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", objects=objects)
    yield
    cluster.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", objects=objects)


def as_pod(document: Object) -> Object:
    """The pod that a controller would make of a workload."""
    spec = copy.deepcopy(document["spec"]["template"]["spec"])
    for claim in document["spec"].get("volumeClaimTemplates", []):
        name = claim["metadata"]["name"]
        spec.setdefault("volumes", []).append({"name": name, "persistentVolumeClaim": {"claimName": name}})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": document["metadata"]["name"], "namespace": document["metadata"]["namespace"]},
        "spec": spec,
    }


@pytest.mark.usefixtures("quota", "permissions")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pod_security_and_the_quota_let_every_pod_in(
    cluster: Cluster, rendered: dict[str, Build], overlay: str
) -> None:
    made = [as_pod(document) for document, _ in pods(rendered[overlay]) if document["kind"] != "ServingRuntime"]
    result = cluster.kubectl("create", "--dry-run=server", "-f", "-", objects=made, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("created (server dry run)") == len(made)


def changed(rendered: dict[str, Build], **values: object) -> Object:
    """MLflow's pod with other fields of its container."""
    (found,) = [d for d in rendered["test"].objects if d["kind"] == "Deployment"]
    pod = as_pod(found)
    pod["spec"]["containers"][0].update(values)
    return pod


@pytest.mark.usefixtures("quota", "permissions")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"securityContext": {"privileged": True}}, 'violates PodSecurity "restricted'),
        ({"securityContext": {}}, "allowPrivilegeEscalation != false"),
        ({"resources": {"requests": {"cpu": "100", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}}, "exceeded quota"),
        ({"resources": {}}, "failed quota: avrt: must specify"),
        (
            {
                "resources": {
                    "requests": {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "1"},
                    "limits": {"memory": "1Gi", "nvidia.com/gpu": "1"},
                }
            },
            "requests.nvidia.com/gpu=1",
        ),
    ],
)
def test_the_namespace_refuses(
    cluster: Cluster, rendered: dict[str, Build], values: dict[str, object], message: str
) -> None:
    pod = changed(rendered, **values)
    result = cluster.kubectl("create", "--dry-run=server", "-f", "-", objects=[pod], check=False)
    assert result.returncode != 0
    assert message in result.stderr


RUNS = "kubeflow:pipeline-runner"


@pytest.mark.usefixtures("permissions")
@pytest.mark.parametrize(
    ("account", "allowed", "what"),
    [
        *(
            (RUNS, True, f"{verb} inferenceservices.serving.kserve.io -n avrt")
            for verb in ("get", "list", "watch", "create", "patch", "update", "delete")
        ),
        (RUNS, False, "deletecollection inferenceservices.serving.kserve.io -n avrt"),
        (RUNS, False, "create inferenceservices.serving.kserve.io -n kubeflow"),
        (RUNS, True, "get servingruntimes.serving.kserve.io -n avrt"),
        (RUNS, False, "patch servingruntimes.serving.kserve.io -n avrt"),
        (RUNS, True, "get serviceaccounts -n avrt"),
        (RUNS, False, "create serviceaccounts --subresource=token -n avrt"),
        *((RUNS, True, f"{verb} leases.coordination.k8s.io -n avrt") for verb in ("get", "create", "update")),
        (RUNS, False, "delete leases.coordination.k8s.io -n avrt"),
        (RUNS, True, "list deployments.apps -n avrt"),
        (RUNS, True, "list replicasets.apps -n avrt"),
        (RUNS, False, "patch deployments.apps -n avrt"),
        (RUNS, True, "get pods -n avrt"),
        (RUNS, True, "get pods --subresource=log -n avrt"),
        (RUNS, False, "create pods --subresource=exec -n avrt"),
        (RUNS, False, "create pods -n avrt"),
        (RUNS, True, "list events -n avrt"),
        (RUNS, True, "list events -n kubeflow"),
        (RUNS, True, "list resourcequotas -n kubeflow"),
        (RUNS, True, "list resourcequotas -n avrt"),
        (RUNS, False, "get secrets -n avrt"),
        (RUNS, False, "get secrets/avrt-models-s3 -n avrt"),
        (RUNS, False, "create rolebindings.rbac.authorization.k8s.io -n avrt"),
        (RUNS, True, "list nodes"),
        (RUNS, False, "patch nodes"),
        (RUNS, False, "list pods -n default"),
        ("avrt:avrt-credentials", True, "create secrets -n avrt"),
        ("avrt:avrt-credentials", True, "create secrets -n kubeflow"),
        ("avrt:avrt-credentials", False, "create secrets -n default"),
        ("avrt:avrt-credentials", True, "get secrets/avrt-store -n kubeflow"),
        ("avrt:avrt-credentials", False, "get secrets/mlpipeline-minio-artifact -n kubeflow"),
        ("avrt:avrt-credentials", False, "get secrets/avrt-models-s3 -n kubeflow"),
        ("avrt:avrt-credentials", False, "list secrets -n avrt"),
        ("avrt:avrt-credentials", False, "update secrets/avrt-store -n avrt"),
        ("avrt:avrt-credentials", False, "delete secrets/avrt-store -n avrt"),
        ("avrt:avrt-credentials", False, "get pods -n avrt"),
        ("avrt:avrt-kserve-restricted", True, "patch clusterstoragecontainers.serving.kserve.io/default"),
        ("avrt:avrt-kserve-restricted", False, "patch clusterstoragecontainers.serving.kserve.io/other"),
        ("avrt:avrt-kserve-restricted", False, "create clusterstoragecontainers.serving.kserve.io"),
        ("avrt:avrt-kserve-restricted", False, "get secrets -n avrt"),
        *(
            (f"avrt:{account}", False, f"{verb} {what} -n avrt")
            for account in ("avrt-store", "avrt-mlflow", "avrt-models", "default")
            for verb, what in (
                ("get", "secrets/avrt-store"),
                ("list", "pods"),
                ("create", "inferenceservices.serving.kserve.io"),
            )
        ),
    ],
)
def test_accounts_may_do_what_they_must_and_no_more(cluster: Cluster, account: str, allowed: bool, what: str) -> None:
    who = f"system:serviceaccount:{account}"
    answer = cluster.kubectl("auth", "can-i", *what.split(), f"--as={who}", check=False)
    assert answer.stdout.strip() == ("yes" if allowed else "no"), answer.stderr


@pytest.fixture
def made(cluster: Cluster, permissions: None) -> Iterator[list[credentials.Credential]]:
    """Secrets under names of their own, which the Job's account may read only where the Role names them."""
    wanted = credentials.credentials(STORE)
    for credential in wanted:
        for namespace in ("avrt", "kubeflow"):
            if cluster.has("-n", namespace, "secret", credential.name):
                pytest.skip(f"there is a secret {namespace}/{credential.name} already")
    yield wanted
    for credential in wanted:
        for namespace in ("avrt", "kubeflow"):
            cluster.kubectl("-n", namespace, "delete", "secret", credential.name, "--ignore-not-found")


def job_client() -> object:
    """The API as the credentials' Job has it."""
    from kubernetes import client, config

    api = config.new_client_from_config()
    api.set_default_header("Impersonate-User", "system:serviceaccount:avrt:avrt-credentials")
    return client.CoreV1Api(api)


def value(cluster: Cluster, namespace: str, name: str, key: str) -> str:
    """A value of a secret."""
    path = key.replace(".", "\\.")
    text = cluster.kubectl("-n", namespace, "get", "secret", name, "-o", f"jsonpath={{.data.{path}}}").stdout
    return base64.b64decode(text).decode()


def test_credentials_are_made_once(cluster: Cluster, made: list[credentials.Credential]) -> None:
    api = job_client()
    first = credentials.ensure(api, made, "avrt", "kubeflow")
    assert len(first) == len(made) + sum(c.shared for c in made)
    assert value(cluster, "avrt", "avrt-store", "secret_key") == value(cluster, "kubeflow", "avrt-store", "secret_key")
    before = value(cluster, "avrt", "avrt-api-key", "api_key")
    assert credentials.ensure(api, made, "avrt", "kubeflow") == []
    assert value(cluster, "avrt", "avrt-api-key", "api_key") == before
    host = cluster.kubectl("-n", "avrt", "get", "secret", "avrt-models-s3", "-o", "jsonpath={.metadata.annotations}")
    assert f'"serving.kserve.io/s3-endpoint":"{STORE}"' in host.stdout


def test_a_secret_that_one_namespace_has_is_copied(cluster: Cluster, made: list[credentials.Credential]) -> None:
    cluster.kubectl("-n", "kubeflow", "create", "secret", "generic", "avrt-api-key", "--from-literal=api_key=mine")
    credentials.ensure(job_client(), made, "avrt", "kubeflow")
    assert value(cluster, "avrt", "avrt-api-key", "api_key") == "mine"


def test_a_secret_without_a_key_is_named(cluster: Cluster, made: list[credentials.Credential]) -> None:
    cluster.kubectl("-n", "avrt", "create", "secret", "generic", "avrt-store", "--from-literal=access_key=a")
    with pytest.raises(ConfigError, match=r"avrt/avrt-store has no secret_key: add it, or delete"):
        credentials.ensure(job_client(), made, "avrt", "kubeflow")


def test_secrets_that_differ_are_not_overwritten(cluster: Cluster, made: list[credentials.Credential]) -> None:
    for namespace in ("avrt", "kubeflow"):
        literal = f"--from-literal=api_key={namespace}"
        cluster.kubectl("-n", namespace, "create", "secret", "generic", "avrt-api-key", literal)
    with pytest.raises(ConfigError, match="avrt-api-key differs between avrt and kubeflow"):
        credentials.ensure(job_client(), made, "avrt", "kubeflow")
    assert value(cluster, "kubeflow", "avrt-api-key", "api_key") == "kubeflow"


def test_a_missing_namespace_is_named(made: list[credentials.Credential]) -> None:
    shared = [c for c in made if c.shared]
    with pytest.raises(EnvironmentProblem, match="nosuch/avrt-store cannot be read: 403"):
        credentials.ensure(job_client(), shared, "avrt", "nosuch")
