"""Tables: whole or not at all, resumable, and checked."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avrt_lib import tables
from avrt_lib.errors import DataError, DiskFullError
from avrt_lib.records import SCHEMAS, Dropped, Prediction, Sample, Trace
from avrt_lib.tables import (
    TableWriter,
    atomic_path,
    content_hash,
    hash_folder,
    locked,
    place_folder,
    read_json,
    read_rows,
    verify,
    write_json,
    write_table,
)


def names(folder: Path) -> list[str]:
    """Whatever lies in the folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def make_dropped(number: int, split: str = "train") -> Dropped:
    return Dropped(f"d{number}", "avqa", split, f"a.json:{number}", "media missing: x.mp4")


def make_trace(number: int) -> Trace:
    return Trace(f"s{number}", "vision", "m", "p@1", "raw", "why", 1, None, True, "stop", 10, 5, 1, None)


def make_prediction(number: int) -> Prediction:
    return Prediction(f"s{number}", "test", "c", "both", "sft", "av", "raw", 0, None, True, True, 5, 10, 5, 0.25)


def make_sample(number: int) -> Sample:
    return Sample(
        id=f"s{number}",
        source="avqa",
        split=("train", "test")[number % 2],
        question="Which?",
        options=["a", "b"],
        answer_index=None,
        question_type="both",
        needs="both",
        media_kind="video",
        frames=[b"\xff\xd8", b""],
        frame_times_s=[0.1, 0.2],
        audio=None,
        duration_s=1.5,
        width=64,
        height=48,
        fps=None,
        media_sha256="0" * 64,
        group="c",
    )


@pytest.mark.parametrize("make", [make_dropped, make_trace, make_prediction, make_sample])
def test_rows_come_back_as_they_went(make: Callable[[int], Any], tmp_path: Path) -> None:
    rows = [make(i) for i in range(700)]
    manifest = write_table(tmp_path / "t", type(rows[0]), rows, {"step": "test"})
    assert list(read_rows(tmp_path / "t", type(rows[0]))) == rows
    assert manifest["rows"] == 700
    assert manifest["made_by"] == {"step": "test"}
    assert verify(tmp_path / "t") == manifest


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    write_table(tmp_path / "t", Trace, [])
    assert list(read_rows(tmp_path / "t", Trace)) == []
    assert verify(tmp_path / "t")["rows"] == 0


@pytest.mark.parametrize("columns", [None, ["id"], ["id", "split"]])
def test_a_split_is_found_whichever_columns_are_read(columns: list[str] | None, tmp_path: Path) -> None:
    write_table(tmp_path / "t", Sample, [make_sample(i) for i in range(6)])
    rows = list(read_rows(tmp_path / "t", Sample, columns=columns, split="test"))
    assert [row.id for row in rows] == ["s1", "s3", "s5"]


def test_columns_that_are_not_read_are_empty(tmp_path: Path) -> None:
    write_table(tmp_path / "t", Sample, [make_sample(0)])
    (row,) = read_rows(tmp_path / "t", Sample, columns=["id"])
    assert (row.id, row.question, row.frames, row.audio, row.width) == ("s0", "", [], None, None)


_WRITER = """
import os, signal, sys
from pathlib import Path
from avrt_lib import tables
from avrt_lib.records import Dropped
from avrt_lib.tables import TableWriter

writer = TableWriter(Path(sys.argv[1]), Dropped)
for key in range(4):
    if writer.has(f"{key:05d}"):
        continue
    if key == int(sys.argv[2]):
        # Killed with the part written but not yet renamed.
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    writer.commit(f"{key:05d}", [Dropped(f"d{key}", "avqa", "train", "here", f"reason {i}") for i in range(10)])
writer.finish()
"""


def _write(folder: Path, kill_at: int) -> int:
    command = [sys.executable, "-c", _WRITER, str(folder), str(kill_at)]
    return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())}).returncode


def test_a_killed_writer_goes_on_and_ends_with_the_same_table(tmp_path: Path) -> None:
    assert _write(tmp_path / "whole", kill_at=9) == 0
    assert _write(tmp_path / "killed", kill_at=2) == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "killed").glob("part-*")) == ["part-00000.parquet", "part-00001.parquet"]
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        list(read_rows(tmp_path / "killed", Dropped))
    before = (tmp_path / "killed" / "part-00001.parquet").stat().st_mtime_ns
    assert _write(tmp_path / "killed", kill_at=9) == 0
    assert (tmp_path / "killed" / "part-00001.parquet").stat().st_mtime_ns == before
    assert read_json(tmp_path / "killed" / "manifest.json") == read_json(tmp_path / "whole" / "manifest.json")
    assert names(tmp_path / "killed") == names(tmp_path / "whole")


def _append(part: Path) -> None:
    with open(part, "ab") as handle:
        handle.write(b"x")


def _flip(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_append, "SHA-256"),
        (_flip, "SHA-256"),
        (lambda part: part.write_bytes(part.read_bytes()[:-9]), "SHA-256"),
        (Path.unlink, "missing"),
    ],
)
def test_a_changed_part_is_detected(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    write_table(tmp_path / "t", Trace, [make_trace(i) for i in range(50)])
    damage(tmp_path / "t" / "part-00000.parquet")
    with pytest.raises(DataError, match=rf"part-00000\.parquet.*{message}"):
        verify(tmp_path / "t")


def test_a_damaged_part_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_table(tmp_path / "t", Trace, [make_trace(0)])
    (tmp_path / "t" / "part-00000.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"part-00000\.parquet cannot be read"):
        list(read_rows(tmp_path / "t", Trace))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write_table(tmp_path / "t", Dropped, [make_dropped(0)])
    pq.write_table(pa.table({"id": ["d0"]}), tmp_path / "t" / "part-00000.parquet")
    with pytest.raises(DataError, match=r"part-00000\.parquet has no column 'source'"):
        list(read_rows(tmp_path / "t", Dropped))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "sample"}, "holds sample rows, not trace rows"), ({"schema_version": 0}, "schema version 0")],
)
def test_another_kind_or_version_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    manifest = write_table(tmp_path / "t", Trace, [make_trace(0)])
    write_json(tmp_path / "t" / "manifest.json", manifest | change)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / "t", Trace))


def _hash(folder: Path, parts: dict[str, list[Any]], kind: type) -> str:
    writer: TableWriter[Any] = TableWriter(folder, kind)
    for key, rows in parts.items():
        writer.commit(key, rows)
    return str(writer.finish()["content_sha256"])


def test_the_content_hash_ignores_parts_their_order_and_measurements(tmp_path: Path) -> None:
    rows = [make_prediction(i) for i in range(5)]
    first = _hash(tmp_path / "1", {"0": rows}, Prediction)
    assert _hash(tmp_path / "2", {"0": rows[3:], "1": rows[:3]}, Prediction) == first
    assert _hash(tmp_path / "3", {"b": [replace(r, latency_s=9.0) for r in rows]}, Prediction) == first
    traces = [make_trace(i) for i in range(5)]
    attempts = [replace(row, attempt=3) for row in traces]
    assert _hash(tmp_path / "4", {"0": traces}, Trace) == _hash(tmp_path / "5", {"0": attempts}, Trace)


@pytest.mark.parametrize("change", [{"answer_index": 1}, {"raw_text": "raw "}, {"error": ""}, {"correct_strict": None}])
def test_the_content_hash_sees_every_other_column(change: dict[str, Any], tmp_path: Path) -> None:
    rows = [make_prediction(i) for i in range(5)]
    changed = [*rows[:4], replace(rows[4], **change)]
    assert _hash(tmp_path / "1", {"0": rows}, Prediction) != _hash(tmp_path / "2", {"0": changed}, Prediction)


def test_the_content_hash_counts_a_row_that_stands_twice(tmp_path: Path) -> None:
    rows = [make_dropped(0), make_dropped(1)]
    assert _hash(tmp_path / "1", {"0": rows}, Dropped) != _hash(tmp_path / "2", {"0": [*rows, rows[0]]}, Dropped)
    assert content_hash(tmp_path / "1", Dropped) == content_hash(tmp_path / "1", Dropped)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_what_was_there(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TableWriter(tmp_path / "t", Dropped)
    writer.commit("0", [make_dropped(0)])
    before = (tmp_path / "t" / "part-0.parquet").read_bytes()

    def full(table: Any, where: Path, **_: Any) -> None:
        where.write_bytes(b"half a part")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tables.pq, "write_table", full)
    for key in ("0", "1"):
        with pytest.raises(DiskFullError, match=r"No space left on the disk that holds .*/t: .*--resume"):
            writer.commit(key, [make_dropped(1)])
    assert names(tmp_path / "t") == ["part-0.parquet"]
    assert (tmp_path / "t" / "part-0.parquet").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), ValueError("bad"), KeyboardInterrupt()])
def test_any_other_failure_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")

    def write() -> None:
        with atomic_path(tmp_path / "f") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "old"


WRITER = """
import sys
from pathlib import Path
from avrt_lib.tables import atomic_path, locked

target = Path(sys.argv[1])
with locked(target), atomic_path(target) as temporary:
    temporary.mkdir()
    (temporary / "half").touch()
    print(temporary.name, flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer_and_what_a_killed_one_left_is_gone_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "a.b"
    others = {".a.b.c.1.tmp", ".a.b", ".a.1.tmp"}
    for name in others:
        (tmp_path / name).mkdir()
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        left = writer.stdout.readline().strip()
        with open(tmp_path / ".a.b.lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        writer.kill()
        writer.communicate()
    assert (tmp_path / left / "half").exists()
    with locked(target):
        assert set(names(tmp_path)) == {".a.b.lock", *others}


def test_json_is_refused_where_it_would_not_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "j", {"x": float("nan")})
    assert names(tmp_path) == []
    (tmp_path / "j").write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        read_json(tmp_path / "j")


def test_a_folder_is_placed_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "new" / "sub").mkdir(parents=True)
    (tmp_path / "new" / "sub" / "f").write_text("new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "gone").write_text("old")
    place_folder(tmp_path / "new", tmp_path / "old")
    assert hash_folder(tmp_path / "old") == hash_folder(tmp_path / "new")
    assert names(tmp_path) == ["new", "old"]


def test_the_folder_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    hashes = set()
    for i, (name, text) in enumerate([("a", "x"), ("b", "x"), ("a", "y"), ("d/a", "x")]):
        file = tmp_path / str(i) / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
        hashes.add(hash_folder(tmp_path / str(i)))
    assert len(hashes) == 4


@pytest.mark.parametrize("kind", list(SCHEMAS))
def test_every_record_has_the_columns_of_its_schema(kind: type) -> None:
    assert list(kind.__dataclass_fields__) == SCHEMAS[kind].names  # type: ignore[attr-defined]
