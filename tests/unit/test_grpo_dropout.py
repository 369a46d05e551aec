"""Which questions lose a modality in GRPO."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("trl")

from avrt_lib.training.grpo import condition
from tests import tiny_models


def test_dropout_takes_either_modality_from_its_share_of_questions() -> None:
    sample = tiny_models.sample(0)
    found = Counter(condition(sample, step, seed=0, dropout=0.5) for step in range(4000))
    assert found["av"] == pytest.approx(2000, abs=120)
    assert found["audio_only"] == pytest.approx(1000, abs=120)
    assert found["vision_only"] == pytest.approx(1000, abs=120)


def test_nothing_is_lost_without_dropout() -> None:
    assert {condition(tiny_models.sample(0), step, seed=0, dropout=0.0) for step in range(200)} == {"av"}


@pytest.mark.parametrize("medium", [{"seconds": 0.0}, {"frames": 0}], ids=["silent", "sound alone"])
def test_what_has_one_modality_keeps_it(medium: dict[str, float]) -> None:
    sample = tiny_models.sample(0, **medium)
    assert {condition(sample, step, seed=0, dropout=0.9) for step in range(200)} == {"av"}


def test_the_choice_changes_with_the_step_the_question_and_the_seed_alone() -> None:
    samples = [tiny_models.sample(number) for number in range(40)]

    def chosen(step: int, seed: int) -> list[str]:
        return [condition(sample, step, seed=seed, dropout=0.5) for sample in samples]

    assert chosen(3, 1) == chosen(3, 1)
    assert len({tuple(chosen(*place)) for place in [(3, 1), (4, 1), (3, 2)]}) == 3
    assert len(set(chosen(3, 1))) == 3
