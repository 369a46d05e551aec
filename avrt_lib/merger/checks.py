"""What may be wrong with a merged trace, found by comparing it with the two traces that it merges.

The checks look at words alone, so they are cheap, the same for every merger, and deliberately reluctant: each flag
names something that a reader would agree with. Flags are counted and shown; the gate before training decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from avrt_lib import answers
from avrt_lib.records import LETTERS

EMPTY = "empty"
FORMAT = "format"
WRONG_ANSWER = "wrong_answer"
TOO_LONG = "too_long"
LEAK = "leak"
ONE_SIDED = "one_sided"
UNFAITHFUL = "unfaithful"

FLAGS = (EMPTY, FORMAT, WRONG_ANSWER, TOO_LONG, LEAK, ONE_SIDED, UNFAITHFUL)

#: A merged reasoning whose content words come from its sources to a smaller share than this tells of something else.
MINIMUM_SUPPORT = 0.5

_LEAKS = re.compile(
    r"""
    \b(?:given|provided|known|stated|supplied|labell?ed)\s+(?:correct\s+|right\s+)?answer\b
    | \b(?:given|knowing|since\s+we\s+know|as\s+we\s+know|we\s+are\s+told|i\s+am\s+told|i\s+was\s+told)\s+(?:that\s+)?
      the\s+(?:correct\s+|right\s+|final\s+)?answer\b
    | \b(?:correct|right)?\s*answer\s+(?:is|was|has\s+been)\s+(?:already\s+)?(?:given|provided|known|stated|told)\b
    | \banswer\s+key\b | \bground[\s-]truth\b
    | \banalysts?\b
    | \b(?:both|two|these|the|provided|given)\s+analyses\b
    | \b(?:audio|sound|acoustic|visual|vision|video|picture|image)s?\s+(?:analysis|analyst|trace|expert|model|teacher)\b
    | \banalysis\s+of\s+the\s+(?:sound|audio|pictures?|video|frames)\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_STOP = frozenset(
    """
    a about above after again all also although am an and any are as at be because been before being below between
    both but by can could did do does doing done each either else ever every for from further had has have having he
    her here him his how i if in into is it its itself just like may maybe me might more most much must my neither
    no nor not now of off on one only onto or other our out over own perhaps same she should since so some such than
    that the their them then there these they this those though through thus to too toward towards under until up
    upon us very was we well were what when where which while who whose why will with within without would yes yet
    you your therefore hence answer answers option options question correct right wrong best choice letter final
    """.split()  # noqa: SIM905 (a table of words reads better as text)
)


@dataclass(frozen=True, slots=True)
class Sources:
    """What a merged trace was made from.

    Attributes:
        question: the question's text.
        options: its option texts.
        answer_index: the right option.
        vision, audio: the reasoning of each teacher, without tags.
    """

    question: str
    options: Sequence[str]
    answer_index: int
    vision: str
    audio: str


def _stem(word: str) -> str:
    for ending in ("ing", "ies", "ed", "es", "ly", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def content_words(text: str) -> set[str]:
    """The stems of a text's words, without words that carry no content."""
    words = {word for word in _WORD.findall(text.casefold()) if word not in _STOP}
    return {_stem(word) for word in words}


def own_words(reasoning: str, options: Sequence[str]) -> str:
    """The reasoning without the options that it quotes or weighs behind their letters ("B. a dog", "(B) a dog").

    What is left is what the text says itself: both traces speak of every option, whatever they perceived. A line that
    begins with an option's letter is about that option as a whole.
    """
    for letter, option in zip(LETTERS, options, strict=False):
        reasoning = re.sub(rf"(?m)^\s*\(?{letter}[.):]\s.*$", " ", reasoning)
        reasoning = re.sub(rf"\(?\b{letter}[.):]\s*{re.escape(option)}", " ", reasoning)
    return reasoning


def check(text: str, sources: Sources, *, max_words: int) -> list[str]:
    """The flags of one merged trace.

    Args:
        text: the merger's whole text.
        sources: what it was given.
        max_words: the longest reasoning.

    Returns:
        A sub-list of ``FLAGS``, in their order:

        - ``empty``: no reasoning.
        - ``format``: not exactly one think section and one answer letter.
        - ``wrong_answer``: its answer is not the right one, or it has none.
        - ``too_long``: more than ``max_words`` words of reasoning.
        - ``leak``: it lets on that the answer was given, or speaks of the analyses that it was given.
        - ``one_sided``: it has none of the words that only the vision trace, or only the audio trace, brought.
        - ``unfaithful``: less than ``MINIMUM_SUPPORT`` of its content words stand in the question, the options or a
          trace; or a trace itself names something of the right option, and the merged text names nothing of that.
    """
    reasoning = reasoning_of(text)
    found = set()
    if not reasoning:
        found.add(EMPTY)
    if not answers.well_formed(text):
        found.add(FORMAT)
    if answers.extract(text, sources.options).index != sources.answer_index:
        found.add(WRONG_ANSWER)
    if answers.count_words(reasoning) > max_words:
        found.add(TOO_LONG)
    if _LEAKS.search(reasoning):
        found.add(LEAK)
    if reasoning:
        found |= _evidence(reasoning, sources)
    return [flag for flag in FLAGS if flag in found]


def reasoning_of(text: str) -> str:
    """The merged text's reasoning: its think section, or all of it but the answer where it has none."""
    reasoning, rest, _ = answers.split_reasoning(text)
    if not reasoning:
        reasoning = re.sub(r"</?answer>.*", " ", rest, flags=re.DOTALL | re.IGNORECASE)
    return reasoning.strip()


def _evidence(reasoning: str, sources: Sources) -> set[str]:
    vision, audio, merged = (
        content_words(own_words(text, sources.options)) for text in (sources.vision, sources.audio, reasoning)
    )
    asked = content_words(sources.question)
    found = set()
    for brought in (vision - audio - asked, audio - vision - asked):
        if brought and not brought & merged:
            found.add(ONE_SIDED)
    known = asked | vision | audio | content_words(" ".join(sources.options))
    if merged and len(merged & known) / len(merged) < MINIMUM_SUPPORT:
        found.add(UNFAITHFUL)
    right = content_words(sources.options[sources.answer_index]) - asked
    for perceived in (vision & right, audio & right):
        if perceived and not perceived & merged:
            found.add(UNFAITHFUL)
    return found
