"""What preflight says of a configuration, a profile and a cluster's nodes and quotas, without a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes import client
from pydantic import ValidationError

from avrt_lib.cluster.profile import ROLES, Pool, Profile, load_profile, secret_variables
from avrt_lib.config import load
from avrt_lib.preflight.admin import _quota, retry_policy
from avrt_lib.preflight.checks import Check
from avrt_lib.preflight.fit import fit, volumes_read
from avrt_lib.preflight.nodes import pool_check
from avrt_lib.preflight.objects import named
from pipelines.compile import PIPELINES, components_of, for_pipeline

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 1024**3


def profile(name: str = "test", **changes: Any) -> Profile:
    """A profile that comes with the package, with changed sections."""
    document = load_profile(CONFIGS / "clusters" / f"{name}.yaml").model_dump()
    for key, value in changes.items():
        document[key] = {**document[key], **value} if isinstance(document[key], dict) else value
    return Profile.model_validate(document)


def checked(
    found: Profile, variables: tuple[str, ...] = (), pipeline: str = "avrt", **settings: Any
) -> dict[str, Check]:
    """The checks of a pipeline by name."""
    config, components = load(CONFIGS / "miniature.yaml", found.overrides | settings), components_of(pipeline)
    found = found.for_pipeline(components)
    return {check.name: check for check in fit(for_pipeline(config, pipeline), found, set(variables), components)}


def failing(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.status != "ok"]


@pytest.mark.parametrize("name", ["test", "onprem-h100", "gke", "eks", "openshift-ai"])
def test_the_miniature_fits_every_profile(name: str) -> None:
    assert failing(checked(profile(name))) == []


@pytest.mark.parametrize(
    ("pipeline", "asked"),
    [
        ("avrt", {"Key merger.engine", "GPUs teachers.vision.engine", "Path teachers.audio.engine.model"}),
        ("data", {"Key merger.engine", "GPUs teachers.vision.engine", "Path teachers.audio.engine.model"}),
        ("train", set()),
        ("evaluate", set()),
    ],
)
def test_only_what_steps_of_the_pipeline_need_is_asked_for(pipeline: str, asked: set[str]) -> None:
    settings = {
        "merger.engine.kind": "endpoint",
        "merger.engine.base_url": "https://models.example.com/v1",
        "merger.engine.api_key_env": "MERGER_KEY",
        "teachers.vision.engine.tensor_parallel_size": 64,
        "teachers.audio.engine.model": "/elsewhere/audio",
    }
    assert set(failing(checked(profile("onprem-h100"), pipeline=pipeline, **settings))) == asked


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": {"team name": "a"}}, "labels has the key 'team name'"),
        ({"annotations": {"Example.com/owner": "somebody's"}}, "annotations has the key 'Example.com/owner'"),
        ({"annotations": {"a/b/c": ""}}, "annotations has the key 'a/b/c'"),
        ({"pools": {"cpu": Pool(node_selector={"pool:": "cpu"})}}, "pools.cpu.node_selector has the key 'pool:'"),
        ({"pools": {"cpu": Pool(tolerations=[{"key": "-gpu"}])}}, "pools.cpu.tolerations has the key '-gpu'"),
        (
            {"pools": {"cpu": Pool(affinity=[{"key": "zone ", "values": ["a"]}])}},
            "pools.cpu.affinity has the key 'zone '",
        ),
    ],
)
def test_a_key_that_no_pod_may_have_is_said_before_the_run(changes: dict[str, Any], said: str) -> None:
    check = checked(profile(**changes))["Names"]
    assert check.status == "failed"
    assert said in check.found


def test_keys_that_pods_may_have() -> None:
    keys = ("team", "example.com/Team_1", "sidecar.istio.io/inject", "a", "A.b-c")
    assert (
        checked(profile(labels=dict.fromkeys(keys, "x"), annotations=dict.fromkeys(keys, "any: thing")))["Names"].status
        == "ok"
    )


def test_a_pipeline_has_the_pools_of_its_steps() -> None:
    roles = {name: set(profile().for_pipeline(components_of(name)).pools) for name in PIPELINES}
    assert roles == {
        "avrt": set(ROLES),
        "data": {"cpu", "teacher", "merger"},
        "train": {"cpu", "training", "evaluation"},
        "evaluate": {"cpu", "evaluation"},
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"promotion.model_name": "m" * 40, "deployment.namespace": "n" * 3}, f"{'m' * 40}-candidate"),
        ({"promotion.model_name": "7b"}, "must start with a letter"),
        ({"deployment.namespace": "Team"}, "deployment.namespace Team is no DNS label"),
    ],
)
def test_names_that_kserve_cannot_use(settings: dict[str, str], said: str) -> None:
    check = checked(profile(), **settings)["Names"]
    assert check.status == "failed"
    assert said in check.found


def test_names_that_are_no_labels() -> None:
    check = checked(profile(labels={"team": "x" * 64}, kueue=None))["Names"]
    assert "labels.team" in check.found
    check = checked(Profile.model_validate(profile().model_dump() | {"kueue": {"queue": "q" * 64}}))["Names"]
    assert "kueue.queue" in check.found


def test_a_pod_cannot_keep_or_serve_models() -> None:
    assert checked(profile(), **{"store.kind": "local"})["Targets"].status == "failed"
    assert checked(profile(), **{"deployment.target": "local"})["Targets"].status == "warning"


@pytest.mark.parametrize(("gpus", "status"), [(1, "failed"), (2, None), (8, None)])
def test_an_engine_gets_the_gpus_that_it_runs_on(gpus: int, status: str | None) -> None:
    found = profile("onprem-h100")
    pools = {"teacher": found.pools["teacher"].model_dump() | {"gpus": gpus}}
    result = checked(profile("onprem-h100", pools=pools), **{"teachers.vision.engine.tensor_parallel_size": 2})
    check = result.get("GPUs teachers.vision.engine")
    assert (check.status if check else None) == status
    if check:
        assert "set pools.teacher.gpus to 2" in check.mend


@pytest.mark.parametrize(("processes", "status"), [(12, "failed"), (16, "warning"), (8, None), (None, None)])
def test_training_gets_the_gpus_that_its_processes_run_on(processes: int | None, status: str | None) -> None:
    check = checked(profile("onprem-h100"), **{"sft.processes": processes}).get("GPUs sft")
    assert (check.status if check else None) == status
    if check:
        assert check.mend == f"set pools.training.gpus to {processes}, or sft.processes lower"


def test_a_cuda_build_of_vllm_needs_a_gpu_unless_an_endpoint_answers() -> None:
    cuda = Profile.model_validate(profile().model_dump() | {"build": "cuda"})
    named = set(failing(checked(cuda)))
    assert named == {f"GPUs {key}" for key in ("teachers.vision.engine", "teachers.audio.engine", "merger.engine")} | {
        "GPUs evaluation",
        "GPUs grpo",
    }
    endpoint = {"kind": "endpoint", "model": "m", "base_url": "http://teacher.models.svc/v1"}
    assert "GPUs merger.engine" not in failing(checked(cuda, **{"merger.engine": endpoint}))


def test_an_endpoints_key_must_come_from_a_secret() -> None:
    endpoint = {"kind": "endpoint", "model": "m", "base_url": "http://t.svc/v1", "api_key_env": "TEACHER_KEY"}
    check = checked(profile(), **{"merger.engine": endpoint})["Key merger.engine"]
    assert check.status == "failed"
    assert "secret_env" in check.mend
    assert "Key merger.engine" not in checked(profile(), ("TEACHER_KEY",), **{"merger.engine": endpoint})


def test_folders_are_on_volumes() -> None:
    found = profile("onprem-h100")
    settings = {"student.model": "/models/student", "data.train": {"format": "avqa", "path": "/datasets/train"}}
    assert failing(checked(found, **settings)) == ["Path data.train.path"], "/datasets is not on /data"


def test_volumes_are_read_where_the_configuration_names_a_folder_on_them() -> None:
    volumes = [{"claim": path.strip("/"), "mount_path": path} for path in ("/data", "/models/", "/repository", "/more")]
    settings = {
        "student.model": "/models/student",
        "data.train": {"format": "avqa", "path": "/data"},
        "data.validation": {"format": "avqa", "path": "/moreover"},
        "deployment.target": "git",
        "deployment.manifests_url": "file:///repository/manifests.git",
    }
    found = volumes_read(load(CONFIGS / "miniature.yaml", settings), profile(volumes=volumes))
    assert [volume.claim for volume in found] == ["data", "models", "repository"]


def test_secrets_are_named_once_with_all_their_keys() -> None:
    found = Profile.model_validate(
        profile().model_dump() | {"secret_env": {"avrt-store": {"session": "TOKEN"}, "hub": {"token": "HF_TOKEN"}}}
    )
    variables = secret_variables(found)
    assert variables["avrt-store"] == {
        "access_key": "AVRT_S3_ACCESS_KEY",
        "secret_key": "AVRT_S3_SECRET_KEY",
        "session": "TOKEN",
    }
    assert variables["hub"] == {"token": "HF_TOKEN"}


@pytest.mark.parametrize(("key", "status"), [("service-ca.crt", "ok"), ("ca.crt", "failed")])
def test_the_stores_ca_has_the_key_that_the_profile_names(key: str, status: str) -> None:
    # OpenShift's service CA operator writes service-ca.crt.
    found = client.V1ConfigMap(data={"service-ca.crt": "-----BEGIN CERTIFICATE-----"})
    cluster: Any = SimpleNamespace(inside=True, core=client.CoreV1Api(), ask=lambda *_: found)
    place = profile(store={"ca_config_map": "avrt-store-ca", "ca_key": key})
    (check,) = named(cluster, place)
    assert check.status == status
    assert profile("openshift-ai").store.ca_key == "service-ca.crt"


def test_a_claim_that_is_mounted_twice_is_looked_for_once() -> None:
    volumes = [{"claim": "data", "mount_path": f"/{name}", "sub_path": name} for name in ("train", "test")]
    found = client.V1PersistentVolumeClaim(status=client.V1PersistentVolumeClaimStatus(phase="Bound"))
    cluster: Any = SimpleNamespace(inside=True, core=client.CoreV1Api(), ask=lambda *_: found)
    assert [check.name for check in named(cluster, profile(volumes=volumes))] == ["Claim data"]


def test_no_environment_holds_a_credential() -> None:
    pools = {"teacher": profile().pools["teacher"].model_dump() | {"environment": {"HF_TOKEN": "x"}}}
    with pytest.raises(ValidationError, match=r"pools\.teacher\.environment\.HF_TOKEN looks like a credential"):
        profile(pools=pools)
    with pytest.raises(ValidationError, match=r"environment\.GIT_PASSWORD looks like a credential"):
        profile(environment={"GIT_PASSWORD": "x"})
    with pytest.raises(ValidationError, match=r"environment\.HTTPS_PROXY looks like a credential"):
        profile(environment={"HTTPS_PROXY": "http://me:pass@proxy.example.com:3128"})
    with pytest.raises(ValidationError, match=r"tracking\.uri holds a password"):
        profile(tracking={"uri": "https://me:pass@mlflow.example.com"})


def test_what_becomes_a_volume_has_a_volumes_name() -> None:
    with pytest.raises(ValidationError, match=r"store\.ca_config_map"):
        profile(store={"ca_config_map": "openshift-service-ca.crt"})
    with pytest.raises(ValidationError, match=r"volumes\.0\.claim"):
        profile(volumes=[{"claim": "data.v2", "mount_path": "/data"}])
    with pytest.raises(ValidationError, match="another volume of a step's pod is called scratch"):
        profile(volumes=[{"claim": "scratch", "mount_path": "/data"}])


@pytest.mark.parametrize("paths", [("/tmp/",), ("/data", "/data/"), ("/.cache",), ("//",)])
def test_a_claim_is_mounted_where_nothing_else_is(paths: tuple[str, ...]) -> None:
    volumes = [{"claim": f"claim-{number}", "mount_path": path} for number, path in enumerate(paths)]
    with pytest.raises(ValidationError, match="is taken in a step's pod: mount claim-"):
        profile(volumes=volumes)


def test_an_environment_may_set_what_is_no_credential() -> None:
    given = {"TOKENIZERS_PARALLELISM": "false", "HTTPS_PROXY": "http://proxy.example.com:3128"}
    assert profile(environment=given).environment == given


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ({"affinity": [{"key": "gpu"}]}, "operator In needs values"),
        ({"affinity": [{"key": "gpu", "operator": "Exists", "values": ["h100"]}]}, "takes no values"),
        ({"affinity": [{"key": "memory", "operator": "Gt"}]}, "needs one whole number"),
        ({"affinity": [{"key": "memory", "operator": "Lt", "values": ["much"]}]}, "needs one whole number"),
        ({"tolerations": [{"key": "spot", "effect": "NoSchedule", "seconds": 60}]}, "needs effect: NoExecute"),
    ],
)
def test_what_kubernetes_would_refuse_in_a_pod_is_refused_in_the_profile(pool: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Pool.model_validate(pool)


def node(name: str = "n1", *, labels: dict[str, str] | None = None, taints: Any = (), **has: str) -> client.V1Node:
    """A node; ``gpu``, ``cpu``, ``memory`` and ``disk`` are what it can give."""
    allocatable = {"cpu": has.get("cpu", "96"), "memory": has.get("memory", "1Ti")}
    allocatable["ephemeral-storage"] = has.get("disk", "1Ti")
    if "gpu" in has:
        allocatable["nvidia.com/gpu"] = has["gpu"]
    return client.V1Node(
        metadata=client.V1ObjectMeta(name=name, labels=labels or {"pool": "gpu"}),
        spec=client.V1NodeSpec(
            taints=[client.V1Taint(key=key, value=value, effect=effect) for key, value, effect in taints],
            unschedulable=has.get("cordoned") == "yes" or None,
        ),
        status=client.V1NodeStatus(allocatable=allocatable),
    )


TAINT = ("nvidia.com/gpu", "present", "NoSchedule")
GPU = Pool.model_validate(
    {
        "node_selector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "gpus": 8,
        "cpu_request": "64",
        "memory_request": "512Gi",
        "scratch": "500Gi",
    }
)
GOOD = {"taints": [TAINT], "gpu": "8"}


@pytest.mark.parametrize(
    ("nodes", "status", "said"),
    [
        ([node(**GOOD)], "ok", "1 nodes with pool=gpu"),
        ([], "failed", "no node has pool=gpu"),
        ([node(labels={"pool": "cpu"}, **GOOD)], "failed", "no node has pool=gpu"),
        ([node(cordoned="yes", **GOOD)], "failed", "no node has pool=gpu"),
        ([node(taints=[TAINT, ("team", "other", "NoExecute")], gpu="8")], "failed", "team=other:NoExecute"),
        ([node(taints=[TAINT, ("spot", "", "PreferNoSchedule")], gpu="8")], "ok", "1 nodes"),
        ([node(taints=[TAINT])], "failed", "no node with pool=gpu has nvidia.com/gpu"),
        ([node(taints=[TAINT], gpu="4")], "failed", "they have 4 nvidia.com/gpu, 96 CPU, 1024.0 GiB"),
        ([node(cpu="32", **GOOD)], "failed", "no node is large enough for 8 nvidia.com/gpu, 64 CPU, 512.0 GiB"),
        ([node(memory="100Gi", **GOOD)], "failed", "no node is large enough"),
        ([node(disk="100Gi", **GOOD)], "warning", "no node has 500Gi of disk for scratch, but 100 GiB at most"),
        ([node("a", cpu="1", **GOOD), node("b", **GOOD)], "ok", "2 nodes"),
    ],
)
def test_a_pools_nodes(nodes: list[client.V1Node], status: str, said: str) -> None:
    check = pool_check("training", GPU, nodes, autoscaled=False)
    assert check.status == status
    assert said in check.found
    assert bool(check.mend) == (status != "ok")


def test_an_autoscaled_pool_may_have_no_node_now() -> None:
    assert pool_check("training", GPU, [], autoscaled=True).status == "warning"
    assert pool_check("training", GPU, [node(taints=[TAINT])], autoscaled=True).status == "failed"


@pytest.mark.parametrize(
    ("operator", "values", "matches"),
    [
        ("In", ["h100", "h200"], True),
        ("In", ["l4"], False),
        ("NotIn", ["l4"], True),
        ("NotIn", ["h100"], False),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
    ],
)
def test_affinity_is_read_as_the_scheduler_reads_it(operator: str, values: list[str], matches: bool) -> None:
    pool = Pool.model_validate({"affinity": [{"key": "gpu", "operator": operator, "values": values}]})
    found = pool_check("merger", pool, [node(labels={"gpu": "h100"})], autoscaled=False)
    assert (found.status == "ok") == matches


@pytest.mark.parametrize(("value", "matches"), [("80", True), ("40", False), ("many", False)])
def test_affinity_compares_numbers(value: str, matches: bool) -> None:
    pool = Pool.model_validate({"affinity": [{"key": "memory", "operator": "Gt", "values": ["64"]}]})
    assert (pool_check("merger", pool, [node(labels={"memory": value})], autoscaled=False).status == "ok") == matches


def test_cpu_steps_on_gpu_nodes_are_warned_of() -> None:
    check = pool_check("cpu", Pool(), [node("big", gpu="8")], autoscaled=False)
    assert check.status == "warning"
    assert "big" in check.found
    assert pool_check("cpu", Pool(), [node(**GOOD), node("small")], autoscaled=False).status == "ok"


def quota(hard: dict[str, str], used: dict[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """Status and text of what a quota does to the on-premise profile."""
    found = client.V1ResourceQuota(
        metadata=client.V1ObjectMeta(name="team"),
        spec=client.V1ResourceQuotaSpec(hard=hard),
        status=client.V1ResourceQuotaStatus(hard=hard, used=used or dict.fromkeys(hard, "0")),
    )
    return {check.status: (check.found, check.mend) for check in _quota(found, profile("onprem-h100"))}


def test_a_quota_below_the_largest_pod_fails_and_names_it() -> None:
    found = quota({"requests.nvidia.com/gpu": "4"})
    assert found["failed"] == (
        "requests.nvidia.com/gpu is 4, but one pod of training asks for more",
        "raise the quota, or lower pools.training",
    )


def test_a_quota_that_is_taken_makes_pods_wait() -> None:
    found = quota({"requests.memory": "1Ti"}, {"requests.memory": "900Gi"})
    assert "900Gi of 1Ti requests.memory are taken" in found["warning"][0]


def test_a_quota_of_limits_refuses_pods_without() -> None:
    assert "refuses pods without it" in quota({"limits.cpu": "1k"})["warning"][0]
    assert quota({"limits.memory": "2Ti"}) == {}


def test_a_quota_with_room_is_fine() -> None:
    assert quota({"requests.cpu": "100", "requests.nvidia.com/gpu": "8", "pods": "50", "count/jobs.batch": "5"}) == {}


STOCK = "spec: {templateDefaults: {retryStrategy: {limit: '2', retryPolicy: OnError}}}"


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"workflowDefaults": STOCK}, "OnError"),
        ({"workflowDefaults": STOCK.replace("OnError", "Always")}, "Always"),
        ({"workflowDefaults": "spec: {ttlStrategy: {}}"}, "OnFailure"),
        ({}, "OnFailure"),
        ({"config": f"workflowDefaults: {{{STOCK}}}"}, "OnError"),
        ({"workflowDefaults": "- not a mapping"}, "OnFailure"),
    ],
)
def test_argos_retry_policy_is_read(settings: dict[str, str], policy: str) -> None:
    assert retry_policy(settings) == policy
