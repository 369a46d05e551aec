"""One run on this machine: the pipeline in a child process, and beside it the object store and the tracking.

The parent holds the run folder's lock, watches the reports that the steps write, and writes the summary however the run
ends. The child is ``python -m pipelines.run_local``, named as text, since this package imports no pipelines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import avrt_lib
from avrt_lib import tracking
from avrt_lib.config import Config
from avrt_lib.errors import AvrtError, EnvironmentProblem, OutputMissingError, of_code, of_exit_code
from avrt_lib.report import summary as summaries
from avrt_lib.run_processes import kill_marked, stop_marked
from avrt_lib.run_signals import Interrupted, signals_raise
from avrt_lib.runs import RunFolder
from avrt_lib.workspace import MARKER, read_reports

log = logging.getLogger("avrt")

POLL_S = 0.5
GRACE_S = 45.0

#: No telemetry, and no network but the configured endpoints.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its summary, and the exit code of the process."""

    summary: dict[str, Any]
    exit_code: int


def execute(folder: RunFolder, config: Config, data_hash: str, watch: Callable[[], None]) -> Outcome:
    """Run the pipeline in a run folder, from where an earlier attempt in it stopped.

    Args:
        folder: the run's folder; nobody else may be running in it.
        config: its configuration.
        data_hash: identity of the source data (``avrt_lib.ingest.fingerprint``).
        watch: called about twice a second while the pipeline runs, to show what the steps report.

    Returns:
        The summary, also written to ``summary.json``, and the exit code. Failures of the run are in there and are not
        raised.

    Raises:
        UsageError: where another process runs in the folder.
    """
    failure: dict[str, str] | None = None
    exit_code = 0
    unexpected: Exception | None = None
    tracked: dict[str, str] = {}
    with folder.locked():
        marker = str(folder.path)
        if left := kill_marked(marker):
            log.warning("ended %d processes that an earlier attempt had left behind", left)
        _forget_reports(folder)
        try:
            with signals_raise():
                _supervise(folder, config, data_hash, watch, tracked)
        except Interrupted as stopped:
            exit_code = stopped.exit_code
            failure = {
                "step": "",
                "code": "interrupted",
                "message": f"The run was stopped ({stopped}): go on with --resume {folder.path.name}.",
            }
        except AvrtError as error:
            exit_code = error.exit_code
            failure = {"step": "", "code": error.code, "message": str(error)}
        except Exception as error:  # the summary is written first, then this goes on its way
            unexpected = error
            failure = {"step": "", "code": "error", "message": f"{type(error).__name__}: {error}"}
        finally:
            # Whatever happens, nothing that this run started may stay.
            kill_marked(marker)
        summary = summaries.write(folder.path, failure)
        if exit_code == 0 and summary["status"] != "succeeded":
            exit_code = of_code(summary["failure"]["code"]).exit_code
        _write_report(folder)
        documents = [path for path in (folder.summary_file, folder.report_file) if path.exists()]
        tracking.end_parent(config, summary, tracked, documents)
    if unexpected is not None:
        raise unexpected
    return Outcome(summary, exit_code)


def _forget_reports(folder: RunFolder) -> None:
    """Reports and artifacts are of one attempt; what the steps had committed stays in their scratch."""
    for path in (folder.work / "reports", folder.work / "progress", folder.artifacts):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.work, folder.logs):
        path.mkdir(parents=True, exist_ok=True)


def _supervise(
    folder: RunFolder, config: Config, data_hash: str, watch: Callable[[], None], tracked: dict[str, str]
) -> None:
    """Run the pipeline with what it needs beside it; ``tracked`` gets the environment of the parent in MLflow."""
    os.environ[MARKER] = str(folder.path)
    # Sockets of the engines have short path limits, so temporary files do not lie below the run's folder.
    temporary = tempfile.mkdtemp(prefix="avrt-run-")
    try:
        with contextlib.ExitStack() as stack:
            environment = {**os.environ, **OFFLINE, "AVRT_STEP_LOGS": "1", "TMPDIR": temporary}
            keep = frozenset[int]()
            if config.store.kind == "local":
                environment["AVRT_LOCAL_STORE"] = str(folder.store)
            elif "AVRT_S3_ENDPOINT" not in os.environ:
                from avrt_lib.store import LocalObjectServer

                server = stack.enter_context(LocalObjectServer(folder.store, bucket=config.store.bucket))
                environment |= server.environment
                keep = frozenset({int((folder.store / "server.pid").read_text(encoding="utf-8"))})
            # As on a cluster, also in a store that is there already: checkpoints go by the variable.
            environment["AVRT_S3_BUCKET"] = config.store.bucket
            uri = environment.get(tracking.URI) or f"sqlite:///{folder.path.parent / 'mlflow.db'}"
            tracked |= tracking.start_parent(config, folder.path, uri=uri, data_hash=data_hash)
            # It may name the parent; the steps shall make children of that one.
            environment.pop(tracking.RUN, None)
            environment |= tracked
            _compile(folder, environment)
            _pipeline(folder, environment, data_hash, watch, keep)
        _check_outputs(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.environ.pop(MARKER, None)


def _module(environment: dict[str, str], name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this installation, also out of a checkout that is not installed."""
    root = str(Path(avrt_lib.__file__).parent.parent)
    if root not in site.getsitepackages():
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH", "")) if p)
    return [sys.executable, "-m", name, *arguments]


def _compile(folder: RunFolder, environment: dict[str, str]) -> None:
    """Write the compiled pipeline beside the configuration."""
    compile_to(folder.config_file, folder.pipeline_file, environment)


def compile_to(config_file: Path, output: Path, environment: dict[str, str] | None = None, *options: str) -> None:
    """Compile the pipeline of a configuration file in a process of its own.

    Raises:
        AvrtError: where compilation failed, of the class that the process's exit code tells; the message holds its
            last line.
        EnvironmentProblem: where a signal ended it.
    """
    environment = dict(environment or os.environ)
    command = _module(environment, "pipelines.compile", str(config_file), str(output), *options)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        kind = of_exit_code(done.returncode) if done.returncode > 0 else EnvironmentProblem
        raise kind(f"The pipeline could not be compiled: {last}")


def _pipeline(
    folder: RunFolder, environment: dict[str, str], data_hash: str, watch: Callable[[], None], keep: frozenset[int]
) -> None:
    """Run the pipeline in its own process group, and end it with all its processes where this process is to end."""
    log_file = folder.logs / "pipeline.log"
    command = _module(
        environment,
        "pipelines.run_local",
        *("--config", str(folder.config_file), "--work", str(folder.work), "--root", str(folder.artifacts)),
        *("--data-hash", data_hash, "--die-with-parent", environment[MARKER]),
    )
    with open(log_file, "ab") as output:
        # The child watches this pipe and ends, with all its children, once this process is gone.
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=POLL_S)
            watch()
            if child.returncode is not None:
                break
    except BaseException:
        _stop(environment[MARKER], keep)
        raise
    finally:
        if child.stdin is not None:
            child.stdin.close()
        child.wait()
    failed = any(report.get("status") == "failed" for report in read_reports(folder.work).values())
    if child.returncode and not failed:
        raise EnvironmentProblem(
            f"The pipeline ended without a failed step (exit code {child.returncode}): see {log_file}."
        )


def _stop(marker: str, keep: frozenset[int]) -> None:
    """End the run's processes; a second signal does not wait for them."""
    log.warning("stopping what the run started; training saves a checkpoint first")
    try:
        stop_marked(marker, GRACE_S, keep)
    except Interrupted:
        kill_marked(marker)


def _check_outputs(folder: RunFolder) -> None:
    """Check that every output is there: the pipeline runner takes a task that wrote nothing for a success.

    Raises:
        OutputMissingError: the message names the outputs.
    """
    missing = summaries.missing_outputs(read_reports(folder.work))
    if missing:
        raise OutputMissingError(f"The run ended without {', '.join(missing)}: go on with --resume {folder.path.name}.")


def _write_report(folder: RunFolder) -> None:
    """Write the HTML report. The run's result is known by now and does not depend on it."""
    try:
        from avrt_lib.report.html import write_report

        write_report(folder.path)
    except Exception:
        log.exception("report.html could not be written; try again with: avrt report --run %s", folder.path)
