"""Find and end the processes of one run, whatever process group they moved to.

Everything that a run starts inherits the environment variable ``AVRT_RUN``, which holds the run's folder. Engines start
workers in sessions of their own, so a process group alone does not reach them all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time

import psutil

from avrt_lib.workspace import MARKER

log = logging.getLogger("avrt")


def marked(value: str) -> list[psutil.Process]:
    """The processes, other than this one, whose environment holds ``AVRT_RUN=value``; zombies are left out."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.environ().get(MARKER) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):  # ended meanwhile, or another user's
            continue
    return found


def kill_marked(value: str) -> int:
    """Kill the run's processes at once and return how many there were."""
    processes = marked(value)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)
    return len(processes)


def stop_marked(value: str, grace_s: float, keep: frozenset[int] = frozenset()) -> None:
    """Ask the run's processes to end, wait, and kill those that are left.

    Args:
        value: the run's folder.
        grace_s: seconds that they have to save a checkpoint and close.
        keep: process ids to leave alone (the object store, to which a last checkpoint goes).
    """
    for process in _without(marked(value), keep):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + grace_s
    while (left := _without(marked(value), keep)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=min(1.0, max(0.0, deadline - time.monotonic())))
    for process in left:
        log.warning("%s did not end within %.0f s and is killed", process, grace_s)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def _without(processes: list[psutil.Process], keep: frozenset[int]) -> list[psutil.Process]:
    return [process for process in processes if process.pid not in keep]
