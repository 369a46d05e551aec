"""The exit step of a cluster run, against a real SeaweedFS: one summary of steps that ran in pods of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import store
from avrt_lib.config import Config, load
from avrt_lib.report.run_summary import LINE
from avrt_lib.steps import FAILURE_LINE, STEPS, run_step
from avrt_lib.store import LocalObjectServer, run_reports
from avrt_lib.store.objects import read_object
from tests import tiny_models

MINIATURE = Path(__file__).parents[2] / "configs" / "miniature.yaml"
COMPONENTS = "preflight,ingest,evaluation-base"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalObjectServer]:
    with LocalObjectServer(tmp_path_factory.mktemp("run") / "store") as running:
        yield running


@pytest.fixture
def in_pod(server: LocalObjectServer, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that a pod of the run run-1 has."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AVRT_RUN_REPORTS", "store")
    monkeypatch.setenv("AVRT_DATA_HASH", "0123")
    monkeypatch.setenv("AVRT_RUN_ID", "run-1")
    return monkeypatch


def config(seed: int) -> Config:
    """A configuration of its own for each test, since finished reports are kept by configuration."""
    return load(MINIATURE, {"seed": seed, "teachers.shards": 1})


def report(status: str = "succeeded", *, started: float = 100.0, **facts: Any) -> dict[str, Any]:
    """A step's report as ``run_step`` makes it."""
    return {"status": status, "seconds": 2.5, "started": started, "failure": None, "facts": facts}


def keep(settings: Config, instance: str, found: dict[str, Any]) -> None:
    """Put the report of a step that was given its part of the configuration."""
    run_reports.put(STEPS[instance.partition("-")[0]].part(settings), instance, found)


def summarise(settings: Config, folder: Path, status: str, components: str = COMPONENTS) -> dict[str, Any]:
    """Run the step, and return summary.json."""
    run_step(
        "run_summary",
        config=settings.to_json(),
        inputs={},
        outputs={"summary": folder / "summary"},
        params={"status": status, "components": components},
    )
    return dict(json.loads((folder / "summary" / "summary.json").read_text(encoding="utf-8")))


def line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The summary in the step's log."""
    (found,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith(LINE)]
    return dict(json.loads(found.removeprefix(LINE)))


def test_steps_that_ran_make_a_summary(
    in_pod: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(1)
    for instance in ("preflight", "ingest"):
        keep(settings, instance, report(samples={"train": 3}))
    keep(settings, "evaluation-base", report(accuracy=0.5, n=4))
    summary = summarise(settings, tmp_path, "COMPLETE")
    assert (summary["status"], summary["failure"]) == ("succeeded", None)
    assert summary["steps"]["ingest"] == {"seconds": 2.5, "status": "succeeded"}
    assert set(summary["steps"]) == {"preflight", "ingest", "evaluation"}
    assert summary["dataset"]["samples"] == {"train": 3}
    assert summary["models"]["base"]["accuracy"] == 0.5
    assert line(capsys) == summary
    kept = read_object(store.client(), "avrt", "runs/run-1/summary.json")
    assert kept is not None
    assert json.loads(kept) == summary
    page = read_object(store.client(), "avrt", "runs/run-1/report.html")
    assert page is not None
    assert b"<html" in page
    assert (tmp_path / "summary" / "report.html").read_bytes() == page


def test_a_report_that_cannot_be_drawn_costs_the_page_and_not_the_summary(
    in_pod: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(11)
    keep(settings, "evaluation-base", report(accuracy="many"))
    summary = summarise(settings, tmp_path, "COMPLETE")
    assert line(capsys) == summary
    assert not (tmp_path / "summary" / "report.html").exists()


def test_steps_that_the_cache_answered_are_in_the_summary_too(in_pod: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = config(2)
    keep(settings, "ingest", report(samples={"train": 3}))
    keep(settings, "evaluation-base", report(accuracy=0.25))
    in_pod.setenv("AVRT_RUN_ID", "run-2")
    keep(settings, "preflight", report())
    summary = summarise(settings, tmp_path, "COMPLETE")
    assert summary["status"] == "succeeded"
    assert summary["models"]["base"]["accuracy"] == 0.25
    found = run_reports.collect({"preflight": None, "ingest": STEPS["ingest"].part(settings)})
    assert ["cached" in found[name] for name in ("preflight", "ingest")] == [False, True]


def test_what_the_cache_answers_is_what_took_the_outputs_of_this_run(in_pod: pytest.MonkeyPatch) -> None:
    """Of two results of one step with the same settings, that of the other data is not this run's."""
    settings = config(8)
    names = ("ingest", "merger", "data_validation", "sft")
    parts = {name: STEPS[name].part(settings) for name in names}
    for data in ("a", "b"):
        in_pod.setenv("AVRT_RUN_ID", f"run-{data}")
        took: list[str] = []
        for name in names:
            made = [f"{name}-{data}"]
            keep(settings, name, report(data=data) | {"took": took, "made": made})
            took = made
    in_pod.setenv("AVRT_RUN_ID", "run-c")
    keep(settings, "ingest", report() | {"took": [], "made": ["ingest-a"]})
    found = run_reports.collect(parts)
    assert list(found) == list(names)
    assert {found[name]["facts"].get("data") for name in names[1:]} == {"a"}
    assert ["cached" in found[name] for name in names] == [False, True, True, True]
    in_pod.setenv("AVRT_RUN_ID", "run-d")
    keep(settings, "ingest", report() | {"took": [], "made": ["ingest-new"]})
    assert list(run_reports.collect(parts)) == ["ingest"]


def test_a_change_leaves_the_reports_of_the_steps_that_it_does_not_concern(
    in_pod: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(config(9), "ingest", report(samples={"train": 3}))
    keep(config(9), "promotion", report())
    in_pod.setenv("AVRT_RUN_ID", "run-9")
    changed = load(MINIATURE, {"seed": 9, "teachers.shards": 1, "grpo.learning_rate": 0.5})
    summary = summarise(changed, tmp_path, "FAILED", "ingest,promotion")
    assert summary["steps"]["ingest"]["status"] == "succeeded"
    # A step with outside effects is never taken from a cache, so another run's is not this one's.
    assert summary["steps"]["promotion"]["status"] == "skipped"


@pytest.mark.parametrize("change", ["data", "config"])
def test_what_the_cache_would_not_answer_is_not_taken(in_pod: pytest.MonkeyPatch, tmp_path: Path, change: str) -> None:
    settings = config(3)
    keep(settings, "ingest", report())
    in_pod.setenv("AVRT_RUN_ID", "run-3")
    if change == "data":
        in_pod.setenv("AVRT_DATA_HASH", "4567")
    else:
        settings = config(4)
    summary = summarise(settings, tmp_path, "FAILED")
    assert summary["steps"]["ingest"]["status"] == "skipped"


def test_a_failed_step_is_reported_with_its_own_error(
    in_pod: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from avrt_lib.errors import AvrtError

    settings = config(5)
    in_pod.setenv("AVRT_RUN_ID", "run-5")
    samples, merged = tiny_models.write_data(tmp_path / "data", train=4)
    with pytest.raises(AvrtError):  # four rows are too few for the gate
        run_step(
            "data_validation",
            config=settings.to_json(),
            inputs={"samples": samples, "merged": merged},
            outputs={"report": tmp_path / "report"},
        )
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith(FAILURE_LINE)]
    failure = json.loads(said[0].removeprefix(FAILURE_LINE))
    summary = summarise(settings, tmp_path, "FAILED", "preflight,ingest,data_validation,sft")
    assert summary["status"] == "failed"
    assert summary["failure"] == failure
    assert failure["code"] == "validation_failed"
    assert summary["steps"]["data_validation"]["status"] == "failed"
    assert summary["steps"]["sft"]["status"] == "skipped"


@pytest.mark.parametrize(("status", "code"), [("FAILED", "error"), ("RUNNING", "interrupted")])
def test_a_run_that_ended_without_a_word_says_so(
    in_pod: pytest.MonkeyPatch, tmp_path: Path, status: str, code: str
) -> None:
    in_pod.setenv("AVRT_RUN_ID", f"run-{status}")
    summary = summarise(config(6), tmp_path, status)
    assert (summary["status"], summary["failure"]["code"]) == ("failed", code)


def test_a_store_that_is_away_costs_a_step_its_report_and_nothing_else(
    in_pod: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_pod.setenv("AVRT_S3_ENDPOINT", "127.0.0.1:1")
    run_reports.put(config(7), "ingest", report())
    assert "Keeping the report of ingest failed" in caplog.text
