"""The world: what its questions need, that it is a function of its seed, and that its clips are real MP4 files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from avrt_lib import answers
from avrt_lib.miniature import texts, world
from avrt_lib.miniature.world import KINDS, Question, clip_question, draw_question, render_dataset

ROOT = Path(__file__).parents[2]


def questions(kind: str, count: int = 50) -> list[Question]:
    return [draw_question(random.Random(f"{kind} {i}"), {kind: 1.0}) for i in range(count)]


@pytest.mark.parametrize(
    ("kind", "by_sight", "by_sound"), [("either", 1, 1), ("both", 2, 2), ("sound", 4, 1), ("sight", 1, 4)]
)
def test_each_sense_leaves_as_many_options_as_the_kind_says(kind: str, by_sight: int, by_sound: int) -> None:
    for question in questions(kind):
        seen = texts.possible(question, 0, question.sight)
        heard = texts.possible(question, 1, question.sound)
        assert (len(seen), len(heard)) == (by_sight, by_sound)
        assert set(seen) & set(heard) == {question.answer}
        assert len(set(question.options)) == 4


def test_kinds_and_answers_are_mixed_as_stated() -> None:
    drawn = [clip_question(7, number) for number in range(4000)]
    kinds = Counter(question.kind for question in drawn)
    for kind, share in KINDS.items():
        assert kinds[kind] / len(drawn) == pytest.approx(share, abs=0.03)
    for count in Counter(question.answer for question in drawn).values():
        assert count / len(drawn) == pytest.approx(0.25, abs=0.03)


def test_the_same_seed_renders_the_same_bytes_and_another_seed_other_clips(tmp_path: Path) -> None:
    def digests(folder: str, seed: int) -> list[str]:
        render_dataset(tmp_path / folder, count=24, seed=seed, prefix="clip", workers=1)
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((tmp_path / folder).rglob("*.mp4"))]

    first = digests("a", 1)
    assert len(set(first)) == 24
    assert digests("b", 1) == first
    assert not set(digests("c", 2)) & set(first)


def test_a_clip_is_h264_with_aac_and_holds_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    world.write_clip(path, seed=3, number=0, sight="blue", sound="high")
    with av.open(str(path)) as container:
        assert [s.codec_context.name for s in container.streams] == ["h264", "aac"]
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    with av.open(str(path)) as container:
        wave = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    red, green, blue = picture.reshape(-1, 3).mean(0)
    assert blue > red + 60
    assert blue > green + 60
    peak = np.abs(np.fft.rfft(wave[:16000])).argmax()
    assert 1200 <= peak <= 1700


def test_a_rendering_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    render_dataset(tmp_path, count=4, seed=1, prefix="clip", workers=1)
    kept = tmp_path / "videos" / "clip-000001.mp4"
    before = kept.stat().st_mtime_ns
    (tmp_path / "videos" / "clip-000002.mp4").unlink()
    (tmp_path / "annotations.json").unlink()
    done: list[int] = []
    render_dataset(tmp_path, count=4, seed=1, prefix="clip", workers=1, progress=done.append)
    assert done == [3, 1]
    assert kept.stat().st_mtime_ns == before


RENDER = """
import sys
from pathlib import Path
from avrt_lib.miniature.world import render_dataset

if __name__ == "__main__":
    render_dataset(Path(sys.argv[1]), prefix="t", count=100_000, seed=5, workers=2)
"""


def group_runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_rendering_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "render.py").write_text(RENDER)
    started = subprocess.Popen(
        [sys.executable, tmp_path / "render.py", tmp_path / "data"], start_new_session=True, cwd=ROOT
    )
    group = started.pid
    try:
        until = time.monotonic() + 60
        while not any((tmp_path / "data").glob("videos/*.mp4")):
            assert started.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
        until = time.monotonic() + 10
        while group_runs(group) and time.monotonic() < until:
            time.sleep(0.1)
        assert not group_runs(group)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def test_what_the_models_are_taught_is_what_the_extractor_reads() -> None:
    for kind in KINDS:
        for question in questions(kind, 10):
            for sense in (0, 1):
                trace = texts.teacher_trace(question, sense, question.answer)
                assert answers.extract(trace, question.options).index == question.answer
            merged = texts.merged_trace(question)
            assert answers.well_formed(merged)
            assert answers.extract(merged, question.options).index == question.answer
