"""``avrt doctor``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avrt_lib.cli.console import out
from avrt_lib.cli.options import DEFAULT_CONFIG, find_config, resolve
from avrt_lib.errors import EnvironmentProblem
from avrt_lib.preflight import checks

STYLES = {checks.OK: "green", checks.WARNING: "yellow", checks.FAILED: "bold red", checks.UNKNOWN: "dim"}


def examine(config_file: Path | None, runs_dir: Path, port: int, cluster: Path | None = None) -> int:
    """Print every check as a table: of this machine, or of a cluster.

    Args:
        config_file: the configuration to check for; None: none, and for a cluster the miniature's.
        runs_dir: where runs are kept.
        port: where ``avrt serve`` would listen.
        cluster: a cluster's profile; KUBECONFIG names the cluster itself.

    Returns:
        0, or the exit code of an environment problem where a check failed.
    """
    if cluster is not None:
        return _examine_cluster(config_file or DEFAULT_CONFIG, cluster)
    found = checks.for_machine(runs_dir, port=port)
    if config_file is not None:
        config = resolve(find_config(config_file), {})
        found += [*checks.sources(config), *checks.models(config, local=True), *checks.endpoints(config)]
        found += checks.licence_checks(config)
    return show(found, "This machine")


def _examine_cluster(config_file: Path, cluster: Path) -> int:
    from avrt_lib.cluster.profile import find_profile, load_profile
    from avrt_lib.preflight.cluster import cluster_checks

    profile = load_profile(find_profile(cluster))
    config = resolve(find_config(config_file), profile.overrides)
    return show([*cluster_checks(config, profile), *checks.licence_checks(config)], f"{config.name} on {profile.name}")


def show(found: list[checks.Check], title: str, *, to: Console = out) -> int:
    """Print checks as a table, and return the exit code that follows from them."""
    table = Table("check", "", "found", "what to do", title=title, title_justify="left")
    for check in found:
        table.add_row(check.name, f"[{STYLES[check.status]}]{check.status}[/]", escape(check.found), escape(check.mend))
    to.print(table)
    failed = [check.name for check in found if check.status == checks.FAILED]
    if failed:
        to.print(f"Not ready: {', '.join(failed)}.")
        return EnvironmentProblem.exit_code
    to.print("Ready.")
    return 0
