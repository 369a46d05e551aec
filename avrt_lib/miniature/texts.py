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
#: The same for what the options say to one sense: 0 sees, 1 hears.
REPEAT_PART = ("Repeat their colours.", "Repeat their sounds.")


def possible(question: Question, sense: int, fact: str) -> list[int]:
    """Indices of the options that one sense leaves possible; sense 0 sees, 1 hears."""
    return [i for i, pair in enumerate(question.pairs) if pair[sense] in (None, fact)]


def weighing(question: Question, sense: int, fact: str) -> str:
    """One line for each option: what it says to this sense and whether that was perceived, or that it says nothing."""
    told = (pair[sense] for pair in question.pairs)
    return "".join(f"\n{LETTERS[i]}. {_weighed(word, fact) if word else 'unknown'}" for i, word in enumerate(told))


def _weighed(word: str, fact: str) -> str:
    return f"{word} {'yes' if word == fact else 'no'}"


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


def guess(question: Question, sense: int, rng: random.Random) -> int:
    """The option that a teacher picks: one of those that its sense leaves possible, by chance."""
    return rng.choice(possible(question, sense, teacher_facts(question, sense)))


def merged_reasoning(question: Question, sight: str | None = None, sound: str | None = None) -> str:
    """The merger's reasoning: both findings, then what both traces say of each option, up to the right one."""
    facts = (sight or question.sight, sound or question.sound)
    lines = [f"I see {facts[0]} and hear {facts[1]}."]
    for i, pair in enumerate(question.pairs[: question.answer + 1]):
        weighed = [_weighed(word, fact) for word, fact in zip(pair, facts, strict=True) if word]
        lines.append(f"{LETTERS[i]}. {' '.join(weighed)}")
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


def repetition(question: Question, rng: random.Random) -> tuple[str, str]:
    """A request to repeat the options, or their colours, or their sounds, and its answer."""
    senses = [sense for sense in (0, 1) if question.pairs[0][sense] is not None]
    if len(senses) < 2 or rng.random() < 1 / 3:
        return REPEAT, prompts.lettered(question.options)
    sense = rng.choice(senses)
    return REPEAT_PART[sense], prompts.lettered([str(pair[sense]) for pair in question.pairs])


def comparison(rng: random.Random) -> tuple[str, str]:
    """A request to compare words with one or two others, and its answer; no clip and no options are in it."""
    words = [*SIGHTS, *SOUNDS]
    wanted = rng.sample(words, rng.choice((1, 2)))
    given = rng.sample(words, 6)
    if rng.random() < 0.7:  # by chance alone, few of them would be among the wanted ones
        given[rng.randrange(len(given))] = rng.choice(wanted)
    answer = " ".join(_weighed(word, word if word in wanted else "") for word in given)
    return f"Compare {' and '.join(wanted)} with {' '.join(given)}.", answer


def conclusion(rng: random.Random) -> tuple[str, str]:
    """A request to say which line of a list speaks for its option in all that it says, and its answer.

    Where none does it is the last. Some ask for the lines up to that one as well. The lists are of the form in which
    options are weighed; what they say has nothing to do with any clip.
    """
    words = [*SIGHTS, *SOUNDS]
    count, per_line = rng.randint(2, 4), rng.choice((1, 2))
    right = rng.randrange(count)
    one_speaks = rng.random() < 0.8
    lines = []
    for i in range(count):
        verdicts = ["yes"] * per_line
        if i != right or not one_speaks:
            verdicts = [rng.choice(("yes", "no")) for _ in range(per_line)]
            verdicts[rng.randrange(per_line)] = "no"
        lines.append(f"{LETTERS[i]}. {' '.join(f'{rng.choice(words)} {verdict}' for verdict in verdicts)}")
    right = right if one_speaks else count - 1
    answer = f"<answer>{LETTERS[right]}</answer>"
    if rng.random() < 0.5:
        return "\n".join(["Quote and conclude.", *lines]), "\n".join([*lines[: right + 1], answer])
    return "\n".join(["Conclude.", *lines]), answer


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
        yield "\n".join([REPEAT, *REPEAT_PART, *comparison(rng)])


def all_facts() -> Sequence[tuple[str, str]]:
    """Every pair of sight and sound."""
    return [(sight, sound) for sight in SIGHTS for sound in SOUNDS]
