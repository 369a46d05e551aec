"""``avrt submit``, ``status``, ``retry``, ``cancel``, ``schedule`` and ``gc``: runs of a Kubeflow Pipelines backend.

The command line loads ``register`` through the entry point group ``avrt.commands``, since ``avrt_lib`` imports no
pipelines. What needs kfp or kubernetes is imported when a command runs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from avrt_lib.cli.console import err, out
from avrt_lib.cli.options import find_config, overrides, resolve
from avrt_lib.cluster.profile import PipelinesAccess, Profile, find_profile, load_profile
from avrt_lib.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from pipelines.backend import Backend
    from pipelines.submission import Order

Cluster = Annotated[Path, typer.Option("--cluster", help="The cluster's profile.", metavar="FILE")]
MaybeCluster = Annotated[Path | None, typer.Option("--cluster", help="The cluster's profile.", metavar="FILE")]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The configuration of the run.", metavar="FILE")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Set one value of the configuration.", metavar="SECTION.KEY=VALUE"),
]
Host = Annotated[
    str | None, typer.Option(help="The backend [the profile's, KFP_ENDPOINT, or in-cluster].", metavar="URL")
]
Namespace = Annotated[
    str | None, typer.Option(help="Where the runs' pods are; in multi-user mode your own.", metavar="NAME")
]
TokenEnv = Annotated[str | None, typer.Option(help="The environment variable with a bearer token.", metavar="VARIABLE")]
CookieEnv = Annotated[
    str | None, typer.Option(help="The one with the session cookie of a login page, as name=value.", metavar="VARIABLE")
]
RunId = Annotated[str, typer.Argument(help="The run's id, as `avrt submit` printed it.")]
RunsDir = Annotated[
    Path, typer.Option("--runs-dir", help="Where summaries are kept.", metavar="DIR", envvar="AVRT_RUNS_DIR")
]
PendingLimit = Annotated[
    float | None,
    typer.Option(min=1, help="End the run once a step has waited this long for its pod [the profile's].", metavar="S"),
]
Pipeline = Annotated[str, typer.Option(help="avrt (the whole path), data, train or evaluate.")]
Traces = Annotated[
    str | None,
    typer.Option(help="train: where the merged traces are: s3://BUCKET/traces/SHA256, or a place that its pods see."),
]
DataHash = Annotated[
    str | None,
    typer.Option(
        help="What tells the data from other data (a version, a hash), where it lies on a claim; without it such data "
        "is read anew in every run.",
        metavar="TEXT",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Run every step, also those that have a result.")]
Experiment = Annotated[str | None, typer.Option(help="The backend's experiment [the profile's].", metavar="NAME")]
RUNS = Path("runs")
#: How long secrets, a store and an MLflow that are only just coming up are waited for, and how often they are asked.
COMING_UP_S, LOOK_EVERY_S = 180.0, 5.0


def _debug(value: bool) -> bool:
    if value:
        os.environ["AVRT_DEBUG"] = "1"
    return value


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_debug, is_eager=True)]

EPILOG_SUBMIT = """
**Examples**

`avrt submit --config configs/miniature.yaml --cluster configs/clusters/test.yaml --host http://127.0.0.1:8888`

`avrt submit -c configs/avrt-7b.yaml --cluster configs/clusters/gke.yaml --token-env KFP_TOKEN --namespace me`

`avrt submit -c configs/miniature.yaml --cluster configs/clusters/test.yaml --set seed=1 --detach`

`avrt submit -c configs/avrt-3b.yaml --cluster eks --pipeline train --traces s3://avrt/traces/5e0c…`
"""
EPILOG_SCHEDULE = """
**Examples**

`avrt schedule --cron "0 3 * * 1" --config configs/avrt-7b.yaml --cluster configs/clusters/gke.yaml`

`avrt schedule list --cluster configs/clusters/gke.yaml`

`avrt schedule disable ID --cluster configs/clusters/gke.yaml`
"""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line, once."""
    if any(group.name == "schedule" for group in app.registered_groups):
        return
    app.command(epilog=EPILOG_SUBMIT)(submit)
    app.command()(status)
    app.command()(retry)
    app.command()(cancel)
    app.command()(gc)
    schedules = typer.Typer(help=schedule.__doc__, epilog=EPILOG_SCHEDULE, rich_markup_mode="markdown")
    schedules.callback(invoke_without_command=True, epilog=EPILOG_SCHEDULE)(schedule)
    schedules.command(name="list")(list_schedules)
    schedules.command()(enable)
    schedules.command()(disable)
    schedules.command()(delete)
    app.add_typer(schedules, name="schedule")


def submit(
    config: ConfigFile,
    cluster: Cluster,
    settings: Settings = None,
    pipeline: Pipeline = "avrt",
    traces: Traces = None,
    data_hash: DataHash = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
    experiment: Experiment = None,
    run_name: Annotated[str | None, typer.Option(help="The run's name [configuration and time].")] = None,
    no_cache: NoCache = False,
    detach: Annotated[bool, typer.Option("--detach", help="Print the run's id and do not watch it.")] = False,
    pending_limit_s: PendingLimit = None,
    no_checks: Annotated[
        bool, typer.Option("--no-checks", help="Do not look first whether the cluster has what the run needs.")
    ] = False,
    runs_dir: RunsDir = RUNS,
    debug: Debug = False,
) -> None:
    """Run the pipeline on a cluster and show its steps; ends with the run's exit code.

    Where KUBECONFIG names the cluster, it is looked at first, as by `avrt doctor --cluster`. A step's error is shown
    as for a run on this machine. Ctrl-C asks whether to end the run or leave it.
    """
    from pipelines import submission
    from pipelines.backend import Access, addressed

    order, profile = _order(config, cluster, namespace, settings, pipeline, traces, no_cache)
    backend = addressed(Access(host, namespace, token_env, cookie_env), profile)  # before the checks, which may wait
    if not no_checks:
        _check(order, profile)
    backend.greet()
    run_id = submission.submit(backend, order, experiment=experiment, run_name=run_name, data_hash=data_hash)
    if detach:
        out.print(run_id)
        return
    err.print(f"Run {run_id} ({order.config.name}, seed {order.config.seed}) on {backend.host}", soft_wrap=True)
    raise typer.Exit(_watch(backend, run_id, profile, pending_limit_s, runs_dir))


def status(
    run: RunId,
    cluster: MaybeCluster = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
    logs: Annotated[
        bool, typer.Option("--logs", help="Show the last log lines of the steps that run now (needs KUBECONFIG).")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the steps to the run's end; ends with the run's exit code.")
    ] = False,
    runs_dir: RunsDir = RUNS,
    debug: Debug = False,
) -> None:
    """Show a cluster run: its steps, and how it ended.

    Example: `avrt status 5a3c… --host http://127.0.0.1:8888 --follow`
    """
    from pipelines.watch import Watch, show, show_logs

    profile = _profile(cluster)
    backend = _connect(host, namespace, token_env, cookie_env, profile)
    watch = Watch(backend, run, kueue=profile is not None and profile.kueue is not None)
    if follow:
        raise typer.Exit(watch.follow(runs_dir))
    show(watch, runs_dir)
    if logs:
        show_logs(backend, run)


def retry(
    run: RunId,
    cluster: MaybeCluster = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not watch it.")] = False,
    pending_limit_s: PendingLimit = None,
    runs_dir: RunsDir = RUNS,
    debug: Debug = False,
) -> None:
    """Run the failed steps of a run again, with the same code, images and configuration, and then what they held up.

    After a change of code, images or configuration submit a new run: finished steps come from the cache.

    Example: `avrt retry 5a3c… --cluster configs/clusters/test.yaml`
    """
    profile = _profile(cluster)
    backend = _connect(host, namespace, token_env, cookie_env, profile)
    state = backend.run(run).state
    if state not in ("FAILED", "CANCELED"):
        raise UsageError(f"The run {run} is {state}: only a failed one can be retried.")
    backend.retry(run)
    err.print("Retried with the same code, images and configuration; what has changed since needs a new run.")
    if not detach:
        raise typer.Exit(_watch(backend, run, profile, pending_limit_s, runs_dir, restarted=True))


def cancel(
    run: RunId,
    cluster: MaybeCluster = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove its record instead: for a run whose Workflow is gone.")
    ] = False,
    debug: Debug = False,
) -> None:
    """End a cluster run. Its last step still writes the summary.

    Training tries to save one more checkpoint for `avrt retry`, and has its pod's grace period for it (30 s, unless
    the cluster says otherwise); else what it did since the one before (save_every_steps) is lost.

    Example: `avrt cancel 5a3c… --host http://127.0.0.1:8888`
    """
    backend = _connect(host, namespace, token_env, cookie_env, _profile(cluster))
    if delete:
        backend.delete_run(run)
        err.print(f"The record of the run {run} is deleted.")
        return
    from pipelines.backend import FINAL

    state = backend.run(run).state
    if state in FINAL:
        raise UsageError(f"The run {run} has ended already ({state}).")
    backend.terminate(run)
    err.print(f"The run {run} is told to end; the backend then calls it FAILED.")


def schedule(
    context: typer.Context,
    cron: Annotated[
        str | None, typer.Option(help="When, in UTC: minute hour day month weekday (six fields: seconds first).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The configuration of the runs.", metavar="FILE")
    ] = None,
    cluster: MaybeCluster = None,
    settings: Settings = None,
    pipeline: Pipeline = "avrt",
    traces: Traces = None,
    name: Annotated[str | None, typer.Option(help="The schedule's name [of pipeline and configuration].")] = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
    experiment: Experiment = None,
    no_cache: NoCache = False,
    debug: Debug = False,
) -> None:
    """Run a pipeline on a cluster again and again; list, enable, disable and delete what is scheduled.

    One run at a time; a time that passes while one goes on is left out.
    """
    if context.invoked_subcommand is not None:
        return
    from pipelines import housekeeping

    if cron is None or config is None or cluster is None:
        raise UsageError("avrt schedule takes --cron, --config and --cluster, or list, enable, disable or delete.")
    when = housekeeping.cron(cron)
    order, profile = _order(config, cluster, namespace, settings, pipeline, traces, no_cache)
    backend = _connect(host, namespace, token_env, cookie_env, profile)
    out.print(housekeeping.schedule(backend, order, when=when, name=name, experiment=experiment))


def list_schedules(
    cluster: MaybeCluster = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
    experiment: Experiment = None,
) -> None:
    """List the schedules of the experiment."""
    profile = _profile(cluster)
    backend = _connect(host, namespace, token_env, cookie_env, profile)
    experiment_id = backend.find_experiment(_experiment(experiment, profile))
    table = Table("id", "name", "state", "cron (UTC, seconds first)")
    for each in backend.schedules(experiment_id) if experiment_id else ():
        trigger = each.trigger.cron_schedule if each.trigger else None
        table.add_row(each.recurring_run_id, each.display_name, each.status, trigger.cron if trigger else "")
    out.print(table)


ScheduleId = Annotated[str, typer.Argument(metavar="ID", help="The schedule's id.")]


def enable(
    schedule_id: ScheduleId,
    cluster: MaybeCluster = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
) -> None:
    """Let a schedule start runs again."""
    _connect(host, namespace, token_env, cookie_env, _profile(cluster)).change_schedule("enable", schedule_id)


def disable(
    schedule_id: ScheduleId,
    cluster: MaybeCluster = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
) -> None:
    """Keep a schedule, but let it start no runs."""
    _connect(host, namespace, token_env, cookie_env, _profile(cluster)).change_schedule("disable", schedule_id)


def delete(
    schedule_id: ScheduleId,
    cluster: MaybeCluster = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
) -> None:
    """Delete a schedule; its runs stay."""
    _connect(host, namespace, token_env, cookie_env, _profile(cluster)).change_schedule("delete", schedule_id)


def gc(
    cluster: Cluster,
    older_than: Annotated[str, typer.Option(help="Nothing younger goes: 12h, 30d, 8w.", metavar="AGE")] = "30d",
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only listed.")] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Also published models that are neither registered nor served.")
    ] = False,
    bucket: Annotated[str | None, typer.Option(help="The bucket [AVRT_S3_BUCKET, or avrt].", metavar="NAME")] = None,
    host: Host = None,
    namespace: Namespace = None,
    token_env: TokenEnv = None,
    cookie_env: CookieEnv = None,
    experiment: Experiment = None,
    debug: Debug = False,
) -> None:
    """List (with --yes remove) old runs, and what runs that are gone have left in the object store.

    Runs of the experiment that ended, and the checkpoints and reports of runs that the backend does not know any more.
    Artifacts of the pipeline root are kept: the cache gives them to later runs. The store is the one that AVRT_S3_…
    names; it must belong to this backend alone, and in multi-user mode to this namespace alone.

    Example: `avrt gc --cluster configs/clusters/test.yaml --older-than 30d`
    """
    from avrt_lib.store.objects import default_bucket
    from pipelines import housekeeping

    older = housekeeping.age(older_than)
    profile = load_profile(find_profile(cluster))
    backend = _connect(host, namespace, token_env, cookie_env, profile)
    place = bucket or default_bucket() if os.environ.get("AVRT_S3_ENDPOINT") else None
    if place is None:
        err.print("AVRT_S3_ENDPOINT is not set: the object store is left as it is.")
    waste = housekeeping.find_waste(
        backend, experiment=_experiment(experiment, profile), older_than=older, bucket=place, models=models
    )
    if yes:
        for line in housekeeping.remove(backend, waste, place):
            out.print(f"removed {line}", markup=False, soft_wrap=True)
        return
    for run in waste.runs:
        out.print(f"run {run.run_id} ({run.display_name}, {run.state})", markup=False, soft_wrap=True)
    for prefix, (count, size) in waste.prefixes.items():
        out.print(f"s3://{place}/{prefix}: {count} objects, {size / 2**20:.1f} MiB", markup=False, soft_wrap=True)
    found = len(waste.runs) + len(waste.prefixes)
    err.print(f"{found} would be removed; --yes does it." if found else "There is nothing to remove.")


def _profile(path: Path | None) -> Profile | None:
    return load_profile(find_profile(path)) if path else None


def _experiment(given: str | None, profile: Profile | None) -> str:
    return given or (profile.pipelines.experiment if profile else PipelinesAccess().experiment)


def _connect(
    host: str | None, namespace: str | None, token_env: str | None, cookie_env: str | None, profile: Profile | None
) -> Backend:
    from pipelines.backend import Access, connect

    return connect(Access(host, namespace, token_env, cookie_env), profile)


def _order(
    config: Path,
    cluster: Path,
    namespace: str | None,
    settings: list[str] | None,
    pipeline: str,
    traces: str | None,
    no_cache: bool,
) -> tuple[Order, Profile]:
    """What is to be run, from the command line's files; ``--set`` has the last word, the profile the one before.

    The profile that comes back is of the namespace that the command line names: what the run needs is looked for there,
    from here and by its first step.
    """
    from components.images import Images, built
    from pipelines.compile import PIPELINES
    from pipelines.submission import Order

    if pipeline not in PIPELINES:
        raise UsageError(f"--pipeline takes {', '.join(PIPELINES)}, not {pipeline!r}.")
    if (pipeline == "train") != (traces is not None):
        raise UsageError("--pipeline train needs --traces, and the other pipelines make their own.")
    profile = load_profile(find_profile(cluster)).in_namespace(namespace)
    changes: dict[str, Any] = overrides(
        settings=settings or [], dataset=[], unfiltered=False, overlap_splits=False, seed=None
    )
    resolved = resolve(find_config(config), profile.overrides | changes)
    found = built(registry=profile.registry, variant=profile.build)
    if found is None:
        found = Images().at(profile.registry)
        err.print(f"No images were built here (make images): the run takes {found.pipeline} and its sisters.")
    return Order(resolved, profile, found, pipeline, not no_cache, traces), profile


def _check(order: Order, profile: Profile) -> None:
    """Look at the cluster before a run is made on it.

    Whoever submits may see the backend only: then nothing is checked from here, and the run's first step does it. What
    `kubectl apply` has only just made is waited for, as long as nothing else is wrong.

    Raises:
        EnvironmentProblem: where something that the run needs is missing; what it is has been printed.
    """
    from avrt_lib.cli.doctor import show
    from avrt_lib.preflight.checks import FAILED, WARNING, licence_checks
    from avrt_lib.preflight.cluster import CLUSTER, cluster_checks
    from pipelines.compile import components_of, for_pipeline

    config, components = for_pipeline(order.config, order.pipeline), components_of(order.pipeline)
    deadline, said = time.monotonic() + COMING_UP_S, ""
    while True:
        found = [*cluster_checks(config, profile, components), *licence_checks(config, components)]
        failed = [check for check in found if check.status == FAILED]
        if not failed or not all(check.coming_up for check in failed) or time.monotonic() >= deadline:
            break
        waiting = ", ".join(check.name for check in failed)
        if waiting != said:
            err.print(f"Waiting for {waiting} (up to {COMING_UP_S:.0f} s) …", soft_wrap=True)
        said = waiting
        time.sleep(LOOK_EVERY_S)
    unseen = next((check for check in found if check.name == CLUSTER and check.status == FAILED), None)
    if unseen:
        err.print(f"The cluster is not looked at from here ({unseen.found}); the run's first step does it.")
        found.remove(unseen)
    findings = [check for check in found if check.status in (FAILED, WARNING)]
    if findings and show(findings, f"{order.config.name} on {profile.name}", to=err):
        raise EnvironmentProblem("Nothing was submitted: the cluster lacks what the run needs (--no-checks submits).")


def _watch(
    backend: Backend,
    run_id: str,
    profile: Profile | None,
    limit_s: float | None,
    runs_dir: Path,
    *,
    restarted: bool = False,
) -> int:
    from pipelines.watch import Watch

    access = profile.pipelines if profile else PipelinesAccess()
    kueue = profile is not None and profile.kueue is not None
    limit = access.pending_limit_s if limit_s is None else limit_s
    return Watch(backend, run_id, limit_s=limit, kueue=kueue, restarted=restarted).follow(runs_dir)
