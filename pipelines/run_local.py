"""Run the pipeline with Kubeflow Pipelines' local runner: ``python -m pipelines.run_local --config … --work …``.

This is a process of its own because the local runner patches ``print`` and the root logger. It leads a process group,
and it ends with whoever started it: standard input is a pipe that nobody writes to, and its end means that the other
side is gone, even by SIGKILL.
"""

import argparse
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

from kfp import local

from avrt_lib.config import load
from avrt_lib.run_processes import kill_marked
from pipelines.avrt import build
from pipelines.options import Options


def die_with_parent(marker: str) -> None:
    """End this process group, and all that carries the run's marker, once standard input is closed."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        kill_marked(marker)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="parent-watch").start()


def run(config_file: Path, *, work: Path, root: Path, data_hash: str) -> None:
    """Run the whole graph; every step reports into ``work``.

    Args:
        config_file: the resolved configuration.
        work: the run's work folder.
        root: where the local runner places the artifacts.
        data_hash: identity of the source data.

    Raises:
        RuntimeError: where a step failed; the reports in ``work`` say which and why.
    """
    config = load(config_file)
    # Images and display names mean nothing to the local runner, and it says so for every task.
    warnings.filterwarnings("ignore", message=r"You may be attemping", category=RuntimeWarning)
    warnings.filterwarnings("ignore", message=r".*display_name.*no effect", category=UserWarning)
    # Steps find their earlier results by content in ``work``; the runner's own cache knows no content.
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), enable_caching=False)
    build(Options(config))(work=str(work), data_hash=data_hash)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m pipelines.run_local``."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.run_local", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--data-hash", default="")
    parser.add_argument("--die-with-parent", metavar="MARKER", help="end with whoever holds the standard input")
    given = parser.parse_args(arguments)
    if given.die_with_parent:
        die_with_parent(given.die_with_parent)
    try:
        run(given.config, work=given.work.absolute(), root=given.root.absolute(), data_hash=given.data_hash)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
