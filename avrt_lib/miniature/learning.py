"""The training loop that the four tiny models share: constant rate until a validation goal, then a short decay."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, Qwen2Tokenizer

log = logging.getLogger("avrt.miniature")

Batch = dict[str, torch.Tensor]
Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a tiny model is trained.

    Attributes:
        goal: the validation score that ends the constant phase.
        cap: steps after which it ends in any case.
        decay: steps of the linear decay that follows.
        every: steps between validations.
        max_new: tokens generated for a validation.
    """

    goal: float
    cap: int
    decay: int
    max_new: int
    learning_rate: float = 2e-3
    warmup: int = 30
    batch: int = 32
    every: int = 25


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: token ids of prompt and target, the media features by name, and what a judge needs."""

    prompt: list[int]
    target: list[int]
    media: dict[str, torch.Tensor]
    about: Any


class Task(Protocol):
    """What distinguishes one tiny model's training from another's."""

    recipe: Recipe

    def draw(self, rng: random.Random) -> Example:
        """A fresh training example."""
        ...

    def collate(self, examples: Sequence[Example], *, train: bool) -> Batch:
        """A batch for the model's forward (train) or for generation."""
        ...

    def judge(self, examples: Sequence[Example], texts: Sequence[str]) -> Scores:
        """Scores of generated texts; ``score`` is what the goal is compared with."""
        ...


def pad(tokenizer: Qwen2Tokenizer, examples: Sequence[Example], *, train: bool) -> Batch:
    """Pad token rows: on the right with labels to train, on the left without targets to generate."""
    rows = [e.prompt + e.target if train else e.prompt for e in examples]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.full((len(rows), width), tokenizer.pad_token_id),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
    }
    labels = torch.full((len(rows), width), -100)
    for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
        place = slice(0, len(row)) if train else slice(width - len(row), width)
        batch["input_ids"][number, place] = torch.tensor(row)
        batch["attention_mask"][number, place] = 1
        labels[number, len(example.prompt) : len(row)] = torch.tensor(row[len(example.prompt) :]) if train else -100
    if train:
        batch["labels"] = labels
    return batch


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: Qwen2Tokenizer, task: Task, examples: Sequence[Example], size: int = 64
) -> list[str]:
    """Greedy texts of the model for these examples."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(examples), size):
        batch = task.collate(examples[start : start + size], train=False)
        ids = model.generate(**batch, max_new_tokens=task.recipe.max_new, do_sample=False)
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return texts


def train(
    model: PreTrainedModel,
    tokenizer: Qwen2Tokenizer,
    task: Task,
    validation: Sequence[Example],
    *,
    seed: int,
) -> dict[str, Any]:
    """Train until the task's goal, then decay.

    Returns:
        Steps, seconds, whether the goal was reached, and the last validation's scores.
    """
    recipe = task.recipe
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rng, started, step, end = random.Random(f"train {seed}"), time.monotonic(), 0, None
    scores: Scores = {"score": 0.0}
    model.train()
    while end is None or step < end:
        factor = min(1.0, (step + 1) / recipe.warmup)
        if end is not None:
            factor = max(0.02, (end - step) / recipe.decay)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * factor
        loss = model(**task.collate([task.draw(rng) for _ in range(recipe.batch)], train=True)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        step += 1
        if end is None and (step % recipe.every == 0 or step >= recipe.cap):
            scores = task.judge(validation, generate(model, tokenizer, task, validation))
            row = {
                "step": step,
                "loss": round(loss.item(), 4),
                "seconds": round(time.monotonic() - started, 1),
                **scores,
            }
            log.info("%s", json.dumps(row))
            if scores["score"] >= recipe.goal or step >= recipe.cap:
                end = step + recipe.decay
    return {
        "steps": step,
        "seconds": round(time.monotonic() - started, 1),
        "goal_reached": scores["score"] >= recipe.goal,
        "validation": scores,
    }
