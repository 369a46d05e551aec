"""Small media files with known content, written by the tests that need them."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

RED, BLUE = (220, 30, 30), (30, 30, 220)


def brightness(time_s: float, seconds: float) -> int:
    """The grey value of the middle of a frame at a time: it grows over the clip, so that a frame tells its time."""
    return round(20 + 210 * time_s / seconds)


def picture(time_s: float, seconds: float, width: int, height: int) -> np.ndarray:
    """A frame: red on top, blue below, and in the middle a grey that tells the time."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2], image[height // 2 :] = RED, BLUE
    image[height // 4 : -height // 4, width // 4 : -width // 4] = brightness(time_s, seconds)
    return image


def tone(hertz: float, seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """A sine in the first channel; the others are silent, so that averaging shows."""
    wave = np.zeros((channels, round(seconds * rate)), np.float32)
    wave[0] = 0.5 * np.sin(2 * np.pi * hertz * np.arange(wave.shape[1]) / rate)
    return wave


def write_clip(
    path: Path,
    *,
    seconds: float = 1.0,
    size: tuple[int, int] = (64, 48),
    fps: int = 10,
    picture_codec: str | None = "libx264",
    gop: int = 12,
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    sound_codec: str | None = "aac",
    rate: int = 44_100,
    layout: str = "mono",
    hertz: float = 440.0,
    sound_starts_s: float = 0.0,
    faststart: bool = False,
) -> Path:
    """A clip; without a codec it has no picture or no sound track."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        if picture_codec:
            video = container.add_stream(picture_codec, rate=fps)
            video.width, video.height = size
            video.pix_fmt = "yuv420p"
            video.codec_context.gop_size = gop
            if pixel_aspect:
                video.codec_context.sample_aspect_ratio = pixel_aspect
            if rotation:
                video.set_display_rotation(rotation)
        if sound_codec:
            audio = container.add_stream(sound_codec, rate=rate, layout=layout)
        if picture_codec:
            for i in range(round(seconds * fps)):
                frame = av.VideoFrame.from_ndarray(picture(i / fps, seconds, *size), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, fps)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if sound_codec:
            channels = len(audio.layout.channels)
            block = audio.codec_context.frame_size or 1024
            wave = tone(hertz, seconds - sound_starts_s, rate, channels)
            for start in range(0, wave.shape[1], block):
                part = np.ascontiguousarray(wave[:, start : start + block])
                sound = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                sound.sample_rate = rate
                sound.pts, sound.time_base = start + round(sound_starts_s * rate), Fraction(1, rate)
                converted = av.AudioResampler(format=audio.format, layout=layout, rate=rate).resample(sound)
                for piece in converted:
                    container.mux(audio.encode(piece))
            container.mux(audio.encode(None))
    return path


def write_image(path: Path, *, size: tuple[int, int] = (64, 48), orientation: int = 1) -> Path:
    """A still image; ``orientation`` is EXIF's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture(0.5, 1.0, *size))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


def open_jpeg(data: bytes) -> Image.Image:
    """The image of a frame's bytes."""
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    return image


def dominant_hertz(wave: np.ndarray, rate: int = 16_000) -> float:
    """The strongest frequency of a sound."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(spectrum.argmax() * rate / len(wave))
