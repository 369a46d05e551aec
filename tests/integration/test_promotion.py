"""A promotion from predictions to a published, registered model with its InferenceService."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from avrt_lib import promotion, store, tracking
from avrt_lib.code_version import code_version
from avrt_lib.config import load
from avrt_lib.models import write_manifest
from avrt_lib.promotion import manifest
from avrt_lib.records import Prediction
from avrt_lib.store import LocalObjectServer, ModelPlace
from avrt_lib.tables import read_json, write_json, write_table
from avrt_lib.workspace import Workspace

CONFIG = load(Path(__file__).parents[2] / "configs/miniature.yaml", {"deployment.gpus": 0})


def predictions(folder: Path, right: int) -> Path:
    rows = [
        Prediction(f"v{i}", "validation", f"v{i}", "both", "m", "av", "", 0, None, i < right, i < right, 9, 1, 1, 0.1)
        for i in range(60)
    ]
    write_table(folder, Prediction, rows)
    write_json(folder / "metrics.json", {"parity": {"max_difference": 0.01, "n": 4, "argmax_equal": True}})
    return folder


def trained(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(f'"{folder.name}"')
    write_manifest(folder, {"step": folder.name})
    return folder


@pytest.mark.slow
def test_the_champion_is_published_registered_and_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    parent = tracking.start_parent(CONFIG, tmp_path / "run-1", uri=uri, data_hash="d4t4")
    with LocalObjectServer(tmp_path / "store") as server:
        for name, value in {**server.environment, **parent}.items():
            monkeypatch.setenv(name, value)
        arguments = {
            "workspace": Workspace(tmp_path / "work", "promotion", tmp_path / "scratch"),
            "base_predictions": predictions(tmp_path / "b", 20),
            "sft_predictions": predictions(tmp_path / "s", 45),
            "grpo_predictions": predictions(tmp_path / "g", 55),
            "sft_model": trained(tmp_path / "sft"),
            "grpo_model": trained(tmp_path / "grpo"),
            "champion": tmp_path / "champion",
        }
        with tracking.step_run("promotion", CONFIG):
            facts = promotion.run(CONFIG, **arguments)
            again = promotion.run(CONFIG, **arguments)
        assert again == facts
        assert (facts["promoted"], facts["model"], facts["version"]) == (True, "grpo", 1)
        assert facts["test"]["wins"] == 35
        store.download_model(facts["uri"], tmp_path / "down")
        assert (tmp_path / "down/config.json").read_text() == '"grpo"'

    registered = MlflowClient(uri, uri).get_model_version_by_alias("avrt-miniature", "champion")
    assert registered.source == facts["uri"]
    assert registered.tags["sha256"] == facts["sha256"]
    assert (registered.tags["data_hash"], registered.tags["config_hash"]) == ("d4t4", CONFIG.sha256)
    assert registered.tags["code_version"] == code_version()
    assert registered.tags["made_by"] == "{'step': 'grpo'}"

    written = read_json(tmp_path / "champion/champion.json")
    assert written["isvc"] == "inferenceservice.yaml"
    document = yaml.safe_load((tmp_path / "champion/inferenceservice.yaml").read_text())
    assert document["apiVersion"] == "serving.kserve.io/v1beta1"
    assert document["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
    predictor = document["spec"]["predictor"]
    assert predictor["model"]["storageUri"] == f"s3://avrt/models/avrt-miniature/{facts['sha256']}"
    assert predictor["model"]["modelFormat"] == {"name": "vLLM"}
    assert predictor["serviceAccountName"] == "avrt-models"


def test_the_manifest_has_no_empty_field_and_tells_the_launcher_of_training() -> None:
    config = CONFIG.model_copy(update={"deployment": CONFIG.deployment.model_copy(update={"gpus": 2})})
    document = manifest.to_dict(manifest.inference_service(config, ModelPlace("s3://avrt/models/m/1", "1", 1), None))

    def leaves(node: object) -> list[object]:
        if isinstance(node, dict):
            return [leaf for value in node.values() for leaf in leaves(value)] or [node]
        if isinstance(node, list):
            return [leaf for value in node for leaf in leaves(value)] or [node]
        return [node]

    assert all(leaf not in (None, "", {}, []) for leaf in leaves(document))
    model = document["spec"]["predictor"]["model"]
    assert "name" not in model
    assert model["args"] == ["--dtype=float32", "--max-model-len=2048", "--frames=4", "--video-longest-side-px=28"]
    assert model["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "2"}
