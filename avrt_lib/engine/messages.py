"""OpenAI chat messages from a sample: media as data-URL parts, video before audio before text.

A missing modality means that its part is left out. Teachers get frames as separate images, the student gets them as one
video, so that the frames that ingest chose arrive unchanged wherever it runs (``avrt_lib.engine.student_media``).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from avrt_lib import prompts
from avrt_lib.errors import MediaError
from avrt_lib.records import Sample

Part = dict[str, Any]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def image_parts(frames: Sequence[bytes]) -> list[Part]:
    """One ``image_url`` part for each JPEG frame, in order."""
    return [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_base64(frame)}"}} for frame in frames]


def video_part(frames: Sequence[bytes]) -> Part:
    """All JPEG frames as one ``video_url`` part: vLLM's pre-sampled form, frames joined by commas."""
    return {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(map(_base64, frames))}}


def audio_part(flac: bytes) -> Part:
    """Audio bytes (FLAC, or whatever libsndfile reads) as an ``input_audio`` part of 16-bit WAV.

    Raises:
        MediaError: where the bytes cannot be decoded.
    """
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(flac), dtype="int16")
    except soundfile.LibsndfileError as error:
        raise MediaError(
            f"A sample's audio ({len(flac)} bytes) cannot be decoded ({error}): ingest it again."
        ) from error
    wav = io.BytesIO()
    soundfile.write(wav, samples, rate, format="WAV", subtype="PCM_16")
    return {"type": "input_audio", "input_audio": {"data": _base64(wav.getvalue()), "format": "wav"}}


def chat(text: str, parts: Sequence[Part] = (), system: str | None = None) -> list[dict[str, Any]]:
    """Messages of one user turn: the media parts, then the text."""
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    content: str | list[Part] = [*parts, {"type": "text", "text": text}] if parts else text
    return [*messages, {"role": "user", "content": content}]


def teacher_messages(role: str, prompt: str, sample: Sample) -> list[dict[str, Any]] | None:
    """What a teacher is asked.

    Args:
        role: ``vision`` (gets the frames) or ``audio`` (gets the sound).
        prompt: name of the teacher's prompt template.
        sample: the question and its media.

    Returns:
        The messages, or None where the sample lacks the teacher's modality.
    """
    if role == "vision":
        parts = image_parts(sample.frames)
    else:
        parts = [] if sample.audio is None else [audio_part(sample.audio)]
    if not parts:
        return None
    text = prompts.question_prompt(role, prompt, sample.question, sample.options)
    return chat(text, parts, prompts.template(role, prompt).system)


def student_messages(prompt: str, sample: Sample, condition: str = "av") -> list[dict[str, Any]] | None:
    """What the student is asked, in training's evaluation, in evaluation and in serving alike.

    Args:
        prompt: name of the student's prompt template.
        sample: the question and its media.
        condition: ``av``, ``audio_only`` or ``vision_only``: which modalities it gets.

    Returns:
        The messages, or None where the condition leaves no modality of this sample.
    """
    video = [video_part(sample.frames)] if sample.frames and condition != "audio_only" else []
    audio = [audio_part(sample.audio)] if sample.audio is not None and condition != "vision_only" else []
    if not (video or audio):
        return None
    text = prompts.question_prompt("student", prompt, sample.question, sample.options)
    return chat(text, [*video, *audio], prompts.template("student", prompt).system)
