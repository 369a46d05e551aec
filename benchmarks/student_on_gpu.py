"""One GPU with a student of the paper's size: memory and seconds of an optimizer step, beside what `avrt plan` says.

python benchmarks/student_on_gpu.py --config configs/avrt-3b-1gpu.yaml
python benchmarks/student_on_gpu.py --config configs/avrt-3b.yaml --steps sft

The student has Qwen2.5-Omni's published shape and random weights, so nothing is fetched; eight frames of 448 pixels and
ten seconds of sound are a prompt, and completions are as long as the configuration lets them be, since random weights
hardly ever end one. Batches are those of one process. Without a GPU this ends with code 77, after which `make bench`
goes on; --size tiny tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOT_HERE = 77
SECONDS = 10.0
FRAMES = 8
#: Configurations of published models: (text, vision, sound, vocabulary). The rest are transformers' defaults.
SIZES: dict[str, dict[str, Any]] = {
    "3b": {
        "text": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
        "heads": {"num_attention_heads": 16, "num_key_value_heads": 2},
        "vocabulary": 151_936,
    },
    "7b": {
        "text": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        "heads": {"num_attention_heads": 28, "num_key_value_heads": 4},
        "vocabulary": 152_064,
    },
}


def build(size: str, folder: Path) -> None:
    """Write a student of random weights in the full Omni layout."""
    import torch
    from transformers import (
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
        WhisperFeatureExtractor,
    )

    from avrt_lib.miniature import families
    from avrt_lib.training.export import export_thinker

    tiny, processor = families.build_student()
    processor.feature_extractor = WhisperFeatureExtractor(
        feature_size=families.MEL_BINS, chunk_length=30, return_attention_mask=True
    )
    if size == "tiny":
        export_thinker(tiny, processor, folder)
        return
    shape = SIZES[size]
    hidden = shape["text"]["hidden_size"]
    document = tiny.config.to_dict()
    text = {
        **document["text_config"],
        **shape["text"],
        **shape["heads"],
        "vocab_size": shape["vocabulary"],
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    }
    text.pop("layer_types", None)  # of the tiny model's layers
    ids = {key: value for key, value in document.items() if key.endswith(("_token_id", "_token_index"))}
    config = Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
            "patch_size": 14,
        },
        audio_config={
            "num_mel_bins": families.MEL_BINS,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "output_dim": hidden,
            "max_source_positions": 1500,
            "n_window": 100,
        },
        tie_word_embeddings=False,
        **ids,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    thinker.generation_config = tiny.generation_config
    export_thinker(thinker, processor, folder)


def changed(model: Path, optimizer_steps: int) -> dict[str, Any]:
    """What of a configuration is changed: one process, a few steps, data that lie here."""
    steps = {
        f"{name}.{key}": value
        for name in ("sft", "grpo")
        for key, value in {"max_steps": optimizer_steps, "processes": 1, "save_every_steps": 1000}.items()
    }
    return {
        **steps,
        "student.model": str(model),
        "store.kind": "local",
        "sft.epochs": 100,
        "sft.validation_samples": 1,
        "evaluation.max_tokens": 16,
    }


def write_data(folder: Path, side: int) -> None:
    """Samples and merged traces as the paper's data have them in size."""
    from avrt_lib.records import Merged, Sample
    from avrt_lib.tables import write_table
    from tests import tiny_models

    rows = [tiny_models.sample(n, frames=FRAMES, seconds=SECONDS, side=side) for n in range(32)]
    rows.append(tiny_models.sample(10_000, split="validation", frames=FRAMES, seconds=SECONDS, side=side))
    write_table(folder / "samples", Sample, rows)
    write_table(folder / "merged", Merged, [tiny_models.merged_row(n) for n in range(32)])


def measure(step: str, options: argparse.Namespace) -> None:
    """Run a training step in this process and print its figures."""
    import torch
    from transformers import TrainerCallback, trainer

    from avrt_lib.cli.main import overrides_of
    from avrt_lib.config import load
    from avrt_lib.planning.assumptions import GPU
    from avrt_lib.planning.memory import of_training
    from avrt_lib.planning.models import size_of
    from avrt_lib.steps import run_step

    folder, optimizer_steps = options.folder, options.optimizer_steps
    name = f"{options.size}.{options.config.stem}"
    config = load(options.config, changed(folder / "model", optimizer_steps) | overrides_of(options.set))
    section = config.sft if step == "sft" else config.grpo
    written = config.grpo.max_completion_tokens if step == "grpo" else 0
    tokens = _prompt_tokens(folder / "model", config) + written
    ends: list[float] = []

    class Clock(TrainerCallback):
        """Takes the time of each step; after the last, prints the figures and ends, before anything is saved."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())
            if len(ends) <= optimizer_steps:
                return
            seconds = [after - before for before, after in pairwise(ends)]
            figures = {"row": ("tokens", tokens), "first_step": ("s", seconds[0]), "last_step": ("s", seconds[-1])}
            if torch.cuda.is_available():
                figures["gpu_memory"] = ("GiB", torch.cuda.max_memory_reserved() / 2**30)
            figures["host_memory"] = ("GiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
            figures["gpu_memory_planned"] = ("GiB", planned.gpu_gib)
            figures["host_memory_planned"] = ("GiB", planned.host_gib)
            for what, (unit, value) in figures.items():
                print(json.dumps({"name": f"{name}.{step}.{what}", "unit": unit, "value": round(value, 2)}), flush=True)
            os._exit(0)

    size = size_of(str(folder / "model"))
    assert size is not None
    planned = of_training(
        step,
        config,
        section,
        size,
        80.0,
        tokens=tokens,
        reference=step == "grpo" and config.grpo.kl_beta > 0,
        processes=1,
        workspace_gib=GPU["training_workspace_gib"].value,
    )
    trainer.DEFAULT_CALLBACKS.append(Clock)
    inputs = {"samples": folder / "data" / "samples"}
    inputs |= {"merged": folder / "data" / "merged"} if step == "sft" else {"sft_model": folder / "model"}
    run_step(step, config=config, inputs=inputs, outputs={"model": folder / "out"}, work=folder / "work")


def _prompt_tokens(model: Path, config: Any) -> int:
    """Length of the prompt of a sample."""
    from transformers import AutoProcessor

    from avrt_lib.training.encoding import Encoder
    from avrt_lib.training.student import Student
    from tests import tiny_models

    processor = AutoProcessor.from_pretrained(model)
    encoder = Encoder(Student(None, processor, model, ()), config.student)  # type: ignore[arg-type]
    side = config.student.video_longest_side_px
    return len(encoder.encode(tiny_models.sample(0, frames=FRAMES, seconds=SECONDS, side=side))["input_ids"])


def main() -> None:
    """Command line; each measurement has a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "avrt-3b-1gpu.yaml")
    parser.add_argument("--size", choices=[*SIZES, "tiny"], default="3b")
    parser.add_argument("--steps", nargs="+", choices=["sft", "grpo"], default=["sft", "grpo"])
    parser.add_argument("--optimizer-steps", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--folder", type=Path, help="where the student is written, and kept for the next call")
    parser.add_argument("--part", choices=["build", "sft", "grpo"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from avrt_lib import compat

    compat.apply()
    if options.part == "build":
        build(options.size, options.folder / "model")
        return
    if options.part:
        measure(options.part, options)
        return

    import torch

    from avrt_lib.config import load

    if options.size != "tiny" and not torch.cuda.is_available():
        print("student_on_gpu.py needs a GPU (or --size tiny).", file=sys.stderr)
        sys.exit(NOT_HERE)
    with tempfile.TemporaryDirectory(prefix="avrt-bench-") as temporary:
        folder: Path = options.folder or Path(temporary)
        if not (folder / "data").exists():
            write_data(folder / "data", load(options.config).student.video_longest_side_px)
        for part in ([] if (folder / "model").exists() else ["build"]) + options.steps:
            command = [sys.executable, __file__, "--part", part, "--folder", str(folder), "--size", options.size]
            command += ["--config", str(options.config), "--optimizer-steps", str(options.optimizer_steps)]
            command += [f"--set={setting}" for setting in options.set]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            shutil.rmtree(folder / "work", ignore_errors=True)
            if done.returncode:
                sys.exit(done.stderr)


if __name__ == "__main__":
    main()
