"""What the miniature's models are taught to write, in the production models' formats."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from avrt_lib import answers, prompts
from avrt_lib.miniature.world import SIGHTS, SOUNDS, Question, draw_question
from avrt_lib.records import LETTERS

#: Tags that stay whole tokens, and are not special, so that decoding keeps them.
TAGS = [
    "◁think▷",
    "◁/think▷",
    "<THINK>",
    "</THINK>",
    "<PLANNING>",
    "</PLANNING>",
    "<REASONING>",
    "</REASONING>",
    "<SUMMARY>",
    "</SUMMARY>",
    "<RESPONSE>",
    "</RESPONSE>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
]

DESCRIBE = "Describe the clip."
REPEAT = "Repeat the options."


def possible(question: Question, sense: int, fact: str) -> list[int]:
    """Indices of the options that one sense leaves possible; sense 0 sees, 1 hears."""
    return [i for i, pair in enumerate(question.pairs) if pair[sense] in (None, fact)]


def weighing(question: Question, sense: int, fact: str) -> str:
    """One line for each option: maybe, or no."""
    left = possible(question, sense, fact)
    return "".join(
        f"\n{LETTERS[i]}. {text} {'maybe' if i in left else 'no'}" for i, text in enumerate(question.options)
    )


def teacher_facts(question: Question, sense: int) -> str:
    """What the teacher of this sense perceives in the clip."""
    return (question.sight, question.sound)[sense]


def teacher_trace(question: Question, sense: int, pick: int, fact: str | None = None) -> str:
    """A single-modality teacher's whole answer: Kimi-VL-Thinking's shape for sight, Audio Flamingo 3's for sound."""
    fact = fact or teacher_facts(question, sense)
    letter = LETTERS[pick]
    if sense == 0:
        body = f"◁think▷I see {fact}.{weighing(question, 0, fact)}◁/think▷"
        return f"{body}\n**Correct Answer:** ({letter})"
    return (
        f"<THINK><PLANNING>Listen.</PLANNING><REASONING>I hear {fact}.{weighing(question, 1, fact)}</REASONING>"
        f"<SUMMARY>Answer: {letter}.</SUMMARY></THINK><RESPONSE>**Answer: {letter}.**</RESPONSE>"
    )


def guess(question: Question, sense: int, rng: random.Random, fact: str | None = None) -> int:
    """The option that a teacher picks: one of those that its sense leaves possible, by chance."""
    left = possible(question, sense, fact or teacher_facts(question, sense))
    return rng.choice(left or range(len(question.pairs)))


def merged_reasoning(question: Question, sight: str | None = None, sound: str | None = None) -> str:
    """The merger's reasoning: both findings, then each option against both of them, up to the right one."""
    sight, sound = sight or question.sight, sound or question.sound
    lines = [f"I see {sight} and hear {sound}."]
    for i, pair in enumerate(question.pairs[: question.answer + 1]):
        right = question.pairs[question.answer]
        words = [
            f"{told} {'yes' if told == wanted else 'no'}"
            for told, wanted in zip(pair, right, strict=True)
            if told is not None
        ]
        lines.append(f"{LETTERS[i]}. {' '.join(words)}")
    return "\n".join(lines)


def merged_trace(question: Question, sight: str | None = None, sound: str | None = None) -> str:
    """The merger's whole answer."""
    return answers.compose(merged_reasoning(question, sight, sound), question.answer)


def merger_prompt(question: Question, vision: str, audio: str) -> str:
    """The merger's request."""
    return prompts.merger_prompt("plain", question.text, question.options, question.answer, vision, audio)


def question_prompt(question: Question) -> str:
    """The question as a teacher and the student are asked it."""
    return prompts.question_prompt("student", "plain", question.text, question.options)


def description(sight: str | None, sound: str | None) -> str:
    """What a model that perceives says of a clip; None for a modality that it does not get."""
    found = " and ".join(filter(None, [sight and f"see {sight}", sound and f"hear {sound}"]))
    return f"I {found}."


def corpus(texts: int = 800) -> Iterator[str]:
    """Texts to train the tokenizer on."""
    for number in range(texts):
        rng = random.Random(f"corpus {number}")
        question = draw_question(rng)
        vision, audio = (teacher_trace(question, sense, guess(question, sense, rng)) for sense in (0, 1))
        yield merger_prompt(question, vision, audio)
        yield merged_trace(question)
        described = description(question.sight, question.sound)
        yield f"system\nYou are a helpful assistant.\nuser\n{DESCRIBE}\nassistant\n{described}"
        yield REPEAT


def all_facts() -> Sequence[tuple[str, str]]:
    """Every pair of sight and sound."""
    return [(sight, sound) for sight in SIGHTS for sound in SOUNDS]
