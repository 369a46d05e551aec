"""Configurations that benchmarks and the container test make from the shipped ones still load."""

from __future__ import annotations

from pathlib import Path

import pytest

from avrt_lib.config import load
from benchmarks import sft_step, student_on_gpu
from tests.containers import half_run

ROOT = Path(__file__).resolve().parents[2]


def test_the_container_test_trains_one_step() -> None:
    assert half_run.tiny().sft.max_steps == 1


def test_the_cold_starts_benchmark() -> None:
    assert load(sft_step.CONFIG, sft_step.changed(8, 10)).sft.per_device_batch == 8


@pytest.mark.parametrize("name", ["avrt-3b-1gpu", "avrt-3b", "avrt-7b"])
def test_the_benchmark_of_one_gpu(name: str, tmp_path: Path) -> None:
    config = load(ROOT / "configs" / f"{name}.yaml", student_on_gpu.changed(tmp_path, 2))
    assert config.sft.processes == config.grpo.processes == 1
