"""What the repository's own overlays render to."""

from __future__ import annotations

import copy
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from avrt_lib.cluster import credentials
from avrt_lib.cluster.profile import load_profile
from avrt_lib.config import load
from avrt_lib.preflight.objects import MAKES_SECRETS
from scripts import manifests
from scripts.manifest_policies import (
    OWN_IMAGES,
    Build,
    containers,
    group,
    images_are_pinned,
    pods,
    problems,
    split_image,
)
from tests.manifests.conftest import one, with_images

STORE = "avrt-store.avrt.svc.cluster.local:8333"
#: Whose definitions AVRT_CRD_DIR is to hold.
SHARED_GROUPS = ("serving.kserve.io", "argoproj.io", "keda.sh")


def test_every_overlay_is_there(rendered: dict[str, Build]) -> None:
    assert {"dev", "staging", "production", "test", "components/kfp-admin", "components/kueue"} <= rendered.keys()


def test_every_component_is_in_something_that_is_rendered() -> None:
    found = set(manifests.LOOSE_COMPONENTS)
    for path in manifests.MANIFESTS.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        found |= {Path(name).name for name in document.get("components", [])}
        if document["kind"] == "Kustomization":
            found.add(path.parent.name)
    assert {folder.name for folder in (manifests.MANIFESTS / "components").iterdir()} <= found


def test_every_policy_is_met(rendered: dict[str, Build]) -> None:
    assert [line for build in rendered.values() for wrong in problems(build).values() for line in wrong] == []


def test_core_kinds_are_valid(rendered: dict[str, Build]) -> None:
    assert [line for build in rendered.values() for line in manifests.core_problems(build)] == []


def test_an_unknown_field_of_a_core_kind_is_refused(rendered: dict[str, Build]) -> None:
    build = Build("some", [copy.deepcopy(one(rendered["test"], "Deployment", "avrt-mlflow"))])
    build.objects[0]["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    assert "imagePulPolicy" in manifests.core_problems(build)[0]


def test_custom_kinds_are_valid(rendered: dict[str, Build]) -> None:
    known, node = manifests.definitions(manifests.custom_kinds(rendered.values())), manifests.install_schemas()
    answers = [manifests.custom_problems(build, known, node=node) for build in rendered.values()]
    assert [line for wrong, _ in answers for line in wrong] == []
    unchecked = {kind.split()[0] for _, kinds in answers for kind in kinds}
    # Kueue's definitions are neither published for npm nor asked for in AVRT_CRD_DIR.
    allowed = {"ClusterQueue", "LocalQueue", "ResourceFlavor"}
    if not known:
        allowed |= {d["kind"] for build in rendered.values() for d in build.objects if group(d) in SHARED_GROUPS}
    if not node:
        allowed |= {"Certificate", "Issuer", "ExternalSecret", "HTTPRoute", "PodMonitor", "PrometheusRule"}
    assert unchecked <= allowed


def test_an_unknown_field_of_a_custom_kind_is_refused(rendered: dict[str, Build]) -> None:
    known = manifests.definitions(["ServingRuntime"])
    if not known:
        pytest.skip("no definitions: AVRT_CRD_DIR")
    build = Build("some", [copy.deepcopy(one(rendered["test"], "ServingRuntime", "avrt-vllm"))])
    build.objects[0]["spec"]["containers"][0]["arg"] = []
    wrong, _ = manifests.custom_problems(build, known, node=False)
    assert "'arg' was unexpected" in wrong[0]


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js")
def test_an_unknown_field_is_refused_by_npms_schemas(rendered: dict[str, Build]) -> None:
    manifests.install_schemas()
    build = Build("some", [copy.deepcopy(one(rendered["production"], "ExternalSecret", "avrt-store"))])
    build.objects[0]["spec"]["data"][0]["remoteRef"]["propertyy"] = "x"
    wrong, _ = manifests.custom_problems(build, {}, node=True)
    assert wrong == ["ExternalSecret avrt/avrt-store: spec.data[0].remoteRef.propertyy: unknown field"]


@pytest.mark.slow
def test_production_is_not_printed_until_its_images_are_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    assert manifests.main(["--render", "production"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "avrt/pipeline:0.1.0 is not pinned" in printed.err


def test_production_passes_with_digests(rendered: dict[str, Build]) -> None:
    production = copy.deepcopy(rendered["production"])
    for _, pod in pods(production):
        for container in containers(pod):
            container["image"] += "@sha256:" + "0" * 64
    assert list(images_are_pinned(production)) == []


def test_the_test_overlays_images_can_be_set(rendered: dict[str, Build]) -> None:
    document = yaml.safe_load((manifests.MANIFESTS / "overlays/test/kustomization.yaml").read_text())
    assert [image["name"] for image in document["images"]] == list(OWN_IMAGES)
    assert {split_image(c["image"])[0] for _, pod in pods(rendered["test"]) for c in containers(pod)} <= set(OWN_IMAGES)


def test_images_that_were_built_take_the_place_of_any_tag(rendered: dict[str, Build]) -> None:
    built = {name: f"{name}:0.1.0-{'a' * 12}" for name in OWN_IMAGES}
    once = with_images(rendered["test"], built)
    assert {c["image"] for _, pod in pods(once) for c in containers(pod)} <= set(built.values())
    assert with_images(once, built) == once, "after `make images` the overlay has these tags already"


def test_the_job_makes_exactly_what_its_annotation_and_its_roles_say(rendered: dict[str, Build]) -> None:
    wanted = credentials.credentials(STORE)
    made = {f"avrt/{c.name}" for c in wanted} | {f"kubeflow/{c.name}" for c in wanted if c.shared}
    job = one(rendered["test"], "Job", "avrt-credentials")
    assert set(job["metadata"]["annotations"][MAKES_SECRETS].split()) == made
    for namespace in ("avrt", "kubeflow"):
        role = one(rendered["test"], "Role", "avrt-credentials", namespace)
        assert {f"{namespace}/{name}" for name in role["rules"][0]["resourceNames"]} == {
            place for place in made if place.startswith(f"{namespace}/")
        }


def test_an_external_store_gets_the_buckets_that_ours_has(rendered: dict[str, Build]) -> None:
    from avrt_lib.config import StoreConfig

    build = rendered["components/external-s3"]
    job = one(build, "Job", "avrt-buckets")["spec"]["template"]
    found = {}
    for container in job["spec"]["containers"]:
        secrets = {v["valueFrom"]["secretKeyRef"]["name"] for v in container["env"] if "valueFrom" in v}
        found[" ".join(container["args"])] = secrets
    data = one(rendered["test"], "StatefulSet", "avrt-store")["spec"]["template"]["spec"]["containers"][0]
    (ours,) = [word.partition("=")[2].split(",") for word in data["command"] if word.startswith("-bucket=")]
    assert found == {StoreConfig().bucket: {"avrt-store"}, "avrt-mlflow": {"avrt-mlflow-s3"}}
    assert set(found) == set(ours)
    policy = one(build, "NetworkPolicy", "external-s3")["spec"]["podSelector"]["matchExpressions"][0]
    assert job["metadata"]["labels"][policy["key"]] in policy["values"], "it reaches the store"


def test_the_secret_store_gives_what_the_job_makes(rendered: dict[str, Build]) -> None:
    """The same keys by either way, but for the store's certificate, which is cert-manager's."""
    for credential in credentials.credentials(STORE):
        if credential.name == "avrt-store-tls":
            assert one(rendered["production"], "Certificate", "avrt-store")["spec"]["secretName"] == credential.name
            continue
        secret = one(rendered["production"], "ExternalSecret", credential.name)
        assert tuple(entry["secretKey"] for entry in secret["spec"]["data"]) == credential.keys
        if credential.shared:
            assert one(rendered["production"], "ExternalSecret", credential.name, "kubeflow")


def test_credentials_have_the_keys_that_they_promise_and_no_two_values_are_alike() -> None:
    first, second = ([c.make() for c in credentials.credentials(STORE)] for _ in range(2))
    assert [tuple(values) for values in first] == [c.keys for c in credentials.credentials(STORE)]
    for one_values, other_values in zip(first, second, strict=True):
        assert {k for k, v in one_values.items() if other_values[k] == v} <= {"username"}


def test_the_stores_certificate_is_signed_for_its_names() -> None:
    made = credentials.certificate(STORE.partition(":")[0])
    authority = x509.load_pem_x509_certificate(made["ca.crt"].encode())
    leaf = x509.load_pem_x509_certificate(made["tls.crt"].encode())
    leaf.verify_directly_issued_by(authority)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"avrt-store", "avrt-store.avrt.svc.cluster.local"} <= set(names.get_values_for_type(x509.DNSName))
    key = load_pem_private_key(made["tls.key"].encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == leaf.public_key()


@pytest.mark.parametrize(("overlay", "profile"), [("test", "test"), ("production", "onprem-h100")])
def test_a_profile_reaches_the_store_as_the_overlay_serves_it(
    rendered: dict[str, Build], overlay: str, profile: str
) -> None:
    settings = load_profile(manifests.ROOT / "configs" / "clusters" / f"{profile}.yaml")
    assert settings.store.endpoint == STORE
    gateway = one(rendered[overlay], "StatefulSet", "avrt-store")["spec"]["template"]["spec"]["containers"][1]
    options = next(v["value"] for v in gateway["env"] if v["name"] == "TLS_OPTIONS")
    assert bool(options) is settings.store.secure
    assert gateway["readinessProbe"]["httpGet"]["scheme"] == ("HTTPS" if settings.store.secure else "HTTP")


def test_the_runtime_starts_the_launcher_as_the_launcher_wants(rendered: dict[str, Build]) -> None:
    from avrt_lib.promotion.manifest import launcher_arguments
    from avrt_lib.serving.launcher import RESERVED, parser

    container = one(rendered["test"], "ServingRuntime", "avrt-vllm")["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "avrt_lib.serving.launcher"]
    config = load(manifests.ROOT / "configs" / "miniature.yaml")
    options, rest = parser().parse_known_args([*container["args"], *launcher_arguments(config)])
    assert rest == []
    assert (options.port, options.host, str(options.model)) == (8080, "0.0.0.0", "/mnt/models")
    assert options.max_model_len == config.student.max_model_len
    assert not [a for a in container["args"] if a.split("=")[0] in RESERVED]


def test_options_that_the_launcher_hands_on_are_vllms() -> None:
    """Spelled as vLLM's source has them; the launcher passes on what it does not know."""
    text = (manifests.MANIFESTS / "components/cuda/kustomization.yaml").read_text(encoding="utf-8")
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8")
    (option,) = re.findall(r"value: (--[a-z-]+)=", text)
    assert f'"{option}"' in source
