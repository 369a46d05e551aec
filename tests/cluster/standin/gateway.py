"""A stand-in for an implementation of the Gateway API, to see weights at work. It is none: of a route it takes the
first rule's backends, of a Gateway nothing.

It sends each request to one of the backends by weight, and says in the route's status what it has taken up.

python gateway.py ROUTE [--namespace NAMESPACE] [--api URL] [--token FILE] [--ca FILE] [--host HOST] [--port PORT]
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")
parser = argparse.ArgumentParser()
parser.add_argument("route")
parser.add_argument("--namespace")
parser.add_argument("--api", default=f"https://{os.environ.get('KUBERNETES_SERVICE_HOST', 'kubernetes')}")
parser.add_argument("--token", type=Path, default=POD / "token")
parser.add_argument("--ca", type=Path, default=POD / "ca.crt")
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=8080)
options = parser.parse_args()
namespace = options.namespace or (POD / "namespace").read_text()
trusted = ssl.create_default_context(cafile=str(options.ca))
route_path = f"/apis/gateway.networking.k8s.io/v1/namespaces/{namespace}/httproutes/{options.route}"
backends: list[tuple[str, int]] = []  # address, weight; replaced as a whole


def api(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {
        "authorization": f"Bearer {options.token.read_text()}",
        "content-type": "application/merge-patch+json",
    }
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(options.api + path, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=5, context=trusted) as response:
        return json.load(response)


def exists(service: str) -> bool:
    try:
        api("GET", f"/api/v1/namespaces/{namespace}/services/{service}")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return False
    return True


def take_up(route: dict[str, Any]) -> None:
    """Send requests by the route's weights from now on, and say so."""
    global backends
    references = route["spec"]["rules"][0]["backendRefs"]
    missing = [ref["name"] for ref in references if not exists(ref["name"])]
    backends = [
        (
            "" if ref["name"] in missing else f"http://{ref['name']}.{namespace}.svc.cluster.local:{ref['port']}",
            ref.get("weight", 1),
        )
        for ref in references
    ]
    now, generation = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), route["metadata"]["generation"]
    resolved = (
        ("False", "BackendNotFound", f"no Service {', '.join(missing)}") if missing else ("True", "ResolvedRefs", "")
    )
    conditions = [
        {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message,
            "lastTransitionTime": now,
            "observedGeneration": generation,
        }
        for kind, status, reason, message in (("Accepted", "True", "Accepted", ""), ("ResolvedRefs", *resolved))
    ]
    parent = {
        "parentRef": route["spec"]["parentRefs"][0],
        "controllerName": "avrt.example/standin",
        "conditions": conditions,
    }
    api("PATCH", f"{route_path}/status", {"status": {"parents": [parent]}})


def follow() -> None:
    taken: list[Any] = []
    while True:
        try:
            route = api("GET", route_path)
            names = [ref["name"] for ref in route["spec"]["rules"][0]["backendRefs"]]
            metadata = route["metadata"]
            state = [metadata["uid"], metadata["generation"], *(name for name in names if exists(name))]
            if state != taken:
                take_up(route)
                taken = state
        except (OSError, KeyError, IndexError) as error:
            print(repr(error), flush=True)
        time.sleep(0.2)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.pass_on(None)

    def do_POST(self) -> None:
        self.pass_on(self.rfile.read(int(self.headers["content-length"])))

    def pass_on(self, body: bytes | None) -> None:
        """Send it to one of the backends; one that is not there is an error of its share of the requests."""
        addresses, weights = zip(*backends, strict=True) if backends else ((), ())
        if not sum(weights) or not (address := random.choices(addresses, weights)[0]):
            self.answer(500, b"no backend")
            return
        headers = {
            name: value for name, value in self.headers.items() if name.lower() in ("authorization", "content-type")
        }
        try:
            request = urllib.request.Request(address + self.path, body, headers, method=self.command)
            with urllib.request.urlopen(request, timeout=30) as response:
                self.answer(response.status, response.read())
        except urllib.error.HTTPError as error:
            self.answer(error.code, error.read())
        except OSError as error:
            self.answer(502, repr(error).encode())

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


threading.Thread(target=follow, daemon=True).start()
http.server.ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
