"""The paper's configurations: they load, and hold the paper's numbers wherever it gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import prompts
from avrt_lib.config import CORRECTION, PAPER, Config, Section, load
from avrt_lib.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EIGHT = ("avrt-3b", "avrt-7b")
ALL = (*EIGHT, "avrt-3b-1gpu")
#: What the workstation's configuration changes of the paper's numbers.
WORKSTATION = {"sft.learning_rate", "sft.deepspeed", "grpo.deepspeed"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config(name: str) -> Config:
    return load(ROOT / "configs" / f"{name}.yaml", pinned=False)


def sourced(section: Section, prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
    """Each field with a source: its value, the source's value, and the source."""
    found = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found.update(sourced(value, f"{prefix}{name}."))
        elif isinstance(info.json_schema_extra, dict) and "source" in info.json_schema_extra:
            extra = info.json_schema_extra
            found[f"{prefix}{name}"] = (value, extra["paper"], str(extra["source"]))
    return found


@pytest.mark.parametrize("name", ALL)
def test_it_loads_and_bears_its_files_name(name: str) -> None:
    assert config(name).name == name


@pytest.mark.parametrize("name", ALL)
def test_values_that_the_paper_gives_are_the_papers(name: str) -> None:
    allowed = WORKSTATION if name == "avrt-3b-1gpu" else set()
    fields = sourced(config(name)).items()
    differing = {key for key, (value, paper, source) in fields if source in (PAPER, CORRECTION) and value != paper}
    assert differing == allowed


@pytest.mark.parametrize("name", EIGHT)
def test_eight_processes_make_the_papers_effective_batch(name: str) -> None:
    sft = config(name).sft
    assert sft.per_device_batch * sft.gradient_accumulation * 8 == 32


@pytest.mark.parametrize(("name", "processes"), [("avrt-3b", 8), ("avrt-7b", 8), ("avrt-3b-1gpu", 1)])
def test_a_step_of_grpo_holds_whole_groups(name: str, processes: int) -> None:
    grpo = config(name).grpo
    assert grpo.per_device_batch * grpo.gradient_accumulation * processes % grpo.group_size == 0


def test_one_process_makes_the_papers_effective_batch_on_a_workstation() -> None:
    sft = config("avrt-3b-1gpu").sft
    assert sft.per_device_batch * sft.gradient_accumulation == 32


@pytest.mark.parametrize(("name", "student"), [("avrt-3b", "Omni-3B"), ("avrt-7b", "Omni-7B")])
def test_models_are_the_papers(name: str, student: str) -> None:
    loaded = config(name)
    assert loaded.teachers.vision.engine.model == "hub:moonshotai/Kimi-VL-A3B-Thinking"
    assert loaded.teachers.audio.engine.model == "hub:nvidia/audio-flamingo-3-hf/think"
    assert loaded.merger.engine.model == "hub:Qwen/Qwen2.5-14B-Instruct"
    assert loaded.student.model == f"hub:Qwen/Qwen2.5-{student}"


@pytest.mark.parametrize("name", ALL)
def test_its_prompts_exist(name: str) -> None:
    loaded = config(name)
    prompts.template("vision", loaded.teachers.vision.prompt)
    prompts.template("audio", loaded.teachers.audio.prompt)
    prompts.template("merger", loaded.merger.prompt)
    prompts.template("student", loaded.student.prompt)


@pytest.mark.parametrize("name", ALL)
def test_only_kimi_vl_may_bring_its_own_code(name: str) -> None:
    loaded = config(name)
    engines = (loaded.teachers.vision.engine, loaded.teachers.audio.engine, loaded.merger.engine, loaded.student)
    assert [part.trust_remote_code for part in engines] == [True, False, False, False]


@pytest.mark.parametrize("name", ALL)
def test_it_travels_as_a_pipelines_parameter(name: str) -> None:
    assert len(config(name).to_json().encode()) < 90_000


def test_the_workstation_trains_adapters_and_runs_one_engine_at_a_time() -> None:
    loaded = config("avrt-3b-1gpu")
    assert loaded.student.lora is not None
    assert loaded.teachers.parallelism == 1


# The lock, and a model's own code


def write(folder: Path, entries: dict[str, Any]) -> Path:
    (folder / "models.lock").write_text(json.dumps(entries))
    file = folder / "run.yaml"
    file.write_text((ROOT / "configs" / "avrt-3b.yaml").read_text(encoding="utf-8"))
    return file


def test_the_lock_gives_a_hub_model_its_address_and_commit(tmp_path: Path) -> None:
    file = write(tmp_path, {"Qwen/Qwen2.5-Omni-3B": {"revision": COMMIT, "model": "/models/omni"}})
    student = load(file).student
    assert (student.model, student.revision) == ("/models/omni", COMMIT)


def test_models_that_the_lock_does_not_know_stay_as_they_are(tmp_path: Path) -> None:
    file = write(tmp_path, {"Qwen/Qwen2.5-Omni-3B": {"revision": COMMIT, "model": "/models/omni"}})
    assert load(file).merger.engine.model == "hub:Qwen/Qwen2.5-14B-Instruct"


def test_another_commit_than_the_locks_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, {"Qwen/Qwen2.5-Omni-3B": {"revision": COMMIT, "model": "/models/omni"}})
    with pytest.raises(ConfigError, match=r"student\.revision"):
        load(file, {"student.revision": "f" * 40})


def test_a_damaged_lock_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, {"Qwen/Qwen2.5-Omni-3B": {}})
    with pytest.raises(ConfigError, match=r"models\.lock is damaged"):
        load(file)


@pytest.mark.parametrize(
    ("model", "revision", "why"),
    [
        ("/models/kimi", None, "pin it by revision"),
        ("/models/kimi", "main", "pin it by revision"),
        ("/models/kimi", COMMIT[:12], "pin it by revision"),
        ("s3://avrt/models/kimi/latest", COMMIT, "content hash"),
        ("moonshotai/Kimi-VL-A3B-Thinking", COMMIT, "no folder"),
        ("builtin:student", COMMIT, "no folder"),
    ],
)
def test_a_models_own_code_is_refused_unless_it_is_pinned_and_local(model: str, revision: str | None, why: str) -> None:
    changes = {"teachers.vision.engine.model": model, "teachers.vision.engine.revision": revision}
    with pytest.raises(ConfigError, match=why):
        load(ROOT / "configs" / "avrt-3b.yaml", changes, pinned=False)


@pytest.mark.parametrize("model", ["/models/kimi", f"s3://avrt/models/kimi/{'a' * 64}"])
def test_a_models_own_code_may_run_from_a_pinned_place(model: str) -> None:
    changes = {"teachers.vision.engine.model": model, "teachers.vision.engine.revision": COMMIT}
    assert load(ROOT / "configs" / "avrt-3b.yaml", changes, pinned=False).teachers.vision.engine.trust_remote_code


def test_adapters_and_zero_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"sft\.deepspeed"):
        load(ROOT / "configs" / "avrt-3b.yaml", {"student.lora": {}}, pinned=False)
