"""The built images as a cluster runs them: any user id, HOME=/, root file system read-only, no network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from avrt_lib.models import verify_manifest
from scripts.docker_engine import EngineMissing, engine
from scripts.images import IMAGES, ROOT, Built, Docker, read_manifest

pytestmark = pytest.mark.slow

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def built() -> dict[str, Built]:
    found = read_manifest()
    if set(found) != set(IMAGES):
        pytest.skip("the images are not built: make images")
    return found


@pytest.fixture(scope="module")
def docker(built: dict[str, Built]) -> Iterator[Docker]:
    try:
        with engine() as (program, env):
            found = Docker(program, env)
            for image in built.values():
                if not found.has(image.reference):
                    found.run("load", "--quiet", "--input", str(ROOT / image.archive), what=f"Loading {image.archive}")
            yield found
    except EngineMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def run(docker: Docker, built: dict[str, Built]) -> Run:
    """Runs a command in an image as a restricted pod does."""

    def run(image: str, *command: str) -> subprocess.CompletedProcess[str]:
        restricted = ["--user", "12345:0", "--network", "none", "--read-only", "--tmpfs", "/tmp:exec,mode=1777"]
        restricted += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--rm"]
        everything = [docker.program, "run", *restricted, built[image].reference, *command]
        return subprocess.run(everything, env=docker.env, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.mark.parametrize("image", IMAGES)
def test_the_user_is_a_number_that_is_not_root(docker: Docker, built: dict[str, Built], image: str) -> None:
    assert docker.inspect(built[image].reference)["Config"]["User"] == "65532:0"


@pytest.mark.parametrize("image", IMAGES)
def test_labels_say_what_it_is(docker: Docker, built: dict[str, Built], image: str) -> None:
    labels = docker.inspect(built[image].reference)["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == f"avrt/{image}"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert built[image].tag.startswith(labels["org.opencontainers.image.version"] + "-")


@pytest.mark.parametrize("image", IMAGES)
def test_image_and_archive_are_the_ones_of_the_manifest(docker: Docker, built: dict[str, Built], image: str) -> None:
    assert docker.inspect(built[image].reference)["Id"] == built[image].image_id
    with tarfile.open(ROOT / built[image].archive) as archive:
        document = archive.extractfile("manifest.json")
        assert document is not None
        tags = {tag for entry in json.load(document) for tag in entry["RepoTags"]}
    version = built[image].tag.split("-")[0]
    assert tags == {f"avrt/{image}:{version}", built[image].reference}


@pytest.mark.parametrize("image", IMAGES)
def test_what_the_build_was_told_is_not_in_it(docker: Docker, run: Run, built: dict[str, Built], image: str) -> None:
    found = run(image, "sh", "-c", "ls /etc/pip.conf /run/secrets/* /src /opt/tools ~root/.cache ~root/.config")
    assert found.stdout == ""
    history = docker.read("history", "--no-trunc", "--format", "{{.CreatedBy}}", built[image].reference)
    assert "index-url" not in history


@pytest.mark.parametrize("image", IMAGES)
def test_the_bill_of_materials_is_that_of_the_environment(image: str, run: Run) -> None:
    bill = json.loads((ROOT / "build" / "images" / f"{image}.sbom.json").read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    listed = {component["name"].lower().replace("_", "-") for component in bill["components"]}
    code = "import importlib.metadata as m, json; print(json.dumps([d.name for d in m.distributions()]))"
    inside = {name.lower().replace("_", "-") for name in json.loads(run(image, "python3", "-c", code).stdout)}
    assert inside - listed <= {"avrt"}
    assert {"avrt", "kfp"} <= inside


@pytest.mark.parametrize("image", IMAGES)
def test_the_executor_of_kfp_has_what_it_needs(image: str, run: Run) -> None:
    script = "cd $(mktemp -d) && python3 -m kfp.dsl.executor_main --help && avrt --help"
    done = run(image, "sh", "-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_an_unknown_user_has_a_name_and_writes_below_tmp_alone(image: str, run: Run) -> None:
    code = "import getpass, os; print(os.environ['HOME'], getpass.getuser(), os.environ['XDG_CACHE_HOME'])"
    assert run(image, "python3", "-c", code).stdout.split() == ["/", "avrt", "/tmp/.cache"]
    assert run(image, "sh", "-c", "touch /opt/avrt/x || touch /opt/venv/x || touch /x").returncode != 0


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("pipeline", {"git", "weed", "mlflow"}),
        ("train", {"g++", "gcc", "ninja", "mlflow"}),
        ("vllm", {"ninja", "mlflow"}),
    ],
)
def test_only_training_has_a_compiler(image: str, expected: set[str], built: dict[str, Built], run: Run) -> None:
    looked_for = "git weed mlflow g++ gcc ninja pip pip3 make curl"
    found = run(image, "sh", "-c", f"for program in {looked_for}; do command -v $program; done").stdout.split()
    triton = {"gcc"} if built[image].variant == "cuda" and image == "vllm" else set[str]()
    assert {Path(path).name for path in found} == expected | triton


def test_pipeline_has_the_store_and_the_tracking_server(run: Run) -> None:
    assert "4.48" in run("pipeline", "weed", "version").stdout
    assert "3.17.2" in run("pipeline", "mlflow", "--version").stdout


def test_training_loads_its_extensions_without_compiling(built: dict[str, Built], run: Run) -> None:
    if built["train"].variant != "cpu":
        pytest.skip("DeepSpeed's CUDA accelerator needs a GPU")
    code = (
        "import os; os.environ['DS_ACCELERATOR'] = 'cpu'; import avrt_lib.training.sft, avrt_lib.training.grpo; "
        "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, FusedAdamBuilder, ShareMemCommBuilder; "
        "files = [b().load().__file__ for b in (CPUAdamBuilder, FusedAdamBuilder, ShareMemCommBuilder)]; "
        "print(*files, sep='\\n')"
    )
    done = run("train", "python3", "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [line for line in done.stdout.splitlines() if line.endswith(".so")]
    assert len(files) == 3
    assert all(file.startswith("/opt/venv/") for file in files)


def test_the_launcher_starts(run: Run) -> None:
    done = run("vllm", "python3", "-m", "avrt_lib.serving.launcher", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    code = "from avrt_lib import compat; compat.apply(); import vllm.entrypoints.openai.api_server"
    done = run("vllm", "python3", "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_data_half_and_a_training_step_through_kfp(docker: Docker) -> None:
    """Ingest, both teachers, merger, data gate and one SFT step under ZeRO-2, each in its image."""
    root = Path(tempfile.mkdtemp(prefix="avrt-containers-", dir="/var/tmp"))
    try:
        root.chmod(0o777)
        env = {**docker.env, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.containers.half_run", str(root)]
        # The runner makes folders that the containers write.
        done = subprocess.run(
            command, cwd=ROOT, env=env, umask=0, capture_output=True, text=True, timeout=1500, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        (model,) = root.glob("*/sft/model")
        verify_manifest(model)
        assert any(root.glob("*/data-validation/report/*"))
        assert all(path.stat().st_uid == 12345 for path in model.iterdir())
    finally:
        shutil.rmtree(root)
