"""A server that answers as the v2beta1 API of Kubeflow Pipelines 2.17 does, and one with the few Kubernetes answers
that a watched run needs.

Nothing runs behind them: a test says which states the steps of a run go through. The shapes are those of the models of
``kfp_server_api`` and of what a real 2.17 backend was seen to answer: task details are Argo's nodes in no order, each
twice where a retry strategy is in force, without pod names or errors; a node is known by an id that only its parent
tells; what is left out has no state; logs are the one place with the text of an error; a terminated run ends FAILED.
"""

from __future__ import annotations

import base64
import json
import random
import re
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote, urlparse

import yaml

WORKFLOW = "avrt-x7k2p"
START = datetime.now(UTC) - timedelta(minutes=30)
#: A run's states: the run's own, and those of its steps by task.
Frame = tuple[str, dict[str, str]]


def node_id(path: str) -> str:
    """Argo's id of a node, which is a hash of its full name."""
    return f"{WORKFLOW}-{zlib.crc32(path.encode())}"


@dataclass
class Nodes:
    """The nodes of a workflow in one moment.

    Attributes:
        spec: the compiled pipeline.
        states: by task: waiting, starting, pending, running, succeeded, cached, failed, driver-failed, omitted. Those
            of a shard may stand as ``task#1``.
        twins: a retry strategy is in force, as in the stock installation.
    """

    spec: dict[str, Any]
    states: dict[str, str]
    twins: bool = True
    found: list[dict[str, Any]] = field(default_factory=list)

    def details(self) -> list[dict[str, Any]]:
        """The task details."""
        self.found = []
        self._add(WORKFLOW, WORKFLOW, "RUNNING", [f"{WORKFLOW}.root"])
        self._add("root-driver", f"{WORKFLOW}.root-driver", "SUCCEEDED", [])
        self._component(self.spec["root"], self._nested("root", WORKFLOW), "")
        random.Random(7).shuffle(self.found)
        return self.found

    def _nested(self, name: str, above: str) -> str:
        path = f"{above}.{name}"
        if self.twins:
            self._add(name, path, "RUNNING", [f"{path}(0)"])
            path = f"{path}(0)"
            name = f"{name}(0)"
        self._add(name, path, "RUNNING", [])
        return path

    def _component(self, component: dict[str, Any], above: str, shard: str) -> None:
        for name, task in component["dag"]["tasks"].items():
            inner = self.spec["components"][task["componentRef"]["name"]]
            if "dag" not in inner:
                self._leaf(name, above, shard)
                continue
            loop = task.get("parameterIterator")
            for number in range(len(json.loads(loop["items"]["raw"]))) if loop else [None]:
                path = self._nested(name, above) if number is None else f"{above}.{name}.({number})"
                if number is not None:
                    self._add("", path, "RUNNING", [])
                self._component(inner, path, shard if number is None else f"#{number}")

    def _leaf(self, name: str, above: str, shard: str) -> None:
        state = self.states.get(f"{name}{shard}", self.states.get(name, "waiting"))
        if state == "waiting":
            return
        if state == "omitted":
            self._add(name, f"{above}.{name}", None, [])
            return
        driver = {"starting": "RUNNING", "driver-failed": "FAILED"}.get(state, "SUCCEEDED")
        self._pod(f"{name}-driver", above, driver, driver)
        if driver != "SUCCEEDED":
            return
        ended = {"succeeded": "SUCCEEDED", "cached": "SUCCEEDED", "failed": "FAILED"}.get(state, "RUNNING")
        pod = {"pending": "PENDING", "cached": "SKIPPED"}.get(state, ended)
        path = f"{above}.{name}"
        if self.twins:
            self._add(name, path, ended, [f"{path}(0)"])
            path = f"{path}(0)"
            self._add(f"{name}(0)", path, ended, [f"{path}.executor"])
        else:
            self._add(name, path, ended, [f"{path}.executor"])
        self._pod("executor", path, ended if state != "cached" else "SKIPPED", pod)

    def _pod(self, name: str, above: str, retry: str, pod: str) -> None:
        path = f"{above}.{name}"
        if self.twins:
            self._add(name, path, retry, [f"{path}(0)"])
            self._add(f"{name}(0)", f"{path}(0)", pod, [])
        else:
            self._add(name, path, pod, [])

    def _add(self, name: str, path: str, state: str | None, children: list[str]) -> None:
        # Steps end in the order in which the test names them.
        order = next((n for n, task in enumerate(self.states) if f".{task.split('#')[0]}" in path), 0)
        began = START + timedelta(seconds=60 * order)
        detail: dict[str, Any] = {
            "run_id": "",
            "task_id": str(uuid.uuid5(uuid.NAMESPACE_OID, path)),
            "display_name": name,
            "create_time": began.isoformat(),
            "start_time": began.isoformat(),
            "child_tasks": [{"pod_name": node_id(child)} for child in children],
        }
        if state in ("SUCCEEDED", "FAILED", "SKIPPED"):
            detail["end_time"] = (began + timedelta(seconds=30)).isoformat()
        if state is not None:
            detail["state"] = state
        self.found.append(detail)

    def pods_of(self, task: str) -> list[str]:
        """The ids of a task's pods: ``sft``, ``sft-driver`` or ``vision-teacher``, that of the first shard first."""
        suffix = "(0)" if self.twins else ""
        wanted = task if task.endswith("-driver") else f"{task}{suffix}.executor"
        return [
            node_id(path)
            for path in self._paths(self.spec["root"], f"{WORKFLOW}.root{suffix}")
            if path.endswith(f".{wanted}{suffix}")
        ]

    def _paths(self, component: dict[str, Any], above: str) -> Iterator[str]:
        suffix = "(0)" if self.twins else ""
        for name, task in component["dag"]["tasks"].items():
            inner = self.spec["components"][task["componentRef"]["name"]]
            if "dag" not in inner:
                yield f"{above}.{name}-driver{suffix}"
                yield f"{above}.{name}{suffix}.executor{suffix}"
                continue
            loop = task.get("parameterIterator")
            for number in range(len(json.loads(loop["items"]["raw"]))) if loop else [None]:
                inside = f"{above}.{name}{suffix}" if number is None else f"{above}.{name}.({number})"
                yield from self._paths(inner, inside)


class _Server:
    """An HTTP server on the loopback interface; ``answer`` is called under a lock."""

    def __init__(self) -> None:
        outer = self
        self.requests: list[tuple[str, str, Any]] = []
        self.lock = threading.RLock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with outer.lock:
                    status, answer, headers = outer.handle(self.command, self.path, self.headers, body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = do_PUT = _any

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def handle(self, method: str, path: str, headers: Message, body: bytes) -> tuple[int, Any, dict[str, str]]:
        raise NotImplementedError


def error(status: int, message: str) -> tuple[int, Any, dict[str, str]]:
    """An error as the API's gateway words it."""
    return status, {"error": message, "code": 2, "message": message, "details": []}, {}


class KfpApi(_Server):
    """The pipelines API.

    Attributes:
        frames: what the next run goes through, a frame each time that it is read; the last one stays.
        after_end: the frames that follow ``:terminate``.
        after_retry: those that follow ``:retry``.
        logs: by task (``sft``, ``sft-driver``): what its pods wrote; a list gives each shard its own.
        token: where set, requests must bear it.
        login: requests without the cookie are sent to a login page, as a gateway does.
        refuse: answers that come first, each once: (method, path pattern, status, message).
        twins: see ``Nodes``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = [("SUCCEEDED", {})]
        self.after_end: list[Frame] = [("CANCELING", {}), ("FAILED", {})]
        self.after_retry: list[Frame] = []
        self.logs: dict[str, str | list[str]] = {}
        self.token = ""
        self.login = ""
        self.multi_user = False
        self.refuse: list[tuple[str, str, int, str]] = []
        self.twins = True
        self.runs: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.schedules: dict[str, dict[str, Any]] = {}

    ROUTES: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", r"/healthz", "_healthz"),
        ("GET", r"/experiments", "_list_experiments"),
        ("POST", r"/experiments", "_create_experiment"),
        ("POST", r"/runs", "_create_run"),
        ("GET", r"/runs", "_list_runs"),
        ("GET", r"/runs/([^/:]+)", "_get_run"),
        ("DELETE", r"/runs/([^/:]+)", "_delete_run"),
        ("POST", r"/runs/([^/:]+):terminate", "_terminate"),
        ("POST", r"/runs/([^/:]+):retry", "_retry"),
        ("POST", r"/runs/([^/:]+):archive", "_archive"),
        ("GET", r"/runs/([^/:]+)/nodes/([^/]+)/artifacts/main-logs:read", "_log"),
        ("GET", r"/pipelines", "_list_pipelines"),
        ("POST", r"/pipelines", "_create_pipeline"),
        ("POST", r"/pipelines/upload_version", "_upload"),
        ("GET", r"/pipelines/([^/]+)/versions", "_list_versions"),
        ("GET", r"/pipelines/([^/]+)/versions/([^/]+)", "_get_version"),
        ("POST", r"/recurringruns", "_create_schedule"),
        ("GET", r"/recurringruns", "_list_schedules"),
        ("DELETE", r"/recurringruns/([^/:]+)", "_delete_schedule"),
        ("POST", r"/recurringruns/([^/:]+):(enable|disable)", "_switch_schedule"),
    ]

    def handle(self, method: str, path: str, headers: Message, body: bytes) -> tuple[int, Any, dict[str, str]]:
        address = urlparse(path)
        place = unquote(address.path).removeprefix("/apis/v2beta1")
        self.query = {name: values[0] for name, values in parse_qs(address.query).items()}
        document = json.loads(body) if body and "json" in headers.get("Content-Type", "") else body
        self.requests.append((method, place, document))
        for number, (verb, pattern, status, message) in enumerate(self.refuse):
            if verb == method and re.fullmatch(pattern, place):
                del self.refuse[number]
                return error(status, message)
        if self.login and headers.get("Cookie") != self.login:
            return 302, b"", {"Location": "/dex/auth", "Content-Type": "text/html"}
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return error(401, "Request header error: there is no user identity header.")
        for verb, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, place)
            if verb == method and found:
                answer: Callable[..., Any] = getattr(self, name)
                result = answer(document, *found.groups())
                return result if isinstance(result, tuple) else (200, result, {})
        return error(404, "Not Found")

    def add_run(self, spec: dict[str, Any], name: str = "a run", **given: Any) -> str:
        """A run that is there already."""
        run_id = str(uuid.uuid4())
        self.runs[run_id] = {
            "run_id": run_id,
            "display_name": name,
            "created_at": datetime.now(UTC).isoformat(),
            "pipeline_spec": spec,
            "frames": list(self.frames),
            **given,
        }
        return run_id

    def asked(self, method: str, pattern: str) -> list[Any]:
        """The bodies of the requests of this kind."""
        return [body for verb, place, body in self.requests if verb == method and re.fullmatch(pattern, place)]

    def _healthz(self, _: Any) -> Any:
        return {"multi_user": self.multi_user, "pipeline_store": "database"}

    def _named(self, objects: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        wanted = json.loads(self.query["filter"])["predicates"][0] if "filter" in self.query else None
        return [each for each in objects.values() if wanted is None or each["display_name"] == wanted["stringValue"]]

    def _list_experiments(self, _: Any) -> Any:
        return {"experiments": self._named(self.experiments)}

    def _create_experiment(self, body: Any) -> Any:
        if ("namespace" in body) != self.multi_user:
            return error(400, "Invalid input error: the experiment's namespace does not fit the mode")
        made = {"experiment_id": str(uuid.uuid4()), **body}
        self.experiments[made["experiment_id"]] = made
        return made

    def _create_run(self, body: Any) -> Any:
        return self._view(
            self.add_run(
                body["pipeline_spec"],
                body["display_name"],
                **{key: value for key, value in body.items() if key not in ("pipeline_spec", "display_name")},
            )
        )

    def _list_runs(self, _: Any) -> Any:
        # Two to a page, so that pages count.
        wanted = self.query.get("experiment_id")
        found = [run for run in self.runs if wanted is None or self.runs[run].get("experiment_id") == wanted]
        first = int(self.query.get("page_token") or 0)
        page: dict[str, Any] = {"runs": [self._view(run) for run in found[first : first + 2]], "total_size": len(found)}
        if first + 2 < len(found):
            page["next_page_token"] = str(first + 2)
        return page

    def _get_run(self, _: Any, run_id: str) -> Any:
        if run_id not in self.runs:
            return error(404, f"Failed to get a run: Run {run_id} not found")
        answer = self._view(run_id)
        frames = self.runs[run_id]["frames"]
        if len(frames) > 1:
            del frames[0]
        return answer

    def _view(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        state, states = run["frames"][0]
        shown = {key: value for key, value in run.items() if key != "frames"}
        spec = (run["pipeline_spec"] or {}).get("pipeline_spec", run["pipeline_spec"])
        details = Nodes(spec, states, self.twins).details() if spec and states else []
        return {**shown, "state": state, "run_details": {"task_details": details}}

    def _delete_run(self, _: Any, run_id: str) -> Any:
        del self.runs[run_id]
        return {}

    def _terminate(self, _: Any, run_id: str) -> Any:
        _, states = self.runs[run_id]["frames"][0]
        self.runs[run_id]["frames"] = [(state, {**states, **more}) for state, more in self.after_end]
        return {}

    def _retry(self, _: Any, run_id: str) -> Any:
        self.runs[run_id]["frames"] = list(self.after_retry)
        return {}

    def _archive(self, _: Any, run_id: str) -> Any:
        self.runs[run_id]["storage_state"] = "ARCHIVED"
        return {}

    def _log(self, _: Any, run_id: str, node: str) -> Any:
        spec = self.runs[run_id]["pipeline_spec"]
        nodes = Nodes(spec.get("pipeline_spec", spec), {}, self.twins)
        for task, texts in self.logs.items():
            for number, pod in enumerate(nodes.pods_of(task)):
                if pod == node:
                    text = texts if isinstance(texts, str) else texts[number]
                    return {"data": base64.b64encode(text.encode()).decode()}
        return error(500, f"failed to read artifact of {node}: artifact not found")

    def _list_pipelines(self, _: Any) -> Any:
        return {"pipelines": self._named(self.pipelines)}

    def _create_pipeline(self, body: Any) -> Any:
        made = {"pipeline_id": str(uuid.uuid4()), **body}
        self.pipelines[made["pipeline_id"]] = made
        return made

    def _upload(self, body: bytes) -> Any:
        # The package is one part of the form, between its own header's end and the next boundary.
        text = body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0].decode()
        if any(each["display_name"] == self.query["name"] for each in self.versions.values()):
            return error(409, "Failed to create a pipeline version")
        version = {
            "pipeline_id": self.query["pipelineid"],
            "pipeline_version_id": str(uuid.uuid4()),
            "display_name": self.query["name"],
            "pipeline_spec": dict(zip(("pipeline_spec", "platform_spec"), yaml.safe_load_all(text), strict=False)),
        }
        self.versions[version["pipeline_version_id"]] = version
        return version

    def _list_versions(self, _: Any, pipeline_id: str) -> Any:
        return {"pipeline_versions": [v for v in self._named(self.versions) if v["pipeline_id"] == pipeline_id]}

    def _get_version(self, _: Any, pipeline_id: str, version_id: str) -> Any:
        return self.versions[version_id]

    def _create_schedule(self, body: Any) -> Any:
        made = {"recurring_run_id": str(uuid.uuid4()), "status": "ENABLED", **body}
        self.schedules[made["recurring_run_id"]] = made
        return made

    def _list_schedules(self, _: Any) -> Any:
        wanted = self.query.get("experiment_id")
        return {"recurringRuns": [each for each in self.schedules.values() if each["experiment_id"] == wanted]}

    def _delete_schedule(self, _: Any, schedule_id: str) -> Any:
        if schedule_id not in self.schedules:
            return error(404, f"Recurring run {schedule_id} not found")
        del self.schedules[schedule_id]
        return {}

    def _switch_schedule(self, _: Any, schedule_id: str, action: str) -> Any:
        self.schedules[schedule_id]["status"] = f"{action}d".upper()
        return {}


class KubernetesApi(_Server):
    """The pods, Workflow and InferenceServices of a cluster.

    Attributes:
        pods: as the API shows them.
        nodes: of the run's Workflow; None: there is no Workflow.
        services: InferenceServices.
        forbidden: everything is refused, as for a user without a role.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pods: list[dict[str, Any]] = []
        self.nodes: dict[str, Any] | None = {}
        self.services: list[dict[str, Any]] = []
        self.forbidden = False

    def handle(self, method: str, path: str, headers: Message, body: bytes) -> tuple[int, Any, dict[str, str]]:
        place = urlparse(path).path
        self.requests.append((method, path, None))
        if self.forbidden:
            message = 'pods is forbidden: User "someone" cannot list resource "pods" in the namespace "kubeflow"'
            return 403, {"kind": "Status", "status": "Failure", "code": 403, "message": message}, {}
        if place.endswith("/pods"):
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.pods}, {}
        if place.endswith("/log"):
            return 200, b"step 11 of 40\nstep 12 of 40\n", {"Content-Type": "text/plain"}
        if place.endswith("/events"):
            return 200, {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": []}, {}
        if place.endswith("/workflows"):
            items = [] if self.nodes is None else [{"status": {"nodes": self.nodes}}]
            return 200, {"kind": "WorkflowList", "items": items}, {}
        if place.endswith("/inferenceservices"):
            return 200, {"kind": "InferenceServiceList", "items": self.services}, {}
        return 404, {"kind": "Status", "status": "Failure", "code": 404, "message": "not found"}, {}

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig that names this server."""
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return path


def pod(task: str, *, phase: str = "Pending", gates: tuple[str, ...] = (), **status: Any) -> dict[str, Any]:
    """A pod of a run, as Argo labels it."""
    path = f"{WORKFLOW}.root(0).run(0).{task}(0).executor(0)"
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "name": f"{WORKFLOW}-system-container-impl-{zlib.crc32(path.encode())}",
            "namespace": "kubeflow",
            "uid": str(uuid.uuid5(uuid.NAMESPACE_OID, path)),
            "annotations": {
                "workflows.argoproj.io/node-name": path,
                "workflows.argoproj.io/node-id": node_id(path),
            },
        },
        "spec": {
            "containers": [{"name": "main", "image": "avrt/train:0.1.0"}],
            "schedulingGates": [{"name": gate} for gate in gates],
        },
        "status": {"phase": phase, **status},
    }
