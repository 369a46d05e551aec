"""The champion's manifest in a real repository: what the commit holds, and what is refused."""

from __future__ import annotations

import re
import shlex
import stat
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.config import load
from avrt_lib.errors import ConfigError, ServingError
from avrt_lib.serving.git import Repository
from tests.git_remote import (
    PLACE,
    SOURCE,
    Model,
    configured,
    git,
    make_remote,
    pull_and_push_files,
    push_files,
    subjects,
    without_own_settings,
)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_own_settings(monkeypatch)
    return make_remote(tmp_path)


def test_the_commit_carries_manifest_and_evidence(remote: Path, tmp_path: Path) -> None:
    change = Model().promote(configured(remote), tmp_path)
    assert git(remote, "rev-parse", "main").strip() == change.commit
    assert change.pull_request is None
    assert git(remote, "show", f"main:{PLACE}/inferenceservice.yaml") == Model().manifest()
    listed = git(remote, "ls-tree", "-r", "--name-only", "main").split()
    assert listed == ["README.md", "models/.gitkeep", f"{PLACE}/evidence.md", f"{PLACE}/inferenceservice.yaml"]

    text = git(remote, "log", "-1", "--format=%B", "main")
    evidence = git(remote, "show", f"main:{PLACE}/evidence.md")
    for told in (text, evidence):
        assert "Promote avrt-miniature version 3: abcdef123456" in told
        assert "| base | 30.0% | 18.1% – 45.4% |" in told
        assert "| sft | 75.0% | 59.8% – 85.8% |" in told
        assert "| **grpo** | 90.0% | 76.9% – 96.0% |" in told
        assert "takes avrt-miniature off the cluster" in told
    trailers = git(remote, "log", "-1", "--format=%(trailers:only)", "main").splitlines()
    assert [line for line in trailers if line] == [
        "Avrt-Run: run-1",
        "Avrt-Model-Version: avrt-miniature/3",
        "Avrt-Model-Uri: s3://avrt/models/avrt-miniature/abcdef1234567890",
        "Avrt-Model-Sha256: abcdef1234567890",
        "Avrt-Data-Hash: d4t4",
        f"Avrt-Config-Hash: {configured(remote).sha256}",
        "Avrt-Inference-Service: avrt/avrt-miniature",
    ]


def test_the_rollback_command_brings_the_model_before_back(remote: Path, tmp_path: Path) -> None:
    first, second = Model(version=3), Model(version=4, sha256="f00")
    for model in (first, second):
        model.promote(configured(remote), tmp_path)
    pull_and_push_files(tmp_path / "seed", {"other.txt": "later"}, "another change")
    evidence = git(remote, "show", f"main:{PLACE}/evidence.md")
    assert "brings back version 3 (s3://avrt/models/avrt-miniature/abcdef1234567890)" in evidence
    command = re.search(r"^    (git revert .*)$", evidence, re.MULTILINE)
    assert command
    git(tmp_path / "seed", *shlex.split(command[1])[1:])
    assert (tmp_path / "seed" / PLACE / "inferenceservice.yaml").read_text() == first.manifest()
    assert (tmp_path / "seed/other.txt").exists()


def test_the_same_model_is_not_committed_twice(remote: Path, tmp_path: Path) -> None:
    first = Model().promote(configured(remote), tmp_path)
    pull_and_push_files(tmp_path / "seed", {"other.txt": ""}, "another change")
    assert Model(run="another-run").promote(configured(remote), tmp_path) == first
    assert len(subjects(remote)) == 3


def test_the_same_model_with_other_settings_is_a_change(remote: Path, tmp_path: Path) -> None:
    Model().promote(configured(remote), tmp_path)
    Model(cpu="8").promote(configured(remote), tmp_path)
    assert subjects(remote)[:2] == ["Promote avrt-miniature version 3: abcdef123456"] * 2


def test_a_push_in_between_is_taken_in(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push = Repository.push

    def push_after_another(self: Repository, *arguments: Any, **more: Any) -> None:
        if not (tmp_path / "seed/other.txt").exists():
            push_files(tmp_path / "seed", {"other.txt": "other"}, "other")
        push(self, *arguments, **more)

    monkeypatch.setattr(Repository, "push", push_after_another)
    Model().promote(configured(remote), tmp_path)
    assert subjects(remote) == ["Promote avrt-miniature version 3: abcdef123456", "other", "seed"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Model(version=2, sha256="0ld"), "holds version 3 of avrt-miniature, so version 2 is not promoted"),
        (Model(version=3, sha256="0ther"), "another model as version 3 of avrt-miniature, one from another registry"),
        (Model(version=None, sha256="0ther"), "not registered.* set MLFLOW_TRACKING_URI"),
    ],
)
def test_a_newer_version_is_never_replaced(remote: Path, tmp_path: Path, model: Model, said: str) -> None:
    Model().promote(configured(remote), tmp_path)
    with pytest.raises(ServingError, match=said):
        model.promote(configured(remote), tmp_path)
    assert len(subjects(remote)) == 2


@pytest.mark.parametrize("more", ["---\n", "---\nkind: ConfigMap\n"])
def test_a_newer_version_is_seen_in_whatever_company(remote: Path, tmp_path: Path, more: str) -> None:
    push_files(tmp_path / "seed", {f"{PLACE}/inferenceservice.yaml": f"{Model().manifest()}{more}"}, "by hand")
    with pytest.raises(ServingError, match="so version 2 is not promoted"):
        Model(version=2, sha256="0ld").promote(configured(remote), tmp_path)


def test_a_stopped_placeholder_is_no_model_to_go_back_to(remote: Path, tmp_path: Path) -> None:
    placeholder = "kind: InferenceService\nmetadata: {annotations: {serving.kserve.io/stop: 'true'}}\n"
    push_files(tmp_path / "seed", {f"{PLACE}/inferenceservice.yaml": placeholder}, "before the first promotion")
    Model().promote(configured(remote), tmp_path)
    assert "takes avrt-miniature off the cluster" in git(remote, "log", "-1", "--format=%B", "main")


def test_an_unregistered_model_may_be_replaced(remote: Path, tmp_path: Path) -> None:
    Model(version=None).promote(configured(remote), tmp_path)
    Model(version=1, sha256="n3w").promote(configured(remote), tmp_path)
    assert subjects(remote)[:2] == ["Promote avrt-miniature version 1: n3w", "Promote avrt-miniature: abcdef123456"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deployment.manifests_branch": "gone"}, r"has no branch gone \(it has main\): make it, or correct"),
        ({"deployment.manifests_path": "clusters/a"}, "has no folder clusters/a in its branch main"),
        ({"deployment.manifests_path": "README.md"}, "has no folder README.md"),
        ({"deployment.manifests_url": "file:///nowhere/at/all.git"}, "correct deployment.manifests_url"),
        ({"deployment.manifests_url": "https://127.0.0.1:1/m.git"}, "it cannot be reached"),
        ({"deployment.manifests_url": "ssh://127.0.0.1:1/m.git"}, "it cannot be reached"),
        ({"deployment.git.token_env": "AVRT_NO_SUCH_TOKEN"}, r"AVRT_NO_SUCH_TOKEN .*is not set"),
        (
            {"deployment.git.signing": "ssh", "deployment.git.signing_key": "/nowhere/key"},
            "correct deployment.git.signing_key",
        ),
    ],
)
def test_what_cannot_work_is_one_line_with_the_mend(
    remote: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises((ServingError, ConfigError), match=said) as problem:
        Model().promote(configured(remote, **change), tmp_path)
    assert "\n" not in str(problem.value)
    assert subjects(remote) == ["seed"]


def test_an_empty_repository_is_named_so(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--bare", "empty.git")
    with pytest.raises(ServingError, match="is empty: push a first commit with the folder models to its branch main"):
        Model().promote(configured(tmp_path / "empty.git"), tmp_path)


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (
            "GitLab: You are not allowed to push code to protected branches.",
            r"not allowed to push code.*or set deployment\.git\.mode=pull_request",
        ),
        (
            "error: GH006: Protected branch update failed. - Commits must have verified signatures.",
            r"set deployment\.git\.signing",
        ),
        ("GitLab: Commit must be signed with a GPG key", r"set deployment\.git\.signing"),
    ],
)
def test_a_protected_branch_is_named_so(remote: Path, tmp_path: Path, says: str, said: str) -> None:
    hook = remote / "hooks/pre-receive"
    hook.write_text(f"#!/bin/sh\necho '{says}'\nexit 1\n")
    hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(ServingError, match=said):
        Model().promote(configured(remote), tmp_path)


def test_credentials_are_not_shown(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git's own settings may put a password into the address that it then complains about."""
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "url.https://robot:s3cret@127.0.0.1:1/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://git.example.com/")
    monkeypatch.setenv("AVRT_TEST_TOKEN", "t0ken")
    config = configured("https://git.example.com/t0ken/m.git", **{"deployment.git.token_env": "AVRT_TEST_TOKEN"})
    with pytest.raises(ServingError, match=re.escape("https://git.example.com/***/m.git")) as problem:
        Model().promote(config, tmp_path)
    assert "s3cret" not in str(problem.value)
    assert "t0ken" not in str(problem.value)


def test_a_token_that_no_request_takes_is_not_shown(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVRT_TEST_TOKEN", "t0ken\nsecond line")
    config = configured(remote, **{"deployment.git.token_env": "AVRT_TEST_TOKEN"})
    with pytest.raises(ConfigError, match="AVRT_TEST_TOKEN holds a line break") as problem:
        Model().promote(config, tmp_path)
    assert "t0ken" not in str(problem.value)


def test_links_and_files_in_the_way_lead_nowhere(remote: Path, tmp_path: Path) -> None:
    (tmp_path / "seed/models/avrt-miniature").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").mkdir()
    push_files(tmp_path / "seed", {}, "a link")
    with pytest.raises(ServingError, match="update-index"):
        Model().promote(configured(remote), tmp_path)
    assert list((tmp_path / "outside").iterdir()) == []


def test_hooks_of_this_machine_do_not_run(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("pre-push", "post-index-change"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
        (hooks / name).chmod(0o755)
    settings = tmp_path / "gitconfig"
    settings.write_text(f"[core]\n\thooksPath = {hooks}\n[init]\n\ttemplateDir = {tmp_path}\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    Model().promote(configured(remote), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_another_repository_around_git_is_left_alone(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a promotion is started by a hook."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "seed/.git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "seed/.git/index"))
    before = sorted(path.name for path in (tmp_path / "seed/.git").iterdir())
    Model().promote(configured(remote), tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "seed/.git").iterdir()) == before
    assert len(subjects(remote)) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"deployment.manifests_url": None}, "needs manifests_url"),
        ({"deployment.manifests_url": "ext::sh -c id"}, "starts with https, ssh or file"),
        ({"deployment.manifests_url": "--upload-pack=id"}, "starts with https, ssh or file"),
        ({"deployment.manifests_url": "git://git.example.com/m.git"}, "starts with https, ssh or file"),
        ({"deployment.manifests_url": "http://git.example.com/m.git"}, "starts with https, ssh or file"),
        ({"deployment.manifests_url": "https://robot:pw@git.example.com/m.git"}, "must not hold a password"),
        ({"deployment.manifests_url": "https://ghp_token@git.example.com/m.git"}, "must not hold a password"),
        ({"deployment.manifests_path": "../up"}, "relative path"),
        ({"deployment.manifests_path": "/etc"}, "relative path"),
        ({"deployment.manifests_branch": "--force"}, "manifests_branch"),
        ({"deployment.git.mode": "pull_request"}, "needs forge, and token_env"),
        ({"deployment.git.signing_key": "~/.ssh/id"}, "signing_key needs signing"),
        ({"deployment.git.api_url": "http://forge.example.com/api"}, "api_url"),
        ({"deployment.git.token_env": "A;id"}, "token_env"),
    ],
)
def test_configurations_that_cannot_work_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as problem:
        configured("/r", **change)
    assert not re.search("pw|ghp_", str(problem.value))


@pytest.mark.parametrize("url", ["git@git.example.com:ml/m.git", "ssh://git@git.example.com/ml/m.git", "/srv/m.git"])
def test_addresses_of_people_who_use_ssh_or_a_folder(url: str) -> None:
    assert load(SOURCE, {"deployment.manifests_url": url}).deployment.manifests_url == url
