"""What the steps of a run are doing: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from avrt_lib.config import Config
from avrt_lib.runs import ROLES, RunFolder, instances
from avrt_lib.workspace import read_reports

LINE_EVERY_S = 15.0


@dataclass(frozen=True)
class State:
    """What one row shows: a component, or one role of evaluation."""

    status: str
    seconds: float | None
    done: int
    total: int | None
    note: str


def rows(config: Config) -> dict[str, list[str]]:
    """The rows in their order: instances by what is shown as one."""
    shown = instances(config)
    evaluations = shown.pop("evaluation")
    ordered: dict[str, list[str]] = {}
    for name, members in shown.items():
        if name == "promotion":
            ordered |= {instance: [instance] for instance in evaluations[1:]}
        ordered[name] = members
        if name == "merger":
            ordered[f"evaluation-{ROLES[0]}"] = [evaluations[0]]
    return ordered


def read_states(folder: RunFolder, config: Config) -> dict[str, State]:
    """The state of each row, from the reports and progress files of the steps."""
    reports = read_reports(folder.work)
    states = {}
    for row, members in rows(config).items():
        found = [reports[name] for name in members if name in reports]
        states[row] = _state(found, [_progress(folder, name) for name in members], len(members))
    return states


def _state(reports: list[dict[str, Any]], counts: list[dict[str, Any]], members: int) -> State:
    statuses = [str(report.get("status")) for report in reports]
    if not statuses:
        status = "waiting"
    elif "failed" in statuses:
        status = "failed"
    elif "running" in statuses or len(statuses) < members:
        status = "running"
    else:
        status = statuses[0]
    seconds = [report["seconds"] for report in reports if report.get("seconds") is not None]
    started = [report["started"] for report in reports if report.get("started")]
    took = time.time() - min(started) if status == "running" and started else sum(seconds) if seconds else None
    counted = [count for count in counts if count]
    totals = [count.get("total") for count in counted]
    total = sum(totals) if totals and None not in totals else None  # type: ignore[arg-type]
    note = next((f"{count.get('note')}" for count in reversed(counted) if count.get("note")), "")
    label = next((str(count.get("label")) for count in counted if count.get("label")), "")
    if status == "skipped":
        label = next((str(report["facts"].get("reason", "")) for report in reports if report.get("facts")), "")
        note = ""
    done = sum(int(count.get("done", 0)) for count in counted)
    return State(status, took, done, total, f"{label} {note}".strip())


def _progress(folder: RunFolder, instance: str) -> dict[str, Any]:
    path = folder.work / "progress" / f"{instance}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # not begun yet
        return {}


class Watch:
    """Shows a run's progress; ``update`` is called again and again while it goes on.

    Args:
        folder: the run.
        config: its configuration.
        console: where to show it; without a terminal, a line for every change and now and then one for a long step.
    """

    def __init__(self, folder: RunFolder, config: Config, console: Console) -> None:
        self._folder = folder
        self._config = config
        self._console = console
        self._bars: Progress | None = None
        self._ids: dict[str, TaskID] = {}
        self._last: dict[str, State] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}", table_column=Column(min_width=16, no_wrap=True)),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[took]}", justify="right", table_column=Column(min_width=7, no_wrap=True)),
                TextColumn(
                    "{task.fields[note]}",
                    markup=False,  # a step's own words, which may hold brackets
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
                console=self._console,
                expand=True,
            )
            self._ids = {
                row: self._bars.add_task(row, start=False, total=None, took="", note="", visible=True)
                for row in rows(self._config)
            }
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self.update()
            self._bars.stop()

    def update(self) -> None:
        """Read the steps' reports and show them."""
        states = read_states(self._folder, self._config)
        for row, state in states.items():
            if self._bars is not None:
                self._show(self._bars, row, state)
            else:
                self._say(row, state)
        self._last = states

    def _show(self, bars: Progress, row: str, state: State) -> None:
        style = {"failed": "red", "succeeded": "green", "skipped": "yellow", "waiting": "dim"}.get(state.status, "bold")
        over = state.status in ("succeeded", "failed", "skipped")
        total = state.total if state.total is not None else (max(state.done, 1) if over else None)
        done = total if state.status == "succeeded" and total is not None else state.done
        if state.status != "waiting":
            bars.start_task(self._ids[row])
        bars.update(
            self._ids[row],
            description=f"[{style}]{row}[/]",
            total=total,
            completed=done,
            took=_clock(state.seconds),
            note=state.status if state.status == "failed" else state.note,
        )

    def _say(self, row: str, state: State) -> None:
        before = self._last.get(row)
        now = time.monotonic()
        changed = state.status != "waiting" and (before is None or before.status != state.status)
        long = state.status == "running" and now - self._said.get(row, now) > LINE_EVERY_S
        if not changed and not long:
            return
        self._said[row] = now
        count = f" {state.done}/{state.total}" if state.total else f" {state.done}" if state.done else ""
        took = f" ({_clock(state.seconds)})" if state.seconds is not None and state.status != "running" else ""
        text = f"{time.strftime('%H:%M:%S')} {row}: {state.status}{count if state.status == 'running' else ''}{took}"
        print(f"{text} {state.note}".rstrip() if state.status in ("running", "skipped") else text, flush=True)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def log_of(folder: RunFolder, step: str) -> Path:
    """The log that a step wrote last, for the line under a failure."""
    found = sorted(folder.logs.glob(f"{step}*.log"), key=lambda path: path.stat().st_mtime) if step else []
    return found[-1] if found else folder.logs / "pipeline.log"
