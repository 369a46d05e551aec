"""GitOps: promotion as a commit that carries the evidence, in the repository that the cluster follows."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from avrt_lib.config import Config
from avrt_lib.errors import EnvironmentProblem, ServingError, UsageError
from avrt_lib.tables import atomic_path, write_json

log = logging.getLogger("avrt.serving")

_PUSHES = 3
_TIMEOUT_S = 120
MANIFEST_FILE = "inferenceservice.yaml"
EVIDENCE_FILE = "evidence.json"


def commit_manifest(config: Config, manifest: Path, decision: dict[str, Any]) -> str:
    """Put the champion's manifest and its evidence into the repository and push.

    Somebody else's push in between is taken in and the commit made anew. Where the branch holds the same manifest
    already, nothing is committed. Credentials are git's own business (SSH agent, credential helper).

    Args:
        config: ``deployment.manifests_url``, ``…_branch`` and ``…_path``; the files go to
            ``PATH/MODEL_NAME/inferenceservice.yaml`` and ``evidence.json``.
        manifest: the InferenceService.
        decision: promotion's; its test goes into the commit message and the evidence.

    Returns:
        The commit that holds the manifest.

    Raises:
        EnvironmentProblem: where git is not installed.
        ServingError: where the repository cannot be cloned or pushed to; the message holds git's reason.
    """
    url = config.deployment.manifests_url
    if not url:
        raise UsageError("deployment.manifests_url is not set: name the repository that the cluster follows.")
    branch, name = config.deployment.manifests_branch, config.promotion.model_name
    with tempfile.TemporaryDirectory(prefix="avrt-git-") as temporary:
        clone = Path(temporary) / "manifests"
        _git(Path(temporary), "clone", "--quiet", "--depth=1", f"--branch={branch}", "--", url, str(clone))
        for attempt in range(1, _PUSHES + 1):
            folder = clone / config.deployment.manifests_path / name
            _write(folder, manifest, decision)
            _git(clone, "add", "--", str(folder.relative_to(clone)))
            if not _git(clone, "status", "--porcelain", "--", str(folder.relative_to(clone))):
                log.info("%s holds this manifest already", url)
                return _git(clone, "rev-parse", "HEAD")
            _git(clone, *_author(clone), "commit", "--quiet", f"--message={message(name, decision)}")
            try:
                _git(clone, "push", "--quiet", "origin", f"HEAD:{branch}")
            except ServingError:
                if attempt == _PUSHES:
                    raise
                log.warning("the push to %s was refused; taking in what is new there", url)
                _git(clone, "fetch", "--quiet", "--depth=1", "origin", branch)
                _git(clone, "reset", "--quiet", "--hard", "FETCH_HEAD")
                continue
            break
        return _git(clone, "rev-parse", "HEAD")


def message(name: str, decision: dict[str, Any]) -> str:
    """The commit message: what is promoted, and why."""
    version = f" version {decision['version']}" if decision["version"] is not None else ""
    return (
        f"Promote {name}{version}\n\n{decision['reason']}\n\nModel: {decision['uri']}\nSHA-256: {decision['sha256']}\n"
    )


def _write(folder: Path, manifest: Path, decision: dict[str, Any]) -> None:
    with atomic_path(folder / MANIFEST_FILE) as temporary:
        temporary.write_bytes(manifest.read_bytes())
    write_json(
        folder / EVIDENCE_FILE, {key: decision[key] for key in ("model", "version", "uri", "sha256", "reason", "test")}
    )


def _author(clone: Path) -> list[str]:
    """Git refuses to commit without an identity; a machine that has one keeps it."""
    if os.environ.get("GIT_AUTHOR_EMAIL") or _git(clone, "config", "--default=", "--get", "user.email"):
        return []
    return ["-c", "user.name=avrt", "-c", "user.email=avrt@localhost"]


def _git(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise EnvironmentProblem("git is not installed: deployment.target=git needs it.") from error
    except subprocess.TimeoutExpired as error:
        raise ServingError(f"git {arguments[0]} did not end within {_TIMEOUT_S} s.") from error
    if done.returncode:
        verb = next(a for a in arguments if not a.startswith("-") and "=" not in a)
        raise ServingError(f"git {verb} failed: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout.strip()
