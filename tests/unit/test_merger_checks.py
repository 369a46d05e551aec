"""The merger's flags, each by a text that earns it and one beside it that does not."""

from __future__ import annotations

import random

import pytest

from avrt_lib.merger.checks import Sources, check, own_words, reasoning_of
from avrt_lib.miniature import texts, world

SOURCES = Sources(
    question="What is the man doing?",
    options=["playing the guitar", "riding a horse", "cooking soup"],
    answer_index=0,
    vision="A man sits on a stage under bright lights. His fingers move over the strings of a guitar. "
    "A. playing the guitar fits. B. riding a horse does not: no animal is visible.",
    audio="A melody of plucked strings with a warm tone, then applause of an audience. "
    "A. playing the guitar fits. C. cooking soup would sizzle.",
)
GOOD = (
    "A man sits on a stage and moves his fingers over the strings of a guitar, and a plucked melody is heard before "
    "the applause, so he is playing the guitar."
)


def wrap(reasoning: str, letter: str = "A") -> str:
    return f"<think>{reasoning}</think><answer>{letter}</answer>"


@pytest.mark.parametrize(
    ("text", "flags", "why"),
    [
        (wrap(GOOD), [], "both kinds of evidence, well formed"),
        ("", ["empty", "format", "wrong_answer"], "nothing at all"),
        (wrap(" "), ["empty", "format"], "no reasoning, right answer"),
        (wrap(GOOD, "B"), ["wrong_answer"], "another option's letter"),
        (f"<think>{GOOD}</think>", ["format", "wrong_answer"], "no answer"),
        (f"{wrap(GOOD)} Done.", ["format"], "text behind the answer"),
        (f"{GOOD} <answer>A</answer>", ["format"], "no think section"),
        (f"{wrap(GOOD)}<answer>B</answer>", ["format", "wrong_answer"], "two answers"),
        (wrap(f"{GOOD} " * 3), ["too_long"], "longer than max_words"),
        (wrap(f"Given that the correct answer is A, {GOOD}"), ["leak"], "says the answer was given"),
        (wrap(f"{GOOD} The provided answer confirms it."), ["leak"], "speaks of the provided answer"),
        (wrap(f"The audio analysis is clear. {GOOD}"), ["leak"], "speaks of the analyses"),
        (wrap(f"Both analysts agree. {GOOD}"), ["leak"], "speaks of the analysts"),
        (wrap(f"{GOOD} So the correct answer is A."), [], "a conclusion is no leak"),
        (wrap(f"{GOOD} He gives the audience a wave as an answer."), [], "the word answer is no leak"),
        (wrap("A man sits on a stage and his fingers move over a guitar."), ["one_sided"], "nothing heard"),
        (wrap("A plucked melody with a warm tone, then applause: playing."), ["one_sided", "unfaithful"],
         "nothing seen, and the guitar that was seen is gone"),
        (wrap("Penguins dive below melting icebergs while submarines sail towards guitar applause on stage."),
         ["unfaithful"], "most of its words stand nowhere"),
        (wrap("A man sits on a stage with moving fingers and a melody with applause is heard from the audience."),
         ["unfaithful"], "the vision trace saw a guitar; the merged text names nothing of the right option"),
    ],
)  # fmt: skip
def test_flags(text: str, flags: list[str], why: str) -> None:
    assert check(text, SOURCES, max_words=60) == flags, why


def test_quoted_options_are_not_own_words() -> None:
    assert "guitar" not in own_words("A. playing the guitar fits", SOURCES.options)
    assert "soup" not in own_words("Not (C) cooking soup.", SOURCES.options)
    assert "guitar" in own_words("He is playing the guitar.", SOURCES.options)


def test_reasoning_of_a_text_without_tags_is_the_text_without_its_answer() -> None:
    assert reasoning_of("He sings. <answer>B</answer>") == "He sings."


@pytest.mark.parametrize("number", range(40))
def test_miniature_right_merges_pass_and_swapped_facts_do_not(number: int) -> None:
    question = world.draw_question(random.Random(number))
    sources = Sources(
        question.text,
        question.options,
        question.answer,
        f"I see {question.sight}.{texts.weighing(question, 0, question.sight)}",
        f"I hear {question.sound}.{texts.weighing(question, 1, question.sound)}",
    )
    assert check(texts.merged_trace(question), sources, max_words=60) == []
    other = next(sight for sight in world.SIGHTS if sight != question.sight)
    wrong = check(texts.merged_trace(question, sight=other), sources, max_words=60)
    # A question about sound alone says nothing of colours, so a wrong one cannot be told by its options.
    assert ("unfaithful" in wrong) is (question.kind != "sound")
