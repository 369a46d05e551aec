"""Chunks: committed whole, skipped when there, redone whole, asked alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from avrt_lib.engine.base import ChatRequest, Completion
from avrt_lib.engine.lazy import LazyEngine
from avrt_lib.engine.runner import chunked, derive_seed, run_chunks
from avrt_lib.errors import EngineError, NothingAnsweredError
from avrt_lib.records import Dropped
from avrt_lib.tables import TableWriter, read_rows
from avrt_lib.workspace import Progress


class Recorder:
    """An engine that answers with the request's seed, fails at a chosen call, and remembers what it was asked."""

    model = "recorder"

    def __init__(self, fail_at: int | None = None, refused: str = "") -> None:
        self.calls: list[list[str]] = []
        self.closed = 0
        self.built = 0
        self.fail_at = fail_at
        self.refused = refused

    def build(self) -> Recorder:
        self.built += 1
        return self

    def chat(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        if self.fail_at is not None and len(self.calls) == self.fail_at:
            raise EngineError("gone")
        self.calls.append([request.id for request in requests])
        return [
            Completion(r.id, "", "error", 0, 0, 0.0, error="too long")
            if r.id in self.refused
            else Completion(r.id, f"{r.id}:{r.seed}", "stop", 1, 1, 0.0)
            for r in requests
        ]

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def go(engine: Recorder, folder: Path, items: Sequence[str] = "abcde", **options: object) -> list[str]:
    writer = TableWriter(folder, Dropped)
    with LazyEngine(engine.build, engine.model) as lazy:
        run_chunks(
            lazy,
            items,
            make_request=lambda item, attempt: None if item == "-" else ChatRequest(item, [], 1, seed=attempt),
            make_row=lambda item, c: Dropped(item, c.text if c else "", str(c.attempts if c else 0), "", ""),
            writer=writer,
            chunk_rows=2,
            progress=Progress(None, "rows", len(items)),
            **options,  # type: ignore[arg-type]
        )
    writer.finish()
    return [row.source for row in read_rows(folder, Dropped)]


def test_chunks_are_asked_alone_and_in_order(tmp_path: Path) -> None:
    engine = Recorder()
    assert go(engine, tmp_path) == ["a:1", "b:1", "c:1", "d:1", "e:1"]
    assert engine.calls == [["a", "b"], ["c", "d"], ["e"]]
    assert (engine.built, engine.closed) == (1, 1)


def test_a_failure_keeps_what_was_committed_and_a_second_run_asks_the_rest(tmp_path: Path) -> None:
    broken = Recorder(fail_at=1)
    with pytest.raises(EngineError):
        go(broken, tmp_path)
    assert broken.closed == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part-00000.parquet"]
    engine = Recorder()
    assert go(engine, tmp_path) == ["a:1", "b:1", "c:1", "d:1", "e:1"]
    assert engine.calls == [["c", "d"], ["e"]]


def test_requests_that_were_refused_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert go(Recorder(refused="bcd"), tmp_path) == ["a:1", "", "", "", "e:1"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "1 of 2 requests were not answered; the first, b: too long",
        "2 of 2 requests were not answered; the first, c: too long",
    ]


def test_a_step_of_which_every_request_is_refused_fails_and_is_asked_again(tmp_path: Path) -> None:
    items = ["-", "a", "b", "-", "-"]  # what has no request is no answer
    with pytest.raises(
        NothingAnsweredError, match=r"recorder answered none of 2 requests; the first, a: too long\. .*max_"
    ):
        go(Recorder(refused="ab"), tmp_path, items)
    engine = Recorder()
    assert go(engine, tmp_path, items) == ["", "a:1", "b:1", "", ""]
    assert engine.calls == [["a"], ["b"]]


def test_refused_rows_are_kept_once_another_one_is_answered(tmp_path: Path) -> None:
    assert go(Recorder(refused="abcd"), tmp_path) == ["", "", "", "", "e:1"]


def test_an_answer_from_before_the_resume_counts(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="gone"):
        go(Recorder(fail_at=1), tmp_path)
    assert go(Recorder(refused="cde"), tmp_path) == ["a:1", "b:1", "", "", ""]


def test_a_kind_that_is_refused_throughout_fails_though_others_are_answered(tmp_path: Path) -> None:
    with pytest.raises(NothingAnsweredError, match=r"none of 2 requests \(av\); the first, A: too long"):
        go(Recorder(refused="AB"), tmp_path, "aAbB", kind=lambda item: "av" if item.isupper() else "audio_only")


def test_what_a_share_leaves_is_judged_with_all_shares(tmp_path: Path) -> None:
    with pytest.raises(NothingAnsweredError):
        go(Recorder(refused="cd"), tmp_path, mine=lambda number: number % 2 == 1)
    go(Recorder(), tmp_path, mine=lambda number: number % 2 == 0)
    engine = Recorder(refused="cd")
    assert go(engine, tmp_path) == ["a:1", "b:1", "", "", "e:1"]
    assert engine.calls == [["c", "d"]]


def test_a_chunk_that_waits_is_kept_once_another_shares_answer_is_met(tmp_path: Path) -> None:
    with pytest.raises(NothingAnsweredError):
        go(Recorder(refused="ab"), tmp_path, "abcd", mine=lambda number: number == 0)
    go(Recorder(), tmp_path, "abcd", mine=lambda number: number == 1)
    assert go(Recorder(refused="ab"), tmp_path, "abcd") == ["", "", "c:1", "d:1"]


def test_a_chunk_of_which_nothing_was_asked_is_no_answer(tmp_path: Path) -> None:
    for _ in range(2):  # the second time as a resumed run
        with pytest.raises(NothingAnsweredError):
            go(Recorder(refused="ab"), tmp_path, "ab--")


def test_a_kind_of_which_nothing_is_asked_keeps_no_chunk_back(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="gone"):
        go(Recorder(fail_at=1), tmp_path, ["a", "-", "b", "-"], kind=lambda item: "sight" if item == "-" else "sound")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["part-00000.parquet"]


def test_no_engine_where_nothing_is_left(tmp_path: Path) -> None:
    go(Recorder(), tmp_path)
    engine = Recorder()
    go(engine, tmp_path)
    assert engine.built == 0


def test_items_without_a_request_get_a_row_and_no_engine(tmp_path: Path) -> None:
    engine = Recorder()
    assert go(engine, tmp_path, ["-", "-", "-"]) == ["", "", ""]
    assert engine.built == 0


def test_unaccepted_answers_are_asked_again_with_a_new_seed(tmp_path: Path) -> None:
    engine = Recorder()
    rows = go(engine, tmp_path, accept=lambda item, c: item != "b" or c.text == "b:3", attempts=4)
    assert rows == ["a:1", "b:3", "c:1", "d:1", "e:1"]
    assert engine.calls[:3] == [["a", "b"], ["b"], ["b"]]
    assert [row.split for row in read_rows(tmp_path, Dropped)][:2] == ["1", "3"]


def test_shares_of_the_chunks_make_one_table(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    go(first, tmp_path, mine=lambda number: number % 2 == 0)
    assert go(second, tmp_path, mine=lambda number: number % 2 == 1) == ["a:1", "b:1", "c:1", "d:1", "e:1"]
    assert (first.calls, second.calls) == ([["a", "b"], ["e"]], [["c", "d"]])


def test_seeds_depend_on_every_part_and_fit_31_bits() -> None:
    seeds = {derive_seed(0, "vision", "a", 1), derive_seed(1, "vision", "a", 1), derive_seed(0, "audio", "a", 1),
             derive_seed(0, "vision", "b", 1), derive_seed(0, "vision", "a", 2)}  # fmt: skip
    assert len(seeds) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "vision", "a", 1) == 1662412781


def test_chunked_holds_one_list_at_a_time() -> None:
    taken = []
    source = (taken.append(i) or i for i in range(5))
    chunks = chunked(source, 2)
    assert next(chunks) == [0, 1]
    assert taken == [0, 1]
    assert list(chunks) == [[2, 3], [4]]
