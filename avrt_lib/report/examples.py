"""A handful of examples for the report: what was asked, seen and heard, and what each model wrote."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from avrt_lib.records import LETTERS, Merged, Prediction, R, Sample, Trace
from avrt_lib.tables import MANIFEST, read_json, read_rows

MODELS = {"base": "Base", "sft": "SFT", "grpo": "GRPO"}
#: A longer sound track would make the report too heavy to send around.
MAX_AUDIO_BYTES = 1_000_000
MAX_FRAMES = 8
_TEST_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Written:
    """What one model wrote about one question; ``correct`` is None where nobody can tell."""

    who: str
    css: str
    text: str
    letter: str | None
    correct: bool | None


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its media as data URLs, and what was written about it."""

    title: str
    question: str
    options: list[tuple[str, str, bool]]
    kind: str
    frames: list[str]
    frame_times_s: list[float]
    audio: str | None
    written: list[Written] = field(default_factory=list)


def newest_table(work: Path, instance: str, output: str) -> Path | None:
    """The newest complete table of a step instance in a run's scratch, or None."""
    found = list((work / "scratch" / instance).glob(f"*/{output}/{MANIFEST}"))
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def collect(work: Path) -> list[Example]:
    """Examples out of a run's tables: one or two of training, up to three of the test.

    Args:
        work: the run's work folder; tables that are not there give no examples.
    """
    samples = newest_table(work, "ingest", "samples")
    if samples is None:
        return []
    index = {s.id: s for s in read_rows(samples, Sample, columns=["id", "split", "needs", "answer_index"])}
    train = _training(work, index)
    test = _test(work, index)
    media = _read_ids(samples, {sample_id for sample_id, _, _ in [*train, *test]})
    return [_example(media[i], title, written) for i, title, written in [*train, *test] if i in media]


def _rows(table: Path | None, kind: type[R]) -> Iterable[R]:
    return read_rows(table, kind) if table is not None else ()


def _training(work: Path, index: Mapping[str, Sample]) -> list[tuple[str, str, list[Written]]]:
    merged = {row.sample_id: row for row in _rows(newest_table(work, "merger", "merged"), Merged)}
    both = [m for m in merged.values() if m.reasoning and not m.flags and m.sample_id in index]
    both.sort(key=lambda m: (index[m.sample_id].needs != "both", m.sample_id))
    split = [
        m
        for m in merged.values()
        if m.cell in ("audio_only", "vision_only") and not m.reasoning and m.sample_id in index
    ]
    split.sort(key=lambda m: m.sample_id)
    chosen = [(m, "Training: both teachers right, merged") for m in both[:1]]
    chosen += [(m, "Training: the teachers disagree, so the filter leaves it out") for m in split[:1]]
    traces = _traces(work, {m.sample_id for m, _ in chosen})
    examples = []
    for row, title in chosen:
        written = [traces[key] for key in ((row.sample_id, "vision"), (row.sample_id, "audio")) if key in traces]
        if row.reasoning:
            letter = None if row.answer_index is None else LETTERS[row.answer_index]
            correct = None if row.answer_index is None else row.answer_index == index[row.sample_id].answer_index
            written.append(Written("Merged", "merged", row.raw_text or row.reasoning, letter, correct))
        examples.append((row.sample_id, title, written))
    return examples


def _traces(work: Path, wanted: set[str]) -> dict[tuple[str, str], Written]:
    found = {}
    for teacher in ("vision", "audio"):
        for folder in sorted((work / "scratch").glob(f"{teacher}_teacher-*")):
            for row in _rows(newest_table(work, folder.name, "traces"), Trace):
                if row.sample_id in wanted:
                    letter = None if row.answer_index is None else LETTERS[row.answer_index]
                    who = f"{teacher.capitalize()} teacher"
                    found[row.sample_id, teacher] = Written(who, teacher, row.raw_text, letter, row.correct)
    return found


def _test(work: Path, index: Mapping[str, Sample]) -> list[tuple[str, str, list[Written]]]:
    answers: dict[str, dict[str, Prediction]] = {}
    for model in MODELS:
        for row in _rows(newest_table(work, f"evaluation-{model}", "predictions"), Prediction):
            if row.split == "test" and row.condition == "av" and row.sample_id in index:
                answers.setdefault(row.sample_id, {})[model] = row
    gained, kept, missed = "Test: the base fails, training succeeds", "Test: all right", "Test: still wrong"
    by_title: dict[str, list[str]] = {gained: [], kept: [], missed: []}
    for sample_id in sorted(answers):
        rights = [bool(answers[sample_id][model].correct_strict) for model in MODELS if model in answers[sample_id]]
        title = kept if all(rights) else missed if not rights[-1] else gained if not rights[0] else None
        if title is not None:
            by_title[title].append(sample_id)
    for ids in by_title.values():
        ids.sort(key=lambda sample_id: (index[sample_id].needs != "both", sample_id))
    chosen = [(title, ids[0]) for title, ids in by_title.items() if ids]
    chosen += [(title, sample_id) for title, ids in by_title.items() for sample_id in ids[1:]]
    return [
        (sample_id, title, [_answer(model, row) for model, row in answers[sample_id].items()])
        for title, sample_id in chosen[:_TEST_EXAMPLES]
    ]


def _answer(model: str, row: Prediction) -> Written:
    letter = None if row.answer_index is None else LETTERS[row.answer_index]
    return Written(MODELS[model], model, row.raw_text, letter, row.correct_strict)


def _read_ids(table: Path, wanted: set[str]) -> dict[str, Sample]:
    """Whole samples by id; parts and row groups without one of them are not read."""
    found: dict[str, Sample] = {}
    for name in read_json(table / MANIFEST)["files"] if wanted else ():
        for row in pq.read_table(table / name, filters=[("id", "in", sorted(wanted))]).to_pylist():
            found[row["id"]] = Sample(**row)
    return found


def _example(sample: Sample, title: str, written: list[Written]) -> Example:
    audio = sample.audio if sample.audio is not None and len(sample.audio) <= MAX_AUDIO_BYTES else None
    return Example(
        title=title,
        question=sample.question,
        options=[(LETTERS[i], option, i == sample.answer_index) for i, option in enumerate(sample.options)],
        kind=sample.question_type,
        frames=[_data_url(frame, "image/jpeg") for frame in sample.frames[:MAX_FRAMES]],
        frame_times_s=list(sample.frame_times_s[:MAX_FRAMES]),
        audio=_data_url(audio, "audio/flac") if audio else None,
        written=written,
    )


def _data_url(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
