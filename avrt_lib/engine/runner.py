"""Asks an engine about many items, chunk by chunk, so that a killed step loses one chunk at most."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Generic, TypeVar

from avrt_lib.engine.base import ChatRequest, Completion, Engine
from avrt_lib.errors import NothingAnsweredError
from avrt_lib.records import R
from avrt_lib.tables import TableWriter
from avrt_lib.workspace import Progress

log = logging.getLogger("avrt")

T = TypeVar("T")


def derive_seed(*parts: object) -> int:
    """A sampling seed (31 bits) that depends on nothing but ``parts``: the run's seed, a role, a sample, an attempt."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of ``size``; only one list is held at a time."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def run_chunks(
    engine: Engine,
    items: Iterable[T],
    *,
    make_request: Callable[[T, int], ChatRequest | None],
    make_row: Callable[[T, Completion | None], R],
    writer: TableWriter[R],
    chunk_rows: int,
    progress: Progress,
    accept: Callable[[T, Completion], bool] | None = None,
    attempts: int = 1,
    mine: Callable[[int], bool] | None = None,
    kind: Callable[[T], str] = lambda _: "",
) -> None:
    """Make one row of every item and commit them in chunks.

    A chunk is one call of the engine with nothing else in it, and is redone whole where it was not committed, so a
    resumed run makes the same rows as an undisturbed one. The engine is not called where nothing is left to ask (a
    ``LazyEngine`` is not even built then).

    A request that is refused gets a row with its error. Where all of a kind are refused, nobody shall take that for the
    model's answers: a chunk is committed once each kind that was asked in it has an answer, and waits in memory until
    then.

    Args:
        engine: answers the requests; closing it is the caller's.
        items: what to make rows of; read once, chunk by chunk.
        make_request: the request of an item at an attempt (from 1), or None where there is nothing to ask.
        make_row: the row of an item and its completion, or of None where there was no request.
        writer: takes the chunks; those that it has are skipped.
        chunk_rows: rows that are committed together.
        progress: counts rows.
        accept: whether a completion is good; others are asked again while attempts are left.
        attempts: how often an item is asked at most.
        mine: which chunk numbers to do; all if not given.
        kind: which items stand or fall together; all of them if not given.

    Raises:
        EngineError: where the engine fails; chunks committed before stay.
        NothingAnsweredError: where requests of a kind were made and none of them was answered; chunks with this kind in
            them are not committed, and a resumed run asks them again.
    """
    waiting = _Waiting(writer)
    for number, chunk in enumerate(chunked(items, chunk_rows)):
        if mine is not None and not mine(number):
            continue
        key, kinds = f"{number:05d}", [kind(item) for item in chunk]
        if writer.has(key):
            waiting.committed({kinds[i] for i, item in enumerate(chunk) if make_request(item, 1) is not None})
        else:
            found: dict[int, Completion] = {}
            for attempt in range(1, attempts + 1):
                asked = [i for i, item in enumerate(chunk) if _open(item, found.get(i), attempt, accept)]
                made = [(i, make_request(chunk[i], attempt)) for i in asked]
                requests = [(i, request) for i, request in made if request is not None]
                if not requests:
                    break
                answers = _ask(engine, [request for _, request in requests], attempt)
                found.update(zip((i for i, _ in requests), answers, strict=True))
                waiting.note((kinds[i], found[i]) for i, _ in requests)
            _warn([completion for completion in found.values() if completion.error], len(found))
            waiting.add(key, {kinds[i] for i in found}, [make_row(item, found.get(i)) for i, item in enumerate(chunk)])
        progress.advance(len(chunk))
    waiting.end(engine.model)


class _Waiting(Generic[R]):
    """Chunks that are not committed yet, as a kind of item that was asked in them has no answer so far.

    Whatever is committed is thus of kinds that have answers, or of which nothing was asked: a resumed run sees no more
    of an earlier one, and takes their kinds for answered.
    """

    def __init__(self, writer: TableWriter[R]) -> None:
        self.answered: set[str] = set()
        self._writer: TableWriter[R] = writer
        self._chunks: dict[str, tuple[set[str], list[R]]] = {}
        self._refused: dict[str, list[Completion]] = {}

    def note(self, completions: Iterable[tuple[str, Completion]]) -> None:
        """Take in what the engine said, with the kind of item that it is about."""
        for kind, completion in completions:
            if completion.error is None:
                self.answered.add(kind)
            elif kind not in self.answered:
                self._refused.setdefault(kind, []).append(completion)

    def committed(self, kinds: set[str]) -> None:
        """Take in that the table has a chunk in which these kinds were asked."""
        self.answered.update(kinds)
        self._commit_ready()

    def add(self, key: str, kinds: set[str], rows: list[R]) -> None:
        """Commit the chunk, and those before it, as soon as all kinds that were asked in them have answers."""
        self._chunks[key] = (kinds, rows)
        self._commit_ready()

    def _commit_ready(self) -> None:
        for ready in [each for each, (needed, _) in self._chunks.items() if needed <= self.answered]:
            self._writer.commit(ready, self._chunks.pop(ready)[1])

    def end(self, model: str) -> None:
        """Refuse what is left.

        Raises:
            NothingAnsweredError: where there are chunks left; the message holds the engine's words.
        """
        for kind, refused in self._refused.items():
            if kind not in self.answered:
                raise NothingAnsweredError(
                    f"{model} answered none of {len(refused)} requests{f' ({kind})' if kind else ''}; the first, "
                    f"{refused[0].id}: {str(refused[0].error).rstrip('.')}. Where they are too long, raise "
                    "max_model_len or lower data.frames in a new run; where an endpoint is set up wrongly, correct it "
                    "and go on with --resume, which asks them again."
                )


def _open(item: T, completion: Completion | None, attempt: int, accept: Callable[[T, Completion], bool] | None) -> bool:
    """Whether an item is to be asked at this attempt."""
    if attempt == 1:
        return True
    return completion is not None and accept is not None and not accept(item, completion)


def _warn(failed: Sequence[Completion], asked: int) -> None:
    """Rows with an error count as wrong answers; where most of them are, nobody should take that for the model."""
    if failed:
        log.warning(
            "%d of %d requests were not answered; the first, %s: %s", len(failed), asked, failed[0].id, failed[0].error
        )


def _ask(engine: Engine, requests: Sequence[ChatRequest], attempt: int) -> list[Completion]:
    completions = engine.chat(requests)
    if attempt == 1:
        return completions
    return [dataclasses.replace(completion, attempts=completion.attempts + attempt - 1) for completion in completions]
