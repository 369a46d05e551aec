"""Run folders: made, locked, found again.

``RUNS/RUN/`` holds ``config.yaml`` (resolved), ``pipeline.yaml`` (compiled), ``summary.json``, ``report.html``,
``logs/``, ``work/`` (scratch, reports and progress of the steps), ``artifacts/`` (what the pipeline runner placed) and
``store/`` (the objects of the embedded store). ``RUNS/latest`` points at the newest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from avrt_lib.config import Config, SourceConfig, load
from avrt_lib.errors import UsageError
from avrt_lib.tables import atomic_path

LATEST = "latest"
ROLES = ("base", "sft", "grpo")


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def pipeline_file(self) -> Path:
        return self.path / "pipeline.yaml"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def store(self) -> Path:
        return self.path / "store"

    def config(self) -> Config:
        """The configuration that the run was started with."""
        return load(self.config_file)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the lock goes with the process, however it ends.

        Raises:
            UsageError: where another process runs in this folder.
        """
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(handle, 32, 0).decode().strip() or "unknown"
                raise UsageError(
                    f"The run {self.path} is still going on (process {owner}): wait for it, or stop that process first."
                ) from error
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)


def create(runs_dir: Path, config: Config) -> RunFolder:
    """Make a new run folder with its configuration in it, and let ``latest`` point at it.

    The name is the time of the start; of two that start in the same second, one gets a number behind it.
    """
    runs_dir.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = RunFolder(runs_dir / (stamp if attempt == 1 else f"{stamp}-{attempt}"))
        with contextlib.suppress(FileExistsError):
            folder.path.mkdir()
            break
    else:
        raise UsageError(f"{runs_dir} holds a thousand runs of this second: name another folder with --runs-dir.")
    write_config(folder.config_file, config)
    folder.logs.mkdir()
    folder.work.mkdir()
    (folder.work / "logs").symlink_to("../logs")
    with atomic_path(runs_dir / LATEST) as temporary:
        temporary.symlink_to(folder.path.name)
    return folder


def write_config(path: Path, config: Config) -> None:
    """Write a configuration as YAML, with every default spelled out."""
    with atomic_path(path) as temporary:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")


def find(runs_dir: Path, name: str = LATEST) -> RunFolder:
    """The run of this name (``latest``, the name of a folder in ``runs_dir``, or a path).

    Raises:
        UsageError: where there is none; the message lists the newest ones.
    """
    for candidate in (runs_dir / name, Path(name)):
        if (candidate / "config.yaml").is_file():
            return RunFolder(candidate.resolve())
    known = sorted((p.parent.name for p in runs_dir.glob("*/config.yaml") if not p.parent.is_symlink()), reverse=True)
    listed = f"there are {', '.join(known[:5])}" if known else "there is none yet: start one with `avrt run`"
    raise UsageError(f"There is no run {name!r} in {runs_dir}; {listed}.")


def has_step(components: Sequence[str] | None, step: str) -> bool:
    """Whether a pipeline has a step.

    Args:
        components: what the pipeline is made of, as ``instances`` takes it.
        step: the step.
    """
    return components is None or any(name.partition("-")[0] == step for name in components)


def instances(config: Config, components: Sequence[str] | None = None) -> dict[str, list[str]]:
    """The step instances of a run, by component, in the order in which they can run.

    Args:
        config: the run's configuration.
        components: what its pipeline is made of: components, or single instances of them (``evaluation-base``); None:
            the whole path.
    """
    shards = range(config.teachers.shards)
    whole = {
        "preflight": ["preflight"],
        "ingest": ["ingest"],
        "vision_teacher": [f"vision_teacher-{shard}" for shard in shards],
        "audio_teacher": [f"audio_teacher-{shard}" for shard in shards],
        "merger": ["merger"],
        "data_validation": ["data_validation"],
        "sft": ["sft"],
        "grpo": ["grpo"],
        "evaluation": [f"evaluation-{role}" for role in ROLES],
        "promotion": ["promotion"],
        "deployment": ["deployment"],
    }
    if components is None:
        return whole
    chosen: dict[str, list[str]] = {}
    for name in components:
        component, dash, _ = name.partition("-")
        chosen.setdefault(component, []).extend([name] if dash else whole.get(component, [component]))
    return chosen


def sources(config: Config) -> dict[str, SourceConfig]:
    """The configured sources by the name of their key."""
    given = {name: getattr(config.data, name) for name in ("all", "train", "validation", "test")}
    return {name: source for name, source in given.items() if source is not None}
