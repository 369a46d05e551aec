"""How frames and sound enter the student: one place for training, evaluation and serving.

Qwen2.5-Omni's processor has its own default size for videos (at least 128·28·28 pixels a frame), whatever the
checkpoint's processor configuration says, and vLLM's video loader takes at most 32 frames. Both are overridden here, so
that the frames of a sample reach the model at the size and in the number in which ingest left them.
"""

from __future__ import annotations

from typing import Any

from avrt_lib.config import StudentConfig

PATCH_PX = 28
"""Side of a merged patch of Qwen2.5-Omni's vision encoder (patch 14, merge 2): the smallest frame."""

POSITION_FPS = 2.0
"""Frame rate by which video tokens get their temporal positions, for every clip alike.

It is the model's own default, which its processor applies where no rate is given. A clip's true rate would have to
travel with each request of each client; frames are spread uniformly anyway."""


def processor_kwargs(student: StudentConfig) -> dict[str, Any]:
    """Keyword arguments of the student's processor: for transformers' call and for vLLM's ``mm_processor_kwargs``.

    Frames are scaled to whole patches, at least one patch and at most ``student.video_longest_side_px`` squared pixels.
    No frames are sampled: the sample's are taken as they are.
    """
    side = student.video_longest_side_px
    return {
        "videos_kwargs": {
            "size": {"shortest_edge": PATCH_PX * PATCH_PX, "longest_edge": side * side},
            "fps": POSITION_FPS,
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
        }
    }


def media_io_kwargs(frames: int) -> dict[str, Any]:
    """vLLM's ``media_io_kwargs``: take up to ``frames`` frames of a video.

    A video that comes as a list of JPEG frames is cut behind that many; a video file is sampled uniformly.
    """
    return {"video": {"num_frames": frames}}


def limits() -> dict[str, int]:
    """Media items that one request of the student may carry."""
    return {"image": 0, "video": 1, "audio": 1}
