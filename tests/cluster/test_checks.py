"""Preflight's questions to a real API server: as an administrator from outside, and with the rights of a run's pod."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, utils

from avrt_lib.cluster.profile import Profile, load_profile
from avrt_lib.config import Config, load
from avrt_lib.preflight import services
from avrt_lib.preflight.checks import Check
from avrt_lib.preflight.cluster import cluster_checks
from avrt_lib.preflight.objects import MAKES_SECRETS
from tests.cluster import gateway
from tests.cluster.simulated import wait_for
from tests.kubeconfig import write_account_kubeconfig, write_kubeconfig

CONFIGS = Path(__file__).parents[2] / "configs"
ACCOUNT = "pipeline-runner"
KEYS = {
    "avrt-store": ("access_key", "secret_key"),
    "avrt-mlflow": ("username", "password"),
    "avrt-api-key": ("api_key",),
}
PASSWORD = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AVRT_S3_ENDPOINT", "MLFLOW_TRACKING_USERNAME", "AVRT_CLUSTER_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(services, "COMING_UP_S", 0.0)


@pytest.fixture
def profile(namespace: str) -> Profile:
    """The profile ``test``, with its runs in the namespace."""
    document = load_profile(CONFIGS / "clusters" / "test.yaml").model_dump()
    document["pipelines"]["namespace"] = namespace
    return Profile.model_validate(document)


def changed(profile: Profile, **changes: Any) -> Profile:
    document = profile.model_dump()
    for key, value in changes.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) and document[key] else value
    return Profile.model_validate(document)


def run_config(profile: Profile, **settings: Any) -> Config:
    """The miniature, deployed to the namespace of the runs."""
    overrides = profile.overrides | {"deployment.namespace": profile.pipelines.namespace} | settings
    return load(CONFIGS / "miniature.yaml", overrides)


def found(profile: Profile, **settings: Any) -> dict[str, Check]:
    """The checks by name; none of them may say a secret's value."""
    started = time.monotonic()
    checks = cluster_checks(run_config(profile, **settings), profile)
    assert time.monotonic() - started < 60
    assert PASSWORD not in "".join(check.line() for check in checks)
    return {check.name: check for check in checks}


def make_secrets(core: client.CoreV1Api, namespace: str) -> None:
    for name, keys in KEYS.items():
        data = {key: base64.b64encode(PASSWORD.encode()).decode() for key in keys}
        core.create_namespaced_secret(
            namespace, client.V1Secret(metadata=client.V1ObjectMeta(name=name), data=data, type="Opaque")
        )


def make_account(core: client.CoreV1Api, namespace: str) -> None:
    core.create_namespaced_service_account(
        namespace, client.V1ServiceAccount(metadata=client.V1ObjectMeta(name=ACCOUNT))
    )


def allow(namespace: str, rules: list[client.V1PolicyRule]) -> None:
    """A role for the runs' service account."""
    rights = client.RbacAuthorizationV1Api()
    name = client.V1ObjectMeta(name="runs")
    rights.create_namespaced_role(namespace, client.V1Role(metadata=name, rules=rules))
    rights.create_namespaced_role_binding(
        namespace,
        client.V1RoleBinding(
            metadata=name,
            role_ref=client.V1RoleRef(api_group="rbac.authorization.k8s.io", kind="Role", name="runs"),
            subjects=[client.RbacV1Subject(kind="ServiceAccount", name=ACCOUNT, namespace=namespace)],
        ),
    )


def rule(verbs: str, group: str, resources: str) -> client.V1PolicyRule:
    return client.V1PolicyRule(verbs=verbs.split(), api_groups=[group], resources=resources.split())


DEPLOYER = [
    rule("get create update delete", "serving.kserve.io", "inferenceservices"),
    rule("get create update", "coordination.k8s.io", "leases"),
    rule("get", "apps", "deployments"),
    rule("list", "", "pods"),
    rule("list", "", "events"),
]


@pytest.fixture(scope="module")
def kserve(core: client.CoreV1Api, shared_folder: Path) -> Iterator[None]:
    """KServe's definitions; made here where the cluster has none, and then removed again."""
    definitions = client.ApiextensionsV1Api()
    made = []
    if "serving.kserve.io" not in {group.name for group in client.ApisApi().get_api_versions().groups}:
        for kind in ("inferenceservices", "servingruntimes", "clusterservingruntimes"):
            file = shared_folder / "crds" / f"serving.kserve.io_{kind}.yaml"
            document = yaml.safe_load(file.read_text(encoding="utf-8"))
            document["spec"].pop("conversion", None)  # its webhook is not here
            utils.create_from_dict(client.ApiClient(), document)
            made.append(document["metadata"]["name"])
        assert wait_for(lambda: _serves("servingruntimes"), 30)
    yield
    for name in made:
        definitions.delete_custom_resource_definition(name)


def _serves(plural: str) -> bool:
    try:
        client.CustomObjectsApi().list_cluster_custom_object("serving.kserve.io", "v1alpha1", plural)
    except client.ApiException:
        return False
    return True


def make_runtime(namespace: str) -> None:
    container = {"name": "kserve-container", "image": "avrt/vllm:test"}
    document = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": "avrt-vllm"},
        "spec": {"supportedModelFormats": [{"name": "vLLM"}], "containers": [container]},
    }
    client.CustomObjectsApi().create_namespaced_custom_object(
        "serving.kserve.io", "v1alpha1", namespace, "servingruntimes", document
    )


@pytest.fixture
def as_pod(
    core: client.CoreV1Api, namespace: str, profile: Profile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This process gets the environment and the rights of the first step's pod."""
    make_account(core, namespace)
    monkeypatch.setenv("KUBECONFIG", write_account_kubeconfig(tmp_path / "kubeconfig", namespace, ACCOUNT))
    monkeypatch.setenv("AVRT_CLUSTER_PROFILE", profile.model_dump_json(exclude_defaults=True))


def test_an_empty_namespace_lacks_everything_and_each_line_has_a_mend(profile: Profile) -> None:
    checks = found(profile)
    failed = {name for name, check in checks.items() if check.status == "failed"}
    assert failed >= {"Secret avrt-store", "Secret avrt-mlflow", "Secret avrt-api-key", f"Service account {ACCOUNT}"}
    assert all(check.mend for check in checks.values() if check.status in ("failed", "warning"))
    assert "create secret generic avrt-store --from-literal=access_key=…" in checks["Secret avrt-store"].mend


def test_secrets_are_complete_or_named(core: client.CoreV1Api, namespace: str, profile: Profile) -> None:
    make_secrets(core, namespace)
    core.patch_namespaced_secret("avrt-store", namespace, {"data": {"secret_key": None}})
    checks = found(profile)
    assert checks["Secret avrt-mlflow"].status == "ok"
    assert checks["Secret avrt-store"].found.endswith("has no secret_key")


def test_a_secret_that_a_job_is_about_to_make_is_coming_up(
    core: client.CoreV1Api, namespace: str, profile: Profile
) -> None:
    jobs = client.BatchV1Api()
    container = client.V1Container(name="c", image="avrt/pipeline:none")
    pod = client.V1PodTemplateSpec(spec=client.V1PodSpec(containers=[container], restart_policy="Never"))
    metadata = client.V1ObjectMeta(name="credentials", annotations={MAKES_SECRETS: f"{namespace}/avrt-store"})
    job = client.V1Job(metadata=metadata, spec=client.V1JobSpec(template=pod, suspend=True))
    jobs.create_namespaced_job(namespace, job)
    checks = found(profile)
    assert checks["Secret avrt-store"].status == "failed"
    assert checks["Secret avrt-store"].coming_up
    assert not checks["Secret avrt-mlflow"].coming_up, "no Job makes it"
    jobs.delete_namespaced_job("credentials", namespace, propagation_policy="Background")
    assert wait_for(lambda: not found(profile)["Secret avrt-store"].coming_up, 10)


def test_the_store_has_a_pod_that_is_ready(core: client.CoreV1Api, namespace: str, profile: Profile) -> None:
    inner = changed(profile, store={"endpoint": f"avrt-store.{namespace}.svc.cluster.local:8333"})
    check = found(inner)["Service avrt-store"]
    assert (check.status, check.coming_up) == ("failed", False)
    port = client.V1ServicePort(port=8333)
    service = client.V1Service(metadata=client.V1ObjectMeta(name="avrt-store"), spec=client.V1ServiceSpec(ports=[port]))
    core.create_namespaced_service(namespace, service)
    for ready, expected in ((None, ("failed", True)), (False, ("failed", True)), (True, ("ok", False))):
        if ready is not None:
            _set_endpoint(namespace, ready=ready)
        check = found(inner)["Service avrt-store"]
        assert (check.status, check.coming_up) == expected


def _set_endpoint(namespace: str, *, ready: bool) -> None:
    slices = client.DiscoveryV1Api()
    endpoint = client.V1Endpoint(addresses=["10.0.0.1"], conditions=client.V1EndpointConditions(ready=ready))
    metadata = client.V1ObjectMeta(name=f"store-{ready}".lower(), labels={"kubernetes.io/service-name": "avrt-store"})
    slices.create_namespaced_endpoint_slice(
        namespace, client.V1EndpointSlice(metadata=metadata, address_type="IPv4", endpoints=[endpoint])
    )


def test_the_api_key_matters_only_where_a_model_is_served(profile: Profile) -> None:
    assert "Secret avrt-api-key" not in found(profile, **{"deployment.target": "local"})


def test_claims_config_maps_and_pull_secrets(core: client.CoreV1Api, namespace: str, profile: Profile) -> None:
    wanting = changed(
        profile,
        image_pull_secrets=["registry"],
        volumes=[{"claim": "data", "mount_path": "/data"}],
        store={"ca_config_map": "store-ca"},
    )
    names = ("Image pull secret registry", "Claim data", "Config map store-ca")
    checks = found(wanting)
    assert [checks[name].status for name in names] == ["failed"] * 3
    name = client.V1ObjectMeta
    core.create_namespaced_secret(namespace, client.V1Secret(metadata=name(name="registry"), string_data={"a": "b"}))
    core.create_namespaced_config_map(
        namespace, client.V1ConfigMap(metadata=name(name="store-ca"), data={"other.crt": "x"})
    )
    core.create_namespaced_persistent_volume_claim(
        namespace,
        client.V1PersistentVolumeClaim(
            metadata=name(name="data"),
            spec=client.V1PersistentVolumeClaimSpec(
                access_modes=["ReadWriteOnce"],
                resources=client.V1VolumeResourceRequirements(requests={"storage": "1Gi"}),
            ),
        ),
    )
    checks = found(wanting)
    assert [checks[name].status for name in names] == ["ok", "ok", "failed"]
    assert "has no ca.crt" in checks["Config map store-ca"].found


def test_without_kserve_the_mend_says_so(core: client.CoreV1Api, profile: Profile) -> None:
    if _serves("servingruntimes"):
        pytest.skip("this cluster has KServe")
    check = found(profile)["KServe"]
    assert check.status == "failed"
    assert "CRDs are missing" in check.found
    assert "KServe" not in found(profile, **{"deployment.target": "local"})


@pytest.mark.usefixtures("kserve")
def test_serving_needs_runtime_account_and_permission(core: client.CoreV1Api, namespace: str, profile: Profile) -> None:
    names = ("KServe", "Serving runtime", "Model's service account", "Permission")
    checks = found(profile)
    assert [checks[name].status for name in names] == ["ok", "failed", "failed", "failed"]
    refused = ", ".join(f"{verb} inferenceservices" for verb in ("get", "create", "update", "delete"))
    assert f"may not {refused}, get leases" in checks["Permission"].found
    make_runtime(namespace)
    core.create_namespaced_service_account(
        namespace, client.V1ServiceAccount(metadata=client.V1ObjectMeta(name="avrt-models"))
    )
    allow(namespace, DEPLOYER)
    assert wait_for(lambda: found(profile)["Permission"].status == "ok", 10)
    checks = found(profile)
    assert [checks[name].status for name in names] == ["ok"] * 4


@pytest.mark.usefixtures("kserve")
def test_a_share_of_the_traffic_needs_its_route(namespace: str, profile: Profile) -> None:
    settings = {"deployment.route": gateway.ROUTE}
    assert "Route" not in found(profile)
    if not gateway.has_routes():
        assert "CRDs are missing" in found(profile, **settings)["Route"].found
    with gateway.routes():
        checks = found(profile, **settings)
        assert (checks["Route"].status, checks["Route"].found.split()[:3]) == ("failed", ["there", "is", "no"])
        assert "get httproutes, patch httproutes" in checks["Permission"].found
        gateway.make_route(namespace, "champion")
        assert found(profile, **settings)["Route"].status == "ok"


@pytest.mark.usefixtures("as_pod")
def test_a_pod_without_rights_says_what_it_could_not_see(profile: Profile) -> None:
    checks = found(profile)
    assert checks["Pools"].status == checks["Quota"].status == "not checked"
    assert "Cluster" not in checks
    assert checks["Secret avrt-store"].status == "failed", "its environment lacks what the secret gives"
    assert f"Service account {ACCOUNT}" not in checks


@pytest.mark.usefixtures("as_pod", "kserve")
def test_a_pod_asks_for_its_own_permission(core: client.CoreV1Api, namespace: str, profile: Profile) -> None:
    assert found(profile)["Permission"].status == "failed"
    make_secrets(core, namespace)
    make_runtime(namespace)
    allow(namespace, [*DEPLOYER, rule("get", "", "secrets serviceaccounts"), rule("get", "serving.kserve.io", "*")])
    assert wait_for(lambda: found(profile)["Permission"].status == "ok", 10)
    checks = found(profile)
    assert checks["Secret avrt-store"].status == checks["Serving runtime"].status == "ok"
    assert checks["Model's service account"].status == "failed"


def test_a_quota_that_no_pod_fits_into(core: client.CoreV1Api, namespace: str, profile: Profile) -> None:
    assert found(profile)["Quota"].status == "ok"
    core.create_namespaced_resource_quota(
        namespace,
        client.V1ResourceQuota(
            metadata=client.V1ObjectMeta(name="team"), spec=client.V1ResourceQuotaSpec(hard={"requests.memory": "1Gi"})
        ),
    )
    check = found(profile)["Quota team"]
    assert check.status == "failed"
    assert "requests.memory is 1Gi" in check.found


@pytest.mark.parametrize(
    ("policy", "fixed", "status"),
    [("OnError", False, "warning"), ("OnError", True, "warning"), ("Always", False, "ok"), ("Always", True, "ok")],
)
def test_argos_retries(
    core: client.CoreV1Api, namespace: str, profile: Profile, policy: str, fixed: bool, status: str
) -> None:
    pools = {role: pool.model_dump() | {"retries": 2} for role, pool in profile.pools.items()}
    retrying = changed(profile, pools=pools, pipelines={"retries_are_fixed": fixed})
    assert "Retries" not in found(profile), "no pool asks for retries"
    defaults = {"spec": {"templateDefaults": {"retryStrategy": {"limit": "0", "retryPolicy": policy}}}}
    core.create_namespaced_config_map(
        namespace,
        client.V1ConfigMap(
            metadata=client.V1ObjectMeta(name="workflow-controller-configmap"),
            data={"workflowDefaults": yaml.safe_dump(defaults)},
        ),
    )
    check = found(retrying)["Retries"]
    assert check.status == status
    assert policy in check.found


def test_a_queue_without_kueue_is_warned_of(core: client.CoreV1Api, profile: Profile) -> None:
    if "kueue.x-k8s.io" in {group.name for group in client.ApisApi().get_api_versions().groups}:
        check = found(changed(profile, kueue={"queue": "no-such-queue"}))["Kueue queue"]
        assert check.status == "failed"
    else:
        assert found(changed(profile, kueue={"queue": "team"}))["Kueue"].status == "warning"


def test_pools_are_looked_for_among_the_nodes(profile: Profile) -> None:
    gpus = {"node_selector": {"pool": "no-such-pool"}, "gpus": 8}
    pools = {"training": profile.pools["training"].model_dump() | gpus}
    check = found(changed(profile, pools=pools, build="cpu"))["Pool training"]
    assert check.status in ("failed", "warning"), "a warning where the cluster has an autoscaler"
    assert "no node has pool=no-such-pool" in check.found


@pytest.fixture(params=["refuses", "is silent"])
def away(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an API server that does not answer."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            server.listen()
        yield f"https://127.0.0.1:{server.getsockname()[1]}"


def test_an_api_server_that_is_away_is_one_finding_soon(
    profile: Profile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, away: str
) -> None:
    monkeypatch.setenv("KUBECONFIG", write_kubeconfig(tmp_path / "kubeconfig", away))
    started = time.monotonic()
    checks = cluster_checks(run_config(profile), profile)
    assert time.monotonic() - started < 40
    assert [check.name for check in checks if check.status == "failed"] == ["Cluster"]


def test_doctor_shows_it(
    core: client.CoreV1Api, profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from avrt_lib.cli.doctor import examine

    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(profile.model_dump(exclude_defaults=True)), encoding="utf-8")
    assert examine(None, tmp_path, 8000, path) == 7
    text = capsys.readouterr().out
    assert "miniature on test" in text
    assert "Not ready: " in text
    assert "Secret avrt-store" in text.replace("\n", " ")
