"""Where a step works: scratch that survives a kill, its report, its progress, its log.

A run has one *work* folder. Below it:

- ``scratch/STEP/KEY/OUTPUT``: outputs in the making. KEY hashes the inputs, the configuration sections that the step
  reads and the library's version, so a step that starts again with the same inputs finds what it had committed.
- ``reports/INSTANCE.json``: status, seconds, failure and facts of each step instance (summary.json is made of these).
- ``progress/INSTANCE.json``: done, total and unit, for whoever shows a bar.
- ``logs/INSTANCE.log``: what the step printed.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avrt_lib.tables import write_json

log = logging.getLogger("avrt")

#: Set, to the run's folder, in everything that a run on one machine starts.
MARKER = "AVRT_RUN"

_PROGRESS_EVERY_S = 0.5
_LOG_EVERY_S = 15.0


@dataclass
class Progress:
    """Counts what a step has done; writes it where a bar reads it, and a log line now and then.

    Args:
        path: the progress file, or None to log only.
        label: what is counted, as a user would say it ("clips", "traces", "steps").
        total: how many there are, or None where nobody knows.
    """

    path: Path | None
    label: str
    total: int | None
    done: int = 0
    note: str = ""
    _written: float = field(default=0.0, repr=False)
    _logged: float = field(default_factory=time.monotonic, repr=False)

    def advance(self, by: int = 1, note: str | None = None) -> None:
        """Count ``by`` more as done, and optionally say something about it (a loss, an accuracy)."""
        self.done += by
        if note is not None:
            self.note = note
        now = time.monotonic()
        last = self.total is not None and self.done >= self.total
        if self.path is not None and (last or now - self._written > _PROGRESS_EVERY_S):
            self._write()
            self._written = now
        if last or now - self._logged > _LOG_EVERY_S:
            self._logged = now
            log.info("%s %d%s %s", self.label, self.done, f"/{self.total}" if self.total else "", self.note)

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, {"label": self.label, "done": self.done, "total": self.total, "note": self.note})


@dataclass(frozen=True)
class Workspace:
    """The work folder as one step instance sees it.

    Attributes:
        root: the run's work folder.
        instance: the step's name, with what tells its instances apart (``vision_teacher-0``, ``evaluation-sft``).
        scratch: this instance's scratch folder for its current inputs; kept until the run is deleted.
    """

    root: Path
    instance: str
    scratch: Path

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Progress]:
        """Progress of one loop; the file keeps its last state after the block."""
        bar = Progress(self.root / "progress" / f"{self.instance}.json", label, total)
        bar._write()
        yield bar
        bar._write()

    @property
    def report_path(self) -> Path:
        """Where this instance's report is written."""
        return self.root / "reports" / f"{self.instance}.json"

    def report(self, **values: Any) -> None:
        """Write this instance's report, replacing the earlier one."""
        write_json(self.report_path, {"instance": self.instance, **values})


def read_reports(root: Path) -> dict[str, dict[str, Any]]:
    """All step reports of a work folder, by instance; reports that are cut short are left out."""
    reports: dict[str, dict[str, Any]] = {}
    for path in sorted((root / "reports").glob("*.json")):
        try:
            reports[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            log.warning("cannot read %s", path)
    return reports


def log_to_file(path: Path) -> None:
    """Send what this process prints, C libraries included, to a file and nowhere else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
