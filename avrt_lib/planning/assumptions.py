"""What a plan assumes. Of the GPU figures those of training were measured on one GPU (docs/models.md), no other was.

The miniature's are those of docs/results.md, measured on two CPU cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from avrt_lib.errors import UsageError


@dataclass(frozen=True, slots=True)
class Assumption:
    """One figure, its unit in its name, and what it is."""

    value: float
    what: str


COMMON: dict[str, Assumption] = {
    "pod_s": Assumption(10, "seconds for each pod in a row; observed on Kubeflow Pipelines 2.17 as it is shipped"),
    "sample_mib": Assumption(0.4, "an ingested sample: eight frames of 448 pixels and ten seconds of sound"),
    "kept_share": Assumption(0.48, "of the training samples, by the filter; the paper kept 19,224 of 40,127"),
    "checkpoints_kept": Assumption(2, "training checkpoints on the disk at once"),
}
GPU: dict[str, Assumption] = {
    **COMMON,
    "peak_tflops": Assumption(989, "one H100, bfloat16 without sparsity, by its data sheet"),
    "training_utilisation": Assumption(0.04, "share of the peak in training; 0.038 measured with one row at a time"),
    "offload_step_s": Assumption(3, "optimizer step in the host's memory (ZeRO-2 with offload), shared out over 8"),
    "engine_start_s": Assumption(240, "a vLLM engine until it answers, weights fetched within the cluster"),
    "training_start_s": Assumption(300, "until the first training step"),
    "prefill_tokens_per_s": Assumption(15000, "one engine on one GPU"),
    "vision_prompt_tokens": Assumption(1700, "eight frames and the question"),
    "vision_tokens": Assumption(700, "written by the vision teacher for one question"),
    "vision_tokens_per_s": Assumption(2500, "one engine, many requests at once"),
    "audio_prompt_tokens": Assumption(1100, "thirty seconds' window and the question"),
    "audio_tokens": Assumption(400, "written by the audio teacher for one question"),
    "audio_tokens_per_s": Assumption(2500, "one engine, many requests at once"),
    "merger_prompt_tokens": Assumption(1500, "question and both traces"),
    "merger_tokens": Assumption(220, "the paper's think sections have 166 on average"),
    "merger_tokens_per_s": Assumption(1500, "one engine, many requests at once"),
    "answer_prompt_tokens": Assumption(1100, "frames, sound and question, for the student"),
    "answer_tokens": Assumption(170, "written by the student for one question"),
    "answer_tokens_per_s": Assumption(4000, "one engine, many requests at once"),
    "completion_tokens": Assumption(250, "the longest of the completions that a GPU generates at once in GRPO"),
    "generation_s_per_token": Assumption(0.035, "transformers' generation in GRPO, whatever the batch"),
    "ingest_s_per_sample": Assumption(0.5, "one worker: decode ten seconds of video at 720p"),
    "cpu_step_s": Assumption(120, "a step without a model: preflight, gate, promotion, deployment"),
    "training_workspace_gib": Assumption(8, "activations of one layer, logits in parts, buffers, fragmentation"),
    "engine_workspace_gib": Assumption(4, "activations and graphs of an engine"),
}
MINIATURE: dict[str, Assumption] = {
    **COMMON,
    "sample_mib": Assumption(0.05, "an ingested sample: four tiny frames and one second of sound"),
    "kept_share": Assumption(0.61, "measured"),
    "engine_start_s": Assumption(30, "measured"),
    "training_start_s": Assumption(15, "measured"),
    "vision_s_per_sample": Assumption(0.022, "measured, two shards side by side on two cores"),
    "audio_s_per_sample": Assumption(0.08, "measured, two shards side by side on two cores"),
    "merger_s_per_sample": Assumption(0.007, "measured"),
    "answer_s": Assumption(0.02, "measured"),
    "sft_s_per_step": Assumption(1.1, "measured, validations included"),
    "grpo_s_per_step": Assumption(2.3, "measured"),
    "ingest_s_per_sample": Assumption(0.05, "measured, rendering included"),
    "cpu_step_s": Assumption(15, "measured"),
    "training_workspace_gib": Assumption(1, "measured"),
    "engine_workspace_gib": Assumption(1, "measured"),
}


def chosen(miniature: bool, given: Mapping[str, float]) -> dict[str, Assumption]:
    """The assumptions of a plan with the user's own figures in their places.

    Raises:
        UsageError: where a figure is not one of these (the message lists them), or is none to reckon with.
    """
    known = dict(MINIATURE if miniature else GPU)
    derived = set(MINIATURE) - set(COMMON)
    for name, value in given.items():
        if name not in known and name not in derived:
            raise UsageError(f"--assume {name}: there is no such assumption; there are {', '.join(sorted(known))}.")
        divides = name.endswith("_tokens_per_s") or name in ("peak_tflops", "training_utilisation")
        if not math.isfinite(value) or value < 0 or (divides and value == 0):
            raise UsageError(f"--assume {name}={value:g}: give a number {'above 0' if divides else 'of 0 or more'}.")
        known[name] = Assumption(value, f"given; {known[name].what}" if name in known else "given")
    return known
