"""Merged traces that were made elsewhere: published by another run, or one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avrt_lib import answers
from avrt_lib.config import Config
from avrt_lib.errors import DataError
from avrt_lib.merger import counts
from avrt_lib.records import LETTERS, Merged, Sample
from avrt_lib.store.folders import fetch_table
from avrt_lib.tables import MANIFEST, place_folder, read_rows, verify, write_table
from avrt_lib.workspace import Workspace

_OWN = "own@1"


def run(config: Config, *, workspace: Workspace, samples: Path, merged: Path, source: str) -> dict[str, Any]:
    """Bring merged traces into the run.

    Args:
        config: ``merger.max_words`` is read.
        workspace: the step's scratch.
        samples: the samples table; traces are of its training samples.
        merged: the merged table to write.
        source: ``s3://BUCKET/traces/SHA256`` (what a run published), a merged table's folder, or a ``.jsonl`` file
            with ``sample_id``, ``reasoning`` and ``answer`` (a letter) in each line.

    Returns:
        ``ledger`` and ``merged``, as the merger returns them.

    Raises:
        DataError: where the source is missing or damaged, or its traces are not about this run's training samples.
        StoreError: where the store does not have it.
    """
    known = {
        row.id: row
        for row in read_rows(samples, Sample, columns=["id", "split", "options", "answer_index"], split="train")
    }
    if source.startswith("s3://"):
        fetch_table(source, merged)
    elif Path(source).suffix == ".jsonl":
        write_table(merged, Merged, _own(Path(source), known, config.merger.max_words), {"step": "import_traces"})
    elif (Path(source) / MANIFEST).exists():
        verify(Path(source))
        place_folder(Path(source), merged)
    else:
        raise DataError(
            f"{source} holds no merged traces: name s3://BUCKET/traces/SHA256, the folder of a merged table, or a "
            ".jsonl file."
        )
    return _checked(merged, known, source)


def _own(path: Path, known: dict[str, Sample], max_words: int) -> Iterator[Merged]:
    """Rows of a file of one's own; what is wrong with a line is said with its number."""
    try:
        # Not splitlines(): a JSON text may hold characters that it takes for line breaks.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, reasoning, letter = str(row["sample_id"]), row["reasoning"], str(row["answer"]).strip()
            if not isinstance(reasoning, str):
                raise TypeError(f"reasoning is no text but {type(reasoning).__name__}")
            reasoning = reasoning.strip()
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}, line {number}: each line is a JSON object with sample_id, reasoning and answer ({error})."
            ) from error
        sample = known.get(name)
        if sample is None:
            raise DataError(f"{path}, line {number}: there is no training sample {name!r}.")
        if len(letter) != 1 or letter not in LETTERS[: len(sample.options)]:
            raise DataError(f"{path}, line {number}: the answer is one letter of the options, not {letter!r}.")
        index = LETTERS.index(letter)
        words = answers.count_words(reasoning)
        flags = [
            flag
            for flag, found in (
                ("empty", not reasoning),
                ("format", not answers.well_formed(answers.compose(reasoning, index))),
                ("wrong_answer", index != sample.answer_index),
                ("too_long", words > max_words),
            )
            if found
        ]
        cell = "both" if index == sample.answer_index else "none"
        raw = answers.compose(reasoning, index)
        yield Merged(name, cell, reasoning, "", "", index, words, flags, raw, "own", _OWN)


def _checked(merged: Path, known: dict[str, Sample], source: str) -> dict[str, Any]:
    for row in read_rows(merged, Merged, columns=["sample_id"]):
        if row.sample_id not in known:
            raise DataError(
                f"{source} has a trace of {row.sample_id!r}, which is no training sample of this run: name the data "
                "set and seed that the traces were made with."
            )
    return counts(merged)
