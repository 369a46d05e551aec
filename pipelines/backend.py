"""The Kubeflow Pipelines backend, over its v2beta1 API: where it is, who we are there, and what it refuses in one line.

This uses ``kfp_server_api``, the generated client beneath ``kfp.Client``. ``kfp.Client`` itself prints links, spends
25 s on a health check that a wrong token fails, turns caching off for the outermost tasks only, and has no call for
logs, which are the only place where the backend keeps the text of an error.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api  # type: ignore[import-untyped]
import urllib3
from kfp_server_api.exceptions import ApiException  # type: ignore[import-untyped]

from avrt_lib.cli.console import err
from avrt_lib.cluster.profile import Profile
from avrt_lib.errors import AvrtError, EnvironmentProblem, UsageError
from avrt_lib.keys import header_key

#: Seconds to connect and to wait for an answer.
TIMEOUT_S = (10, 60)
#: How long a command goes on asking a backend that does not answer.
PATIENCE_S = 30.0
LONGEST_WAIT_S = 30.0
#: What the backend's database keeps of a name.
LONGEST_NAME = 127
FINAL = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TOKEN_FILE = "/var/run/secrets/kubeflow/pipelines/token"
_PAGE = 100


@dataclass(frozen=True)
class Access:
    """How the command line says to reach the backend; None leaves it to the profile, the environment or the cluster.

    Attributes:
        host: ``http(s)://…``
        namespace: where the runs' pods are; the user's profile in multi-user mode.
        token_env: the environment variable that holds a bearer token.
        cookie_env: the one that holds a session cookie, as ``name=value``.
    """

    host: str | None = None
    namespace: str | None = None
    token_env: str | None = None
    cookie_env: str | None = None


def connect(access: Access, profile: Profile | None) -> Backend:
    """Reach the backend, and check that it is one.

    Args:
        access: the command line's part; it comes first.
        profile: the cluster's.

    Raises:
        UsageError: where no address is known, or a named variable is empty.
        EnvironmentProblem: where nothing answers, or it does not let us in.
    """
    backend = addressed(access, profile)
    backend.greet()
    return backend


def addressed(access: Access, profile: Profile | None) -> Backend:
    """The backend as ``connect`` would reach it, but nothing is sent yet: ``Backend.greet`` does that.

    Raises:
        UsageError: where no address is known, or a named variable is empty.
    """
    namespace = access.namespace or (profile.pipelines.namespace if profile else "kubeflow")
    host = access.host or (profile.pipelines.host if profile else None) or os.environ.get("KFP_ENDPOINT")
    if not host and _SERVICE_ACCOUNT.exists():
        host = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
    if not host:
        raise UsageError(
            "The Kubeflow Pipelines backend has no address: name it with --host, pipelines.host of the cluster "
            "profile, or KFP_ENDPOINT."
        )
    _check_address(host)
    token, cookie = _variable(access.token_env, "token"), _variable(access.cookie_env, "cookie")
    return Backend(host, namespace, token=token, cookie=cookie)


def _check_address(host: str) -> None:
    try:
        address = urllib3.util.parse_url(host)
    except urllib3.exceptions.LocationParseError as error:
        raise UsageError("The backend's address is none: it has the form https://HOST:PORT/PATH.") from error
    if address.auth:
        raise UsageError(
            "The backend's address must hold no password: name a variable with a bearer token or a session cookie "
            "(--token-env, --cookie-env)."
        )
    if address.scheme not in ("http", "https") or not address.host:
        raise UsageError(f"The backend's address must start with http:// or https:// and name a host, not {host!r}.")


def _variable(name: str | None, kind: str) -> str | None:
    if name is None:
        return None
    value = header_key(os.environ.get(name, ""), name)
    if not value:
        raise UsageError(f"--{kind}-env names the variable {name}, which is not set or empty.")
    return value


class Backend:
    """One Kubeflow Pipelines API. Every method raises an ``AvrtError`` of one line where the backend refuses.

    Without a token, the one that the kubelet projects into a pod for the audience ``pipelines.kubeflow.org`` is used
    where it is there.

    Args:
        host: the address.
        namespace: where the runs' pods are.
        token: a bearer token.
        cookie: a session cookie.
    """

    def __init__(self, host: str, namespace: str, *, token: str | None = None, cookie: str | None = None) -> None:
        self.host = host.rstrip("/")
        self.namespace = namespace
        self._multi_user = False
        configuration = kfp_server_api.Configuration(host=self.host)
        configuration.retries = False  # ours tell reads from writes
        configuration.ssl_ca_cert = os.environ.get("SSL_CERT_FILE")
        token_file = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") or _TOKEN_FILE)
        configuration.api_key_prefix["authorization"] = "Bearer"
        if token:
            configuration.api_key["authorization"] = token
        elif not cookie and token_file.exists():

            def renew(settings: Any) -> None:
                settings.api_key["authorization"] = token_file.read_text(encoding="utf-8").strip()

            configuration.refresh_api_key_hook = renew
            renew(configuration)
        self._client = kfp_server_api.ApiClient(configuration, cookie=cookie)
        self._runs = kfp_server_api.RunServiceApi(self._client)
        self._experiments = kfp_server_api.ExperimentServiceApi(self._client)
        self._pipelines = kfp_server_api.PipelineServiceApi(self._client)
        self._uploads = kfp_server_api.PipelineUploadServiceApi(self._client)
        self._schedules = kfp_server_api.RecurringRunServiceApi(self._client)

    def greet(self) -> None:
        """Check that this is a backend that lets us in, and learn whether its users have namespaces of their own."""
        health = kfp_server_api.HealthzServiceApi(self._client)
        answer = self._call("Reaching the backend", health.healthz_service_get_healthz, _preload_content=False)
        try:
            self._multi_user = bool(json.loads(answer.data).get("multi_user"))
        except (ValueError, AttributeError) as error:
            raise EnvironmentProblem(
                f"{self.host} answers, but not as the API of Kubeflow Pipelines: give --host the address of its "
                "ml-pipeline service or of the gateway's /pipeline."
            ) from error

    @property
    def user_namespace(self) -> str | None:
        """The namespace that requests must name; None in single-user mode, where they must not."""
        return self.namespace if self._multi_user else None

    def experiment(self, name: str) -> str:
        """The id of the experiment of this name, which is made where it is not there."""
        found = self.find_experiment(name)
        if found:
            return found
        body = kfp_server_api.V2beta1Experiment(display_name=checked_name("experiment", name))
        body.namespace = self.user_namespace
        create = self._experiments.experiment_service_create_experiment
        return str(self._call(f"Making the experiment {name!r}", create, body, kind="create").experiment_id)

    def find_experiment(self, name: str) -> str | None:
        """The id of the experiment of this name, or None."""
        listed = self._call(
            f"Looking for the experiment {name!r}",
            self._experiments.experiment_service_list_experiments,
            filter=_named(name),
            **self._in_namespace(),
        )
        return str(listed.experiments[0].experiment_id) if listed.experiments else None

    def create_run(self, body: Any) -> Any:
        """Start a run (``V2beta1Run``)."""
        return self._call("Starting the run", self._runs.run_service_create_run, body, kind="create")

    def run(self, run_id: str, *, patience_s: float | None = None) -> Any:
        """A run with its task details."""
        return self._call(
            f"Reading the run {run_id}",
            self._runs.run_service_get_run,
            run_id,
            patience_s=patience_s,
            missing=f"There is no run {run_id} at {self.host}: give the id that `avrt submit` printed.",
        )

    def runs(self, experiment_id: str | None = None) -> Iterator[Any]:
        """All runs that the backend knows, archived ones too; of one experiment, or of the namespace."""
        given = {"experiment_id": experiment_id} if experiment_id else self._in_namespace()
        yield from self._pages("Listing runs", self._runs.run_service_list_runs, "runs", **given)

    def terminate(self, run_id: str) -> None:
        """Ask the backend to end a run; its pods get SIGTERM, and its last step still runs."""
        self._call(f"Ending the run {run_id}", self._runs.run_service_terminate_run, run_id, kind="write")

    def retry(self, run_id: str) -> None:
        """Run what failed or was left out again."""
        self._call(f"Retrying the run {run_id}", self._runs.run_service_retry_run, run_id, kind="write")

    def delete_run(self, run_id: str) -> None:
        """Archive a run and delete its record."""
        self._call(f"Archiving the run {run_id}", self._runs.run_service_archive_run, run_id, kind="write")
        self._call(f"Deleting the run {run_id}", self._runs.run_service_delete_run, run_id, kind="write")

    def log(self, run_id: str, node: str) -> str | None:
        """What the main container of an Argo node wrote; None where there is no log of it. Only once its pod ended."""
        try:
            answer = self._call(
                f"Reading the log of {node}",
                self._client.call_api,
                "/apis/v2beta1/runs/{run}/nodes/{node}/artifacts/main-logs:read",
                "GET",
                {"run": run_id, "node": node},
                response_type="object",
                auth_settings=["Bearer"],
                _return_http_data_only=True,
                kind="write",  # an error 500 is how the backend says that there is none
            )
            return base64.b64decode(answer["data"]).decode("utf-8", errors="replace")
        except (AvrtError, KeyError, TypeError, ValueError):
            return None

    def upload_version(self, package: Path, pipeline: str, version: str) -> tuple[str, str]:
        """Upload a compiled pipeline as a version of a pipeline, which is made where it is not there.

        A version of this name that is there already is taken as it is.

        Returns:
            The ids of the pipeline and of the version.
        """
        pipeline_id = self._pipeline(pipeline)
        listing = self._pipelines.pipeline_service_list_pipeline_versions
        listed = self._call("Looking for the version", listing, pipeline_id, filter=_named(version))
        for found in listed.pipeline_versions or []:
            return pipeline_id, str(found.pipeline_version_id)
        made = self._call(
            f"Uploading the version {version}",
            self._uploads.upload_pipeline_version,
            str(package),
            name=checked_name("pipeline version", version),
            pipelineid=pipeline_id,
            kind="create",
        )
        return pipeline_id, str(made.pipeline_version_id)

    def version_spec(self, pipeline_id: str, version_id: str) -> Any:
        """The compiled pipeline of a version."""
        read = self._pipelines.pipeline_service_get_pipeline_version
        return self._call("Reading the pipeline", read, pipeline_id, version_id).pipeline_spec

    def _pipeline(self, name: str) -> str:
        listed = self._call(
            f"Looking for the pipeline {name!r}",
            self._pipelines.pipeline_service_list_pipelines,
            filter=_named(name),
            **self._in_namespace(),
        )
        if listed.pipelines:
            return str(listed.pipelines[0].pipeline_id)
        body = kfp_server_api.V2beta1Pipeline(name=checked_name("pipeline", name), display_name=name)
        body.namespace = self.user_namespace
        create = self._pipelines.pipeline_service_create_pipeline
        return str(self._call(f"Making the pipeline {name!r}", create, body, kind="create").pipeline_id)

    def create_schedule(self, body: Any) -> Any:
        """Make a recurring run (``V2beta1RecurringRun``)."""
        create = self._schedules.recurring_run_service_create_recurring_run
        return self._call("Making the schedule", create, body, kind="create")

    def schedules(self, experiment_id: str) -> Iterator[Any]:
        """The recurring runs of an experiment."""
        listing = self._schedules.recurring_run_service_list_recurring_runs
        yield from self._pages("Listing schedules", listing, "recurring_runs", experiment_id=experiment_id)

    def change_schedule(self, action: str, schedule_id: str) -> None:
        """``enable``, ``disable`` or ``delete`` a recurring run."""
        function = getattr(self._schedules, f"recurring_run_service_{action}_recurring_run")
        missing = f"There is no schedule {schedule_id}: `avrt schedule list` shows them."
        self._call(f"Changing the schedule {schedule_id}", function, schedule_id, kind="write", missing=missing)

    def _in_namespace(self) -> dict[str, Any]:
        return {"namespace": self.namespace} if self._multi_user else {}

    def _pages(self, doing: str, function: Callable[..., Any], field: str, **given: Any) -> Iterator[Any]:
        token = ""
        while True:
            page = self._call(doing, function, page_size=_PAGE, page_token=token, **given)
            yield from getattr(page, field) or []
            token = page.next_page_token or ""
            if not token:
                return

    def _call(
        self,
        doing: str,
        function: Callable[..., Any],
        *arguments: Any,
        kind: str = "read",
        patience_s: float | None = None,
        missing: str = "",
        **given: Any,
    ) -> Any:
        """One request, repeated while the backend is away.

        Args:
            doing: what is being done, for the error.
            function: of the generated client.
            kind: ``read``; ``write``, whose error 500 is final; or ``create``, which is repeated only where nothing was
                sent.
            patience_s: how long to go on; None: ``PATIENCE_S``.
            missing: the error for 404.
        """
        transient = {"read": (429, 500, 502, 503, 504), "write": (429, 502, 503, 504), "create": (429,)}[kind]
        deadline, wait = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s), 1.0
        while True:
            try:
                return function(*arguments, _request_timeout=TIMEOUT_S, **given)
            except ApiException as error:
                problem = _refusal(error, doing, self.host, missing)
                if error.status not in transient:
                    raise problem from error
            except urllib3.exceptions.HTTPError as error:
                problem = _unreachable(error, doing, self.host)
                unsent = isinstance(error, urllib3.exceptions.NewConnectionError)
                if kind == "create" and not unsent:
                    raise problem from error
            if time.monotonic() + wait > deadline:
                raise problem
            if wait == 1.0:
                err.print(f"{problem} Trying again.", markup=False, soft_wrap=True)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)


def checked_name(kind: str, name: str) -> str:
    """A name that the backend's database can keep.

    Raises:
        UsageError: where it is empty or too long.
    """
    if not name.strip() or len(name) > LONGEST_NAME:
        raise UsageError(
            f"The name of the {kind} must have 1 to {LONGEST_NAME} characters, not {len(name)}: {name[:40]!r}…"
        )
    return name


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _unreachable(error: Exception, doing: str, host: str) -> EnvironmentProblem:
    reason = str(error).rpartition(": ")[2] or type(error).__name__
    return EnvironmentProblem(
        f"{doing} failed: {host} does not answer ({reason}). For a backend without an ingress: kubectl -n kubeflow "
        "port-forward svc/ml-pipeline 8888:8888."
    )


def _refusal(error: Any, doing: str, host: str, missing: str) -> AvrtError:
    """One line, with the mend, for an answer that is an error."""
    said = _said(error)
    match int(error.status or 0):
        case 401 | 301 | 302 | 303 | 307 | 308:
            return EnvironmentProblem(
                f"{doing} failed: {host} does not know who asks ({error.status}): name a bearer token with --token-env "
                "or the session cookie of its login page with --cookie-env, and renew one that has expired."
            )
        case 403:
            return EnvironmentProblem(
                f"{doing} failed: not allowed (403{said}). Ask for the role kubeflow-pipelines-edit, or name a "
                "namespace of yours with --namespace."
            )
        case 404:
            return UsageError(missing or f"{doing} failed: {host} does not have it (404{said}); check --host.")
        case 409:
            return UsageError(f"{doing} failed: it exists already (409{said}). Give it another name.")
        case 400:
            return UsageError(f"{doing} failed: the backend refuses the request (400{said}).")
        case 0:
            return EnvironmentProblem(f"{doing} failed: {error.reason}. SSL_CERT_FILE names a CA of your own.")
        case _:
            return EnvironmentProblem(f"{doing} failed in the backend ({error.status}{said}).")


def _said(error: Any) -> str:
    """What the backend says, as ``: text``."""
    body = error.body or ""
    try:
        document = json.loads(body)
        text = str(document.get("message") or document.get("error") or "")
    except (ValueError, AttributeError):
        text = "" if "<" in body else body
    line = " ".join(text.split())
    return f": {line[:400]}" if line else ""
