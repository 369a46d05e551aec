"""Train the four tiny models from nothing and write their folders.

python -m avrt_lib.miniature.train                                 # all four, into the package
python -m avrt_lib.miniature.train student --seed 1 --out /tmp/s   # one of them, elsewhere

The package's student is that of seed 1, the others of seed 0; each folder's manifest says it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avrt_lib.miniature import families, learning, tasks

import torch  # isort: skip  (after families, which prepares torchvision)
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from avrt_lib.models import WEIGHTS, write_manifest
from avrt_lib.records import Sample

log = logging.getLogger("avrt.miniature")

TRAINING_SEED, HELD_OUT_SEED = 9_000, 9_001
CLIPS, HELD_OUT_CLIPS = 640, 160
VALIDATION_EXAMPLES, TEST_EXAMPLES = 128, 400
#: The audio teacher's window while it trains; widened to 30 s afterwards.
SHORT_WINDOW_S = 2


def load_clips(folder: Path, *, seed: int, count: int, prefix: str) -> list[tasks.Clip]:
    """Render clips and read them back as ingest does.

    Args:
        folder: where to render them.
        seed: of the world.
        count: how many clips.
        prefix: of their names.
    """
    from avrt_lib.ingest.media import Budget, load
    from avrt_lib.miniature.world import load_annotations, render_dataset

    clips = []
    for row in load_annotations(render_dataset(folder, count=count, seed=seed, prefix=prefix)):
        path = folder / "videos" / f"{row['video_name']}.mp4"
        media = load(Budget(frames=4, audio_seconds=1.0, longest_side_px=56, jpeg_quality=92), video=path)
        clips.append(tasks.Clip(str(row["sight"]), str(row["sound"]), _sample(str(row["video_name"]), media)))
    return clips


def _sample(name: str, media: Any) -> Sample:
    return Sample(
        id=name, source="miniature", split="train", question="", options=[], answer_index=None, question_type="",
        needs="unknown", media_kind="video", frames=media.frames, frame_times_s=media.frame_times_s, audio=media.audio,
        duration_s=media.duration_s, width=media.width, height=media.height, fps=media.fps, media_sha256="", group=name,
    )  # fmt: skip


def train_vision_teacher(
    out: Path, clips: Sequence[tasks.Clip], held_out: Sequence[tasks.Clip], seed: int, **changes: Any
) -> dict[str, Any]:
    """Train and save the vision teacher; returns its scores."""
    model, processor = families.build_vision_teacher()
    task = _changed(tasks.VisionTeacherTask(processor, clips), changes)
    unseen = tasks.VisionTeacherTask(processor, held_out)
    result = _learn(model, task, unseen, seed)
    _save(model.to(torch.bfloat16), processor, out)
    return result


def train_audio_teacher(
    out: Path, clips: Sequence[tasks.Clip], held_out: Sequence[tasks.Clip], seed: int, **changes: Any
) -> dict[str, Any]:
    """Train and save the audio teacher, with its window widened to what can be served; returns its scores."""
    model, processor = families.build_audio_teacher(window_s=SHORT_WINDOW_S)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    task = _changed(tasks.AudioTeacherTask(processor, clips), changes)
    unseen = tasks.AudioTeacherTask(processor, held_out)
    result = _learn(model, task, unseen, seed)
    wide, processor = families.build_audio_teacher()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    key = next(k for k in state if k.endswith("embed_positions.weight"))
    # Positions past the sound are masked in the attention, so rows of zeros change no answer.
    positions = torch.zeros(50 * families.TEACHER_WINDOW_S, state[key].shape[1])
    positions[: len(state[key])] = state[key]
    state[key] = positions
    wide.load_state_dict(state)
    _save(wide.to(torch.bfloat16), processor, out)
    _rename(out / "model.safetensors", "language_model.model.model.", "language_model.model.")
    return result


def train_merger(
    out: Path, clips: Sequence[tasks.Clip], held_out: Sequence[tasks.Clip], seed: int, **changes: Any
) -> dict[str, Any]:
    """Train and save the merger, which needs no clips; returns its scores."""
    model, tokenizer = families.build_merger()
    task = _changed(tasks.MergerTask(tokenizer), changes)
    result = _learn(model, task, task, seed)
    result["only_mismatched"] = _score(model, tasks.MergerTask(tokenizer, mismatched=1.0), "mismatched")
    _save(model.to(torch.bfloat16), tokenizer, out)
    return result


def train_student(
    out: Path, clips: Sequence[tasks.Clip], held_out: Sequence[tasks.Clip], seed: int, **changes: Any
) -> dict[str, Any]:
    """Train and save the base student in the full Omni layout; returns its scores."""
    from avrt_lib.training.export import export_thinker

    model, processor = families.build_student()
    task = _changed(tasks.StudentTask(processor, clips), changes)
    unseen = tasks.StudentTask(processor, held_out)
    result = _learn(model, task, unseen, seed)
    export_thinker(model, processor, out)
    return result


def _changed(task: Any, changes: dict[str, Any]) -> Any:
    task.recipe = dataclasses.replace(task.recipe, **changes)
    return task


def _learn(model: PreTrainedModel, task: Any, unseen: Any, seed: int) -> dict[str, Any]:
    validation = unseen.validation(VALIDATION_EXAMPLES)
    result = learning.train(model, task.tokenizer, task, validation, seed=seed)
    result["test"] = _score(model, unseen, "test")
    result["parameters"] = families.count_parameters(model)
    return result


def _score(model: PreTrainedModel, task: Any, name: str) -> learning.Scores:
    examples = task.validation(TEST_EXAMPLES, name)
    scores: learning.Scores = task.judge(examples, learning.generate(model, task.tokenizer, task, examples))
    return scores


def _save(model: PreTrainedModel, processor: Any, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    model.save_pretrained(out)
    processor.save_pretrained(out)


def _rename(file: Path, old: str, new: str) -> None:
    """Give weights the names of released checkpoints, which vLLM reads; transformers 5.19 writes others."""
    save_file({k.replace(old, new): v.clone() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


TRAINERS: dict[str, Callable[..., dict[str, Any]]] = {
    "vision_teacher": train_vision_teacher,
    "audio_teacher": train_audio_teacher,
    "merger": train_merger,
    "student": train_student,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*TRAINERS, []], help="which to train (default: all)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder that gets one folder for each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="avrt-miniature-") as folder:
        clips = load_clips(Path(folder) / "train", seed=TRAINING_SEED, count=CLIPS, prefix="teach")
        held_out = load_clips(Path(folder) / "held-out", seed=HELD_OUT_SEED, count=HELD_OUT_CLIPS, prefix="held")
        for name in options.models or TRAINERS:
            torch.manual_seed(options.seed)
            random.seed(options.seed)
            result = TRAINERS[name](options.out / name, clips, held_out, options.seed)
            write_manifest(
                options.out / name, {"command": "python -m avrt_lib.miniature.train", "seed": options.seed, **result}
            )
            print(json.dumps({"model": name, **result}))


if __name__ == "__main__":
    main()
