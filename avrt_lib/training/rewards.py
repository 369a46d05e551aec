"""The paper's rewards, R = R_format + R_accuracy + R_length (section on GRPO), in TRL's reward signature.

Each reward sees the whole completion. Format and accuracy read it through ``avrt_lib.answers``, so that an answer
counts in training exactly if it counts in evaluation: two different answers, an unfinished think section or ``A or B``
earn nothing for accuracy, and repeated tag blocks nothing for format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from avrt_lib import answers
from avrt_lib.config import RewardConfig

Completion = str | list[dict[str, str]]
Reward = Callable[..., list[float]]


def completion_text(completion: Completion) -> str:
    """The text of a completion, which TRL gives as a string or as a list of one assistant message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """1 where the whole completion is one ``<think>…</think><answer>X</answer>``, else 0.

    >>> format_reward(["<think>It barks.</think><answer>B</answer>", "<answer>B</answer>"])
    [1.0, 0.0]
    """
    return [float(answers.well_formed(completion_text(completion))) for completion in completions]


def accuracy_reward(
    completions: Sequence[Completion], options: Sequence[Sequence[str]], answer_index: Sequence[int], **_: Any
) -> list[float]:
    """1 where the one answer that the completion gives is the label, else 0.

    Args:
        completions: what the student wrote.
        options: the option texts of each completion's question.
        answer_index: the index of the right option of each.

    >>> accuracy_reward(["<think>Meow.</think><answer>A</answer>"], [["cat", "dog"]], [0])
    [1.0]
    >>> accuracy_reward(["<answer>A</answer><answer>B</answer>"], [["cat", "dog"]], [0])
    [0.0]
    """
    return [
        float(answers.extract(completion_text(completion), choices).index == label)
        for completion, choices, label in zip(completions, options, answer_index, strict=True)
    ]


def length_score(words: int, config: RewardConfig) -> float:
    """min(1, exp(−(w − μ)² / (2σ²)) + b · 1[w_min ≤ w ≤ w_max]) for w words.

    >>> length_score(100, RewardConfig(bonus=0.0))
    1.0
    >>> round(length_score(150, RewardConfig(bonus=0.5)), 3)
    0.544
    """
    bell = math.exp(-((words - config.length_mean_words) ** 2) / (2 * config.length_sd_words**2))
    bonus = config.bonus if config.bonus_from_words <= words <= config.bonus_to_words else 0.0
    return min(1.0, bell + bonus)


def length_reward(config: RewardConfig) -> Reward:
    """The length reward for these parameters; it does not look at whether the answer is right.

    >>> length_reward(RewardConfig(length_mean_words=3, length_sd_words=1, bonus=0))(["one two three"])
    [1.0]
    """

    def length(completions: Sequence[Completion], **_: Any) -> list[float]:
        return [length_score(answers.count_words(completion_text(c)), config) for c in completions]

    length.__name__ = "length_reward"
    return length


def rewards(config: RewardConfig) -> list[Reward]:
    """The three rewards, which are summed with equal weight."""
    return [format_reward, accuracy_reward, length_reward(config)]
