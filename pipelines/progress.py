"""What the steps of a cluster run are doing, out of the backend's task details: bars on a terminal, lines elsewhere.

Task details are Argo's nodes in no order. A task ``sft`` stands there as ``sft-driver``, ``sft`` and, where a retry
strategy is in force (it is in the stock installation), ``sft(0)``, with an ``executor`` below that has the same twins;
other nodes have names of loops or none at all. What is left out after a failure has no state.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from graphlib import TopologicalSorter
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from avrt_lib.cli.display import State
from avrt_lib.steps import STEPS

OVER = ("succeeded", "failed", "skipped")
STYLES = {"failed": "red", "succeeded": "green", "skipped": "yellow", "waiting": "dim"}


@dataclass(frozen=True)
class Row:
    """One step of a run.

    Attributes:
        task: its name in the graph, which Argo's nodes carry.
        shown: its name for people: the step's, or ``evaluation-base`` and so on.
        step: the name in ``avrt_lib.steps.STEPS``.
        instances: how many pods it has: the shards of a teacher; None where the loop is decided by the run.
    """

    task: str
    shown: str
    step: str
    instances: int | None = 1


def rows_of(spec: Any) -> list[Row]:
    """The steps of a compiled pipeline, in an order in which they can run.

    Args:
        spec: as the backend keeps it: the IR, or a dictionary with ``pipeline_spec`` and ``platform_spec``.
    """
    document = (spec or {}).get("pipeline_spec", spec) or {}
    return list(_rows(document.get("root") or {}, document.get("components") or {}, 1))


def _rows(component: dict[str, Any], components: dict[str, Any], times: int | None) -> Iterator[Row]:
    tasks = (component.get("dag") or {}).get("tasks") or {}
    graph = TopologicalSorter({name: task.get("dependentTasks") or () for name, task in tasks.items()})
    graph.prepare()
    while graph.is_active():
        for name in sorted(graph.get_ready(), key=_rank):
            task = tasks[name]
            inner = components.get((task.get("componentRef") or {}).get("name", ""), {})
            if "dag" in inner:
                yield from _rows(inner, components, _times(task, times))
            else:
                step = _step(name)
                label = (task.get("taskInfo") or {}).get("name") or name
                yield Row(name, step if label == step.replace("_", "-") else label, step, _times(task, times))
            graph.done(name)


def _times(task: dict[str, Any], outer: int | None) -> int | None:
    iterator = task.get("parameterIterator") or task.get("artifactIterator")
    if iterator is None or outer is None:
        return outer
    raw = (iterator.get("items") or {}).get("raw")
    return outer * len(json.loads(raw)) if raw else None


def _step(task: str) -> str:
    return re.sub(r"-\d+$", "", task).replace("-", "_")


def _rank(task: str) -> tuple[int, str]:
    names = list(STEPS)
    step = _step(task).removesuffix("_shards")
    return (names.index(step) if step in names else len(names), task)


def base_name(name: str | None) -> str:
    """A node's name without its twin's suffix.

    >>> base_name("executor(0)"), base_name(None)
    ('executor', '')
    """
    return re.sub(r"\([^()]*\)$", "", name or "")


def task_of(node: str) -> str:
    """The task that a pod belongs to, from Argo's full name of its node.

    >>> task_of("avrt-x7k2p.root(0).exit-handler-1(0).sft(0).executor(0)"), task_of("avrt-x7k2p.root.sft-driver")
    ('sft', 'sft')
    """
    parts = [base_name(part) for part in node.split(".")]
    last = parts[-1]
    return parts[-2] if last == "executor" and len(parts) > 1 else last.removesuffix("-driver")


def read_states(rows: Sequence[Row], details: Sequence[Any], notes: dict[str, str] | None = None) -> dict[str, State]:
    """The state of each step.

    Args:
        rows: the steps.
        details: the backend's task details.
        notes: by task, what is to be said beside it.
    """
    named: dict[str, list[Any]] = {}
    for detail in details:
        named.setdefault(detail.display_name or "", []).append(detail)
    return {
        row.task: _state(row, named.get(row.task, []), named.get(f"{row.task}-driver", []), (notes or {}).get(row.task))
        for row in rows
    }


def _state(row: Row, nodes: list[Any], drivers: list[Any], note: str | None) -> State:
    states = [node.state for node in nodes]
    starting = [driver.state for driver in drivers]
    done = states.count("SUCCEEDED")
    done = min(done, row.instances) if row.instances else done
    if "FAILED" in states or "FAILED" in starting:
        status = "failed"
    elif row.instances and done == row.instances:
        status = "succeeded"
    elif "RUNNING" in states or "PENDING" in states or "RUNNING" in starting or "PENDING" in starting or done:
        status = "running"
    elif "SKIPPED" in states:
        status = "skipped"
    else:
        status = "waiting"
    total = row.instances if row.instances != 1 else None
    return State(status, _seconds([*nodes, *drivers], status), done if total else 0, total, note or "")


def _seconds(nodes: list[Any], status: str) -> float | None:
    started = [_stamp(node.start_time) for node in nodes if node.state is not None]
    ended = [_stamp(node.end_time) for node in nodes]
    if status == "waiting" or not any(started):
        return None
    end = time.time() if status == "running" else max(ended)
    return max(0.0, end - min(value for value in started if value))


def _stamp(moment: datetime | None) -> float:
    """Seconds since 1970; 0 for what the backend gives for a moment that has not come."""
    return moment.timestamp() if moment is not None and moment.year > 1970 else 0.0


class Steps:
    """Shows a run's steps.

    Args:
        rows: the steps.
        console: where; without a terminal, a line for every change.
    """

    def __init__(self, rows: Sequence[Row], console: Console) -> None:
        self._rows = rows
        self._console = console
        self._last: dict[str, State] = {}
        self._bars: Progress | None = None
        self._ids: dict[str, TaskID] = {}
        if console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}", table_column=Column(min_width=16, no_wrap=True)),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[took]}", justify="right", table_column=Column(min_width=8, no_wrap=True)),
                TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                console=console,
                expand=True,
            )
            for row in rows:
                self._ids[row.task] = self._bars.add_task(row.shown, start=False, total=row.instances, took="", note="")

    def __enter__(self) -> Self:
        self.resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause()

    def pause(self) -> None:
        """Leave the terminal to a question."""
        if self._bars is not None:
            self._bars.stop()

    def resume(self) -> None:
        """Show the bars again."""
        if self._bars is not None:
            self._bars.start()

    def update(self, states: dict[str, State]) -> None:
        """Show these states."""
        for row in self._rows:
            state = states[row.task]
            if self._bars is not None:
                self._show(self._bars, row, state)
            else:
                self._say(row, state)
        self._last = states

    def _show(self, bars: Progress, row: Row, state: State) -> None:
        if state.status != "waiting":
            bars.start_task(self._ids[row.task])
        bars.update(
            self._ids[row.task],
            description=f"[{STYLES.get(state.status, 'bold')}]{row.shown}[/]",
            completed=(row.instances or 1) if state.status == "succeeded" else state.done,
            took=clock(state.seconds),
            note=state.status if state.status in ("failed", "skipped") else state.note,
        )

    def _say(self, row: Row, state: State) -> None:
        before = self._last.get(row.task)
        if state.status == "waiting" or (before and (before.status, before.done) == (state.status, state.done)):
            return
        count = f" {state.done}/{state.total}" if state.total and state.status == "running" else ""
        took = f" ({clock(state.seconds)})" if state.seconds is not None and state.status in OVER else ""
        print(f"{time.strftime('%H:%M:%S')} {row.shown}: {state.status}{count}{took}", flush=True)


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds.

    >>> clock(75), clock(7325), clock(None)
    ('1:15', '2:02:05', '')
    """
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
