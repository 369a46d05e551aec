"""Samples as the student's tensors: prompts with their media, and batches of any mix of modalities.

A prompt is the processor's own chat template over one user message with video, audio and text in this order; what a
condition takes away, or a sample does not have, is left out. Serving builds the same items from the same frames and
sound, so both sides get the same tokens.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from avrt_lib.config import StudentConfig
from avrt_lib.engine import student_media
from avrt_lib.errors import DataError
from avrt_lib.prompts import question_prompt, template
from avrt_lib.records import Sample
from avrt_lib.training.student import Student

VIDEO_KEYS = ("pixel_values_videos", "video_grid_thw", "video_second_per_grid")
AUDIO_KEYS = ("input_features", "feature_attention_mask")
IGNORED = -100
CACHE_BYTES = 2 << 30


def has_modality(sample: Sample, condition: str, modality: str) -> bool:
    """Whether a sample in a condition (``av``, ``audio_only``, ``vision_only``) has ``audio`` or ``vision``."""
    if modality == "audio":
        return sample.audio is not None and condition != "vision_only"
    return bool(sample.frames) and condition != "audio_only"


@dataclass
class Encoder:
    """Turns samples into prompt tensors; media are processed once per sample and kept up to a number of bytes.

    Attributes:
        student: whose processor it uses.
        config: the student's section: prompt and size of the frames.
        cache_bytes: how much to keep; what does not fit is processed again each time.
    """

    student: Student
    config: StudentConfig
    cache_bytes: int = CACHE_BYTES
    _cache: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _held: int = field(default=0, repr=False)

    def encode(self, sample: Sample, condition: str = "av") -> dict[str, torch.Tensor]:
        """One prompt.

        Returns:
            ``input_ids`` of shape (length,), and where the sample has them in this condition
            ``pixel_values_videos`` (patches, features), ``video_grid_thw`` (1, 3), ``video_second_per_grid`` (1,),
            ``input_features`` (1, mel bins, sound frames) and ``feature_attention_mask`` (1, sound frames).

        Raises:
            DataError: where the condition leaves the sample without any medium.
        """
        media = self._media(sample)
        keys: list[str] = []
        if has_modality(sample, condition, "vision"):
            keys.extend(VIDEO_KEYS)
        if has_modality(sample, condition, "audio"):
            keys.extend(AUDIO_KEYS)
        if not keys:
            raise DataError(f"Sample {sample.id} has neither picture nor sound in the condition {condition!r}.")
        text = self._prompt(sample, condition, media)
        ids = self.student.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": torch.tensor(ids, dtype=torch.long), **{key: media[key] for key in keys}}

    def target(self, text: str) -> torch.Tensor:
        """Token ids of a completion, with the end token, of shape (length,)."""
        tokenizer = self.student.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.long)

    def _prompt(self, sample: Sample, condition: str, media: Mapping[str, Any]) -> str:
        processor: Any = self.student.processor
        question = question_prompt("student", self.config.prompt, sample.question, sample.options)
        system = template("student", self.config.prompt).system
        content: list[dict[str, str]] = []
        if has_modality(sample, condition, "vision"):
            content.append({"type": "video"})
        if has_modality(sample, condition, "audio"):
            content.append({"type": "audio"})
        content.append({"type": "text", "text": question})
        messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": content})
        text: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template writes one placeholder for each medium, the model wants one for each feature.
        for token, count in ((processor.video_token, media.get("video")), (processor.audio_token, media.get("audio"))):
            if count is not None and token in text:
                text = text.replace(token, token * count, 1)
        return text

    def _media(self, sample: Sample) -> dict[str, Any]:
        """Processor outputs of a sample's media, with the number of features of each."""
        if sample.id in self._cache:
            return self._cache[sample.id]
        processor: Any = self.student.processor
        pieces: list[str] = []
        given: dict[str, Any] = {}
        options = student_media.processor_kwargs(self.config)
        if sample.frames:
            given["videos"] = [decode_frames(sample)]
            pieces.append(processor.vision_bos_token + processor.video_token + processor.vision_eos_token)
        if sample.audio is not None:
            wave = decode_audio(sample)
            given["audio"] = [wave]
            # The extractor computes features of its whole window (Qwen2.5-Omni's has 300 s) and not of the clip alone.
            # With two of its Fourier windows of silence behind the clip, the clip's own features are the same.
            extractor = processor.feature_extractor
            options["audio_kwargs"] = {"max_length": min(len(wave) + 2 * extractor.n_fft, extractor.n_samples)}
            pieces.append(processor.audio_bos_token + processor.audio_token + processor.audio_eos_token)
        if not given:
            return {}
        out = processor(text=["".join(pieces)], **given, **options, return_tensors="pt")
        ids = out["input_ids"][0]
        media: dict[str, Any] = {}
        for key, keys, token in (("video", VIDEO_KEYS, "video_token"), ("audio", AUDIO_KEYS, "audio_token")):
            if keys[0] not in out:
                continue
            media.update({name: torch.as_tensor(out[name]) for name in keys})
            media[key] = int((ids == self.student.tokenizer.convert_tokens_to_ids(getattr(processor, token))).sum())
        if "input_features" in media:
            # The feature extractor pads to its whole window; the encoder reads the masked part only.
            length = int(media["feature_attention_mask"].sum())
            media["input_features"] = media["input_features"][:, :, :length].clone()
            media["feature_attention_mask"] = media["feature_attention_mask"][:, :length].clone()
        size = sum(value.nbytes for value in media.values() if isinstance(value, torch.Tensor))
        if self._held + size <= self.cache_bytes:
            self._cache[sample.id] = media
            self._held += size
        return media


def decode_frames(sample: Sample) -> np.ndarray:
    """The frames of a sample as an array of shape (frames, height, width, 3), uint8."""
    from PIL import Image

    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in sample.frames]
    return np.stack(images)


def decode_audio(sample: Sample) -> np.ndarray:
    """The sound of a sample as float32 of shape (16 kHz samples,)."""
    import soundfile

    if sample.audio is None:
        raise DataError(f"Sample {sample.id} has no sound track.")
    wave, rate = soundfile.read(io.BytesIO(sample.audio), dtype="float32")
    if rate != 16000 or wave.ndim != 1:
        raise DataError(f"The sound of sample {sample.id} is not mono at 16 kHz: ingest the data set again.")
    return np.asarray(wave)


def collate_media(prompts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The media of several prompts, joined in their order; keys that no prompt has are left out.

    Videos and sounds are flat lists to the model, which assigns them to the placeholders from left to right and row by
    row, so that rows without a medium simply add nothing. Sounds are padded to the longest.
    """
    batch: dict[str, torch.Tensor] = {}
    for key in VIDEO_KEYS:
        values = [prompt[key] for prompt in prompts if key in prompt]
        if values:
            batch[key] = torch.cat(values)
    heard = [prompt for prompt in prompts if "input_features" in prompt]
    if heard:
        longest = max(prompt["input_features"].shape[-1] for prompt in heard)
        for key in AUDIO_KEYS:
            padded = [torch.nn.functional.pad(p[key], (0, longest - p[key].shape[-1])) for p in heard]
            batch[key] = torch.cat(padded)
    return batch


def collate_prompts(prompts: Sequence[Mapping[str, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch for generation: ``input_ids`` and ``attention_mask`` of shape (batch, length), padded on the left."""
    ids = [prompt["input_ids"] for prompt in prompts]
    longest = max(len(row) for row in ids)
    batch = {
        "input_ids": torch.full((len(ids), longest), pad_id, dtype=torch.long),
        "attention_mask": torch.zeros((len(ids), longest), dtype=torch.long),
    }
    for i, row in enumerate(ids):
        batch["input_ids"][i, longest - len(row) :] = row
        batch["attention_mask"][i, longest - len(row) :] = 1
    return {**batch, **collate_media(prompts)}


def collate_targets(
    prompts: Sequence[Mapping[str, torch.Tensor]], targets: Sequence[torch.Tensor], pad_id: int
) -> dict[str, torch.Tensor]:
    """A batch for supervised training, padded on the right.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` of shape (batch, length), where labels are the target's tokens
        and -100 everywhere else, and the media.
    """
    rows = [torch.cat([prompt["input_ids"], target]) for prompt, target in zip(prompts, targets, strict=True)]
    longest = max(len(row) for row in rows)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED, dtype=torch.long),
    }
    for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
        batch["input_ids"][i, : len(row)] = row
        batch["attention_mask"][i, : len(row)] = 1
        batch["labels"][i, len(row) - len(target) : len(row)] = target
    return {**batch, **collate_media(prompts)}
