"""Sound of a clip, cropped from its beginning: same bytes in, same bytes out."""

from __future__ import annotations

import contextlib
import io
import math
import wave
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

_UNKNOWN_BYTES = 2**31 - 2**16

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
        duration = _audio_duration(path, container, stream)
        if duration is not None and duration > limits.duration_s:
            raise MediaError(
                f"{path} is {duration:.0f} s long, more than {limits.duration_s:.0f} s: cut it into clips first."
            )
        # A length that the decoder only estimates (MP3, bare AAC) is no promise.
        promised = duration if container.format.name not in ("mp3", "aac") else None
        samples, lead_s = _first_samples(container, stream, seconds, rate)
    if promised is not None and lead_s + len(samples) / rate < min(seconds, promised) * COMPLETE:
        raise MediaError(
            f"{path} is cut short: {len(samples) / rate:.1f} s of {min(seconds, promised):.1f} s of sound are there; "
            "fetch it again."
        )
    if not len(samples):
        raise MediaError(f"{path} has a sound track without sound: fetch it again, or remove its rows.")
    samples = np.nan_to_num(samples, nan=0.0, posinf=1.0, neginf=-1.0)
    mono = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ") if rate != SAMPLE_RATE else samples
    silence = np.zeros(round(lead_s * SAMPLE_RATE), np.float32)
    mono = np.concatenate([silence, mono])[: round(seconds * SAMPLE_RATE)]
    return Sound(flac(mono), None if duration is None else round(duration, 6))


def _audio_duration(path: Path, container: InputContainer, stream: AudioStream) -> float | None:
    """The length that the file promises, or None."""
    if container.format.name == "wav":
        # FFmpeg goes by the file's size, and so cannot tell a file that was cut short.
        with contextlib.suppress(wave.Error, EOFError), wave.open(str(path)) as header:
            # A writer that could not go back left a length as large as can be.
            if header.getnframes() * header.getnchannels() * header.getsampwidth() < _UNKNOWN_BYTES:
                return float(header.getnframes() / header.getframerate())
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
    wanted = 0
    have = 0
    for frame in container.decode(stream):
        if not blocks:
            lead_s = min(seconds, max(0.0, (frame.time or 0.0) - start))
            # A little more than is asked for, so that the resampler's end falls behind the crop.
            wanted = math.ceil((seconds - lead_s + 0.1) * rate)
        for converted in converter.resample(frame):
            block = converted.to_ndarray().mean(axis=0, dtype=np.float32)
            blocks.append(block)
            have += len(block)
        if have >= wanted:
            break
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return samples[:wanted], lead_s


def flac(mono: Wave) -> bytes:
    """Mono 16 kHz floats in [-1, 1] as 16-bit FLAC bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(mono, -1.0, 1.0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def read_flac(data: bytes) -> Wave:
    """The floats of what ``flac`` wrote."""
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return np.asarray(samples, dtype=np.float32)
