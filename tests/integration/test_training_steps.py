"""SFT and GRPO through TRL on a tiny Omni student: they learn, keep the encoders, and go on after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.config import Config
from avrt_lib.models import verify_manifest
from avrt_lib.records import Sample
from avrt_lib.steps import run_step
from avrt_lib.store import LocalObjectServer
from avrt_lib.workspace import Workspace

torch = pytest.importorskip("torch")

from avrt_lib.training import checkpoints  # noqa: E402
from avrt_lib.training.encoding import Encoder  # noqa: E402
from tests import tiny_models  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, sys
from avrt_lib.steps import run_step
name, config, inputs, outputs, work = sys.argv[1:]
facts = run_step(name, config=config, inputs=json.loads(inputs), outputs=json.loads(outputs), work=work)
print("FACTS", json.dumps({k: facts[k] for k in ("steps", "history")}))
"""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_student(tmp_path_factory.mktemp("student") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    samples, merged = tiny_models.write_data(tmp_path_factory.mktemp("data"), train=16)
    return {"samples": str(samples), "merged": str(merged)}


def command(config: Any, data: dict[str, str], model: Path, work: Path) -> list[str]:
    outputs = json.dumps({"model": str(model)})
    return [sys.executable, "-c", RUN, "sft", config.to_json(), json.dumps(data), outputs, str(work)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_sft_lowers_the_loss_and_leaves_the_encoders_as_they_were(
    tmp_path: Path, student: Path, data: dict[str, str]
) -> None:
    config = tiny_models.config(student, sft={"max_steps": 12, "epochs": 10, "modality_dropout": 0.5})
    facts = run_step("sft", config=config, inputs=data, outputs={"model": tmp_path / "model"}, work=tmp_path / "work")
    losses = [row["loss"] for row in facts["history"] if row["loss"] is not None]
    assert facts["steps"] == 12
    assert losses[-1] < 0.8 * losses[0]
    assert facts["weight_change"] > 0
    verify_manifest(tmp_path / "model")
    before, after = tensors(student), tensors(tmp_path / "model")
    assert set(before) == set(after)
    frozen = [name for name in before if name.startswith(("thinker.audio_tower", "thinker.visual"))]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)


LONG = {"max_steps": 40, "epochs": 20, "save_every_steps": 5}


def step(name: str, config: Config, inputs: dict[str, str], model: Path, work: Path) -> list[str]:
    """The command line of a step that is started as a user would start it."""
    file = work.with_suffix(".yaml")
    file.write_text(config.to_json())  # JSON is YAML
    given = [part for key, value in inputs.items() for part in ("--input", f"{key}={value}")]
    command = [sys.executable, "-m", "avrt_lib.cli.main", "step", name, "--config", str(file), *given]
    return [*command, "--output", f"model={model}", "--work", str(work)]


def stopped(command: list[str], work: Path, awaited: str, number: signal.Signals, **more: str) -> int:
    """Start a step, send it a signal once ``awaited`` is there below its work folder, and return its exit code."""
    process = subprocess.Popen(
        command, env=environment(**more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=work.parent
    )
    try:
        deadline = time.monotonic() + 200
        while not list(work.glob(awaited)):
            assert time.monotonic() < deadline
            assert process.poll() is None, "it ended before it could be stopped"
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(timeout=100)
    finally:
        process.kill()


def finished(command: list[str], **more: str) -> str:
    """What a step that runs to its end logs."""
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def failure(work: Path, name: str) -> str:
    report = json.loads((work / "reports" / f"{name}.json").read_text())
    assert report["status"] == "failed"
    return str(report["failure"]["code"])


def same(first: Path, second: Path) -> bool:
    one, other = tensors(first), tensors(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, student: Path, data: dict[str, str]) -> Path:
    """The model of ``LONG`` by a step that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = tiny_models.config(student, sft=LONG)
    run_step("sft", config=config, inputs=data, outputs={"model": folder / "model"}, work=folder / "work")
    return folder / "model"


CHECKPOINT = "scratch/{}/*/checkpoints/checkpoint-*/complete.json"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_sft_stopped_in_the_middle_ends_with_the_same_weights(
    tmp_path: Path, student: Path, data: dict[str, str], undisturbed: Path, number: signal.Signals, code: int
) -> None:
    work = tmp_path / "work"
    command = step("sft", tiny_models.config(student, sft=LONG), data, tmp_path / "model", work)
    assert stopped(command, work, CHECKPOINT.format("sft"), number) == code
    assert not (tmp_path / "model").exists()
    if number == signal.SIGTERM:
        assert failure(work, "sft") == "interrupted"
    assert "going on from" in finished(command)
    assert same(undisturbed, tmp_path / "model")


def test_sft_that_is_told_to_stop_before_its_first_step_is_interrupted_too(
    tmp_path: Path, student: Path, data: dict[str, str]
) -> None:
    work = tmp_path / "work"
    command = step("sft", tiny_models.config(student, sft=LONG), data, tmp_path / "model", work)
    assert stopped(command, work, "reports/sft.json", signal.SIGTERM) == 75
    assert failure(work, "sft") == "interrupted"
    assert not list(work.glob("scratch/sft/*/checkpoints/*"))


def test_sft_goes_on_from_the_store_where_its_scratch_is_lost(
    tmp_path: Path, student: Path, data: dict[str, str], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pod that is a retry: nothing but the run's id and the store is what it was."""
    config = tiny_models.config(student, sft=LONG, store={"kind": "s3"})
    work = tmp_path / "work"
    command = step("sft", config, data, tmp_path / "model", work)
    with LocalObjectServer(tmp_path / "store") as server:
        variables = {**server.environment, "AVRT_RUN_ID": "run-1"}
        assert stopped(command, work, CHECKPOINT.format("sft"), signal.SIGTERM, **variables) == 75
        (scratch,) = (work / "scratch/sft").iterdir()
        saved = checkpoints.newest(scratch / "checkpoints")
        assert saved is not None
        shutil.rmtree(work)
        printed = finished(command, **variables)
        assert f"going on from {saved}" in printed
        assert same(undisturbed, tmp_path / "model")

        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for key, found in ((scratch.name, True), ("0" * 16, False)):
            sink = checkpoints.sink(config, Workspace(tmp_path, "sft", tmp_path / key))
            assert (checkpoints.to_go_on_from(tmp_path / key, sink) is not None) == found


def full_disk(command: list[str], work: Path, size: int) -> subprocess.CompletedProcess[str]:
    """Run a step whose work folder is a disk of ``size`` bytes of its own; its report is printed at the end."""
    script = (
        'mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99; "${@:3}" >&2; code=$?; '
        'cat "$2/reports/sft.json"; exit $code'
    )
    work.mkdir()
    alone = ["unshare", "--mount", "bash", "-c", script, "-", str(size), str(work), *command]
    return subprocess.run(alone, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("models", [0.5, 1.5], ids=["weights", "optimizer"])
def test_a_checkpoint_that_fills_the_disk_is_reported_as_that(
    tmp_path: Path, student: Path, data: dict[str, str], models: float
) -> None:
    """safetensors writes the weights, torch the optimizer, and each has its own words for it."""
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    size = int((student / "model.safetensors").stat().st_size * models)
    command = step("sft", tiny_models.config(student, sft=LONG), data, tmp_path / "model", tmp_path / "work")
    done = full_disk(command, tmp_path / "work", size)
    assert done.returncode == 7, done.stderr[-3000:]
    assert json.loads(done.stdout)["failure"]["code"] == "disk_full"


def test_grpo_told_to_stop_ends_with_the_same_weights_and_no_step_too_many(
    tmp_path: Path, student: Path, data: dict[str, str]
) -> None:
    grpo = {"max_steps": 6, "save_every_steps": 2, "per_device_batch": 8, "group_size": 4, "kl_beta": 0.04}
    config = tiny_models.config(student, grpo={**grpo, "max_completion_tokens": 32, "modality_dropout": 0.5})
    inputs = {"samples": data["samples"], "sft_model": str(student)}
    undisturbed = {"outputs": {"model": tmp_path / "undisturbed"}, "work": tmp_path / "alone"}
    run_step("grpo", config=config, inputs=inputs, **undisturbed)

    work = tmp_path / "work"
    command = step("grpo", config, inputs, tmp_path / "model", work)
    assert stopped(command, work, CHECKPOINT.format("grpo"), signal.SIGTERM) == 75
    assert failure(work, "grpo") == "interrupted"
    placed = {"outputs": {"model": tmp_path / "model"}, "work": work}
    assert run_step("grpo", config=config, inputs=inputs, **placed)["steps"] == 6
    assert same(tmp_path / "undisturbed", tmp_path / "model")

    (scratch,) = (work / "scratch/grpo").iterdir()
    (scratch / "done.json").unlink()  # as a kill after the last step would leave it
    assert run_step("grpo", config=config, inputs=inputs, **placed)["steps"] == 6
    assert same(tmp_path / "undisturbed", tmp_path / "model")


def test_grpo_moves_the_weights_by_groups_whose_rewards_differ(
    tmp_path: Path, student: Path, data: dict[str, str]
) -> None:
    config = tiny_models.config(
        student,
        grpo={
            "max_steps": 3,
            "group_size": 4,
            "per_device_batch": 8,
            "kl_beta": 0.04,
            "reward": {"length_mean_words": 6, "length_sd_words": 4, "bonus_from_words": 4, "bonus_to_words": 9},
        },
    )
    facts = run_step(
        "grpo",
        config=config,
        inputs={"samples": data["samples"], "sft_model": student},
        outputs={"model": tmp_path / "model"},
        work=tmp_path / "work",
    )
    assert facts["steps"] == 3
    assert facts["informative_groups"] > 0
    assert facts["weight_change"] > 0
    assert facts["kl"] is not None
    before, after = tensors(student), tensors(tmp_path / "model")
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("thinker.audio_tower"))


def test_grpo_takes_a_modality_from_all_completions_of_a_group(
    tmp_path: Path, student: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[tuple[str, str]] = []

    def spy(self: Encoder, sample: Sample, condition: str = "av") -> dict[str, torch.Tensor]:
        encoded.append((sample.id, condition))
        return encode(self, sample, condition)

    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", spy)
    grpo = {"max_steps": 4, "group_size": 4, "per_device_batch": 16, "modality_dropout": 0.5}
    facts = run_step(
        "grpo",
        config=tiny_models.config(student, grpo={**grpo, "max_completion_tokens": 8}),
        inputs={"samples": data["samples"], "sft_model": student},
        outputs={"model": tmp_path / "model"},
        work=tmp_path / "work",
    )
    assert facts["steps"] == 4
    assert len(encoded) == 4 * 16
    groups = [set(encoded[start : start + 4]) for start in range(0, len(encoded), 4)]
    assert [len(group) for group in groups] == [1] * 16
    assert {condition for _, condition in encoded} == {"av", "audio_only", "vision_only"}


@pytest.mark.slow
def test_grpo_makes_steps_of_fewer_questions_than_a_step_has(tmp_path: Path, student: Path) -> None:
    samples, _ = tiny_models.write_data(tmp_path / "data", train=3)
    config = tiny_models.config(student, grpo={"max_steps": 1, "group_size": 2, "per_device_batch": 16})
    facts = run_step(
        "grpo",
        config=config,
        inputs={"samples": samples, "sft_model": student},
        outputs={"model": tmp_path / "model"},
        work=tmp_path / "work",
    )
    assert (facts["steps"], facts["rows"]) == (1, 3)


@pytest.mark.slow
def test_zero2_on_two_processes_has_the_loss_of_one_and_resumes(
    tmp_path: Path, student: Path, data: dict[str, str]
) -> None:
    pytest.importorskip("deepspeed")
    common: dict[str, Any] = {"epochs": 40, "max_steps": 20, "save_every_steps": 10, "warmup_steps": 5}
    one = tiny_models.config(student, sft={**common, "per_device_batch": 4})
    alone = run_step("sft", config=one, inputs=data, outputs={"model": tmp_path / "one"}, work=tmp_path / "work-one")
    script = tmp_path / "run.py"
    script.write_text(RUN)
    config = tiny_models.config(student, sft={**common, "per_device_batch": 2, "deepspeed": "zero2"})

    def two() -> dict[str, Any]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        arguments = command(config, data, tmp_path / "two", tmp_path / "work-two")[3:]
        done = subprocess.run(
            [*launch, *arguments], env=environment(DS_ACCELERATOR="cpu"), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads((tmp_path / "work-two" / "reports" / "sft.json").read_text())
        return dict(report["facts"])

    whole = two()
    losses = [row["loss"] for row in whole["history"] if row["loss"] is not None]
    assert len(losses) == 20
    assert losses == pytest.approx([row["loss"] for row in alone["history"] if row["loss"] is not None], abs=1e-3)
    trained = tensors(tmp_path / "two")

    (scratch,) = (tmp_path / "work-two" / "scratch" / "sft").iterdir()
    for name in ("done.json", "model", "checkpoints/checkpoint-20"):  # as a kill after step 10 would leave it
        path = scratch / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = two()
    assert [row["loss"] for row in again["history"] if row["loss"] is not None] == pytest.approx(losses, abs=1e-4)
    resumed = tensors(tmp_path / "two")
    assert all(torch.allclose(trained[name], resumed[name], atol=1e-5) for name in trained)
