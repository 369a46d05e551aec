"""Which row stands in which condition at each place of the cold start."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

pytest.importorskip("trl")

from avrt_lib.training.sft import Example, schedule
from tests import tiny_models

TARGETS = {"av": "x", "audio_only": "y", "vision_only": "z"}


def rows(**types: int) -> list[Example]:
    """So many examples of each question type, all of which can lose either modality."""
    sample = tiny_models.sample(0)
    return [
        Example(dataclasses.replace(sample, question_type=name), TARGETS) for name, n in types.items() for _ in range(n)
    ]


def types_of(order: list[tuple[int, str]], examples: list[Example]) -> Counter[str]:
    return Counter(examples[index].sample.question_type for index, _ in order)


def test_without_balance_each_epoch_holds_every_row_once() -> None:
    examples = rows(either=7, both=3)
    order = schedule(examples, 20, seed=0, dropout=0.0)
    for epoch in (order[:10], order[10:]):
        assert sorted(index for index, _ in epoch) == list(range(10))
    assert {condition for _, condition in order} == {"av"}
    assert order[:10] != order[10:]


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (0.0, {"either": 90, "both": 10}),
        (0.5, {"either": 75, "both": 25}),
        (1.0, {"either": 50, "both": 50}),
        (1.5, {"either": 25, "both": 75}),
    ],
)
def test_balance_evens_out_the_question_types(balance: float, expected: dict[str, int]) -> None:
    examples = rows(either=90, both=10)
    order = schedule(examples, 100, seed=0, dropout=0.0, balance=balance)
    assert types_of(order, examples) == expected
    rare = Counter(index for index, _ in order if index >= 90)
    assert len(rare) == 10
    assert max(rare.values()) - min(rare.values()) <= 1


def test_a_very_rare_type_is_not_repeated_without_end() -> None:
    examples = rows(either=90, both=10, sound=1)
    shares = types_of(schedule(examples, 101, seed=0, dropout=0.0, balance=1.0), examples)
    assert shares["sound"] < shares["both"] / 5


def test_dropout_takes_either_modality_from_its_share_of_rows() -> None:
    found = Counter(condition for _, condition in schedule(rows(either=50), 4000, seed=0, dropout=0.5))
    assert found["av"] == pytest.approx(2000, abs=120)
    assert found["audio_only"] == pytest.approx(1000, abs=120)
    assert found["vision_only"] == pytest.approx(1000, abs=120)


def test_a_question_type_may_have_another_share() -> None:
    examples = rows(either=20, both=20, sound=20)
    order = schedule(examples, 600, seed=0, dropout=0.5, dropout_types={"either": 0.9, "both": 0.0})
    lost = Counter(examples[index].sample.question_type for index, condition in order if condition != "av")
    assert lost["either"] == pytest.approx(180, abs=15)
    assert lost["both"] == 0
    assert lost["sound"] == pytest.approx(100, abs=25)


def test_a_row_without_a_target_for_a_condition_keeps_both_modalities() -> None:
    examples = [Example(rows(either=1)[0].sample, {"av": "x", "audio_only": "y"})]
    assert "vision_only" not in {condition for _, condition in schedule(examples, 200, seed=0, dropout=0.9)}


def test_the_order_is_a_function_of_the_seed_and_a_longer_run_begins_alike() -> None:
    examples = rows(either=20, both=5)
    arguments = {"seed": 3, "dropout": 0.4, "balance": 0.7}
    assert schedule(examples, 60, **arguments) == schedule(examples, 90, **arguments)[:60]
    assert schedule(examples, 60, **arguments) != schedule(examples, 60, **(arguments | {"seed": 4}))
