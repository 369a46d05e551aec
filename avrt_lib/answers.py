"""The one answer extractor: filter, merger's check, reward, validation, evaluation and serving probe all use it.

It knows the shapes of the two teachers, the merger and the student, and says why a text has no valid answer:

- ``◁think▷ … ◁/think▷ … **Correct Answer:** (B) diving`` (Kimi-VL-Thinking)
- ``<THINK>…</THINK><RESPONSE>… **Answer: B.**</RESPONSE>`` (Audio Flamingo 3 think)
- ``<think>…</think><answer>B</answer>`` (merger and student), or ``<answer>B</answer>`` alone (a base model)
"""

from __future__ import annotations

import re
import unicodedata
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


# Case does not matter and neither does which pair closes the other: Kimi-VL writes ◁think▷, Audio Flamingo <THINK>.
_THINK_TAG = re.compile(r"(<think>|◁think▷)|(</think>|◁/think▷)", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"(<answer>)|</answer>", re.IGNORECASE)
_RESPONSE = re.compile(r"<RESPONSE>(.*?)(?:</RESPONSE>|\Z)", re.DOTALL | re.IGNORECASE)
# What announces an answer: "Correct Answer:", "the answer is", "the best option would be".
_LABEL = re.compile(
    r"\b(?:answer|(?:correct|right|best|final)\s+(?:option|choice))\b[\s*_]*"
    r"(?:[:=]|(?:is|was|(?:would|should|must|has\s+to)\s+be)\b(?!\s+not\b)\s*:?)[\s*_]*(?:(?:option|choice|letter)\b[\s:]*)?",
    re.IGNORECASE,
)
# One capital letter that stands alone, with what encloses or ends it. Lower case is not read as a letter, so the
# article "a" never counts as option A.
_LETTER = re.compile(r"[(\[{]?\s*([A-Z])(?![\w'’\-])\s*([)\]}]?[.:]?)")
# After a letter: what may follow it without being its option's text ("B because it barks", "B, not A", "B - the dog").
_EXPLAINED = re.compile(r"\s*(?:,|;|\(|[-–—]\s|because\b|since\b|as\b|for\b)")
# A further letter behind the first: "A or B", "A/B", "A, B", "A B", "A. cat B. dog".
_JOINED = re.compile(
    r"[\s.;:*]*(?:(?P<loose>[,;+])|\b(?:or|and)\b|[/|&])\s*(?:(?:or|and|option)\b\s*)*[(\[]?(?P<letter>[A-Ha-h])(?![\w'’])"
)
_LISTED = re.compile(r"[\s.;*]*[(\[]?([A-H])(?:[)\]:.]|\s*\Z|\s+(?=[A-H](?!\w)))")
_LISTED_LINE = re.compile(r"^\s*[(\[]?([A-H])[)\].:]", re.MULTILINE)
_ENDS = re.compile(r"[)\]]?\s*(?:\Z|[.,;/|&+)]|or\b|and\b)")
_MARKUP = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
# Characters without width, that would stand between a tag and its letter unseen.
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
# A text without tags or labels is read as an answer only where it is no longer than this.
_SHORT = 200
_QUOTES = " \t\r\n.*_`$\"'“”‘’"
_WELL_FORMED = re.compile(r"<think>(.+?)</think>\s*<answer>\s*([A-H])\s*</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)


def _plain(text: str) -> str:
    """Compatible characters made one (full-width letters and brackets), invisible ones and TeX boxes left out."""
    return _MARKUP.sub(r"\1", unicodedata.normalize("NFKC", text).translate(_INVISIBLE))


def _normal(text: str) -> str:
    spaced = " ".join(_plain(text).split()).casefold()
    # An option may consist of nothing but such marks.
    return spaced.strip(_QUOTES) or spaced


def split_reasoning(text: str) -> tuple[str, str, bool]:
    """Split a text into its think sections and the rest.

    Returns:
        The reasoning without its tags (empty where there is none; several sections are joined by a line break), the
        text outside of it, and whether every section that was opened was closed too.
    """
    thought: list[str] = []
    rest: list[str] = []
    inside = False
    at = 0
    for tag in _THINK_TAG.finditer(text):
        if tag[1] is not None:
            if not inside:
                rest.append(text[at : tag.start()])
                at, inside = tag.end(), True
            # An opening tag inside a section is something that the model wrote about.
            continue
        # A chat template may have written the first opening tag already, so the text starts inside the section.
        if inside or not (thought or rest):
            thought.append(text[at : tag.start()].strip())
        else:
            rest.append(text[at : tag.start()])
        at, inside = tag.end(), False
    (thought if inside else rest).append(text[at:].strip() if inside else text[at:])
    return "\n".join(filter(None, thought)), "".join(rest), not inside


def _read_one(content: str, options: Sequence[str]) -> Answer:
    """Read one answer as it stands between tags: a letter, a letter with its option's text, or the text alone."""
    content = content.strip(_QUOTES) or content.strip()
    if not content:
        return Answer(None, EMPTY)
    wanted = _normal(content)
    by_text = [i for i, option in enumerate(options) if _normal(option) == wanted]
    match = _LETTER.match(content)
    alone = match is not None and not content[match.end() :].strip(_QUOTES)
    # An option may itself start with a letter ("C major"): its own text wins over its letter shape. A letter alone is
    # what was asked for, so it is one, even where an option is another letter.
    if len(by_text) == 1 and not alone:
        return Answer(by_text[0])
    if match is None:
        return Answer(None, NO_ANSWER)
    return _check(match[1], match[2], content[match.end() :], options)


def _starts_with(text: str, option: str) -> int:
    """How many characters of ``text`` are the option's text, or 0 where it does not start with it."""
    words = r"\s+".join(re.escape(word) for word in _plain(option).strip(_QUOTES).split())
    if not words:
        return 0
    found = re.match(rf"[\s*_\"'`“‘]*{words}(?!\w)", text, re.IGNORECASE)
    return found.end() if found else 0


def _check(letter: str, mark: str, tail: str, options: Sequence[str]) -> Answer:
    """Whether a letter is one answer, given what follows it."""
    index = LETTERS.find(letter)
    more = bool(tail.strip(_QUOTES))
    if index < 0 or index >= len(options):
        # "I hear rain" names no option past the last one.
        return Answer(None, NO_ANSWER if more and not mark else OUT_OF_RANGE)
    if not more or _normal(tail) == _normal(options[index]):
        return Answer(index)
    own = _starts_with(tail, options[index])
    if not own and any(_starts_with(tail, option) for option in options):
        return Answer(None, MISMATCH)
    if _names_another(letter, tail[own:], len(options)):
        return Answer(None, CONFLICTING)
    if not own and not mark and not _EXPLAINED.match(tail):
        # "A loud noise": an article, or something else that only starts with a letter.
        return Answer(None, NO_ANSWER)
    return Answer(index)


def _names_another(letter: str, tail: str, count: int) -> bool:
    others = set(LETTERS[:count]) - {letter}
    joined = _JOINED.match(tail)
    if joined and joined["letter"].upper() in others:
        # "B, a dog" goes on with an article and "B, C is quieter" with a sentence; "A or B" never does.
        certain = joined["letter"].isupper() and joined["loose"] is None
        if certain or _ENDS.match(tail, joined.end()):
            return True
    listed = _LISTED.match(tail)
    if listed and listed[1] in others:
        return True
    return any(found[1] in others for found in _LISTED_LINE.finditer(tail))


def _tagged(text: str) -> tuple[list[str], str]:
    """The contents of each pair of answer tags, and the text outside of them."""
    contents: list[str] = []
    outside: list[str] = []
    start: int | None = None
    at = 0
    for tag in _ANSWER_TAG.finditer(text):
        if tag[1] is not None and start is None:
            outside.append(text[at : tag.start()])
            start = tag.end()
        elif tag[1] is None and start is not None:
            contents.append(text[start : tag.start()])
            start, at = None, tag.end()
    outside.append(text[at:])
    return contents, "\n".join(outside)


def _labelled(text: str, options: Sequence[str]) -> list[Answer]:
    """What each announced answer says; announcements without an option ("the answer is not clear") are left out."""
    labels = list(_LABEL.finditer(text))
    found: list[Answer] = []
    for i, label in enumerate(labels):
        end = labels[i + 1].start() if i + 1 < len(labels) else len(text)
        answer = _read_one(text[label.end() : end].split("\n", 1)[0].split("<", 1)[0], options)
        if answer.reason not in (EMPTY, NO_ANSWER):
            found.append(answer)
    return found


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
    _, rest, closed = split_reasoning(_plain(text))
    if not closed:
        return Answer(None, UNFINISHED)
    contents, outside = _tagged(rest)
    if contents:
        return _agree([_read_one(content, options) for content in contents] + _labelled(outside, options))
    response = _RESPONSE.search(rest)
    body = (response[1] if response else rest).strip()
    if not body:
        return Answer(None, EMPTY)
    labelled = _labelled(body, options)
    if labelled:
        return _agree(labelled)
    return _read_one(body, options) if len(body) <= _SHORT else Answer(None, NO_ANSWER)


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
