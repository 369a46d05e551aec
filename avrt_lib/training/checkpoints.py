"""Checkpoints that survive a kill: which of them are whole, saving on SIGTERM, and sending them to the store."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from avrt_lib.config import Config
from avrt_lib.errors import DataError, InterruptedTraining
from avrt_lib.tables import read_json, write_json

log = logging.getLogger("avrt")

COMPLETE = "complete.json"
PREFIX = "checkpoint-"


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint below a folder; those that a kill cut short are removed."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob(PREFIX + "*"):
        step = path.name.removeprefix(PREFIX)
        if step.isdigit() and _is_whole(path):
            whole.append((int(step), path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(whole)[1] if whole else None


def _is_whole(path: Path) -> bool:
    try:
        sizes = read_json(path / COMPLETE)
    except DataError:
        return False
    return all((path / name).exists() and (path / name).stat().st_size == size for name, size in sizes.items())


class Checkpoints(TrainerCallback):
    """Marks each checkpoint as whole once all of its files are written, and ends training cleanly on SIGTERM.

    Args:
        config: with ``store.kind`` ``s3`` and ``AVRT_S3_ENDPOINT`` set, checkpoints are sent to the store too.
    """

    def __init__(self, config: Config) -> None:
        self.interrupted = False
        self._send_to_store = config.store.kind == "s3" and bool(os.environ.get("AVRT_S3_ENDPOINT"))
        self._before: Any = None

    def __enter__(self) -> Checkpoints:
        self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        log.warning("SIGTERM: a checkpoint is saved after this step, then training ends")
        self.interrupted = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end where SIGTERM arrived."""
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint that was just written as whole; must be the last callback that writes into it."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes files of its own
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir or ".") / f"{PREFIX}{state.global_step}"
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        write_json(folder / COMPLETE, files)
        if self._send_to_store:
            from avrt_lib.store import checkpoint_sink

            sink = checkpoint_sink()
            if sink is not None:
                sink(folder, folder.name)

    def raise_if_interrupted(self, step: int) -> None:
        """End the step where SIGTERM had arrived.

        Raises:
            InterruptedTraining: the message says from where the next start goes on.
        """
        if self.interrupted:
            raise InterruptedTraining(
                f"Training was told to stop (SIGTERM) and saved a checkpoint at step {step}: start it again to go on."
            )
