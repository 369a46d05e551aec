"""Whether vLLM computes what transformers computes: the same prompts, the same checkpoint, compared by log-probability.

A checkpoint that is exported wrongly, or media that reach the model differently in training and in serving, show here
and hardly anywhere else.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avrt_lib import compat, prompts
from avrt_lib.config import Config
from avrt_lib.engine import messages, student_media
from avrt_lib.engine.base import ChatRequest
from avrt_lib.evaluation.asking import build_engine
from avrt_lib.records import CONDITIONS, Sample

if TYPE_CHECKING:
    from avrt_lib.engine.vllm_engine import VllmEngine

#: Answer tokens that are compared in each prompt.
TOKENS = 4


def parity_requests(config: Config, samples: Iterable[Sample]) -> list[ChatRequest]:
    """Each sample in every condition that leaves it a modality, and as bare text."""
    name = config.student.prompt
    requests = []
    for sample in samples:
        for condition in CONDITIONS:
            if (asked := messages.student_messages(name, sample, condition)) is not None:
                requests.append(ChatRequest(f"{sample.id} {condition}", asked, TOKENS))
        text = prompts.question_prompt("student", name, sample.question, sample.options)
        bare = messages.chat(text, system=prompts.template("student", name).system)
        requests.append(ChatRequest(f"{sample.id} text", bare, TOKENS))
    return requests


def parity(
    model_folder: Path, samples: Sequence[Sample], config: Config, *, engine: VllmEngine | None = None
) -> dict[str, Any]:
    """Compare the log-probabilities of the first answer tokens.

    Args:
        model_folder: the checkpoint, in the full Qwen2.5-Omni layout.
        samples: what is asked, in every condition.
        config: ``student`` is read: prompt, precision, media sizes.
        engine: vLLM with this checkpoint, if one is loaded already.

    Returns:
        ``max_difference`` (nats, over the likeliest tokens of every place; None without samples, and where a
        log-probability is not finite), ``n`` (prompts) and ``argmax_equal`` (whether both name the same likeliest token
        at every place).

    Raises:
        EngineError: where vLLM cannot load the checkpoint or refuses a prompt.
    """
    requests = parity_requests(config, samples)
    if not requests:
        return {"max_difference": None, "n": 0, "argmax_equal": None}
    own = engine is None
    engine = engine or build_engine(config, model_folder, "parity")
    try:
        served = engine.logprobs(requests, tokens=TOKENS)
    finally:
        if own:
            engine.close()
    reference = Reference(model_folder, config)
    differences: list[float] = []
    equal = True
    for request, places in zip(requests, served, strict=True):
        taken = [next(iter(place)) for place in places]
        for place, expected in zip(places, reference.logprobs(request.messages, taken), strict=True):
            differences += (abs(expected[token] - value) for token, value in place.items())
            equal &= max(expected, key=expected.__getitem__) == max(place, key=place.__getitem__)
    return {"max_difference": largest(differences), "n": len(requests), "argmax_equal": equal}


def largest(differences: Sequence[float]) -> float | None:
    """The largest difference; None where there is none, and where one is not finite, which ``max`` may pass over."""
    return max(differences) if differences and all(map(math.isfinite, differences)) else None


class Reference:
    """transformers' thinker on the CPU, asked with the same messages as vLLM."""

    def __init__(self, folder: Path, config: Config) -> None:
        compat.apply()
        import torch
        from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

        self._kwargs = student_media.processor_kwargs(config.student)
        self._processor = Qwen2_5OmniProcessor.from_pretrained(folder)
        self._model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, config.student.dtype)
        ).eval()

    def logprobs(self, conversation: Sequence[Mapping[str, Any]], taken: Sequence[int]) -> list[dict[int, float]]:
        """Log-probabilities of every token at the places of the answer tokens ``taken``."""
        import torch

        inputs = self._inputs(conversation)
        answer = torch.tensor([list(taken)], dtype=inputs["input_ids"].dtype)
        length = len(taken)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = self._model(**inputs).logits[0, -length - 1 : -1].float()
        return [dict(enumerate(row.tolist())) for row in logits.log_softmax(-1)]

    def _inputs(self, conversation: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import numpy as np
        import soundfile
        from PIL import Image

        turns: list[dict[str, Any]] = []
        videos, audios = [], []
        for message in conversation:
            content = message["content"]
            if isinstance(content, str):
                turns.append(dict(message))
                continue
            parts: list[dict[str, str]] = []
            for part in content:
                if part["type"] == "video_url":
                    _, _, data = part["video_url"]["url"].partition("base64,")
                    frames = [Image.open(io.BytesIO(base64.b64decode(f))).convert("RGB") for f in data.split(",")]
                    videos.append(np.stack([np.asarray(frame) for frame in frames]))
                    parts.append({"type": "video"})
                elif part["type"] == "input_audio":
                    wav = io.BytesIO(base64.b64decode(part["input_audio"]["data"]))
                    audios.append(soundfile.read(wav, dtype="float32")[0])
                    parts.append({"type": "audio"})
                else:
                    parts.append({"type": "text", "text": part["text"]})
            turns.append({"role": message["role"], "content": parts})
        text = self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        made = self._processor(
            text=text, videos=videos or None, audio=audios or None, return_tensors="pt", **self._kwargs
        )
        return dict(made)
