"""Reaching a Service of the cluster: by its name from inside, through kubectl's port-forward from outside."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from avrt_lib.child_servers import LOOPBACK, ChildServer
from avrt_lib.errors import EnvironmentProblem, ServingError
from avrt_lib.serving.inference_service import Status

#: The name of a predictor's port, as KServe's Services call it too.
_PORT = "http1"
_START_S = 20.0
_POLL_S = 0.1


@contextmanager
def reached(found: Status) -> Iterator[str]:
    """An address at which the served model can be asked from here, ending in ``/v1``.

    From outside it leads to one of the model's own pods: of a Service kubectl takes the pod that has been ready for
    longest, which after a rollout is one of the old model that is about to end.

    Raises:
        EnvironmentProblem: outside the cluster without kubectl.
        ServingError: where no pod is ready with the model, or kubectl cannot forward to it.
    """
    if _resolves(urlsplit(found.address).hostname or ""):
        yield found.address
        return
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise EnvironmentProblem(f"{found.address} is inside the cluster: install kubectl to reach it from here.")
    if found.pod is None:
        raise ServingError(
            f"No pod of {found.namespace}/{found.name} is ready with {found.uri} any more: look at its pods' events."
        )
    place = (f"--namespace={found.namespace}", f"--address={LOOPBACK}", f"pod/{found.pod}")
    command = [kubectl, "port-forward", *place, f":{_PORT}"]
    with tempfile.TemporaryDirectory(prefix="avrt-forward-") as folder:
        child = ChildServer(command, os.environ, Path(folder) / "kubectl.log")
        try:
            yield f"http://{LOOPBACK}:{_port(child)}/v1"
        finally:
            child.stop(5.0)


def _resolves(host: str) -> bool:
    for wait_s in (1.0, 2.0, 4.0, 0.0):
        try:
            return bool(socket.getaddrinfo(host, None))
        except socket.gaierror as error:
            # Inside a cluster its name server may be away for a moment; elsewhere nobody knows the name.
            if error.errno != socket.EAI_AGAIN or "KUBERNETES_SERVICE_HOST" not in os.environ:
                return False
            time.sleep(wait_s)
        except OSError:
            return False
    return False


def _port(child: ChildServer) -> int:
    deadline = time.monotonic() + _START_S
    while child.returncode is None and time.monotonic() < deadline:
        if heard := re.search(rf"Forwarding from {re.escape(LOOPBACK)}:(\d+)", child.tail()):
            return int(heard[1])
        time.sleep(_POLL_S)
    raise ServingError(f"kubectl cannot forward to the model: {child.tail()}")
