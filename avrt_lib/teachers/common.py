"""What both teachers' steps share: sharding, asking, reading the answer, counting."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from avrt_lib import answers, compat, prompts
from avrt_lib.config import Config, TeacherConfig
from avrt_lib.engine import factory
from avrt_lib.engine.base import ChatRequest, Completion
from avrt_lib.engine.lazy import LazyEngine
from avrt_lib.engine.messages import teacher_messages
from avrt_lib.engine.runner import derive_seed, run_chunks
from avrt_lib.errors import UsageError
from avrt_lib.records import Sample, Trace
from avrt_lib.tables import TableWriter, read_rows
from avrt_lib.workspace import MARKER, Workspace

Role = Literal["vision", "audio"]

#: What a row says where the sample lacks the teacher's modality.
MISSING: dict[Role, str] = {"vision": "no picture", "audio": "no audio"}

_SECTION = re.compile(r"<REASONING>(.*?)</REASONING>", re.DOTALL)
_ANY_TAG = re.compile(r"</?[A-Z]+>")


def readable_reasoning(text: str) -> str:
    """The reasoning of a teacher's text without tags.

    Of Audio Flamingo 3's planning, reasoning and summary sections the reasoning is taken where it is whole, and all of
    them, without their tags, where it is not.
    """
    reasoning, _, _ = answers.split_reasoning(text)
    section = _SECTION.search(reasoning)
    chosen = section[1] if section and section[1].strip() else _ANY_TAG.sub(" ", reasoning)
    return chosen.strip()


def in_shard(samples: Path, shard: int, shards: int) -> Iterator[Sample]:
    """Every ``shards``-th training sample, from number ``shard``: shards of equal size, whatever the data's order."""
    for number, sample in enumerate(read_rows(samples, Sample, split="train")):
        if number % shards == shard:
            yield sample


def run_teacher(
    role: Role, config: Config, workspace: Workspace, samples: Path, traces: Path, shard: int
) -> dict[str, Any]:
    """Write one trace for each training sample of a shard.

    Args:
        role: which teacher.
        config: ``teachers`` and ``seed`` are read, and ``data.frames`` as the number of pictures in a request.
        workspace: where progress is counted.
        samples: the samples table.
        traces: the traces table to write; chunks that it holds are kept.
        shard: which of ``config.teachers.shards``.

    Returns:
        ``rows``, ``valid`` (with a valid answer), ``correct``, ``errors`` by text and ``invalid_reasons`` by reason.

    Raises:
        UsageError: where there is no such shard.
        EngineError: where the model cannot be loaded or stops answering.
    """
    shards = config.teachers.shards
    if not 0 <= shard < shards:
        raise UsageError(f"There is no shard {shard}: teachers.shards is {shards}, so shards are 0 to {shards - 1}.")
    if MARKER in os.environ:  # a run on one machine, where shards share its cores; elsewhere each has a pod
        compat.share_cores(min(shards, config.teachers.parallelism))
    teacher: TeacherConfig = config.teachers.vision if role == "vision" else config.teachers.audio
    version = prompts.template(role, teacher.prompt).version
    engine = teacher.engine

    def make_request(sample: Sample, attempt: int) -> ChatRequest | None:
        messages = teacher_messages(role, teacher.prompt, sample)
        if messages is None:
            return None
        seed = derive_seed(config.seed, role, sample.id, attempt) if engine.temperature > 0 else None
        return ChatRequest(sample.id, messages, engine.max_tokens, engine.temperature, engine.top_p, seed)

    def accept(sample: Sample, completion: Completion) -> bool:
        return completion.error is None and answers.extract(completion.text, sample.options).index is not None

    def make_row(sample: Sample, completion: Completion | None) -> Trace:
        return _trace(role, engine.model, version, sample, completion)

    limits = {"image": config.data.frames, "video": 0} if role == "vision" else {"audio": 1}
    writer = TableWriter(traces, Trace, {"step": f"{role}_teacher", "model": engine.model, "prompt": version})
    total = sum(1 for _ in read_rows(samples, Sample, columns=["id", "split"], split="train"))
    with (
        LazyEngine(lambda: factory.build(engine, limits=limits), engine.model) as lazy,
        workspace.progress("traces", len(range(shard, total, shards))) as progress,
    ):
        run_chunks(
            lazy,
            in_shard(samples, shard, shards),
            make_request=make_request,
            make_row=make_row,
            writer=writer,
            chunk_rows=config.teachers.chunk_rows,
            progress=progress,
            accept=accept,
            attempts=teacher.attempts,
        )
    writer.finish()
    return _facts(traces)


def _trace(role: Role, model: str, version: str, sample: Sample, completion: Completion | None) -> Trace:
    error = MISSING[role] if completion is None else completion.error
    text = completion.text if completion else ""
    answer = answers.extract(text, sample.options) if error is None else answers.Answer(None, None)
    return Trace(
        sample_id=sample.id,
        teacher=role,
        model=model,
        prompt_version=version,
        raw_text=text,
        reasoning=readable_reasoning(text),
        answer_index=answer.index,
        invalid_reason=answer.reason,
        correct=None if sample.answer_index is None else answer.index == sample.answer_index,
        finish_reason=completion.finish_reason if completion else "",
        tokens_in=completion.tokens_in if completion else 0,
        tokens_out=completion.tokens_out if completion else 0,
        attempt=completion.attempts if completion else 0,
        error=error,
    )


def _facts(traces: Path) -> dict[str, Any]:
    rows = list(read_rows(traces, Trace, columns=["answer_index", "correct", "error", "invalid_reason"]))
    return {
        "rows": len(rows),
        "valid": sum(row.answer_index is not None for row in rows),
        "correct": sum(row.correct is True for row in rows),
        "errors": dict(Counter(row.error for row in rows if row.error)),
        "invalid_reasons": dict(Counter(row.invalid_reason for row in rows if row.invalid_reason)),
    }
