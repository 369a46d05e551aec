"""The one answer extractor: filter, merger's check, reward, validation, evaluation and serving probe all use it.

It knows the shapes of the two teachers, the merger and the student, and says why a text has no valid answer:

- ``◁think▷ … ◁/think▷ … **Correct Answer:** (B) diving`` (Kimi-VL-Thinking)
- ``<THINK>…</THINK><RESPONSE>… **Answer: B.**</RESPONSE>`` (Audio Flamingo 3 think)
- ``<think>…</think><answer>B</answer>`` (merger and student), or ``<answer>B</answer>`` alone (a base model)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from avrt_lib.records import LETTERS

EMPTY = "empty"
UNFINISHED = "unfinished"
NO_ANSWER = "no_answer"
CONFLICTING = "conflicting"
OUT_OF_RANGE = "out_of_range"
MISMATCH = "letter_text_mismatch"


@dataclass(frozen=True, slots=True)
class Answer:
    """An option's index, or None with the reason why the text has no valid answer."""

    index: int | None
    reason: str | None = None

    @property
    def letter(self) -> str | None:
        """The option's letter, or None."""
        return None if self.index is None else LETTERS[self.index]


_THINK_PAIRS = (("<think>", "</think>"), ("<THINK>", "</THINK>"), ("◁think▷", "◁/think▷"))
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_RESPONSE = re.compile(r"<RESPONSE>(.*?)(?:</RESPONSE>|\Z)", re.DOTALL)
# "Correct Answer: (B) diving", "**Answer: B.**", "the answer is B": a label word, then one capital letter that stands
# alone. Lower case is not read as a letter, so the article "a" never counts as option A.
_LABELLED = re.compile(
    r"(?:[Cc]orrect\s+|[Ff]inal\s+|[Bb]est\s+)?[Aa]nswer(?:\s+is|\s*:)[\s*:]*[(\[]?([A-Z])(?![A-Za-z])[)\].:]?[ \t]*([^\n*<]*)"
)
_LETTER_FORM = re.compile(r"[(\[]?([A-Z])(?![A-Za-z])[)\]]?[.:]?(?:\s+(.*))?", re.DOTALL)
_WELL_FORMED = re.compile(r"<think>(.+?)</think>\s*<answer>\s*([A-H])\s*</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)


def _normal(text: str) -> str:
    return " ".join(text.split()).strip(" .*\"'").casefold()


def split_reasoning(text: str) -> tuple[str, str, bool]:
    """Split a text into its think section and the rest.

    Returns:
        The reasoning without its tags (empty where there is none), the text after it, and whether the section that was
        opened was closed too.
    """
    for opening, closing in _THINK_PAIRS:
        start = text.find(opening)
        if start < 0:
            # A chat template may have written the opening tag already, so the text starts inside the section.
            end = text.rfind(closing)
            if end >= 0:
                return text[:end].strip(), text[end + len(closing) :], True
            continue
        end = text.rfind(closing)
        if end < start:
            return text[start + len(opening) :].strip(), "", False
        return text[start + len(opening) : end].strip(), text[:start] + text[end + len(closing) :], True
    return "", text, True


def _read_one(content: str, options: Sequence[str]) -> Answer:
    """Read one answer as it stands between tags: a letter, a letter with its option's text, or the text alone."""
    content = content.strip()
    wanted = _normal(content)
    if not wanted:
        return Answer(None, EMPTY)
    by_text = [i for i, option in enumerate(options) if _normal(option) == wanted]
    match = _LETTER_FORM.fullmatch(content)
    # An option may itself be a single letter or start with one ("C major"): its own text wins over its letter shape.
    if len(by_text) == 1 and (match is None or match[2]):
        return Answer(by_text[0])
    if match is None:
        return Answer(None, NO_ANSWER)
    return _check(match[1], match[2] or "", options)


def _check(letter: str, text: str, options: Sequence[str]) -> Answer:
    index = LETTERS.find(letter)
    if index < 0 or index >= len(options):
        return Answer(None, OUT_OF_RANGE)
    tail = _normal(text)
    if tail and tail != _normal(options[index]):
        if re.match(r"(?:or|and|/|,)\s*[(\[]?[a-h]\b", tail):
            return Answer(None, CONFLICTING)
        if any(_normal(option) == tail for option in options):
            return Answer(None, MISMATCH)
    return Answer(index)


def extract(text: str, options: Sequence[str]) -> Answer:
    """The answer that a model's text gives.

    Args:
        text: the whole text as the model wrote it.
        options: the question's option texts, two to eight, without letters.

    Returns:
        The index of the option, or None and one of ``empty``, ``unfinished`` (a think section that never ends),
        ``no_answer``, ``conflicting`` (two different answers), ``out_of_range`` (a letter past the last option) or
        ``letter_text_mismatch`` (the letter of one option with the text of another).

    >>> extract("<think>It barks.</think><answer>B</answer>", ["cat", "dog"])
    Answer(index=1, reason=None)
    >>> extract("<answer>A</answer><answer>B</answer>", ["cat", "dog"])
    Answer(index=None, reason='conflicting')
    """
    if not text or not text.strip():
        return Answer(None, EMPTY)
    _, rest, closed = split_reasoning(text)
    if not closed:
        return Answer(None, UNFINISHED)
    tagged = _TAGGED.findall(rest)
    if tagged:
        return _agree([_read_one(content, options) for content in tagged])
    response = _RESPONSE.search(rest)
    body = response[1] if response else rest
    labelled = _LABELLED.findall(body)
    if labelled:
        return _agree([_check(letter, tail, options) for letter, tail in labelled])
    stripped = body.strip()
    if stripped and len(stripped) <= 200:
        answer = _read_one(stripped, options)
        if answer.index is not None or answer.reason in (OUT_OF_RANGE, MISMATCH, CONFLICTING):
            return answer
    return Answer(None, NO_ANSWER if stripped else EMPTY)


def _agree(found: list[Answer]) -> Answer:
    indices = {answer.index for answer in found}
    if len(indices) > 1:
        return Answer(None, CONFLICTING)
    return found[0]


def well_formed(text: str) -> bool:
    """Whether the whole text is exactly one ``<think>…</think><answer>X</answer>`` (the paper's R_format).

    Repeated or nested tags and anything before or after them fail, so that a reward cannot be had by writing several.
    """
    match = _WELL_FORMED.fullmatch(text.strip())
    return bool(match) and len(_TAG.findall(text)) == 4 and bool(match[1].strip())  # type: ignore[index]


def compose(reasoning: str, index: int) -> str:
    """The student's target form of a reasoning and an answer."""
    return f"<think>{reasoning}</think><answer>{LETTERS[index]}</answer>"


def count_words(text: str) -> int:
    """Words of a text as the length reward counts them: runs of non-space characters, tags left out."""
    return len(re.sub(r"<[^<>]{1,20}>|◁/?think▷", " ", text).split())
