"""A real bare repository, somebody else's commits in it, and models that are promoted into it."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from avrt_lib.config import Config, load
from avrt_lib.serving import gitops

SOURCE = Path(__file__).parents[1] / "configs/miniature.yaml"
PLACE = "models/avrt-miniature"


def git(folder: Path, *arguments: str) -> str:
    """Git as somebody else would use it."""
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=60
    ).stdout


def without_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of them."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for role in ("AUTHOR", "COMMITTER"):
        for name in ("NAME", "EMAIL", "DATE"):
            monkeypatch.delenv(f"GIT_{role}_{name}", raising=False)


def make_remote(folder: Path) -> Path:
    """A bare repository with a folder for models, and a working copy of it, ``seed``."""
    bare = folder / "remote.git"
    git(folder, "init", "--quiet", "--bare", "--initial-branch=main", str(bare))
    git(folder, "clone", "--quiet", str(bare), "seed")
    git(folder / "seed", "checkout", "--quiet", "-b", "main")
    push_files(folder / "seed", {"README.md": "manifests\n", "models/.gitkeep": ""}, "seed")
    return bare


def push_files(seed: Path, files: dict[str, str], subject: str) -> None:
    """Somebody else's commit, on top of what the working copy knows."""
    for name, text in files.items():
        (seed / name).parent.mkdir(parents=True, exist_ok=True)
        (seed / name).write_text(text)
    git(seed, "add", ".")
    git(seed, "commit", "--quiet", "-m", subject)
    git(seed, "push", "--quiet", "origin", "main")


def pull_and_push_files(seed: Path, files: dict[str, str], subject: str) -> None:
    """Somebody else's commit, on top of what there is."""
    git(seed, "pull", "--quiet", "--ff-only", "origin", "main")
    push_files(seed, files, subject)


def subjects(remote: Path, branch: str = "main") -> list[str]:
    """First lines of the commits, the newest first."""
    return git(remote, "log", "--format=%s", branch).splitlines()


def configured(url: Path | str, **more: Any) -> Config:
    """The miniature with target git."""
    address = url if "://" in str(url) else f"file://{url}"
    return load(SOURCE, {"deployment.target": "git", "deployment.manifests_url": address, **more})


@dataclasses.dataclass
class Model:
    """A model that promotion has decided for."""

    version: int | None = 3
    sha256: str = "abcdef1234567890"
    run: str = "run-1"
    cpu: str = "4"

    @property
    def uri(self) -> str:
        """Where it is published."""
        return f"s3://avrt/models/avrt-miniature/{self.sha256}"

    def promote(self, config: Config, folder: Path) -> gitops.Change:
        """Commit its manifest; ``folder`` gets the file."""
        path = folder / f"{self.sha256}-{self.run}.yaml"
        path.write_text(self.manifest())
        return gitops.commit_manifest(config, path, self.decision())

    def manifest(self) -> str:
        """Its InferenceService."""
        annotations = {"avrt/model-sha256": self.sha256, "avrt/run": self.run, "avrt/data-hash": "d4t4"}
        if self.version is not None:
            annotations["avrt/model-version"] = str(self.version)
        model = {"storageUri": self.uri, "resources": {"limits": {"cpu": self.cpu}}}
        return yaml.safe_dump(
            {
                "kind": "InferenceService",
                "metadata": {"name": "avrt-miniature", "annotations": annotations},
                "spec": {"predictor": {"model": model}},
            }
        )

    def decision(self) -> dict[str, Any]:
        """What promotion writes about it."""
        return {
            "promoted": True,
            "model": "grpo",
            "version": self.version,
            "uri": self.uri,
            "sha256": self.sha256,
            "reason": "grpo is promoted: 90.0% against 30.0% of the base on 40 validation questions, p = 1e-09.",
            "test": {"p_value": 1e-9, "n": 40, "wins": 24, "losses": 0},
            "validation_accuracy": {"base": 0.3, "sft": 0.75, "grpo": 0.9},
        }
