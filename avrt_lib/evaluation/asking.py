"""Asks one model all questions of an evaluation, or one share of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING

from avrt_lib import answers
from avrt_lib.config import Config, EngineConfig, from_json
from avrt_lib.engine import factory, student_media
from avrt_lib.engine.base import ChatRequest, Completion, Engine
from avrt_lib.engine.lazy import LazyEngine
from avrt_lib.engine.messages import student_messages
from avrt_lib.engine.runner import run_chunks
from avrt_lib.errors import EngineError, NothingAnsweredError
from avrt_lib.evaluation.official import is_correct
from avrt_lib.records import Prediction, Sample
from avrt_lib.tables import TableWriter, read_rows
from avrt_lib.worker_processes import end_with_parent
from avrt_lib.workspace import Progress

if TYPE_CHECKING:
    from avrt_lib.engine.vllm_engine import VllmEngine

#: How a process ends that has left chunks, as no request of a condition was answered in its share.
CHUNKS_LEFT = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """One sample in one condition."""

    sample: Sample
    condition: str


def conditions_of(config: Config, split: str, *, picture: bool, sound: bool) -> list[str]:
    """The conditions in which a sample is asked: those that leave it a modality; validation only with all of them."""
    by_split: dict[str, list[str]] = {"validation": ["av"], "test": list(config.evaluation.conditions)}
    possible = {"av": True, "audio_only": sound, "vision_only": picture}
    return [condition for condition in by_split.get(split, []) if possible[condition]]


def questions(config: Config, samples: Path) -> Iterator[Asked]:
    """All that is asked, a sample's conditions side by side, so that its media are processed once."""
    for sample in read_rows(samples, Sample):
        picture, sound = bool(sample.frames), sample.audio is not None
        for condition in conditions_of(config, sample.split, picture=picture, sound=sound):
            yield Asked(sample, condition)


def build_engine(config: Config, model: Path, name: str) -> VllmEngine:
    """vLLM with a student checkpoint, as it is evaluated and served.

    Raises:
        EngineError: where it cannot be loaded.
    """
    student = config.student
    engine = EngineConfig(
        model=str(model),
        revision=student.revision,
        dtype=student.dtype,
        max_model_len=student.max_model_len,
        kv_cache_gib=student.kv_cache_gib,
        max_tokens=config.evaluation.max_tokens,
        trust_remote_code=student.trust_remote_code,
    )
    return factory.build(  # type: ignore[return-value]  # kind "vllm" builds this one
        engine,
        limits=student_media.limits(),
        mm_kwargs=student_media.processor_kwargs(student),
        media_io_kwargs=student_media.media_io_kwargs(config.data.frames),
        name=name,
    )


def ask(
    config: Config,
    samples: Path,
    writer: TableWriter[Prediction],
    progress: Progress,
    engine: Engine,
    share: int | None,
) -> None:
    """Write the predictions of one share of the chunks (number ``share`` of ``evaluation.processes``); None: of all.

    Raises:
        EngineError: where the engine fails.
        NothingAnsweredError: where it refuses all of a condition, which would count as wrong answers.
    """

    def make_request(item: Asked, attempt: int) -> ChatRequest | None:
        messages = student_messages(config.student.prompt, item.sample, item.condition)
        if messages is None:
            return None
        return ChatRequest(f"{item.sample.id} {item.condition}", messages, config.evaluation.max_tokens)

    run_chunks(
        engine,
        questions(config, samples),
        make_request=make_request,
        make_row=lambda item, completion: prediction(item, completion, engine.model),
        writer=writer,
        chunk_rows=config.evaluation.chunk_rows,
        progress=progress,
        mine=None if share is None else lambda number: number % config.evaluation.processes == share,
        kind=lambda item: f"condition {item.condition}",
    )


def prediction(item: Asked, completion: Completion | None, name: str) -> Prediction:
    """The row of one answer."""
    sample = item.sample
    text = completion.text if completion else ""
    answer = answers.extract(text, sample.options)
    return Prediction(
        sample_id=sample.id,
        split=sample.split,
        group=sample.group,
        question_type=sample.question_type,
        model=name,
        condition=item.condition,
        raw_text=text,
        answer_index=answer.index,
        invalid_reason=answer.reason,
        correct_strict=None if sample.answer_index is None else answer.index == sample.answer_index,
        correct_official=is_correct(answer.index, sample.answer_index, sample.options),
        words=answers.count_words(answers.split_reasoning(text)[0]),
        tokens_in=completion.tokens_in if completion else 0,
        tokens_out=completion.tokens_out if completion else 0,
        latency_s=completion.latency_s if completion else 0.0,
        error=completion.error if completion else "no picture and no sound",
    )


def ask_in_child(
    config: str, samples: Path, model: Path, predictions: Path, name: str, share: int, failures: Queue[str]
) -> None:
    """``ask`` in a spawned process; what fails is told through ``failures``."""
    end_with_parent()
    settings = from_json(config)
    try:
        with LazyEngine(lambda: build_engine(settings, model, name), name) as engine:
            ask(settings, samples, TableWriter(predictions, Prediction), Progress(None, "answers", None), engine, share)
    except NothingAnsweredError:
        sys.exit(CHUNKS_LEFT)
    except EngineError as error:
        failures.put(str(error))
        raise
