"""Training in several processes of one machine: the step starts itself anew in one process for each GPU.

Three kinds of process take part. The step's own (``run``) waits, and reports how it ended. The launcher, PyTorch's
elastic one, starts the others and ends them all where one of them fails. Those run the very same step (``run_step``)
on the same folders, with ``RANK`` and ``WORLD_SIZE`` set. Where somebody else's launcher has set these, as torchrun or
Kubeflow Trainer does on several machines, nothing is started here.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import avrt_lib
from avrt_lib.config import Config, OptimizerConfig
from avrt_lib.errors import AvrtError, ConfigError, EnvironmentProblem, of_code
from avrt_lib.run_signals import Interrupted
from avrt_lib.tables import read_json, write_json
from avrt_lib.workspace import Workspace, read_reports

log = logging.getLogger("avrt")

MODULE = "avrt_lib.training.launch"
REQUEST = "launch.json"
#: How long processes that were told to stop may take for their step and a checkpoint. Whoever stopped the step has a
#: limit too, and it is the shorter one: this is for a process that hangs.
_SAVE_S = 1800
_LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ


def processes(step: str, config: Config) -> int:
    """How many processes run a training step: as its launcher says, as the configuration asks for, or one for each GPU.

    Where fewer GPUs are visible than that, each of them takes the rows of several processes (``loop.accumulation``).

    Raises:
        ConfigError: where the shares would not be equal.
    """
    if launched():
        return int(os.environ.get("WORLD_SIZE", "1"))
    section: OptimizerConfig = config.sft if step == "sft" else config.grpo
    wanted = section.processes
    if wanted == 1:
        return 1
    import torch

    gpus: int = torch.cuda.device_count()
    if wanted is not None and 0 < gpus < wanted:
        if wanted % gpus:
            raise ConfigError(
                f"{step}.processes is {wanted}, which {gpus} visible GPUs cannot share equally: ask for {gpus}, and "
                f"for more {step}.gradient_accumulation where the batch shall stay the same."
            )
        log.warning("%s: %d GPUs for %d processes: each takes the rows of %d", step, gpus, wanted, wanted // gpus)
        return gpus
    return wanted or max(1, gpus)


def run(
    count: int,
    step: str,
    *,
    config: Config,
    workspace: Workspace,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Run a training step in several processes and wait for them.

    The first of them writes the step's report and progress, tracks, and places the outputs.

    Args:
        count: how many.
        step: ``sft`` or ``grpo``.
        config: the run's configuration.
        workspace: the step's, as this process sees it; its root is the run's work folder.
        inputs: folders by name.
        outputs: where to place each output, by name.

    Returns:
        The facts that the first process reports.

    Raises:
        AvrtError: what the first process to fail raised, by its code; an error without a code is a plain ``AvrtError``.
        EnvironmentProblem: where a process ended by a signal.
        Interrupted: where this process was told to stop, before the others had begun.
    """
    request = workspace.scratch / REQUEST
    request.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "processes": count,
        "name": step,
        "config": config.to_json(),
        "inputs": {name: str(path) for name, path in inputs.items() if path},
        "outputs": {name: str(path) for name, path in outputs.items() if path},
        "work": str(workspace.root),
    }
    write_json(request, document)
    root = str(Path(avrt_lib.__file__).parent.parent)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    log.info("%s: starting %d processes", step, count)
    started = time.time()
    launcher = subprocess.Popen(
        [sys.executable, "-m", MODULE, str(request), str(os.getpid())],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then lets them save
    )
    status, stopped = _wait(launcher)
    if status == 0:
        facts: dict[str, Any] = read_json(workspace.report_path)["facts"]
        return facts
    killed = status < 0 or status > 128
    told = status in (-signal.SIGTERM, 128 + signal.SIGTERM)
    failures = _failures(workspace, count, started)
    if failures and (told or not killed):
        # The others fail for want of the first, or are told to stop because of it.
        first = min(failures, key=lambda r: (r["failure"]["code"] == "interrupted", r["started"] + r["seconds"]))
        raise _error(first)
    if stopped is not None:
        raise stopped
    number = -status if status < 0 else status - 128
    how = signal.Signals(number).name if killed and number in set(signal.Signals) else f"exit code {status}"
    raise EnvironmentProblem(
        f"A process of {step} ended without a word ({how}), and the other ones with it; its log may say more. SIGKILL "
        "most often means that the memory ran out."
    )


def _wait(launcher: subprocess.Popen[bytes]) -> tuple[int, BaseException | None]:
    """The launcher's exit status, and what told this process to stop meanwhile; it is passed on once."""
    stopped: BaseException | None = None
    while True:
        try:
            return launcher.wait(), stopped
        except (Interrupted, KeyboardInterrupt) as signalled:
            if stopped is None:
                launcher.terminate()
            elif isinstance(signalled, KeyboardInterrupt):  # somebody who does not want to wait for a checkpoint
                launcher.kill()
            stopped = stopped or signalled


def _failures(workspace: Workspace, count: int, since: float) -> list[dict[str, Any]]:
    """The reports of this attempt's processes that failed."""
    roots = [workspace.root, *(workspace.root / "ranks" / str(rank) for rank in range(1, count))]
    reports = [found for root in roots if (found := read_reports(root).get(workspace.instance))]
    return [report for report in reports if report["status"] == "failed" and report["started"] >= since]


def _error(report: Mapping[str, Any]) -> AvrtError:
    """The error that a report tells of."""
    code, message = report["failure"]["code"], report["failure"]["message"]
    error = of_code(code)(message)
    error.facts = report["facts"]  # type: ignore[attr-defined]
    return error


# What the launcher and the processes that it starts run


def main(request: Path, parent: int) -> int:
    """Run the launcher, or where that has set ``RANK`` the step, and return the exit status."""
    _end_with(parent)
    document = json.loads(request.read_text(encoding="utf-8"))
    count = document.pop("processes")
    return _step(document) if launched() else _launch(count, request)


def _launch(count: int, request: Path) -> int:
    """Start the processes. The status is that of the first to fail; 128 and the signal's number, where one ended it."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=request.parent.name,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{_LOOPBACK}:0",
        local_addr=_LOOPBACK,
        max_restarts=0,  # a step that is started again goes on from its checkpoint
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=_SAVE_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", MODULE, str(request), str(os.getpid()))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _step(document: dict[str, Any]) -> int:
    """Run the step as one of its processes. The step itself takes SIGTERM; one that comes later must not end it."""
    from avrt_lib.steps import run_step

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ["RANK"] != "0":
        log.setLevel(logging.WARNING)  # else each step would be said by every process
    try:
        run_step(**document)
    except Exception as error:  # it is in the report and the log
        return error.exit_code if isinstance(error, AvrtError) else 1
    return 0


def _end_with(parent: int) -> None:
    """Be killed as soon as the parent is gone, so that no process is left behind."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the request
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
