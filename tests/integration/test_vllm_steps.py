"""The built-in teachers and merger through vLLM: real traces, their ledger, and merged reasoning that holds up."""

from __future__ import annotations

from pathlib import Path

import pytest

from avrt_lib import answers, merger, models
from avrt_lib.config import Config, load
from avrt_lib.records import Merged, Sample, Trace
from avrt_lib.tables import MANIFEST, read_json, read_rows, write_table
from avrt_lib.teachers import audio, vision
from avrt_lib.workspace import Workspace
from tests import tiny_models

pytest.importorskip("vllm")
BUILT_IN = ("vision_teacher", "audio_teacher", "merger")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((models.WEIGHTS / name / "config.json").exists() for name in BUILT_IN),
        reason="the miniature's weights are not built",
    ),
]

CONFIG = Path(__file__).parents[2] / "configs" / "miniature.yaml"
COUNT = 24


def configuration() -> Config:
    return load(CONFIG, {"teachers.shards": 1, "teachers.chunk_rows": 9, "merger.chunk_rows": 9})


def workspace(folder: Path) -> Workspace:
    return Workspace(folder, "step", folder / "scratch")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with samples, both teachers' traces and the merged table."""
    root = tmp_path_factory.mktemp("steps")
    rows = [tiny_models.sample(number, side=56) for number in range(COUNT)]
    rows.append(tiny_models.sample(COUNT, side=56, seconds=0))
    samples = root / "samples"
    write_table(samples, Sample, rows)
    config = configuration()
    for step, name in ((vision, "vision"), (audio, "audio")):
        step.run(config, workspace=workspace(root), samples=samples, traces=root / name)
    merge(config, root, root / "merged")
    return root


def merge(config: Config, root: Path, target: Path) -> dict:
    return merger.run(
        config,
        workspace=workspace(root),
        samples=root / "samples",
        vision_traces=[root / "vision"],
        audio_traces=[root / "audio"],
        merged=target,
    )


def test_teachers_answer_in_their_own_formats(made: Path) -> None:
    for name, opening in (("vision", "◁think▷"), ("audio", "<THINK>")):
        rows = [row for row in read_rows(made / name, Trace) if row.error is None]
        assert len(rows) >= COUNT
        assert sum(row.raw_text.startswith(opening) for row in rows) >= 0.9 * len(rows)
        assert sum(row.answer_index is not None for row in rows) >= 0.9 * len(rows)
        assert all(row.reasoning and "<" not in row.reasoning for row in rows if row.answer_index is not None)


def test_the_ledger_counts_every_sample(made: Path) -> None:
    rows = list(read_rows(made / "merged", Merged))
    assert len(rows) == COUNT + 1
    assert rows[-1].cell in ("vision_only", "none")  # the silent one
    assert {row.cell for row in rows} >= {"both"}
    assert all(bool(row.raw_text) == (row.cell == "both") for row in rows)


def test_merged_reasoning_ends_in_the_right_answer_and_is_not_flagged(made: Path) -> None:
    merged = [row for row in read_rows(made / "merged", Merged) if row.cell == "both"]
    assert sum(not row.flags for row in merged) >= 0.9 * len(merged)
    sound = [row for row in merged if not row.flags]
    assert all(answers.well_formed(answers.compose(row.reasoning, row.answer_index or 0)) for row in sound)
    assert all(row.vision_reasoning and row.audio_reasoning and row.words > 0 for row in sound)


def test_a_killed_teacher_goes_on_and_ends_with_the_same_rows(made: Path, tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    (traces / "part-00001.parquet").write_bytes((made / "vision" / "part-00001.parquet").read_bytes())
    vision.run(configuration(), workspace=workspace(tmp_path), samples=made / "samples", traces=traces)
    assert read_json(traces / MANIFEST)["content_sha256"] == read_json(made / "vision" / MANIFEST)["content_sha256"]
