"""Each policy refuses what it is for, and takes what is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from avrt_lib.preflight.objects import MAKES_SECRETS
from scripts import manifest_policies as policies
from scripts.manifest_policies import Build, Object

Change = Callable[[dict[str, Any]], Any]


def deployment() -> Object:
    """A Deployment that every policy takes."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "server", "namespace": "avrt"},
        "spec": {
            "template": {
                "metadata": {"labels": {"app": "server"}},
                "spec": {
                    "serviceAccountName": "server",
                    "automountServiceAccountToken": False,
                    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                    "containers": [
                        {
                            "name": "server",
                            "image": "avrt/pipeline:0.1.0",
                            "env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "key", "key": "key"}}}],
                            "ports": [{"containerPort": 1}],
                            "livenessProbe": {},
                            "readinessProbe": {},
                            "startupProbe": {},
                            "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
                            "securityContext": {
                                "allowPrivilegeEscalation": False,
                                "readOnlyRootFilesystem": True,
                                "capabilities": {"drop": ["ALL"]},
                            },
                        }
                    ],
                    "volumes": [
                        {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
                        {"name": "config", "configMap": {"name": "config"}},
                    ],
                },
            }
        },
    }


def around() -> list[Object]:
    """What the Deployment needs beside it."""
    job = {"kind": "Job", "apiVersion": "batch/v1", "spec": {"template": {"spec": pod_of(deployment())}}}
    job["metadata"] = {"name": "maker", "namespace": "avrt", "annotations": {MAKES_SECRETS: "avrt/key"}}
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": "avrt", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "server", "namespace": "avrt"}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config", "namespace": "avrt"}},
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "avrt", "namespace": "avrt"}, "spec": {}},
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "deny", "namespace": "avrt"},
            "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": "server", "namespace": "avrt"},
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {"app": "server"}}},
        },
        job,
    ]


def pod_of(document: Object) -> dict[str, Any]:
    """The pod's specification."""
    return document["spec"]["template"]["spec"]


def role(**rule: list[str]) -> Object:
    """A Role with one rule."""
    metadata = {"name": "role", "namespace": "avrt"}
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"], **rule}]
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": metadata, "rules": rules}


def binding(namespace: str, name: str) -> Object:
    """A RoleBinding to one service account."""
    subject = {"kind": "ServiceAccount", "namespace": namespace, "name": name}
    metadata = {"name": "binding", "namespace": "avrt"}
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": metadata,
        "subjects": [subject],
    }


def found(*extra: Object, change: Change | None = None, name: str = "some") -> dict[str, list[str]]:
    """The policies' problems with the right build, changed."""
    document = deployment()
    if change is not None:
        change(pod_of(document))
    answers = policies.problems(Build(name, [document, *around(), *extra]))
    return {policy: wrong for policy, wrong in answers.items() if wrong}


def test_a_right_build_passes() -> None:
    assert found(role(), binding("avrt", "server"), binding("kubeflow", "pipeline-runner")) == {}


def set_container(**values: Any) -> Change:
    """A change of the first container."""
    return lambda pod: pod["containers"][0].update(values)


def set_security(**values: Any) -> Change:
    """A change of the first container's security context."""
    return lambda pod: pod["containers"][0]["securityContext"].update(values)


@pytest.mark.parametrize(
    ("policy", "change", "message"),
    [
        ("image tags", set_container(image="avrt/pipeline"), "runs avrt/pipeline: name a version"),
        ("image tags", set_container(image="avrt/pipeline:latest"), "avrt/pipeline:latest"),
        ("image tags", set_container(image="registry:5000/avrt/pipeline"), "name a version"),
        ("pod security", lambda pod: pod["securityContext"].pop("runAsNonRoot"), "runAsNonRoot must be true"),
        ("pod security", set_security(runAsUser=0), "runAsNonRoot must be true"),
        ("pod security", set_security(runAsNonRoot=False), "runAsNonRoot must be true"),
        ("pod security", set_security(allowPrivilegeEscalation=True), "allowPrivilegeEscalation must be false"),
        ("pod security", set_security(privileged=True), "allowPrivilegeEscalation must be false"),
        ("pod security", set_security(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}), "capabilities"),
        ("pod security", set_security(readOnlyRootFilesystem=False), "readOnlyRootFilesystem must be true"),
        ("pod security", lambda pod: pod["securityContext"].pop("seccompProfile"), "seccompProfile"),
        ("pod security", lambda pod: pod.update(hostNetwork=True), "hostNetwork is set"),
        ("pod security", lambda pod: pod["volumes"].append({"name": "h", "hostPath": {}}), "h is a hostPath"),
        ("limits", set_container(resources={"requests": {"cpu": "1"}}), "no requests.memory, limits.memory"),
        ("probes", lambda pod: pod["containers"][0].pop("livenessProbe"), "no livenessProbe"),
        ("probes", lambda pod: pod["containers"][0].pop("readinessProbe"), "no readinessProbe"),
        ("emptyDir sizes", lambda pod: pod["volumes"].append({"name": "big", "emptyDir": {}}), "big has no sizeLimit"),
        ("accounts", lambda pod: pod.pop("serviceAccountName"), "default account"),
        ("accounts", lambda pod: pod.update(serviceAccountName="nobody"), "no ServiceAccount nobody"),
        ("accounts", lambda pod: pod.pop("automountServiceAccountToken"), "left to the account"),
        ("secrets", lambda pod: pod["volumes"].append({"name": "s", "secret": {"secretName": "x"}}), "Secret avrt/x"),
        ("secrets", set_container(envFrom=[{"secretRef": {"name": "y"}}]), "nothing makes Secret avrt/y"),
        ("secrets", lambda pod: pod.update(imagePullSecrets=[{"name": "z"}]), "nothing makes Secret avrt/z"),
        ("config maps", lambda pod: pod["volumes"].append({"name": "c", "configMap": {"name": "no"}}), "ConfigMap no"),
    ],
)
def test_pod_policies_refuse(policy: str, change: Change, message: str) -> None:
    problems = found(change=change)
    assert list(problems) == [policy]
    assert message in problems[policy][0]


@pytest.mark.parametrize(
    ("policy", "document", "message"),
    [
        ("RBAC", role(verbs=["*"]), "verbs has a wildcard"),
        ("RBAC", role(resources=["*"]), "resources has a wildcard"),
        ("RBAC", role(apiGroups=["*"]), "apiGroups has a wildcard"),
        ("RBAC", role(resources=["pods/*"]), "resources has a wildcard"),
        ("RBAC", role(resources=["roles"], verbs=["bind"]), "would give more rights"),
        ("RBAC", role(resources=["secrets"], verbs=["list"]), "may list secrets"),
        ("RBAC", role(resources=["secrets"], verbs=["get"]), "may get every secret"),
        ("RBAC", {**role(verbs=["delete"]), "kind": "ClusterRole"}, "may delete in the whole cluster"),
        ("accounts", binding("avrt", "stranger"), "there is no ServiceAccount avrt/stranger"),
        ("accounts", binding("kubeflow", "ml-pipeline"), "there is no ServiceAccount kubeflow/ml-pipeline"),
        (
            "no secret in Git",
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "avrt"}, "data": {}},
            "must not be in Git",
        ),
        (
            "namespaces",
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "default"}},
            "namespace must be avrt or one of",
        ),
        (
            "namespaces",
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": {"name": "deny", "namespace": "kubeflow"},
                "spec": {},
            },
            "has no place in kubeflow",
        ),
        (
            "disruption budgets",
            {
                "apiVersion": "policy/v1",
                "kind": "PodDisruptionBudget",
                "metadata": {"name": "b", "namespace": "avrt"},
                "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "server"}}},
            },
            "holds up every drain",
        ),
    ],
)
def test_object_policies_refuse(policy: str, document: Object, message: str) -> None:
    problems = found(document)
    assert list(problems) == [policy]
    assert message in problems[policy][0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("NetworkPolicy", "no NetworkPolicy denies all"),
        ("ResourceQuota", "no ResourceQuota"),
        ("PodDisruptionBudget", "no PodDisruptionBudget selects"),
        ("Job", "nothing makes Secret avrt/key"),
    ],
)
def test_missing_guards_are_noticed(kind: str, message: str) -> None:
    objects = [deployment(), *(d for d in around() if d["kind"] != kind)]
    problems = [line for wrong in policies.problems(Build("some", objects)).values() for line in wrong]
    assert len(problems) == 1
    assert message in problems[0]


def test_a_namespace_that_enforces_less_is_refused() -> None:
    objects = [deployment(), *copy.deepcopy(around())]
    objects[1]["metadata"]["labels"] = {"pod-security.kubernetes.io/enforce": "baseline"}
    assert policies.problems(Build("some", objects))["guards"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_container(image="docker.io/library/redis:8"), "not one of our images"),
        (
            lambda pod: pod["volumes"].append({"name": "v", "persistentVolumeClaim": {"claimName": "c"}}),
            "neither emptyDir nor configMap nor secret",
        ),
    ],
)
def test_the_test_overlay_takes_nothing_from_outside(change: Change, message: str) -> None:
    problems = found(change=change, name="test")
    assert list(problems) == ["self-contained"]
    assert message in problems["self-contained"][0]


def test_the_test_overlay_has_no_kind_that_may_be_missing() -> None:
    monitor = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "m", "namespace": "avrt"},
        "spec": {},
    }
    assert "may be missing" in found(monitor, name="test")["self-contained"][0]


SHA = "0" * 64
GENTLE = {"scaleDown": {"stabilizationWindowSeconds": 600, "policies": [{"type": "Pods", "value": 1}]}}


def runtime() -> Object:
    """A ServingRuntime that pauses and drains."""
    (container,) = pod_of(deployment())["containers"]
    container |= {"args": ["--shutdown-timeout=45"], "lifecycle": {"preStop": {"sleep": {"seconds": 8}}}}
    container["securityContext"] |= {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    container["ports"][0]["protocol"] = "TCP"
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        container[probe] = {"httpGet": {"port": 8080}}
    metadata = {"name": "vllm", "namespace": "avrt"}
    kind = {"apiVersion": "serving.kserve.io/v1alpha1", "kind": "ServingRuntime"}
    return {**kind, "metadata": metadata, "spec": {"containers": [container]}}


def champion() -> Object:
    """An InferenceService that every policy takes."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": "student",
            "namespace": "avrt",
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "external",
            },
        },
        "spec": {
            "predictor": {
                "serviceAccountName": "server",
                "terminationGracePeriodSeconds": 60,
                "model": {
                    "runtime": "vllm",
                    "storageUri": f"s3://avrt/models/student/{SHA}",
                    "resources": {"limits": {"cpu": "2", "memory": "1Gi"}},
                },
            }
        },
    }


def scaled() -> Object:
    """Its ScaledObject."""
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "student", "namespace": "avrt"},
        "spec": {
            "scaleTargetRef": {"name": "student-predictor"},
            "minReplicaCount": 1,
            "fallback": {"replicas": 1},
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": copy.deepcopy(GENTLE)}},
        },
    }


def project() -> Object:
    """An AppProject for one repository, one namespace and two kinds."""
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "AppProject",
        "metadata": {"name": "models", "namespace": "argocd"},
        "spec": {
            "sourceRepos": ["https://git.example.com/manifests.git"],
            "destinations": [{"server": "https://kubernetes.default.svc", "namespace": "avrt"}],
            "clusterResourceWhitelist": [{"group": "", "kind": "Namespace", "name": "avrt"}],
            "namespaceResourceWhitelist": [{"group": "serving.kserve.io", "kind": "InferenceService"}],
        },
    }


def application() -> Object:
    """An Application of that project."""
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Application",
        "metadata": {
            "name": "models",
            "namespace": "argocd",
            "annotations": {"argocd.argoproj.io/compare-options": "ServerSideDiff=true"},
        },
        "spec": {
            "project": "models",
            "source": {"repoURL": "https://git.example.com/manifests.git"},
            "destination": {"server": "https://kubernetes.default.svc", "namespace": "avrt"},
            "syncPolicy": {"syncOptions": ["ServerSideApply=true"], "retry": {"refresh": True}},
        },
    }


def rule() -> Object:
    """A PrometheusRule with one alert."""
    alert = {
        "alert": "Down",
        "for": "5m",
        "labels": {"severity": "critical"},
        "annotations": {"summary": "s", "description": "d"},
    }
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "alerts", "namespace": "avrt"},
        "spec": {"groups": [{"rules": [alert]}]},
    }


def serving() -> list[Object]:
    """Everything of serving, right."""
    return [runtime(), champion(), scaled(), project(), application(), rule()]


def test_right_serving_passes() -> None:
    assert found(*serving()) == {}


def put(kind: str, path: str, value: Any) -> Callable[[list[Object]], None]:
    """Set, or with None delete, the field of the object of this kind; ``~`` stands for a slash in a key."""

    def change(objects: list[Object]) -> None:
        (here,) = [d for d in objects if d["kind"] == kind]
        *keys, last = (key.replace("~", "/") for key in path.split("/"))
        for key in keys:
            here = here[int(key)] if isinstance(here, list) else here.setdefault(key, {})
        if value is None:
            del here[last]
        else:
            here[last] = value

    return change


MODEL = "spec/predictor/model"
DOWN = "spec/advanced/horizontalPodAutoscalerConfig/behavior/scaleDown"
ANNOTATION = "metadata/annotations"
ALERT = "spec/groups/0/rules/0"


@pytest.mark.parametrize(
    ("policy", "kind", "path", "value", "message"),
    [
        ("models", "InferenceService", f"{MODEL}/storageUri", "s3://avrt/models/student/latest", "SHA256"),
        ("models", "InferenceService", f"{MODEL}/storageUri", f"s3://avrt/models/other/{SHA}", "SHA256"),
        ("models", "InferenceService", f"{MODEL}/storageUri", "oci+native://r.example.com/m:1", "by its digest"),
        ("models", "InferenceService", f"{MODEL}/storageUri", f"oci://r.example.com/m@sha256:{SHA}", "by its digest"),
        ("services", "InferenceService", f"{MODEL}/runtime", "nosuch", "there is no ServingRuntime nosuch"),
        ("services", "InferenceService", "spec/predictor/serviceAccountName", "nosuch", "no ServiceAccount nosuch"),
        ("services", "InferenceService", "metadata/annotations", {}, "must be Standard"),
        ("drains", "InferenceService", "spec/predictor/terminationGracePeriodSeconds", 57, "must be at least 58"),
        ("drains", "ServingRuntime", "spec/containers/0/lifecycle", None, "does not pause"),
        ("drains", "ServingRuntime", "spec/containers/0/args", ["--port=1"], "does not pause (preStop) and drain"),
        ("drift", "InferenceService", f"{MODEL}/resources/limits/cpu", 2, "limits.cpu: 2 is not in the form"),
        ("drift", "InferenceService", f"{MODEL}/resources/limits/cpu", "2000m", "'2000m' is not in the form"),
        ("drift", "InferenceService", f"{MODEL}/resources/limits/cpu", "0.5", "'0.5' is not in the form"),
        ("drift", "InferenceService", f"{MODEL}/resources/limits/memory", "1024Mi", "'1024Mi' is not in the form"),
        ("drift", "InferenceService", f"{MODEL}/args", [], "args is a zero value"),
        ("drift", "InferenceService", "spec/predictor/maxReplicas", 0, "maxReplicas is a zero value"),
        ("drift", "InferenceService", f"{MODEL}/env", [{"name": "A", "value": ""}], "env.0.value is a zero value"),
        ("drift", "ServingRuntime", "spec/containers/0/ports/0/protocol", None, "the port has no protocol"),
        ("autoscaling", "ScaledObject", "spec/minReplicaCount", 0, "minReplicaCount must be at least 1"),
        ("autoscaling", "ScaledObject", "spec/fallback", None, "no fallback"),
        ("autoscaling", "ScaledObject", "spec/scaleTargetRef/name", "x-predictor", "no InferenceService for x-pred"),
        ("autoscaling", "ScaledObject", f"{DOWN}/stabilizationWindowSeconds", 60, "of at least 300"),
        ("autoscaling", "ScaledObject", f"{DOWN}/policies", None, "and policies"),
        (
            "autoscaling",
            "InferenceService",
            f"{ANNOTATION}/serving.kserve.io~autoscalerClass",
            "none",
            "autoscalerClass must be external",
        ),
        ("alerts", "PrometheusRule", f"{ALERT}/for", None, "has no `for`"),
        ("alerts", "PrometheusRule", f"{ALERT}/labels", {}, "severity must be"),
        ("alerts", "PrometheusRule", f"{ALERT}/annotations/summary", None, "has no summary"),
        ("projects", "AppProject", "spec/namespaceResourceWhitelist/0/kind", "*", "has a wildcard"),
        ("projects", "AppProject", "spec/clusterResourceWhitelist/0/name", None, "any Namespace; name it"),
        ("projects", "AppProject", "spec/namespaceResourceWhitelist", [], "no namespaceResourceWhitelist"),
        ("applications", "Application", "spec/project", "default", "there is no AppProject default"),
        ("applications", "Application", "spec/source/repoURL", "https://elsewhere", "does not have https://elsewhere"),
        ("applications", "Application", "spec/destination/namespace", "kubeflow", "does not have {"),
        ("applications", "Application", "spec/syncPolicy/syncOptions", [], "need ServerSideApply=true"),
        ("applications", "Application", "spec/syncPolicy/retry", {}, "retry.refresh must be true"),
        ("applications", "Application", "spec/ignoreDifferences", [{"kind": "A"}], "hides changes"),
        ("applications", "Application", "metadata/annotations", {}, "must be ServerSideDiff=true"),
        ("namespaces", "Application", "metadata/namespace", "kubeflow", "has no place in kubeflow"),
    ],
)
def test_serving_policies_refuse(policy: str, kind: str, path: str, value: Any, message: str) -> None:
    objects = serving()
    put(kind, path, value)(objects)
    assert message in "\n".join(found(*objects)[policy])


def test_a_repository_for_everybody_is_refused() -> None:
    objects = serving()
    put("AppProject", "spec/sourceRepos", ["*"])(objects)
    assert "has a wildcard" in found(*objects)["projects"][0]


def test_an_hpa_that_takes_replicas_away_in_haste_is_refused() -> None:
    (service,) = [d for d in serving() if d["kind"] == "InferenceService"]
    service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] = "external"
    name = service["metadata"]["name"]
    scaler: dict[str, Any] = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name, "namespace": service["metadata"]["namespace"]},
        "spec": {"scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": f"{name}-predictor"}},
    }
    assert "of at least 300" in found(runtime(), service, scaler)["autoscaling"][0]
    scaler["spec"]["behavior"] = GENTLE
    assert found(runtime(), service, scaler) == {}


def test_what_is_on_the_cluster_already_may_be_referred_to() -> None:
    around_it = [*around(), runtime(), deployment()]
    assert [x for wrong in policies.problems(Build("s", [champion()], around=around_it)).values() for x in wrong] == []


@pytest.mark.parametrize(
    ("image", "pinned"),
    [
        ("docker.io/library/redis:8.0.1", False),
        ("docker.io/library/redis:8.0.1-0123456789ab", False),
        ("docker.io/library/redis@sha256:" + "0" * 64, True),
        ("docker.io/library/redis:8.0.1@sha256:" + "0" * 64, True),
        ("docker.io/library/redis@sha256:0123", False),
        ("avrt/vllm:0.1.0", False),
        ("registry.example.com/team/avrt/vllm:0.1.0-0123456789ab", True),
        ("registry.example.com/team/avrt/vllm:0.1.0-dirty", False),
    ],
)
def test_a_release_takes_images_by_content_only(image: str, pinned: bool) -> None:
    document = deployment()
    set_container(image=image)(pod_of(document))
    assert (list(policies.images_are_pinned(Build("production", [document]))) == []) is pinned
