"""What all tests share: no network, no telemetry, few threads, and a check that nothing is left running."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent

# Before the libraries that read them are imported, and inherited by the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    VLLM_NO_USAGE_STATS="1",
    GX_ANALYTICS_ENABLED="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test decides for itself where runs and servers are.
for _name in ("AVRT_API_KEY", "AVRT_RUN", "AVRT_RUNS_DIR", "AVRT_DEBUG", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
    os.environ.pop(_name, None)


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Gives the workers of ``make test`` whole files, in the order of collection: long ones come before unit tests.

    What may use the cluster of KUBECONFIG stays on one worker, since those tests share its namespaces.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "cluster" if file.startswith(("tests/cluster/", "tests/manifests/")) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """How xdist distributes the tests."""
    return ByFile(config, log)


_OBSERVED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def observed(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Takes a line about what a test saw, for the end of the run's output."""
    return pytestconfig.stash.setdefault(_OBSERVED, []).append


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints what this worker's tests observed."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["observed"] = session.config.stash.get(_OBSERVED, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take from a worker what its tests observed."""
    lines = getattr(node, "workeroutput", {}).get("observed", [])
    node.config.stash.setdefault(_OBSERVED, []).extend(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the tests observed."""
    if lines := config.stash.get(_OBSERVED, []):
        terminalreporter.section("observed")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder ``shared`` beside the repository, with real clips and benchmark rows; skips where there is none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with real clips")
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fails a module whose tests leave a child process running."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    # What is about to end has a moment to do so; helpers of Python's own multiprocessing live as long as the session.
    _, alive = psutil.wait_procs(left, timeout=10)
    commands = [_command(child) for child in alive]
    kept = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
    stray = [command for command in commands if command and not any(name in command for name in kept)]
    assert not stray, f"left running: {stray}"


def _command(process: psutil.Process) -> str:
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
