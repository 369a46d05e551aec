"""What `avrt gc` removes: an answering backend (tests/kfp_api.py), and a real object store and registry."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from minio import Minio
from mlflow import MlflowClient

from avrt_lib.cli import main as cli
from avrt_lib.errors import UsageError
from avrt_lib.store import LocalObjectServer
from avrt_lib.store.objects import client
from pipelines.commands import register
from pipelines.housekeeping import age
from tests.kfp_api import KfpApi, KubernetesApi

TEST = Path(__file__).parents[2] / "configs" / "clusters" / "test.yaml"
BUCKET = "avrt"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalObjectServer]:
    with LocalObjectServer(tmp_path_factory.mktemp("run") / "store", bucket=BUCKET) as running:
        yield running


@pytest.fixture
def store(server: LocalObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Minio]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    connection = client()
    if not connection.bucket_exists(BUCKET):
        connection.make_bucket(BUCKET)
    yield connection
    for item in list(connection.list_objects(BUCKET, recursive=True)):
        connection.remove_object(BUCKET, str(item.object_name))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KfpApi]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "none"))
    register(cli.app)
    with KfpApi() as running:
        running.experiments["e"] = {"experiment_id": "e", "display_name": "avrt"}
        yield running


def old(api: KfpApi, *, days: int = 40, state: str = "SUCCEEDED", experiment: str = "e") -> str:
    ended = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    api.frames = [(state, {})]
    return api.add_run({}, "a run", experiment_id=experiment, created_at=ended, finished_at=ended)


def put(store: Minio, *names: str) -> None:
    for name in names:
        store.put_object(BUCKET, name, io.BytesIO(b"x"), 1)


def there(store: Minio) -> set[str]:
    return {str(item.object_name) for item in store.list_objects(BUCKET, recursive=True)}


def gc(capsys: pytest.CaptureFixture[str], api: KfpApi, *more: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["gc", "--cluster", str(TEST), "--host", api.url, *more])
    code: Any = ended.value.code
    seen = capsys.readouterr()
    return code or 0, seen.out, seen.err


def test_old_runs_are_listed_and_only_yes_removes_them(api: KfpApi, capsys: pytest.CaptureFixture[str]) -> None:
    going = [old(api), old(api, state="FAILED")]
    kept = [old(api, days=2), old(api, state="RUNNING"), old(api, experiment="of others")]
    code, out, err = gc(capsys, api)
    assert code == 0
    assert {line.split()[1] for line in out.splitlines()} == set(going)
    assert "2 would be removed" in err
    assert len(api.runs) == 5
    assert gc(capsys, api, "--yes")[0] == 0
    assert set(api.runs) == set(kept)
    assert len(api.asked("POST", r"/runs/[^/]+:archive")) == 2


@pytest.mark.parametrize("text", ["x", "30", "-1d", "99999999999d", "٣d"])
def test_an_age_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--older-than takes a number"):
        age(text)
    assert datetime.now(UTC) - age("99999w")


def test_of_the_store_goes_what_belongs_to_no_run(
    api: KfpApi, store: Minio, capsys: pytest.CaptureFixture[str]
) -> None:
    going, kept, gone = old(api), old(api, days=0, state="RUNNING"), str(uuid.uuid4())
    keep = {
        f"checkpoints/{kept}/sft/checkpoint-1/manifest.json",
        "checkpoints/20261126-100000/sft/checkpoint-1/manifest.json",  # a run on somebody's machine
        "models/avrt-student/ab/manifest.json",
        f"v2/artifacts/avrt/{gone}/sft/model/weights",
        "reports/0123/ingest.json",
    }
    remove = {f"checkpoints/{gone}/grpo/checkpoint-9/manifest.json", f"runs/{going}/summary.json"}
    put(store, *keep, *remove)
    code, out, _ = gc(capsys, api, "--older-than", "0h")
    assert code == 0
    assert f"s3://{BUCKET}/checkpoints/{gone}/: 1 objects" in out
    assert there(store) == keep | remove
    assert gc(capsys, api, "--older-than", "0h", "--yes")[0] == 0
    assert there(store) == keep


def test_what_is_young_stays_in_the_store(api: KfpApi, store: Minio, capsys: pytest.CaptureFixture[str]) -> None:
    put(store, f"checkpoints/{uuid.uuid4()}/sft/checkpoint-1/manifest.json")
    assert gc(capsys, api, "--yes")[0] == 0
    assert len(there(store)) == 1


def test_registered_and_served_models_stay(
    api: KfpApi,
    store: Minio,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    registry = MlflowClient(tracking_uri=uri, registry_uri=uri)
    registry.create_registered_model("student")
    registry.create_model_version("student", f"s3://{BUCKET}/models/student/registered")
    keep = {f"models/student/{name}/manifest.json" for name in ("registered", "served")}
    keep.add("models/a-base-model/0123/manifest.json")
    put(store, *keep, "models/student/neither/manifest.json")
    with KubernetesApi() as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "kubeconfig")))
        cluster.services = [{"spec": {"predictor": {"model": {"storageUri": f"s3://{BUCKET}/models/student/served"}}}}]
        code, _, err = gc(capsys, api, "--older-than", "0h", "--models", "--yes")
        assert code == 0, err
        assert there(store) == keep
        cluster.forbidden = True
        code, _, err = gc(capsys, api, "--older-than", "0h", "--models", "--yes")
    assert (code, "which models are served" in err) == (7, True)


def test_an_age_that_is_none(api: KfpApi, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = gc(capsys, api, "--older-than", "soon")
    assert (code, "such as 30d" in err) == (2, True)
