"""Prompt texts, by name and version. All wording is this project's own.

A template's version travels with every row it made. The student has one text for SFT, GRPO, evaluation and serving.
The ``plain`` templates are the same requests in as few words as possible, for models with a very small vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from avrt_lib.errors import ConfigError
from avrt_lib.records import LETTERS


@dataclass(frozen=True, slots=True)
class Template:
    """A named prompt text with ``str.format`` fields."""

    name: str
    text: str
    system: str | None = None

    @property
    def version(self) -> str:
        """Name and content hash: changes whenever the wording changes."""
        digest = hashlib.sha256(f"{self.system}\0{self.text}".encode()).hexdigest()
        return f"{self.name}@{digest[:8]}"


VISION_TEACHERS = {
    "kimi-vl": Template(
        "kimi-vl",
        "You are given frames taken at even distances from one short video, in order, and a multiple-choice question.\n"
        "Work only from what the frames show.\n"
        "1. Describe carefully what is visible across the frames: people, objects, places, text, and what changes.\n"
        "2. Reason about the question. Use the order of the frames, and say for each option what speaks for or against "
        "it. Where the question is direct, be brief.\n"
        "3. End with one line of the form **Correct Answer:** (LETTER) option text\n\n"
        "An example of the last step: for the options A. walking, B. rowing, C. sleeping, after frames that show two "
        "people in a boat who pull oars through the water, the line is\n**Correct Answer:** (B) rowing\n\n"
        "Question: {question}\nOptions:\n{options}",
    ),
    "plain": Template("plain", "{question}\n{options}"),
}

AUDIO_TEACHERS = {
    "audio-flamingo-3": Template(
        "audio-flamingo-3",
        "You hear the sound of one short clip and get a multiple-choice question. Work only from what you hear.\n"
        "First describe the sound in detail: voices and what they say, music, events, background, and their order. "
        "Then reason about the question and weigh each option against the sound; be brief where the question is "
        "direct. Then answer with the letter of one option.\n\n"
        "An example of the ending: for the options A. rain, B. a train, C. applause, after a steady rhythm of wheels "
        "on rails and a horn, it is **Answer: B.**\n\n"
        "Please think and reason about the input audio before you respond.\n\n"
        "Question: {question}\nOptions:\n{options}",
    ),
    "plain": Template("plain", "{question}\n{options}"),
}

MERGERS = {
    "labelled": Template(
        "labelled",
        "Two analysts looked at the same video clip. One only heard its sound, the other only saw its pictures. Write "
        "one line of reasoning about the question that uses what both found, as somebody would who saw and heard the "
        "clip.\n"
        "- Use plain sentences. Bring the evidence of sound and sight together and explain how they support "
        "each other.\n"
        "- Reason towards the answer. Never say or hint that an answer was known beforehand, and do not mention the "
        "analysts.\n"
        "- Be thorough, yet succinct.\n"
        "Write the reasoning between <think> and </think>, and then only the letter between <answer> and </answer>.\n\n"
        "Question: {question}\nOptions:\n{options}\nCorrect answer: {answer}\n\n"
        "Analysis of the sound:\n{audio}\n\nAnalysis of the pictures:\n{vision}",
    ),
    "label-blind": Template(
        "label-blind",
        "Two analysts looked at the same video clip. One only heard its sound, the other only saw its pictures. Write "
        "one line of reasoning about the question that uses what both found, as somebody would who saw and heard the "
        "clip, in plain sentences that bring the evidence of sound and sight together, and choose the option that it "
        "supports. Do not mention the analysts. Be thorough, yet succinct.\n"
        "Write the reasoning between <think> and </think>, and then only the letter between <answer> and </answer>.\n\n"
        "Question: {question}\nOptions:\n{options}\n\n"
        "Analysis of the sound:\n{audio}\n\nAnalysis of the pictures:\n{vision}",
    ),
    "plain": Template(
        "plain", "Merge.\n{question}\n{options}\nCorrect answer: {answer}\nVision: {vision}\nAudio: {audio}"
    ),
}

STUDENTS = {
    "reason": Template(
        "reason",
        "{question}\nOptions:\n{options}\n"
        "Watch and listen, then reason about the question between <think> and </think>, weighing what you see and what "
        "you hear. Then give only the letter of the right option between <answer> and </answer>.",
    ),
    "plain": Template("plain", "{question}\n{options}"),
}

_FAMILIES = {"vision": VISION_TEACHERS, "audio": AUDIO_TEACHERS, "merger": MERGERS, "student": STUDENTS}


def template(family: str, name: str) -> Template:
    """The template of a family (``vision``, ``audio``, ``merger``, ``student``).

    Raises:
        ConfigError: where the family has no such template; the message lists those it has.
    """
    known = _FAMILIES[family]
    if name not in known:
        raise ConfigError(f"There is no {family} prompt named {name!r}; known: {', '.join(sorted(known))}.")
    return known[name]


def instruction(name: str) -> str:
    """What a student's prompt says behind the question and its options; empty where it says nothing there."""
    return template("student", name).text.rpartition("{options}")[2].strip()


def lettered(options: Sequence[str]) -> str:
    """The options, one a line, each behind its letter."""
    return "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))


def question_prompt(family: str, name: str, question: str, options: Sequence[str]) -> str:
    """The text of a teacher's or the student's request."""
    return template(family, name).text.format(question=question, options=lettered(options))


def merger_prompt(name: str, question: str, options: Sequence[str], answer_index: int, vision: str, audio: str) -> str:
    """The text of the merger's request; the label-blind template leaves the answer out."""
    return template("merger", name).text.format(
        question=question, options=lettered(options), answer=LETTERS[answer_index], vision=vision, audio=audio
    )
