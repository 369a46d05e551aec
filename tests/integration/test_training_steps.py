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

from avrt_lib.models import verify_manifest
from avrt_lib.steps import run_step

torch = pytest.importorskip("torch")

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


def test_sft_killed_in_the_middle_ends_with_the_same_weights(
    tmp_path: Path, student: Path, data: dict[str, str]
) -> None:
    config = tiny_models.config(student, sft={"max_steps": 40, "epochs": 20, "save_every_steps": 5})
    undisturbed = command(config, data, tmp_path / "a", tmp_path / "work-a")
    subprocess.run(undisturbed, env=environment(), check=True, capture_output=True, timeout=300)
    killed = subprocess.Popen(
        command(config, data, tmp_path / "b", tmp_path / "work-b"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "work-b").glob("scratch/sft/*/checkpoints/checkpoint-*/complete.json")):
        assert time.monotonic() < deadline
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "b").exists()
    resumed = command(config, data, tmp_path / "b", tmp_path / "work-b")
    subprocess.run(resumed, env=environment(), check=True, capture_output=True, timeout=300)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


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
