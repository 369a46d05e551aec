"""Intervals and paired tests for accuracies."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from avrt_lib.errors import DataError


def wilson_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        correct: how many were right.
        n: of how many, at least one.
        level: its coverage.
    """
    interval = stats.binomtest(correct, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_interval(
    correct: Sequence[bool],
    groups: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Confidence interval of an accuracy whose questions come in groups (several about one clip).

    Where every question has a group of its own this is Wilson's interval. Otherwise whole groups are resampled
    (percentile bootstrap), since answers about one clip are not independent. Where all answers, or none, are right, a
    bootstrap has no width, and Wilson's interval for as many groups is given.

    Args:
        correct: whether each question was answered right.
        groups: the group of each question.
        level: its coverage.
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        Its lower and upper end, or None where there is no question.
    """
    if len(correct) != len(groups):
        raise DataError(f"{len(correct)} answers cannot stand in {len(groups)} groups.")
    if not correct:
        return None
    right: dict[Hashable, int] = {}
    size: dict[Hashable, int] = {}
    for value, group in zip(correct, groups, strict=True):
        right[group] = right.get(group, 0) + int(value)
        size[group] = size.get(group, 0) + 1
    total, n = sum(right.values()), len(correct)
    if len(size) == n:
        return wilson_interval(total, n, level)
    if total in (0, n) or len(size) < 2:
        return wilson_interval(round(total / n * len(size)), len(size), level)
    per_group = np.array(list(right.values())), np.array(list(size.values()))
    result = stats.bootstrap(
        per_group,
        lambda hits, sizes, axis: hits.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=256,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Exact McNemar test of two models on the same questions.

    Attributes:
        n: questions that both answered.
        only_first, only_second: questions that only that model answered right.
        p_value: two-sided; 1.0 where the models never differ.
    """

    n: int
    only_first: int
    only_second: int
    p_value: float

    @property
    def difference(self) -> float:
        """Accuracy of the second minus that of the first; 0 where there is no question."""
        return (self.only_second - self.only_first) / self.n if self.n else 0.0


def paired_test(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Compare two models' answers to the same questions, in the same order.

    Raises:
        DataError: where the two do not have as many answers.
    """
    if len(first) != len(second):
        raise DataError(f"A paired test needs the same questions twice, not {len(first)} and {len(second)} answers.")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    p_value = float(stats.binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    return PairedTest(len(first), only_first, only_second, p_value)
