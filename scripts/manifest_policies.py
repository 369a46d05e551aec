"""What the rendered manifests must and must not be, beyond what the API server's schemas say.

A policy is a function of a build (all objects that one overlay renders to) that yields problems; ``POLICIES`` names
them. Nothing here looks at files or at a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

NAMESPACES = ("avrt", "kubeflow")
#: Service accounts of others that our bindings may name.
FOREIGN_ACCOUNTS = {("kubeflow", "pipeline-runner")}
#: Our own images, by the end of their name: the registry in front differs.
OWN_IMAGES = ("avrt/pipeline", "avrt/train", "avrt/vllm")
#: Names the secrets that a Job makes: NAMESPACE/NAME, separated by blanks.
MAKES_SECRETS = "avrt/makes-secrets"
#: What may stand in a namespace that is not ours: permissions for its own pods, and secrets for them.
ALLOWED_IN_FOREIGN = {"Role", "RoleBinding", "ExternalSecret", "LocalQueue"}
CORE_GROUPS = {
    "",
    "apps",
    "batch",
    "policy",
    "networking.k8s.io",
    "rbac.authorization.k8s.io",
    "scheduling.k8s.io",
    "storage.k8s.io",
}
CLUSTER_KINDS = {
    "Namespace",
    "ClusterRole",
    "ClusterRoleBinding",
    "ClusterQueue",
    "ResourceFlavor",
    "ClusterStorageContainer",
}
_WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")
_DANGEROUS_VERBS = {"escalate", "bind", "impersonate"}


@dataclass(frozen=True, slots=True)
class Build:
    """What one overlay or component renders to.

    Attributes:
        name: ``production``, ``components/kueue``.
        objects: all of them.
        partial: they hold only the fields that they change in an object of somebody else.
    """

    name: str
    objects: list[Object]
    partial: bool = False


def group(document: Object) -> str:
    """API group; empty for the core group."""
    return str(document["apiVersion"]).rpartition("/")[0]


def title(document: Object) -> str:
    """``Kind namespace/name``, as messages name an object."""
    namespace = document["metadata"].get("namespace")
    return f"{document['kind']} {namespace + '/' if namespace else ''}{document['metadata']['name']}"


def pods(build: Build) -> Iterator[tuple[Object, Object]]:
    """Every object that makes pods, with the pod's specification. A ServingRuntime counts: it has a pod's fields."""
    for document in build.objects:
        if document["kind"] in _WORKLOADS:
            yield document, document["spec"]["template"]["spec"]
        elif document["kind"] == "Pod" or document["kind"] == "ServingRuntime":
            yield document, document["spec"]


def containers(pod: Object) -> list[Object]:
    """All containers of a pod, those that start first included."""
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def images_have_a_tag(build: Build) -> Iterator[str]:
    """No image without a tag or with ``latest``: what runs must be known."""
    for document, pod in pods(build):
        for container in containers(pod):
            image = str(container.get("image", ""))
            name, tag, digest = split_image(image)
            if not name or (not tag and not digest) or tag == "latest":
                yield f"{title(document)}: container {container['name']} runs {image or 'no image'}: name a version"


def split_image(image: str) -> tuple[str, str, str]:
    """Name, tag and digest of an image reference; tag and digest may be empty.

    >>> split_image("registry:5000/avrt/vllm:0.1.0@sha256:00")
    ('registry:5000/avrt/vllm', '0.1.0', 'sha256:00')
    """
    rest, _, digest = image.partition("@")
    head, slash, last = rest.rpartition("/")
    name, _, tag = last.partition(":")
    return f"{head}{slash}{name}", tag, digest


def pods_are_restricted(build: Build) -> Iterator[str]:
    """Pod Security `restricted`, and a root file system that is read-only."""
    for document, pod in pods(build):
        whole = pod.get("securityContext") or {}
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(key):
                yield f"{title(document)}: {key} is set"
        for volume in pod.get("volumes", []):
            if "hostPath" in volume:
                yield f"{title(document)}: volume {volume['name']} is a hostPath"
        for container in containers(pod):
            own = container.get("securityContext") or {}
            merged = {**whole, **own}
            wrong = []
            if merged.get("runAsNonRoot") is not True or merged.get("runAsUser") == 0:
                wrong.append("runAsNonRoot must be true")
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                wrong.append("allowPrivilegeEscalation must be false")
            if (own.get("capabilities") or {}).get("drop") != ["ALL"] or (own.get("capabilities") or {}).get("add"):
                wrong.append("capabilities must drop ALL and add none")
            if (merged.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
                wrong.append("seccompProfile must be RuntimeDefault")
            if own.get("readOnlyRootFilesystem") is not True:
                wrong.append("readOnlyRootFilesystem must be true")
            if wrong:
                yield f"{title(document)}: container {container['name']}: {'; '.join(wrong)}"


def containers_have_limits(build: Build) -> Iterator[str]:
    """Requests of CPU and memory, and a limit of memory. A ServingRuntime's come with the InferenceService."""
    for document, pod in pods(build):
        if document["kind"] == "ServingRuntime":
            continue
        for container in containers(pod):
            resources = container.get("resources") or {}
            wanted = (("requests", "cpu"), ("requests", "memory"), ("limits", "memory"))
            missing = [f"{kind}.{name}" for kind, name in wanted if name not in resources.get(kind, {})]
            if missing:
                yield f"{title(document)}: container {container['name']} has no {', '.join(missing)}"


def servers_have_probes(build: Build) -> Iterator[str]:
    """A container of a server that hangs is noticed; one that takes requests is not asked before it can answer."""
    for document, pod in pods(build):
        if document["kind"] in ("Job", "Pod"):
            continue
        for container in pod.get("containers", []):
            wanted = ["livenessProbe", *(["readinessProbe", "startupProbe"] if container.get("ports") else [])]
            if missing := [probe for probe in wanted if probe not in container]:
                yield f"{title(document)}: container {container['name']} has no {', '.join(missing)}"


def emptydirs_have_sizes(build: Build) -> Iterator[str]:
    """A pod that fills its emptyDir is ended, not the node."""
    for document, pod in pods(build):
        for volume in pod.get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield f"{title(document)}: volume {volume['name']} has no sizeLimit"


def roles_are_narrow(build: Build) -> Iterator[str]:
    """No wildcard, no way to more rights, and secrets only by name."""
    for document in build.objects:
        if document["kind"] not in ("Role", "ClusterRole"):
            continue
        for rule in document.get("rules") or []:
            for key in ("apiGroups", "resources", "verbs"):
                if any("*" in value for value in rule.get(key, [])):
                    yield f"{title(document)}: {key} has a wildcard"
            verbs = set(rule["verbs"])
            if bad := verbs & _DANGEROUS_VERBS:
                yield f"{title(document)}: {', '.join(sorted(bad))} would give more rights than the role has"
            if "secrets" in rule.get("resources", []):
                if bad := verbs - {"get", "create"}:
                    yield f"{title(document)}: may {', '.join(sorted(bad))} secrets"
                if "get" in verbs and not rule.get("resourceNames"):
                    yield f"{title(document)}: may get every secret; name them in resourceNames"
            writes = verbs - {"get", "list", "watch"}
            if document["kind"] == "ClusterRole" and writes and not rule.get("resourceNames"):
                yield f"{title(document)}: may {', '.join(sorted(writes))} in the whole cluster; name the objects"


def accounts_exist(build: Build) -> Iterator[str]:
    """Every service account that a pod or a binding names is in the build, or is one that we know of."""
    have = {(d["metadata"]["namespace"], d["metadata"]["name"]) for d in build.objects if d["kind"] == "ServiceAccount"}
    for document, pod in pods(build):
        name = pod.get("serviceAccountName")
        if document["kind"] == "ServingRuntime":
            continue
        if name is None:
            yield f"{title(document)}: no serviceAccountName, so it runs as the namespace's default account"
        elif (document["metadata"]["namespace"], name) not in have:
            yield f"{title(document)}: there is no ServiceAccount {name}"
        if "automountServiceAccountToken" not in pod:
            yield f"{title(document)}: automountServiceAccountToken is left to the account"
    for document in build.objects:
        if document["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            for subject in document["subjects"]:
                if subject["kind"] != "ServiceAccount":
                    yield f"{title(document)}: {subject['kind']} {subject['name']} is not a service account"
                elif (subject["namespace"], subject["name"]) not in have | FOREIGN_ACCOUNTS:
                    yield f"{title(document)}: there is no ServiceAccount {subject['namespace']}/{subject['name']}"


def secrets_exist(build: Build) -> Iterator[str]:
    """Every secret that is referred to has a source in the build: a Job that makes it, an operator, a certificate."""
    sources = set(_secret_sources(build))
    for namespace, name, who in _secret_references(build):
        if (namespace, name) not in sources:
            yield f"{who}: nothing makes Secret {namespace}/{name}"


def no_secret_values(build: Build) -> Iterator[str]:
    """Secrets are made in the cluster or come from a store, never from Git."""
    for document in build.objects:
        if document["kind"] == "Secret":
            yield f"{title(document)}: a Secret must not be in Git; see components/external-secrets and credentials"


def _secret_sources(build: Build) -> Iterator[tuple[str, str]]:
    for document in build.objects:
        metadata, spec = document["metadata"], document.get("spec") or {}
        for place in (metadata.get("annotations") or {}).get(MAKES_SECRETS, "").split():
            namespace, _, name = place.partition("/")
            yield namespace, name
        if document["kind"] in ("ExternalSecret", "SealedSecret"):
            yield metadata["namespace"], (spec.get("target") or {}).get("name") or metadata["name"]
        elif document["kind"] == "Certificate":
            yield metadata["namespace"], spec["secretName"]


def _secret_references(build: Build) -> Iterator[tuple[str, str, str]]:
    for document, pod in pods(build):
        namespace, who = document["metadata"]["namespace"], title(document)
        for container in containers(pod):
            for variable in container.get("env", []):
                if reference := (variable.get("valueFrom") or {}).get("secretKeyRef"):
                    yield namespace, reference["name"], who
            for source in container.get("envFrom", []):
                if "secretRef" in source:
                    yield namespace, source["secretRef"]["name"], who
        for volume in pod.get("volumes", []):
            if "secret" in volume:
                yield namespace, volume["secret"]["secretName"], who
        for reference in pod.get("imagePullSecrets", []):
            yield namespace, reference["name"], who
    for document in build.objects:
        if document["kind"] == "ServiceAccount":
            for reference in document.get("secrets", []):
                yield document["metadata"]["namespace"], reference["name"], title(document)
        if document["kind"] == "Issuer" and "ca" in document["spec"]:
            yield document["metadata"]["namespace"], document["spec"]["ca"]["secretName"], title(document)


def config_maps_exist(build: Build) -> Iterator[str]:
    """Every config map that a pod mounts or reads is in the build."""
    have = {(d["metadata"].get("namespace"), d["metadata"]["name"]) for d in build.objects if d["kind"] == "ConfigMap"}
    for document, pod in pods(build):
        names = [volume["configMap"]["name"] for volume in pod.get("volumes", []) if "configMap" in volume]
        for container in containers(pod):
            for variable in container.get("env", []):
                if reference := (variable.get("valueFrom") or {}).get("configMapKeyRef"):
                    names.append(reference["name"])
        for name in names:
            if (document["metadata"]["namespace"], name) not in have:
                yield f"{title(document)}: there is no ConfigMap {name}"


def namespaces_are_ours(build: Build) -> Iterator[str]:
    """Everything says where it goes; in a namespace of somebody else only permissions and secrets for our steps."""
    for document in build.objects:
        namespace, kind = document["metadata"].get("namespace"), document["kind"]
        if kind in CLUSTER_KINDS:
            continue
        if namespace not in NAMESPACES:
            yield f"{title(document)}: namespace must be one of {', '.join(NAMESPACES)}"
        elif namespace != "avrt" and kind not in ALLOWED_IN_FOREIGN:
            yield f"{title(document)}: a {kind} has no place in {namespace}, which is not ours"


def namespace_is_guarded(build: Build) -> Iterator[str]:
    """Each namespace of ours enforces Pod Security `restricted`, denies traffic by default, and has a quota."""
    for document in build.objects:
        if document["kind"] != "Namespace":
            continue
        name = document["metadata"]["name"]
        inside = [d for d in build.objects if d["metadata"].get("namespace") == name]
        if (document["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{title(document)}: pod-security.kubernetes.io/enforce must be restricted"
        if not any(_denies_everything(d) for d in inside):
            yield f"{title(document)}: no NetworkPolicy denies all traffic by default"
        if not any(d["kind"] == "ResourceQuota" for d in inside):
            yield f"{title(document)}: no ResourceQuota"


def _denies_everything(document: Object) -> bool:
    if document["kind"] != "NetworkPolicy":
        return False
    spec = document["spec"]
    return (
        spec.get("podSelector") == {}
        and set(spec.get("policyTypes", [])) == {"Ingress", "Egress"}
        and not spec.get("ingress")
        and not spec.get("egress")
    )


def servers_have_budgets(build: Build) -> Iterator[str]:
    """Every Deployment and StatefulSet has a PodDisruptionBudget, and none that holds up a drain for ever."""
    budgets = [d for d in build.objects if d["kind"] == "PodDisruptionBudget"]
    for document in build.objects:
        if document["kind"] not in ("Deployment", "StatefulSet"):
            continue
        labels = document["spec"]["template"]["metadata"]["labels"].items()
        if not any(b["spec"]["selector"]["matchLabels"].items() <= labels for b in budgets):
            yield f"{title(document)}: no PodDisruptionBudget selects its pods"
    for budget in budgets:
        if "minAvailable" in budget["spec"]:
            yield f"{title(budget)}: minAvailable with one replica holds up every drain; use maxUnavailable"


def is_self_contained(build: Build) -> Iterator[str]:
    """The overlay for a bare cluster: our images, emptyDir only, and no kind whose definition may be missing."""
    for document, pod in pods(build):
        for container in containers(pod):
            if split_image(container["image"])[0] not in OWN_IMAGES:
                yield f"{title(document)}: {container['image']} is not one of our images"
        for volume in pod.get("volumes", []):
            if not {"emptyDir", "configMap", "secret"} & volume.keys():
                yield f"{title(document)}: volume {volume['name']} is neither emptyDir nor configMap nor secret"
    for document in build.objects:
        if document["spec"].get("volumeClaimTemplates") if document["kind"] == "StatefulSet" else False:
            yield f"{title(document)}: volumeClaimTemplates need a storage class"
        if document["kind"] == "PersistentVolumeClaim":
            yield f"{title(document)}: needs a storage class"
        if group(document) not in CORE_GROUPS and document["kind"] != "ServingRuntime":
            yield f"{title(document)}: {document['apiVersion']} may be missing"


def images_are_pinned(build: Build) -> Iterator[str]:
    """What a release runs does not change behind a tag: a digest each, or for our own images the content's tag."""
    for image in sorted({c["image"] for _, pod in pods(build) for c in containers(pod)}):
        name, tag, digest = split_image(image)
        own = name.endswith(OWN_IMAGES)
        if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) or (own and re.fullmatch(r".+-[0-9a-f]{12}", tag)):
            continue
        mend = "take the tag of build/images.json" if own else "run make pin-images"
        yield f"{image} is not pinned: {mend}"


Policy = Callable[[Build], Iterable[str]]

#: Of everything that we run ourselves.
POLICIES: dict[str, Policy] = {
    "image tags": images_have_a_tag,
    "pod security": pods_are_restricted,
    "limits": containers_have_limits,
    "probes": servers_have_probes,
    "emptyDir sizes": emptydirs_have_sizes,
    "RBAC": roles_are_narrow,
    "accounts": accounts_exist,
    "secrets": secrets_exist,
    "no secret in Git": no_secret_values,
    "config maps": config_maps_exist,
    "namespaces": namespaces_are_ours,
    "guards": namespace_is_guarded,
    "disruption budgets": servers_have_budgets,
}


def problems(build: Build) -> dict[str, list[str]]:
    """What each policy has against a build. Partial objects are somebody else's: only their roles are looked at."""
    chosen = {"RBAC": roles_are_narrow, "no secret in Git": no_secret_values} if build.partial else dict(POLICIES)
    if build.name == "test":
        chosen["self-contained"] = is_self_contained
    return {name: list(policy(build)) for name, policy in chosen.items()}
