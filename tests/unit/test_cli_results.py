"""The table that a run ends with, as it looks in 80 columns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from avrt_lib.cli.results import show_summary
from avrt_lib.cli.run import rebuild_report
from avrt_lib.config import load
from avrt_lib.errors import UsageError
from avrt_lib.runs import create
from avrt_lib.workspace import Workspace


def shown(*kinds: str) -> str:
    model: dict[str, Any] = {
        "accuracy": 0.5, "ci95": [0.25, 0.75], "invalid_rate": 0.125, "words_mean": 17.0, "n": 8,
        "by_kind": dict.fromkeys(kinds, 0.625),
        "conditions": {"audio_only": {"accuracy": 0.375}, "vision_only": {"accuracy": 0.25}},
    }  # fmt: skip
    summary = {
        "models": dict.fromkeys(("base", "sft", "grpo"), model),
        "champion": None,
        "promotion": {"promoted": False, "reason": "no"},
    }
    out = io.StringIO()
    show_summary(summary, Console(file=out, width=80))
    return out.getvalue()


@pytest.mark.parametrize(
    "kinds",
    [
        ("either", "both", "sound", "sight"),
        ("AV Event Alignment", "Comparative", "Context understanding", "Event Sequence", "Inference", "Reasoning"),
    ],
)
def test_no_figure_and_no_kind_is_cut_off_in_80_columns(kinds: tuple[str, ...]) -> None:
    text = shown(*kinds)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    for kind in kinds:
        assert kind in text
    assert text.count("62.5") == 3 * len(kinds)
    assert text.count("25.0–75.0") == 3


def test_brackets_in_names_of_kinds_are_shown() -> None:
    assert "[old]" in shown("[old]", "[/x]")
    assert "[/a kind of question with a long name]" in shown("[/a kind of question with a long name]")


def test_brackets_in_a_failure_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = create(tmp_path / "[runs]", load(Path(__file__).parents[2] / "configs" / "miniature.yaml"))
    failure = {"step": "merger", "code": "engine_failed", "message": "its template ends in [/INST]: use [this] one"}
    Workspace(folder.work, "merger", tmp_path).report(status="failed", seconds=1.0, started=1.0, failure=failure)
    rebuild_report(tmp_path / "[runs]", folder.path.name)
    seen = capsys.readouterr()
    assert "its template ends in [/INST]: use [this] one" in seen.err
    assert str(folder.report_file) in seen.out


def test_a_run_that_is_going_on_is_not_reported_as_interrupted(tmp_path: Path) -> None:
    folder = create(tmp_path, load(Path(__file__).parents[2] / "configs" / "miniature.yaml"))
    with folder.locked(), pytest.raises(UsageError, match="still going on"):
        rebuild_report(tmp_path, folder.path.name)
    assert not folder.summary_file.exists()
    assert not folder.report_file.exists()
    rebuild_report(tmp_path, folder.path.name)
    assert folder.report_file.exists()
