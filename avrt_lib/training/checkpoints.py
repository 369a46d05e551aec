"""Checkpoints that survive a kill: which of them are whole, saving on SIGTERM, and keeping them in the store."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from avrt_lib.config import Config
from avrt_lib.errors import DataError, InterruptedStep
from avrt_lib.store.checkpoints import CheckpointSink, checkpoint_sink
from avrt_lib.tables import read_json, write_json
from avrt_lib.workspace import Workspace

log = logging.getLogger("avrt")

COMPLETE = "complete.json"
PREFIX = "checkpoint-"


class Finished(Exception):
    """The checkpoint that training went on from is its end; the trainer would make one step more."""


def sink(config: Config, workspace: Workspace) -> CheckpointSink | None:
    """Where a step's checkpoints are kept in the store; None where the run has none.

    Their place names the scratch's key, which stands for the inputs and the configuration: a checkpoint of others is
    never gone on from.
    """
    if config.store.kind != "s3":
        return None
    return checkpoint_sink(f"{workspace.instance}/{workspace.scratch.name}")


def to_go_on_from(folder: Path, sink: CheckpointSink | None) -> Path | None:
    """The newest whole checkpoint; the store's where the folder has none, as in a pod that is a retry.

    Raises:
        StoreError: where the store refuses, or its checkpoint is damaged.
    """
    if sink is not None and _first_process() and newest(folder) is None:
        sink.latest(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    found = newest(folder)
    if found is not None:
        log.info("going on from %s", found)
    return found


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


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
        folder: where the trainer writes them.
        sink: takes each of them too.
    """

    def __init__(self, folder: Path, sink: CheckpointSink | None) -> None:
        self.interrupted = False
        self._folder = folder
        self._sink = sink
        self._before: Any = None

    def __enter__(self) -> Checkpoints:
        self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if kind is not None and _first_process():
            newest(self._folder)  # one that was cut short goes: on a full disk the report needs its space

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        log.warning("SIGTERM: a checkpoint is saved after this step, then training ends")
        self.interrupted = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look whether anything is left to train; the checkpoint is loaded by now.

        Raises:
            Finished: where nothing is.
        """
        if state.global_step >= state.max_steps:
            raise Finished

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end where SIGTERM arrived, in whichever process: all end after one step."""
        if torch.distributed.is_initialized():
            told = torch.tensor(int(self.interrupted), device=args.device)
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
            if told.item():
                self.interrupted = True
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
        if self._sink is not None:
            self._sink(folder, folder.name)


def train(trainer: Trainer, saver: Checkpoints, resume: Path | None) -> None:
    """Train to the end, from a checkpoint if one is given.

    Raises:
        InterruptedStep: after SIGTERM; a checkpoint is saved.
    """
    with contextlib.suppress(Finished):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if saver.interrupted:
        raise InterruptedStep(
            f"Training was told to stop (SIGTERM) and saved a checkpoint at step {trainer.state.global_step}: start it "
            "again to go on."
        )
