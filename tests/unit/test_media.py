"""Decoding: what comes out of clips of all sorts, and what is said about files that are none."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from avrt_lib.errors import MediaError
from avrt_lib.ingest.media import Budget, Limits, load, read_flac
from tests.media_files import brightness, dominant_hertz, open_jpeg, write_clip, write_image

BUDGET = Budget(frames=4, audio_seconds=1.0, longest_side_px=56, jpeg_quality=92)
REAL = Path(__file__).parents[2].parent / "shared" / "real" / "daily_omni"


def middle(frame: bytes) -> int:
    """The grey in the middle of a frame."""
    image = open_jpeg(frame)
    return int(np.asarray(image.convert("L"))[image.height // 2, image.width // 2])


def colour(image: Image.Image, x: float, y: float) -> str:
    """Which colour a place of the image has, as fractions of its size."""
    red, _, blue = image.convert("RGB").getpixel((int(x * image.width), int(y * image.height)))  # type: ignore[misc]
    return "red" if red > blue else "blue"


def test_a_clip_with_sound(tmp_path: Path) -> None:
    media = load(BUDGET, video=write_clip(tmp_path / "c.mp4", seconds=2.0, hertz=700))
    assert media.kind == "video"
    assert media.frame_times_s == [0.2, 0.7, 1.2, 1.7]
    assert (media.width, media.height, media.fps, media.duration_s) == (64, 48, 10.0, 2.0)
    assert [open_jpeg(frame).size for frame in media.frames] == [(56, 42)] * 4
    assert media.audio is not None
    wave = read_flac(media.audio)
    assert len(wave) == 16_000
    assert dominant_hertz(wave) == pytest.approx(700, abs=3)
    assert 0.45 < np.abs(wave[1000:]).max() < 0.55


@pytest.mark.parametrize("count", [1, 2, 3, 8, 16])
def test_frames_are_uniform_in_time_and_show_their_time(count: int, tmp_path: Path) -> None:
    budget = Budget(count, 1.0, 448, 95)
    media = load(budget, video=write_clip(tmp_path / "c.mp4", seconds=4.0, sound_codec=None))
    wanted = [4.0 * (i + 0.5) / count for i in range(count)]
    for time_s, want, frame in zip(media.frame_times_s, wanted, media.frames, strict=True):
        assert want - 0.1 < time_s <= want
        assert middle(frame) == pytest.approx(brightness(time_s, 4.0), abs=4)


@pytest.mark.parametrize("gop", [10, 50, 400])
def test_seeking_finds_the_same_frames_as_decoding_everything(gop: int, tmp_path: Path) -> None:
    media = load(Budget(5, 1.0, 448, 95), video=write_clip(tmp_path / "c.mp4", seconds=40.0, gop=gop, sound_codec=None))
    for time_s, frame in zip(media.frame_times_s, media.frames, strict=True):
        assert middle(frame) == pytest.approx(brightness(time_s, 40.0), abs=4)


def test_a_clip_with_fewer_frames_than_asked_gives_each_once(tmp_path: Path) -> None:
    media = load(Budget(8, 1.0, 448, 92), video=write_clip(tmp_path / "c.mp4", seconds=0.3))
    assert media.frame_times_s == [0.0, 0.1, 0.2]
    assert len(set(media.frames)) == 3


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((64, 48), 448, (64, 48)),
        ((64, 48), 64, (64, 48)),
        ((640, 360), 448, (448, 252)),
        ((360, 640), 448, (252, 448)),
        ((64, 64), 28, (28, 28)),
    ],
)
def test_frames_are_shrunk_and_never_enlarged(
    size: tuple[int, int], longest: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    media = load(Budget(1, 1.0, longest, 92), video=write_clip(tmp_path / "c.mp4", size=size, seconds=0.2))
    assert open_jpeg(media.frames[0]).size == expected
    assert (media.width, media.height) == size


@pytest.mark.parametrize(
    ("rotation", "size", "red_at", "blue_at"),
    [
        (0, (64, 48), (0.5, 0.05), (0.5, 0.95)),
        (90, (48, 64), (0.05, 0.5), (0.95, 0.5)),
        (180, (64, 48), (0.5, 0.95), (0.5, 0.05)),
        (270, (48, 64), (0.95, 0.5), (0.05, 0.5)),
        (-90, (48, 64), (0.95, 0.5), (0.05, 0.5)),
    ],
)
def test_a_rotated_clip_is_set_upright(
    rotation: int,
    size: tuple[int, int],
    red_at: tuple[float, float],
    blue_at: tuple[float, float],
    tmp_path: Path,
) -> None:
    media = load(BUDGET, video=write_clip(tmp_path / "c.mp4", rotation=rotation))
    image = open_jpeg(media.frames[0])
    assert (media.width, media.height) == size
    assert (image.width > image.height) is (size[0] > size[1])
    assert colour(image, *red_at) == "red"
    assert colour(image, *blue_at) == "blue"


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(2, 1), (64, 24)), (Fraction(1, 2), (32, 48)), (Fraction(1, 1), (64, 48))]
)
def test_pixels_that_are_not_square_are_made_so(aspect: Fraction, size: tuple[int, int], tmp_path: Path) -> None:
    media = load(BUDGET, video=write_clip(tmp_path / "c.mp4", pixel_aspect=aspect))
    assert (media.width, media.height) == size


def test_a_clip_without_sound(tmp_path: Path) -> None:
    media = load(BUDGET, video=write_clip(tmp_path / "c.mp4", sound_codec=None))
    assert (media.kind, media.audio) == ("silent_video", None)
    assert len(media.frames) == 4


def test_a_clip_without_pictures(tmp_path: Path) -> None:
    media = load(BUDGET, video=write_clip(tmp_path / "c.mp4", picture_codec=None))
    assert (media.kind, media.frames, media.width) == ("audio", [], None)
    assert media.audio


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_and_layout_becomes_mono_at_16_khz(rate: int, layout: str, tmp_path: Path) -> None:
    clip = write_clip(
        tmp_path / "c.wav", seconds=1.5, picture_codec=None, sound_codec="pcm_s16le", rate=rate, layout=layout
    )
    media = load(BUDGET, audio=clip)
    wave = read_flac(media.audio or b"")
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    assert (media.kind, media.duration_s, len(wave)) == ("audio", 1.5, 16_000)
    assert dominant_hertz(wave) == pytest.approx(440, abs=2)
    # The tone is in one channel, and all are averaged.
    assert np.abs(wave[2000:-2000]).max() == pytest.approx(0.5 / channels, abs=0.02)


@pytest.mark.parametrize(("seconds", "samples"), [(0.4, 6_400), (1.0, 16_000), (2.5, 16_000)])
def test_sound_is_cropped_and_never_padded_behind(seconds: float, samples: int, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.wav", seconds=seconds, picture_codec=None, sound_codec="pcm_s16le", rate=48_000)
    assert len(read_flac(load(BUDGET, audio=clip).audio or b"")) == samples


def test_sound_that_starts_late_stays_late(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mkv", seconds=1.0, sound_codec="pcm_s16le", sound_starts_s=0.5, rate=16_000)
    wave = read_flac(load(BUDGET, video=clip).audio or b"")
    assert np.abs(wave[:7_500]).max() < 0.001
    assert np.abs(wave[8_500:]).max() > 0.4


@pytest.mark.parametrize(
    ("name", "picture", "sound"),
    [
        ("c.mp4", "libx264", "aac"),
        ("c.mov", "libx264", "pcm_s16le"),
        ("c.mkv", "libx264", "flac"),
        ("c.webm", "libvpx", "libopus"),
        ("c.avi", "mpeg4", "libmp3lame"),
        ("c.ts", "mpeg2video", "aac"),
        ("c.flv", "flv1", "libmp3lame"),
    ],
)
def test_containers_and_codecs(name: str, picture: str, sound: str, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / name, seconds=2.0, fps=25, picture_codec=picture, sound_codec=sound, rate=48_000)
    media = load(BUDGET, video=clip)
    assert media.kind == "video"
    assert media.duration_s == pytest.approx(2.0, abs=0.1)
    for time_s, frame in zip(media.frame_times_s, media.frames, strict=True):
        assert middle(frame) == pytest.approx(brightness(time_s, 2.0), abs=12)
    assert dominant_hertz(read_flac(media.audio or b"")) == pytest.approx(440, abs=3)


@pytest.mark.parametrize(("name", "codec"), [("a.wav", "pcm_s16le"), ("a.mp3", "libmp3lame"), ("a.flac", "flac")])
def test_a_sound_file_of_its_own_wins_over_the_clips(name: str, codec: str, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mp4", hertz=300)
    sound = write_clip(tmp_path / name, picture_codec=None, sound_codec=codec, hertz=900)
    media = load(BUDGET, video=clip, audio=sound)
    assert media.kind == "video"
    assert dominant_hertz(read_flac(media.audio or b"")) == pytest.approx(900, abs=3)
    assert media.sha256 != load(BUDGET, video=clip).sha256


def test_a_still_image_with_sound_and_without(tmp_path: Path) -> None:
    image = write_image(tmp_path / "i.jpg", size=(100, 60))
    sound = write_clip(tmp_path / "a.wav", picture_codec=None, sound_codec="pcm_s16le")
    both = load(BUDGET, image=image, audio=sound)
    assert (both.kind, both.frame_times_s, both.width, both.height, both.fps) == ("image+audio", [0.0], 100, 60, None)
    assert open_jpeg(both.frames[0]).size == (56, 34)
    assert load(BUDGET, image=image).kind == "silent_video"


def test_an_image_is_turned_as_its_exif_data_says(tmp_path: Path) -> None:
    media = load(BUDGET, image=write_image(tmp_path / "i.jpg", size=(100, 60), orientation=6))
    assert (media.width, media.height) == (60, 100)
    assert colour(open_jpeg(media.frames[0]), 0.95, 0.5) == "red"


def test_an_image_with_damaged_exif_data_is_named(tmp_path: Path) -> None:
    orientation, resolution = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI4s", 0x011A, 7, 4, b"abcd")
    tags = b"II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + struct.pack("<I", 0)
    Image.new("RGB", (40, 20)).save(tmp_path / "i.jpg", exif=b"Exif\0\0" + tags)
    with pytest.raises(MediaError, match=r"i\.jpg cannot be read as an image .*: it is damaged"):
        load(BUDGET, image=tmp_path / "i.jpg")


def test_the_same_bytes_give_the_same_bytes(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mp4", seconds=2.0, size=(320, 240))
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    assert load(BUDGET, video=clip) == load(BUDGET, video=copy)


# Files that are none, and files beyond a limit.


def _cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def _named(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _playlist(folder: Path, text: str) -> Path:
    """A text that names another file, which would be opened if playlists were."""
    write_clip(folder / "other.ts")
    return _named(folder / "c.mp4", text.encode())


def _song_with_sound_cut(folder: Path) -> Path:
    clip = write_clip(folder / "c.wav", seconds=2.0, picture_codec=None, sound_codec="pcm_s16le")
    data = bytearray(clip.read_bytes()[:40_000])
    # The header still promises two seconds.
    data[4:8] = struct.pack("<I", 176_000)
    clip.write_bytes(bytes(data))
    return clip


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "c.mp4", "is not there"),
        (lambda folder: folder, "is not there"),
        (lambda folder: _named(folder / "c.mp4", b""), r"is empty \(0 bytes\)"),
        (lambda folder: _named(folder / "c.mp4", b"\0" * 5000), "cannot be decoded"),
        (lambda folder: _named(folder / "c.mp4", b"<html>404</html>"), "cannot be decoded"),
        (lambda folder: _cut(write_clip(folder / "c.mp4", seconds=3.0), 0.6), "cannot be decoded"),
        (
            lambda folder: _cut(write_clip(folder / "c.mp4", seconds=9.0, faststart=True), 0.6),
            "cut short|cannot be decoded",
        ),
        (
            lambda folder: _named(folder / "c.mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"),
            "cannot be decoded",
        ),
        (lambda folder: _playlist(folder, "ffconcat version 1.0\nfile other.ts\n"), "cannot be decoded"),
    ],
)
def test_a_file_that_is_no_clip_is_named(make: Callable[[Path], Path], says: str, tmp_path: Path) -> None:
    clip = make(tmp_path)
    with pytest.raises(MediaError, match=says) as caught:
        load(BUDGET, video=clip)
    assert str(clip) in str(caught.value)


def test_a_cut_sound_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"c\.wav is cut short: 0\.\d s of 1\.0 s"):
        load(BUDGET, audio=_song_with_sound_cut(tmp_path))


def test_a_cut_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"i\.jpg cannot be read as an image"):
        load(BUDGET, image=_cut(write_image(tmp_path / "i.jpg", size=(300, 300)), 0.5))


def test_a_clip_given_as_sound_must_have_some(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"c\.mp4 has no sound track"):
        load(BUDGET, audio=write_clip(tmp_path / "c.mp4", sound_codec=None))


def test_a_row_must_name_media() -> None:
    with pytest.raises(MediaError, match="neither a video nor an image nor a sound"):
        load(BUDGET)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mp4")
    clip.chmod(0)
    with pytest.raises(MediaError, match=r"c\.mp4 cannot be read \(Permission denied\)"):
        load(BUDGET, video=clip)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(file_bytes=1000), "GiB that are read"),
        (Limits(duration_s=1.0), "2 s long, more than 1 s"),
        (Limits(pixels=1000), "64×48 pixels, more than 1000"),
        (Limits(aspect=1.2), "64×48 pixels, a strip"),
        (Limits(decode_s=0.001), "longer than 0.001 s to decode"),
    ],
)
def test_a_clip_beyond_a_limit_is_refused(limits: Limits, says: str, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mp4", seconds=2.0)
    with pytest.raises(MediaError, match=says):
        load(BUDGET, video=clip, limits=limits)


@pytest.mark.parametrize("limits", [Limits(pixels=1000), Limits(aspect=1.2), Limits(file_bytes=100)])
def test_an_image_beyond_a_limit_is_refused(limits: Limits, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"i\.png has"):
        load(BUDGET, image=write_image(tmp_path / "i.png"), limits=limits)


_MAKERS: dict[str, Callable[[Path], Path]] = {
    "video": lambda folder: write_clip(folder / "c.mp4", faststart=True, size=(32, 32), rate=16_000),
    "audio": lambda folder: write_clip(folder / "c.wav", picture_codec=None, sound_codec="pcm_s16le", rate=8_000),
    "image": lambda folder: write_image(folder / "i.jpg"),
}


@pytest.mark.parametrize("kind", list(_MAKERS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_media_or_a_media_error(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    if not whole.exists():
        _MAKERS[kind](tmp_path).rename(whole)
    content = bytearray(whole.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=12)):
        content[place] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        media = load(BUDGET, limits=Limits(pixels=10_000), **{kind: damaged})
    except MediaError as error:
        message = str(error)
    else:
        assert media.frames or media.audio
        return
    assert str(damaged) in message


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not beside this repository")
def test_real_clips() -> None:
    budget = Budget(frames=8, audio_seconds=10.0, longest_side_px=448, jpeg_quality=92)
    clips = sorted(REAL.glob("Videos/*/*_video.mp4"))
    assert clips
    for clip in clips:
        media = load(budget, video=clip, audio=clip.with_name(clip.name.replace("_video.mp4", "_audio.wav")))
        assert (media.kind, media.width, media.height) == ("video", 640, 360)
        assert len(media.frames) == 8
        assert [open_jpeg(frame).size for frame in media.frames] == [(448, 252)] * 8
        assert media.duration_s == pytest.approx(30.0, abs=0.1)
        assert len(read_flac(media.audio or b"")) == 160_000
        own = read_flac(load(budget, video=clip).audio or b"")
        separate = read_flac(media.audio or b"")
        assert np.corrcoef(own, separate)[0, 1] > 0.9, "the clip's own sound is the one beside it, at the same time"
