"""The first step: can this run succeed here? Shares its checks with ``avrt doctor`` and ``avrt submit``."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

from avrt_lib.config import Config
from avrt_lib.errors import AvrtError, EnvironmentProblem
from avrt_lib.preflight.checks import FAILED, OK, UNKNOWN, WARNING, Check, for_run
from avrt_lib.tables import write_json
from avrt_lib.workspace import Workspace

log = logging.getLogger("avrt.preflight")

_LEVELS = {OK: logging.INFO, UNKNOWN: logging.INFO, WARNING: logging.WARNING, FAILED: logging.ERROR}


def run(config: Config, *, workspace: Workspace, checks: Path, components: str = "") -> dict[str, Any]:
    """Check what the run needs and write every result.

    In a pod the cluster's profile is in the environment, and what it asks for is looked for on the cluster too.

    Args:
        config: the run's configuration.
        workspace: where the step works; the disk below it is checked.
        checks: output folder; gets ``checks.json``, a list of ``{name, status, found, mend, coming_up}``.
        components: the components that the pipeline is made of, separated by commas; empty: the whole path. What no
            step of it needs is not looked for.

    Returns:
        Facts: how many checks passed, warned and failed, and what the warnings say.

    Raises:
        EnvironmentProblem: where a check failed; the message says what to do.
        DataError: where a source is missing or damaged.
    """
    from avrt_lib.cluster.profile import profile_of_pod
    from avrt_lib.preflight.cluster import cluster_checks

    profile = profile_of_pod()
    parts = components.split(",") if components else None
    on_cluster = cluster_checks(config, profile, parts) if profile else []
    results: list[Check] = []
    problem: AvrtError | None = None
    try:
        for result in itertools.chain(on_cluster, for_run(config, workspace.root, profile, parts)):
            log.log(_LEVELS[result.status], "%s", result.line())
            results.append(result)
    except AvrtError as error:
        problem = error
    checks.mkdir(parents=True, exist_ok=True)
    write_json(checks / "checks.json", [dataclasses.asdict(result) for result in results])
    facts = {
        "passed": sum(result.status == OK for result in results),
        "warnings": [result.line() for result in results if result.status == WARNING],
        "failed": [result.line() for result in results if result.status == FAILED],
        "not_checked": [result.line() for result in results if result.status == UNKNOWN],
    }
    if facts["failed"]:
        lines = [*facts["failed"], *([str(problem)] if problem else [])]  # type: ignore[misc]
        problem = EnvironmentProblem(" ".join(line.rstrip(".") + "." for line in lines))
    if problem is not None:
        problem.facts = facts  # type: ignore[attr-defined]
        raise problem
    return facts
