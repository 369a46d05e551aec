"""Promotion by Git where others push, where it is killed, where it is signed, and by pull requests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from avrt_lib import tracking
from avrt_lib.errors import ServingError
from avrt_lib.promotion import manifest
from avrt_lib.serving import forges, gitops
from avrt_lib.store import ModelPlace
from tests.forge_api import TOKEN, ForgeServer
from tests.git_https import GitServer
from tests.git_remote import (
    PLACE,
    Model,
    configured,
    git,
    make_remote,
    pull_and_push_files,
    subjects,
    without_own_settings,
)

ROOT = Path(__file__).parents[2]
FORGES = ("github", "gitlab", "gitea")
LONGEST_S = 240
PROMOTE = (
    "import json, sys; from pathlib import Path; from tests.git_remote import Model, configured\n"
    "Model().promote(configured(sys.argv[1], **json.loads(sys.argv[2])), Path(sys.argv[3]))"
)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No test lasts longer, whatever waits in it."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"the test did not end within {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_own_settings(monkeypatch)
    monkeypatch.setenv("AVRT_TEST_FORGE", TOKEN)
    return make_remote(tmp_path)


def until(condition: Callable[[], bool], longest_s: float = 120) -> None:
    deadline = time.monotonic() + longest_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextlib.contextmanager
def writing(remote: Path, folder: Path) -> Iterator[list[str]]:
    """Somebody who pushes a commit all the time; yields the subjects that were taken."""
    git(folder, "clone", "--quiet", f"file://{remote}", "writer")
    clone, taken, ended = folder / "writer", [], threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            number, started = number + 1, time.monotonic()
            (clone / f"file-{number}").write_text(str(number))
            git(clone, "add", ".")
            git(clone, "commit", "--quiet", "-m", f"other {number}")
            while True:
                try:
                    git(clone, "push", "--quiet", "origin", "main")
                    break
                except subprocess.CalledProcessError:
                    git(clone, "pull", "--quiet", "--rebase", "origin", "main")
            taken.append(f"other {number}")
            # as often on a slow machine as on a fast one
            ended.wait(random.uniform(0, 4) * (time.monotonic() - started))

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        ended.set()
        thread.join(60)
        assert not thread.is_alive()


def test_nothing_is_lost_beside_somebody_who_keeps_pushing(remote: Path, tmp_path: Path) -> None:
    with writing(remote, tmp_path) as taken:
        until(lambda: len(taken) > 1)
        for version in (1, 2, 3):
            Model(version, f"{version}" * 12).promote(configured(remote), tmp_path)
        promoted = len(taken)
        until(lambda: len(taken) > promoted)
    found = subjects(remote)[::-1]
    assert [s for s in found if s.startswith("other")] == taken
    assert [s for s in found if s.startswith("Promote")] == [
        f"Promote avrt-miniature version {v}: {str(v) * 12}" for v in (1, 2, 3)
    ]
    assert git(remote, "show", f"main:{PLACE}/inferenceservice.yaml") == Model(3, "3" * 12).manifest()
    assert len(git(remote, "log", "--merges", "--format=%H", "main")) == 0


def test_of_promotions_at_once_the_newest_stays(remote: Path, tmp_path: Path) -> None:
    said: dict[int, str] = {}

    def promote(version: int) -> None:
        try:
            said[version] = str(Model(version, f"{version}" * 12).promote(configured(remote), tmp_path))
        except ServingError as problem:
            said[version] = str(problem)

    threads = [threading.Thread(target=promote, args=(version,), daemon=True) for version in (3, 1, 4, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST_S)
    assert git(remote, "show", f"main:{PLACE}/inferenceservice.yaml") == Model(4, "4" * 12).manifest()
    landed = [int(s.split()[3].rstrip(":")) for s in subjects(remote)[::-1] if s.startswith("Promote")]
    assert landed == sorted(landed)
    for version in {1, 2, 3, 4} - set(landed):
        assert f"so version {version} is not promoted any more" in said[version]


def test_models_of_other_names_do_not_disturb_each_other(remote: Path, tmp_path: Path) -> None:
    names = [f"student-{number}" for number in range(4)]
    problems: list[BaseException] = []

    def promote(name: str) -> None:
        try:
            (tmp_path / name).mkdir()
            Model(1).promote(configured(remote, **{"promotion.model_name": name}), tmp_path / name)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=promote, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST_S)
    assert problems == []
    assert set(git(remote, "ls-tree", "--name-only", "main", "models/").split()) == {
        "models/.gitkeep",
        *(f"models/{name}" for name in names),
    }


@contextlib.contextmanager
def promoting(
    remote: Path, folder: Path, settings: dict[str, Any], path: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """A promotion in a process of its own, which is killed at the end."""
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"]}
    command = [sys.executable, "-c", PROMOTE, f"file://{remote}", json.dumps(settings), str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "commits"), [("before", 1), ("after", 2)])
def test_a_promotion_that_was_killed_at_its_push_goes_on(
    remote: Path, tmp_path: Path, moment: str, commits: int
) -> None:
    """Git is a script here that stops at the push, so that the process can be killed right there."""
    tools, mark = tmp_path / "tools", tmp_path / "mark"
    tools.mkdir()
    real = shutil.which("git")
    pushed = "" if moment == "before" else f'{real} "$@"; '
    (tools / "git").write_text(
        f'#!/bin/sh\ncase " $* " in *" push "*) {pushed}echo $$ > {mark}.tmp; mv {mark}.tmp {mark}; exec sleep 300;; '
        f'esac\nexec {real} "$@"\n'
    )
    (tools / "git").chmod(0o755)
    with promoting(remote, tmp_path, {}, str(tools)) as process:
        until(mark.exists)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        os.killpg(int(mark.read_text()), signal.SIGKILL)
    assert len(subjects(remote)) == commits
    change = Model().promote(configured(remote), tmp_path)
    assert subjects(remote) == ["Promote avrt-miniature version 3: abcdef123456", "seed"]
    assert git(remote, "rev-parse", "main").strip() == change.commit


@pytest.mark.slow
def test_a_promotion_that_was_killed_while_it_asked_for_a_pull_request_goes_on(remote: Path, tmp_path: Path) -> None:
    with ForgeServer("github", remote, holding=threading.Event()) as forge:
        with promoting(remote, tmp_path, forge.settings) as process:
            until(forge.held.is_set)
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        assert forge.holding
        forge.holding.set()
        change = Model().promote(configured(remote, **forge.settings), tmp_path)
        assert change.pull_request == "https://github.example.com/ml/manifests/pull/1"
        assert len(forge.pulls) == 1


@pytest.mark.parametrize("kind", FORGES)
def test_a_pull_request_is_made_once_and_found_again(remote: Path, tmp_path: Path, kind: str) -> None:
    branch = "promote-avrt-miniature-v3-abcdef123456"
    with ForgeServer(kind, remote) as forge:
        config = configured(remote, **forge.settings)
        change = Model().promote(config, tmp_path)
        assert Model(run="another-run").promote(config, tmp_path) == change
        (pull,) = forge.pulls
    assert subjects(remote) == ["seed"]
    assert git(remote, "rev-parse", branch).strip() == change.commit
    assert git(remote, "show", f"{branch}:{PLACE}/inferenceservice.yaml") == Model().manifest()
    assert (pull.branch, pull.base) == (branch, "main")
    assert pull.title == "Promote avrt-miniature version 3: abcdef123456"
    for told in ("| **grpo** | 90.0%", "git revert --no-edit", "Avrt-Run: run-1", "Avrt-Model-Uri: s3://"):
        assert told in pull.body
    assert change.pull_request
    assert change.pull_request.endswith("/1")


@pytest.mark.parametrize("kind", FORGES)
def test_an_answer_that_was_lost_makes_no_second_pull_request(remote: Path, tmp_path: Path, kind: str) -> None:
    with ForgeServer(kind, remote, losing=1, failing=[503]) as forge:
        assert Model().promote(configured(remote, **forge.settings), tmp_path).pull_request
        assert len(forge.pulls) == 1


@pytest.mark.parametrize("kind", FORGES)
def test_a_server_that_is_no_forge_is_named_so(remote: Path, tmp_path: Path, kind: str) -> None:
    with (
        ForgeServer(kind, remote, failing=[200]) as forge,
        pytest.raises(ServingError, match=r"does not answer as a forge's API.*api_url"),
    ):
        Model().promote(configured(remote, **forge.settings), tmp_path)


@pytest.mark.parametrize("kind", FORGES)
def test_a_forge_that_asks_for_a_pause_gets_it(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    paused: list[float] = []
    monkeypatch.setattr(forges, "time", SimpleNamespace(sleep=paused.append))
    with ForgeServer(kind, remote, limiting=(1, 30)) as forge:
        assert Model().promote(configured(remote, **forge.settings), tmp_path).pull_request
        assert paused == [30]
        forge.limiting = (1, 3600)
        with pytest.raises(ServingError, match=r"rate limit.*start the step again later"):
            Model(4, "f00").promote(configured(remote, **forge.settings), tmp_path)
        assert paused == [30]


@pytest.mark.parametrize("kind", FORGES)
def test_pull_requests_at_once_become_one(remote: Path, tmp_path: Path, kind: str) -> None:
    found: list[gitops.Change] = []
    with ForgeServer(kind, remote) as forge:
        config = configured(remote, **forge.settings)
        threads = [
            threading.Thread(target=lambda run: found.append(Model(run=run).promote(config, tmp_path)), args=(f"r{n}",))
            for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONGEST_S)
        assert len(forge.pulls) == 1
    assert len(found) == 3
    assert len(set(found)) == 1


def test_a_merged_pull_request_is_the_end_of_it(remote: Path, tmp_path: Path) -> None:
    with ForgeServer("gitea", remote) as forge:
        config = configured(remote, **forge.settings)
        change = Model().promote(config, tmp_path)
        git(tmp_path / "seed", "fetch", "--quiet", "origin")
        git(tmp_path / "seed", "merge", "--quiet", "--no-ff", "-m", "Merge", f"origin/{forge.pulls[0].branch}")
        git(tmp_path / "seed", "push", "--quiet", "origin", "main")
        forge.pulls[0].is_open = False
        again = Model(run="another-run").promote(config, tmp_path)
        assert (again.commit, again.pull_request) == (change.commit, None)
        assert len(forge.pulls) == 1
        with pytest.raises(ServingError, match="version 2 is not promoted any more"):
            Model(2, "0ld").promote(config, tmp_path)


@pytest.mark.parametrize("kind", FORGES)
def test_a_pull_request_is_renewed_where_its_ground_has_moved(remote: Path, tmp_path: Path, kind: str) -> None:
    """Otherwise it could not be merged, and would say what its commit does not."""
    with ForgeServer(kind, remote) as forge:
        config = configured(remote, **forge.settings)
        before = Model(3).promote(config, tmp_path)
        Model(2, "f00").promote(configured(remote), tmp_path)
        (pull,) = forge.pulls
        pull.title = f"Draft: {pull.title}"
        after = Model(3).promote(config, tmp_path)
        assert after.pull_request == before.pull_request
        assert after.commit != before.commit
        assert len(forge.pulls) == 1
    assert git(remote, "rev-parse", f"{after.commit}^") == git(remote, "rev-parse", "main")
    assert "brings back version 2" in git(remote, "log", "-1", "--format=%B", after.commit)
    assert "brings back version 2" in pull.body
    assert pull.title == "Draft: Promote avrt-miniature version 3: abcdef123456"


def test_what_people_write_around_the_text_of_a_pull_request_stays(remote: Path, tmp_path: Path) -> None:
    with ForgeServer("github", remote) as forge:
        config = configured(remote, **forge.settings)
        Model().promote(config, tmp_path)
        (pull,) = forge.pulls
        pull.body = written = f"For Monday.\r\n{pull.body.replace(chr(10), chr(13) + chr(10))}\r\n- [x] looked at"
        Model().promote(config, tmp_path)
        assert pull.body == written
        pull.body = ""
        Model().promote(config, tmp_path)
        assert "git revert --no-edit" in pull.body


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("github", {"deployment.git.project": "ml/other"}, r"answered 404.*correct deployment\.git\.project"),
        ("gitlab", {"deployment.git.token_env": "AVRT_TEST_WRONG"}, r"answered 401.*token_env is not valid"),
        ("gitea", {"deployment.git.api_url": "http://127.0.0.1:1/api/v1"}, r"cannot be reached.*api_url"),
        ("gitea", {"deployment.git.project": None}, r"set deployment\.git\.project to OWNER/NAME"),
    ],
)
def test_what_a_forge_refuses_is_one_line_with_the_mend(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("AVRT_TEST_WRONG", "wr0ng")
    with ForgeServer(kind, remote) as forge, pytest.raises(Exception, match=said) as problem:
        Model().promote(configured(remote, **forge.settings | change), tmp_path)
    assert "\n" not in str(problem.value)
    assert "wr0ng" not in str(problem.value)


def test_a_signed_commit_is_verified_by_its_key(remote: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=60)
    signing = {"deployment.git.signing": "ssh", "deployment.git.signing_key": str(key)}
    Model().promote(configured(remote, **signing), tmp_path)
    allowed = tmp_path / "allowed"
    allowed.write_text(f"avrt@localhost {(tmp_path / 'key.pub').read_text()}")
    verify = ["git", "-c", f"gpg.ssh.allowedSignersFile={allowed}", "verify-commit", "main"]
    done = subprocess.run(verify, cwd=remote, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert 'Good "git" signature for avrt@localhost' in done.stderr


def test_gits_own_wish_to_sign_is_heard(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=60)
    settings = tmp_path / "gitconfig"
    settings.write_text(
        f"[commit]\ngpgSign = true\n[gpg]\nformat = ssh\n[user]\nsigningKey = {key}\n[log]\nshowSignature = true\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    first = Model().promote(configured(remote), tmp_path)
    assert "-----BEGIN SSH SIGNATURE-----" in git(remote, "cat-file", "commit", "main")
    assert Model().promote(configured(remote), tmp_path) == first


@pytest.mark.parametrize("partial", [True, False])
def test_a_token_opens_a_repository_behind_https(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partial: bool
) -> None:
    """A helper that keeps passwords does not get it, and servers that give parts of a repository are used so."""
    git(remote, "config", "uploadpack.allowFilter", str(partial).lower())
    git(remote, "config", "http.receivepack", "true")
    settings = tmp_path / "gitconfig"
    settings.write_text(f"[credential]\nhelper = store --file={tmp_path / 'kept'}\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("AVRT_TEST_TOKEN", "s3cret")
    with GitServer(tmp_path, {"s3cret": "write"}) as server:
        monkeypatch.setenv("GIT_SSL_CAINFO", str(server.certificate))
        config = configured(server.url("remote.git"), **{"deployment.git.token_env": "AVRT_TEST_TOKEN"})
        Model().promote(config, tmp_path)
        pull_and_push_files(tmp_path / "seed", {f"large/{n}": "x" * 1000 for n in range(30)}, "other files")
        Model(4, "f00").promote(config, tmp_path)
    assert subjects(remote)[::2] == [
        "Promote avrt-miniature version 4: f00",
        "Promote avrt-miniature version 3: abcdef123456",
    ]
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("wrong", "credentials are refused or missing: set deployment.git.token_env"),
        ("reader", "credentials are refused or missing: set deployment.git.token_env"),
        (None, "credentials are refused or missing: set deployment.git.token_env"),
    ],
)
def test_a_token_that_may_not_push_is_named_so(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, said: str
) -> None:
    git(remote, "config", "http.receivepack", "true")
    monkeypatch.setenv("AVRT_TEST_TOKEN", token or "")
    with GitServer(tmp_path, {"s3cret": "write", "reader": "read"}) as server:
        monkeypatch.setenv("GIT_SSL_CAINFO", str(server.certificate))
        settings = {"deployment.git.token_env": "AVRT_TEST_TOKEN"} if token else {}
        with pytest.raises(ServingError, match=said) as problem:
            Model().promote(configured(server.url("remote.git"), **settings), tmp_path)
    assert token is None or token not in str(problem.value).replace("readers", "")


@pytest.mark.slow
def test_run_version_commit_and_service_point_at_each_other(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    config, uri = configured(remote, **{"deployment.gpus": 0}), f"sqlite:///{tmp_path / 'mlflow.db'}"
    place = ModelPlace(Model().uri, Model().sha256, 1)
    environment = tracking.start_parent(config, tmp_path / "run-7", uri=uri, data_hash="d4t4")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    version = tracking.register_champion(place.uri, config.promotion.model_name, {"sha256": place.sha256})
    text = manifest.to_yaml(manifest.inference_service(config, place, version))
    (tmp_path / "isvc.yaml").write_text(text)
    decision = Model(version).decision()
    change = gitops.commit_manifest(config, tmp_path / "isvc.yaml", decision)
    monkeypatch.setenv("AVRT_RUN_ID", "run-8")
    tracking.register_champion(place.uri, config.promotion.model_name, {"sha256": place.sha256})

    registered = MlflowClient(uri, uri).get_model_version_by_alias("avrt-miniature", "champion")
    assert registered.tags["run"] == "run-7"
    assert registered.tags["commit"] == change.commit
    assert registered.tags["inference_service"] == "avrt/avrt-miniature"

    trailers = git(remote, "log", "-1", "--format=%(trailers:only)", change.commit)
    assert "Avrt-Run: run-7\nAvrt-Model-Version: avrt-miniature/1\n" in trailers

    served = yaml.safe_load(git(remote, "show", f"{change.commit}:{PLACE}/inferenceservice.yaml"))
    annotations = {k: v for k, v in served["metadata"]["annotations"].items() if k.startswith("avrt/")}
    assert annotations == {
        "avrt/model-sha256": place.sha256,
        "avrt/model-version": "1",
        "avrt/run": "run-7",
        "avrt/data-hash": "d4t4",
    }
