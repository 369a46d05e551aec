"""A Docker engine for a while: the one that runs here, or a private one that is started, and stopped again.

The private one needs root and Debian's docker.io. It keeps its images below AVRT_DOCKER_ROOT (default
/var/tmp/avrt-docker), changes no network settings, and gives containers no network but the host's own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 60.0


class EngineMissing(Exception):
    """There is no Docker engine and none can be started; the message says how to get one."""


def client() -> str:
    """The first docker command on PATH that has BuildKit.

    Raises:
        EngineMissing: where there is none.
    """
    for folder in os.get_exec_path():
        program = shutil.which("docker", path=folder)
        if program and _has_buildkit(program):
            return program
    raise EngineMissing(
        "Missing: a docker command with BuildKit (Debian: apt-get install docker.io; Docker's own packages: "
        "docker-ce docker-buildx-plugin)."
    )


def _has_buildkit(program: str) -> bool:
    """Clients before 23 bring BuildKit along; later ones need the plugin buildx."""
    found = re.search(r"version (\d+)\.", _output([program, "--version"]))
    return found is not None and (int(found[1]) < 23 or "buildx" in _output([program, "buildx", "version"]))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def environment(host: str | None = None) -> dict[str, str]:
    """The environment for docker commands."""
    chosen = {**os.environ, "DOCKER_BUILDKIT": "1", "BUILDX_BUILDER": "default"}
    return chosen | ({"DOCKER_HOST": host} if host else {})


def answers(program: str, env: dict[str, str]) -> bool:
    """Whether an engine answers."""
    command = [program, "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(command, env=env, capture_output=True, check=False, timeout=60).returncode == 0


def root() -> Path:
    """Where the private engine keeps its images."""
    return Path(os.environ.get("AVRT_DOCKER_ROOT", "/var/tmp/avrt-docker"))


@contextlib.contextmanager
def engine() -> Iterator[tuple[str, dict[str, str]]]:
    """A docker command, and the environment in which it finds its engine.

    Raises:
        EngineMissing: the message names what to install or to start.
    """
    program = client()
    if answers(program, environment()):
        yield program, environment()
        return
    folder = root()
    env = environment(f"unix://{folder}/docker.sock")
    if answers(program, env):  # another command has started it and will stop it
        yield program, env
        return
    daemon = shutil.which("dockerd")
    if daemon is None or os.geteuid() != 0:
        raise EngineMissing(
            "No Docker engine answers. Start one (systemctl start docker), or set DOCKER_HOST; root with dockerd "
            "installed (Debian: apt-get install docker.io) gets a private one."
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o711)
    command = [daemon, "--data-root", f"{folder}/data", "--exec-root", "/run/avrt-docker"]
    command += ["--host", f"unix://{folder}/docker.sock", "--pidfile", f"{folder}/docker.pid", "--bridge=none"]
    command += ["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--group", "root"]
    with open(folder / "dockerd.log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not answers(program, env):
            if process.poll() is not None or time.monotonic() > deadline:
                last = (folder / "dockerd.log").read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
                raise EngineMissing(f"dockerd did not start: {''.join(last)} (see {folder}/dockerd.log).")
            time.sleep(0.3)
        yield program, env
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
