"""The paper's rewards by table: what earns them, and what tries to without deserving it."""

from __future__ import annotations

import math

import pytest

from avrt_lib.config import RewardConfig
from avrt_lib.training.rewards import accuracy_reward, format_reward, length_reward, length_score, rewards

OPTIONS = ["a bell", "a dog", "rain", "a train"]
GOOD = "<think>A deep bark.</think><answer>B</answer>"

FORMAT = [
    (GOOD, 1.0, "the asked form"),
    ("<think>x</think>\n<answer>B</answer>", 1.0, "a line break between the blocks"),
    ("<answer>B</answer>", 0.0, "no reasoning"),
    ("<think></think><answer>B</answer>", 0.0, "empty reasoning"),
    ("<think>x</think><answer></answer>", 0.0, "empty answer"),
    ("<think>x</think><answer>A or B</answer>", 0.0, "two letters"),
    ("<think>x</think><answer>a dog</answer>", 0.0, "no letter"),
    (GOOD + GOOD, 0.0, "repeated blocks"),
    ("<think>x</think><answer>A</answer><answer>B</answer>", 0.0, "two answers"),
    ("<think>x</think><think>y</think><answer>B</answer>", 0.0, "two think blocks"),
    ("<think>x<answer>B</answer></think><answer>B</answer>", 0.0, "an answer inside the reasoning"),
    ("Sure! " + GOOD, 0.0, "text before"),
    (GOOD + " Done.", 0.0, "text after"),
    ("<think>x", 0.0, "cut off"),
    ("", 0.0, "nothing"),
]

ACCURACY = [
    (GOOD, 1, 1.0, "right"),
    (GOOD, 0, 0.0, "wrong"),
    ("<answer>B</answer>", 1, 1.0, "right without the form: format is another reward"),
    ("<think>x</think><answer>A or B or C</answer>", 1, 0.0, "every letter at once"),
    ("<think>x</think><answer>A</answer><answer>B</answer>", 1, 0.0, "two answers"),
    ("<think>it is B", 1, 0.0, "cut off"),
    ("<think>x</think><answer></answer>", 1, 0.0, "empty"),
    ("<think>x</think><answer>H</answer>", 1, 0.0, "past the last option"),
    ("", 1, 0.0, "nothing"),
]


@pytest.mark.parametrize(("text", "expected", "why"), FORMAT, ids=[row[2] for row in FORMAT])
def test_format(text: str, expected: float, why: str) -> None:
    assert format_reward([text]) == [expected], why


@pytest.mark.parametrize(("text", "label", "expected", "why"), ACCURACY, ids=[row[3] for row in ACCURACY])
def test_accuracy(text: str, label: int, expected: float, why: str) -> None:
    assert accuracy_reward([text], [OPTIONS], [label]) == [expected], why


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (100, 1.0),
        (60, math.exp(-2)),
        (99, math.exp(-1 / 800)),
        (140, math.exp(-2) + 0.5),
        (200, math.exp(-12.5) + 0.5),
        (201, math.exp(-(101**2) / 800)),
        (0, math.exp(-12.5)),
    ],
)
def test_length_with_the_corrected_window(words: int, expected: float) -> None:
    assert length_score(words, RewardConfig()) == pytest.approx(min(1.0, expected))


def test_the_preprints_window_is_a_setting() -> None:
    preprint = RewardConfig(bonus_from_words=200, bonus_to_words=300)
    assert length_score(150, preprint) == pytest.approx(math.exp(-3.125))
    assert length_score(250, preprint) == pytest.approx(0.5, abs=1e-9)


def test_length_counts_words_without_tags_and_looks_at_nothing_else() -> None:
    reward = length_reward(RewardConfig(length_mean_words=4, length_sd_words=1, bonus=0.0))
    assert reward([[{"role": "assistant", "content": "<think>A deep bark.</think><answer>B</answer>"}]]) == [1.0]
    assert reward(["one two three four"]) == [1.0]


def test_the_three_are_summed_with_equal_weight() -> None:
    assert [r.__name__ for r in rewards(RewardConfig())] == ["format_reward", "accuracy_reward", "length_reward"]
