"""Frames of a clip, uniform in time: same bytes in, same bytes out.

Of ``n`` frames, frame ``i`` is the one shown at ``(i + 1/2) / n`` of the clip, so that a single frame is the middle
one, and the black first and last frames of many clips are left out.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from avrt_lib.errors import MediaError
from avrt_lib.ingest.container import COMPLETE, Limits, opened

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# Containers with an index of their key frames; in others a seek is a guess.
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Seeking costs an own decoder start, so it pays only where it saves decoding at least this many seconds.
_SEEK_WORTH_S = 2.0


@dataclass(frozen=True, slots=True)
class Pictures:
    """Sampled frames of a clip as JPEG bytes, their times in seconds, and the upright size of the source."""

    frames: list[bytes]
    times_s: list[float]
    width: int
    height: int
    fps: float | None
    duration_s: float | None


def video_stream(path: Path, container: InputContainer) -> VideoStream | None:
    """The first picture track that moves (the cover of a song does not), ready to be decoded.

    Raises:
        MediaError: where FFmpeg has no decoder for it.
    """
    for stream in container.streams.video:
        if Disposition(stream.disposition) & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise MediaError(f"{path} has pictures of an unknown codec: convert it to H.264, or fetch it again.")
        # One thread: with several, how FFmpeg conceals a damaged slice depends on their order.
        stream.codec_context.thread_count = 1
        return stream
    return None


def sample_video(path: Path, *, count: int, longest_side_px: int, quality: int, limits: Limits) -> Pictures | None:
    """Decode ``count`` frames at uniform times.

    Args:
        path: the clip.
        count: how many frames; a clip with fewer distinct frames gives those it has.
        longest_side_px: larger frames are made this small; smaller ones stay as they are.
        quality: JPEG quality.
        limits: what is refused.

    Returns:
        The frames, upright (rotation and non-square pixels of the source are applied), or None without a picture track.

    Raises:
        MediaError: where the file is damaged, cut short, or beyond a limit.
    """
    with opened(path) as container:
        stream = video_stream(path, container)
        if stream is None:
            return None
        _check_size(path, stream.codec_context.width, stream.codec_context.height, limits)
        index = _Index.of(path, container, stream)
    duration = index.end - index.start
    if duration > limits.duration_s:
        raise MediaError(
            f"{path} is {duration:.0f} s long, more than {limits.duration_s:.0f} s: cut it into clips first."
        )
    targets = index.targets(count)
    frames: list[bytes] = []
    times: list[float] = []
    size = (0, 0)
    # Opened anew rather than rewound: not every container finds its first frame again.
    with opened(path) as container:
        stream = video_stream(path, container)
        assert stream is not None
        reformatter = VideoReformatter()
        for target, frame in zip(targets, _pick(path, container, stream, index, targets), strict=True):
            image, size = _upright(path, frame, stream, limits, reformatter)
            frames.append(jpeg(image, longest_side_px, quality))
            times.append(round(target * index.base - index.start, 6))
        rate = stream.average_rate or stream.guessed_rate
        fps = round(float(rate), 6) if rate else None
    return Pictures(frames, times, size[0], size[1], fps, round(duration, 6))


@dataclass(frozen=True, slots=True)
class _Index:
    """The presentation times of a picture track: what is really in the file, whatever its header says."""

    times: list[int]
    keys: list[int]
    base: float
    end: float
    seekable: bool

    @property
    def start(self) -> float:
        return self.times[0] * self.base

    @classmethod
    def of(cls, path: Path, container: InputContainer, stream: VideoStream) -> _Index:
        base = float(stream.time_base or Fraction(1, 90_000))
        times: list[int] = []
        keys: list[int] = []
        last = 0
        complete = True
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.pts is None:
                complete = False
                break
            times.append(packet.pts)
            last = max(last, packet.pts + (packet.duration or 0))
            if packet.is_keyframe:
                keys.append(packet.pts)
        if not complete:
            # AVI and raw streams give no times before decoding.
            with opened(path) as again:
                decoded = again.decode(again.streams[stream.index])
                times = [frame.pts for frame in decoded if frame.pts is not None]
            keys = []
            last = max(times, default=0)
        if not times:
            raise MediaError(f"{path} has a picture track without pictures: fetch it again, or remove its rows.")
        promised = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
        have = last * base - min(times) * base
        if promised is not None and complete and have < promised * COMPLETE:
            raise MediaError(f"{path} is cut short: {have:.1f} s of {promised:.1f} s are there; fetch it again.")
        return cls(sorted(times), sorted(keys), base, last * base, complete and container.format.name in _SEEKABLE)

    def targets(self, count: int) -> list[int]:
        """Times (in the track's units) of the frames shown at the middles of ``count`` equal parts, each once."""
        span = self.end / self.base - self.times[0]
        wanted = [self.times[0] + span * (i + 0.5) / count for i in range(count)]
        shown = [self.times[max(0, bisect_right(self.times, t) - 1)] for t in wanted]
        return list(dict.fromkeys(shown))

    def seek_point(self, position: int, target: int) -> int | None:
        """A key frame worth seeking to on the way from ``position`` to ``target``, or None."""
        if not self.seekable or not self.keys:
            return None
        at = bisect_right(self.keys, target) - 1
        if at >= 0 and (self.keys[at] - position) * self.base > _SEEK_WORTH_S:
            return self.keys[at]
        return None


def _pick(
    path: Path, container: InputContainer, stream: VideoStream, index: _Index, targets: list[int]
) -> Iterator[VideoFrame]:
    """The decoded frame of each target, in order.

    A target is met by the last frame that is not later, so a frame that the decoder left out costs its own place only.
    """
    decoded: Iterator[VideoFrame] = container.decode(stream)
    before: VideoFrame | None = None
    ahead: VideoFrame | None = None
    position = index.times[0]
    for target in targets:
        point = index.seek_point(position, target)
        if point is not None:
            container.seek(point, stream=stream, backward=True)
            decoded, before, ahead = container.decode(stream), None, None
        while ahead is None or (ahead.pts or 0) <= target:
            before = ahead or before
            ahead = next(decoded, None)
            if ahead is None or ahead.pts is None:
                break
        # A last frame stays the answer for later targets as well.
        best = before if before is not None else ahead
        if best is None:
            raise MediaError(f"{path} has damaged pictures at {target * index.base:.1f} s: fetch it again.")
        position = best.pts or position
        yield best


def _check_size(path: Path, width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"{path} has pictures without a size: it is damaged; fetch it again.")
    if width * height > limits.pixels:
        raise MediaError(f"{path} has {width}×{height} pixels, more than {limits.pixels}: scale it down first.")
    if max(width, height) > limits.aspect * min(width, height):
        raise MediaError(f"{path} has {width}×{height} pixels, a strip that no vision encoder takes: crop it first.")


def _upright(
    path: Path, frame: VideoFrame, stream: VideoStream, limits: Limits, reformatter: VideoReformatter
) -> tuple[Image.Image, tuple[int, int]]:
    """The frame as it is meant to be seen, and that size in pixels of the source."""
    _check_size(path, frame.width, frame.height, limits)
    # One reformatter with one thread: each call of `to_image` would start threads of its own, which costs more than the
    # conversion of a small frame.
    image = Image.fromarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
    pixel = stream.sample_aspect_ratio
    if pixel and pixel > 0 and pixel != 1:
        # Shrink the longer direction of the pixels rather than stretch the other, since nothing is ever upscaled.
        width = image.width if pixel > 1 else max(1, round(image.width * pixel))
        height = max(1, round(image.height / pixel)) if pixel > 1 else image.height
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    # FFmpeg counts the rotation of the display matrix counter-clockwise, and so does Pillow.
    turn = round(frame.rotation) % 360
    if turn:
        image = image.rotate(turn, expand=True, resample=Image.Resampling.BICUBIC)
    return image, image.size


def jpeg(image: Image.Image, longest_side_px: int, quality: int) -> bytes:
    """JPEG bytes of the image, shrunk so that its longest side is at most ``longest_side_px``; never upscaled."""
    image = image.convert("RGB")
    scale = longest_side_px / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def read_image(path: Path, *, longest_side_px: int, quality: int, limits: Limits) -> Pictures:
    """A still image as one frame, turned as its EXIF data says.

    Raises:
        MediaError: where the file is no image, is cut short, or is beyond a limit.
    """
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            _check_size(path, image.width, image.height, limits)
            image.load()
            upright = ImageOps.exif_transpose(image) or image
            return Pictures([jpeg(upright, longest_side_px, quality)], [0.0], *upright.size, fps=None, duration_s=None)
    except MediaError:
        raise
    except Exception as error:  # Pillow's readers, of tags above all, have no common class of errors
        raise MediaError(f"{path} cannot be read as an image ({error}): it is damaged; fetch it again.") from error
