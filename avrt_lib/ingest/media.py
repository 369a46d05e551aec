"""The media of one question: what its files hold, decoded to the student's budget."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from avrt_lib.config import DataConfig
from avrt_lib.errors import MediaError
from avrt_lib.ingest.container import Limits, check_file
from avrt_lib.ingest.pictures import Pictures, read_image, sample_video
from avrt_lib.ingest.sound import SAMPLE_RATE, Sound, decode_audio, read_flac
from avrt_lib.tables import sha256_file

__all__ = ["SAMPLE_RATE", "Budget", "Limits", "Media", "load", "read_flac"]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a clip is kept.

    Attributes:
        frames: number of frames, uniform in time.
        audio_seconds: length of the sound, from the clip's beginning.
        longest_side_px: frames are at most this large.
        jpeg_quality: quality of their JPEG bytes.
    """

    frames: int
    audio_seconds: float
    longest_side_px: int
    jpeg_quality: int

    @classmethod
    def of(cls, data: DataConfig) -> Budget:
        """The budget that a configuration asks for."""
        return cls(data.frames, data.audio_seconds, data.frame_longest_side_px, data.jpeg_quality)


@dataclass(frozen=True, slots=True)
class Media:
    """Decoded media, with the fields of a sample (see ``avrt_lib.records.Sample``)."""

    kind: str
    frames: list[bytes]
    frame_times_s: list[float]
    audio: bytes | None
    duration_s: float | None
    width: int | None
    height: int | None
    fps: float | None
    sha256: str


def load(
    budget: Budget,
    *,
    video: Path | None = None,
    audio: Path | None = None,
    image: Path | None = None,
    limits: Limits | None = None,
) -> Media:
    """Decode the media of one question.

    Args:
        budget: how much is kept.
        video: a clip; its own sound track is used unless ``audio`` is given.
        audio: a sound file of its own.
        image: a still image, instead of a video.
        limits: what is refused; the defaults suit clips up to 8K and four hours.

    Returns:
        The media. Its kind is ``video``, ``silent_video`` (no sound track; a still image without sound too),
        ``image+audio`` or ``audio`` (also where a "video" has no picture track).

    Raises:
        MediaError: the message names the file, what is wrong with it, and the mend.
    """
    limits = limits or Limits()
    files = [path for path in (video, image, audio) if path is not None]
    if not files:
        raise MediaError("The row names neither a video nor an image nor a sound: give one of them.")
    try:
        for path in files:
            check_file(path, limits)
        digest = _hash(files)
    except OSError as error:
        raise MediaError(
            f"{error.filename or files[0]} cannot be read ({error.strerror}): check who may read it."
        ) from error
    pictures: Pictures | None = None
    sound: Sound | None = None
    with _deadline(files[0], limits.decode_s):
        if video is not None:
            pictures = sample_video(
                video,
                count=budget.frames,
                longest_side_px=budget.longest_side_px,
                quality=budget.jpeg_quality,
                limits=limits,
            )
        elif image is not None:
            pictures = read_image(
                image, longest_side_px=budget.longest_side_px, quality=budget.jpeg_quality, limits=limits
            )
        source = audio or video
        if source is not None:
            sound = decode_audio(source, seconds=budget.audio_seconds, limits=limits)
            if sound is None and audio is not None:
                raise MediaError(f"{audio} has no sound track: name a sound file, or leave the path out.")
    if pictures is None and sound is None:
        raise MediaError(f"{files[0]} holds neither pictures nor sound: fetch it again, or remove its rows.")
    return _combined(pictures, sound, still=video is None, sha256=digest)


@contextmanager
def _deadline(path: Path, seconds: float) -> Iterator[None]:
    """End decoding that takes too long: a small file can ask for hours of work.

    An alarm reaches the main thread only, which is where the workers of ingest and ``avrt ask`` decode.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(_number: int, _frame: object) -> None:
        raise MediaError(f"{path} takes longer than {seconds:g} s to decode: cut it or encode it anew.")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _combined(pictures: Pictures | None, sound: Sound | None, *, still: bool, sha256: str) -> Media:
    if pictures is None:
        kind = "audio"
    elif sound is None:
        kind = "silent_video"
    else:
        kind = "image+audio" if still else "video"
    durations = [part.duration_s for part in (pictures, sound) if part is not None and part.duration_s is not None]
    return Media(
        kind=kind,
        frames=pictures.frames if pictures else [],
        frame_times_s=pictures.times_s if pictures else [],
        audio=sound.flac if sound else None,
        # The pictures say how long a clip is; its sound may be padded.
        duration_s=durations[0] if durations else None,
        width=pictures.width if pictures else None,
        height=pictures.height if pictures else None,
        fps=pictures.fps if pictures else None,
        sha256=sha256,
    )


def _hash(files: list[Path]) -> str:
    digests = [sha256_file(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
