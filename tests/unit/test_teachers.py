"""Reading the teachers' texts, and the rows of samples that a teacher cannot perceive (no engine is needed)."""

from __future__ import annotations

from pathlib import Path

import pytest

from avrt_lib.errors import DataError, UsageError
from avrt_lib.merger import run as merge
from avrt_lib.records import Merged, Sample, Trace
from avrt_lib.tables import read_rows, write_table
from avrt_lib.teachers import audio, vision
from avrt_lib.teachers.common import in_shard, readable_reasoning
from avrt_lib.workspace import Workspace
from tests import tiny_models


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("◁think▷I see red.\nA. red maybe◁/think▷**Correct Answer:** (A) red", "I see red.\nA. red maybe"),
        (
            "<THINK><PLANNING>Listen.</PLANNING><REASONING>I hear low.</REASONING><SUMMARY>A.</SUMMARY></THINK>"
            "<RESPONSE>**Answer: A.**</RESPONSE>",
            "I hear low.",
        ),
        ("<THINK><PLANNING>Listen.</PLANNING><REASONING>I hear", "Listen.  I hear"),
        ("<THINK>A horn.</THINK><RESPONSE>Answer: B</RESPONSE>", "A horn."),
        ("<think>x</think><answer>A</answer>", "x"),
        ("B", ""),
        ("", ""),
    ],
)
def test_readable_reasoning(text: str, reasoning: str) -> None:
    assert readable_reasoning(text) == reasoning


def workspace(folder: Path) -> Workspace:
    return Workspace(folder, "teacher", folder / "scratch")


def write_samples(folder: Path, **lacking: float) -> Path:
    rows = [tiny_models.sample(n, **lacking) for n in range(5)]  # type: ignore[arg-type]
    write_table(folder / "samples", Sample, [*rows, tiny_models.sample(9, split="test")])
    return folder / "samples"


def test_shards_share_the_training_samples_out(tmp_path: Path) -> None:
    samples = write_samples(tmp_path)
    parts = [[sample.id for sample in in_shard(samples, shard, 2)] for shard in (0, 1)]
    assert parts == [["train-0000", "train-0002", "train-0004"], ["train-0001", "train-0003"]]


def test_an_unknown_shard_is_refused(tmp_path: Path) -> None:
    config = tiny_models.config("none")
    with pytest.raises(UsageError, match="shards are 0 to 1"):
        vision.run(config, workspace=workspace(tmp_path), samples=tmp_path, traces=tmp_path / "t", shard=2)


@pytest.mark.parametrize(
    ("step", "lacking", "reason"), [(audio, {"seconds": 0}, "no audio"), (vision, {"frames": 0}, "no picture")]
)
def test_samples_without_the_modality_get_a_row(step: object, lacking: dict, reason: str, tmp_path: Path) -> None:
    samples = write_samples(tmp_path, **lacking)
    facts = step.run(  # type: ignore[attr-defined]
        tiny_models.config("none"), workspace=workspace(tmp_path), samples=samples, traces=tmp_path / "t", shard=0
    )
    assert facts == {"rows": 3, "valid": 0, "correct": 0, "errors": {reason: 3}, "invalid_reasons": {}}
    rows = list(read_rows(tmp_path / "t", Trace))
    assert [(row.error, row.answer_index, row.correct) for row in rows] == [(reason, None, False)] * 3


def trace(number: int, teacher: str, right: bool) -> Trace:
    return Trace(
        f"train-{number:04d}", teacher, "m", "v", "raw", "reasoning", 0, None, right, "stop", 1, 1, 1, None
    )  # fmt: skip


def write_traces(folder: Path, teacher: str, rights: list[bool]) -> Path:
    write_table(folder / teacher, Trace, [trace(n, teacher, right) for n, right in enumerate(rights)])
    return folder / teacher


def test_the_ledger_holds_every_sample_though_nothing_is_merged(tmp_path: Path) -> None:
    samples = write_samples(tmp_path)
    sight = write_traces(tmp_path, "vision", [True, False, False, True, False])
    sound = write_traces(tmp_path, "audio", [False, True, False, False, False])
    facts = merge(
        tiny_models.config("none"),
        workspace=workspace(tmp_path),
        samples=samples,
        vision_traces=[sight],
        audio_traces=sound,
        merged=tmp_path / "merged",
    )
    assert facts == {
        "ledger": {"both": 0, "audio_only": 1, "vision_only": 2, "none": 2},
        "merged": {"rows": 0, "flags": {}},
    }
    rows = list(read_rows(tmp_path / "merged", Merged))
    assert [row.cell for row in rows] == ["vision_only", "audio_only", "none", "vision_only", "none"]
    assert {row.reasoning for row in rows} == {""}


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    samples = write_samples(tmp_path)
    sight = write_traces(tmp_path, "vision", [False] * 5)
    sound = write_traces(tmp_path, "audio", [False] * 4)
    with pytest.raises(DataError, match="'train-0004' has no trace of the audio teacher"):
        merge(
            tiny_models.config("none"),
            workspace=workspace(tmp_path),
            samples=samples,
            vision_traces=[sight],
            audio_traces=[sound],
            merged=tmp_path / "merged",
        )
