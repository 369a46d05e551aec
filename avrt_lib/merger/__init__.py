"""Merges the two teachers' traces into one that reasons over sight and sound (paper, method 3 and 4).

Every training sample gets a row with its cell in the ledger of the two teachers; samples in the cell ``both`` (or, with
``merger.keep: all``, all that have two traces) get a merged reasoning too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avrt_lib import answers, prompts
from avrt_lib.config import Config
from avrt_lib.engine import factory, messages
from avrt_lib.engine.base import ChatRequest, Completion
from avrt_lib.engine.lazy import LazyEngine
from avrt_lib.engine.runner import derive_seed, run_chunks
from avrt_lib.errors import DataError
from avrt_lib.merger.checks import Sources, check, reasoning_of
from avrt_lib.records import CELLS, Merged, Sample, Trace
from avrt_lib.tables import TableWriter, read_rows
from avrt_lib.workspace import Workspace

Folders = Path | Sequence[Path]

_TRACE_COLUMNS = ["sample_id", "raw_text", "reasoning", "answer_index", "correct", "error"]
_SAMPLE_COLUMNS = ["id", "split", "question", "options", "answer_index"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A training sample with its two traces."""

    sample: Sample
    vision: Trace
    audio: Trace

    @property
    def cell(self) -> str:
        """Which teachers answered right: ``both``, ``audio_only``, ``vision_only`` or ``none``."""
        if self.vision.correct and self.audio.correct:
            return "both"
        if self.vision.correct or self.audio.correct:
            return "vision_only" if self.vision.correct else "audio_only"
        return "none"

    def kept(self, keep: str) -> bool:
        """Whether its traces are merged: right label known, two traces, and both right unless all are kept."""
        two = not self.vision.error and not self.audio.error
        return two and self.sample.answer_index is not None and (keep == "all" or self.cell == "both")


def run(
    config: Config,
    *,
    workspace: Workspace,
    samples: Path,
    vision_traces: Folders,
    audio_traces: Folders,
    merged: Path,
) -> dict[str, Any]:
    """Write one merged row for each training sample.

    Args:
        config: ``merger`` and ``seed`` are read.
        workspace: where progress is counted.
        samples: the samples table.
        vision_traces, audio_traces: the traces tables, one of each shard.
        merged: the merged table to write; chunks that it holds are kept.

    Returns:
        ``ledger`` (samples by cell) and ``merged`` (``rows`` merged, ``flags`` found by the check).

    Raises:
        DataError: where a training sample has no trace of a teacher.
        EngineError: where the model cannot be loaded or stops answering.
    """
    settings = config.merger
    engine = settings.engine
    version = prompts.template("merger", settings.prompt).version

    def make_request(pair: Pair, attempt: int) -> ChatRequest | None:
        sample = pair.sample
        if not pair.kept(settings.keep) or sample.answer_index is None:
            return None
        text = prompts.merger_prompt(
            settings.prompt,
            sample.question,
            sample.options,
            sample.answer_index,
            pair.vision.raw_text.strip(),
            pair.audio.raw_text.strip(),
        )
        asked = messages.chat(text, system=prompts.template("merger", settings.prompt).system)
        seed = derive_seed(config.seed, "merger", sample.id, attempt) if engine.temperature > 0 else None
        return ChatRequest(sample.id, asked, engine.max_tokens, engine.temperature, engine.top_p, seed)

    def make_row(pair: Pair, completion: Completion | None) -> Merged:
        return _merged(pair, completion, engine.model, version, settings.max_words)

    total = sum(1 for _ in read_rows(samples, Sample, columns=["id", "split"], split="train"))
    writer = TableWriter(merged, Merged, {"step": "merger", "model": engine.model, "prompt": version})
    with (
        LazyEngine(lambda: factory.build(engine), engine.model) as lazy,
        workspace.progress("merged traces", total) as progress,
    ):
        run_chunks(
            lazy,
            _pairs(samples, _by_sample(vision_traces), _by_sample(audio_traces)),
            make_request=make_request,
            make_row=make_row,
            writer=writer,
            chunk_rows=settings.chunk_rows,
            progress=progress,
        )
    writer.finish()
    return counts(merged)


def _by_sample(folders: Folders) -> dict[str, Trace]:
    tables = [folders] if isinstance(folders, Path) else folders
    return {row.sample_id: row for table in tables for row in read_rows(table, Trace, columns=_TRACE_COLUMNS)}


def _pairs(samples: Path, vision: dict[str, Trace], audio: dict[str, Trace]) -> Iterator[Pair]:
    for sample in read_rows(samples, Sample, columns=_SAMPLE_COLUMNS, split="train"):
        for teacher, traces in (("vision", vision), ("audio", audio)):
            if sample.id not in traces:
                raise DataError(
                    f"The training sample {sample.id!r} has no trace of the {teacher} teacher: "
                    "give the merger the traces of every shard of the same samples."
                )
        yield Pair(sample, vision[sample.id], audio[sample.id])


def _merged(pair: Pair, completion: Completion | None, model: str, version: str, max_words: int) -> Merged:
    if completion is None:
        return Merged(pair.sample.id, pair.cell, "", "", "", pair.sample.answer_index, 0, [], "", model, version)
    sample = pair.sample
    reasoning = reasoning_of(completion.text)
    sources = Sources(
        sample.question,
        sample.options,
        sample.answer_index,  # type: ignore[arg-type]  # only samples with a label are merged
        pair.vision.reasoning,
        pair.audio.reasoning,
    )
    return Merged(
        sample_id=sample.id,
        cell=pair.cell,
        reasoning=reasoning,
        vision_reasoning=pair.vision.reasoning,
        audio_reasoning=pair.audio.reasoning,
        answer_index=sample.answer_index,
        words=answers.count_words(reasoning),
        flags=check(completion.text, sources, max_words=max_words),
        raw_text=completion.text,
        model=model,
        prompt_version=version,
    )


def counts(merged: Path) -> dict[str, Any]:
    """``ledger`` (samples by cell) and ``merged`` (rows merged, and what the check found) of a merged table."""
    ledger = dict.fromkeys(CELLS, 0)
    flags: Counter[str] = Counter()
    rows = 0
    for row in read_rows(merged, Merged, columns=["cell", "flags", "reasoning", "raw_text"]):
        ledger[row.cell] += 1
        if row.raw_text or row.flags:
            rows += 1
            flags.update(row.flags)
    return {"ledger": ledger, "merged": {"rows": rows, "flags": dict(flags)}}
