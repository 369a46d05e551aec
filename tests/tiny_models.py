"""Tiny random models and data for tests, made in about a second."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np

from avrt_lib.config import Config
from avrt_lib.records import Merged, Sample
from avrt_lib.tables import write_table

SECONDS = 1.0


def save_student(folder: Path, *, seed: int = 0, hidden: int = 64, layers: int = 1) -> Path:
    """Write a random student of the miniature's architecture in the full Omni layout and return its folder."""
    import torch

    from avrt_lib.miniature import families
    from avrt_lib.training.export import export_thinker

    torch.manual_seed(seed)
    size = families.Size(hidden=hidden, layers=layers, heads=2, intermediate=128, encoder_hidden=32, encoder_layers=1)
    export_thinker(*families.build_student(size), folder)
    return folder


def jpeg(frame: Any) -> bytes:
    """A (height, width, 3) uint8 picture as JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def flac(wave: Any) -> bytes:
    """A mono 16 kHz wave as FLAC."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.asarray(wave), 16_000, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def sample(number: int, *, split: str = "train", frames: int = 4, seconds: float = SECONDS, side: int = 28) -> Sample:
    """A sample of the miniature's world, without a video file; zero frames or seconds leave that medium out."""
    from avrt_lib.miniature import world

    question = world.clip_question(7, number)
    rng = random.Random(f"test media {number}")
    pictures = world.draw_frames(rng, question.sight, frames, side) if frames else []
    kind = "video" if frames and seconds else "silent_video" if frames else "audio"
    return Sample(
        id=f"{split}-{number:04d}",
        source="test",
        split=split,
        question=question.text,
        options=question.options,
        answer_index=question.answer,
        question_type=question.kind,
        needs="both",
        media_kind=kind,
        frames=[jpeg(picture) for picture in pictures],
        frame_times_s=[i / max(1, frames) for i in range(frames)],
        audio=flac(world.draw_sound(rng, question.sound, seconds)) if seconds else None,
        duration_s=seconds or None,
        width=side,
        height=side,
        fps=8.0,
        media_sha256=f"{number:064d}",
        group=f"clip-{number}",
    )


def merged_row(number: int, *, split: str = "train") -> Merged:
    """The merged trace of ``sample(number)``, as the miniature's merger would write it."""
    from avrt_lib.miniature import texts, world

    question = world.clip_question(7, number)
    reasoning = texts.merged_reasoning(question)
    return Merged(
        sample_id=f"{split}-{number:04d}",
        cell="both",
        reasoning=reasoning,
        vision_reasoning=f"I see {question.sight}.{texts.weighing(question, 0, question.sight)}",
        audio_reasoning=f"I hear {question.sound}.{texts.weighing(question, 1, question.sound)}",
        answer_index=question.answer,
        words=len(reasoning.split()),
        flags=[],
        raw_text="",
        model="test",
        prompt_version="test",
    )


def write_data(folder: Path, *, train: int, validation: int = 8) -> tuple[Path, Path]:
    """Write tables of samples and of merged traces and return their folders."""
    rows = [sample(n) for n in range(train)] + [sample(10_000 + n, split="validation") for n in range(validation)]
    write_table(folder / "samples", Sample, rows)
    write_table(folder / "merged", Merged, [merged_row(n) for n in range(train)])
    return folder / "samples", folder / "merged"


def config(student: Path | str, **sections: dict[str, Any]) -> Config:
    """A configuration for the tiny student; keyword arguments are merged into its sections."""
    engine = {"model": "unused"}
    document: dict[str, Any] = {
        "name": "test",
        "data": {"all": {"format": "miniature", "count": 10}, "frames": 4, "audio_seconds": 1.0},
        "teachers": {
            "vision": {"engine": engine, "prompt": "plain"},
            "audio": {"engine": engine, "prompt": "plain"},
        },
        "merger": {"engine": engine, "prompt": "plain"},
        "student": {"model": str(student), "prompt": "plain", "dtype": "float32", "video_longest_side_px": 28},
        "sft": {
            "learning_rate": 2e-3,
            "warmup_steps": 0,
            "per_device_batch": 4,
            "gradient_accumulation": 1,
            "gradient_checkpointing": False,
            "deepspeed": "none",
            "logging_every_steps": 1,
            "validation_samples": 4,
        },
        "grpo": {
            "learning_rate": 1e-3,
            "per_device_batch": 4,
            "gradient_accumulation": 1,
            "gradient_checkpointing": False,
            "deepspeed": "none",
            "logging_every_steps": 1,
            "max_completion_tokens": 16,
        },
        "evaluation": {"max_tokens": 16},
        "store": {"kind": "local"},
    }
    for name, values in sections.items():
        document[name] = {**document[name], **values}
    return Config.model_validate(document)
