"""Build, and push, the three container images: ``make images``, ``make push REGISTRY=…``.

A tag is the version and a hash over everything that goes into an image (its base, Dockerfile, lock, torch build and the
package's sources), so an image that is there in that tag is not built again. build/images.json says what was built;
``avrt compile`` and ``avrt submit`` read it. Each image also lies in build/images/NAME.tar, for nodes without a
registry, with its bill of materials beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from avrt_lib import __version__
from scripts import image_requirements, registry
from scripts.docker_engine import EngineMissing, engine

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "images"
MANIFEST = ROOT / "build" / "images.json"
WHEELS = OUTPUT / "wheels"
TEST_OVERLAY = ROOT / "manifests" / "overlays" / "test" / "kustomization.yaml"
IMAGES = image_requirements.IMAGES
VARIANTS = image_requirements.VARIANTS
#: Made where no base is given and no registry is in reach.
LOCAL_BASE, LOCAL_SUITE = "avrt/base:bookworm", "bookworm"
PACKAGE = ("LICENSE", "README.md", "pyproject.toml", "avrt_lib", "components", "configs", "pipelines")
FREE_GB = {"cpu": 15, "cuda": 60}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: Debian 12's Python, which the CPU variants have; glibc 2.28 and older.
PYTHON = "3.11"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)] + ["manylinux2014_x86_64"]


class BuildError(Exception):
    """An image that cannot be built or pushed; the message says the mend."""


@dataclass(frozen=True)
class Built:
    """What build/images.json says of one image.

    Attributes:
        archive: the image as ``docker load`` and ``ctr images import`` take it, relative to the repository.
        pushed: by registry prefix, the reference by digest that a push got.
    """

    name: str
    tag: str
    reference: str
    image_id: str
    variant: str
    archive: str
    pushed: dict[str, str] = field(default_factory=dict)


def read_manifest(path: Path = MANIFEST) -> dict[str, Built]:
    """What was built before; empty where nothing was.

    Raises:
        BuildError: where the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["images"]
        return {key: Built(**entry) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(f"{path} is damaged ({error}): remove it, and run make images again.") from error


def write_manifest(built: dict[str, Built], path: Path = MANIFEST) -> None:
    """Write build/images.json, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    document = {"images": {key: asdict(built[key]) for key in IMAGES if key in built}}
    temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def sources(image: str, variant: str, root: Path = ROOT) -> list[Path]:
    """Every file that goes into an image."""
    files = [path for path in sorted((root / "images" / image).iterdir()) if path.suffix != ".md"]
    locks = (f"{image}-{variant}.lock", "tools.lock")
    files += [root / ".dockerignore", *(root / "requirements" / "images" / name for name in locks)]
    for name in PACKAGE:
        path = root / name
        files += sorted(path.rglob("*")) if path.is_dir() else [path]
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".log"]


def content_hash(image: str, variant: str, bases: Iterable[str], root: Path = ROOT) -> str:
    """Twelve hexadecimal digits that change with everything that goes into an image.

    Args:
        image: ``pipeline``, ``train`` or ``vllm``.
        variant: ``cpu`` or ``cuda``.
        bases: identities of what it is built from: the base, the builder's base, the torch build.
        root: the repository.
    """
    digest = hashlib.sha256(json.dumps([image, variant, *bases]).encode())
    for path in sources(image, variant, root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {path.stat().st_mode & 0o100} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def set_tags(path: Path, tags: dict[str, str]) -> None:
    """Set ``newTag`` of images in a kustomization; nothing else in the file changes.

    Args:
        path: the kustomization.yaml.
        tags: by image name.

    Raises:
        BuildError: where it has no such entry.
    """
    text = path.read_text(encoding="utf-8")
    places: list[tuple[int, int, str]] = []
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, entries in root.value if root is not None else []:
        if key.value != "images":
            continue
        for entry in entries.value:
            fields = {name.value: value for name, value in entry.value}
            if fields["name"].value in tags and "newTag" in fields:
                mark = fields["newTag"]
                places.append((mark.start_mark.index, mark.end_mark.index, tags[fields["name"].value]))
    if len(places) != len(tags):
        raise BuildError(f"{path} must have an entry with newTag below images: for each of {', '.join(sorted(tags))}.")
    for start, end, tag in sorted(places, reverse=True):
        text = text[:start] + tag + text[end:]
    path.write_text(text, encoding="utf-8")


def pip_configuration() -> tuple[str, str | None]:
    """What the builder's pip must know of this machine's: index, proxies' certificates. Local folders stay out.

    Returns:
        The text of a pip.conf, and the path of a certificate file or None. Both enter a build as secrets.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    known = dict(re.findall(r"^[^\s=]*\.([a-z-]+)='(.*)'$", listed.stdout, re.MULTILINE))
    lines = ["[global]"]
    for key in ("index-url", "extra-index-url", "trusted-host", "timeout", "retries"):
        words = [word for word in known.get(key, "").replace("\\n", " ").split() if not word.startswith(("file:", "/"))]
        if words:
            lines.append(f"{key} = {' '.join(words)}")
    certificates = known.get("cert")
    if certificates:
        lines.append("cert = /run/secrets/ca")
    return "\n".join(lines) + "\n", certificates


def fetch_torch(variant: str, index: str | None) -> list[str]:
    """Bring torch's CPU build to build/images/wheels, as this machine's pip finds it; nothing for CUDA.

    The CPU build is not on the general index, and a lock names no index. Where none can be had, the general build with
    its CUDA libraries serves (some GB more).

    Returns:
        The wheels' names.

    Raises:
        BuildError: where no build can be had.
    """
    pins = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
    version = re.findall(r"^torch==([^\s+]+)", pins, re.MULTILINE)[0]
    if variant == "cuda" or not list(WHEELS.glob(f"torch-{version}*")):
        shutil.rmtree(WHEELS, ignore_errors=True)
        WHEELS.mkdir(parents=True)
        if variant == "cpu":
            with tempfile.TemporaryDirectory(dir=OUTPUT) as temporary:
                _download_torch(version, index, Path(temporary))
                for wheel in Path(temporary).iterdir():
                    wheel.rename(WHEELS / wheel.name)
    return sorted(path.name for path in WHEELS.iterdir())


def _download_torch(version: str, index: str | None, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--dest", str(folder), "--only-binary", ":all:"]
    command += ["--python-version", PYTHON, *(word for name in PLATFORMS for word in ("--platform", name))]
    if index:
        tries = [["--no-deps", "--index-url", index, f"torch=={version}"]]
    else:
        tries = [
            ["--no-deps", f"torch=={version}+cpu"],
            ["--no-deps", "--index-url", CPU_INDEX, "--timeout", "10", "--retries", "1", f"torch=={version}"],
            ["--constraint", str(ROOT / "requirements" / "cpu.lock"), f"torch=={version}"],
        ]
    for number, attempt in enumerate(tries):
        last = number == len(tries) - 1
        if last and len(tries) > 1:
            print(
                f"No CPU build of torch {version} can be had here; taking the general one (some GB more).", flush=True
            )
        stderr = None if last else subprocess.DEVNULL
        if subprocess.run([*command, *attempt], cwd=ROOT, stderr=stderr, check=False).returncode == 0:
            return
    raise BuildError(
        f"torch {version} could not be downloaded (see above): make images TORCH_INDEX=URL names an index."
    )


@dataclass(frozen=True)
class Bases:
    """What an image is built from."""

    final: str
    builder: str


class Docker:
    """The docker commands that a build needs."""

    def __init__(self, program: str, env: dict[str, str]) -> None:
        self.program, self.env = program, env

    def run(self, *arguments: str, what: str) -> None:
        """Run a command whose output the user sees.

        Raises:
            BuildError: where it fails.
        """
        if subprocess.run([self.program, *arguments], cwd=ROOT, env=self.env, check=False).returncode != 0:
            raise BuildError(f"{what} failed (see above).")

    def read(self, *arguments: str) -> str:
        """The output of a command.

        Raises:
            BuildError: where it fails.
        """
        done = subprocess.run([self.program, *arguments], env=self.env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"docker {arguments[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def has(self, reference: str) -> bool:
        """Whether the engine has an image."""
        command = [self.program, "image", "inspect", reference]
        return subprocess.run(command, env=self.env, capture_output=True, check=False).returncode == 0

    def inspect(self, reference: str) -> dict[str, Any]:
        """What the engine knows of an image."""
        found: list[dict[str, Any]] = json.loads(self.read("image", "inspect", reference))
        return found[0]

    def identity(self, reference: str) -> str:
        """The content of an image, whenever and wherever it was loaded."""
        return "sha256:" + hashlib.sha256(json.dumps(self.inspect(reference)["RootFS"]["Layers"]).encode()).hexdigest()


def bases(docker: Docker, variant: str, base: str | None, build_base: str | None) -> dict[str, Bases]:
    """What each image is built from; pulled, or made, where the engine does not have it.

    Args:
        docker: the engine.
        variant: ``cpu`` or ``cuda``.
        base: of all images; None: those of images.yaml, or one that is made here.
        build_base: what DeepSpeed is compiled on, in ``train``; None: as in images.yaml, or the base.

    Raises:
        BuildError: where a base cannot be had.
    """
    if base is not None:
        chosen = dict.fromkeys(IMAGES, Bases(base, base))
    elif registry.reachable((third := registry.third_party())["base-cpu"].name):
        chosen = dict.fromkeys(IMAGES, Bases(*(third[f"base-{variant}"].reference,) * 2))
        chosen["pipeline"] = Bases(*(third["base-cpu"].reference,) * 2)
        if variant == "cuda":
            chosen["train"] = Bases(third["base-cuda"].reference, third["base-cuda-build"].reference)
    else:
        make_base(docker)
        chosen = dict.fromkeys(IMAGES, Bases(LOCAL_BASE, LOCAL_BASE))
    if build_base is not None:
        chosen["train"] = Bases(chosen["train"].final, build_base)
    for reference in sorted({name for each in chosen.values() for name in (each.final, each.builder)}):
        if not docker.has(reference):
            docker.run("pull", reference, what=f"Pulling {reference}")
    return chosen


def make_base(docker: Docker) -> None:
    """Make a Debian 12 base from Debian's packages.

    Raises:
        BuildError: where mmdebstrap is missing or fails.
    """
    if docker.has(LOCAL_BASE):
        return
    program = shutil.which("mmdebstrap")
    if program is None:
        raise BuildError(
            "No registry is in reach, and mmdebstrap, which would make a base, is missing: apt-get install mmdebstrap, "
            "or name a base: make images BASE=REFERENCE."
        )
    print(f"No registry is in reach: making {LOCAL_BASE} with mmdebstrap …", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / "base.tar"
        command = [program, "--quiet", "--variant=minbase", "--include=ca-certificates", LOCAL_SUITE, str(archive)]
        # A fixed time makes the same packages the same archive.
        env = {**os.environ, "SOURCE_DATE_EPOCH": "0"}
        if subprocess.run(command, env=env, cwd=temporary, check=False).returncode != 0:
            raise BuildError("mmdebstrap failed (see above); a base can also be named: make images BASE=REFERENCE.")
        docker.read("import", str(archive), LOCAL_BASE)


def revision() -> str:
    """The commit that the checkout is at, and whether what goes in was changed since; empty without Git."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    command = [*git, "status", "--porcelain", "--", *PACKAGE, "images", "requirements/images"]
    changed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return head + ("-dirty" if head and changed.strip() else "")


def public_url(origin: str) -> str:
    """The address of a Git origin as people open it; empty for a path. Credentials in it are left out.

    >>> public_url("git@git.example.com:team/avrt.git"), public_url("/srv/avrt.git")
    ('https://git.example.com/team/avrt', '')
    """
    found = re.fullmatch(r"(?:https://|ssh://)?(?:[^@/]*@)?([\w.-]+\.[a-z]+)(?::\d+)?[:/]+(.+?)(?:\.git)?/?", origin)
    return f"https://{found[1]}/{found[2]}" if found else ""


def origin() -> str:
    """Git's origin; empty where there is none."""
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def build(options: argparse.Namespace) -> None:
    """Build what is not there yet.

    Raises:
        BuildError: the message says the mend.
        EngineMissing: where no Docker engine can be had.
    """
    variant = options.variant
    if old := image_requirements.stale():
        raise BuildError(f"{old[0].relative_to(ROOT)} is not up to date: python scripts/image_requirements.py")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with engine() as (program, env):
        docker = Docker(program, env)
        chosen = bases(docker, variant, options.base, options.build_base)
        torch = fetch_torch(variant, options.torch_index)
        built = read_manifest()
        for number, image in enumerate(IMAGES, 1):
            each = chosen[image]
            parts = [
                docker.identity(each.final),
                docker.identity(each.builder),
                *(torch if image != "pipeline" else []),
            ]
            tag = f"{__version__}-{content_hash(image, variant, parts)}"
            print(f"[{number}/{len(IMAGES)}] avrt/{image}:{tag} ({variant})", flush=True)
            if image in built and built[image].tag == tag and (ROOT / built[image].archive).exists():
                print("      is there", flush=True)
                continue
            started = time.monotonic()
            if not docker.has(f"avrt/{image}:{tag}"):
                build_one(docker, image, tag, variant, each, options.source or public_url(origin()))
            built[image] = save(docker, image, tag, variant)
            write_manifest(built)
            size = docker.inspect(built[image].reference)["Size"] / 1e6
            print(f"      {size:.0f} MB, {time.monotonic() - started:.0f} s, {built[image].archive}", flush=True)
    if TEST_OVERLAY.exists():
        set_tags(TEST_OVERLAY, {entry.name: entry.tag for entry in built.values()})
    print(f"Built: {MANIFEST.relative_to(ROOT)}", flush=True)


def build_one(docker: Docker, image: str, tag: str, variant: str, each: Bases, source: str) -> None:
    """Build one image.

    Raises:
        BuildError: where there is too little disk, or the build fails.
    """
    free = shutil.disk_usage(OUTPUT).free / 1e9
    if free < FREE_GB[variant]:
        raise BuildError(f"{FREE_GB[variant]} GB of disk are needed at {OUTPUT}, but {free:.1f} GB are free.")
    values = {"BASE": each.final, "BUILD_BASE": each.builder, "VARIANT": variant, "VERSION": __version__}
    values |= {"REVISION": revision(), "SOURCE": source}
    configuration, certificates = pip_configuration()
    with tempfile.TemporaryDirectory() as temporary:
        conf = Path(temporary) / "pip.conf"
        conf.touch(mode=0o600)
        conf.write_text(configuration, encoding="utf-8")
        command = ["build", "--network", "host", "--file", f"images/{image}/Dockerfile", "--secret"]
        command += [f"id=pip_conf,src={conf}"]
        if certificates:
            command += ["--secret", f"id=ca,src={certificates}"]
        for key, value in values.items():
            command += ["--build-arg", f"{key}={value}"]
        docker.run(*command, "--tag", f"avrt/{image}:{tag}", ".", what=f"Building avrt/{image}")


def save(docker: Docker, image: str, tag: str, variant: str) -> Built:
    """Tag an image with the version too, and write its archive and bill of materials."""
    name = f"avrt/{image}"
    docker.read("tag", f"{name}:{tag}", f"{name}:{__version__}")
    bill = docker.read("run", "--rm", "--network", "none", f"{name}:{tag}", "cat", "/opt/avrt/sbom.json")
    (OUTPUT / f"{image}.sbom.json").write_text(bill, encoding="utf-8")
    archive = OUTPUT / f"{image}.tar"
    temporary = archive.with_suffix(".tmp")
    docker.read("save", "--output", str(temporary), f"{name}:{__version__}", f"{name}:{tag}")
    temporary.replace(archive)
    image_id = str(docker.inspect(f"{name}:{tag}")["Id"])
    return Built(name, tag, f"{name}:{tag}", image_id, variant, str(archive.relative_to(ROOT)))


def push(options: argparse.Namespace) -> None:
    """Push what was built, and note the digests that the registry gave.

    Raises:
        BuildError: where nothing was built, or the registry refuses.
        EngineMissing: where no Docker engine can be had.
    """
    prefix = options.registry.rstrip("/")
    built = read_manifest()
    if missing := [image for image in IMAGES if image not in built]:
        raise BuildError(f"{', '.join(missing)} is not built: make images")
    with engine() as (program, env):
        docker = Docker(program, env)
        for image, entry in built.items():
            if not docker.has(entry.reference):
                docker.run("load", "--input", str(ROOT / entry.archive), what=f"Loading {entry.archive}")
            for tag in (entry.tag, __version__):
                docker.read("tag", entry.reference, f"{prefix}/{entry.name}:{tag}")
                docker.run("push", f"{prefix}/{entry.name}:{tag}", what=f"Pushing {prefix}/{entry.name}:{tag}")
            known = docker.inspect(entry.reference)["RepoDigests"]
            digest = next(name for name in known if name.startswith(f"{prefix}/{entry.name}@"))
            pushed = {**entry.pushed, prefix: digest}
            built[image] = Built(**{**asdict(entry), "pushed": pushed})
            write_manifest(built)
            print(f"{digest}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Build or push; 7 where something is missing."""
    parser = argparse.ArgumentParser(prog="python -m scripts.images", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="build what is not there yet")
    building.add_argument("--variant", choices=VARIANTS, default="cpu")
    building.add_argument("--base", help="instead of the bases of images.yaml")
    building.add_argument("--build-base", help="what DeepSpeed is compiled on; default: images.yaml's, or the base")
    building.add_argument("--torch-index", help="take torch's CPU build from this index only")
    building.add_argument("--source", help="label: the repository's public address; default: Git's origin")
    building.set_defaults(run=build)
    pushing = commands.add_parser("push", help="push what was built")
    pushing.add_argument("--registry", required=True, help="prefix, such as registry.example.com/team")
    pushing.set_defaults(run=push)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (BuildError, EngineMissing) as error:
        print(f"Stopped: {error}", file=sys.stderr)
        return 7
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
