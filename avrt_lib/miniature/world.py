"""A procedural audio-visual world, rendered to real MP4 clips with AVQA-format annotations.

A clip shows one colour and sounds one pitch. Its question offers four options of one of four kinds:

- ``either``: the options differ in sight and in sound, so one modality suffices;
- ``both``: two sights are paired with two sounds, so one modality leaves two options;
- ``sound`` and ``sight``: only one modality tells.

Everything is a function of a seed and a clip's number, so a split of any size can be rendered again anywhere.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avrt_lib.tables import atomic_path, write_json
from avrt_lib.worker_processes import prepare_worker

SIGHTS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 48, 44),
    "green": (52, 178, 74),
    "blue": (48, 84, 212),
    "yellow": (226, 208, 52),
}
#: Fundamental frequency of each sound, from and to, in Hz.
SOUNDS: Mapping[str, tuple[float, float]] = {
    "low": (150.0, 220.0),
    "middle": (430.0, 620.0),
    "high": (1200.0, 1700.0),
    "shrill": (3300.0, 4600.0),
}
#: How often each kind of question is asked.
KINDS: Mapping[str, float] = {"either": 0.50, "both": 0.40, "sound": 0.05, "sight": 0.05}
QUESTIONS: Mapping[str, str] = {
    "either": "Which colour and sound?",
    "both": "Which colour and sound?",
    "sound": "Which sound?",
    "sight": "Which colour?",
}
#: AVQA's question_relation of each kind.
RELATIONS: Mapping[str, str] = {"either": "Both", "both": "Both", "sound": "Sound", "sight": "View"}

FRAME_PX = 64
FRAMES_PER_SECOND = 8
SAMPLE_RATE = 16_000
CLIP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Question:
    """One clip and its question.

    Attributes:
        kind: ``either``, ``both``, ``sound`` or ``sight``.
        sight, sound: what the clip shows and sounds.
        pairs: each option as (sight, sound); None where the option does not speak of that modality.
        answer: index of the right option.
    """

    kind: str
    sight: str
    sound: str
    pairs: tuple[tuple[str | None, str | None], ...]
    answer: int

    @property
    def text(self) -> str:
        """The question without its options."""
        return QUESTIONS[self.kind]

    @property
    def options(self) -> list[str]:
        """The option texts."""
        return [" ".join(filter(None, pair)) for pair in self.pairs]


def draw_question(rng: random.Random, kinds: Mapping[str, float] = KINDS) -> Question:
    """Draw one clip and its question; all sights, sounds and places of the right option are equally likely."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    sights, sounds = rng.sample(list(SIGHTS), 4), rng.sample(list(SOUNDS), 4)
    sight, sound = sights[0], sounds[0]
    pairs: list[tuple[str | None, str | None]]
    if kind == "either":
        pairs = list(zip(sights, sounds, strict=True))
    elif kind == "both":
        pairs = [(a, b) for a in sights[:2] for b in sounds[:2]]
    elif kind == "sound":
        pairs = [(None, b) for b in sounds]
    else:
        pairs = [(a, None) for a in sights]
    right = pairs[0]
    rng.shuffle(pairs)
    return Question(kind, sight, sound, tuple(pairs), pairs.index(right))


def draw_frames(rng: random.Random, sight: str, frames: int, size_px: int = FRAME_PX) -> NDArray[np.uint8]:
    """Pictures of one sight, (frames, size, size, 3) uint8 RGB: a shaded field, a bar that crosses it, some noise."""
    base = np.array(SIGHTS[sight], np.float32) + np.array([rng.uniform(-22, 22) for _ in range(3)], np.float32)
    noise = np.random.RandomState(rng.randrange(2**31))
    shade = np.linspace(rng.uniform(0.85, 1.0), rng.uniform(1.0, 1.12), size_px, dtype=np.float32)
    field = base[None, None, :] * shade[:, None, None]
    pictures = np.repeat(np.broadcast_to(field, (size_px, size_px, 3))[None], frames, axis=0).copy()
    width, start, step = size_px // 10, rng.uniform(0, size_px), rng.uniform(-6, 6)
    for number in range(frames):
        left = int(start + step * number) % size_px
        pictures[number, :, left : left + width] *= 0.75
    pictures += noise.randn(*pictures.shape).astype(np.float32) * 8
    return np.clip(pictures, 0, 255).astype(np.uint8)


def draw_sound(rng: random.Random, sound: str, seconds: float = CLIP_SECONDS) -> NDArray[np.float32]:
    """One sound, mono float32 at 16 kHz in [-1, 1]: a tone with a weak overtone, a swell, and noise."""
    frequency = rng.uniform(*SOUNDS[sound])
    time = np.arange(int(SAMPLE_RATE * seconds), dtype=np.float64) / SAMPLE_RATE
    phase = 2 * np.pi * frequency * time + rng.uniform(0, 2 * np.pi)
    swell = 1 + 0.2 * np.sin(2 * np.pi * rng.uniform(1, 4) * time)
    wave = rng.uniform(0.25, 0.6) * swell * (np.sin(phase) + 0.1 * np.sin(2 * phase))
    noise = np.random.RandomState(rng.randrange(2**31)).randn(len(time)) * 0.01
    return np.clip(wave + noise, -1, 1).astype(np.float32)


def clip_question(seed: int, number: int, kinds: Mapping[str, float] = KINDS) -> Question:
    """The question of clip ``number`` of the world with this seed."""
    return draw_question(random.Random(f"question {seed} {number}"), kinds)


def write_clip(path: Path, seed: int, number: int, sight: str, sound: str) -> None:
    """Write one clip as MP4 with H.264 video and AAC sound; atomically, and the same bytes for the same arguments."""
    import av

    rng = random.Random(f"media {seed} {number}")
    pictures = draw_frames(rng, sight, int(FRAMES_PER_SECOND * CLIP_SECONDS))
    wave = draw_sound(rng, sound)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        # One thread: with several, x264 may cut a frame into slices by the number of cores. And none of its assembler:
        # with that for AVX-512 (PyAV 18 on an AMD EPYC) one clip of four came out in other bytes each time.
        options = {"preset": "veryfast", "crf": "20", "threads": "1", "x264-params": "asm=0"}
        video = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        video.width = video.height = FRAME_PX
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for picture in pictures:
            for packet in video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in video.encode(None):
            container.mux(packet)
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
            for packet in audio.encode(frame):
                container.mux(packet)
        for packet in audio.encode(None):
            container.mux(packet)


def annotation(prefix: str, seed: int, number: int) -> dict[str, object]:
    """The AVQA-format row of one clip."""
    question = clip_question(seed, number)
    name = f"{prefix}-{number:06d}"
    return {
        "id": number,
        "video_name": name,
        "video_id": number,
        "question_text": question.text,
        "multi_choice": question.options,
        "answer": question.answer,
        "question_relation": RELATIONS[question.kind],
        "question_type": question.kind,
        "sight": question.sight,
        "sound": question.sound,
    }


def render_dataset(
    folder: Path,
    *,
    count: int,
    seed: int,
    prefix: str,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Render ``count`` clips and their annotations, as a folder in AVQA's layout.

    Args:
        folder: gets ``annotations.json`` and ``videos/PREFIX-NUMBER.mp4``; clips that are there already are kept, so a
            rendering that was killed goes on.
        count: how many clips, with one question each.
        seed: of the world; different seeds share no clip.
        prefix: of the clips' names; give each split its own.
        workers: processes that render.
        progress: called with the number of clips done since the last call.

    Returns:
        The annotation file, which is written last.
    """
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    rows = [annotation(prefix, seed, number) for number in range(count)]
    missing = [number for number in range(count) if not (videos / f"{rows[number]['video_name']}.mp4").exists()]
    if progress is not None:
        progress(count - len(missing))
    if missing:
        chunks = [missing[at : at + 64] for at in range(0, len(missing), 64)]
        spawn = multiprocessing.get_context("spawn")  # the caller may have threads, and a fork would copy their locks
        with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=spawn, initializer=prepare_worker) as pool:
            for done in pool.map(_write_clips, repeat(videos), repeat(prefix), repeat(seed), chunks):
                if progress is not None:
                    progress(done)
    write_json(folder / "annotations.json", rows)
    return folder / "annotations.json"


def _write_clips(videos: Path, prefix: str, seed: int, numbers: list[int]) -> int:
    for number in numbers:
        question = clip_question(seed, number)
        write_clip(videos / f"{prefix}-{number:06d}.mp4", seed, number, question.sight, question.sound)
    return len(numbers)


def load_annotations(file: Path) -> list[dict[str, object]]:
    """The rows of a rendered data set."""
    rows: list[dict[str, object]] = json.loads(file.read_text(encoding="utf-8"))
    return rows
