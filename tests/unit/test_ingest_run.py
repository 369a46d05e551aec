"""The ingest step: splits, counts, and what survives a kill."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import ingest
from avrt_lib.cli.step import run_one
from avrt_lib.config import Config, load
from avrt_lib.errors import ConfigError, DataError
from avrt_lib.ingest.media import Budget
from avrt_lib.ingest.pool import DecoderPool, to_sample
from avrt_lib.ingest.readers.base import Media, SourceRow
from avrt_lib.ingest.splits import Job, assign
from avrt_lib.records import SPLITS, Dropped, Sample
from avrt_lib.steps import run_step
from avrt_lib.tables import read_json, read_rows, verify
from avrt_lib.workspace import Workspace
from tests.media_files import write_clip

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "real" / "daily_omni"
BUDGET = Budget(2, 0.5, 56, 92)
#: One process, so that most tests start none.
BASE: dict[str, Any] = {"data.frames": 2, "data.audio_seconds": 0.5, "data.workers": 1}


def configure(**overrides: Any) -> Config:
    """The miniature's configuration with other data."""
    return load(ROOT / "configs" / "miniature.yaml", BASE | {key.replace("__", "."): v for key, v in overrides.items()})


def one_source(path: Path, form: str = "avqa", **overrides: Any) -> Config:
    """A configuration with one source that is split by clip."""
    apart: dict[str, Any] = {f"data__{split}": None for split in SPLITS}
    return configure(**apart, data__all={"format": form, "path": str(path)}, **overrides)


def three_sources(folder: Path, form: str = "avqa", name: str = "", **overrides: Any) -> Config:
    """A configuration with ``folder/SPLIT`` for each split."""
    apart = {f"data__{split}": {"format": form, "path": str(folder / split / name)} for split in SPLITS}
    return configure(**apart, **overrides)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Run the step, with ``folder/samples`` as its table."""
    workspace = Workspace(folder, "ingest", folder / "scratch")
    return ingest.run(config, workspace=workspace, samples=folder / "samples", data_hash="h")


def samples_of(folder: Path) -> list[Sample]:
    return list(read_rows(folder / "samples", Sample))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "c.mp4", seconds=0.5, size=(32, 32), rate=16_000)


def write_avqa(folder: Path, clip: Path, names: list[str], *, questions: int = 1, marked: bool = True) -> Path:
    """An AVQA folder with a copy of the clip under each name; ``marked`` makes the copies differ."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names:
        # FFmpeg leaves out what follows the last box.
        data = clip.read_bytes() + (b"\0\0\0\x10free" + name.encode()[:8].ljust(8) if marked else b"")
        (folder / "videos" / f"{name}.mp4").write_bytes(data)
        rows += [
            {
                "id": len(rows) + i,
                "video_name": name,
                "question_text": f"Which {i}?",
                "multi_choice": ["rain", "wind"],
                "answer": i % 2,
                "question_relation": "Both",
                "question_type": ("Which", "Why")[i % 2],
            }
            for i in range(questions)
        ]
    (folder / "annotations.json").write_text(json.dumps(rows))
    return folder


def test_a_set_is_split_by_clip(clip: Path, tmp_path: Path) -> None:
    data = write_avqa(tmp_path / "data", clip, [f"v{i}" for i in range(20)], questions=2)
    facts = run(one_source(data), tmp_path)
    assert facts["samples"] == facts["rows"] == 40
    assert facts["splits"] == {"train": 28, "validation": 4, "test": 8}
    assert facts["by_kind"] == {"Which": 20, "Why": 20}
    assert (facts["clips"], facts["dropped"], facts["dropped_reasons"]) == (20, 0, {})
    rows = samples_of(tmp_path)
    assert Counter(row.split for row in rows) == facts["splits"]
    splits_of: dict[str, set[str]] = {}
    for row in rows:
        splits_of.setdefault(row.group, set()).add(row.split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert len({row.id for row in rows}) == 40
    assert all(len(row.frames) == 2 and row.audio and row.media_kind == "video" for row in rows)
    assert verify(tmp_path / "samples")["made_by"]["data_hash"] == "h"
    assert verify(tmp_path / "samples" / "dropped")["rows"] == 0


def test_the_split_depends_on_the_seed_alone() -> None:
    clips = [f"v{i}" for i in range(100)]
    first = assign(clips, 0, 0.1, 0.2)
    assert Counter(first.values()) == {"train": 70, "test": 20, "validation": 10}
    assert assign(clips[::-1], 0, 0.1, 0.2) == first
    assert assign(clips, 1, 0.1, 0.2) != first
    assert Counter(assign(clips[:3], 0, 0.1, 0.2).values()) == {"train": 1, "test": 1, "validation": 1}


def test_too_few_clips_are_refused_where_all_of_them_would_be_trained_on(clip: Path, tmp_path: Path) -> None:
    data = write_avqa(tmp_path / "data", clip, ["a", "b", "c"], questions=9)
    with pytest.raises(DataError, match=r"at least 10 clips .* has 3: add clips, or pass --overlap-splits"):
        run(one_source(data, merger__keep="all"), tmp_path)


def test_too_few_clips_stand_in_all_splits_until_the_gate(
    clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_avqa(tmp_path / "data", clip, ["a", "b", "c"], questions=9)
    with caplog.at_level(logging.WARNING):
        facts = run(one_source(data), tmp_path)
    assert facts["splits"] == {"train": 27, "validation": 27, "test": 27}
    assert "3 clips are too few to split" in caplog.text


def test_clips_may_stand_in_all_splits_where_asked(
    clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_avqa(tmp_path / "data", clip, ["a", "b"], questions=2)
    with caplog.at_level(logging.WARNING):
        facts = run(one_source(data, data__overlap_splits=True), tmp_path)
    assert "every one of the 4 questions stands in train, validation and test" in caplog.text
    assert facts["splits"] == {"train": 4, "validation": 4, "test": 4}
    ids = {row.id for row in samples_of(tmp_path)}
    assert len(ids) == 12
    assert {"a-0-train", "a-0-validation", "a-0-test"} <= ids


def test_splits_given_apart_keep_their_ids(clip: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        write_avqa(tmp_path / split, clip, [f"{split}{i}" for i in range(2)])
    facts = run(three_sources(tmp_path), tmp_path)
    assert facts["splits"] == {"train": 2, "validation": 2, "test": 2}
    assert {row.id for row in samples_of(tmp_path) if row.split == "test"} == {"test0-0", "test1-1"}


def test_a_clip_in_two_splits_is_named(clip: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        write_avqa(tmp_path / split, clip, [f"{split}0", "shared" if split != "train" else "other"])
    with pytest.raises(DataError, match=r"'shared' stands in two splits, validation \(annotations.json:2\) and test"):
        run(three_sources(tmp_path), tmp_path)
    facts = run(three_sources(tmp_path, data__overlap_splits=True), tmp_path / "overlap")
    assert facts["samples"] == 6


def test_a_clip_under_two_names_is_found_by_its_bytes(clip: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        write_avqa(tmp_path / split, clip, [f"{split}0"], marked=split == "train")
    with pytest.raises(DataError, match=r"'validation0' \(validation\) and 'test0'|'test0' .* and 'validation0'"):
        run(three_sources(tmp_path), tmp_path)


def test_manifests_in_different_folders_may_use_the_same_file_names(clip: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        folder = tmp_path / split
        folder.mkdir()
        (folder / "1.mp4").write_bytes(clip.read_bytes() + b"\0\0\0\x10free" + split.encode()[:8].ljust(8))
        row = {"id": 1, "question": "?", "options": ["a", "b"], "answer": "A", "video": "1.mp4"}
        (folder / "m.jsonl").write_text(json.dumps(row))
    run(three_sources(tmp_path, "manifest", "m.jsonl"), tmp_path)
    rows = samples_of(tmp_path)
    assert {row.id for row in rows} == {"1-train", "1-validation", "1-test"}
    assert {row.group for row in rows} == {"train/1.mp4", "validation/1.mp4", "test/1.mp4"}


def test_rows_are_dropped_with_their_reason_and_counts_add_up(clip: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        write_avqa(tmp_path / split, clip, [f"{split}{i}" for i in range(5)])
    train = tmp_path / "train" / "videos"
    (train / "train1.mp4").unlink()
    (train / "train2.mp4").write_bytes(b"")
    (train / "train3.mp4").write_bytes(clip.read_bytes()[:500])
    facts = run(three_sources(tmp_path), tmp_path)
    assert facts["splits"] == {"train": 2, "validation": 5, "test": 5}
    assert facts["dropped_reasons"] == {"media invalid": 2, "media missing": 1}
    assert facts["samples"] + facts["dropped"] == facts["rows"] == 15
    dropped = {row.id: row for row in read_rows(tmp_path / "samples" / "dropped", Dropped)}
    assert set(dropped) == {"train1-1", "train2-2", "train3-3"}
    assert dropped["train2-2"].where == "annotations.json:3"
    assert "train2.mp4 is empty (0 bytes)" in dropped["train2-2"].reason
    assert dropped["train2-2"].split == "train"


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_a_split_without_a_sample_is_refused(how: str, clip: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        write_avqa(tmp_path / split, clip, [f"{split}0"])
    video = tmp_path / "validation" / "videos" / "validation0.mp4"
    video.unlink() if how == "missing" else video.write_bytes(b"x")
    with pytest.raises(DataError, match=r"validation.*json:1: media (missing|invalid): .*validation0\.mp4"):
        run(three_sources(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (lambda f: one_source(f, "avqua"), ConfigError, "known: avqa, daily-omni, manifest, miniature"),
        (lambda f: one_source(f / "absent"), DataError, "There is no data set at .*absent"),
    ],
)
def test_a_source_that_is_none_is_named(config: Any, error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        run(config(tmp_path), tmp_path)


def test_other_numbers_of_options_and_other_media_pass(tmp_path: Path) -> None:
    write_clip(tmp_path / "portrait.mp4", size=(48, 64), rotation=0)
    write_clip(tmp_path / "turned.mp4", size=(64, 48), rotation=90)
    write_clip(tmp_path / "silent.mp4", sound_codec=None)
    write_clip(tmp_path / "stereo.mp4", layout="stereo", rate=48_000)
    write_clip(tmp_path / "sound.wav", picture_codec=None, sound_codec="pcm_s16le", rate=8_000)
    media = [{"video": f"{name}.mp4"} for name in ("portrait", "turned", "silent", "stereo")] + [{"audio": "sound.wav"}]
    rows = [
        {
            "id": f"{i}-{count}",
            "question": "?",
            "options": [f"o{k}" for k in range(count)],
            "answer": count - 1,
            **files,
        }
        for i, files in enumerate(media)
        for count in range(2, 9)
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    facts = run(one_source(tmp_path / "m.jsonl", "manifest", data__minimum_clips=3), tmp_path)
    assert facts["samples"] == 35
    assert facts["dropped"] == 0
    assert facts["media_kinds"] == {"audio": 7, "silent_video": 7, "video": 21}
    by_clip = {row.group: row for row in samples_of(tmp_path)}
    for name in ("portrait.mp4", "turned.mp4"):
        assert (by_clip[name].width, by_clip[name].height) == (48, 64)
    assert by_clip["silent.mp4"].audio is None
    assert {len(row.options) for row in samples_of(tmp_path)} == set(range(2, 9))


def test_extra_columns_are_kept(clip: Path, tmp_path: Path) -> None:
    data = write_avqa(tmp_path / "data", clip, ["a"])
    rows = json.loads((data / "annotations.json").read_text())
    (data / "annotations.json").write_text(json.dumps([rows[0] | {"sight": "red", "n": [1, None], "bad": "\ud800"}]))
    run(one_source(data, data__overlap_splits=True), tmp_path)
    assert json.loads(samples_of(tmp_path)[0].extra) == {"sight": "red", "n": [1, None], "bad": "\ud800"}


# Processes


def make_job(number: int, video: Path) -> Job:
    row = SourceRow(
        f"r{number}", f"a:{number}", "?", ["a", "b"], 0, "t", "both", f"g{number}", Media(video=("x",)), video=video
    )
    return Job(row, "avqa", "train")


def crash_on_three(budget: Budget, job: Job) -> Sample | Dropped:
    """What a decoder does that meets a file which it cannot survive."""
    if job.row.id == "r3":
        os.kill(os.getpid(), signal.SIGSEGV)
    return to_sample(budget, job)


def test_a_file_that_ends_its_decoder_costs_its_own_row(clip: Path) -> None:
    jobs = [make_job(i, clip) for i in range(6)]
    with DecoderPool(BUDGET, 2, crash_on_three) as pool:
        results = list(pool.map(jobs))
    assert [row.id for row in results] == [job.row.id for job in jobs]
    (dropped,) = [row for row in results if isinstance(row, Dropped)]
    assert dropped.id == "r3"
    assert "ended the process that decoded it" in dropped.reason


def test_a_clip_that_cannot_be_decoded_is_tried_once(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no clip" * 20)
    first, second = make_job(1, broken), make_job(2, broken)
    before = to_sample(BUDGET, first)
    broken.unlink()
    after = to_sample(BUDGET, second)
    assert isinstance(before, Dropped)
    assert isinstance(after, Dropped)
    assert before.reason == after.reason


def test_a_debugged_step_reads_data_that_were_changed_again(clip: Path, tmp_path: Path) -> None:
    data = write_avqa(tmp_path / "data", clip, [f"v{i}" for i in range(12)])
    answers = []
    for name, right in (("before", 0), ("after", 1)):
        rows = json.loads((data / "annotations.json").read_text())
        (data / "annotations.json").write_text(json.dumps([row | {"answer": right} for row in rows]))
        place = f"samples={tmp_path / name}"
        run_one("ingest", one_source(data), inputs=[], outputs=[place], params=[], work=tmp_path / "work")
        answers.append({row.answer_index for row in read_rows(tmp_path / name, Sample)})
    assert answers == [{0}, {1}]


def test_several_processes_give_what_one_gives(clip: Path, tmp_path: Path) -> None:
    data = write_avqa(tmp_path / "data", clip, [f"v{i}" for i in range(12)])
    first = run(one_source(data), tmp_path / "1")
    assert run(one_source(data, data__workers=2), tmp_path / "2") == first
    manifests = [read_json(tmp_path / name / "samples" / "manifest.json") for name in ("1", "2")]
    assert manifests[0]["content_sha256"] == manifests[1]["content_sha256"]
    assert manifests[0]["files"] == manifests[1]["files"]


_KILLED = """
import os, signal, sys
from pathlib import Path

def main(settings, folder, kill_at):
    from avrt_lib import ingest, tables
    from avrt_lib.config import from_json
    from avrt_lib.workspace import Workspace

    ingest.CHUNK_ROWS = 4
    commits = 0
    original = tables.TableWriter.commit

    def commit(self, key, rows):
        nonlocal commits
        commits += 1
        if commits == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, key, rows)

    tables.TableWriter.commit = commit
    workspace = Workspace(folder, "ingest", folder / "scratch")
    ingest.run(from_json(settings), workspace=workspace, samples=folder / "samples")

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
"""


def test_a_killed_step_goes_on_and_leaves_no_process(clip: Path, tmp_path: Path) -> None:
    data = write_avqa(tmp_path / "data", clip, [f"v{i}" for i in range(20)])
    (data / "videos" / "v7.mp4").write_bytes(b"broken")
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    settings = one_source(data, data__workers=2).to_json()

    def start(folder: str, kill_at: int) -> int:
        command = [sys.executable, str(script), settings, str(tmp_path / folder), str(kill_at)]
        # The workers hold the pipe too, so its end says that all of them are gone.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, check=False, env=environment, capture_output=True, timeout=300).returncode

    assert start("whole", 0) == 0
    # In the second chunk: once with its dropped rows committed and its samples not, once before both.
    for kill_at in (4, 5):
        folder = tmp_path / f"killed{kill_at}"
        assert start(folder.name, kill_at) == -signal.SIGKILL
        committed = sorted((folder / "samples").glob("part-*"))
        assert committed
        before = committed[0].stat().st_mtime_ns
        assert start(folder.name, 0) == 0
        assert committed[0].stat().st_mtime_ns == before
        for table in ("samples", "samples/dropped"):
            undisturbed = read_json(tmp_path / "whole" / table / "manifest.json")
            assert read_json(folder / table / "manifest.json") == undisturbed


# The miniature and the fingerprint


def small_miniature() -> Config:
    return configure(data__train__count=6, data__validation__count=3, data__test__count=3)


def test_the_miniature_is_rendered_and_read_through_the_step(tmp_path: Path) -> None:
    facts = run_step(
        "ingest", config=small_miniature(), inputs={}, outputs={"samples": tmp_path / "out"}, work=tmp_path
    )
    assert facts["splits"] == {"train": 6, "validation": 3, "test": 3}
    assert set(facts["by_kind"]) <= {"either", "both", "sound", "sight"}
    rows = list(read_rows(tmp_path / "out", Sample))
    assert {row.media_kind for row in rows} == {"video"}
    assert len({row.media_sha256 for row in rows}) == 12
    assert {"sight", "sound"} <= set(json.loads(rows[0].extra))
    assert len(list(tmp_path.glob("scratch/ingest/*/rendered/*/videos/*.mp4"))) == 12


def test_the_fingerprint_of_files(clip: Path, tmp_path: Path) -> None:
    data = write_avqa(tmp_path / "data", clip, ["a", "b"])
    first = ingest.fingerprint(one_source(data).data)
    assert ingest.fingerprint(one_source(data).data) == first
    # Elsewhere, and later.
    copy = write_avqa(tmp_path / "elsewhere" / "copy", clip, ["a", "b"])
    os.utime(copy / "videos" / "a.mp4", (0, 0))
    assert ingest.fingerprint(one_source(copy).data) == first
    assert ingest.fingerprint(one_source(os.path.relpath(copy)).data) == first  # type: ignore[arg-type]
    # Other budgets read the same data.
    assert ingest.fingerprint(one_source(data, data__frames=7).data) == first
    changes = set()
    with open(copy / "videos" / "a.mp4", "ab") as video:
        video.write(b"x")
    changes.add(ingest.fingerprint(one_source(copy).data))
    (copy / "videos" / "a.mp4").unlink()
    changes.add(ingest.fingerprint(one_source(copy).data))
    text = (data / "annotations.json").read_text()
    (data / "annotations.json").write_text(text.replace("Which 0", "Which one"))
    changes.add(ingest.fingerprint(one_source(data).data))
    assert len(changes) == 3
    assert first not in changes


def test_the_fingerprint_of_the_miniature() -> None:
    hashes = {
        ingest.fingerprint(configure(**changes).data)
        for changes in ({}, {"data__train__seed": 5}, {"data__test__count": 5}, {"data__frames": 3})
    }
    assert len(hashes) == 3, "frames are no part of the sources"


def test_the_fingerprint_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no data set at"):
        ingest.fingerprint(one_source(tmp_path / "absent").data)
    with pytest.raises(ConfigError, match="known: avqa"):
        ingest.fingerprint(one_source(tmp_path, "x").data)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not beside this repository")
def test_real_questions_about_real_clips(tmp_path: Path) -> None:
    facts = run(one_source(REAL, "daily-omni"), tmp_path)
    assert facts["samples"] == 3 * len(json.loads((REAL / "qa.json").read_text()))
    assert facts["dropped"] == 0
    assert facts["media_kinds"] == {"video": facts["samples"]}
