"""Watch a run of the backend to its end, and say how it ended as a run on this machine would."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.prompt import Prompt
from rich.table import Table

from avrt_lib.cli.console import err, out
from avrt_lib.cli.results import show_summary
from avrt_lib.cluster.profile import PipelinesAccess
from avrt_lib.errors import AvrtError, EnvironmentProblem, of_code
from avrt_lib.report.run_summary import LINE as SUMMARY_LINE
from avrt_lib.run_signals import Interrupted, signals_raise
from avrt_lib.runs import RunFolder
from avrt_lib.steps import FAILURE_LINE
from avrt_lib.tables import write_json
from pipelines.backend import FINAL, Backend
from pipelines.pods import Pods, PodsUnreadable, Waiting
from pipelines.progress import STYLES, Row, Steps, base_name, clock, read_states, rows_of, task_of

POLL_S = 5.0
#: The Workflow is a large object, so it is read less often.
WORKFLOW_EVERY_S = 15.0
#: A pod that waits this long is reported; with the polls it is known within a minute.
REPORT_AFTER_S = 30.0
#: A backend that is being restarted is waited for.
PATIENCE_S = 1800.0
RESTART_S = 30.0
#: How long a run that was ended may take for it: its pods get SIGTERM, and its last step runs.
END_WAIT_S = 300.0
TAIL_LINES = 12
#: The newest logs in which the summary is looked for.
SUMMARY_LOGS = 4

_HINTS = {
    "exit status 137": "it was killed, most likely out of memory: raise memory_limit of its pool",
    "exit status 143": "it was ended from outside: by timeout_s of its pool, an eviction or a preemption",
}


@dataclass(frozen=True)
class Failure:
    """How a run failed: the step, a code of ``avrt_lib.errors``, one line, and the last lines of the log."""

    step: str
    code: str
    message: str
    tail: tuple[str, ...] = ()


class Watch:
    """Follows one run.

    Args:
        backend: where it runs.
        run_id: the run.
        limit_s: a step that waits longer for its pod ends the run; None: it is only reported.
        kueue: the cluster's pods go through Kueue, so that waiting counts only where it is seen who holds a pod.
        restarted: the run has just been retried, and may still be called FAILED for a moment.
    """

    def __init__(
        self,
        backend: Backend,
        run_id: str,
        *,
        limit_s: float | None = None,
        kueue: bool = False,
        restarted: bool = False,
    ) -> None:
        self.backend = backend
        self.run_id = run_id
        self._limit_s = limit_s
        self._kueue = kueue
        self._settled_at = time.monotonic() + (RESTART_S if restarted else 0.0)
        self._pods = self._open_pods()
        self._nodes: list[dict[str, Any]] | None = None
        self._workflow_seen = False
        self._workflow_read = -WORKFLOW_EVERY_S
        self._since: dict[str, float] = {}
        self._said: set[str] = set()
        self._ended: Failure | None = None
        self._ended_at = 0.0
        self._exit_code = 1

    def _open_pods(self) -> Pods | None:
        try:
            return Pods(self.backend.namespace)
        except PodsUnreadable as problem:
            _say(f"What Kubernetes says of the pods is not shown ({problem}).")
            return None

    def follow(self, runs_dir: Path) -> int:
        """Show the run until it ends or the user leaves it, and return the exit code.

        Args:
            runs_dir: the summary is stored below it, in a folder of the run's id.
        """
        run = self.backend.run(self.run_id)
        rows = rows_of(spec_of(self.backend, run))
        with Steps(rows, err) as shown, signals_raise():
            while True:
                try:
                    run = self._read()
                    over = str(run.state) in FINAL and time.monotonic() >= self._settled_at
                    waiting = {} if over else self.waiting(run)
                    shown.update(read_states(rows, details_of(run), waiting))
                    if str(run.state) not in FINAL:
                        self._settled_at = 0.0
                    if over or self._too_long():
                        break
                    time.sleep(POLL_S)
                except Interrupted as stopped:
                    if self._ended is not None:
                        raise
                    shown.pause()
                    if not self._asked_to_go_on(stopped):
                        self._how_to_go_on()
                        return stopped.exit_code
                    shown.resume()
        return self.conclude(run, rows, runs_dir)

    def _read(self) -> Any:
        """The run as it is now; where the backend does not tell, as when a token has expired, it goes on unseen."""
        try:
            return self.backend.run(self.run_id, patience_s=PATIENCE_S)
        except EnvironmentProblem:
            if self._ended is None:
                self._how_to_go_on()
            raise

    def conclude(self, run: Any, rows: Sequence[Row], runs_dir: Path) -> int:
        """Say how a run ended: its table, and the failed step's error; store its summary; return the exit code."""
        summary = find_summary(self.backend, run)
        if summary is not None:
            path = RunFolder(runs_dir.expanduser() / self.run_id).summary_file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, summary)
            show_summary(summary, out)
            _say(f"Summary: {path}")
        if run.state == "SUCCEEDED":
            if summary is None:
                _say("The run succeeded, but its last step left no summary of it.")
            return 0
        if self._ended is not None:
            _show_failure(self._ended)
            return self._exit_code
        if run.state != "FAILED":
            failure = Failure("", "interrupted", f"the run {self.run_id} was ended ({run.state}).")
            _show_failure(failure)
            return of_code(failure.code).exit_code
        failure = find_failure(self.backend, run, rows, self._failed_nodes())
        _show_failure(failure)
        return of_code(failure.code).exit_code

    def waiting(self, run: Any) -> dict[str, str]:
        """Look at what waits, report it, and end the run where it waits too long; notes by task."""
        found = self._seen(run)
        now = time.monotonic()
        for gone in self._since.keys() - {each.key for each in found}:
            del self._since[gone]
        for each in found:
            if each.held:
                self._since.pop(each.key, None)
                self._say_once(f"{each.task or 'A step'} waits: {each.reason}.")
                continue
            waited = now - self._since.setdefault(each.key, now)
            if waited >= REPORT_AFTER_S:
                text = f"{each.task or 'A step'} has waited {waited:.0f} s for its pod: {each.reason}"
                self._say_once(text, f"{each.key} {each.reason}")
            if self._limit_s is not None and waited >= self._limit_s and self._ended is None:
                reason = f"{each.task or 'a step'} waited {waited:.0f} s for its pod: {each.reason}"
                self._end(Failure(each.task.replace("-", "_"), "environment", reason), EnvironmentProblem.exit_code)
        return {each.task: each.reason for each in found}

    def _seen(self, run: Any) -> list[Waiting]:
        found: list[Waiting] = []
        if self._pods is not None:
            self._read_workflow(run, self._pods)
            try:
                found = self._pods.waiting(self.run_id, self._nodes or ())
            except PodsUnreadable as problem:
                self._say_once(f"The pods of the run cannot be read ({problem}).")
        return found if found or self._workflow_seen else self._seen_by_the_backend(run)

    def _seen_by_the_backend(self, run: Any) -> list[Waiting]:
        """Without access to pods: the nodes that the backend calls pending. It does not say which task's, nor why.

        While another step runs they may wait for its GPUs.
        """
        if self._kueue:
            return []
        reason = "the backend does not say why; access to the run's pods through KUBECONFIG would"
        details = details_of(run)
        # A retry's node, of the same name, runs while its pod waits; it has that as its child.
        held = any(
            detail.state == "RUNNING" and base_name(detail.display_name) == "executor" and not detail.child_tasks
            for detail in details
        )
        found = {}
        for detail in details:
            if detail.state == "PENDING" and _is_pod(detail.display_name):
                key = f"{base_name(detail.display_name)} {detail.create_time}"
                found[key] = Waiting(key, task_of_driver(detail.display_name), reason, held)
        return list(found.values())

    def _read_workflow(self, run: Any, pods: Pods) -> None:
        """Read the nodes of the run's Workflow now and then; a run whose Workflow was deleted stays RUNNING for ever.

        Raises:
            EnvironmentProblem: where the Workflow was there and is gone.
        """
        if time.monotonic() - self._workflow_read < WORKFLOW_EVERY_S:
            return
        self._workflow_read = time.monotonic()
        try:
            self._nodes = pods.nodes(self.run_id)
        except PodsUnreadable as problem:
            self._say_once(f"The Workflow of the run cannot be read ({problem}).")
            return
        if self._nodes is not None:
            self._workflow_seen = True
        elif self._workflow_seen and self.backend.run(self.run_id).state not in FINAL:
            raise EnvironmentProblem(
                f"The Workflow of the run {self.run_id} was deleted; the backend will call it RUNNING for ever. "
                f"`avrt cancel {self.run_id} --delete` removes its record; submit it again, its finished steps come "
                "from the cache."
            )
        elif not self._workflow_seen and _age_s(run) > 2 * WORKFLOW_EVERY_S:
            self._say_once(
                f"The run has no Workflow in the namespace {self.backend.namespace}: it was deleted, and then the run "
                "never ends, or KUBECONFIG names another cluster than the backend's."
            )

    def _say_once(self, text: str, key: str = "") -> None:
        if (key or text) not in self._said:
            self._said.add(key or text)
            _say(text)

    def _end(self, failure: Failure, exit_code: int) -> None:
        """End the run, and go on watching until it has ended."""
        self._ended, self._ended_at, self._exit_code = failure, time.monotonic(), exit_code
        _say(f"Ending the run: {failure.message}")
        try:
            self.backend.terminate(self.run_id)
        except AvrtError as problem:
            raise EnvironmentProblem(f"{failure.message}; and the run could not be ended: {problem}") from problem

    def _too_long(self) -> bool:
        if self._ended is None or time.monotonic() - self._ended_at < END_WAIT_S:
            return False
        _say(f"The run has not ended {END_WAIT_S:.0f} s after it was told to: `avrt status {self.run_id}` shows it.")
        return True

    def _failed_nodes(self) -> list[dict[str, Any]]:
        try:
            nodes = self._pods.nodes(self.run_id) if self._pods else None
        except PodsUnreadable:
            nodes = None
        return [node for node in nodes or () if node.get("phase") in ("Failed", "Error") and node.get("message")]

    def _asked_to_go_on(self, stopped: Interrupted) -> bool:
        """Ask what is to become of the run; without a terminal, and after a second Ctrl-C, it is left."""
        if str(stopped) != "SIGINT" or not (sys.stdin.isatty() and err.is_terminal):
            return False
        try:
            answer = Prompt.ask(
                "End the run, leave it running, or go on watching?",
                console=err,
                choices=["end", "leave", "watch"],
                default="watch",
            )
        except (Interrupted, EOFError):
            return False
        if answer == "end":
            self._end(Failure("", "interrupted", "the run was ended as asked."), stopped.exit_code)
        return answer != "leave"

    def _how_to_go_on(self) -> None:
        place = f"--host {self.backend.host}"
        if self.backend.namespace != PipelinesAccess().namespace:  # its pods are looked for there
            place += f" --namespace {self.backend.namespace}"
        _say(
            f"The run {self.run_id} goes on: `avrt status {self.run_id} --follow {place}` shows it, "
            f"`avrt cancel {self.run_id} {place}` ends it."
        )


def show(watch: Watch, runs_dir: Path) -> None:
    """Print the steps of a run as they are now, and how it ended."""
    run = watch.backend.run(watch.run_id)
    rows = rows_of(spec_of(watch.backend, run))
    over = run.state in FINAL
    states = read_states(rows, details_of(run), {} if over else watch.waiting(run))
    table = Table("step", "state", "shards", "time", "", box=SIMPLE_HEAD, title=f"{run.display_name}: {run.state}")
    for row in rows:
        state = states[row.task]
        count = f"{state.done}/{state.total}" if state.total else ""
        style = STYLES.get(state.status, "bold")
        status = "not run" if over and state.status == "waiting" else state.status
        table.add_row(row.shown, f"[{style}]{status}[/]", count, clock(state.seconds), escape(state.note))
    out.print(table)
    if over:
        watch.conclude(run, rows, runs_dir)


def show_logs(backend: Backend, run_id: str) -> None:
    """Print the last log lines of the steps that run now.

    Raises:
        EnvironmentProblem: where the pods cannot be read.
    """
    try:
        logs = Pods(backend.namespace).running_logs(run_id, TAIL_LINES)
    except PodsUnreadable as problem:
        raise EnvironmentProblem(f"The logs of running steps cannot be read: {problem}.") from problem
    for task, text in logs.items():
        out.print(f"── {task}", markup=False)
        for line in _tail(text.splitlines()):
            out.print(f"  {line}", markup=False, soft_wrap=True)


def details_of(run: Any) -> list[Any]:
    """The task details of a run; none while it is being made."""
    return list((run.run_details.task_details if run.run_details else None) or [])


def spec_of(backend: Backend, run: Any) -> Any:
    """The compiled pipeline of a run: its own, or that of the version which a schedule started."""
    reference = run.pipeline_version_reference
    if not run.pipeline_spec and reference and reference.pipeline_id and reference.pipeline_version_id:
        return backend.version_spec(reference.pipeline_id, reference.pipeline_version_id)
    return run.pipeline_spec


def find_summary(backend: Backend, run: Any) -> dict[str, Any] | None:
    """The summary that the run's last step printed; None where there is none of this attempt.

    A retry does not repeat an exit handler, whose summary is then that of the attempt before: another pod ended later.
    """
    details = details_of(run)
    last = [detail for detail in details if base_name(detail.display_name) == "run-summary"]
    executors = [each for each in details if base_name(each.display_name) == "executor" and each.end_time]
    executors.sort(key=lambda detail: detail.end_time, reverse=True)
    ended = max((detail.end_time for detail in last if detail.end_time), default=None)
    if ended is None:
        return None
    if executors and executors[0].end_time > ended:
        _say("There is no summary of this attempt: a retry does not repeat the last step, which makes it.")
        return None
    for node in _children([*last, *executors[:SUMMARY_LOGS]]):
        for line in reversed((backend.log(run.run_id, node) or "").splitlines()):
            _, found, text = line.partition(SUMMARY_LINE)
            if found:
                return _document(text)
    return None


def find_failure(backend: Backend, run: Any, rows: Sequence[Row], nodes: Sequence[dict[str, Any]] = ()) -> Failure:
    """Why a run failed, from the logs of its failed pods; the backend's API has no text.

    Args:
        backend: where it ran.
        run: the run, with its task details.
        rows: its steps.
        nodes: the failed nodes of its Workflow, where they could be read: they say what Argo and Kubernetes did.
    """
    failed = sorted(
        (detail for detail in details_of(run) if detail.state == "FAILED"),
        key=lambda detail: detail.end_time.timestamp() if detail.end_time else float("inf"),
    )
    tasks = {row.task: row for row in rows}
    own = [detail for detail in failed if _is_pod(detail.display_name)]
    # Where no retry strategy is in force, a pod is the child of its task.
    pods = _children([*own, *(detail for detail in failed if base_name(detail.display_name) in tasks)])
    logs = [text.splitlines() for node in pods if (text := backend.log(run.run_id, node))]
    for log in logs:
        for number in range(len(log) - 1, -1, -1):
            _, found, told = log[number].partition(FAILURE_LINE)
            document = _document(told) if found else None
            if document is not None:
                step, code, message = (str(document.get(key) or "") for key in ("step", "code", "message"))
                return Failure(step, code or "error", message, _tail(log[:number]))
    named = [task_of_driver(detail.display_name) for detail in own if detail.display_name.find("-driver") > 0]
    named += [base_name(detail.display_name) for detail in failed if base_name(detail.display_name) in tasks]
    step = tasks[named[0]].shown if named and named[0] in tasks else (named or [""])[0]
    first = logs[0] if logs else []
    reasons = [hint for sign, hint in _HINTS.items() if any(sign in line for line in first)]
    of_pods = [node for node in nodes if node.get("type") == "Pod"]
    # A pod of another step may have failed too, and a retry of it succeeded.
    of_step = [node for node in of_pods if named and task_of(str(node.get("name"))) == named[0]] or of_pods
    reasons += [str(max(of_step, key=lambda node: node.get("finishedAt") or "")["message"])] if of_step else []
    why = "; ".join(reasons) or ("its log is above" if first else "no log of it can be read")
    return Failure(step, "error", f"the step ended without an error of its own: {why}", _tail(first))


def _show_failure(failure: Failure) -> None:
    for line in failure.tail:
        err.print(f"  {line}", style="dim", markup=False, soft_wrap=True)
    where = f" in {failure.step}" if failure.step else ""
    _say(f"avrt: error{where} ({failure.code}): {' '.join(failure.message.split())}")


def _say(text: str) -> None:
    err.print(text, markup=False, soft_wrap=True)


def task_of_driver(name: str | None) -> str:
    """The task that a driver starts; empty for an executor, whose name says nothing."""
    name = base_name(name)
    return name.removesuffix("-driver") if name.endswith("-driver") else ""


def _is_pod(name: str | None) -> bool:
    return base_name(name) == "executor" or base_name(name).endswith("-driver")


def _children(details: Sequence[Any]) -> list[str]:
    """The Argo nodes below these, newest attempt first, each once."""
    found: dict[str, None] = {}
    for detail in details:
        for child in reversed(detail.child_tasks or []):
            if child.pod_name:
                found[child.pod_name] = None
    return list(found)


def _document(text: str) -> dict[str, Any] | None:
    try:
        document = json.loads(text)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _tail(lines: Sequence[str]) -> tuple[str, ...]:
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in lines]
    return tuple(line[:500] for line in plain if line)[-TAIL_LINES:]


def _age_s(run: Any) -> float:
    made: datetime | None = run.created_at
    return time.time() - made.timestamp() if made is not None else 0.0
