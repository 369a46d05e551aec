"""How many processes train, before any of them is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from avrt_lib.errors import ConfigError
from tests import tiny_models

torch = pytest.importorskip("torch")

from avrt_lib.training import launch, loop  # noqa: E402


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("gpus", "asked", "started"), [(0, None, 1), (1, None, 1), (8, None, 8), (8, 2, 2), (8, 1, 1), (0, 2, 2)]
)
def test_one_process_for_each_gpu_unless_the_configuration_says_how_many(
    gpus: int, asked: int | None, started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = tiny_models.config(tmp_path, grpo={"processes": asked})
    assert launch.processes("grpo", config) == started


@pytest.mark.parametrize(("gpus", "started", "batches"), [(0, 8, 3), (1, 1, 24), (4, 4, 6), (8, 8, 3)])
def test_fewer_gpus_than_processes_share_out_the_same_step(
    gpus: int, started: int, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = tiny_models.config(tmp_path, sft={"processes": 8, "gradient_accumulation": 3})
    assert launch.processes("sft", config) == started
    monkeypatch.setenv("WORLD_SIZE", str(started))
    assert loop.accumulation(config.sft) == batches


def test_processes_that_the_gpus_cannot_share_equally_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"sft\.processes is 8, which 3 visible GPUs.* sft\.gradient_accumulation"):
        launch.processes("sft", tiny_models.config(tmp_path, sft={"processes": 8}))


@pytest.mark.parametrize("asked", [None, 1, 8])
def test_more_processes_than_asked_for_each_take_what_is_configured(
    asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    config = tiny_models.config(tmp_path, sft={"processes": asked, "gradient_accumulation": 3})
    assert loop.accumulation(config.sft) == 3


def test_a_launcher_that_is_there_already_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launch.processes("sft", tiny_models.config(tmp_path, sft={"processes": 8})) == 16
