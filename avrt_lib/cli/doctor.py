"""``avrt doctor``."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from avrt_lib.cli.console import out
from avrt_lib.cli.options import find_config, resolve
from avrt_lib.errors import EnvironmentProblem
from avrt_lib.preflight import checks

STYLES = {checks.OK: "green", checks.WARNING: "yellow", checks.FAILED: "bold red"}


def examine(config_file: Path | None, runs_dir: Path, port: int) -> int:
    """Print every check as a table.

    Returns:
        0, or the exit code of an environment problem where a check failed.
    """
    found = checks.for_machine(runs_dir, port=port)
    if config_file is not None:
        config = resolve(find_config(config_file), {})
        found += [*checks.sources(config), *checks.models(config, local=True), *checks.endpoints(config)]
    table = Table("check", "", "found", "what to do", title="This machine", title_justify="left")
    for check in found:
        table.add_row(check.name, f"[{STYLES[check.status]}]{check.status}[/]", escape(check.found), escape(check.mend))
    out.print(table)
    failed = [check.name for check in found if check.status == checks.FAILED]
    if failed:
        out.print(f"Not ready: {', '.join(failed)}.")
        return EnvironmentProblem.exit_code
    out.print("Ready.")
    return 0
