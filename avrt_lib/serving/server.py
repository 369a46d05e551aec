"""A model served by vLLM on this machine, as long as a block runs."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import avrt_lib
from avrt_lib.child_servers import LOOPBACK, ChildServer, free_ports, require_free
from avrt_lib.config import StudentConfig
from avrt_lib.errors import ServingError
from avrt_lib.serving.gate import HEALTH

log = logging.getLogger("avrt.serving")

_POLL_S = 0.5
_STOP_GRACE_S = 45.0


class ServedModel:
    """Starts the launcher as a child, waits until it answers, and stops it with everything it started.

    ``with ServedModel(folder, "avrt-student", student=config.student, frames=8, log=log) as served: …``

    Args:
        model: the model folder.
        name: what requests call it.
        student: precision, context length and video size, as in training.
        frames: frames of one video.
        log: where the server's output goes.
        host: where it listens.
        port: None takes a free one.
        api_key: None makes one.
        start_timeout_s: how long it may take to answer.
        waiting: called now and then with the seconds waited so far.

    Raises:
        PortInUseError: on entry, where ``port`` is taken.
        ServingError: on entry, where the server ends or does not answer in time; the message holds its last lines.
    """

    def __init__(
        self,
        model: Path,
        name: str,
        *,
        student: StudentConfig,
        frames: int,
        log: Path,
        host: str = LOOPBACK,
        port: int | None = None,
        api_key: str | None = None,
        start_timeout_s: float = 600.0,
        waiting: Callable[[float], None] | None = None,
    ) -> None:
        self.name = name
        self.host = host
        self.port = port or 0
        self.api_key = api_key or secrets.token_urlsafe(24)
        self.log = log
        self._model = model
        self._student = student
        self._frames = frames
        self._start_timeout_s = start_timeout_s
        self._waiting = waiting
        self._child: ChildServer | None = None

    @property
    def base_url(self) -> str:
        """Address of the OpenAI interface, ending in ``/v1``."""
        return f"http://{self._address}/v1"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._child is None:
            raise RuntimeError("the server has not been started")
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether the server is there and has not ended by itself."""
        return self._child is not None and self._child.returncode is None

    def __enter__(self) -> Self:
        if self.port:
            require_free(self.port, self.host)
        else:
            (self.port,) = free_ports(1)
        root = str(Path(avrt_lib.__file__).parent.parent)
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
        environment["AVRT_API_KEY"] = self.api_key
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        started = time.monotonic()
        self._child = ChildServer(
            [sys.executable, "-m", "avrt_lib.serving.launcher", *self._options()], environment, self.log
        )
        try:
            self._wait(started)
        except BaseException:
            self.close()
            raise
        log.info("%s is served at %s after %.0f s", self.name, self.base_url, time.monotonic() - started)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let requests in flight finish, then end the server; a second call does nothing."""
        child, self._child = self._child, None
        if child is not None:
            child.stop(_STOP_GRACE_S)

    @property
    def _address(self) -> str:
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def _options(self) -> list[str]:
        values = {
            "--model": self._model,
            "--served-model-name": self.name,
            "--host": self.host,
            "--port": self.port,
            "--dtype": self._student.dtype,
            "--max-model-len": self._student.max_model_len,
            "--kv-cache-gib": self._student.kv_cache_gib,
            "--frames": self._frames,
            "--video-longest-side-px": self._student.video_longest_side_px,
        }
        options = [f"{name}={value}" for name, value in values.items()]
        return [*options, "--trust-remote-code"] if self._student.trust_remote_code else options

    def _wait(self, started: float) -> None:
        assert self._child is not None
        while not self._healthy():
            waited = time.monotonic() - started
            if (code := self._child.returncode) is not None:
                raise ServingError(f"vLLM ended while starting (exit {code}): {self._child.tail()} (see {self.log}).")
            if waited > self._start_timeout_s:
                raise ServingError(
                    f"vLLM did not answer within {self._start_timeout_s:g} s (deployment.start_timeout_s): "
                    f"{self._child.tail(2)} (see {self.log})."
                )
            if self._waiting is not None:
                self._waiting(waited)
            time.sleep(_POLL_S)

    def _healthy(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{self._address}{HEALTH}", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False
