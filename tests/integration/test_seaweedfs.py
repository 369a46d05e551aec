"""The object store against a real SeaweedFS."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from minio import Minio
from minio.error import S3Error

from avrt_lib import store
from avrt_lib.config import StoreConfig
from avrt_lib.errors import DataError, PortInUseError, StoreError
from avrt_lib.models import write_manifest
from avrt_lib.store import LocalObjectServer
from avrt_lib.tables import read_json

S3 = StoreConfig()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalObjectServer]:
    with LocalObjectServer(tmp_path_factory.mktemp("run") / "store") as running:
        yield running


@pytest.fixture
def in_environment(server: LocalObjectServer, monkeypatch: pytest.MonkeyPatch) -> LocalObjectServer:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AVRT_RUN_ID", "run-1")
    return server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": tmp_path.name}))
    (folder / "sub" / "weights.safetensors").write_bytes(os.urandom(300_000))
    (folder / "empty.txt").touch()
    write_manifest(folder, {"step": "grpo"})
    return folder


def alive(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_strangers_are_refused_and_credentials_are_private(server: LocalObjectServer) -> None:
    settings = server.settings
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        Minio(settings.endpoint, settings.access_key, "wrong", secure=False, region="us-east-1").list_buckets()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{settings.endpoint}/avrt", timeout=10)
    assert refused.value.code == 403
    refused.value.close()
    assert stat.S_IMODE((server.folder / "s3.json").stat().st_mode) == 0o600


def test_only_loopback_is_listened_on(server: LocalObjectServer) -> None:
    assert server._child is not None
    inodes = set()
    for descriptor in Path(f"/proc/{server._child.pid}/fd").iterdir():
        target = str(descriptor.readlink())
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert listening
    assert set(listening) == {"0100007F"}


def test_model_goes_to_its_content_and_comes_back(
    in_environment: LocalObjectServer, model: Path, tmp_path: Path
) -> None:
    sha256 = read_json(model / "manifest.json")["content_sha256"]
    place = store.publish_model(model, "avrt-student", S3)
    assert place == store.ModelPlace(f"s3://avrt/models/avrt-student/{sha256}", sha256, 3)
    before = {o.object_name: o.last_modified for o in store.client().list_objects("avrt", "models/", recursive=True)}
    assert store.publish_model(model, "avrt-student", S3) == place
    after = {o.object_name: o.last_modified for o in store.client().list_objects("avrt", "models/", recursive=True)}
    assert after == before

    manifest = store.download_model(place.uri, tmp_path / "down")
    assert manifest["content_sha256"] == sha256
    assert (tmp_path / "down/sub/weights.safetensors").read_bytes() == (model / "sub/weights.safetensors").read_bytes()
    assert (tmp_path / "down/empty.txt").read_bytes() == b""
    assert store.download_model(place.uri, tmp_path / "down") == manifest
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ


def test_an_interrupted_upload_is_completed(in_environment: LocalObjectServer, model: Path, tmp_path: Path) -> None:
    sha256 = read_json(model / "manifest.json")["content_sha256"]
    store.client().fput_object("avrt", f"models/cut/{sha256}/config.json", str(model / "config.json"))
    with pytest.raises(StoreError, match="not whole"):
        store.download_model(f"s3://avrt/models/cut/{sha256}", tmp_path / "early")
    assert not (tmp_path / "early").exists()
    store.download_model(store.publish_model(model, "cut", S3).uri, tmp_path / "late")


def test_a_foreign_object_is_not_overwritten(in_environment: LocalObjectServer, model: Path, tmp_path: Path) -> None:
    place = store.publish_model(model, "foreign", S3)
    key = place.uri.removeprefix("s3://avrt/") + "/config.json"
    (tmp_path / "other").write_text("other content")
    store.client().fput_object("avrt", key, str(tmp_path / "other"))
    with pytest.raises(StoreError, match="never overwritten"):
        store.publish_model(model, "foreign", S3)
    with pytest.raises(StoreError, match=r"config\.json is not what its manifest says"):
        store.download_model(place.uri, tmp_path / "down")


def test_a_changed_folder_is_not_published(in_environment: LocalObjectServer, model: Path) -> None:
    (model / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"config\.json"):
        store.publish_model(model, "changed", S3)


def test_absent_model_and_absent_server(
    in_environment: LocalObjectServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="cannot be fetched"):
        store.download_model("s3://avrt/models/none/0", tmp_path / "none")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AVRT_S3_ENDPOINT", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(StoreError, match="Publishing"):
            store.publish_model(model, "gone", S3)


def test_checkpoints_newest_whole_one_wins(in_environment: LocalObjectServer, tmp_path: Path) -> None:
    sink = store.checkpoint_sink("grpo")
    assert sink is not None
    assert sink.latest(tmp_path) is None
    for step in (9, 40, 80, 100):
        folder = tmp_path / "made" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(str(step))
        assert sink(folder, folder.name) == f"s3://avrt/checkpoints/run-1/grpo/checkpoint-{step}"
    names = [
        o.object_name or "" for o in store.client().list_objects("avrt", "checkpoints/run-1/grpo/", recursive=True)
    ]
    assert {name.split("/")[3] for name in names} == {"checkpoint-80", "checkpoint-100"}
    store.client().remove_object("avrt", "checkpoints/run-1/grpo/checkpoint-100/manifest.json")
    found = sink.latest(tmp_path / "resumed")
    assert found is not None
    assert (found.name, (found / "state.json").read_text()) == ("checkpoint-80", "80")


def test_a_checkpoint_that_is_written_again_replaces_the_old(in_environment: LocalObjectServer, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    store.push_checkpoint(folder, "sft/checkpoint-5")
    (folder / "old.txt").unlink()
    (folder / "new.txt").write_text("longer than before")
    store.push_checkpoint(folder, "sft/checkpoint-5")
    found = store.latest_checkpoint("sft", tmp_path / "resumed")
    assert found is not None
    assert [path.name for path in found.iterdir()] == ["new.txt"]


@pytest.mark.parametrize("name", ["../../evil.txt", "/tmp/avrt-evil.txt"])
def test_a_checkpoint_stays_in_its_folder(in_environment: LocalObjectServer, tmp_path: Path, name: str) -> None:
    document = json.dumps({"kind": "checkpoint", "files": {name: {"sha256": "0", "bytes": 1}}}).encode()
    place = "checkpoints/run-1/crafted/checkpoint-7/manifest.json"
    store.client().put_object("avrt", place, io.BytesIO(document), len(document))
    with pytest.raises(StoreError, match="names a file outside"):
        store.latest_checkpoint("crafted", tmp_path / "in" / "here")
    assert list((tmp_path / "in" / "here").iterdir()) == []


def test_only_names_that_end_in_a_number_are_checkpoints(in_environment: LocalObjectServer, tmp_path: Path) -> None:
    for name in ("..8", "checkpoint-9.x", "checkpoint"):
        store.client().put_object("avrt", f"checkpoints/run-1/odd/{name}/manifest.json", io.BytesIO(b"{}"), 2)
    assert store.latest_checkpoint("odd", tmp_path / "resumed") is None


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=str(port)), LocalObjectServer(tmp_path / "store", port=port):
            pass


def test_data_outlives_the_server_and_no_process_does(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalObjectServer(tmp_path / "store") as first:
        assert first._child is not None
        pid, old = first._child.pid, first.environment
        for name, value in old.items():
            monkeypatch.setenv(name, value)
        place = store.publish_model(model, "kept", S3)
    assert not alive(pid)
    with LocalObjectServer(tmp_path / "store") as second:
        assert second.environment["AVRT_S3_SECRET_KEY"] != old["AVRT_S3_SECRET_KEY"]
        for name, value in second.environment.items():
            monkeypatch.setenv(name, value)
        assert store.publish_model(model, "kept", S3) == place
        store.download_model(place.uri, tmp_path / "down")


def test_a_server_that_a_killed_run_left_is_ended(tmp_path: Path) -> None:
    left = LocalObjectServer(tmp_path / "store").__enter__()
    assert left._child is not None
    try:
        with LocalObjectServer(tmp_path / "store"):
            left._child._process.wait(timeout=10)
            assert not alive(left._child.pid)
    finally:
        left.close()
