"""Which question stands in which split, so that no clip stands in two."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from avrt_lib.config import Config, DataConfig
from avrt_lib.errors import DataError
from avrt_lib.ingest.readers import Parsed, Rejection, SourceRow
from avrt_lib.records import SPLITS, Dropped

log = logging.getLogger("avrt.ingest")

_MEND = "keep the questions about a clip in one split (or pass --overlap-splits, for a check of the path only)"


@dataclass(frozen=True, slots=True)
class Job:
    """A question whose media are to be decoded, with its place in the data set."""

    row: SourceRow
    source: str
    split: str


@dataclass(frozen=True)
class Plan:
    """What is decoded for each split, in the order of its source, and what was rejected before decoding.

    ``overlapping`` says that clips may stand in several splits.
    """

    jobs: dict[str, list[Job]]
    dropped: dict[str, list[Dropped]]
    overlapping: bool = False

    @property
    def rows(self) -> int:
        """How many rows were read; each of them ends as a sample or as a dropped row."""
        return sum(map(len, self.jobs.values())) + sum(map(len, self.dropped.values()))


def plan(config: Config, read: Callable[[str], list[Parsed]]) -> Plan:
    """Read the sources and give each question its split.

    Args:
        config: the run's configuration.
        read: gives the rows of ``train``, ``validation`` and ``test``, or of ``all``.

    Raises:
        DataError: too few clips to split, a clip in two splits, or a split without questions.
    """
    data = config.data
    if data.all is not None:
        rows = {"all": read("all")}
        _require_questions(rows)
        made = _by_clip(rows["all"], config)
    else:
        rows = {split: read(split) for split in SPLITS}
        _require_questions(rows)
        made = _given_apart(rows, data)
    return _with_unique_ids(made)


def _plan(parts: Mapping[str, Sequence[Parsed]], formats: Mapping[str, str]) -> Plan:
    jobs: dict[str, list[Job]] = {split: [] for split in SPLITS}
    dropped: dict[str, list[Dropped]] = {}
    for split, rows in parts.items():
        for row in rows:
            if isinstance(row, Rejection):
                dropped.setdefault(split, []).append(Dropped(row.id, formats[split], split, row.where, row.reason))
            else:
                jobs[split].append(Job(row, formats[split], split))
    return Plan(jobs, dropped)


def _require_questions(parts: Mapping[str, Sequence[Parsed]]) -> None:
    for split, rows in parts.items():
        if any(isinstance(row, SourceRow) for row in rows):
            continue
        first = next((row for row in rows if isinstance(row, Rejection)), None)
        if first is None:
            raise DataError(f"data.{split} holds no rows: check its path.")
        raise DataError(
            f"None of the {len(rows)} rows of data.{split} can be used; the first, {first.where}: {first.reason}."
        )


def _given_apart(rows: Mapping[str, list[Parsed]], data: DataConfig) -> Plan:
    formats = {split: getattr(data, split).format for split in SPLITS}
    made = _plan(rows, formats)
    if data.overlap_splits:
        log.warning("overlap_splits: clips may stand in several splits, so accuracies on the test split mean nothing")
        return replace(made, overlapping=True)
    owner: dict[str, Job] = {}
    repeated: set[str] = set()
    for job in _all_jobs(made):
        first = owner.setdefault(job.row.group, job)
        if first.split == job.split:
            continue
        if first.row.named_group or job.row.named_group or _files(first.row) == _files(job.row):
            raise DataError(
                f"The clip {job.row.group!r} stands in two splits, {first.split} ({first.row.where}) and {job.split} "
                f"({job.row.where}): {_MEND}."
            )
        # Path-named clips of different folders: the same name, but other files.
        repeated.add(job.row.group)
    if repeated:
        jobs = {split: [_regrouped(job, repeated) for job in jobs] for split, jobs in made.jobs.items()}
        return Plan(jobs, made.dropped)
    return made


def _regrouped(job: Job, repeated: set[str]) -> Job:
    if job.row.group not in repeated:
        return job
    return replace(job, row=replace(job.row, group=f"{job.split}/{job.row.group}"))


def _files(row: SourceRow) -> tuple[object, ...]:
    return (row.video, row.audio, row.image)


def _overlapping(rows: list[Parsed], form: str) -> Plan:
    return replace(_plan(dict.fromkeys(SPLITS, rows), dict.fromkeys(SPLITS, form)), overlapping=True)


def _by_clip(rows: list[Parsed], config: Config) -> Plan:
    data = config.data
    assert data.all is not None
    if data.overlap_splits:
        log.warning(
            "overlap_splits: every one of the %d questions stands in train, validation and test, so accuracies mean "
            "nothing; this checks the path only",
            len(rows),
        )
        return _overlapping(rows, data.all.format)
    clips = sorted({row.group for row in rows if isinstance(row, SourceRow)})
    if len(clips) < data.minimum_clips:
        if config.merger.keep == "all":
            raise DataError(
                f"Splitting by clip needs at least {data.minimum_clips} clips (data.minimum_clips), and "
                f"{data.all.path or data.all.format} has {len(clips)}: add clips, or pass "
                "--overlap-splits to let every clip stand in all splits (a check of the path only)."
            )
        # The teachers can still be asked about these clips, and the base be evaluated on them; the gate before training
        # lets nothing learn from them.
        log.warning(
            "%d clips are too few to split (data.minimum_clips %d): every clip stands in all splits, to see what the "
            "teachers and the base make of them; no model will be trained on them",
            len(clips),
            data.minimum_clips,
        )
        return _overlapping(rows, data.all.format)
    split_of = assign(clips, config.seed, data.validation_share, data.test_share)
    parts: dict[str, list[Parsed]] = {split: [] for split in (*SPLITS, "all")}
    for row in rows:
        parts[split_of[row.group] if isinstance(row, SourceRow) else "all"].append(row)
    return _plan(parts, dict.fromkeys(parts, data.all.format))


def assign(clips: Sequence[str], seed: int, validation_share: float, test_share: float) -> dict[str, str]:
    """The split of each clip, from a hash of its name and the seed: the order of the clips does not matter.

    Validation and test get their shares of the clips, rounded, and at least one clip each.
    """
    shuffled = sorted(clips, key=lambda clip: hashlib.sha256(f"{seed}\0{clip}".encode()).digest())
    test = max(1, round(len(clips) * test_share))
    validation = max(1, round(len(clips) * validation_share))
    names = ["test"] * test + ["validation"] * validation
    names += ["train"] * (len(clips) - len(names))
    return dict(zip(shuffled, names, strict=False))


def _with_unique_ids(made: Plan) -> Plan:
    """Where an id stands in several splits, every id gets its split's name behind it."""
    splits_of: dict[str, set[str]] = {}
    for job in _all_jobs(made):
        splits_of.setdefault(job.row.id, set()).add(job.split)
    if all(len(splits) == 1 for splits in splits_of.values()):
        return made
    jobs = {
        split: [replace(job, row=replace(job.row, id=f"{job.row.id}-{split}")) for job in jobs]
        for split, jobs in made.jobs.items()
    }
    dropped = {s: [replace(row, id=f"{row.id}-{s}") for row in rows] for s, rows in made.dropped.items()}
    return replace(made, jobs=jobs, dropped=dropped)


def _all_jobs(made: Plan) -> list[Job]:
    return [job for split in SPLITS for job in made.jobs[split]]
