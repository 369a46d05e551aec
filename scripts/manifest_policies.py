"""What the rendered manifests must and must not be, beyond what the API server's schemas say.

A policy is a function of a build (all objects that one overlay renders to) that yields problems; ``POLICIES`` names
them. Nothing here looks at files or at a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from avrt_lib.preflight.objects import MAKES_SECRETS

Object = dict[str, Any]

#: By namespace that is not ours, what may stand there: permissions for its own pods, secrets for them, Applications.
FOREIGN = {
    "kubeflow": {"Role", "RoleBinding", "ExternalSecret", "LocalQueue"},
    "argocd": {"Application", "AppProject"},
}
#: Service accounts of others that our bindings may name.
FOREIGN_ACCOUNTS = {("kubeflow", "pipeline-runner")}
#: Our own images, by the end of their name: the registry in front differs.
OWN_IMAGES = ("avrt/pipeline", "avrt/train", "avrt/vllm")
CORE_GROUPS = {
    "",
    "apps",
    "autoscaling",
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
    "LocalModelNodeGroup",
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
        around: what is on the cluster already where they are applied.
    """

    name: str
    objects: list[Object]
    partial: bool = False
    around: list[Object] = field(default_factory=list)

    @property
    def present(self) -> list[Object]:
        """Everything that the build's objects may refer to."""
        return [*self.objects, *self.around]


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
        elif document["kind"] == "LLMInferenceService":
            yield document, document["spec"]["template"]
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
    have = {(d["metadata"]["namespace"], d["metadata"]["name"]) for d in build.present if d["kind"] == "ServiceAccount"}
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
    for document in build.present:
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
    have = {(d["metadata"].get("namespace"), d["metadata"]["name"]) for d in build.present if d["kind"] == "ConfigMap"}
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
        if namespace != "avrt" and namespace not in FOREIGN:
            yield f"{title(document)}: namespace must be avrt or one of {', '.join(FOREIGN)}"
        elif namespace in FOREIGN and kind not in FOREIGN[namespace]:
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


def models_are_named_by_content(build: Build) -> Iterator[str]:
    """What a champion's pods load cannot change under its name."""
    for document in _of(build, "InferenceService", "LLMInferenceService"):
        name = document["metadata"]["name"]
        model = document["spec"].get("model") or document["spec"]["predictor"]["model"]
        uri = str(model.get("storageUri") or model.get("uri"))
        stored = rf"s3://[a-z0-9.-]+/models/{re.escape(name)}/[0-9a-f]{{64}}"
        if not re.fullmatch(rf"{stored}|oci\+native://[^@]+@sha256:[0-9a-f]{{64}}", uri):
            yield f"{title(document)}: {uri} is neither s3://BUCKET/models/{name}/SHA256 nor an image by its digest"


def services_are_complete(build: Build) -> Iterator[str]:
    """An InferenceService leaves nothing to KServe's guess, and refers to what is there."""
    for document in _of(build, "InferenceService"):
        who, metadata, predictor = title(document), document["metadata"], document["spec"]["predictor"]
        annotations = metadata.get("annotations") or {}
        if annotations.get("serving.kserve.io/deploymentMode") != "Standard":
            yield f"{who}: serving.kserve.io/deploymentMode must be Standard"
        if annotations.get("serving.kserve.io/autoscalerClass") not in ("none", "external"):
            yield f"{who}: no serving.kserve.io/autoscalerClass: take one of components/autoscaling-*"
        if len(metadata["name"]) + len(metadata["namespace"]) > 52:
            yield f"{who}: name and namespace are longer than 52 characters together"
        for kind, name in (
            ("ServingRuntime", predictor["model"].get("runtime")),
            ("ServiceAccount", predictor.get("serviceAccountName")),
        ):
            if not any(d["metadata"]["name"] == name for d in build.present if d["kind"] == kind):
                yield f"{who}: there is no {kind} {name}"


def drains_end_in_time(build: Build) -> Iterator[str]:
    """A pod's grace period covers the pause before the drain, the drain, and five seconds to end."""
    runtimes = {d["metadata"]["name"]: d["spec"] for d in build.present if d["kind"] == "ServingRuntime"}
    for document in _of(build, "InferenceService", "LLMInferenceService"):
        pod = document["spec"].get("template") or document["spec"]["predictor"]
        spec = runtimes.get(pod["model"].get("runtime")) if "model" in pod else pod
        for container in containers(spec or {}):
            pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            drain = [a.partition("=")[2] for a in container.get("args", []) if a.startswith("--shutdown-timeout=")]
            needed = pause + int(drain[0] if drain else 0) + 5
            if not pause or not drain:
                yield f"{title(document)}: container {container['name']} does not pause (preStop) and drain"
            elif pod.get("terminationGracePeriodSeconds", 30) < needed:
                yield f"{title(document)}: terminationGracePeriodSeconds must be at least {needed}"


def services_stay_as_written(build: Build) -> Iterator[str]:
    """Nothing that the API server or KServe's webhook would store differently: Argo CD would see drift for ever."""
    for document in _of(build, "InferenceService", "LLMInferenceService", "ServingRuntime", "ScaledObject"):
        for path, value in _leaves(document["spec"], "spec"):
            if value in ("", 0, [], {}) and value is not False:
                yield f"{title(document)}: {path} is a zero value, which KServe removes"
            if _is_quantity(path) and not _is_canonical(value):
                yield f"{title(document)}: {path}: {value!r} is not in the form in which it is stored"
            if path.endswith(".containerPort") and value and not _has_protocol(document, path):
                yield f"{title(document)}: {path}: the port has no protocol"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    if not children or not value:
        yield path, value
    for key, child in children:
        yield from _leaves(child, f"{path}.{key}")


def _is_quantity(path: str) -> bool:
    return path.endswith(".sizeLimit") or bool(re.search(r"\.resources\.(requests|limits)\.", path))


def _is_canonical(value: Any) -> bool:
    """Whether a quantity is stored as it is: a text, and the largest unit that needs no fraction.

    >>> [_is_canonical(v) for v in ("500m", "2", "1Gi", 2, "0.5", "1000m", "1024Mi")]
    [True, True, True, False, False, False, False]
    """
    if not isinstance(value, str) or (match := re.fullmatch(r"([1-9]\d*)(m|[kMGTPE]|[KMGTPE]i)?", value)) is None:
        return False
    number, unit = int(match[1]), match[2] or ""
    return bool(number % 1024) if unit.endswith("i") else not unit or bool(number % 1000)


def _has_protocol(document: Object, path: str) -> bool:
    found: Any = document
    for key in path.split(".")[:-1]:
        found = found[int(key)] if isinstance(found, list) else found[key]
    return "protocol" in found


def replicas_come_and_go_slowly(build: Build) -> Iterator[str]:
    """A replica takes minutes to come: none is taken away in haste, nor all, and a dead Prometheus takes none."""
    services = {d["metadata"]["name"]: d for d in _of(build, "InferenceService")}
    for document in _of(build, "ScaledObject", "HorizontalPodAutoscaler"):
        spec, who = document["spec"], title(document)
        service = services.get(spec["scaleTargetRef"]["name"].removesuffix("-predictor"))
        if service is None:
            yield f"{who}: there is no InferenceService for {spec['scaleTargetRef']['name']}"
        elif service["metadata"]["annotations"].get("serving.kserve.io/autoscalerClass") != "external":
            yield f"{who}: serving.kserve.io/autoscalerClass must be external, or KServe scales as well"
        if document["kind"] == "HorizontalPodAutoscaler":
            yield from _gentle(who, spec.get("behavior", {}))
            continue
        if spec.get("minReplicaCount", 0) < 1:
            yield f"{who}: minReplicaCount must be at least 1"
        if "fallback" not in spec:
            yield f"{who}: no fallback for when Prometheus does not answer"
        yield from _gentle(who, spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {}))


def _gentle(who: str, behavior: dict[str, Any]) -> Iterator[str]:
    down = behavior.get("scaleDown", {})
    if down.get("stabilizationWindowSeconds", 0) < 300 or not down.get("policies"):
        yield f"{who}: scaleDown needs stabilizationWindowSeconds of at least 300, and policies"


def alerts_say_what_is_wrong(build: Build) -> Iterator[str]:
    """Whoever is woken up reads how bad it is, and what it means."""
    for document in _of(build, "PrometheusRule"):
        for rule in (rule for group_ in document["spec"]["groups"] for rule in group_["rules"]):
            texts = rule.get("annotations") or {}
            if missing := {"summary", "description"} - texts.keys():
                yield f"{title(document)}: {rule['alert']} has no {', '.join(sorted(missing))}"
            if (rule.get("labels") or {}).get("severity") not in ("critical", "warning"):
                yield f"{title(document)}: {rule['alert']}: severity must be critical or warning"
            if "for" not in rule:
                yield f"{title(document)}: {rule['alert']} has no `for`: it would fire on a moment"


def projects_are_narrow(build: Build) -> Iterator[str]:
    """An AppProject names its repositories, namespaces and kinds."""
    for document in _of(build, "AppProject"):
        spec = document["spec"]
        allowed = [*spec.get("clusterResourceWhitelist", []), *spec.get("namespaceResourceWhitelist", [])]
        places = [value for place in spec["destinations"] for value in place.values()]
        values = [*spec["sourceRepos"], *places, *(value for kind in allowed for value in kind.values())]
        if any("*" in value for value in values):
            yield f"{title(document)}: has a wildcard"
        # Without a list every kind of a namespace is allowed.
        if not spec.get("namespaceResourceWhitelist") and not spec.get("namespaceResourceBlacklist"):
            yield f"{title(document)}: no namespaceResourceWhitelist"
        for kind in spec.get("clusterResourceWhitelist", []):
            if "name" not in kind:
                yield f"{title(document)}: may make any {kind['kind']}; name it"


def applications_are_safe(build: Build) -> Iterator[str]:
    """Compared and applied by the API server, nothing ignored, and a revert is not kept waiting."""
    projects = {d["metadata"]["name"]: d["spec"] for d in build.present if d["kind"] == "AppProject"}
    for document in _of(build, "Application"):
        spec, who = document["spec"], title(document)
        annotations = document["metadata"].get("annotations") or {}
        project = projects.get(spec["project"])
        if project is None:
            yield f"{who}: there is no AppProject {spec['project']}"
        elif spec["source"]["repoURL"] not in project["sourceRepos"]:
            yield f"{who}: its AppProject does not have {spec['source']['repoURL']}"
        elif spec["destination"] not in project["destinations"]:
            yield f"{who}: its AppProject does not have {spec['destination']}"
        if "ServerSideApply=true" not in spec["syncPolicy"].get("syncOptions", []):
            yield f"{who}: syncOptions need ServerSideApply=true, or unknown fields are dropped silently"
        if annotations.get("argocd.argoproj.io/compare-options") != "ServerSideDiff=true":
            yield f"{who}: argocd.argoproj.io/compare-options must be ServerSideDiff=true"
        if spec.get("ignoreDifferences"):
            yield f"{who}: ignoreDifferences hides changes; write the field as it is stored"
        if spec["syncPolicy"].get("retry", {}).get("refresh") is not True:
            yield f"{who}: retry.refresh must be true, or a revert waits for the tries of the commit before"


def _of(build: Build, *kinds: str) -> list[Object]:
    return [d for d in build.objects if d["kind"] in kinds]


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
    "models": models_are_named_by_content,
    "services": services_are_complete,
    "drains": drains_end_in_time,
    "drift": services_stay_as_written,
    "autoscaling": replicas_come_and_go_slowly,
    "alerts": alerts_say_what_is_wrong,
    "projects": projects_are_narrow,
    "applications": applications_are_safe,
}


def problems(build: Build) -> dict[str, list[str]]:
    """What each policy has against a build. Partial objects are somebody else's: only their roles are looked at."""
    chosen = {"RBAC": roles_are_narrow, "no secret in Git": no_secret_values} if build.partial else dict(POLICIES)
    if build.name == "test":
        chosen["self-contained"] = is_self_contained
    return {name: list(policy(build)) for name, policy in chosen.items()}
