"""The scoring rule of MMAR and MMAU: the words of the options, not their letters.

Their answers are texts, and a bare letter matches none of them (MMAR's and MMAU's published evaluation scripts). So the
letter that a model chose is turned into its option's text first, and that text is scored by the rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def words(text: str) -> frozenset[str]:
    """The set of a text's words, in lower case."""
    return frozenset(_WORD.findall(text.lower()))


def word_set_match(prediction: str, answer: str, options: Sequence[str]) -> bool:
    """Whether a text is right by the word-set rule.

    All words of the answer must stand in the prediction, and no word that only wrong options have.

    >>> word_set_match("B. a dog barks", "a dog barks", ["a cat", "a dog barks"])
    True
    >>> word_set_match("a dog and a cat", "a dog", ["a cat", "a dog"])
    False
    """
    said, right = words(prediction), words(answer)
    if not said:
        return False
    wrong = frozenset[str]().union(*(words(option) for option in options)) - right
    return right <= said and not said & wrong


def is_correct(chosen: int | None, answer_index: int | None, options: Sequence[str]) -> bool | None:
    """Whether a chosen option is right by the word-set rule; None where the label is not known.

    An option whose words hold all of the answer's and none of a wrong option's own counts as right too: this is the
    published rule, and why strict accuracy stands beside it.
    """
    if answer_index is None:
        return None
    if chosen is None:
        return False
    return word_set_match(options[chosen], options[answer_index], options)
