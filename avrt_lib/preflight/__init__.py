"""The first step: can this run succeed here? Shares its checks with ``avrt doctor``."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from avrt_lib.config import Config
from avrt_lib.errors import EnvironmentProblem
from avrt_lib.preflight.checks import FAILED, OK, for_run
from avrt_lib.tables import write_json
from avrt_lib.workspace import Workspace

log = logging.getLogger("avrt.preflight")


def run(config: Config, *, workspace: Workspace, checks: Path) -> dict[str, Any]:
    """Check what the run needs and write every result.

    Args:
        config: the run's configuration.
        workspace: where the step works; the disk below it is checked.
        checks: output folder; gets ``checks.json``, a list of ``{name, status, found, mend}``.

    Returns:
        Facts: how many checks passed, warned and failed, and what the warnings say.

    Raises:
        EnvironmentProblem: where a check failed; the message says what to do.
        DataError: where a source is missing or damaged.
    """
    results = for_run(config, workspace.root)
    for result in results:
        log.log(logging.INFO if result.status == OK else logging.WARNING, "%s", result.line())
    checks.mkdir(parents=True, exist_ok=True)
    write_json(checks / "checks.json", [dataclasses.asdict(result) for result in results])
    facts = {
        "passed": sum(result.status == OK for result in results),
        "warnings": [result.line() for result in results if result.status not in (OK, FAILED)],
        "failed": [result.line() for result in results if result.status == FAILED],
    }
    if facts["failed"]:
        error = EnvironmentProblem(" ".join(line.rstrip(".") + "." for line in facts["failed"]))  # type: ignore[attr-defined]
        error.facts = facts  # type: ignore[attr-defined]
        raise error
    return facts
