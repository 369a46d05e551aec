"""Compiled pipelines for tests, and the golden outlines of the miniature's for every profile.

``python -m tests.golden.compiled`` writes the outlines anew; look at what changed before committing them. With a folder
as its argument it compiles everything there instead.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from avrt_lib.cluster.profile import Profile, load_profile
from avrt_lib.config import load
from components.images import Images
from pipelines.compile import PIPELINES, compile_pipeline

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
PROFILES = sorted(path.stem for path in (ROOT / "configs" / "clusters").glob("*.yaml"))
#: What is built on this machine does not matter to these tests.
IMAGES = Images(*(f"registry.example.com/avrt/{name}:1" for name in ("pipeline", "train", "vllm")))
GOLDEN = {name: Path(__file__).parent / f"miniature-{name}.yaml" for name in PROFILES}


class Case(NamedTuple):
    """A profile, a configuration, and one of the pipelines."""

    profile: str
    config: str
    pipeline: str = "avrt"


class Compiled(NamedTuple):
    """The two documents of a compiled pipeline."""

    ir: dict[str, Any]
    platform: dict[str, Any]

    @property
    def executors(self) -> dict[str, dict[str, Any]]:
        """The containers by executor."""
        return {name: each["container"] for name, each in self.ir["deploymentSpec"]["executors"].items()}

    @property
    def placed(self) -> dict[str, dict[str, Any]]:
        """The platform's settings by executor."""
        return dict(self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"])

    def tasks(self) -> Iterator[tuple[str, dict[str, Any], int]]:
        """Every task that is one pod or more: its executor, the task, and how many there are of it."""

        def walk(dag: dict[str, Any], times: int) -> Iterator[tuple[str, dict[str, Any], int]]:
            for task in dag["tasks"].values():
                component = self.ir["components"][task["componentRef"]["name"]]
                items = task.get("parameterIterator", {}).get("items", {}).get("raw")
                count = times * (len(json.loads(items)) if items else 1)
                if "dag" in component:
                    yield from walk(component["dag"], count)
                else:
                    yield component["executorLabel"], task, count

        yield from walk(self.ir["root"]["dag"], 1)


def cases() -> list[Case]:
    """The whole path for every profile and configuration, and the other pipelines for one of each."""
    whole = [Case(profile, config) for profile in PROFILES for config in CONFIGS]
    return whole + [Case("test", "miniature", pipeline) for pipeline in PIPELINES if pipeline != "avrt"]


def profile_of(name: str) -> Profile:
    """A profile that comes with the package."""
    return load_profile(ROOT / "configs" / "clusters" / f"{name}.yaml")


def compile_case(case: Case, output: Path, *, data_hash: str = "0123", **settings: Any) -> None:
    """Compile one case as `avrt compile` does, with further settings of the configuration."""
    profile = profile_of(case.profile)
    config = load(ROOT / "configs" / f"{case.config}.yaml", profile.overrides | settings)
    compile_pipeline(config, output, IMAGES, profile, data_hash=data_hash, pipeline=case.pipeline)


@cache
def compiled_bytes(case: Case) -> bytes:
    """The file of one case."""
    with tempfile.TemporaryDirectory() as folder:
        compile_case(case, path := Path(folder) / "pipeline.yaml")
        return path.read_bytes()


@cache
def compiled(case: Case) -> Compiled:
    """One case."""
    return read(compiled_bytes(case))


def read(document: bytes) -> Compiled:
    """The documents of a compiled file."""
    return Compiled(*yaml.load_all(document, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def step_of(executor: str) -> str:
    """The step that an executor runs.

    >>> step_of("exec-vision-teacher"), step_of("exec-evaluation-2")
    ('vision_teacher', 'evaluation')
    """
    return executor.removeprefix("exec-").rstrip("-0123456789").replace("-", "_")


def outline(case: Case) -> dict[str, Any]:
    """What a compiled pipeline asks of the cluster: no code, no versions, nothing of the configuration."""
    found = compiled(case)
    executors = {}
    for name, container in found.executors.items():
        variables = {each["name"]: each.get("value", "") for each in container["env"]}
        variables.pop("AVRT_CLUSTER_PROFILE", None)
        resources = {key: value for key, value in container["resources"].items() if key.startswith("resource")}
        accelerator = container["resources"].get("accelerator", {})
        resources |= {key: value for key, value in accelerator.items() if key.startswith("resource")}
        settings = {"image": container["image"], "resources": resources, "environment": variables}
        executors[name] = settings | _without_doubles(found.placed[name])
    tasks = {
        task["taskInfo"]["name"]: {
            "executor": executor,
            "pods": pods,
            "after": task.get("dependentTasks", []),
            "cached": task["cachingOptions"].get("enableCache", False),
            "retries": task.get("retryPolicy", {}),
        }
        for executor, task, pods in found.tasks()
    }
    usual = _usual(list(executors.values()))
    return {
        "pipeline": found.ir["pipelineInfo"]["name"],
        "settings": found.platform["platforms"]["kubernetes"].get("pipelineConfig", {}),
        "tasks": tasks,
        "usually": usual,
        "executors": {
            name: {key: each.get(key) for key in sorted({*each, *usual}) if each.get(key) != usual.get(key)}
            for name, each in executors.items()
        },
    }


def _usual(executors: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that more than half of the executors have, so that an outline shows what is different."""
    found = {}
    for key in sorted({key for each in executors for key in each}):
        values = [each.get(key) for each in executors]
        value = max(values, key=values.count)
        if value is not None and 2 * values.count(value) > len(values):
            found[key] = value
    return found


def _without_doubles(document: Any) -> Any:
    """The compiler writes names twice: as they are, and as parameters of the platform's specification."""
    if isinstance(document, dict):
        return {key: _without_doubles(value) for key, value in document.items() if not key.endswith("Parameter")}
    return [_without_doubles(each) for each in document] if isinstance(document, list) else document


def render(case: Case) -> str:
    """The outline as a golden file."""
    return str(yaml.safe_dump(outline(case), sort_keys=False, width=1000, default_flow_style=None))


def main(arguments: list[str]) -> None:
    """Write the golden files, or everything compiled into a folder."""
    if arguments:
        for case in cases():
            compile_case(case, Path(arguments[0]) / f"{'_'.join(case)}.yaml")
        return
    for profile, path in GOLDEN.items():
        path.write_text(render(Case(profile, "miniature")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
