"""What a compiled pipeline costs on a Kubeflow Pipelines backend beside its steps' own work: pods, and their seconds.

Observed on a stock backend of version 2.17: about ten seconds go by for each pod that stands in a row. A task is two
pods, its driver and its own; a nested pipeline, a loop, a branch, and each iteration of a loop is one more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GraphCost:
    """Pods of a run, and the seconds of its longest row of tasks: overhead alone, and with the steps' work."""

    pods: int
    overhead_s: float
    wall_s: float


def cost(spec: Mapping[str, Any], pod_s: float, work_s: Callable[[str], float]) -> GraphCost:
    """Walk the graph of a compiled pipeline.

    Args:
        spec: the pipeline spec, the first document of the compiled file.
        pod_s: seconds that go by for one pod.
        work_s: seconds of work of one task of a component, by the component's name in the spec (without ``comp-``).
    """
    root = spec["root"]["dag"]
    pods = 1 + _pods(spec, root)
    overhead = pod_s + _seconds(spec, root, pod_s, lambda name: 0.0)
    return GraphCost(pods, overhead, pod_s + _seconds(spec, root, pod_s, work_s))


def _component(spec: Mapping[str, Any], task: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    name = task["componentRef"]["name"]
    return str(name).removeprefix("comp-"), spec["components"][name]


def iterations(task: Mapping[str, Any]) -> tuple[int, int] | None:
    """How often a loop's body runs, and how many times at once; None for a task that is no loop."""
    iterator = task.get("parameterIterator")
    if iterator is None:
        return None
    raw = iterator["items"].get("raw")
    count = len(json.loads(raw)) if raw is not None else 1
    limit = int(task.get("iteratorPolicy", {}).get("parallelismLimit", 0))
    return count, min(limit or count, count)


def _pods(spec: Mapping[str, Any], dag: Mapping[str, Any]) -> int:
    total = 0
    for task in dag["tasks"].values():
        _, component = _component(spec, task)
        if "dag" not in component:
            total += 2
            continue
        loop = iterations(task)
        inner = 1 + _pods(spec, component["dag"])
        total += inner if loop is None else 1 + loop[0] * inner
    return total


def _seconds(spec: Mapping[str, Any], dag: Mapping[str, Any], pod_s: float, work_s: Callable[[str], float]) -> float:
    """The longest path through a graph's tasks."""
    ends: dict[str, float] = {}

    def end(name: str) -> float:
        if name not in ends:
            task = dag["tasks"][name]
            start = max((end(other) for other in task.get("dependentTasks", [])), default=0.0)
            ends[name] = start + duration(task)
        return ends[name]

    def duration(task: Mapping[str, Any]) -> float:
        component_name, component = _component(spec, task)
        if "dag" not in component:
            return 2 * pod_s + work_s(component_name)
        inner = pod_s + _seconds(spec, component["dag"], pod_s, work_s)
        loop = iterations(task)
        return inner if loop is None else pod_s + math.ceil(loop[0] / loop[1]) * inner

    return max((end(name) for name in dag["tasks"]), default=0.0)
