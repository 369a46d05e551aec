"""The answer extractor, by table: a text, the answer that it gives, and why."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avrt_lib.answers import (
    CONFLICTING,
    EMPTY,
    MISMATCH,
    NO_ANSWER,
    OUT_OF_RANGE,
    UNFINISHED,
    Answer,
    compose,
    count_words,
    extract,
    split_reasoning,
    well_formed,
)
from avrt_lib.records import LETTERS

SPORTS = ["rowing", "diving", "sailing", "surfing"]
PETS = ["cat", "dog"]
KEYS = ["C major", "A minor", "B flat", "D major"]
GRADES = ["B", "A", "D", "C"]
ALL = ["rain", "wind", "bell", "drum", "train", "horn", "bird", "clock"]

# text, options, index or reason, why
TABLE = [
    # The student's and the merger's form.
    ("<think>It splashes.</think><answer>B</answer>", SPORTS, 1, "the asked form"),
    ("<think>It splashes.</think>\n<answer>\n B \n</answer>\n", SPORTS, 1, "white space means nothing"),
    ("<answer>B</answer>", SPORTS, 1, "a base model answers without reasoning"),
    ("It splashes.</think><answer>B</answer>", SPORTS, 1, "the chat template wrote the opening tag"),
    ("<THINK>a</THINK><ANSWER>B</ANSWER>", SPORTS, 1, "the case of tags means nothing"),
    ("<think></think><answer>B</answer>", SPORTS, 1, "an empty section is a matter of form, not of the answer"),
    ("<answer>(B)</answer>", SPORTS, 1, "a letter in brackets"),
    ("<answer>B.</answer>", SPORTS, 1, "a letter with a full stop"),
    ("<answer>**B**</answer>", SPORTS, 1, "a letter in bold"),
    ("<answer>$\\boxed{B}$</answer>", SPORTS, 1, "a letter in a TeX box"),
    ("<answer>B. diving</answer>", SPORTS, 1, "a letter with its option's text"),
    ("<answer>(B) Diving.</answer>", SPORTS, 1, "case and stop of the text mean nothing"),
    ("<answer>diving</answer>", SPORTS, 1, "an option's text alone"),
    ("<answer>“Diving”</answer>", SPORTS, 1, "an option's text in curly quotes"),
    ("<answer>B because it splashes</answer>", SPORTS, 1, "a letter with its reason"),
    ("<answer>B, not A</answer>", SPORTS, 1, "the other letter is denied"),
    ("<answer>A. dog</answer>", PETS, MISMATCH, "the letter of one option with the text of another"),
    ("<answer>A. dog, since it barks</answer>", PETS, MISMATCH, "… and a reason behind it"),
    ("<answer>b</answer>", SPORTS, NO_ANSWER, "a letter in lower case is not the asked form"),
    ("<answer>a</answer>", PETS, NO_ANSWER, "nor is the article"),
    ("<answer></answer>", SPORTS, EMPTY, "nothing between the tags"),
    ("<answer> \n </answer>", SPORTS, EMPTY, "white space between the tags"),
    ("<answer>...</answer>", SPORTS, NO_ANSWER, "marks are no answer"),
    ("<answer>B", SPORTS, NO_ANSWER, "the answer was cut off"),
    ("<answer>swimming</answer>", SPORTS, NO_ANSWER, "the text of no option"),
    ("<answer>E</answer>", SPORTS, OUT_OF_RANGE, "there are four options"),
    ("<answer>C</answer>", PETS, OUT_OF_RANGE, "there are two options"),
    ("<answer>H</answer>", ALL, 7, "there are eight options"),
    ("<answer>E</answer>", ALL[:5], 4, "there are five options"),
    ("<answer>I</answer>", ALL, OUT_OF_RANGE, "there are never nine"),
    # Two answers in one text.
    ("<answer>A</answer><answer>B</answer>", SPORTS, CONFLICTING, "two tags that differ"),
    ("<answer>B</answer><answer>B</answer>", SPORTS, 1, "two tags that agree"),
    ("<answer>B</answer><answer></answer>", SPORTS, CONFLICTING, "an answer and none"),
    ("<think>a</think><answer>A</answer><think>b</think><answer>B</answer>", SPORTS, CONFLICTING, "two whole blocks"),
    ("<think>a</think><answer>B</answer><think>b</think><answer>B</answer>", SPORTS, 1, "two blocks that agree"),
    ("<answer>A or B or C</answer>", SPORTS, CONFLICTING, "every letter at once"),
    ("<answer>A or B or C or D</answer>", SPORTS, CONFLICTING, "every letter at once"),
    ("<answer>A or b or c</answer>", SPORTS, CONFLICTING, "… in lower case"),
    ("<answer>A/B</answer>", SPORTS, CONFLICTING, "… with a slash"),
    ("<answer>A, B</answer>", SPORTS, CONFLICTING, "… with a comma"),
    ("<answer>A and (B)</answer>", SPORTS, CONFLICTING, "… with brackets"),
    ("<answer>A\nB</answer>", SPORTS, CONFLICTING, "… on two lines"),
    ("<answer>A B C D</answer>", SPORTS, CONFLICTING, "… with spaces"),
    ("<answer>A. rowing\nB. diving\nC. sailing</answer>", SPORTS, CONFLICTING, "the options written down again"),
    ("<answer>A. boat\nB. water</answer>", SPORTS, CONFLICTING, "… in other words"),
    ("<answer>A. rowing B. diving</answer>", SPORTS, CONFLICTING, "… on one line"),
    ("<answer>A rowing or B diving</answer>", SPORTS, CONFLICTING, "two letters with their texts"),
    ("<answer>B</answer> So the answer is C.", SPORTS, CONFLICTING, "a second answer outside of the tags"),
    ("The answer is B. <answer>B</answer>", SPORTS, 1, "the same answer outside of the tags"),
    ("<answer>A or A</answer>", SPORTS, NO_ANSWER, "one letter twice is not the asked form"),
    # Think sections.
    ("<think>It splashes", SPORTS, UNFINISHED, "cut off while thinking"),
    ("<think>It splashes. <answer>B</answer>", SPORTS, UNFINISHED, "an answer inside a section that never ends"),
    ("<think>a</think><think>b <answer>B</answer>", SPORTS, UNFINISHED, "a second section that never ends"),
    ("<think>The answer is B.</think>", SPORTS, EMPTY, "an answer in the thoughts only"),
    ("<think>It is <answer>A</answer>? No.</think><answer>B</answer>", SPORTS, 1, "thoughts are not the answer"),
    ("<think>I use <think> tags.</think><answer>B</answer>", SPORTS, 1, "a tag that is written about"),
    ("◁think▷Waves.◁/think▷<answer>B</answer>", SPORTS, 1, "Kimi-VL's tags with the student's answer"),
    # The vision teacher's form.
    ("◁think▷Waves.◁/think▷They jump.\n**Correct Answer:** (B) diving", SPORTS, 1, "Kimi-VL's form"),
    ("◁think▷A? No.◁/think▷**Correct Answer:** (B) diving", SPORTS, 1, "letters in the thoughts do not count"),
    ("**Correct Answer:** B", SPORTS, 1, "… without the text"),
    ("**Correct Answer: (B) diving**", SPORTS, 1, "… all in bold"),
    ("**Correct Answer:** **(B)** diving", SPORTS, 1, "… the letter in bold"),
    ("**Correct Answer:** diving", SPORTS, 1, "… the text alone"),
    ("**Correct Answer:** (B) rowing", SPORTS, MISMATCH, "… with another option's text"),
    ("**Correct Answer:** (A) or (B)", SPORTS, CONFLICTING, "… with two letters"),
    ("**Correct Answer:** (E) diving", SPORTS, OUT_OF_RANGE, "… with a letter past the last option"),
    ("**Correct Answer:** (B) diving\n\n**Correct Answer:** (C) sailing", SPORTS, CONFLICTING, "… twice"),
    ("The answer is not obvious.\n**Correct Answer:** (B) diving", SPORTS, 1, "an announcement of no answer"),
    ("◁think▷Waves", SPORTS, UNFINISHED, "… cut off while thinking"),
    ("Correct Answer: B. A rowing boat would be slower.", SPORTS, 1, "a sentence that starts with an article"),
    # The audio teacher's form.
    (
        "<THINK><SUMMARY>Answer: A.</SUMMARY></THINK><RESPONSE>A splash. **Answer: B.**</RESPONSE>",
        SPORTS,
        1,
        "Audio Flamingo's form",
    ),
    ("<THINK>x</THINK><RESPONSE>**Answer: B.**", SPORTS, 1, "… without its last tag"),
    ("<THINK>x</THINK><RESPONSE>A loud splash is heard.</RESPONSE>", SPORTS, NO_ANSWER, "A is an article here"),
    ("<THINK>x</THINK><RESPONSE></RESPONSE>", SPORTS, EMPTY, "an empty response"),
    # Free text.
    ("B", SPORTS, 1, "a letter"),
    ("B) diving", SPORTS, 1, "a letter with its text"),
    ("diving", SPORTS, 1, "a text"),
    ("The answer is B.", SPORTS, 1, "a sentence"),
    ("The correct option is (B).", SPORTS, 1, "another word for answer"),
    ("The answer should be option B", SPORTS, 1, "… with the word option"),
    ("ANSWER: B", SPORTS, 1, "… in capitals"),
    ("The answer isn't B.", SPORTS, NO_ANSWER, "a denial"),
    ("The answer is not B.", SPORTS, NO_ANSWER, "a denial"),
    ("The answer is either A or B.", SPORTS, NO_ANSWER, "no decision"),
    ("I think the answer is B, no, the answer is C.", SPORTS, CONFLICTING, "two announcements on one line"),
    ("A dog barks.", PETS, MISMATCH, "the article in front of the other option's text"),
    ("A loud noise is heard.", SPORTS, NO_ANSWER, "the article in front of something else"),
    ("I hear rain.", ALL, NO_ANSWER, "the pronoun is no letter past the last option"),
    ("The answer is a dog", PETS, NO_ANSWER, "an article and a text are not the text"),
    ("It could be rowing or diving.", SPORTS, NO_ANSWER, "prose that mentions options"),
    ("rowing, not diving", SPORTS, NO_ANSWER, "more than an option's text"),
    ("B. " + "word " * 60, SPORTS, NO_ANSWER, "a long text is not read as an answer"),
    ("", SPORTS, EMPTY, "nothing"),
    ("  \n", SPORTS, EMPTY, "white space"),
    # Options that look like letters.
    ("<answer>A minor</answer>", KEYS, 1, "an option that starts with another option's letter"),
    ("Answer: A minor", KEYS, 1, "… behind a label"),
    ("<answer>B. A minor</answer>", KEYS, 1, "… behind its own letter"),
    ("<answer>A. A minor</answer>", KEYS, MISMATCH, "… behind another letter"),
    ("<answer>A</answer>", KEYS, 0, "the letter alone is the letter"),
    ("<answer>A. C major</answer>", KEYS, 0, "a letter and its text, which starts with a letter"),
    ("<answer>A</answer>", GRADES, 0, "options are letters: the asked form is the option's own letter"),
    ("<answer>B. A</answer>", GRADES, 1, "… a letter and its text"),
    ("<answer>3</answer>", ["2", "3", "4"], 1, "options are numbers"),
    ("<answer>yes</answer>", ["Yes", "No"], 0, "two options"),
    ("<answer>B. dog and cat</answer>", ["dog", "dog and cat"], 1, "one option's text starts with another's"),
    ("<answer>A. dog</answer>", ["dog", "dog and cat"], 0, "… and the shorter one is meant"),
    ("<answer>x < y</answer>", ["x > y", "x < y"], 1, "an option with an angle bracket"),
    # Unicode.
    ("<answer>Ｂ</answer>", SPORTS, 1, "a full-width letter"),
    ("**Answer：（Ｂ）**", SPORTS, 1, "full-width punctuation"),
    ("<answer>\u200bB\ufeff</answer>", SPORTS, 1, "characters without width"),
    ("<answer>В</answer>", SPORTS, NO_ANSWER, "the Cyrillic letter is another one"),
    ("<answer>Größe</answer>", ["Farbe", "GRÖSSE"], 1, "case folding beyond ASCII"),
    ("<answer>cafe\u0301</answer>", ["caf\u00e9", "bar"], 0, "composed and decomposed accents"),
    ("<answer>鳥</answer>", ["犬", "鳥"], 1, "no Latin letters at all"),
    ("<answer>🐶</answer>", ["🐱", "🐶"], 1, "emoji"),
]


@pytest.mark.parametrize(("text", "options", "expected", "why"), TABLE)
def test_extract(text: str, options: list[str], expected: int | str, why: str) -> None:
    wanted = Answer(expected) if isinstance(expected, int) else Answer(None, expected)
    assert extract(text, options) == wanted, why


@pytest.mark.parametrize(
    ("text", "expected", "why"),
    [
        ("<think>It barks.</think><answer>B</answer>", True, "the form"),
        ("  <think>It\nbarks.</think>\n<answer> B </answer>\n", True, "white space around and between"),
        ("<think>It barks.</think><answer>H</answer>", True, "eight options have eight letters"),
        ("<answer>B</answer>", False, "no reasoning"),
        ("<think></think><answer>B</answer>", False, "an empty reasoning"),
        ("<think> \n</think><answer>B</answer>", False, "a blank reasoning"),
        ("<think>It barks.</think>", False, "no answer"),
        ("<think>It barks.</think><answer></answer>", False, "an empty answer"),
        ("<think>It barks.</think><answer>b</answer>", False, "a letter in lower case"),
        ("<think>It barks.</think><answer>I</answer>", False, "a letter past H"),
        ("<think>It barks.</think><answer>B. dog</answer>", False, "more than the letter"),
        ("<think>It barks.</think><answer>A or B</answer>", False, "two letters"),
        ("<think>It barks.</think><answer>B</answer> Done.", False, "text behind"),
        ("So: <think>It barks.</think><answer>B</answer>", False, "text in front"),
        ("<think>It barks.</think> So <answer>B</answer>", False, "text between"),
        ("<think>a</think><answer>B</answer><think>a</think><answer>B</answer>", False, "the block twice"),
        ("<think>a</think><answer>B</answer>\n<answer>B</answer>", False, "the answer twice, on another line"),
        ("<think>a<think>b</think></think><answer>B</answer>", False, "nested sections"),
        ("<think>It is <answer>B</answer></think><answer>B</answer>", False, "an answer inside the reasoning"),
        ("<think>a</think><THINK>b</THINK><answer>B</answer>", False, "a second section in capitals"),
        ("<answer>B</answer><think>a</think>", False, "the wrong order"),
        ("<think>It barks.<answer>B</answer>", False, "a section that never ends"),
        ("", False, "nothing"),
    ],
)
def test_well_formed(text: str, expected: bool, why: str) -> None:
    assert well_formed(text) is expected, why


@pytest.mark.parametrize(
    ("text", "reasoning", "rest", "closed"),
    [
        ("<think> a </think>b", "a", "b", True),
        ("a</think>b", "a", "b", True),
        ("b", "", "b", True),
        ("x<think>a</think>b", "a", "xb", True),
        ("<think>a", "a", "", False),
        ("<think>a</think>b<think>c", "a\nc", "b", False),
        ("<think>a</think>b<think>c</think>d", "a\nc", "bd", True),
        ("<think>a<think>b</think>c</think>d", "a<think>b", "cd", True),
        ("◁think▷a◁/think▷b", "a", "b", True),
    ],
)
def test_split_reasoning(text: str, reasoning: str, rest: str, closed: bool) -> None:
    assert split_reasoning(text) == (reasoning, rest, closed)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("  \n ", 0),
        ("It barks, loudly.", 3),
        ("<think>It barks.</think><answer>B</answer>", 3),
        ("◁think▷It barks.◁/think▷", 2),
        ("one<think>two", 2),
        ("3 < 4", 3),
    ],
)
def test_count_words(text: str, words: int) -> None:
    assert count_words(text) == words


@given(st.integers(2, 8), st.data())
def test_what_is_composed_is_well_formed_and_is_read_back(count: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, count - 1))
    reasoning = data.draw(st.text(st.characters(exclude_characters="<>◁▷", exclude_categories=["Cs"]), min_size=1))
    text = compose(reasoning, index)
    assert extract(text, ALL[:count]) == Answer(index)
    assert well_formed(text) is bool(reasoning.strip())


_PIECES = st.sampled_from(
    [
        *(*LETTERS, *"abx(),.}\n \u200b"),
        *("<think>", "</think>", "<answer>", "</answer>", "◁think▷", "◁/think▷", "<RESPONSE>", "\\boxed{"),
        *("Answer:", "the answer is", " or ", "not ", "rain", "wind"),
    ]
)


@given(st.lists(_PIECES, max_size=25).map("".join), st.integers(2, 8))
def test_any_text_has_an_answer_or_a_reason(text: str, count: int) -> None:
    answer = extract(text, ALL[:count])
    assert (answer.index is None) != (answer.reason is None)
    assert answer.index is None or 0 <= answer.index < count
    assert answer.letter is None or answer.letter in LETTERS[:count]


@pytest.mark.parametrize(
    "piece", ["<answer>", "<think>", "</think>", "<answer>A", "Answer: ", "the answer is A or ", "A ", "(", " ", "B. "]
)
def test_a_long_repetition_is_read_in_time(piece: str) -> None:
    text = piece * 20_000
    started = time.process_time()
    extract(text, SPORTS)
    well_formed(text)
    assert time.process_time() - started < 5
