"""The typed records that cross steps, and their Parquet schemas.

Records hold plain values only, so that a table can be read by any tool. Media are small and already decoded to the
student's budget (a few JPEG frames, a few seconds of 16 kHz FLAC), so that a step needs no access to the source files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa

SCHEMA_VERSION = 1
LETTERS = "ABCDEFGH"
SPLITS = ("train", "validation", "test")
CELLS = ("both", "audio_only", "vision_only", "none")
CONDITIONS = ("av", "audio_only", "vision_only")


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one clip.

    Attributes:
        id: unique in the data set, stable between runs.
        source: name of the data set format it was read from.
        split: ``train``, ``validation`` or ``test``.
        question: the question without its options.
        options: two to eight option texts, without letters.
        answer_index: index of the right option, or None where it is not known.
        question_type: the data set's own kind of question; evaluation groups by it.
        needs: ``both``, ``audio``, ``vision`` or ``unknown``: what the data set says is needed.
        media_kind: ``video``, ``image+audio``, ``audio`` or ``silent_video``.
        frames: JPEG bytes of uniformly sampled frames; empty without a picture.
        frame_times_s: the time of each frame in seconds.
        audio: mono 16 kHz FLAC bytes, or None without a sound track.
        duration_s, width, height, fps: of the source clip; None where they have no meaning.
        media_sha256: hash of the source media file(s).
        group: the clip; questions about one clip share it and never stand in two splits.
        extra: JSON text of whatever else the source row held.
    """

    id: str
    source: str
    split: str
    question: str
    options: list[str]
    answer_index: int | None
    question_type: str
    needs: str
    media_kind: str
    frames: list[bytes]
    frame_times_s: list[float]
    audio: bytes | None
    duration_s: float | None
    width: int | None
    height: int | None
    fps: float | None
    media_sha256: str
    group: str
    extra: str = "{}"

    @property
    def answer_letter(self) -> str | None:
        """The letter of the right option, or None."""
        return None if self.answer_index is None else LETTERS[self.answer_index]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source row that did not become a sample, and why."""

    id: str
    source: str
    split: str
    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Trace:
    """What one teacher wrote about one sample.

    ``reasoning`` is the think section without its tags; ``answer_index`` is None where no valid answer was found, and
    ``correct`` is None where the label is not known. ``attempt`` counts from 1 and is a measurement, not content.
    """

    sample_id: str
    teacher: str
    model: str
    prompt_version: str
    raw_text: str
    reasoning: str
    answer_index: int | None
    invalid_reason: str | None
    correct: bool | None
    finish_reason: str
    tokens_in: int
    tokens_out: int
    attempt: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Merged:
    """One sample's cell in the ledger of the two teachers, and its merged reasoning if it was merged.

    ``reasoning`` is empty for samples that were not merged. ``vision_reasoning`` and ``audio_reasoning`` are what each
    teacher reasoned, for training with one modality removed. ``flags`` names what the merger's check found
    (``empty``, ``format``, ``wrong_answer``, ``too_long``, ``leak``, ``one_sided``, ``unfaithful``).
    """

    sample_id: str
    cell: str
    reasoning: str
    vision_reasoning: str
    audio_reasoning: str
    answer_index: int | None
    words: int
    flags: list[str]
    raw_text: str
    model: str
    prompt_version: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one model answered to one sample in one condition. ``latency_s`` is a measurement, not content."""

    sample_id: str
    split: str
    group: str
    question_type: str
    model: str
    condition: str
    raw_text: str
    answer_index: int | None
    invalid_reason: str | None
    correct_strict: bool | None
    correct_official: bool | None
    words: int
    tokens_in: int
    tokens_out: int
    latency_s: float
    error: str | None = field(default=None)


Record = Sample | Dropped | Trace | Merged | Prediction
R = TypeVar("R", Sample, Dropped, Trace, Merged, Prediction)

_STRINGS = pa.list_(pa.string())

SCHEMAS: dict[type, pa.Schema] = {
    Sample: pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("split", pa.string()),
            ("question", pa.string()),
            ("options", _STRINGS),
            ("answer_index", pa.int32()),
            ("question_type", pa.string()),
            ("needs", pa.string()),
            ("media_kind", pa.string()),
            ("frames", pa.list_(pa.binary())),
            ("frame_times_s", pa.list_(pa.float64())),
            ("audio", pa.binary()),
            ("duration_s", pa.float64()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("fps", pa.float64()),
            ("media_sha256", pa.string()),
            ("group", pa.string()),
            ("extra", pa.string()),
        ]
    ),
    Dropped: pa.schema([(name, pa.string()) for name in ("id", "source", "split", "where", "reason")]),
    Trace: pa.schema(
        [
            ("sample_id", pa.string()),
            ("teacher", pa.string()),
            ("model", pa.string()),
            ("prompt_version", pa.string()),
            ("raw_text", pa.string()),
            ("reasoning", pa.string()),
            ("answer_index", pa.int32()),
            ("invalid_reason", pa.string()),
            ("correct", pa.bool_()),
            ("finish_reason", pa.string()),
            ("tokens_in", pa.int32()),
            ("tokens_out", pa.int32()),
            ("attempt", pa.int32()),
            ("error", pa.string()),
        ]
    ),
    Merged: pa.schema(
        [
            ("sample_id", pa.string()),
            ("cell", pa.string()),
            ("reasoning", pa.string()),
            ("vision_reasoning", pa.string()),
            ("audio_reasoning", pa.string()),
            ("answer_index", pa.int32()),
            ("words", pa.int32()),
            ("flags", _STRINGS),
            ("raw_text", pa.string()),
            ("model", pa.string()),
            ("prompt_version", pa.string()),
        ]
    ),
    Prediction: pa.schema(
        [
            ("sample_id", pa.string()),
            ("split", pa.string()),
            ("group", pa.string()),
            ("question_type", pa.string()),
            ("model", pa.string()),
            ("condition", pa.string()),
            ("raw_text", pa.string()),
            ("answer_index", pa.int32()),
            ("invalid_reason", pa.string()),
            ("correct_strict", pa.bool_()),
            ("correct_official", pa.bool_()),
            ("words", pa.int32()),
            ("tokens_in", pa.int32()),
            ("tokens_out", pa.int32()),
            ("latency_s", pa.float64()),
            ("error", pa.string()),
        ]
    ),
}

#: Columns that measure how a row was made; two runs with the same content may differ in them.
MEASURED = frozenset({"latency_s", "attempt"})


def to_row(record: Record) -> dict[str, Any]:
    """The record as a dictionary of its columns."""
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
