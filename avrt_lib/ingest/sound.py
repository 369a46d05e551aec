"""Sound of a clip, cropped from its beginning: same bytes in, same bytes out."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import av
import numpy as np
import soundfile
import soxr

from avrt_lib.errors import MediaError
from avrt_lib.ingest.container import COMPLETE, Limits, opened

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

#: Sampling rate of all decoded sound in Hz: what the audio encoders of the teachers and the student take.
SAMPLE_RATE = 16_000

Wave: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Sound:
    """Mono 16 kHz FLAC bytes of a clip's first seconds, and the length of the whole sound track where it is known."""

    flac: bytes
    duration_s: float | None


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The first sound track that FFmpeg can read."""
    return next((s for s in container.streams.audio if s.codec_context is not None and s.rate), None)


def decode_audio(path: Path, *, seconds: float, limits: Limits) -> Sound | None:
    """Decode the first ``seconds`` of a file's sound to mono 16 kHz FLAC.

    Channels are averaged. Where the sound of a video starts after its pictures, silence is put before it, so that time
    zero is the same for both.

    Returns:
        The sound, or None where the file has no sound track.

    Raises:
        MediaError: where the file is damaged, cut short, or beyond a limit.
    """
    with opened(path) as container:
        stream = audio_stream(container)
        if stream is None:
            return None
        rate = stream.rate
        duration = _audio_duration(container, stream)
        if duration is not None and duration > limits.duration_s:
            raise MediaError(
                f"{path} is {duration:.0f} s long, more than {limits.duration_s:.0f} s: cut it into clips first."
            )
        wave, lead_s = _first_samples(container, stream, seconds, rate)
    # A length that the decoder only estimates (MP3, bare AAC) is no promise.
    if duration is not None and container.format.name not in ("mp3", "aac"):
        expected = min(seconds, duration)
        if lead_s + len(wave) / rate < expected * COMPLETE:
            raise MediaError(
                f"{path} is cut short: {len(wave) / rate:.1f} s of {expected:.1f} s of sound are there; fetch it again."
            )
    if not len(wave):
        raise MediaError(f"{path} has a sound track without sound: fetch it again, or remove its rows.")
    wave = np.nan_to_num(wave, nan=0.0, posinf=1.0, neginf=-1.0)
    mono = soxr.resample(wave, rate, SAMPLE_RATE, quality="HQ") if rate != SAMPLE_RATE else wave
    silence = np.zeros(round(lead_s * SAMPLE_RATE), np.float32)
    mono = np.concatenate([silence, mono])[: round(seconds * SAMPLE_RATE)]
    return Sound(flac(mono), None if duration is None else round(duration, 6))


def _audio_duration(container: InputContainer, stream: AudioStream) -> float | None:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _first_samples(container: InputContainer, stream: AudioStream, seconds: float, rate: int) -> tuple[Wave, float]:
    """The first samples as mono floats at the track's own rate, and by how many seconds they start after the clip."""
    start = (container.start_time or 0) / av.time_base
    # Only the sample format changes here: channels and rate are handled below, in floating point.
    converter = av.AudioResampler(format="fltp", rate=rate)
    blocks: list[Wave] = []
    lead_s = 0.0
    missing = math.inf
    for frame in container.decode(stream):
        if not blocks:
            lead_s = min(seconds, max(0.0, (frame.time or 0.0) - start))
            # A little more than is asked for, so that the resampler's end falls behind the crop.
            missing = math.ceil((seconds - lead_s + 0.1) * rate)
        for converted in converter.resample(frame):
            block = converted.to_ndarray().mean(axis=0, dtype=np.float32)
            blocks.append(block)
            missing -= len(block)
        if missing <= 0:
            break
    wave = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return np.ascontiguousarray(wave[: len(wave) + min(0, int(missing)) if missing < 0 else None]), lead_s


def flac(mono: Wave) -> bytes:
    """Mono 16 kHz floats in [-1, 1] as 16-bit FLAC bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(mono, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def read_flac(data: bytes) -> Wave:
    """The floats of what ``flac`` wrote."""
    wave, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return np.asarray(wave, dtype=np.float32)
