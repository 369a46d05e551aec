"""What the tiny models are taught to write says what is so."""

from __future__ import annotations

import random
import re

import pytest

from avrt_lib import answers
from avrt_lib.miniature import texts
from avrt_lib.miniature.world import Question, clip_question
from avrt_lib.teachers.common import readable_reasoning

QUESTIONS = [clip_question(11, number) for number in range(200)]


def lines_of(reasoning: str) -> list[list[tuple[str, str]]]:
    """The (word, verdict) pairs of each option's line."""
    return [re.findall(r"(\w+) (yes|no)", line) for line in reasoning.split("\n")[1:]]


@pytest.mark.parametrize("sense", [0, 1])
def test_a_teacher_judges_its_own_part_of_each_option(sense: int) -> None:
    for question in QUESTIONS:
        fact = (question.sight, question.sound)[sense]
        trace = texts.teacher_trace(question, sense, pick=2)
        assert answers.extract(trace, question.options).index == 2
        reasoning = readable_reasoning(trace)
        assert fact in reasoning.split("\n")[0]
        for pair, line in zip(question.pairs, reasoning.split("\n")[1:], strict=True):
            word = pair[sense]
            told = f"{word} {'yes' if word == fact else 'no'}" if word else "unknown"
            assert line[3:] == told


def test_a_guess_is_an_option_that_the_sense_leaves_possible() -> None:
    rng = random.Random(0)
    for question in QUESTIONS:
        for sense, fact in ((0, question.sight), (1, question.sound)):
            assert question.pairs[texts.guess(question, sense, rng)][sense] in (None, fact)


def test_a_merged_trace_joins_both_and_stops_at_the_one_option_that_agrees() -> None:
    for question in QUESTIONS:
        trace = texts.merged_trace(question)
        assert answers.well_formed(trace)
        assert answers.extract(trace, question.options).index == question.answer
        lines = lines_of(texts.merged_reasoning(question))
        assert len(lines) == question.answer + 1
        assert {verdict for _, verdict in lines[-1]} == {"yes"}
        assert all("no" in {verdict for _, verdict in line} for line in lines[:-1])
        for pair, line in zip(question.pairs, lines, strict=False):
            assert [word for word, _ in line] == [word for word in pair if word]


def test_a_merged_trace_follows_the_traces_where_they_are_wrong_about_the_clip() -> None:
    question = Question("either", "red", "low", (("red", "low"), ("blue", "high"), ("green", "middle")), 0)
    assert texts.merged_reasoning(question, "blue", "low") == "I see blue and hear low.\nA. red no low yes"


def test_a_comparison_is_about_words_alone() -> None:
    rng = random.Random(1)
    verdicts = set()
    for _ in range(200):
        request, answer = texts.comparison(rng)
        wanted, given = request.removeprefix("Compare ").removesuffix(".").split(" with ")
        pairs = re.findall(r"(\w+) (yes|no)", answer)
        assert [word for word, _ in pairs] == given.split()
        assert all((verdict == "yes") == (word in wanted.split(" and ")) for word, verdict in pairs)
        verdicts |= {verdict for _, verdict in pairs}
    assert verdicts == {"yes", "no"}


def test_a_repetition_gives_the_options_or_one_part_of_them() -> None:
    rng = random.Random(2)
    seen = set()
    for question in QUESTIONS:
        request, answer = texts.repetition(question, rng)
        seen.add(request)
        sense = {"Repeat their colours.": 0, "Repeat their sounds.": 1}.get(request)
        told = [line[3:] for line in answer.split("\n")]
        assert told == (question.options if sense is None else [pair[sense] for pair in question.pairs])
    assert len(seen) == 3
