"""Pulling from a hub over HTTP into a folder and into a real object store, and fetching from there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import models
from avrt_lib.config import load
from avrt_lib.errors import ConfigError, DiskFullError, StoreError
from avrt_lib.hub import cache
from avrt_lib.hub.importing import import_folder
from avrt_lib.models import verify_manifest
from avrt_lib.store import LocalObjectServer, client
from avrt_lib.tables import read_json

pytest.importorskip("torch")
pytest.importorskip("huggingface_hub")

from tests import hub_layouts

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_secret_of_this_test"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three published models: a text model with files that must stay behind, one with an adapter, one with code."""
    root = tmp_path_factory.mktemp("repositories")
    qwen = hub_layouts.save_qwen(root / "qwen")
    (qwen / "spk_dict.pt").write_bytes(b"a pickle that nobody asked for")
    (qwen / "README.md").write_text("a card")
    flamingo = hub_layouts.save_flamingo(root / "flamingo")
    hub_layouts.add_think(flamingo)
    pickled = hub_layouts.save_qwen(root / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    return {
        "Qwen/Tiny": qwen,
        "nvidia/audio-flamingo-3-hf": flamingo,
        "moonshotai/Kimi-VL-A3B-Thinking": hub_layouts.save_with_code(root / "kimi"),
        "old/pickled": pickled,
    }


@pytest.fixture(scope="module")
def hub(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    with hub_layouts.serving(repositories) as served:
        yield served


def avrt_models(*arguments: str, endpoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``avrt models`` as a user does: in a process of its own, which may ask the hub."""
    code = "import sys; from avrt_lib.cli.models import app; from avrt_lib.cli.console import fail\n" + (
        "try: app(sys.argv[1:], standalone_mode=False)\nexcept Exception as e: sys.exit(fail(e, debug=False))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def pulled(hub: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration beside the lock file that pulling all of its models wrote."""
    root = tmp_path_factory.mktemp("pulled")
    config = root / "run.yaml"
    text = (ROOT / "configs" / "avrt-3b.yaml").read_text(encoding="utf-8")
    text = re.sub(r"hub:Qwen/\S+", "hub:Qwen/Tiny", text)
    config.write_text(text, encoding="utf-8")
    done = avrt_models("pull", "--config", str(config), "--to", str(root / "models"), endpoint=hub[0])
    assert done.returncode == 0, done.stderr
    return config


def test_the_lock_has_the_commit_of_each_model(pulled: Path) -> None:
    entries = read_json(pulled.parent / "models.lock")
    assert {name: entry["revision"] for name, entry in entries.items()} == dict.fromkeys(
        ["Qwen/Tiny", "moonshotai/Kimi-VL-A3B-Thinking", "nvidia/audio-flamingo-3-hf/think"], hub_layouts.COMMIT
    )


def test_the_configuration_then_names_local_folders(pulled: Path) -> None:
    config = load(pulled)
    for model in (config.teachers.vision.engine.model, config.teachers.audio.engine.model, config.student.model):
        verify_manifest(models.resolve(model))


def test_a_models_own_code_is_allowed_once_it_is_pinned(pulled: Path) -> None:
    engine = load(pulled).teachers.vision.engine
    assert engine.trust_remote_code
    assert engine.revision == hub_layouts.COMMIT


def test_pickles_and_the_hubs_own_files_stay_behind(pulled: Path, repositories: dict[str, Path]) -> None:
    folder = Path(load(pulled).student.model)
    names = {path.name for path in folder.iterdir()}
    assert names == {p.name for p in repositories["Qwen/Tiny"].iterdir()} - {"spk_dict.pt"} | {"manifest.json"}


def test_a_pulled_model_is_what_the_hub_has(pulled: Path, repositories: dict[str, Path]) -> None:
    folder = Path(load(pulled).student.model)
    assert (folder / "model.safetensors").read_bytes() == (repositories["Qwen/Tiny"] / "model.safetensors").read_bytes()


def test_nothing_is_left_of_the_pull_but_the_models(pulled: Path) -> None:
    incoming = (pulled.parent / "models" / ".incoming").rglob("*")
    assert not [path for path in incoming if path.is_file() and path.suffix != ".lock"]


def test_a_model_without_safetensors_is_refused(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    done = avrt_models("pull", "old/pickled", "--to", str(tmp_path), endpoint=hub[0])
    assert done.returncode == ConfigError.exit_code
    assert "publishes no safetensors" in done.stderr


def test_a_revision_that_is_not_there_is_named(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    done = avrt_models("pull", "Qwen/Tiny@nowhere", "--to", str(tmp_path), endpoint=hub[0])
    assert "has no revision nowhere" in done.stderr


def test_offline_says_how_models_come_by_disk(tmp_path: Path) -> None:
    done = avrt_models("pull", "Qwen/Tiny", "--to", str(tmp_path), endpoint="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 7
    assert "avrt models import" in done.stderr


def test_a_hub_that_does_not_answer_is_an_environment_problem(tmp_path: Path) -> None:
    done = avrt_models("pull", "Qwen/Tiny", "--to", str(tmp_path), endpoint="http://127.0.0.1:9")
    assert done.returncode == 7
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr


def test_a_gated_model_needs_a_token_which_is_never_shown(repositories: dict[str, Path], tmp_path: Path) -> None:
    with hub_layouts.serving(repositories, token=TOKEN) as (endpoint, _):
        lock = ("--lock", str(tmp_path / "models.lock"))
        without = avrt_models("pull", "Qwen/Tiny", "--to", str(tmp_path), *lock, endpoint=endpoint, HF_TOKEN="")
        given = avrt_models("pull", "Qwen/Tiny", "--to", str(tmp_path), *lock, endpoint=endpoint, HF_TOKEN=TOKEN)
    assert "accept its terms" in without.stderr
    assert given.returncode == 0, given.stderr
    assert TOKEN not in given.stdout + given.stderr + (tmp_path / "models.lock").read_text()


def test_a_pull_that_was_cut_short_fetches_only_what_is_missing(repositories: dict[str, Path], tmp_path: Path) -> None:
    staged = tmp_path / ".incoming" / f"tiny-{hub_layouts.COMMIT}"
    lock = ("--lock", str(tmp_path / "models.lock"))
    with hub_layouts.serving(repositories) as (endpoint, sent):
        avrt_models("pull", "Qwen/Tiny", "--to", str(tmp_path), *lock, endpoint=endpoint)
        address = read_json(tmp_path / "models.lock")["Qwen/Tiny"]["model"]
        # As a kill before the last file would leave it.
        shutil.copytree(address, staged, ignore=shutil.ignore_patterns("manifest.json", "config.json"))
        shutil.rmtree(address)
        sent.clear()
        done = avrt_models("pull", "Qwen/Tiny", "--to", str(tmp_path), *lock, endpoint=endpoint)
    assert done.returncode == 0, done.stderr
    assert "config.json" in sent
    assert "model.safetensors" not in sent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalObjectServer]:
    with LocalObjectServer(tmp_path_factory.mktemp("store") / "store") as running:
        yield running


@pytest.fixture
def in_store(
    store: LocalObjectServer, repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> str:
    """The address of a model in the store; the cache of this test is empty."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AVRT_MODEL_CACHE", str(tmp_path / "cache"))
    return import_folder(repositories["moonshotai/Kimi-VL-A3B-Thinking"], "s3://avrt", name="a/kimi").address


def test_a_published_model_is_fetched_and_is_the_same(in_store: str, repositories: dict[str, Path]) -> None:
    folder = models.resolve(in_store)
    verify_manifest(folder)
    original = repositories["moonshotai/Kimi-VL-A3B-Thinking"] / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == original.read_bytes()


def test_it_is_fetched_once(in_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = models.resolve(in_store)
    monkeypatch.setenv("AVRT_S3_ENDPOINT", "127.0.0.1:9")
    assert models.resolve(in_store) == first


def test_a_fetched_model_that_lost_a_file_is_fetched_again(in_store: str) -> None:
    folder = models.resolve(in_store)
    (folder / "model.safetensors").unlink()
    verify_manifest(models.resolve(in_store))


@pytest.mark.parametrize("text", [None, "{", "{}"], ids=["gone", "cut short", "empty"])
def test_a_fetched_model_that_lost_its_manifest_is_checked_and_keeps_its_files(in_store: str, text: str | None) -> None:
    folder = models.resolve(in_store)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    (folder / "config.json").write_text("damaged")
    (folder / "other.safetensors").write_text("nobody published it")
    verify_manifest(models.resolve(in_store))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_download_that_was_cut_short_goes_on(in_store: str) -> None:
    folder = models.resolve(in_store)
    partial = folder.with_name(f".{folder.name}.partial")
    folder.rename(partial)
    (partial / "config.json").unlink()
    before = (partial / "model.safetensors").stat().st_mtime_ns
    assert (models.resolve(in_store) / "model.safetensors").stat().st_mtime_ns == before


def test_an_object_that_was_changed_in_the_store_is_refused(in_store: str) -> None:
    import io

    key = in_store.removeprefix("s3://avrt/") + "/config.json"
    original = client().get_object("avrt", key).data
    changed = original.replace(b"qwen2", b"qwen3")
    client().put_object("avrt", key, io.BytesIO(changed), len(changed))
    try:
        with pytest.raises(StoreError, match=r"config\.json is not what the manifest says"):
            models.resolve(in_store)
    finally:
        client().put_object("avrt", key, io.BytesIO(original), len(original))


def test_an_address_without_a_hash_is_refused() -> None:
    with pytest.raises(ConfigError, match="content hash"):
        models.resolve("s3://avrt/models/kimi/latest")


def test_a_model_that_is_not_there_is_named(in_store: str) -> None:
    with pytest.raises(StoreError, match="holds no model"):
        models.resolve(in_store[:-64] + "0" * 64)


def test_a_disk_that_is_too_small_is_found_before_the_download(in_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = shutil.disk_usage("/")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DiskFullError, match="AVRT_MODEL_CACHE"):
        models.resolve(in_store)


def test_nothing_with_a_pickle_enters_the_store(in_store: str, repositories: dict[str, Path]) -> None:
    from avrt_lib.errors import DataError

    with pytest.raises(DataError, match="pickle"):
        import_folder(repositories["Qwen/Tiny"], "s3://avrt")


def test_the_manifest_in_the_store_says_where_the_model_is_from(in_store: str) -> None:
    text = client().get_object("avrt", in_store.removeprefix("s3://avrt/") + "/manifest.json").data
    assert json.loads(text)["made_by"]["model"] == "a/kimi"
