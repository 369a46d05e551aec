"""summary.json from reports of runs that succeeded, failed, were killed, or never began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.config import load
from avrt_lib.report import summary
from avrt_lib.runs import create, instances, write_config

MINIATURE = Path(__file__).parents[2] / "configs" / "miniature.yaml"
CONFIG = load(MINIATURE)
EVALUATION = {
    "accuracy": 0.4,
    "ci95": [0.35, 0.45],
    "invalid_rate": 0.01,
    "words_mean": 1.0,
    "n": 400,
    "by_kind": {"both": 0.25},
    "conditions": {
        "audio_only": {"accuracy": 0.3, "invalid_rate": 0.0, "by_kind": {"both": 0.2}, "n": 400},
        "vision_only": {"accuracy": 0.2, "invalid_rate": 0.0, "by_kind": {"both": 0.1}, "n": 400},
    },
    "validation": {"accuracy": 0.5},
}
FACTS: dict[str, dict[str, Any]] = {
    "ingest": {"samples": 26, "by_kind": {"both": 26}, "dropped": 1, "more": 2},
    "merger": {
        "ledger": {"both": 10, "audio_only": 4, "vision_only": 4, "none": 2},
        "merged": {"rows": 10, "flags": {"leak": 1}},
    },
    "data_validation": {"passed": True, "expectations": 9, "failed": []},
    "evaluation-base": EVALUATION,
    "evaluation-sft": EVALUATION,
    "evaluation-grpo": EVALUATION,
    "grpo": {"steps": 160, "informative_groups": 0.5, "kl": 0.01, "weight_change": 0.002},
    "promotion": {"promoted": True, "reason": "better", "model": "grpo", "version": 3, "uri": "s3://m", "sha256": "ab"},
    "deployment": {"ok": True, "latency_s": {"p50": 0.2, "max": 0.4}},
}
KEYS = {
    "status": None,
    "failure": None,
    "steps": None,
    "caveats": None,
    "dataset": {"samples", "by_kind", "dropped"},
    "ledger": {"both", "audio_only", "vision_only", "none"},
    "merged": {"rows", "flags"},
    "validation": {"passed", "expectations", "failed"},
    "models": {"base", "sft", "grpo"},
    "grpo": {"steps", "informative_groups", "kl", "weight_change"},
    "champion": None,
    "promotion": {"promoted", "reason"},
    "serving": {"ok", "latency_s"},
    "versions": None,
}


def _run(tmp_path: Path, until: str | None = None, **changed: dict[str, Any]) -> Path:
    """A run folder with a report of every instance before ``until``; ``changed`` replaces values of reports."""
    folder = create(tmp_path / "runs", CONFIG)
    (folder.work / "reports").mkdir()
    order = [name for names in instances(CONFIG).values() for name in names]
    for number, name in enumerate(order):
        if name == until:
            break
        report = {"status": "succeeded", "seconds": 1.5, "started": 100.0 + number, "failure": None}
        report |= {"facts": FACTS.get(name, {})} | changed.get(name.replace("-", "_"), {})
        (folder.work / "reports" / f"{name}.json").write_text(json.dumps({"instance": name, **report}))
    return folder.path


def _failed(step: str, code: str) -> dict[str, Any]:
    return {"status": "failed", "failure": {"step": step, "code": code, "message": "why"}, "facts": {}}


@pytest.mark.parametrize("until", [None, "preflight", "merger"])
def test_every_key_is_always_there(tmp_path: Path, until: str | None) -> None:
    built = summary.build(_run(tmp_path, until))
    assert list(built) == list(KEYS)
    for key, inner in KEYS.items():
        if inner is not None:
            assert set(built[key]) == inner, key
    for model in built["models"].values():
        assert set(model) == {"accuracy", "ci95", "invalid_rate", "words_mean", "n", "by_kind", "conditions"}
        for condition in ("audio_only", "vision_only"):
            assert set(model["conditions"][condition]) == {"accuracy", "invalid_rate", "by_kind"}
    assert set(built["steps"]) == set(instances(CONFIG))


def test_a_whole_run(tmp_path: Path) -> None:
    built = summary.build(_run(tmp_path))
    assert built["status"] == "succeeded"
    assert built["failure"] is None
    assert built["dataset"] == {"samples": 26, "by_kind": {"both": 26}, "dropped": 1}
    assert built["models"]["sft"]["conditions"]["vision_only"]["accuracy"] == 0.2
    assert built["champion"] == {"model": "grpo", "version": 3, "uri": "s3://m", "sha256": "ab"}
    assert built["serving"] == {"ok": True, "latency_s": {"p50": 0.2, "max": 0.4}}
    assert built["steps"]["vision_teacher"]["seconds"] == 3.0
    assert built["steps"]["evaluation"]["instances"]["evaluation-sft"] == {"seconds": 1.5, "status": "succeeded"}
    assert built["versions"]["kfp"] is not None


def test_what_the_figures_do_not_mean_is_said(tmp_path: Path) -> None:
    assert summary.build(_run(tmp_path / "usual"))["caveats"] == []
    folder = _run(tmp_path, ingest={"facts": {**FACTS["ingest"], "overlapping": True}})
    write_config(folder / "config.yaml", load(MINIATURE, {"merger.keep": "all"}))
    overlapping, unfiltered = summary.build(folder)["caveats"]
    assert "all splits" in overlapping
    assert "Unfiltered" in unfiltered


def test_not_promoted_is_a_success_without_champion(tmp_path: Path) -> None:
    refused = {"facts": {"promoted": False, "reason": "not better", "uri": None}}
    skipped = {"status": "skipped", "facts": {"status": "skipped", "ok": None, "latency_s": None}}
    built = summary.build(_run(tmp_path, promotion=refused, deployment=skipped))
    assert (built["status"], built["champion"]) == ("succeeded", None)
    assert built["promotion"] == {"promoted": False, "reason": "not better"}
    assert built["steps"]["deployment"]["status"] == "skipped"
    assert built["serving"] == {"ok": None, "latency_s": {"p50": None, "max": None}}


def test_a_gate_that_failed(tmp_path: Path) -> None:
    path = _run(tmp_path, "sft", data_validation=_failed("data_validation", "validation_failed"))
    built = summary.build(path)
    assert built["status"] == "failed"
    assert built["failure"] == {"step": "data_validation", "code": "validation_failed", "message": "why"}
    assert built["steps"]["data_validation"]["status"] == "failed"
    assert built["steps"]["sft"] == {"seconds": None, "status": "skipped"}
    assert built["steps"]["evaluation"]["status"] == "skipped"


def test_the_first_of_two_failures_is_named(tmp_path: Path) -> None:
    path = _run(
        tmp_path,
        "merger",
        audio_teacher_0=_failed("audio_teacher", "engine_failed") | {"started": 5.0},
        vision_teacher_0=_failed("vision_teacher", "engine_failed") | {"started": 7.0},
    )
    assert summary.build(path)["failure"]["step"] == "audio_teacher"


def test_what_a_step_says_comes_before_what_the_runner_says(tmp_path: Path) -> None:
    path = _run(tmp_path, "merger", ingest=_failed("ingest", "data_invalid"))
    built = summary.build(path, {"step": "", "code": "interrupted", "message": "x"})
    assert built["failure"]["code"] == "data_invalid"


def test_an_interrupted_run_names_the_step_that_was_going_on(tmp_path: Path) -> None:
    running = {"status": "running", "seconds": None, "facts": {}}
    path = _run(tmp_path, "evaluation-base", grpo=running)
    built = summary.build(path, {"step": "", "code": "interrupted", "message": "stopped"})
    assert built["failure"] == {"step": "grpo", "code": "interrupted", "message": "stopped"}
    assert built["steps"]["grpo"] == {"seconds": None, "status": "failed"}


def test_a_killed_run_is_a_failed_one(tmp_path: Path) -> None:
    built = summary.build(_run(tmp_path, "sft"))
    assert built["status"] == "failed"
    assert (built["failure"]["step"], built["failure"]["code"]) == ("sft", "interrupted")


def test_missing_outputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("x")
    (tmp_path / "empty").mkdir()
    outputs = {"a": "there", "b": "empty", "c": "nowhere"}
    reports = {"ingest": {"outputs": {name: str(tmp_path / place) for name, place in outputs.items()}}}
    assert summary.missing_outputs(reports) == ["ingest.b", "ingest.c"]


def test_write_puts_it_where_other_tools_look(tmp_path: Path) -> None:
    path = _run(tmp_path)
    built = summary.write(path)
    assert json.loads((path / "summary.json").read_text(encoding="utf-8")) == built
