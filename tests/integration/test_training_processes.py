"""Training that starts itself in two processes: they train as one does, and end together however they end."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import soundfile
import yaml

from avrt_lib.config import Config
from avrt_lib.records import Sample
from avrt_lib.run_processes import marked
from avrt_lib.steps import run_step
from avrt_lib.tables import read_rows, write_table
from avrt_lib.workspace import MARKER

torch = pytest.importorskip("torch")

from avrt_lib.training import sft  # noqa: E402
from tests import tiny_models  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Long enough to be stopped in the middle.
LONG = {"epochs": 400, "max_steps": 400, "save_every_steps": 5, "per_device_batch": 2, "processes": 2}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_student(tmp_path_factory.mktemp("student") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    samples, merged = tiny_models.write_data(tmp_path_factory.mktemp("data"), train=16)
    return {"samples": samples, "merged": merged}


class Started:
    """``avrt step`` on its own, in a work folder below ``folder``; everything that it starts carries a mark."""

    def __init__(self, name: str, config: Config, inputs: dict[str, Path], folder: Path) -> None:
        self.name, self.folder, self.work, self.model = name, folder, folder / "work", folder / "model"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(json.loads(config.to_json())), encoding="utf-8")
        given = [part for key, value in inputs.items() for part in ("--input", f"{key}={value}")]
        placed = ["--output", f"model={self.model}", "--work", str(self.work)]
        kept = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
        with open(folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "avrt_lib.cli.main", "step", name, "--config", str(file), *given, *placed],
                env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARKER: str(folder)},
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def ended(self) -> int:
        """The exit status; by then nothing of it may be left."""
        status = self.process.wait(timeout=900)
        assert not self.left()
        return status

    def left(self) -> list[psutil.Process]:
        return marked(str(self.folder))

    def rank(self, number: int) -> psutil.Process:
        (found,) = (process for process in self.left() if process.environ().get("RANK") == str(number))
        return found

    def wait_for(self, pattern: str) -> None:
        """Wait until the work folder holds such a file."""
        deadline = time.monotonic() + 600
        while not list(self.work.glob(pattern)):
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.log[-3000:]
            time.sleep(0.02)

    def report(self, rank: int = 0) -> dict[str, Any]:
        root = self.work if rank == 0 else self.work / "ranks" / str(rank)
        found: dict[str, Any] = json.loads((root / "reports" / f"{self.name}.json").read_text())
        return found


@pytest.fixture
def start() -> Any:
    """``Started``; whatever a failed test leaves is killed."""
    started: list[Started] = []

    def begin(*arguments: Any) -> Started:
        started.append(Started(*arguments))
        return started[-1]

    yield begin
    for one in started:
        for process in [*one.left(), psutil.Process(one.process.pid)] if one.process.poll() is None else one.left():
            process.kill()
        one.process.wait()


Start = Callable[..., Started]


def weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def losses(facts: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in facts["history"] if row["loss"] is not None]


def test_two_processes_learn_what_one_learns_in_two_batches(
    tmp_path: Path, student: Path, data: dict[str, Path], start: Start
) -> None:
    common = {"epochs": 40, "max_steps": 6, "per_device_batch": 2}
    one = run_step(
        "sft",
        config=tiny_models.config(student, sft={**common, "gradient_accumulation": 2, "processes": 1}),
        inputs=data,
        outputs={"model": tmp_path / "one"},
        work=tmp_path / "one-work",
    )
    two = start("sft", tiny_models.config(student, sft={**common, "processes": 2}), data, tmp_path / "two")
    assert two.ended() == 0, two.log[-3000:]
    together = losses(two.report()["facts"])
    assert len(together) == 6
    assert together == pytest.approx(losses(one), abs=1e-3)
    base, by_one, by_two = (weights(folder) for folder in (student, tmp_path / "one", two.model))
    assert (by_two - by_one).norm() < 0.05 * (by_one - base).norm()
    assert two.report(rank=1)["status"] == "succeeded"
    assert json.loads((two.work / "progress/sft.json").read_text())["done"] == 6


def test_both_processes_save_and_end_where_the_step_is_told_to_stop_and_go_on_together(
    tmp_path: Path, student: Path, data: dict[str, Path], start: Start
) -> None:
    stopped = start("sft", tiny_models.config(student, sft=LONG), data, tmp_path)
    stopped.wait_for("scratch/sft/*/checkpoints/checkpoint-*/complete.json")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.ended() == 75
    failures = [stopped.report(rank)["failure"] for rank in (0, 1)]
    assert failures[0] == failures[1]
    assert failures[0]["code"] == "interrupted"
    step = int(failures[0]["message"].partition("at step ")[2].partition(":")[0])
    (scratch,) = (stopped.work / "scratch/sft").iterdir()
    assert (scratch / f"checkpoints/checkpoint-{step}/complete.json").exists()

    again = start("sft", tiny_models.config(student, sft=LONG), data, tmp_path)
    again.wait_for(f"scratch/sft/*/checkpoints/checkpoint-{(step // 5 + 1) * 5}/complete.json")
    again.process.send_signal(signal.SIGTERM)
    assert again.ended() == 75
    assert f"going on from {scratch}/checkpoints/checkpoint-{step}" in again.log


def with_sound_of_another_rate(data: dict[str, Path], folder: Path, config: Config) -> dict[str, Path]:
    """The same data, but the first row of the second process has sound that nothing takes."""
    examples = sft.read_examples(data["samples"], data["merged"], target="reasoning")
    order = sft.schedule(examples, 4, seed=config.seed, dropout=0.0)
    sound = io.BytesIO()
    soundfile.write(sound, [0.0] * 8000, 8000, format="FLAC")
    broken = examples[order[config.sft.per_device_batch][0]].sample.id
    rows = [
        dataclasses.replace(row, audio=sound.getvalue()) if row.id == broken else row
        for split in ("train", "validation")
        for row in read_rows(data["samples"], Sample, split=split)
    ]
    write_table(folder, Sample, rows)
    return {**data, "samples": folder}


def test_the_error_of_one_process_ends_both_and_is_the_steps(
    tmp_path: Path, student: Path, data: dict[str, Path], start: Start
) -> None:
    config = tiny_models.config(student, sft=LONG)
    inputs = with_sound_of_another_rate(data, tmp_path / "broken", config)
    failing = start("sft", config, inputs, tmp_path / "run")
    assert failing.ended() == 4
    assert failing.report()["failure"] == failing.report(rank=1)["failure"]
    assert failing.report()["failure"]["code"] == "data_invalid"


@pytest.mark.slow
def test_an_error_of_the_steps_own_keeps_its_code(
    tmp_path: Path, student: Path, data: dict[str, Path], start: Start
) -> None:
    config = tiny_models.config(student, grpo={"processes": 2, "per_device_batch": 1, "group_size": 4})
    failing = start("grpo", config, {"samples": data["samples"], "sft_model": student}, tmp_path)
    assert failing.ended() == 3
    assert failing.report()["failure"]["code"] == "config_invalid"
    last = failing.log.splitlines()[-1]
    assert last.startswith("avrt: error: grpo: 2 completions a step")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_step_with_the_signals_name(
    tmp_path: Path, student: Path, data: dict[str, Path], start: Start
) -> None:
    killed = start("sft", tiny_models.config(student, sft=LONG), data, tmp_path)
    killed.wait_for("scratch/sft/*/checkpoints/checkpoint-*/complete.json")
    killed.rank(1).kill()
    assert killed.ended() == 7
    failure = killed.report()["failure"]
    assert failure["code"] == "environment"
    assert "SIGKILL" in failure["message"]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["step", "launcher"])
def test_nothing_is_left_where_the_step_or_its_launcher_is_killed(
    tmp_path: Path, student: Path, data: dict[str, Path], start: Start, whom: str
) -> None:
    killed = start("sft", tiny_models.config(student, sft=LONG), data, tmp_path)
    killed.wait_for("scratch/sft/*/checkpoints/checkpoint-*/complete.json")
    if whom == "step":
        killed.process.kill()
    else:
        killed.rank(0).parent().kill()
    status = killed.process.wait(timeout=60)
    psutil.wait_procs(killed.left(), timeout=30)
    assert not killed.left()
    assert status == (-signal.SIGKILL if whom == "step" else 7)


@pytest.mark.slow
def test_two_processes_of_grpo_share_the_groups_out(
    tmp_path: Path, student: Path, data: dict[str, Path], start: Start
) -> None:
    grpo = {
        "processes": 2,
        "max_steps": 3,
        "group_size": 4,
        "per_device_batch": 4,
        "kl_beta": 0.04,
        "reward": {"length_mean_words": 6, "length_sd_words": 4, "bonus_from_words": 4, "bonus_to_words": 9},
    }
    inputs = {"samples": data["samples"], "sft_model": student}
    done = start("grpo", tiny_models.config(student, grpo=grpo), inputs, tmp_path)
    assert done.ended() == 0, done.log[-3000:]
    facts = done.report()["facts"]
    assert facts["steps"] == 3
    assert facts["informative_groups"] > 0
    assert facts["weight_change"] > 0
    assert facts["kl"] is not None
