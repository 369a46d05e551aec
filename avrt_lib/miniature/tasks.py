"""What each tiny model is taught, on clips that were rendered to MP4 and decoded as ingest decodes them."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import ProcessorMixin, Qwen2Tokenizer

from avrt_lib import answers
from avrt_lib.miniature import texts
from avrt_lib.miniature.learning import Batch, Example, Recipe, Scores, pad
from avrt_lib.miniature.world import SAMPLE_RATE, Question, draw_question
from avrt_lib.records import LETTERS, Sample

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
#: Flatter than the world's own mix; otherwise the rare kinds are learned last.
FLAT_KINDS = {"either": 0.35, "both": 0.35, "sound": 0.15, "sight": 0.15}


@dataclass(frozen=True)
class Clip:
    """A decoded clip and what is in it."""

    sight: str
    sound: str
    sample: Sample

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The sampled frames."""
        return [Image.open(io.BytesIO(data)).convert("RGB") for data in self.sample.frames]

    @cached_property
    def wave(self) -> NDArray[np.float32]:
        """The sound, mono 16 kHz."""
        if self.sample.audio is None:
            raise ValueError(f"{self.sample.id} has no sound")
        wave, _ = soundfile.read(io.BytesIO(self.sample.audio), dtype="float32")
        return np.asarray(wave, np.float32)


def question_about(rng: random.Random, clip: Clip, kinds: dict[str, float] = FLAT_KINDS) -> Question:
    """A fresh question about a given clip."""
    while True:
        question = draw_question(rng, kinds)
        names = {question.sight: clip.sight, clip.sight: question.sight}
        tones = {question.sound: clip.sound, clip.sound: question.sound}
        pairs = tuple((s and names.get(s, s), t and tones.get(t, t)) for s, t in question.pairs)
        return Question(question.kind, clip.sight, clip.sound, pairs, question.answer)


class _Task:
    def __init__(self, tokenizer: Qwen2Tokenizer, clips: Sequence[Clip], recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.clips = clips
        self.recipe = recipe
        self._features: dict[str, dict[str, torch.Tensor]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def example(self, head: str, request: str, target: str, media: dict[str, torch.Tensor], about: Any) -> Example:
        """An example from the media placeholders, the request and what should be written."""
        return Example(self.encode(SYSTEM + head + request + ASSISTANT), self.encode(target + END), media, about)

    def validation(self, count: int, name: str = "validation") -> list[Example]:
        """A fixed set of examples, drawn from this task's clips."""
        return [self.draw(random.Random(f"{name} {number}")) for number in range(count)]

    def draw(self, rng: random.Random) -> Example:
        raise AssertionError("each task draws its own")


class TeacherTask(_Task):
    """A teacher of one sense: it gets its modality and the question, and guesses among what its sense leaves."""

    sense: int

    def features(self, clip: Clip) -> dict[str, torch.Tensor]:
        """The processor's tensors of a clip, made once."""
        raise AssertionError("each teacher has its own media")

    def head(self, clip: Clip) -> str:
        """The clip's placeholders in the prompt."""
        raise AssertionError("each teacher has its own media")

    def draw(self, rng: random.Random) -> Example:
        """A clip, a fresh question about it, and a trace whose pick is by chance among the options left."""
        clip = rng.choice(self.clips)
        question = question_about(rng, clip)
        trace = texts.teacher_trace(question, self.sense, texts.guess(question, self.sense, rng))
        return self.example(self.head(clip), texts.question_prompt(question), trace, self.features(clip), question)

    def judge(self, examples: Sequence[Example], written: Sequence[str]) -> Scores:
        """Share of traces that are right as a whole: the finding, each option's weighing, a pick among those left.

        The share of right letters is partly luck, so it is not the score.
        """
        whole = perceived = right = 0
        for example, text in zip(examples, written, strict=True):
            question: Question = example.about
            fact = texts.teacher_facts(question, self.sense)
            accepted = [
                texts.teacher_trace(question, self.sense, i) for i in texts.possible(question, self.sense, fact)
            ]
            whole += text.strip() in accepted
            perceived += f"I {('see', 'hear')[self.sense]} {fact}." in text
            right += answers.extract(text, question.options).index == question.answer
        n = len(examples)
        return {"score": round(whole / n, 4), "perceived": round(perceived / n, 4), "letters": round(right / n, 4)}


class VisionTeacherTask(TeacherTask):
    """Qwen2.5-VL on the frames as separate images."""

    sense = 0

    def __init__(self, processor: ProcessorMixin, clips: Sequence[Clip]) -> None:
        super().__init__(processor.tokenizer, clips, Recipe(goal=0.8, cap=900, decay=150, max_new=72))
        self.processor = processor
        self.image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def features(self, clip: Clip) -> dict[str, torch.Tensor]:
        """pixel_values and image_grid_thw of the frames."""
        if clip.sample.id not in self._features:
            self._features[clip.sample.id] = dict(
                self.processor.image_processor(images=clip.pictures, return_tensors="pt")
            )
        return self._features[clip.sample.id]

    def head(self, clip: Clip) -> str:
        """Each frame between its own marks."""
        grids = self.features(clip)["image_grid_thw"]
        return "".join(f"<|vision_start|>{'<|image_pad|>' * (int(grid.prod()) // 4)}<|vision_end|>" for grid in grids)

    def collate(self, examples: Sequence[Example], *, train: bool) -> Batch:
        """Padded tokens and stacked pictures; without mm_token_type_ids the positions would not be multi-modal."""
        batch = pad(self.tokenizer, examples, train=train)
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.image_token).int()
        return batch | {k: torch.cat([e.media[k] for e in examples]) for k in ("pixel_values", "image_grid_thw")}


class AudioTeacherTask(TeacherTask):
    """Qwen2-Audio on the sound."""

    sense = 1

    def __init__(self, processor: ProcessorMixin, clips: Sequence[Clip]) -> None:
        super().__init__(processor.tokenizer, clips, Recipe(goal=0.8, cap=900, decay=150, max_new=88))
        self.processor = processor

    def features(self, clip: Clip) -> dict[str, torch.Tensor]:
        """Log-mel features of the whole window, and which of its frames hold sound."""
        if clip.sample.id not in self._features:
            out = self.processor.feature_extractor(
                [clip.wave],
                sampling_rate=SAMPLE_RATE,
                padding="max_length",
                return_attention_mask=True,
                return_tensors="pt",
            )
            self._features[clip.sample.id] = {
                "input_features": out["input_features"],
                "feature_attention_mask": out["attention_mask"],
            }
        return self._features[clip.sample.id]

    def head(self, clip: Clip) -> str:
        """One token for four mel frames (two strides of two)."""
        frames = int(self.features(clip)["feature_attention_mask"].sum())
        return f"<|audio_bos|>{'<|AUDIO|>' * (((frames - 1) // 2 + 1 - 2) // 2 + 1)}<|audio_eos|>"

    def collate(self, examples: Sequence[Example], *, train: bool) -> Batch:
        """Padded tokens and stacked features."""
        batch = pad(self.tokenizer, examples, train=train)
        return batch | {
            k: torch.cat([e.media[k] for e in examples]) for k in ("input_features", "feature_attention_mask")
        }


class MergerTask(_Task):
    """Qwen3 on two traces: it copies the findings from the traces, never from the options.

    A share of the prompts carries findings that are not the clip's, so that they can only be had from the traces.
    """

    def __init__(self, tokenizer: Qwen2Tokenizer, mismatched: float = 0.3) -> None:
        super().__init__(tokenizer, [], Recipe(goal=0.8, cap=900, decay=150, max_new=80))
        self.mismatched = mismatched

    def draw(self, rng: random.Random) -> Example:
        """A question, two traces and the merged one."""
        question = draw_question(rng, FLAT_KINDS)
        sight, sound = question.sight, question.sound
        if rng.random() < self.mismatched:
            sight, sound = rng.choice(texts.all_facts())
        picks = [question.answer] * 2
        if rng.random() < 0.2:  # traces that disagree with the label, as unfiltered data has them
            picks = [rng.randrange(len(question.pairs)) for _ in range(2)]
        vision, audio = (
            texts.teacher_trace(question, s, p, f) for s, p, f in zip((0, 1), picks, (sight, sound), strict=True)
        )
        target = texts.merged_trace(question, sight, sound)
        return self.example("", texts.merger_prompt(question, vision, audio), target, {}, target)

    def collate(self, examples: Sequence[Example], *, train: bool) -> Batch:
        """Padded tokens."""
        return pad(self.tokenizer, examples, train=train)

    def judge(self, examples: Sequence[Example], written: Sequence[str]) -> Scores:
        """Share of merged traces that are right to the letter."""
        exact = sum(text.strip() == e.about for e, text in zip(examples, written, strict=True))
        return {"score": round(exact / len(examples), 4)}


class StudentTask(_Task):
    """Qwen2.5-Omni before reasoning: it describes clips, repeats options, reads short texts, and answers directly.

    Any modality may be missing from the prompt. Reading is of given words alone: it compares them, and quotes a list up
    to the line that is all for its option, or names that line. Each of these is asked for by itself: nothing here
    teaches the model to compare what it perceives with the options, or to write a list and conclude from it.
    """

    def __init__(self, processor: ProcessorMixin, clips: Sequence[Clip]) -> None:
        super().__init__(processor.tokenizer, clips, Recipe(goal=0.97, cap=1500, decay=100, max_new=48))
        self.processor = processor

    def features(self, clip: Clip) -> dict[str, torch.Tensor]:
        """Video and audio tensors of a clip."""
        if clip.sample.id not in self._features:
            video = self.processor.video_processor(
                videos=[np.stack([np.asarray(p) for p in clip.pictures])], return_tensors="pt"
            )
            sound = self.processor.feature_extractor(
                [clip.wave],
                sampling_rate=SAMPLE_RATE,
                padding="max_length",
                return_attention_mask=True,
                return_tensors="pt",
            )
            self._features[clip.sample.id] = {
                "pixel_values_videos": video["pixel_values_videos"],
                "video_grid_thw": video["video_grid_thw"],
                "video_second_per_grid": torch.tensor([1.0]),
                "input_features": sound["input_features"],
                "feature_attention_mask": sound["attention_mask"],
            }
        return self._features[clip.sample.id]

    def media(self, clip: Clip, condition: str) -> tuple[str, dict[str, torch.Tensor]]:
        """Placeholders and tensors of a clip in a condition (av, audio_only, vision_only)."""
        features, head = self.features(clip), ""
        kept: dict[str, torch.Tensor] = {}
        if condition != "audio_only":
            tokens = int(features["video_grid_thw"][0].prod()) // 4
            head += f"<|vision_bos|>{'<|VIDEO|>' * tokens}<|vision_eos|>"
            kept |= {k: v for k, v in features.items() if "video" in k}
        if condition != "vision_only":
            frames = int(features["feature_attention_mask"].sum())
            head += f"<|audio_bos|>{'<|AUDIO|>' * (((frames - 1) // 2 + 1 - 2) // 2 + 1)}<|audio_eos|>"
            kept |= {k: v for k, v in features.items() if "video" not in k}
        return head, kept

    def draw(self, rng: random.Random) -> Example:
        """A description, a direct answer, or the options repeated, with both modalities or one; or text alone."""
        what = rng.choices(["describe", "answer", "repeat", "compare", "conclude"], [0.25, 0.1, 0.15, 0.2, 0.3])[0]
        if what in ("compare", "conclude"):
            request, target = (texts.comparison if what == "compare" else texts.conclusion)(rng)
            return self.example("", request, target, {}, (what, target))
        clip = rng.choice(self.clips)
        condition = rng.choices(["av", "audio_only", "vision_only"], [0.6, 0.2, 0.2])[0]
        head, media = self.media(clip, condition)
        question = question_about(rng, clip)
        if what == "describe":
            sight = clip.sight if condition != "audio_only" else None
            sound = clip.sound if condition != "vision_only" else None
            request, target = texts.DESCRIBE, texts.description(sight, sound)
        elif what == "answer":
            request, target = texts.question_prompt(question), f"<answer>{LETTERS[question.answer]}</answer>"
        else:
            asked, target = texts.repetition(question, rng)
            request = f"{texts.question_prompt(question)}\n{asked}"
        return self.example(head, request, target, media, (what, target))

    def collate(self, examples: Sequence[Example], *, train: bool) -> Batch:
        """Padded tokens, and the media of those examples that have them."""
        batch = pad(self.tokenizer, examples, train=train)
        for name in (
            "pixel_values_videos",
            "video_grid_thw",
            "video_second_per_grid",
            "input_features",
            "feature_attention_mask",
        ):
            have = [e.media[name] for e in examples if name in e.media]
            if have:
                batch[name] = torch.cat(have)
        return batch

    def judge(self, examples: Sequence[Example], written: Sequence[str]) -> Scores:
        """Shares of right descriptions, repetitions, comparisons, conclusions, answers in form; the lowest counts."""
        counts: dict[str, list[bool]] = {"describe": [], "answer": [], "repeat": [], "compare": [], "conclude": []}
        right: list[bool] = []
        for example, text in zip(examples, written, strict=True):
            what, target = example.about
            ok = text.strip() == target
            if what == "answer":
                right.append(ok)
                ok = text.strip() in {f"<answer>{letter}</answer>" for letter in LETTERS[:4]}
            counts[what].append(ok)
        shares = {what: round(sum(v) / max(1, len(v)), 4) for what, v in counts.items()}
        return {"score": min(shares.values()), **shares, "right": round(sum(right) / max(1, len(right)), 4)}
