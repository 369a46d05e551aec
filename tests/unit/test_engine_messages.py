"""Chat messages: which parts, in which order, and that media survive the way."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
import pytest
import soundfile

from avrt_lib.config import StudentConfig
from avrt_lib.engine import messages, student_media
from avrt_lib.errors import MediaError
from avrt_lib.records import Sample

SAMPLES = np.arange(-800, 800, dtype=np.int16) * 20


def flac() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, SAMPLES, 16_000, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def make_sample() -> Sample:
    return Sample(
        id="s", source="t", split="test", question="Which?", options=["a dog", "a cat"], answer_index=0,
        question_type="q", needs="both", media_kind="video", frames=[b"one", b"two"], frame_times_s=[0.0, 1.0],
        audio=flac(), duration_s=1.0, width=1, height=1, fps=1.0, media_sha256="", group="g",
    )  # fmt: skip


def kinds(asked: list[dict] | None) -> list[str]:
    assert asked is not None
    content = asked[-1]["content"]
    return ["text"] if isinstance(content, str) else [part["type"] for part in content]


@pytest.mark.parametrize(
    ("condition", "frames", "sound", "expected"),
    [
        ("av", True, True, ["video_url", "input_audio", "text"]),
        ("audio_only", True, True, ["input_audio", "text"]),
        ("vision_only", True, True, ["video_url", "text"]),
        ("av", False, True, ["input_audio", "text"]),
        ("av", True, False, ["video_url", "text"]),
        ("audio_only", True, False, None),
        ("vision_only", False, True, None),
    ],
)
def test_student_parts(condition: str, frames: bool, sound: bool, expected: list[str] | None) -> None:
    sample = make_sample()
    sample = dataclasses.replace(sample, frames=sample.frames if frames else [], audio=sample.audio if sound else None)
    asked = messages.student_messages("plain", sample, condition)
    assert asked is None if expected is None else kinds(asked) == expected


def test_frames_of_the_student_are_one_video_and_of_the_teacher_images() -> None:
    sample = make_sample()
    student = messages.student_messages("plain", sample)
    assert student is not None
    url = student[-1]["content"][0]["video_url"]["url"]
    header, _, data = url.partition("base64,")
    assert header == "data:video/jpeg;"
    assert [base64.b64decode(frame) for frame in data.split(",")] == sample.frames
    assert kinds(messages.teacher_messages("vision", "plain", sample)) == ["image_url", "image_url", "text"]
    assert kinds(messages.teacher_messages("audio", "plain", sample)) == ["input_audio", "text"]


@pytest.mark.parametrize(("role", "change"), [("vision", {"frames": []}), ("audio", {"audio": None})])
def test_a_teacher_without_its_modality_is_not_asked(role: str, change: dict) -> None:
    assert messages.teacher_messages(role, "plain", dataclasses.replace(make_sample(), **change)) is None


def test_audio_arrives_sample_for_sample() -> None:
    part = messages.audio_part(flac())
    assert part["input_audio"]["format"] == "wav"
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])), dtype="int16")
    assert rate == 16_000
    assert np.array_equal(heard, SAMPLES)


def test_broken_audio_is_named() -> None:
    with pytest.raises(MediaError, match="cannot be decoded"):
        messages.audio_part(b"not a sound")


def test_text_stands_last_and_shows_the_lettered_options() -> None:
    asked = messages.student_messages("plain", make_sample())
    assert asked is not None
    assert asked[-1]["content"][-1]["text"] == "Which?\nA. a dog\nB. a cat"


def test_student_size_is_the_configurations() -> None:
    student = StudentConfig(model="builtin:student", video_longest_side_px=56)
    size = student_media.processor_kwargs(student)["videos_kwargs"]["size"]
    assert size == {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    assert student_media.media_io_kwargs(48) == {"video": {"num_frames": 48}}
