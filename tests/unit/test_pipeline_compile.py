"""The compiled pipeline: the same bytes every time, no warnings, and what the backends need in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from avrt_lib import __version__
from avrt_lib.cluster.profile import load_profile
from avrt_lib.config import from_json, load
from avrt_lib.errors import ConfigError
from avrt_lib.steps import STEPS
from pipelines.compile import PIPELINES, compile_pipeline, main
from pipelines.options import MAX_CONFIG_BYTES, config_parameter

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "configs" / "miniature.yaml"


#: The steps of each pipeline; run_summary is the exit handler, which only a cluster has.
STEPS_OF = {
    "avrt": set(STEPS) - {"publish_traces", "import_traces", "run_summary"},
    "data": {
        "preflight",
        "ingest",
        "vision_teacher",
        "audio_teacher",
        "merger",
        "data_validation",
        "publish_traces",
    },
    "train": set(STEPS) - {"vision_teacher", "audio_teacher", "merger", "publish_traces", "run_summary"},
    "evaluate": {"preflight", "ingest", "evaluation"},
}


def _steps(document: dict[str, Any]) -> set[str]:
    return {_step(name) for name in document["deploymentSpec"]["executors"]}


def _step(executor: str) -> str:
    return executor.removeprefix("exec-").rstrip("-0123456789").replace("-", "_")


@pytest.mark.parametrize("pipeline", STEPS_OF)
@pytest.mark.parametrize("cluster", [None, "test"])
def test_each_pipeline_has_its_steps(tmp_path: Path, pipeline: str, cluster: str | None) -> None:
    profile = load_profile(ROOT / "configs" / "clusters" / f"{cluster}.yaml") if cluster else None
    compile_pipeline(load(MINIATURE), tmp_path / "p.yaml", cluster=profile, pipeline=pipeline)
    document = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text(encoding="utf-8")))
    assert _steps(document) == STEPS_OF[pipeline] | ({"run_summary"} if cluster else set())
    assert set(STEPS_OF) == set(PIPELINES)


@pytest.mark.parametrize(
    ("pipeline", "target"), [("avrt", "kserve"), ("train", "kserve"), ("data", "local"), ("evaluate", "local")]
)
def test_preflight_asks_for_a_place_to_deploy_to_only_where_the_pipeline_deploys(
    tmp_path: Path, pipeline: str, target: str
) -> None:
    config = load(MINIATURE, {"deployment.target": "kserve", "deployment.namespace": "team"})
    compile_pipeline(config, tmp_path / "p.yaml", pipeline=pipeline)
    document = yaml.safe_load((tmp_path / "p.yaml").read_text(encoding="utf-8"))
    task = document["root"]["dag"]["tasks"]["preflight"]
    given = from_json(task["inputs"]["parameters"]["config"]["runtimeValue"]["constant"])
    assert (given.deployment.target, given.deployment.namespace) == (target, "team")


def test_every_step_is_in_some_pipeline() -> None:
    assert {step for steps in STEPS_OF.values() for step in steps} | {"run_summary"} == set(STEPS)


def test_the_exit_handler_knows_what_its_pipeline_is_made_of(tmp_path: Path) -> None:
    profile = load_profile(ROOT / "configs" / "clusters" / "test.yaml")
    for pipeline, steps in STEPS_OF.items():
        compile_pipeline(load(MINIATURE), tmp_path / "p.yaml", cluster=profile, pipeline=pipeline)
        document = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text(encoding="utf-8")))
        handler = document["root"]["dag"]["tasks"]["run-summary"]
        assert handler["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
        components = handler["inputs"]["parameters"]["components"]["runtimeValue"]["constant"].split(",")
        assert {component.partition("-")[0] for component in components} == steps


def test_objects_for_a_backend_that_keeps_its_pipelines_in_kubernetes(tmp_path: Path) -> None:
    profile = load_profile(ROOT / "configs" / "clusters" / "test.yaml")
    texts = []
    for name in ("a.yaml", "b.yaml"):
        compile_pipeline(load(MINIATURE), tmp_path / name, cluster=profile, kubernetes=True)
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1]
    objects = list(yaml.safe_load_all(texts[0]))
    assert [each["kind"] for each in objects] == ["Pipeline", "PipelineVersion"]
    assert {each["metadata"]["namespace"] for each in objects} == {"kubeflow"}
    version = objects[1]["spec"]
    assert version["pipelineName"] == objects[0]["metadata"]["name"]
    assert "exec-sft" in version["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_pipeline(load(MINIATURE), output)
    return dict(yaml.safe_load(output.read_text(encoding="utf-8")))


def test_two_processes_compile_the_same_bytes_without_a_warning(tmp_path: Path) -> None:
    texts = []
    for seed in ("1", "2"):
        output = tmp_path / f"{seed}.yaml"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "error::UserWarning", "-W", "error::RuntimeWarning"]
        command += ["-m", "pipelines.compile", str(MINIATURE), str(output)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "warning" not in done.stderr.lower()
        texts.append(output.read_bytes())
    assert texts[0] == texts[1]


def test_it_is_ir_of_this_sdk(compiled: dict[str, Any]) -> None:
    assert compiled["schemaVersion"] == "2.1.0"
    assert compiled["sdkVersion"] == "kfp-2.17.3"


def test_every_component_takes_what_the_caches_must_know(compiled: dict[str, Any]) -> None:
    for name, component in compiled["components"].items():
        if "executorLabel" not in component:
            continue
        parameters = component["inputDefinitions"]["parameters"]
        assert {"config", "library_version", "data_hash", "image", "work"} <= set(parameters), name


def test_every_step_runs_in_the_image_that_its_dependencies_name(compiled: dict[str, Any]) -> None:
    executors = compiled["deploymentSpec"]["executors"]
    for name, executor in executors.items():
        assert executor["container"]["image"] == f"avrt/{STEPS[_step(name)].image}:{__version__}"


def test_nothing_is_installed_when_a_component_starts(compiled: dict[str, Any]) -> None:
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_training_waits_for_the_gate_and_the_gate_for_the_base(compiled: dict[str, Any]) -> None:
    tasks = compiled["root"]["dag"]["tasks"]
    assert "data-validation" in tasks["sft"]["dependentTasks"]
    assert "evaluation" in tasks["data-validation"]["dependentTasks"]
    parameters = tasks["evaluation"]["inputs"]["parameters"]
    assert parameters["role"]["runtimeValue"]["constant"] == "base"


def test_the_base_waits_for_the_merger_and_so_takes_no_gpu_beside_the_teachers(compiled: dict[str, Any]) -> None:
    tasks = compiled["root"]["dag"]["tasks"]
    assert "merger" in tasks["evaluation"]["dependentTasks"]
    assert {"vision-teacher-shards", "audio-teacher-shards"} <= set(tasks["merger"]["dependentTasks"])


def _texts(document: dict[str, Any]) -> dict[str, str]:
    """The configuration that each task is given."""
    dags = [document["root"], *document["components"].values()]
    tasks = {name: task for each in dags for name, task in each.get("dag", {}).get("tasks", {}).items()}
    given = {name: task.get("inputs", {}).get("parameters", {}).get("config") for name, task in tasks.items()}
    return {name: config["runtimeValue"]["constant"] for name, config in given.items() if config}


@pytest.mark.parametrize(
    ("key", "value", "touched"),
    [
        ("grpo.learning_rate", 3e-6, {"grpo"}),
        ("merger.max_words", 300, {"ingest", "merger", "data-validation"}),
        ("teachers.vision.engine.temperature", 0.5, {"vision-teacher", "audio-teacher"}),
        ("validation.minimum_rows", 20, {"data-validation"}),
        ("name", "another", set()),
        ("deployment.memory", "5Gi", set()),
    ],
)
def test_a_change_of_the_configuration_touches_the_steps_that_it_concerns(
    compiled: dict[str, Any], tmp_path: Path, key: str, value: object, touched: set[str]
) -> None:
    before = _texts(compiled)
    compile_pipeline(load(MINIATURE, {key: value}), tmp_path / "p.yaml")
    after = _texts(yaml.safe_load((tmp_path / "p.yaml").read_text(encoding="utf-8")))
    everything = {"preflight", "promotion", "deployment"}  # these get all of it, and are never cached
    assert {name for name, text in after.items() if text != before[name]} == touched | everything
    assert len(after) == len(STEPS_OF["avrt"]) + 2  # three evaluations


def test_each_task_can_read_what_it_is_given(compiled: dict[str, Any]) -> None:
    whole = load(MINIATURE)
    for name, text in _texts(compiled).items():
        step = STEPS[_step(name)]
        given = from_json(text)
        assert given == step.part(whole), name
        assert all(getattr(given, section) == getattr(whole, section) for section in step.sections)


def test_a_section_that_a_step_does_not_list_cannot_be_read(compiled: dict[str, Any]) -> None:
    with pytest.raises(AttributeError, match="no attribute 'grpo'"):
        from_json(_texts(compiled)["sft"]).grpo  # noqa: B018 - reading it is what is tested


def test_checks_and_publishing_are_never_taken_from_a_cache(compiled: dict[str, Any]) -> None:
    tasks = compiled["root"]["dag"]["tasks"]
    uncached = {name for name, task in tasks.items() if "cachingOptions" in task and not task["cachingOptions"]}
    uncached -= {"vision-teacher-shards", "audio-teacher-shards"}
    assert uncached == {"preflight", "promotion", "deployment"}


@pytest.mark.parametrize("shards", [1, 5])
def test_shards_come_from_the_configuration(tmp_path: Path, shards: int) -> None:
    config = load(MINIATURE, {"teachers.shards": shards, "teachers.parallelism": 3})
    compile_pipeline(config, tmp_path / "p.yaml")
    text = (tmp_path / "p.yaml").read_text(encoding="utf-8")
    items = ", ".join(map(str, range(shards)))
    assert text.count(f"raw: '[{items}]'") == 2
    assert text.count("parallelismLimit: 3") == 2


def test_the_configuration_travels_as_a_parameter_that_the_local_runner_does_not_change() -> None:
    config = load(MINIATURE, {"student.model": "/opt/python3/model"})
    text = config_parameter(config)
    assert "python3" not in text
    assert from_json(text) == config


def test_a_configuration_that_is_too_large_to_travel_is_refused() -> None:
    config = load(MINIATURE, {"student.model": "m" * MAX_CONFIG_BYTES})
    with pytest.raises(ConfigError, match="only 15000 can travel"):
        config_parameter(config)


def test_an_error_of_the_command_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(MINIATURE), str(tmp_path / "p.yaml"), "--cluster", str(tmp_path / "nope.yaml")])
    assert ended.value.code == ConfigError.exit_code
    assert (
        capsys.readouterr().err == f"There is no cluster profile {tmp_path / 'nope.yaml'}: name one with --cluster.\n"
    )
