"""The gate with the real Great Expectations, on tables as the merger writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import validation
from avrt_lib.config import Config, load
from avrt_lib.errors import DataError, NothingKeptError, ValidationFailedError
from avrt_lib.records import Merged, Sample
from avrt_lib.tables import read_json, write_table
from avrt_lib.workspace import Workspace

MINIATURE = Path(__file__).parents[2] / "configs" / "miniature.yaml"
ROWS = 40
BASE = {"validation.minimum_rows": 20}


def make_sample(number: int) -> Sample:
    return Sample(
        id=f"s{number}",
        source="test",
        split="train",
        question="Which sound?",
        options=["rain", "wind", "bell", "drum"],
        answer_index=number % 4,
        question_type="sound",
        needs="audio",
        media_kind="audio",
        frames=[],
        frame_times_s=[],
        audio=None,
        duration_s=1.0,
        width=None,
        height=None,
        fps=None,
        media_sha256=f"{number:064x}",
        group=f"clip{number}",
    )


def make_merged(number: int, **changes: Any) -> Merged:
    row = Merged(
        sample_id=f"s{number}",
        cell="both",
        reasoning="The picture shows a bell and its ring is heard.",
        vision_reasoning="A bell is seen.",
        audio_reasoning="A ring is heard.",
        answer_index=number % 4,
        words=10,
        flags=[],
        raw_text="<think>The picture shows a bell and its ring is heard.</think><answer>A</answer>",
        model="merger",
        prompt_version="plain@1",
    )
    return replace(row, **changes)


@pytest.fixture
def gate(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the gate over samples and merged rows; ``tmp_path / "report"`` holds what it wrote."""

    def call(merged: list[Merged], samples: list[Sample] | None = None, **overrides: Any) -> dict[str, Any]:
        settings: Config = load(MINIATURE, BASE | overrides)
        write_table(tmp_path / "samples", Sample, samples or [make_sample(i) for i in range(ROWS)])
        write_table(tmp_path / "merged", Merged, merged)
        workspace = Workspace(tmp_path, "data_validation", tmp_path / "scratch")
        return validation.run(
            settings,
            workspace=workspace,
            samples=tmp_path / "samples",
            merged=tmp_path / "merged",
            report=tmp_path / "report",
        )

    return call


def good_rows() -> list[Merged]:
    return [make_merged(i) for i in range(ROWS)]


def test_good_rows_pass_and_leave_a_report(gate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    facts = gate([*good_rows(), *[make_merged(99, cell="none", reasoning="", raw_text="")]])
    assert facts["passed"] is True
    assert facts["failed"] == []
    assert facts["expectations"] >= 12
    assert facts["rows"] == ROWS
    assert facts["ledger"] == {"both": ROWS, "audio_only": 0, "vision_only": 0, "none": 1}
    assert read_json(tmp_path / "report" / "validation.json") == facts
    assert "expect_column" in next((tmp_path / "report" / "data_docs").rglob("gate.html")).read_text()


def one(number: int, **changes: Any) -> Callable[[], list[Merged]]:
    """The good rows with one of them changed."""
    return lambda: [replace(row, **changes) if i == number else row for i, row in enumerate(good_rows())]


def many(numbers: range, **changes: Any) -> Callable[[], list[Merged]]:
    """The good rows with several of them changed."""
    return lambda: [replace(row, **changes) if i in numbers else row for i, row in enumerate(good_rows())]


@pytest.mark.parametrize(
    ("rows", "overrides", "expectation", "ids"),
    [
        (lambda: good_rows()[:10], {}, "expect_table_row_count_to_be_between", []),
        (lambda: [*good_rows(), make_merged(7)], {}, "expect_column_values_to_be_unique(sample_id)", ["s7", "s7"]),
        (one(3, sample_id="stranger"), {}, "expect_column_values_to_not_be_null(split)", ["stranger"]),
        (one(3, cell="vision_only"), {}, "expect_column_values_to_be_in_set(cell)", ["s3"]),
        (one(3, answer_index=1), {}, "expect_column_pair_values_to_be_equal(answer/label)", ["s3"]),
        (one(3, answer_index=None), {}, "expect_column_values_to_be_in_set(answer)", ["s3"]),
        (one(3, answer_index=6), {}, "expect_column_values_to_be_in_set(answer)", ["s3"]),
        (many(range(3), reasoning="", flags=["empty"]), {}, "expect_column_values_to_match_regex(reasoning)", ["s0"]),
        (many(range(3), reasoning="word " * 70), {}, "expect_column_values_to_be_between(words)", ["s0", "s1", "s2"]),
        (
            many(range(3), reasoning="It is <answer>B</answer> surely."),
            {},
            "expect_column_values_to_be_well_formed(composed)",
            ["s0", "s1", "s2"],
        ),
        (many(range(3), flags=["leak"]), {}, "expect_column_values_to_be_in_set(flagged)", ["s0", "s1", "s2"]),
        (
            one(3, flags=["leak"]),
            {"validation.max_flagged_share": 0.0},
            "expect_column_values_to_be_in_set(flagged)",
            ["s3"],
        ),
        (
            good_rows,
            {"validation.max_letter_share": 0.2},
            "expect_column_largest_share_to_be_at_most(answer)",
            [],
        ),
    ],
)
def test_a_bad_table_is_refused(
    gate: Callable[..., dict[str, Any]],
    tmp_path: Path,
    rows: Callable[[], list[Merged]],
    overrides: dict[str, Any],
    expectation: str,
    ids: list[str],
) -> None:
    with pytest.raises(ValidationFailedError) as caught:
        gate(rows(), **overrides)
    message = str(caught.value)
    facts = caught.value.facts  # type: ignore[attr-defined]
    named = {failure["expectation"]: failure for failure in facts["failed"]}
    assert expectation in named, message
    assert expectation in message
    assert named[expectation]["mend"] in message
    for sample_id in ids:
        assert sample_id in named[expectation]["sample_ids"]
        assert sample_id in message
    assert not any(failure["error"] for failure in facts["failed"])
    assert facts["passed"] is False
    assert json.loads((tmp_path / "report" / "validation.json").read_text()) == facts


def test_what_a_merger_gets_wrong_now_and_then_passes(gate: Callable[..., dict[str, Any]]) -> None:
    facts = gate(one(3, flags=["one_sided"], reasoning="word " * 70)())
    assert facts["passed"] is True
    assert facts["flags"] == {"one_sided": 1}


def test_rows_of_another_split_are_refused(gate: Callable[..., dict[str, Any]]) -> None:
    samples = [make_sample(i) for i in range(ROWS)]
    samples[5] = replace(samples[5], split="test")
    with pytest.raises(ValidationFailedError, match=r"in_set\(split\) in 1 rows \(s5\)"):
        gate(good_rows(), samples)


def test_rows_without_a_label_are_refused(gate: Callable[..., dict[str, Any]]) -> None:
    samples = [make_sample(i) for i in range(ROWS)]
    samples[5] = replace(samples[5], answer_index=None)
    with pytest.raises(ValidationFailedError, match=r"not_be_null\(label\) in 1 rows \(s5\)"):
        gate(good_rows(), samples)


def test_all_cells_are_right_where_all_are_kept(gate: Callable[..., dict[str, Any]]) -> None:
    assert gate(one(3, cell="none")(), **{"merger.keep": "all"})["passed"] is True


def test_nothing_kept_has_its_own_error(gate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    rows = [make_merged(i, cell=("audio_only", "none")[i % 2], reasoning="", raw_text="") for i in range(ROWS)]
    with pytest.raises(NothingKeptError, match=r"none of 40 .*both 0, audio_only 20, vision_only 0, none 20") as caught:
        gate(rows)
    report = read_json(tmp_path / "report" / "validation.json")
    assert report["code"] == "nothing_kept"
    assert report["passed"] is False
    assert caught.value.facts["ledger"]["none"] == 20  # type: ignore[attr-defined]


def test_nothing_is_trained_on_clips_that_are_measured_on(gate: Callable[..., dict[str, Any]]) -> None:
    samples = [make_sample(i) for i in range(ROWS)]
    samples += [replace(row, id=f"{row.id}-test", split="test") for row in samples[:3]]
    with pytest.raises(DataError, match=r"3 of 40 clips stand in the training split and in another.*at least 10 clips"):
        gate(good_rows(), samples)
    assert gate(good_rows(), samples, **{"data.overlap_splits": True})["passed"] is True


def test_a_table_that_was_changed_afterwards_is_refused(gate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    gate(good_rows())
    with open(tmp_path / "merged" / "part-00000.parquet", "ab") as part:
        part.write(b"x")
    workspace = Workspace(tmp_path, "data_validation", tmp_path / "scratch")
    with pytest.raises(DataError, match=r"part-00000\.parquet does not have the SHA-256"):
        validation.run(
            load(MINIATURE, BASE),
            workspace=workspace,
            samples=tmp_path / "samples",
            merged=tmp_path / "merged",
            report=tmp_path / "report",
        )
