"""Components: their bodies call the step of their name, and their folders are complete."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from kfp import dsl

from avrt_lib import steps
from avrt_lib.steps import STEPS, scalars
from components import readme

ROOT = Path(__file__).parents[2]
NAMES = readme.names()


def test_every_step_has_a_component() -> None:
    assert set(NAMES) == set(STEPS)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_complete(name: str) -> None:
    folder = ROOT / "components" / name
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))
    assert metadata["name"] == name
    assert metadata["image"] == STEPS[name].image
    assert (folder / "README.md").read_text(encoding="utf-8") == readme.render(name), "python -m components.readme"


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_described(name: str) -> None:
    function = readme.component(name).python_func
    text = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert f"    {parameter}: " in text


@pytest.mark.parametrize("name", NAMES)
def test_a_step_takes_what_it_is_listed_with_and_nothing_else(name: str) -> None:
    step = STEPS[name]
    taken = set(inspect.signature(importlib.import_module(step.module).run).parameters)
    assert taken == {"config", "workspace", *step.inputs, *step.outputs, *step.params}


class _Recorder:
    """Stands for ``run_step``: keeps what it was given."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __call__(self, name: str, **given: Any) -> dict[str, Any]:
        self.calls.append((name, given))
        return {"n": 3, "by_kind": {"both": 0.5}, "uri": "s3://avrt/m", "sha256": "ab"}


@pytest.mark.parametrize("name", NAMES)
def test_the_body_calls_its_step_with_its_inputs_and_outputs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = _Recorder()
    recorder.calls.clear()
    monkeypatch.setattr(steps, "run_step", recorder)
    function = readme.component(name).python_func
    artifacts = {
        key: dsl.Artifact(name=key, uri=str(tmp_path / key))
        for key in (*STEPS[name].inputs, *STEPS[name].outputs, "validated")
    }
    artifacts["metrics"] = dsl.Metrics(name="metrics", uri=str(tmp_path / "metrics"))
    given: dict[str, Any] = {"config": "{}", "library_version": "1", "data_hash": "d", "image": "i", "work": "/w"}
    given |= {"shard": 1, "role": "sft", "source": "s3://avrt/traces/ab", "components": "preflight,ingest"}
    given["status"] = dsl.PipelineTaskFinalStatus(
        state="COMPLETE",
        pipeline_job_resource_name="avrt-1",
        pipeline_task_name="exit-handler-1",
        error_code=None,
        error_message=None,
    )
    for key in ("vision_traces", "audio_traces"):
        given[key] = [dsl.Artifact(name=key, uri=str(tmp_path / f"{key}-{shard}")) for shard in (0, 1)]
    arguments = {key: given.get(key, artifacts.get(key)) for key in inspect.signature(function).parameters}
    returned = function(**arguments)
    ((called, call),) = recorder.calls
    assert called == name
    assert set(call["inputs"]) == set(STEPS[name].inputs)
    assert call["outputs"] == {key: str(tmp_path / key) for key in STEPS[name].outputs}
    assert set(call.get("params") or {}) == set(STEPS[name].params)
    assert (call["config"], call["work"], call["library_version"]) == ("{}", "/w", "1")
    if name == "promotion":
        assert tuple(returned) == ("s3://avrt/m", "ab")
    if name == "publish_traces":
        assert returned == "s3://avrt/m"
    if name == "run_summary":
        assert call["params"] == {"status": "COMPLETE", "components": "preflight,ingest"}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, {}),
        ({"n": 4, "ok": True, "text": "x", "none": None}, {"n": 4.0, "ok": 1.0}),
        ({"a": {"b": {"c": 2}}}, {"a.b.c": 2.0}),
        ({"nan": float("nan"), "inf": float("inf"), "x": 0.5}, {"x": 0.5}),
        ({"list": [1, 2]}, {}),
    ],
)
def test_scalars(facts: dict[str, Any], expected: dict[str, float]) -> None:
    assert scalars(facts) == expected


def test_the_library_imports_no_kfp_components_or_pipelines() -> None:
    code = (
        "import sys, avrt_lib.cli.main, avrt_lib.cli.run, avrt_lib.cli.serve, avrt_lib.cli.step, avrt_lib.cli.doctor, "
        "avrt_lib.local_run, avrt_lib.steps, avrt_lib.preflight, avrt_lib.report.summary; "
        "found = {name.split('.')[0] for name in sys.modules} & {'kfp', 'components', 'pipelines', 'torch', 'mlflow'}; "
        "sys.exit(', '.join(sorted(found)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
