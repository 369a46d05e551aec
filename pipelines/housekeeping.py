"""Runs by the clock, and the removal of old ones."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kfp_server_api  # type: ignore[import-untyped]
import yaml

from avrt_lib.errors import EnvironmentProblem, UsageError
from avrt_lib.store.objects import client, store_errors
from pipelines.backend import FINAL, Backend, checked_name
from pipelines.submission import Order

if TYPE_CHECKING:
    from minio import Minio

#: What a run keeps in the store below its own id. Its artifacts are not among it: the cache gives them to later runs.
OF_RUNS = ("checkpoints/", "runs/")
_RUN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def cron(text: str) -> str:
    """A cron expression as the backend takes it: six fields, the seconds first; five get ``0`` seconds.

    >>> cron("0 3 * * 1")
    '0 0 3 * * 1'

    Raises:
        UsageError: where it is neither.
    """
    fields = text.split()
    if len(fields) == 5:
        fields.insert(0, "0")
    if len(fields) != 6 or not all(re.fullmatch(r"[0-9A-Za-z*?/,#-]+", each) for each in fields):
        raise UsageError(f"--cron takes five fields, or six with seconds first, such as '0 3 * * 1', not {text!r}.")
    return " ".join(fields)


def schedule(backend: Backend, order: Order, *, when: str, name: str | None, experiment: str | None) -> str:
    """Run a pipeline again and again, and return the schedule's id.

    The pipeline is uploaded as a version that is named for its content. The sources are read anew in every run.

    Args:
        backend: where.
        order: what.
        when: a cron expression in UTC.
        name: of the schedule; None makes one.
        experiment: None takes the profile's.
    """
    access = order.profile.pipelines
    trigger = kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=cron(when)))
    pipeline = f"{order.name}-{order.profile.name}"
    name = checked_name("schedule", name or pipeline)
    with tempfile.TemporaryDirectory(prefix="avrt-schedule-") as folder:
        package = Path(folder) / "pipeline.yaml"
        package.write_text(yaml.safe_dump_all(order.compiled(data_hash="")), encoding="utf-8")
        content = hashlib.sha256(package.read_bytes()).hexdigest()[:12]
        pipeline_id, version_id = backend.upload_version(package, pipeline, f"{pipeline}-{content}")
    body = kfp_server_api.V2beta1RecurringRun(
        display_name=name,
        experiment_id=backend.experiment(experiment or access.experiment),
        mode=kfp_server_api.RecurringRunMode.ENABLE,
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=pipeline_id, pipeline_version_id=version_id
        ),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(
            parameters=order.parameters, pipeline_root=access.pipeline_root
        ),
        service_account=access.service_account,
        trigger=trigger,
        max_concurrency="1",
        no_catchup=True,
        namespace=backend.user_namespace,
    )
    return str(backend.create_schedule(body).recurring_run_id)


def age(text: str) -> timedelta:
    """A duration such as ``30d``, ``12h`` or ``2w``.

    >>> age("2w").days
    14

    Raises:
        UsageError: where it is none.
    """
    found = re.fullmatch(r"([0-9]{1,5})([hdw])", text)  # more digits would reach back beyond the calendar
    if not found:
        raise UsageError(
            f"--older-than takes a number of at most five digits and h, d or w, such as 30d, not {text!r}."
        )
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


@dataclass
class Waste:
    """What may go.

    Attributes:
        runs: runs of the backend.
        prefixes: folders of the store with the number of their objects and bytes.
    """

    runs: list[Any] = field(default_factory=list)
    prefixes: dict[str, tuple[int, int]] = field(default_factory=dict)


def find_waste(backend: Backend, *, experiment: str, older_than: timedelta, bucket: str | None, models: bool) -> Waste:
    """What may go: finished runs of the experiment, and what runs that are gone have left in the store.

    Args:
        backend: whose runs.
        experiment: only its runs are removed; those of others keep what is theirs in the store.
        older_than: nothing younger goes.
        bucket: of the store that the environment names; None leaves the store alone.
        models: also models that were published but neither registered nor served.

    Raises:
        AvrtError: where something cannot be read that decides about what may go.
    """
    cutoff = datetime.now(UTC) - older_than
    waste = Waste()
    experiment_id = backend.find_experiment(experiment)
    if experiment_id is not None:
        waste.runs = [run for run in backend.runs(experiment_id) if _over(run, cutoff)]
    if bucket is None:
        return waste
    going = {str(run.run_id) for run in waste.runs}
    kept = {str(run.run_id) for run in backend.runs()} - going
    with store_errors("Listing the store"):
        connection = client()
        if not connection.bucket_exists(bucket):
            return waste
        for prefix in _folders(connection, bucket, OF_RUNS):
            run = prefix.split("/")[1]
            if _RUN.fullmatch(run) and run not in kept:
                _measure(connection, bucket, prefix, cutoff if run not in going else None, waste)
        if models:
            needed = registered_models() | served_models()
            names = {uri.split("/")[-2] for uri in needed if uri.startswith(f"s3://{bucket}/models/")}
            for prefix in _folders(connection, bucket, [f"models/{name}/" for name in sorted(names)]):
                if f"s3://{bucket}/{prefix}".rstrip("/") not in needed:
                    _measure(connection, bucket, prefix, cutoff, waste)
    return waste


def remove(backend: Backend, waste: Waste, bucket: str | None) -> Iterator[str]:
    """Remove it, and yield a line for each thing that is gone."""
    for run in waste.runs:
        backend.delete_run(str(run.run_id))
        yield f"run {run.run_id} ({run.display_name})"
    if bucket is None:
        return
    with store_errors("Clearing the store"):
        connection = client()
        for prefix in waste.prefixes:
            for item in list(connection.list_objects(bucket, prefix=prefix, recursive=True)):
                connection.remove_object(bucket, str(item.object_name))
            yield f"s3://{bucket}/{prefix}"


def registered_models() -> set[str]:
    """The addresses of all registered model versions.

    Raises:
        EnvironmentProblem: where the registry cannot be asked.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise EnvironmentProblem("MLFLOW_TRACKING_URI is not set: --models must know which models are registered.")
    try:
        registry, found, token = MlflowClient(tracking_uri=uri, registry_uri=uri), set[str](), None
        while True:
            page = registry.search_model_versions(max_results=200, page_token=token)
            found |= {str(version.source).rstrip("/") for version in page}
            if not (token := page.token):
                return found
    except MlflowException as error:
        raise EnvironmentProblem(f"The registry at {uri} cannot be read: {' '.join(str(error).split())}.") from error


def served_models() -> set[str]:
    """The addresses of the models that InferenceServices name.

    Raises:
        EnvironmentProblem: where the cluster cannot be asked.
    """
    from pipelines.pods import PodsUnreadable, inference_services

    try:
        services = inference_services()
    except PodsUnreadable as error:
        raise EnvironmentProblem(f"--models must know which models are served: {error}.") from error
    found = re.findall(r"s3://[^\s\"']+", str(services))
    return {uri.rstrip("/") for uri in found}


def _over(run: Any, cutoff: datetime) -> bool:
    ended = run.finished_at if run.finished_at and run.finished_at.year > 1970 else run.created_at
    return run.state in FINAL and ended is not None and ended < cutoff


def _folders(connection: Minio, bucket: str, above: Iterable[str]) -> Iterator[str]:
    for prefix in above:
        for item in connection.list_objects(bucket, prefix=prefix):
            if item.is_dir:
                yield str(item.object_name)


def _measure(connection: Minio, bucket: str, prefix: str, cutoff: datetime | None, waste: Waste) -> None:
    """Count a folder as waste, unless something in it is younger than the cutoff."""
    items = list(connection.list_objects(bucket, prefix=prefix, recursive=True))
    if cutoff is None or all(item.last_modified and item.last_modified < cutoff for item in items):
        waste.prefixes[prefix] = (len(items), sum(item.size or 0 for item in items))
