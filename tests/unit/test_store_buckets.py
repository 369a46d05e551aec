"""The Job that makes buckets, with a real store."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from avrt_lib import store
from avrt_lib.errors import StoreError
from avrt_lib.store import LocalObjectServer
from avrt_lib.store.buckets import main, make_missing


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalObjectServer]:
    with LocalObjectServer(tmp_path_factory.mktemp("run") / "store") as running:
        yield running


@pytest.fixture(autouse=True)
def _environment(server: LocalObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def test_only_what_is_absent_is_made() -> None:
    assert make_missing(["first", "second"]) == ["first", "second"]
    store.client().put_object("first", "kept", io.BytesIO(b"x"), 1)
    assert make_missing(["first", "third"]) == ["third"]
    assert store.client().stat_object("first", "kept").size == 1


def test_a_refusal_ends_the_job_and_tells_no_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AVRT_S3_SECRET_KEY", "hunter2")
    assert main(["fourth"]) == StoreError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("Making the bucket fourth at ")
    assert "hunter2" not in said
