"""Plans: what is counted in a compiled pipeline, and the arithmetic behind hours, memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avrt_lib.cluster.profile import Profile, load_profile
from avrt_lib.config import Config, load
from avrt_lib.errors import UsageError
from avrt_lib.planning import Plan, graph, make
from avrt_lib.planning.models import KNOWN, size_of

ROOT = Path(__file__).resolve().parents[2]
TRIVIAL: dict[str, Any] = {"componentRef": {"name": "comp-step"}}
COMPONENTS: dict[str, Any] = {"comp-step": {"executorLabel": "exec-step"}}


def task(after: list[str] | None = None, component: str = "comp-step", **more: Any) -> dict[str, Any]:
    return {"componentRef": {"name": component}, "dependentTasks": after or [], **more}


def loop(items: int, parallelism: int, after: list[str] | None = None, component: str = "comp-body") -> dict[str, Any]:
    return task(
        after,
        component,
        parameterIterator={"items": {"raw": str(list(range(items)))}},
        iteratorPolicy={"parallelismLimit": parallelism},
    )


def spec(tasks: dict[str, Any], **components: Any) -> dict[str, Any]:
    named = {f"comp-{name}": {"dag": {"tasks": inner}} for name, inner in components.items()}
    return {"root": {"dag": {"tasks": tasks}}, "components": {**COMPONENTS, **named}}


CHAIN = spec({"a": task(), "b": task(["a"]), "c": task(["b"])})
#: A loop of eight over a nested pipeline of one task, between two tasks, two at a time.
LOOP = spec(
    {"a": task(), "loop": loop(8, 2, ["a"]), "z": task(["loop"])},
    body={"inner": task([], "comp-nested")},
    nested={"step": task()},
)


def overhead(document: dict[str, Any]) -> graph.GraphCost:
    return graph.cost(document, 10, lambda name: 0.0)


def test_a_chain_of_three_tasks_is_seven_pods_and_seventy_seconds() -> None:
    found = overhead(CHAIN)
    assert (found.pods, found.overhead_s) == (7, 70)


def test_a_loop_has_the_pods_that_a_real_backend_made() -> None:
    assert overhead(LOOP).pods == 38


def test_a_loops_waves_are_within_a_tenth_of_what_a_real_backend_took() -> None:
    assert overhead(LOOP).overhead_s == pytest.approx(244, rel=0.15)


def test_tasks_side_by_side_cost_the_longest_alone() -> None:
    beside = spec({"a": task(), "b": task(), "c": task(["a", "b"])})
    assert overhead(beside).overhead_s == 50


def test_work_is_added_along_the_longest_path() -> None:
    assert graph.cost(CHAIN, 10, lambda name: 100.0).wall_s == 370


# Plans

SHARDS = {"vision": loop(8, 4, component="comp-vision"), "audio": loop(8, 4, component="comp-audio")}
RUN = {
    "root": {"dag": {"tasks": {**SHARDS, "grpo": task(["vision", "audio"], "comp-grpo")}}},
    "components": {
        "comp-vision": {"dag": {"tasks": {"v": task([], "comp-vision-teacher")}}},
        "comp-audio": {"dag": {"tasks": {"a": task([], "comp-audio-teacher")}}},
        "comp-vision-teacher": {"executorLabel": "v"},
        "comp-audio-teacher": {"executorLabel": "a"},
        "comp-grpo": {"executorLabel": "g"},
    },
}


def config(name: str, **changes: Any) -> Config:
    return load(ROOT / "configs" / f"{name}.yaml", {k.replace("__", "."): v for k, v in changes.items()}, pinned=False)


def plan(name: str = "avrt-3b", changes: dict[str, Any] | None = None, **options: Any) -> Plan:
    return make(config(name, **(changes or {})), RUN, **options)


def memory_of(step: str, made: Plan) -> Any:
    return next(item for item in made.memories if item.step == step)


def test_gpu_hours_are_those_of_all_tasks() -> None:
    made = plan()
    steps = made.to_json()["steps"].values()
    assert made.gpu_hours == pytest.approx(sum(step["gpu_hours"] for step in steps), abs=0.05)


def test_cost_is_gpu_hours_times_the_price() -> None:
    made = plan(price=2.0).to_json()
    assert made["cost"] == pytest.approx(2 * made["gpu_hours"], abs=0.02)


def test_without_a_price_there_is_no_cost() -> None:
    assert plan().to_json()["cost"] is None


def test_more_samples_take_longer() -> None:
    assert plan(samples=80_000).wall_s > 1.5 * plan(samples=40_000).wall_s


def test_one_source_is_shared_out_over_the_splits() -> None:
    changes = {"data.train": None, "data.validation": None, "data.test": None}
    changes |= {"data.all": {"format": "manifest", "path": "/data/q.csv", "count": 1000}}
    assert plan(changes=changes).samples == {"train": 700, "validation": 100, "test": 200}
    assert plan(changes=changes | {"data.overlap_splits": True}).samples == dict.fromkeys(
        ("train", "validation", "test"), 1000
    )


def test_an_assumption_of_ones_own_changes_the_plan() -> None:
    slow = plan(assume={"vision_tokens_per_s": 250})
    assert slow.needs["vision_teacher"].seconds > 5 * plan().needs["vision_teacher"].seconds


def test_a_measured_step_takes_the_place_of_a_derived_one() -> None:
    made = plan(assume={"grpo_s_per_step": 10, "training_start_s": 0})
    assert made.needs["grpo"].seconds == 10 * 4898


def test_an_unknown_assumption_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="peak_tflops"):
        plan(assume={"speed": 1})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"assume": {"prefill_tokens_per_s": 0.0}}, "prefill_tokens_per_s=0: give a number above 0"),
        ({"assume": {"pod_s": -1.0}}, "pod_s=-1: give a number of 0 or more"),
        ({"assume": {"pod_s": float("nan")}}, "of 0 or more"),
        ({"gpu_memory_gib": -5.0}, "--gpu-memory takes GiB above 0, not -5"),
    ],
)
def test_numbers_that_cannot_be_reckoned_with_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(**options)


def test_hours_of_gpus_on_a_cluster_without_any_are_said() -> None:
    profile = load_profile(ROOT / "configs" / "clusters" / "test.yaml")
    said = "test runs the CPU images"
    assert any(said in warning for warning in plan(profile=profile).warnings)
    assert not any(said in warning for warning in plan("miniature", profile=profile).warnings)


def test_steps_are_counted_as_training_counts_them() -> None:
    loop_module = pytest.importorskip("avrt_lib.training.loop")
    loaded = config("avrt-7b")
    wanted = loop_module.steps_for(39182, loaded.grpo, epochs=1, max_steps=None, rows_per_step=8)
    assert f"{wanted:,} steps" in plan("avrt-7b").needs["grpo"].note


def test_offload_moves_the_optimizer_to_the_host() -> None:
    offloaded, kept = plan(), plan(changes={"sft__deepspeed": "zero2"})
    assert "optimizer" not in memory_of("sft", offloaded).parts
    assert memory_of("sft", kept).parts["optimizer"] == pytest.approx(12 * 3.4e9 / 8 / 2**30, rel=0.01)


def test_grpo_holds_a_reference_only_for_its_kl_term() -> None:
    assert "reference" in memory_of("grpo", plan()).parts
    assert "reference" not in memory_of("grpo", plan(changes={"grpo__kl_beta": 0})).parts


def test_adapters_need_less_memory_than_all_weights() -> None:
    adapters = memory_of("sft", plan("avrt-3b-1gpu"))
    whole = memory_of("sft", plan("avrt-3b-1gpu", {"student__lora": None}))
    assert adapters.gpu_gib < 0.5 * whole.gpu_gib


def test_every_paper_configuration_fits_its_gpus() -> None:
    made = [plan("avrt-3b"), plan("avrt-7b"), plan("avrt-3b-1gpu", gpu_memory_gib=48)]
    assert not [warning for one in made for warning in one.warnings if " GiB of a GPU" in warning]


def test_a_gpu_that_is_too_small_is_said() -> None:
    warnings = plan("avrt-3b-1gpu", gpu_memory_gib=24).warnings
    (said,) = [warning for warning in warnings if warning.startswith("vision_teacher needs")]
    assert said.endswith("GiB of a GPU that has 24, 21.6 with gpu_memory_utilization.")


def test_an_engine_must_fit_into_its_share_of_the_gpu() -> None:
    whole = memory_of("vision_teacher", plan("avrt-3b-1gpu", gpu_memory_gib=48))
    warnings = plan("avrt-3b-1gpu", gpu_memory_gib=whole.gpu_gib + 0.1).warnings
    assert any(warning.startswith("vision_teacher needs") for warning in warnings)


def test_groups_that_do_not_fill_a_step_are_said() -> None:
    warnings = plan("avrt-3b-1gpu", {"grpo__gradient_accumulation": 1, "grpo__per_device_batch": 2}).warnings
    assert any("whole groups" in warning for warning in warnings)


def test_the_papers_batch_is_that_of_the_configured_processes() -> None:
    assert "steps of 32 rows" in plan("avrt-3b").needs["sft"].note


def test_without_a_number_of_processes_there_is_one_for_each_gpu() -> None:
    made = plan(changes={"sft__processes": None}, training_gpus=4)
    assert "steps of 16 rows" in made.needs["sft"].note


def test_processes_that_are_not_as_many_as_the_gpus_are_said() -> None:
    assert "sft.processes is 8, but the step gets 4 GPUs." in plan(training_gpus=4).warnings


def test_an_unknown_model_is_said_and_left_out() -> None:
    made = plan(changes={"merger__engine__model": "/no/such/merger"})
    assert any(warning.startswith("/no/such/merger") for warning in made.warnings)
    assert "merger" not in [item.step for item in made.memories]


def test_an_endpoints_gpus_are_not_counted() -> None:
    endpoint = {"kind": "endpoint", "model": "kimi", "base_url": "http://teacher/v1"}
    assert plan(changes={"teachers__vision__engine": endpoint}).needs["vision_teacher"].gpus == 0


def test_the_miniature_asks_for_no_gpu() -> None:
    made = plan("miniature")
    assert (made.gpu_hours, made.memories) == (0, [])


def test_a_model_that_lies_here_is_counted_by_its_files() -> None:
    size = size_of("builtin:student")
    assert size is not None
    assert size.source == "its files"
    assert 0.5e6 < size.language < size.parameters < 2e6


def test_a_pinned_model_is_known_by_the_name_under_which_it_was_published() -> None:
    assert size_of(f"s3://avrt/models/qwen2.5-omni-7b/{'a' * 64}") == KNOWN["Qwen/Qwen2.5-Omni-7B"]


def test_the_profile_gives_gpus_and_the_memory_of_each_steps_pool() -> None:
    profile = load_profile(ROOT / "configs" / "clusters" / "gke.yaml")
    made = plan(profile=profile)
    assert made.needs["sft"].gpus == profile.pools["training"].gpus
    assert {item.step: item.of_gib for item in made.memories} == {
        item.step: profile.pool(item.step).gpu_memory_gib for item in made.memories
    }
    assert memory_of("merger", made).of_gib < memory_of("sft", made).of_gib


def test_a_teacher_that_its_own_pool_cannot_hold_is_said() -> None:
    document = load_profile(ROOT / "configs" / "clusters" / "onprem-h100.yaml").model_dump()
    document["pools"]["teacher"]["gpu_memory_gib"] = 24
    said = [warning for warning in plan(profile=Profile.model_validate(document)).warnings if "of a GPU" in warning]
    assert [warning.split()[0] for warning in said] == ["vision_teacher"]


def test_an_offloading_process_needs_what_one_was_measured_to_need() -> None:
    """One process with the 3B student had 72.8 GiB of its host (benchmarks/student_on_gpu.py on an H200)."""
    one = memory_of("sft", plan(changes={"sft__processes": 1}))
    assert one.host_gib == pytest.approx(72.8, rel=0.03)
