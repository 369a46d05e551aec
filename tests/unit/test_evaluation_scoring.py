"""The official word-set rule and the figures of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avrt_lib.evaluation.metrics import summarise
from avrt_lib.evaluation.official import is_correct, word_set_match
from avrt_lib.records import LETTERS, Prediction

BENCHMARKS = Path(__file__).parents[3] / "shared" / "benchmarks"


@pytest.mark.parametrize(
    ("prediction", "answer", "options", "right", "why"),
    [
        ("A man", "man", ["Man", "Woman"], True, "case does not matter, and more words do not harm"),
        ("B", "woman", ["Man", "Woman"], False, "a bare letter has none of the answer's words"),
        ("a man, not a woman", "man", ["Man", "Woman"], False, "a word that only a wrong option has"),
        ("dog", "dog bark", ["dog bark", "cat"], False, "a word of the answer is missing"),
        ("", "man", ["Man", "Woman"], False, "nothing said"),
        ("C. two dogs", "two dogs", ["one dog", "two cats", "two dogs"], True, "letter and text"),
    ],
)
def test_word_set_rule(prediction: str, answer: str, options: list[str], right: bool, why: str) -> None:
    assert word_set_match(prediction, answer, options) is right, why


@pytest.mark.parametrize(
    ("chosen", "label", "expected"), [(0, 0, True), (1, 0, False), (None, 0, False), (1, None, None)]
)
def test_letters_are_scored_as_their_options(chosen: int | None, label: int | None, expected: bool | None) -> None:
    assert is_correct(chosen, label, ["a dog", "a cat"]) is expected


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the sample of MMAR's metadata is not beside this repository")
def test_right_letters_of_mmar_count_and_bare_letters_do_not() -> None:
    path = next(p for p in sorted(BENCHMARKS.iterdir()) if "mmar" in p.name.lower())
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    matched = bare = 0
    for row in rows:
        index = row["choices"].index(row["answer"]) if row["answer"] in row["choices"] else None
        matched += bool(is_correct(index, index, row["choices"])) if index is not None else 0
        bare += index is not None and word_set_match(LETTERS[index], row["answer"], row["choices"])
    assert matched >= 0.95 * len(rows)
    assert bare <= 0.01 * len(rows)


def _row(number: int, right: bool | None, **changes: object) -> Prediction:
    values = {
        "sample_id": f"s{number}",
        "split": "test",
        "group": f"g{number}",
        "question_type": "either" if number % 2 else "both",
        "model": "m",
        "condition": "av",
        "raw_text": "",
        "answer_index": 0,
        "invalid_reason": None,
        "correct_strict": right,
        "correct_official": right,
        "words": 10,
        "tokens_in": 1,
        "tokens_out": 1,
        "latency_s": 0.1,
    }
    return Prediction(**(values | changes))  # type: ignore[arg-type]


def test_figures() -> None:
    rows = [
        _row(0, True),
        _row(1, True, words=20),
        _row(2, False, answer_index=None, invalid_reason="no_answer"),
        _row(3, False),
        _row(1, True, condition="audio_only"),
        _row(2, False, condition="audio_only", answer_index=None),
        _row(5, True, split="validation"),
        _row(6, None, split="validation"),
    ]
    facts = summarise(rows, resamples=200, seed=0)
    assert set(facts) == {
        "accuracy", "ci95", "invalid_rate", "words_mean", "n", "by_kind", "conditions", "validation"
    }  # fmt: skip
    assert (facts["accuracy"], facts["invalid_rate"], facts["words_mean"], facts["n"]) == (0.5, 0.25, 12.5, 4)
    assert facts["by_kind"] == {"both": 0.5, "either": 0.5}
    assert facts["ci95"][0] < 0.5 < facts["ci95"][1]
    expected = {"accuracy": 0.5, "invalid_rate": 0.5, "by_kind": {"both": 0.0, "either": 1.0}}
    assert facts["conditions"] == {"audio_only": expected}
    assert facts["validation"] == {"accuracy": 1.0, "n": 2, "invalid_rate": 0.0}


def test_no_rows_have_no_figures() -> None:
    facts = summarise([], resamples=200, seed=0)
    assert facts["accuracy"] is None
    assert facts["ci95"] is None
    assert facts["n"] == 0
