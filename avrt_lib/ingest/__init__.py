"""Ingest: from a data set's files to the sample table that every later step reads."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from avrt_lib.config import Config
from avrt_lib.errors import DataError
from avrt_lib.ingest.fingerprint import fingerprint
from avrt_lib.ingest.media import Budget
from avrt_lib.ingest.pool import DecoderPool
from avrt_lib.ingest.readers import read
from avrt_lib.ingest.splits import Job, Plan, plan
from avrt_lib.records import SPLITS, Dropped, Sample
from avrt_lib.tables import TableWriter, read_rows
from avrt_lib.workspace import Workspace

__all__ = ["CHUNK_ROWS", "DROPPED", "fingerprint", "run"]

log = logging.getLogger("avrt.ingest")

#: Rows that are committed together; a killed step loses one chunk at most.
CHUNK_ROWS = 200
#: Name of the table of dropped rows below the sample table.
DROPPED = "dropped"


def run(config: Config, *, workspace: Workspace, samples: Path, data_hash: str = "") -> dict[str, Any]:
    """Read the configured data sets, decode their media, and write the sample table.

    Args:
        config: the run's configuration; its ``data`` section and ``seed`` count.
        workspace: the step's scratch and progress.
        samples: gets the table of samples, and below it the table ``dropped`` of the rows that did not become one.
        data_hash: what ``fingerprint`` gave for the sources; recorded with the table.

    Returns:
        ``samples`` (how many), ``splits`` (samples by split), ``by_kind`` (samples by question type), ``dropped``,
        ``dropped_reasons`` (rows by reason), ``media_kinds``, ``clips`` and ``rows`` (read; samples and dropped rows
        add up to it).

    Raises:
        ConfigError: unknown format.
        DataError: missing or damaged sources, a clip in two splits, a split without a sample, or too few clips to
            split where every sample is to be trained on. Where the filter decides, so few clips stand in all splits,
            and the gate before training refuses them.
    """
    data = config.data
    sources: dict[str, Any] = {split: getattr(data, split) for split in (*SPLITS, "all")}
    made = plan(config, lambda split: read(sources[split], split, workspace))
    made_by = {"step": "ingest", "data_hash": data_hash, "config": config.sha256}
    writer = TableWriter(samples, Sample, made_by)
    dropped = TableWriter(samples / DROPPED, Dropped, made_by)
    for split, rejected in made.dropped.items():
        dropped.commit(f"{split}-rejected", rejected)
    total = sum(map(len, made.jobs.values()))
    with workspace.progress("questions", total) as bar, DecoderPool(Budget.of(data), data.workers) as pool:
        for key, jobs in _chunks(made):
            if writer.has(key):
                bar.advance(len(jobs))
                continue
            good: list[Sample] = []
            bad: list[Dropped] = []
            for result in pool.map(jobs):
                if isinstance(result, Sample):
                    good.append(result)
                else:
                    bad.append(result)
                bar.advance()
            # The samples come last: their part marks the chunk as done.
            dropped.commit(key, bad)
            writer.commit(key, good)
    dropped.finish()
    writer.finish()
    facts = _facts(samples, made)
    _check(samples, facts, made)
    log.info("%(samples)d samples about %(clips)d clips, %(dropped)d rows dropped", facts)
    return facts


def _chunks(made: Plan) -> Iterator[tuple[str, Sequence[Job]]]:
    for split in SPLITS:
        jobs = made.jobs[split]
        for start in range(0, len(jobs), CHUNK_ROWS):
            yield f"{split}-{start // CHUNK_ROWS:05d}", jobs[start : start + CHUNK_ROWS]


def _facts(samples: Path, made: Plan) -> dict[str, Any]:
    """Counts over the whole table, chunks of an earlier attempt included."""
    splits: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
    kinds: Counter[str] = Counter()
    media: Counter[str] = Counter()
    clips: set[str] = set()
    for row in read_rows(samples, Sample, columns=["split", "question_type", "media_kind", "group"]):
        splits[row.split] += 1
        kinds[row.question_type] += 1
        media[row.media_kind] += 1
        clips.add(row.group)
    reasons = Counter(row.reason.partition(": ")[0] for row in read_rows(samples / DROPPED, Dropped))
    return {
        "samples": splits.total(),
        "splits": dict(splits),
        "by_kind": dict(sorted(kinds.items())),
        "media_kinds": dict(sorted(media.items())),
        "clips": len(clips),
        "dropped": reasons.total(),
        "dropped_reasons": dict(sorted(reasons.items())),
        "rows": made.rows,
        "overlapping": made.overlapping,
    }


def _check(samples: Path, facts: dict[str, Any], made: Plan) -> None:
    """What must hold of a sample table before anything is made from it."""
    if facts["samples"] + facts["dropped"] != facts["rows"]:
        raise DataError(
            f"{samples} holds {facts['samples']} samples and {facts['dropped']} dropped rows of {facts['rows']} rows: "
            "the data set was changed while it was read; start a new run."
        )
    for split, count in facts["splits"].items():
        if not count:
            first = next((row for row in read_rows(samples / DROPPED, Dropped) if row.split in (split, "all")), None)
            why = f"; the first dropped row, {first.where}: {first.reason}" if first else ""
            raise DataError(f"No sample is left in the {split} split{why}")
    if facts["dropped"]:
        log.warning("%d of %d rows were dropped: %s", facts["dropped"], facts["rows"], facts["dropped_reasons"])
    if not made.overlapping:
        _no_clip_twice(samples)


def _no_clip_twice(samples: Path) -> None:
    """The same media bytes under two names are one clip."""
    owner: dict[str, Sample] = {}
    for row in read_rows(samples, Sample, columns=["id", "split", "group", "media_sha256"]):
        first = owner.setdefault(row.media_sha256, row)
        if first.split != row.split:
            raise DataError(
                f"The clips {first.group!r} ({first.split}) and {row.group!r} ({row.split}) are the same file, so a "
                "clip stands in two splits: remove one (or pass --overlap-splits, for a check of the path only)."
            )
