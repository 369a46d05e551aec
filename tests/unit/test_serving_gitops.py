"""The champion's manifest in a real repository."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.config import Config, load
from avrt_lib.errors import ConfigError, ServingError
from avrt_lib.serving import gitops

DECISION: dict[str, Any] = {
    "promoted": True,
    "model": "grpo",
    "version": 3,
    "uri": "s3://avrt/models/avrt-miniature/abc",
    "sha256": "abc",
    "reason": "grpo is promoted: 90.0% against 30.0% of the base.",
    "test": {"p_value": 1e-9},
}
SOURCE = Path(__file__).parents[2] / "configs/miniature.yaml"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    bare = tmp_path / "remote.git"
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", str(bare))
    git(tmp_path, "clone", "--quiet", str(bare), "seed")
    git(tmp_path / "seed", "checkout", "--quiet", "-b", "main")
    (tmp_path / "seed/README.md").write_text("manifests\n")
    git(tmp_path / "seed", "add", ".")
    git(tmp_path / "seed", "commit", "--quiet", "-m", "seed")
    git(tmp_path / "seed", "push", "--quiet", "origin", "main")
    return bare


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "inferenceservice.yaml"
    path.write_text("kind: InferenceService\n")
    return path


def configured(url: Path | str, **more: Any) -> Config:
    changes = {"deployment.target": "git", "deployment.manifests_url": f"file://{url}", **more}
    return load(SOURCE, changes)


def test_the_commit_carries_manifest_and_evidence(remote: Path, manifest: Path) -> None:
    commit = gitops.commit_manifest(configured(remote), manifest, DECISION)
    assert git(remote, "rev-parse", "main").strip() == commit
    assert git(remote, "show", "main:models/avrt-miniature/inferenceservice.yaml") == manifest.read_text()
    evidence = json.loads(git(remote, "show", "main:models/avrt-miniature/evidence.json"))
    assert evidence["sha256"] == "abc"
    text = git(remote, "log", "-1", "--format=%B", "main")
    assert "Promote avrt-miniature version 3" in text
    assert DECISION["reason"] in text
    assert git(remote, "ls-tree", "--name-only", "main").split() == ["README.md", "models"]


def test_the_same_manifest_is_not_committed_twice(remote: Path, manifest: Path) -> None:
    first = gitops.commit_manifest(configured(remote), manifest, DECISION)
    assert gitops.commit_manifest(configured(remote), manifest, DECISION) == first
    assert git(remote, "rev-list", "--count", "main").strip() == "2"


def test_a_push_in_between_is_taken_in(
    remote: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = gitops._write
    rivals: list[str] = []

    def write_while_another_pushes(*arguments: Any) -> None:
        write(*arguments)
        if not rivals:
            (tmp_path / "seed/other.txt").write_text("other")
            git(tmp_path / "seed", "add", ".")
            git(tmp_path / "seed", "commit", "--quiet", "-m", "other")
            git(tmp_path / "seed", "push", "--quiet", "origin", "main")
            rivals.append("pushed")

    monkeypatch.setattr(gitops, "_write", write_while_another_pushes)
    gitops.commit_manifest(configured(remote), manifest, DECISION)
    assert git(remote, "log", "--format=%s", "main").splitlines() == [
        "Promote avrt-miniature version 3",
        "other",
        "seed",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deployment.manifests_branch": "gone"}, "git clone failed"),
        ({"deployment.manifests_url": "file:///nowhere/at/all.git"}, "git clone failed"),
    ],
)
def test_what_git_refuses_is_said(remote: Path, manifest: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ServingError, match=said):
        gitops.commit_manifest(configured(remote, **change), manifest, DECISION)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deployment.manifests_url": None}, "needs manifests_url"),
        ({"deployment.manifests_path": "../up"}, "relative path"),
        ({"deployment.manifests_path": "/etc"}, "relative path"),
    ],
)
def test_configurations_that_cannot_work_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured("/r", **change)
