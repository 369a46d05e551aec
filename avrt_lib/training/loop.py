"""What SFT and GRPO share: the trainer's arguments, progress, metrics, and checks that training trained."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from avrt_lib.config import OptimizerConfig, StudentConfig
from avrt_lib.errors import TrainingError
from avrt_lib.training import deepspeed
from avrt_lib.workspace import Progress


def world_size() -> int:
    """Number of training processes, as the launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation(section: OptimizerConfig) -> int:
    """Batches that a process puts into one step: more, where there are fewer processes than the configuration asks for.

    So a step holds the same rows on a machine with fewer GPUs.
    """
    return section.gradient_accumulation * max(1, (section.processes or 1) // world_size())


def steps_for(rows: int, section: OptimizerConfig, *, epochs: float, max_steps: int | None, rows_per_step: int) -> int:
    """Optimizer steps of a run: its epochs, capped by ``max_steps``.

    >>> steps_for(100, OptimizerConfig(), epochs=1.0, max_steps=None, rows_per_step=32)
    4
    """
    steps = max(1, math.ceil(rows * epochs / rows_per_step))
    return min(steps, max_steps) if max_steps is not None else steps


def arguments(
    section: OptimizerConfig,
    student: StudentConfig,
    *,
    output: Path,
    learning_rate: float,
    warmup_steps: int,
    max_steps: int,
    seed: int,
) -> dict[str, Any]:
    """Keyword arguments that SFTConfig and GRPOConfig have in common."""
    on_gpu = torch.cuda.is_available()
    if torch.cuda.device_count() > 1:
        deepspeed.prepare_process()  # transformers spreads a process without a rank over all GPUs it sees
    return {
        "output_dir": str(output),
        "max_steps": max_steps,
        "per_device_train_batch_size": section.per_device_batch,
        "gradient_accumulation_steps": accumulation(section),
        "learning_rate": learning_rate,
        "warmup_steps": min(warmup_steps, max_steps),
        "lr_scheduler_type": section.lr_scheduler,
        "adam_beta1": section.optimizer_betas[0],
        "adam_beta2": section.optimizer_betas[1],
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "gradient_checkpointing": section.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": section.logging_every_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": section.save_every_steps,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
        "bf16": student.dtype == "bfloat16",
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": on_gpu,
        "seed": seed,
        "data_seed": seed,
        "deepspeed": deepspeed.config_for(section, student),
    }


class Reporting(TrainerCallback):
    """Counts steps, sends metrics to MLflow where a run is open, and refuses a loss that is not finite.

    Args:
        bar: the step's progress.
        prefix: of the metrics' names, such as ``sft``.
        keep: metrics of the trainer's log by the name that history and notes give them.
    """

    def __init__(self, bar: Progress, prefix: str, keep: Mapping[str, str]) -> None:
        self.bar = bar
        self.prefix = prefix
        self.keep = keep
        self.notes: dict[str, float] = {}

    def note(self, **values: float) -> None:
        """Show these values beside the count from now on."""
        self.notes.update(values)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the steps that an earlier process had done."""
        self.bar.advance(state.global_step - self.bar.done)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count one step."""
        note = ", ".join(f"{name} {value:.3f}" for name, value in self.notes.items())
        self.bar.advance(state.global_step - self.bar.done, note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Pass the metrics of the last steps on.

        Raises:
            TrainingError: where the loss or the gradient's norm is not finite.
        """
        values = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        for name in ("loss", "grad_norm"):
            if name in values and not math.isfinite(values[name]):
                raise TrainingError(
                    f"The {name} is {values[name]} at step {state.global_step}: lower {self.prefix}.learning_rate."
                )
        self.note(**{shown: values[name] for name, shown in self.keep.items() if name in values})
        if state.is_world_process_zero:
            log_metrics({f"{self.prefix}/{k}": v for k, v in values.items() if math.isfinite(v)}, state.global_step)


def log_metrics(metrics: dict[str, float], step: int) -> None:
    """Send metrics to the MLflow run that MLFLOW_RUN_ID names; without one, nothing."""
    if os.environ.get("MLFLOW_RUN_ID"):
        from avrt_lib import tracking

        tracking.log_metrics(metrics, step)


def check_trained(state: TrainerState) -> None:
    """Check that at least one optimizer step was made.

    Raises:
        TrainingError: where training ended without a step, as a collator that yields nothing would make it.
    """
    if state.global_step <= 0:
        raise TrainingError("Training ended after no step: no batch was made of the training rows.")


def log_series(state: TrainerState, names: Mapping[str, str]) -> list[dict[str, float]]:
    """The trainer's log as rows of ``step`` and the named metrics; survives a resume, since checkpoints hold it."""
    rows: list[dict[str, float]] = []
    for entry in state.log_history:
        found = {shown: float(entry[name]) for name, shown in names.items() if entry.get(name) is not None}
        if found:
            rows.append({"step": int(entry["step"]), **found})
    return rows
