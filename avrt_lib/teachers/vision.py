"""The vision teacher: gets the question and the frames of its clip as images, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avrt_lib.config import Config
from avrt_lib.teachers.common import run_teacher
from avrt_lib.workspace import Workspace


def run(config: Config, *, workspace: Workspace, samples: Path, traces: Path, shard: int = 0) -> dict[str, Any]:
    """Write the vision teacher's traces of one shard of the training samples; see ``run_teacher``."""
    return run_teacher("vision", config, workspace, samples, traces, int(shard))
