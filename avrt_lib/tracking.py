"""MLflow: one parent run, one child per step with its settings, metrics and documents, and the registry's champion.

MLflow is imported only where tracking is on (``MLFLOW_TRACKING_URI`` is set). A step never fails because tracking is
down: it logs a warning, and after three failures in a row it stops trying. The registry is different, since a promotion
that nobody can find is none: ``register_champion`` raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from avrt_lib.code_version import code_version
from avrt_lib.config import Config, from_json
from avrt_lib.errors import StoreError

log = logging.getLogger("avrt.tracking")

URI = "MLFLOW_TRACKING_URI"
RUN = "MLFLOW_RUN_ID"
PARENT = "AVRT_MLFLOW_PARENT"
RUN_ID = "AVRT_RUN_ID"
DATA_HASH = "AVRT_DATA_HASH"
CHAMPION = "champion"

_FLUSH_AFTER_S = 2.0
_FLUSH_AT = 200
_FAILURES = 3
_PARAM_CHARS = 6000
_METRIC_CHARS = 250
_ATTACH_S = 15.0
_DOCUMENTS = (".json", ".yaml", ".html")
_DOCUMENT_BYTES = 2**20


@dataclass
class StepRun:
    """The MLflow run of this process's step."""

    client: Any
    run_id: str
    _metrics: list[Any] = field(default_factory=list)
    _flushed: float = field(default_factory=time.monotonic)
    _failures: int = 0

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Buffer metrics; they are sent in batches."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._metrics += [Metric(metric_name(key), float(value), now, step) for key, value in values.items()]
        if len(self._metrics) >= _FLUSH_AT or time.monotonic() - self._flushed > _FLUSH_AFTER_S:
            self.flush()

    def flush(self) -> None:
        """Send what is buffered; what cannot be sent is dropped with a warning."""
        metrics, self._metrics, self._flushed = self._metrics, [], time.monotonic()
        for start in range(0, len(metrics), 1000):
            batch = metrics[start : start + 1000]
            self.attempt("logging metrics", partial(self.client.log_batch, self.run_id, metrics=batch))

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; what MLflow has no room for is cut off."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_PARAM_CHARS]) for key, value in values.items()]
        self.attempt("logging parameters", partial(self.client.log_batch, self.run_id, params=params))

    def attach(self, files: Iterable[tuple[Path, str | None]]) -> None:
        """Attach files, each with the folder among the run's artifacts that it goes to (None: their root).

        Artifacts may lie in another store than the runs, which this process may have no way to or no key of. Whatever
        its client raises is a warning, and it is waited for no longer than ``_ATTACH_S`` seconds.
        """
        self.attempt("attaching artifacts", partial(self._upload, files))

    def _upload(self, files: Iterable[tuple[Path, str | None]]) -> None:
        raised: list[Exception] = []

        def upload() -> None:
            try:
                for path, place in files:
                    self.client.log_artifact(self.run_id, str(path), place)
            except Exception as error:  # each store's client has errors of its own
                raised.append(error)

        thread = threading.Thread(target=upload, daemon=True)
        thread.start()
        thread.join(_ATTACH_S)
        if thread.is_alive():
            raise TimeoutError(f"the artifacts' store has not taken them in {_ATTACH_S:g} s")
        if raised:
            raise OSError(f"{type(raised[0]).__name__}: {raised[0]}") from raised[0]

    def attempt(self, what: str, action: Callable[[], Any]) -> None:
        """Do something with the tracking server, or warn that it cannot be done."""
        if self._failures >= _FAILURES:
            return
        try:
            action()
        except _tracking_failures() as error:
            self._failures += 1
            more = " (no further attempts)" if self._failures >= _FAILURES else ""
            log.warning("MLflow: %s failed%s: %s", what, more, _line(error))
        else:
            self._failures = 0


def metric_name(name: str) -> str:
    """A name that MLflow takes: question types and errors are part of some, and one odd name would cost a whole batch.

    >>> metric_name("by_kind.Who, what & where?")
    'by_kind.Who_ what _ where_'
    """
    plain = re.sub(r"[^\w.\-: /]", "_", name)
    # MLflow takes a name for a path as well, which must not be another one when it is written out.
    parts = [part for part in plain.split("/") if part.strip(".")]
    return re.sub(r"^\.+", "_", "/".join(parts))[:_METRIC_CHARS].rstrip("/") or "_"


_active: StepRun | None = None


def log_metrics(values: Mapping[str, float], step: int) -> None:
    """Log metrics of the running step; without tracking, nothing."""
    if _active is not None:
        _active.log_metrics(values, step)


def start_parent(config: Config, folder: Path, *, uri: str, data_hash: str = "") -> dict[str, str]:
    """Open the parent run of one pipeline run; ``end_parent`` ends it.

    It is the run that ``MLFLOW_RUN_ID`` names, if the caller made one for this. A run that is resumed goes on in the
    parent that it had.

    Args:
        config: its parameters.
        folder: the run's folder; its name is the run's name.
        uri: the tracking store; for ``sqlite:///RUNS/mlflow.db`` artifacts go to ``RUNS/mlartifacts``.
        data_hash: hash of the source data; a tag of the run and of its champion.

    Returns:
        The environment that lets the run's steps make children of it; ``MLFLOW_RUN_ID`` must not be in theirs.
    """
    environment = {RUN_ID: folder.name, DATA_HASH: data_hash}
    given = os.environ.get(RUN)
    try:
        client = _client(uri)
        if given:
            experiment = str(client.get_run(given).info.experiment_id)
            for key, value in _parent_tags(folder.name, config, data_hash).items():
                client.set_tag(given, key, value)
        else:
            experiment = _experiment(client, config.tracking.experiment, uri)
        run = StepRun(client, given or _parent(client, experiment, folder.name, config, data_hash))
    except _tracking_failures() as error:
        log.warning("MLflow at %s cannot be reached, so nothing is tracked: %s", uri, _line(error))
        return environment
    run.log_params(flat(config))
    return environment | {
        URI: uri,
        PARENT: run.run_id,
        "MLFLOW_EXPERIMENT_ID": experiment,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


@contextlib.contextmanager
def step_run(
    instance: str,
    config: str | Config,
    sections: Iterable[str] = (),
    outputs: Mapping[str, Path] | None = None,
) -> Iterator[StepRun | None]:
    """The MLflow run of one step instance; without ``MLFLOW_TRACKING_URI`` nothing.

    It joins the run that ``MLFLOW_RUN_ID`` names, where the platform made one for this task, and leaves that run's end
    to the platform. Otherwise it is a child of ``AVRT_MLFLOW_PARENT``; a step that is started again goes on in the
    child that it had.

    Args:
        instance: the step instance's name (``evaluation-sft``).
        config: the run's configuration, or its JSON text.
        sections: those that the step reads; the run's parameters.
        outputs: the step's output folders by name; when it has ended, their small documents are attached.
    """
    global _active
    uri = os.environ.get(URI)
    if not uri:
        yield None
        return
    settings = config if isinstance(config, Config) else from_json(config)
    run, joined = _begin(uri, instance, settings)
    if run is None:
        yield None
        return
    read = set(sections)
    run.log_params({key: value for key, value in flat(settings).items() if key.split(".")[0] in read})
    before, _active = _active, run
    try:
        with _variables({RUN: run.run_id}), contextlib.nullcontext() if joined else _finishing(run):
            try:
                yield run
            finally:
                run.attach(_documents(outputs or {}))
    finally:
        run.flush()
        _active = before


def _documents(outputs: Mapping[str, Path]) -> Iterator[tuple[Path, str]]:
    """Results to read, such as ``predictions/metrics.json``: no tables and no weights, which have a place already."""
    for name, folder in outputs.items():
        for path in sorted(folder.glob("*")):
            if path.suffix in _DOCUMENTS and path.stat().st_size <= _DOCUMENT_BYTES:
                yield path, name


def _begin(uri: str, instance: str, settings: Config) -> tuple[StepRun | None, bool]:
    given, parent = os.environ.get(RUN), os.environ.get(PARENT)
    try:
        client = _client(uri)
        if given:
            client.get_run(given)
            return StepRun(client, given), True
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or _experiment(client, settings.tracking.experiment, uri)
        if not parent and (name := os.environ.get(RUN_ID)):
            # Steps in pods of their own share only the run's name; preflight, which runs alone, makes the parent.
            parent = _parent(client, experiment, name, settings, os.environ.get(DATA_HASH, ""))
        identity = {"avrt.step": instance}
        if parent:
            identity["mlflow.parentRunId"] = parent
        tags = {**identity, "mlflow.runName": instance, "avrt.config_hash": settings.sha256}
        found = _run(client, experiment, identity if parent else {}, tags)
    except _tracking_failures() as error:
        log.warning("MLflow at %s cannot be reached, so %s is not tracked: %s", uri, instance, _line(error))
        return None, False
    return StepRun(client, found), False


@contextlib.contextmanager
def _finishing(run: StepRun) -> Iterator[None]:
    """End the run as what the block ends as."""
    status = "FINISHED"
    try:
        yield
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        run.flush()
        run.attempt("ending the run", lambda: run.client.set_terminated(run.run_id, status))


def register_champion(uri: str, name: str, tags: Mapping[str, str]) -> int | None:
    """Register a published model and point the alias ``champion`` at it.

    A model that is registered already (the same address) keeps its version, and the run that made it (tag ``run``).

    Args:
        uri: where the model is published.
        name: the registered model.
        tags: of the version: ``sha256``, ``data_hash``, ``config_hash``, ``code_version`` …

    Returns:
        The version, or None where tracking is off.

    Raises:
        StoreError: where the registry refuses.
    """
    tracking_uri = os.environ.get(URI)
    if not tracking_uri:
        log.warning("MLFLOW_TRACKING_URI is not set: %s is published but not registered", uri)
        return None
    try:
        from mlflow.exceptions import MlflowException

        client = _client(tracking_uri)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = [v for v in client.search_model_versions(f"name = '{name}'") if v.source == uri]
        run_id = _active.run_id if _active is not None else None
        found = known[0] if known else client.create_model_version(name, source=uri, run_id=run_id)
        origin = {"run": os.environ[RUN_ID]} if os.environ.get(RUN_ID) and "run" not in (found.tags or {}) else {}
        for key, value in {**tags, **origin}.items():
            client.set_model_version_tag(name, found.version, key, value)
        client.set_registered_model_alias(name, CHAMPION, found.version)
    except _tracking_failures() as error:
        raise StoreError(f"MLflow at {tracking_uri} did not register {name} ({uri}): {_line(error)}.") from error
    return int(found.version)


def tag_version(name: str, version: int | None, tags: Mapping[str, str]) -> None:
    """Let a registered model's version point at where it went; what cannot be sent is dropped with a warning.

    Args:
        name: the registered model.
        version: None does nothing, since such a model is not registered.
        tags: ``commit``, ``inference_service`` (NAMESPACE/NAME), ``pull_request``.
    """
    uri = os.environ.get(URI)
    if not uri or version is None:
        return
    try:
        client = _client(uri)
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version), key, value)
    except _tracking_failures() as error:
        log.warning("MLflow at %s did not take the tags of %s version %s: %s", uri, name, version, _line(error))


def flat(config: Config) -> dict[str, Any]:
    """The configuration with dotted keys; values that are not set are left out."""
    result: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else key, value)
        elif node is not None:
            result[prefix] = node

    walk("", config.model_dump(mode="json"))
    return result


def end_parent(
    config: Config,
    summary: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
    documents: Iterable[Path] = (),
) -> None:
    """End the parent run as the run's summary says that the run ended; one that the caller made is left open.

    Args:
        config: the run's configuration.
        summary: ``summary.json``.
        environment: what ``start_parent`` gave; in a pod, whose steps only opened the parent, the environment.
        documents: files to attach.
    """
    uri, name = environment.get(URI), environment.get(RUN_ID)
    if not uri or not name:
        return
    failure = summary["failure"] or {}
    failed = "KILLED" if failure.get("code") == "interrupted" else "FAILED"
    try:
        client = _client(uri)
        parent = environment.get(PARENT)
        if parent is None:
            experiment = _experiment(client, config.tracking.experiment, uri)
            parent = _parent(client, experiment, name, config, environment.get(DATA_HASH, ""))
        StepRun(client, parent).attach((path, None) for path in documents)
        if os.environ.get(RUN) != parent:
            client.set_terminated(parent, "FINISHED" if summary["status"] == "succeeded" else failed)
    except _tracking_failures() as error:
        log.warning("MLflow at %s cannot be reached, so the run stays open there: %s", uri, _line(error))


def _parent(client: Any, experiment: str, name: str, config: Config, data_hash: str) -> str:
    tags = {"mlflow.runName": name, **_parent_tags(name, config, data_hash)}
    return _run(client, experiment, {"avrt.run": name}, tags)


def _parent_tags(name: str, config: Config, data_hash: str) -> dict[str, str]:
    return {
        "avrt.run": name,
        "avrt.data_hash": data_hash,
        "avrt.config_hash": config.sha256,
        "avrt.code_version": code_version(),
    }


def _client(uri: str) -> Any:
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # Without these a server that is down costs minutes of retries.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment(client: Any, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith("sqlite:///"):
            location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run made it meanwhile
                raise
            found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


def _run(client: Any, experiment: str, identity: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """The newest run with the identifying tags, opened again, or a new one."""
    if identity:
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
        found = client.search_runs([experiment], filter_string=wanted, max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id)
    return str(client.create_run(experiment, tags=dict(tags)).info.run_id)


def _tracking_failures() -> tuple[type[Exception], ...]:
    """What a tracking store that is down, full or refusing raises (``requests`` raises ``OSError``)."""
    try:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:  # tracking is asked for, but this image does not have it
        return (ImportError,)
    return (MlflowException, SQLAlchemyError, OSError)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
