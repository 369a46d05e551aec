"""The champion as promotion writes it, and Argo CD's Applications around it."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from avrt_lib.config import Config, load
from avrt_lib.promotion.manifest import inference_service, to_dict, to_yaml
from avrt_lib.serving.gitops import MANIFEST_FILE
from avrt_lib.store import ModelPlace
from scripts import manifests
from scripts.manifest_policies import CLUSTER_KINDS, Build, Object, containers, group, pods
from tests.manifests.conftest import one

ENVIRONMENTS = ("staging", "production")
SHA = "0" * 64
STOP = "serving.kserve.io/stop"


@pytest.fixture(scope="module")
def config() -> Config:
    """What a run of the 3 B model is configured with."""
    return load(manifests.ROOT / "configs" / "avrt-3b.yaml", pinned=False)


def place(sha256: str) -> ModelPlace:
    """Where promotion publishes a model."""
    return ModelPlace(f"s3://avrt/models/avrt-3b/{sha256}", sha256, 1)


def champion_file(config: Config, root: Path) -> Path:
    """Where promotion writes the champion, in a repository that holds manifests/ at its top."""
    return root / config.deployment.manifests_path / config.promotion.model_name / MANIFEST_FILE


def test_the_champion_before_the_first_promotion_is_like_a_promoted_one_but_stopped(config: Config) -> None:
    written = yaml.safe_load(champion_file(config, manifests.MANIFESTS).read_text(encoding="utf-8"))
    assert written["metadata"]["annotations"].pop(STOP) == "true"
    assert written == to_dict(inference_service(config, place(SHA), None))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_promotion_changes_one_file_and_is_served_everywhere(
    config: Config, environment: str, tmp_path: Path
) -> None:
    manifests.install_tools()
    shutil.copytree(manifests.MANIFESTS, tmp_path / "repository")
    path = champion_file(config, tmp_path / "repository")
    path.write_text(to_yaml(inference_service(config, place("ab" * 32), 7)), encoding="utf-8")
    objects = manifests.render(tmp_path / "repository" / "serving" / environment)
    service = one(Build("promoted", objects), "InferenceService", "avrt-3b")
    assert service["spec"]["predictor"]["model"]["storageUri"] == place("ab" * 32).uri
    assert STOP not in service["metadata"]["annotations"]
    assert "serving.kserve.io/autoscalerClass" in service["metadata"]["annotations"]


def test_the_cache_follows_the_promoted_model(rendered: dict[str, Build]) -> None:
    build = rendered["components/model-cache"]
    cache = one(build, "LocalModelNamespaceCache", "avrt-3b-1")
    service = one(build, "InferenceService", "avrt-3b")
    assert cache["spec"]["sourceModelUri"] == service["spec"]["predictor"]["model"]["storageUri"]
    group_ = one(rendered["components/model-cache-nodes"], "LocalModelNodeGroup", "avrt-gpu", None)
    assert cache["spec"]["nodeGroups"] == [group_["metadata"]["name"]]


def test_the_llm_inference_service_takes_the_place_of_the_champion(rendered: dict[str, Build], config: Config) -> None:
    build = rendered["components/llm-inference-service"]
    assert [d["kind"] for d in build.objects if group(d) == "serving.kserve.io"] == ["LLMInferenceService"]
    service = one(build, "LLMInferenceService", "avrt-3b")
    (container,) = service["spec"]["template"]["containers"]
    promoted = to_dict(inference_service(config, place(SHA), None))["spec"]["predictor"]["model"]
    assert service["spec"]["model"]["uri"] == promoted["storageUri"]
    assert container["resources"] == promoted["resources"]
    assert set(promoted["args"]) <= set(container["args"])


def gib(quantity: str) -> float:
    """A quantity of memory in GiB."""
    number, unit = re.fullmatch(r"(\d+)([MGT]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 1 / 1024, "Gi": 1, "Ti": 1024}[unit]


def cores(quantity: str) -> float:
    """A quantity of CPU in cores."""
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else int(quantity)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_quota_has_room_for_a_rollout_at_full_size(rendered: dict[str, Build], environment: str) -> None:
    """All replicas, the one more of a rolling update, and a candidate, beside the platform's own pods."""
    serving, platform = rendered[f"serving/{environment}"], rendered[environment]
    predictor = one(serving, "InferenceService", "avrt-3b")["spec"]["predictor"]
    largest = max(
        [predictor["maxReplicas"]]
        + [d["spec"]["maxReplicaCount"] for d in serving.objects if d["kind"] == "ScaledObject"]
    )
    count = largest + math.ceil(largest / 4) + 1
    wanted = predictor["model"]["resources"]["requests"]
    cpu, memory = count * cores(wanted["cpu"]), count * gib(wanted["memory"])
    for document, pod in pods(platform):
        if document["kind"] in ("Deployment", "StatefulSet"):
            for container in containers(pod):
                requests = container["resources"]["requests"]
                cpu += document["spec"].get("replicas", 1) * cores(requests["cpu"])
                memory += document["spec"].get("replicas", 1) * gib(requests["memory"])
    hard = one(platform, "ResourceQuota", "avrt")["spec"]["hard"]
    assert int(hard["requests.nvidia.com/gpu"]) >= count * int(wanted["nvidia.com/gpu"])
    assert cores(hard["requests.cpu"]) >= cpu
    assert gib(hard["requests.memory"]) >= memory


def followed(rendered: dict[str, Build], environment: str) -> dict[str, tuple[Object, list[Object]]]:
    """By AppProject: its specification, and the objects of the folder that its Application follows."""
    bootstrap, build = rendered[f"argocd/bootstrap/{environment}"], rendered[f"argocd/applications/{environment}"]
    found = {}
    for application in (*build.objects, one(bootstrap, "Application", "avrt", "argocd")):
        spec = application["spec"]
        project = one(bootstrap, "AppProject", spec["project"], "argocd")
        objects = manifests.render(manifests.MANIFESTS / spec["source"]["path"])
        found[spec["project"]] = (project["spec"], objects)
    return found


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_applications_follow_their_environment(rendered: dict[str, Build], environment: str) -> None:
    build = rendered[f"argocd/applications/{environment}"]
    paths = {d["metadata"]["name"]: d["spec"]["source"]["path"] for d in build.objects}
    assert paths == {
        "avrt-kserve": "components/kserve-admin",
        "avrt-platform": f"overlays/{environment}",
        "avrt-models": f"serving/{environment}",
    }
    root = one(rendered[f"argocd/bootstrap/{environment}"], "Application", "avrt", "argocd")
    assert root["spec"]["source"]["path"] == f"argocd/applications/{environment}"
    revisions = {d["spec"]["source"]["targetRevision"] for d in (root, *build.objects)}
    assert revisions == {"production" if environment == "production" else "main"}


def test_the_models_come_after_what_they_need(rendered: dict[str, Build]) -> None:
    def wave(application: Object) -> int:
        return int(application["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"])

    ordered = sorted(rendered["argocd/applications/production"].objects, key=wave)
    assert [d["metadata"]["name"] for d in ordered] == ["avrt-kserve", "avrt-platform", "avrt-models"]


def kinds(objects: list[Object], *, of_cluster: bool) -> set[tuple[str, ...]]:
    """Group and kind of the objects; of those without a namespace also the name."""
    return {
        (group(d), d["kind"], d["metadata"]["name"]) if of_cluster else (group(d), d["kind"])
        for d in objects
        if (d["kind"] in CLUSTER_KINDS) is of_cluster
    }


@pytest.mark.parametrize("project", ["avrt", "avrt-kserve", "avrt-platform", "avrt-models"])
def test_a_project_allows_what_its_folders_have_and_no_more(rendered: dict[str, Build], project: str) -> None:
    both = [followed(rendered, environment)[project] for environment in ENVIRONMENTS]
    objects = [d for _, found in both for d in found]
    allowed: dict[str, Any] = both[0][0]
    of_cluster = {(k["group"], k["kind"], k["name"]) for k in allowed.get("clusterResourceWhitelist", [])}
    inside = {(k["group"], k["kind"]) for k in allowed.get("namespaceResourceWhitelist", [])}
    assert of_cluster == kinds(objects, of_cluster=True)
    assert inside == kinds(objects, of_cluster=False)
    places = {d["metadata"]["namespace"] for d in objects if d["kind"] not in CLUSTER_KINDS}
    assert places <= {place["namespace"] for place in allowed["destinations"]}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_nothing_that_argo_cd_follows_ends_or_makes_secrets(rendered: dict[str, Build], environment: str) -> None:
    """A Job that is deleted after its end would be drift, and made again for ever."""
    objects = [d for _, found in followed(rendered, environment).values() for d in found]
    assert not [d for d in objects if d["kind"] in ("Job", "Pod", "Secret")]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_prune_does_not_take_the_namespace(rendered: dict[str, Build], environment: str) -> None:
    annotations = one(rendered[environment], "Namespace", "avrt", None)["metadata"]["annotations"]
    assert annotations["argocd.argoproj.io/sync-options"] == "Prune=false,Delete=false"


def test_no_kustomization_reaches_outside_the_repository() -> None:
    for path in manifests.MANIFESTS.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name in (*document.get("resources", []), *document.get("components", [])):
            assert (path.parent / name).resolve().is_relative_to(manifests.MANIFESTS), f"{path}: {name}"
