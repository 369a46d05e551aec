"""The compiled pipelines against what the cluster profiles say, written down a second time here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.cluster.profile import ROLES, Pool, Profile, amount, step_secrets
from avrt_lib.config import load
from avrt_lib.steps import STEPS
from pipelines.compile import compile_pipeline
from tests.cluster import executor_pods
from tests.golden.compiled import (
    CONFIGS,
    GOLDEN,
    IMAGES,
    PROFILES,
    ROOT,
    Case,
    Compiled,
    cases,
    compile_case,
    compiled,
    compiled_bytes,
    profile_of,
    read,
    render,
    step_of,
)

CASES = cases()
#: Steps with effects outside of the pipeline, whose results no cache may stand for.
UNCACHED = {"preflight", "promotion", "deployment", "run_summary"}

every_case = pytest.mark.parametrize("case", CASES, ids="-".join)


def executors(case: Case) -> list[tuple[str, Pool, dict[str, Any], dict[str, Any]]]:
    """Step, pool, container and placement of each executor."""
    found, profile = compiled(case), profile_of(case.profile)
    return [
        (step_of(name), profile.pool(step_of(name)), container, found.placed[name])
        for name, container in found.executors.items()
    ]


def test_every_profile_meets_every_configuration() -> None:
    assert {"test", "onprem-h100", "gke", "eks", "openshift-ai"} <= set(PROFILES)
    assert {(case.profile, case.config) for case in CASES} >= {(p, c) for p in PROFILES for c in CONFIGS}
    assert {case.pipeline for case in CASES} == {"avrt", "data", "train", "evaluate"}


@every_case
def test_each_executor_goes_to_its_pools_nodes(case: Case) -> None:
    for step, pool, _, placed in executors(case):
        assert placed.get("nodeSelector", {}).get("labels", {}) == pool.node_selector, step
        tolerations = [
            {key: value for key, value in taint.model_dump().items() if value is not None} for taint in pool.tolerations
        ]
        assert placed.get("tolerations", []) == tolerations, step
        terms = [term.model_dump(exclude_defaults=True) for term in pool.affinity]
        found = [term for each in placed.get("nodeAffinity", []) for term in each["matchExpressions"]]
        assert [{**term, "operator": term.get("operator", "In")} for term in terms] == found, step
        assert all("weight" not in each for each in placed.get("nodeAffinity", [])), "it is required, not preferred"
        assert len(placed.get("nodeAffinity", [])) <= 1, "several terms would mean: any of them"


@every_case
def test_each_executor_asks_for_its_pools_resources(case: Case) -> None:
    for step, pool, container, placed in executors(case):
        resources = container["resources"]
        gpus = resources.get("accelerator", {})
        assert int(gpus.get("resourceCount", 0)) == pool.gpus, step
        assert gpus.get("resourceType", pool.gpu_resource) == pool.gpu_resource, step
        asked = [resources.get(f"resource{key}") for key in ("CpuRequest", "CpuLimit", "MemoryRequest", "MemoryLimit")]
        assert asked == [pool.cpu_request, pool.cpu_limit, pool.memory_request, pool.memory_limit], step
        mounts = {each["mountPath"]: each for each in placed.get("emptyDirMounts", [])}
        assert mounts.get("/dev/shm", {}).get("sizeLimit") == pool.shared_memory, step
        assert mounts.get("/dev/shm", {}).get("medium", "Memory") == "Memory", step
        assert mounts.get("/tmp", {}).get("sizeLimit") == pool.scratch, step


@every_case
def test_no_cpu_step_takes_a_gpu_or_a_gpu_pools_nodes(case: Case) -> None:
    profile = profile_of(case.profile)
    gpu_pools = [pool for pool in profile.pools.values() if pool.gpus]
    for step, _, container, placed in executors(case):
        if step in ROLES["cpu"]:
            assert "accelerator" not in container["resources"], step
            assert "tolerations" not in placed, "the taint of GPU nodes keeps it away"
            selectors = [pool.node_selector for pool in gpu_pools if pool.node_selector]
            assert placed.get("nodeSelector", {}).get("labels", {}) not in selectors, step


def test_retries_are_such_as_argo_understands() -> None:
    seen = 0
    for case in CASES:
        found, profile = compiled(case), profile_of(case.profile)
        for executor, task, _ in found.tasks():
            step, policy = step_of(executor), task.get("retryPolicy")
            pool = profile.pool(step)
            retries = 0 if step == "preflight" else pool.retries
            assert (policy or {}).get("maxRetryCount", 0) == retries, (case, step)
            if policy:
                seen += 1
                assert policy["backoffFactor"] == int(policy["backoffFactor"])
                budget = int(policy["backoffMaxDuration"].removesuffix("s"))
                waits = sum(pool.retry_wait_s * 2**attempt for attempt in range(retries))
                assert budget >= (retries + 1) * (pool.timeout_s or 0) + waits, "the budget counts from the first start"
    assert seen


@every_case
def test_timeouts_end_what_hangs(case: Case) -> None:
    for step, pool, _, placed in executors(case):
        assert placed.get("activeDeadlineSeconds") == (str(pool.timeout_s) if pool.timeout_s else None), step
        assert pool.timeout_s, f"{case.profile}: pools of {step} wait for ever"


@every_case
def test_secrets_come_by_name_to_whom_they_concern(case: Case) -> None:
    profile = profile_of(case.profile)
    usual = {profile.store.secret: {"access_key": "AVRT_S3_ACCESS_KEY", "secret_key": "AVRT_S3_SECRET_KEY"}}
    if profile.tracking and profile.tracking.secret:
        usual[profile.tracking.secret] = {
            "username": "MLFLOW_TRACKING_USERNAME",
            "password": "MLFLOW_TRACKING_PASSWORD",
        }
    deploying = {"avrt-api-key": {"api_key": "AVRT_API_KEY"}, **profile.secret_env}
    assert set(profile.secret_env) <= {"avrt-git"}
    for step, _, _, placed in executors(case):
        expected = usual | (deploying if step in ("preflight", "deployment") else {})
        assert secrets(placed) == expected, step
        optional = {each["secretName"] for each in placed["secretAsEnv"] if each["optional"]}
        lenient = step in ("preflight", "run_summary")  # they say what is missing, so they must start without it
        assert optional == (set(expected) if lenient else {"avrt-api-key"} & set(expected)), step


def secrets(placed: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The variables that an executor takes from secrets: secret -> {key: variable}."""
    return {
        each["secretName"]: {key["secretKey"]: key["envVar"] for key in each["keyToEnv"]}
        for each in placed["secretAsEnv"]
    }


def changed(profile: str, changes: dict[str, Any], settings: dict[str, Any], folder: Path) -> Compiled:
    """The miniature, with changes of the profile and settings of the configuration."""
    document = profile_of(profile).model_dump()
    place = Profile.model_validate(document | changes)
    config = load(ROOT / "configs" / "miniature.yaml", place.overrides | settings)
    compile_pipeline(config, folder / "p.yaml", IMAGES, place)
    return read((folder / "p.yaml").read_bytes())


ENDPOINT = {"kind": "endpoint", "model": "m", "base_url": "http://teacher.models.svc/v1"}


def test_a_step_that_asks_an_endpoint_takes_no_gpu_and_alone_gets_its_key(tmp_path: Path) -> None:
    asked = {"teachers.vision.engine": {**ENDPOINT, "api_key_env": "TEACHER_KEY"}, "evaluation.endpoint": ENDPOINT}
    secret_env = {"teachers": {"key": "TEACHER_KEY"}, "others": {"key": "PROXY_LOGIN"}}
    found = changed("onprem-h100", {"secret_env": secret_env}, asked, tmp_path)
    profile = profile_of("onprem-h100")
    tasks = {task["taskInfo"]["name"]: executor for executor, task, _ in found.tasks()}
    for task in ("vision-teacher", "evaluation-base"):
        placed, container = found.placed[tasks[task]], found.executors[tasks[task]]
        assert placed["nodeSelector"]["labels"] == profile.pools["cpu"].node_selector
        assert "accelerator" not in container["resources"], task
        assert "tolerations" not in placed, "the taint of GPU nodes keeps it away"
        # It works as long as with an engine of its own.
        assert placed["activeDeadlineSeconds"] == str(profile.pools["teacher"].timeout_s)
    for task in ("audio-teacher", "merger", "evaluation-sft", "evaluation-grpo"):
        assert found.executors[tasks[task]]["resources"]["accelerator"]["resourceCount"] == "1", task
    with_key = {task for task, executor in tasks.items() if "teachers" in secrets(found.placed[executor])}
    assert with_key == {"vision-teacher", "preflight"}
    assert all("others" in secrets(found.placed[executor]) for executor in tasks.values()), "nothing says whose it is"


def test_of_one_secret_a_step_gets_the_keys_that_it_needs() -> None:
    document = profile_of("gke").model_dump() | {"secret_env": {"all": {"token": "GIT_TOKEN", "other": "OTHER"}}}
    profile = Profile.model_validate(document)
    config = load(ROOT / "configs" / "miniature.yaml", profile.overrides)
    assert step_secrets(profile, config, "sft")["all"] == {"other": "OTHER"}
    assert step_secrets(profile, config, "deployment")["all"] == {"token": "GIT_TOKEN", "other": "OTHER"}


def test_pods_are_told_the_bucket_of_the_configuration_and_the_key_of_the_ca(tmp_path: Path) -> None:
    profile = profile_of("onprem-h100")
    store = {**profile.store.model_dump(), "ca_key": "service-ca.crt"}
    found = changed("onprem-h100", {"store": store}, {"store.bucket": "models"}, tmp_path)
    for container in found.executors.values():
        values = {each["name"]: each.get("value", "") for each in container["env"]}
        assert values["AVRT_S3_BUCKET"] == "models"
        assert values["AVRT_S3_CA_FILE"] == "/etc/avrt-store-ca/service-ca.crt"


def test_engines_side_by_side_have_a_thread_each_on_two_cores() -> None:
    for step, _, container, _ in executors(Case("test", "miniature")):
        threads = {each["name"]: each.get("value") for each in container["env"]}.get("OMP_NUM_THREADS")
        engine = step in ("vision_teacher", "audio_teacher", "evaluation")
        assert threads == ("1" if engine else None), step


def test_data_that_only_the_cluster_sees_is_read_anew_unless_it_has_an_identity(tmp_path: Path) -> None:
    cached = {}
    for data_hash in ("", "v3"):
        compile_case(Case("test", "miniature"), tmp_path / "p.yaml", data_hash=data_hash)
        tasks = read((tmp_path / "p.yaml").read_bytes()).tasks()
        (cached[data_hash],) = (task["cachingOptions"] for executor, task, _ in tasks if executor == "exec-ingest")
    assert cached == {"": {}, "v3": {"enableCache": True}}


@every_case
def test_the_environment_names_store_tracking_and_run(case: Case) -> None:
    profile = profile_of(case.profile)
    for step, _, container, placed in executors(case):
        values = {each["name"]: each.get("value", "") for each in container["env"]}
        assert values["AVRT_S3_ENDPOINT"] == profile.store.endpoint, step
        assert values["AVRT_S3_SECURE"] == str(int(profile.store.secure)), step
        assert values["AVRT_RUN_REPORTS"] == "store", step
        assert values["AVRT_DATA_HASH"] == "0123", step
        assert values.get("MLFLOW_TRACKING_URI") == (profile.tracking.uri if profile.tracking else None), step
        assert (profile.environment | profile.pool(step).environment).items() <= values.items(), step
        assert values["AVRT_S3_BUCKET"] == "avrt", step
        (field,) = placed["fieldPathAsEnv"]
        assert field == {"name": "AVRT_RUN_ID", "fieldPath": "metadata.labels['pipeline/runid']"}, step


@every_case
def test_only_the_first_step_gets_the_profile_and_gets_all_of_it(case: Case) -> None:
    for step, _, container, _ in executors(case):
        text = next((each["value"] for each in container["env"] if each["name"] == "AVRT_CLUSTER_PROFILE"), None)
        assert (text is not None) == (step == "preflight")
        if text is not None:
            assert Profile.model_validate_json(text) == profile_of(case.profile)


@every_case
def test_pods_are_labelled_and_secured(case: Case) -> None:
    profile = profile_of(case.profile)
    for step, _, container, placed in executors(case):
        labels = {**profile.labels, "avrt.dev/step": step}
        if profile.kueue:
            labels["kueue.x-k8s.io/queue-name"] = profile.kueue.queue
            if profile.kueue.priority_class:
                labels["kueue.x-k8s.io/priority-class"] = profile.kueue.priority_class
        assert placed["podMetadata"].get("labels") == labels, step
        assert placed["podMetadata"].get("annotations", {}) == profile.annotations, step
        security = {"runAsNonRoot": profile.run_as_non_root}
        security |= {"runAsUser": str(profile.run_as_user)} if profile.run_as_user else {}
        security |= {"runAsGroup": str(profile.run_as_group)} if profile.run_as_group else {}
        assert placed["securityContext"] == security, step
        assert placed["imagePullPolicy"] == profile.image_pull_policy, step
        pulled_with = [each["secretName"] for each in placed.get("imagePullSecret", [])]
        assert pulled_with == profile.image_pull_secrets, step
        assert container["image"] == getattr(IMAGES, STEPS[step].image), step
        claims = {each["constant"]: each["mountPath"] for each in placed.get("pvcMount", [])}
        mounted = {} if step == "run_summary" else {each.claim: each.mount_path for each in profile.volumes}
        if step == "preflight":  # it reads the data, and the models of these configurations are no folders
            mounted = {c: place for c, place in mounted.items() if case.config != "miniature" and place == "/data"}
        assert claims == mounted, step
        trusted = [each["configMapName"] for each in placed.get("configMapAsVolume", [])]
        assert trusted == ([profile.store.ca_config_map] if profile.store.ca_config_map else []), step


@every_case
def test_only_steps_with_outside_effects_are_never_cached(case: Case) -> None:
    cached: dict[bool, set[str]] = {True: set(), False: set()}
    for executor, task, _ in compiled(case).tasks():
        cached[task["cachingOptions"].get("enableCache", False)].add(step_of(executor))
    steps = cached[True] | cached[False]
    assert cached[False] == UNCACHED & steps
    assert "run_summary" in steps


@every_case
def test_parameters_stay_below_what_argo_carries(case: Case) -> None:
    graphs = [each for each in compiled(case).ir["components"].values() if "dag" in each]
    assert graphs
    assert max(len(json.dumps(each)) for each in graphs) < 100_000, "its driver gets all of it"


@pytest.mark.parametrize("profile", GOLDEN)
def test_the_outline_is_the_golden_one(profile: str) -> None:
    golden = GOLDEN[profile].read_text(encoding="utf-8")
    assert render(Case(profile, "miniature")) == golden, "if it is meant: python -m tests.golden.compiled"


@pytest.mark.slow
def test_another_process_compiles_the_same_bytes_without_a_warning(root: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::RuntimeWarning"]
    command += ["-m", "tests.golden.compiled", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning" not in done.stderr.lower()
    for case in CASES:
        assert (tmp_path / f"{'_'.join(case)}.yaml").read_bytes() == compiled_bytes(case), case


def test_a_claim_at_two_places_is_one_volume_of_a_pod(tmp_path: Path) -> None:
    volumes = [{"claim": "data", "mount_path": f"/{name}", "sub_path": name} for name in ("train", "test")]
    found = changed("test", {"volumes": volumes}, {}, tmp_path)
    spec = executor_pods.pod(found, "exec-ingest", "ingest", "run").spec
    (volume,) = (each for each in spec.volumes if each.persistent_volume_claim)
    places = [(each.mount_path, each.sub_path) for each in spec.containers[0].volume_mounts if each.name == volume.name]
    assert places == [("/train", "train"), ("/test", "test")]


def test_a_deadline_is_that_of_the_whole_run(tmp_path: Path) -> None:
    found = changed("test", {"pipelines": {"deadline_s": 86400, "ttl_s": 3600}}, {}, tmp_path)
    settings = found.platform["platforms"]["kubernetes"]["pipelineConfig"]
    assert settings == {"activeDeadlineSeconds": 86400, "resourceTtlOnCompletion": 3600}


def test_amounts_are_read_as_kubernetes_reads_them() -> None:
    from kubernetes.utils import parse_quantity

    for text in ("1", "0.5", "100m", "2k", "3M", "4G", "1T", "5Ki", "512Mi", "1.5Gi", "2Ti"):
        assert amount(text) == pytest.approx(float(parse_quantity(text)))
