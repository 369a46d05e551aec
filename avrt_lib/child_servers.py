"""Servers that run as child processes: free ports, a log file, and a stop that leaves no process behind."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from avrt_lib.errors import EnvironmentProblem, PortInUseError

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def free_ports(count: int) -> list[int]:
    """Different loopback ports that nobody listens on at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


def require_free(port: int, host: str = LOOPBACK) -> None:
    """Check that a port can be listened on.

    Raises:
        PortInUseError: where somebody else listens on it.
        EnvironmentProblem: where it cannot be listened on for another reason, such as an address of another machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Servers set this too: a port in TIME_WAIT is free, one that is listened on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(
                    f"Port {port} on {host} is taken: stop what listens there or choose another."
                ) from error
            raise EnvironmentProblem(
                f"Port {port} on {host} cannot be listened on ({error.strerror}): name an address of this machine, and "
                "a port that you may use."
            ) from error


class ChildServer:
    """A server process in a process group of its own.

    The group, and not only its leader, is ended by ``stop``. On Linux the leader also ends when this process is killed,
    provided that it was started from the main thread (the kernel watches the thread, not the process).

    Args:
        command: program and arguments.
        environment: its whole environment.
        log: where its output goes; replaced.

    Raises:
        EnvironmentProblem: where the program cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            try:
                self._process = subprocess.Popen(
                    list(command),
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_end_with_parent(),
                )
            except OSError as error:
                raise EnvironmentProblem(f"{command[0]} cannot be started: {error.strerror}.") from error

    @property
    def pid(self) -> int:
        """Process id of the leader, which is the id of the group too."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status of the leader, or None while it runs."""
        return self._process.poll()

    def tail(self, lines: int = 5) -> str:
        """The last lines of its log, as one line."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip())

    def stop(self, grace_s: float) -> None:
        """Ask the leader to end, wait, and end what is left of its group."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                self._process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        finally:
            end_group(self.pid)
            self._process.wait()


def end_group(pid: int) -> None:
    """Kill whatever still runs in a process group; a group that is gone is fine."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _end_with_parent() -> Callable[[], None] | None:
    libc = _LIBC
    if libc is None or threading.current_thread() is not threading.main_thread():
        return None
    parent = os.getpid()

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)

    return ask_kernel
