"""Intervals and paired tests against values that others published or that can be worked out by hand."""

from __future__ import annotations

import pytest

from avrt_lib.errors import DataError
from avrt_lib.evaluation.statistics import accuracy_interval, paired_test, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, method 3
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998, method 3
    ],
)
def test_wilson_known_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_questions_of_their_own_clips_get_wilsons_interval() -> None:
    correct = [True] * 81 + [False] * 182
    assert accuracy_interval(correct, list(range(263))) == pytest.approx(wilson_interval(81, 263))


def test_no_question_has_no_interval() -> None:
    assert accuracy_interval([], []) is None


def test_clusters_widen_the_interval() -> None:
    # 40 clips of 5 questions whose answers stand or fall together: as much information as 40 questions, not 200.
    correct = [clip % 2 == 0 for clip in range(40) for _ in range(5)]
    groups = [clip for clip in range(40) for _ in range(5)]
    low, high = accuracy_interval(correct, groups) or (0.0, 0.0)
    independent = wilson_interval(100, 200)
    assert high - low > 1.8 * (independent[1] - independent[0])
    assert low < 0.5 < high


def test_bootstrap_is_reproducible() -> None:
    correct = [i % 3 == 0 for i in range(60)]
    groups = [i // 2 for i in range(60)]
    first = accuracy_interval(correct, groups, seed=1)
    assert first == accuracy_interval(correct, groups, seed=1)


@pytest.mark.parametrize("value", [True, False])
def test_all_alike_still_has_a_width(value: bool) -> None:
    low, high = accuracy_interval([value] * 6, [0, 0, 1, 1, 2, 2]) or (0.0, 0.0)
    assert high - low > 0.3


def test_lengths_must_agree() -> None:
    with pytest.raises(DataError, match="2 answers"):
        accuracy_interval([True, False], ["a"])
    with pytest.raises(DataError, match="1 and 2"):
        paired_test([True], [True, False])


@pytest.mark.parametrize(
    ("only_first", "only_second", "both", "neither", "p_value"),
    [
        (0, 0, 5, 5, 1.0),
        (0, 5, 3, 2, 0.0625),  # 2 / 2**5
        (1, 5, 0, 0, 0.21875),  # 2 * (1 + 6) / 2**6
        (3, 3, 10, 0, 1.0),
        (0, 10, 0, 0, 2 / 2**10),
    ],
)
def test_mcnemar_exact(only_first: int, only_second: int, both: int, neither: int, p_value: float) -> None:
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    test = paired_test(first, second)
    assert (test.only_first, test.only_second, test.n) == (only_first, only_second, len(first))
    assert test.p_value == pytest.approx(p_value)
    assert test.difference == pytest.approx((only_second - only_first) / len(first))
