"""The object store without a server: its settings and the local kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import store
from avrt_lib.config import StoreConfig
from avrt_lib.errors import ConfigError, DataError, StoreError
from avrt_lib.models import verify_manifest, write_manifest
from avrt_lib.store.objects import S3Settings
from avrt_lib.tables import MANIFEST, read_json, sha256_file, write_json

LOCAL = StoreConfig(kind="local")
COMPLETE = {"AVRT_S3_ENDPOINT": "h:1", "AVRT_S3_ACCESS_KEY": "a", "AVRT_S3_SECRET_KEY": "s"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(b"w" * 100)
    write_manifest(folder, {})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"AVRT_S3_ENDPOINT": ""}, "AVRT_S3_ENDPOINT is not set"),
        ({"AVRT_S3_ACCESS_KEY": ""}, "AVRT_S3_ACCESS_KEY is not set"),
        ({"AVRT_S3_SECRET_KEY": ""}, "AVRT_S3_SECRET_KEY is not set"),
        ({"AVRT_S3_ENDPOINT": "http://h:1"}, "without a scheme"),
    ],
)
def test_settings_that_are_not_complete_are_named(
    change: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**COMPLETE, **change}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        S3Settings.from_environment()


@pytest.mark.parametrize(("value", "secure"), [(None, True), ("1", True), ("0", False)])
def test_tls_is_on_unless_it_is_turned_off(value: str | None, secure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AVRT_S3_SECURE", raising=False)
    for name, text in {**COMPLETE, **({} if value is None else {"AVRT_S3_SECURE": value})}.items():
        monkeypatch.setenv(name, text)
    settings = S3Settings.from_environment()
    assert settings.secure is secure
    assert settings.environment()["AVRT_S3_SECURE"] == str(int(secure))


def test_a_line_break_is_no_part_of_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in COMPLETE.items():
        monkeypatch.setenv(name, text + "\n")
    settings = S3Settings.from_environment()
    assert [settings.environment()[name] for name in COMPLETE] == list(COMPLETE.values())


def test_local_model_lies_at_its_content_and_comes_back(model: Path, tmp_path: Path) -> None:
    place = store.publish_model(model, "student", LOCAL, tmp_path / "store")
    assert place.uri == (tmp_path / "store/models/student" / place.sha256).as_uri()
    (model / "config.json").write_text("changed afterwards")
    manifest = store.download_model(place.uri, tmp_path / "down")
    assert manifest["content_sha256"] == place.sha256
    assert (tmp_path / "down/config.json").read_text() == "{}"


def test_local_model_is_published_once(model: Path, tmp_path: Path) -> None:
    place = store.publish_model(model, "student", LOCAL, tmp_path / "store")
    kept = tmp_path / "store/models/student" / place.sha256
    before = kept.stat().st_ino
    assert store.publish_model(model, "student", LOCAL, tmp_path / "store") == place
    assert kept.stat().st_ino == before
    (kept / "config.json").write_text("damaged")
    with pytest.raises(StoreError, match="has changed"):
        store.publish_model(model, "student", LOCAL, tmp_path / "store")
    with pytest.raises(StoreError, match="not whole"):
        store.download_model(place.uri, tmp_path / "down")


def test_a_published_model_that_lost_its_manifest_gets_it_again_once_its_files_are_checked(
    model: Path, tmp_path: Path
) -> None:
    place = store.publish_model(model, "student", LOCAL, tmp_path / "store")
    kept = tmp_path / "store/models/student" / place.sha256
    (kept / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json.*remove the folder, and publish or download"):
        store.download_model(place.uri, kept)
    store.publish_model(model, "student", LOCAL, tmp_path / "store")
    assert verify_manifest(kept)["content_sha256"] == place.sha256
    (kept / MANIFEST).unlink()
    (kept / "config.json").write_text("damaged")
    with pytest.raises(StoreError, match=r"config\.json is not what .* Remove it to publish again"):
        store.publish_model(model, "student", LOCAL, tmp_path / "store")
    assert not (kept / MANIFEST).exists()


def test_what_killed_writers_left_is_gone_with_the_next(model: Path, tmp_path: Path) -> None:
    sha256 = read_json(model / MANIFEST)["content_sha256"]
    left = [tmp_path / f"store/models/student/.{sha256}.0.tmp", tmp_path / ".down.0.tmp"]
    for folder in left:
        folder.mkdir(parents=True)
    store.download_model(store.publish_model(model, "student", LOCAL, tmp_path / "store").uri, tmp_path / "down")
    assert not [folder for folder in left if folder.exists()]


def test_a_folder_that_is_not_its_manifest_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        store.publish_model(model, "student", LOCAL, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def _other_weights(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "weights.safetensors").write_bytes(b"another")
    manifest["files"]["weights.safetensors"]["sha256"] = sha256_file(folder / "weights.safetensors")


def _another_file(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "more.safetensors").write_bytes(b"another")


def _name_outside(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["files"]["../weights.safetensors"] = {"sha256": "0", "bytes": 1}


def _no_list(folder: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("files")


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (_other_weights, "does not fit its own list"),
        (_another_file, "more.safetensors is not in the model's manifest"),
        (_name_outside, "lies outside the model"),
        (_no_list, "is no manifest of a model: it lists no files"),
    ],
)
def test_a_model_that_was_changed_together_with_its_manifest_is_refused(
    tamper: Callable[[Path, dict[str, Any]], None], said: str, model: Path, tmp_path: Path
) -> None:
    place = store.publish_model(model, "student", LOCAL, tmp_path / "store")
    kept = tmp_path / "store/models/student" / place.sha256
    manifest = read_json(kept / MANIFEST)
    tamper(kept, manifest)
    write_json(kept / MANIFEST, manifest)
    with pytest.raises(StoreError, match=said):
        store.download_model(place.uri, tmp_path / "down")
    assert not (tmp_path / "down").exists()


@pytest.mark.parametrize(
    ("uri", "said"),
    [("https://host/m", "only s3:// and file://"), ("file:///nowhere/at/all", "cannot be fetched")],
)
def test_addresses_that_cannot_be_fetched(uri: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=said):
        store.download_model(uri, tmp_path / "down")
    assert [path.name for path in tmp_path.iterdir()] == [".down.lock"]


def test_another_model_in_the_target_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    place = store.publish_model(model, "student", LOCAL, tmp_path / "store")
    with pytest.raises(StoreError, match="not 0123"):
        store.download_model("file:///models/0123", model)
    assert place.files == 2


def test_no_sink_without_store_or_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*COMPLETE, "AVRT_RUN_ID"]:
        monkeypatch.delenv(name, raising=False)
    assert store.checkpoint_sink("sft") is None
    monkeypatch.setenv("AVRT_S3_ENDPOINT", "h:1")
    assert store.checkpoint_sink("sft") is None
    monkeypatch.setenv("AVRT_RUN_ID", "r")
    assert store.checkpoint_sink("sft") is not None


def test_aws_variables_are_gone_after_a_download(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "mine")
    for name, value in {**COMPLETE, "AVRT_S3_ENDPOINT": "127.0.0.1:9", "AVRT_S3_SECURE": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("S3_MAX_ATTEMPTS", "1")
    before = dict(os.environ)
    with pytest.raises(StoreError):
        store.download_model("s3://avrt/models/m/0", tmp_path / "down")
    assert dict(os.environ) == before
