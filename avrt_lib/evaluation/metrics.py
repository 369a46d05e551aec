"""Figures of one model from its predictions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from avrt_lib.evaluation.statistics import accuracy_interval
from avrt_lib.records import Prediction


def summarise(rows: Iterable[Prediction], *, resamples: int, seed: int) -> dict[str, Any]:
    """The figures that a report shows of one model.

    Accuracy is strict (the letter), its denominator all questions with a known label; an invalid answer is a wrong one.

    Args:
        rows: the model's predictions of all splits and conditions.
        resamples: bootstrap samples of the interval, where clips have several questions.
        seed: of the bootstrap.

    Returns:
        ``accuracy``, ``ci95``, ``invalid_rate``, ``words_mean``, ``n`` and ``by_kind`` of the test questions with all
        modalities, ``conditions`` with one modality removed, and ``validation``; None for what has no rows.
    """
    by_place: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    for row in rows:
        by_place[row.split, row.condition].append(row)
    test = by_place.get(("test", "av"), [])
    labelled = [row for row in test if row.correct_strict is not None]
    interval = accuracy_interval(
        [bool(row.correct_strict) for row in labelled],
        [row.group for row in labelled],
        resamples=resamples,
        seed=seed,
    )
    conditions = {
        condition: {"accuracy": accuracy(found), "invalid_rate": invalid_rate(found), "by_kind": by_kind(found)}
        for (split, condition), found in sorted(by_place.items())
        if split == "test" and condition != "av"
    }
    validation = by_place.get(("validation", "av"), [])
    return {
        "accuracy": accuracy(test),
        "ci95": list(interval) if interval else None,
        "invalid_rate": invalid_rate(test),
        "words_mean": sum(row.words for row in test) / len(test) if test else None,
        "n": len(test),
        "by_kind": by_kind(test),
        "conditions": conditions,
        "validation": {
            "accuracy": accuracy(validation),
            "n": len(validation),
            "invalid_rate": invalid_rate(validation),
        },
    }


def accuracy(rows: Sequence[Prediction]) -> float | None:
    """Share of right answers among the questions whose label is known, or None where there is none."""
    labelled = [row.correct_strict for row in rows if row.correct_strict is not None]
    return sum(labelled) / len(labelled) if labelled else None


def invalid_rate(rows: Sequence[Prediction]) -> float | None:
    """Share of answers that name no option, or None where there is no row."""
    return sum(row.answer_index is None for row in rows) / len(rows) if rows else None


def by_kind(rows: Sequence[Prediction]) -> dict[str, float | None]:
    """Accuracy by the data set's kind of question."""
    kinds: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        kinds[row.question_type].append(row)
    return {kind: accuracy(kinds[kind]) for kind in sorted(kinds)}
