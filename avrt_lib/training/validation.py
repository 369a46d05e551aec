"""Greedy accuracy of the model that is being trained, on questions of the validation split."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from avrt_lib import answers
from avrt_lib.records import Sample
from avrt_lib.training.encoding import Encoder, collate_prompts
from avrt_lib.training.student import Student


@torch.no_grad()
def write_greedily(
    student: Student, encoder: Encoder, samples: Sequence[Sample], *, max_new_tokens: int, batch: int = 64
) -> list[str]:
    """The student's greedy completions of samples, in their order.

    Args:
        student: the model to ask; it is left in the mode (training or not) in which it was.
        encoder: makes its prompts.
        samples: what to ask, with all the media that each sample has.
        max_new_tokens: a completion is cut off there.
        batch: prompts at once.
    """
    model, tokenizer = student.model, student.tokenizer
    training, device = model.training, next(model.parameters()).device
    model.eval()
    texts: list[str] = []
    for start in range(0, len(samples), batch):
        prompts = [encoder.encode(sample) for sample in samples[start : start + batch]]
        inputs = {k: v.to(device) for k, v in collate_prompts(prompts, tokenizer.pad_token_id).items()}
        written = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            suppress_tokens=student.media_token_ids,
        )
        completions = written[:, inputs["input_ids"].shape[1] :]
        texts.extend(tokenizer.batch_decode(completions, skip_special_tokens=True))
    model.train(training)
    return texts


def are_correct(texts: Sequence[str], samples: Sequence[Sample]) -> list[bool]:
    """Which texts give the right answer, by the one extractor."""
    return [
        answers.extract(text, sample.options).index == sample.answer_index
        for text, sample in zip(texts, samples, strict=True)
    ]
