"""The version that results carry, with and without a git checkout around the package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from avrt_lib import __version__
from avrt_lib.code_version import code_version


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another-repository"))
    with monkeypatch.context() as plain:
        plain.delenv("GIT_DIR")
        git(tmp_path, "init", "-q")
        (tmp_path / "code.py").write_text("a = 1\n")
        git(tmp_path, "add", "code.py")
        git(tmp_path, "commit", "-q", "-m", "first")
        git(tmp_path, "tag", "v9")
        (tmp_path / "commit").write_text(git(tmp_path, "rev-parse", "HEAD"))
    return tmp_path


def test_a_checkout_adds_its_commit(checkout: Path) -> None:
    commit = (checkout / "commit").read_text()
    assert code_version(checkout) == f"{__version__}+g{commit[:12]}"


def test_changes_that_are_not_committed_show(checkout: Path) -> None:
    (checkout / "code.py").write_text("a = 2\n")
    assert code_version(checkout).endswith(".dirty")


def test_without_a_checkout_it_is_the_version(tmp_path: Path) -> None:
    assert code_version(tmp_path) == __version__


def test_a_checkout_that_git_does_not_read_is_no_error(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: /nowhere")
    assert code_version(tmp_path) == __version__


def test_a_machine_without_git_is_no_error(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert code_version(checkout) == __version__
