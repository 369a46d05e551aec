"""Decoding in several processes: in order, and with no file able to end the step or to outlive it."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Self

from avrt_lib.errors import MediaError
from avrt_lib.ingest.media import Budget, Media, load
from avrt_lib.ingest.readers.base import MEDIA_INVALID
from avrt_lib.ingest.splits import Job
from avrt_lib.records import Dropped, Sample
from avrt_lib.worker_processes import prepare_worker

log = logging.getLogger("avrt.ingest")

_BATCH = 8


@functools.lru_cache(maxsize=4)
def _load(budget: Budget, video: Path | None, audio: Path | None, image: Path | None) -> Media | MediaError:
    # A clip that cannot be decoded may have taken minutes to say so: that is remembered too.
    try:
        return load(budget, video=video, audio=audio, image=image)
    except MediaError as error:
        return error


def to_sample(budget: Budget, job: Job) -> Sample | Dropped:
    """Decode one question's media; a file that cannot be decoded makes it a dropped row."""
    row = job.row
    # The questions about a clip mostly stand together, so that a few decoded clips are worth remembering.
    media = _load(budget, row.video, row.audio, row.image)
    if isinstance(media, MediaError):
        return Dropped(row.id, job.source, job.split, row.where, f"{MEDIA_INVALID}: {media}")
    return Sample(
        id=row.id,
        source=job.source,
        split=job.split,
        question=row.question,
        options=row.options,
        answer_index=row.answer_index,
        question_type=row.question_type,
        needs=row.needs,
        media_kind=media.kind,
        frames=media.frames,
        frame_times_s=media.frame_times_s,
        audio=media.audio,
        duration_s=media.duration_s,
        width=media.width,
        height=media.height,
        fps=media.fps,
        media_sha256=media.sha256,
        group=row.group,
        extra=json.dumps(dict(row.extra), sort_keys=True, default=str),
    )


class DecoderPool:
    """Worker processes that turn jobs into samples.

    Args:
        budget: how much of each clip is kept.
        workers: processes; with one, the work is done in this process.
        decode: what a worker does with a job.
    """

    def __init__(
        self, budget: Budget, workers: int, decode: Callable[[Budget, Job], Sample | Dropped] = to_sample
    ) -> None:
        self._decode = functools.partial(decode, budget)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def map(self, jobs: Sequence[Job]) -> Iterator[Sample | Dropped]:
        """The result of each job, in order.

        FFmpeg is C code that reads files from anywhere: a file that takes its process down costs its own row only.
        """
        if self._workers == 1:
            yield from map(self._decode, jobs)
            return
        done = 0
        try:
            batch = max(1, min(_BATCH, len(jobs) // (2 * self._workers)))
            for result in self._started(self._workers).map(self._decode, jobs, chunksize=batch):
                done += 1
                yield result
        except BrokenProcessPool:
            log.warning("a decoder process ended unexpectedly; its rows are decoded one by one")
            self._stop()
            for job in jobs[done:]:
                yield self._alone(job)

    def _alone(self, job: Job) -> Sample | Dropped:
        try:
            return self._started(1).submit(self._decode, job).result()
        except BrokenProcessPool:
            self._stop()
            row = job.row
            file = row.video or row.image or row.audio
            reason = f"{MEDIA_INVALID}: {file} ended the process that decoded it: it is damaged; fetch it again"
            return Dropped(row.id, job.source, job.split, row.where, reason)

    def _started(self, workers: int) -> ProcessPoolExecutor:
        if self._pool is None:
            # Spawned, not forked: the caller may have threads, and a fork would copy their locks.
            self._pool = ProcessPoolExecutor(
                workers, mp_context=multiprocessing.get_context("spawn"), initializer=prepare_worker
            )
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
