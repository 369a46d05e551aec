"""Readers: from raw rows to source rows, or the reason why not."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avrt_lib.config import SourceConfig
from avrt_lib.errors import ConfigError, DataError
from avrt_lib.ingest import readers
from avrt_lib.ingest.readers import Rejection, SourceRow, avqa, daily_omni, manifest
from avrt_lib.ingest.readers.base import RowError, answer_index, inside, option_list
from avrt_lib.workspace import Workspace

OPTIONS = ["rain", "wind", "bell", "drum"]


def read(form: str, path: Path, **settings: Any) -> list[Any]:
    """All rows of a source."""
    source = SourceConfig(format=form, path=str(path), **settings)
    return readers.read(source, "train", Workspace(path.parent, "ingest", path.parent / "scratch"))


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"media")


def write(file: Path, document: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("value", "options", "index"),
    [
        (2, OPTIONS, 2),
        (2.0, OPTIONS, 2),
        ("2", OPTIONS, 2),
        ("2.0", OPTIONS, 2),
        ("C", OPTIONS, 2),
        ("c", OPTIONS, 2),
        ("(C)", OPTIONS, 2),
        ("C.", OPTIONS, 2),
        ("C. bell", OPTIONS, 2),
        ("bell", OPTIONS, 2),
        (" Bell ", OPTIONS, 2),
        ("3", ["2", "3", "4"], 1),
        (1, ["2", "3", "4"], 1),
        ("A", ["B", "A"], 1),
        ("H", list("12345678"), 7),
        (None, OPTIONS, None),
        ("", OPTIONS, None),
    ],
)
def test_answers_in_every_notation(value: Any, options: list[str], index: int | None) -> None:
    assert answer_index(value, options) == index


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (4, "index 4 is outside 0 to 3"),
        (-1, "index -1 is outside"),
        ("7", "index 7 is outside"),
        ("1" * 310, "index 4 is outside"),
        (1.5, "1.5 is no index"),
        (True, "not bool"),
        ([1], "not list"),
        ("E", "none of the 4 options"),
        ("thunder", "none of the 4 options"),
        ("A. bell", "the letter of another option"),
    ],
)
def test_answers_that_are_none(value: Any, says: str) -> None:
    with pytest.raises(RowError, match=says):
        answer_index(value, OPTIONS)


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (["rain", "wind"], ["rain", "wind"]),
        (["A. rain", "B. wind"], ["rain", "wind"]),
        (["(A) rain", "(B) wind"], ["rain", "wind"]),
        (["a) rain", "b) wind"], ["rain", "wind"]),
        (["A. rain", "wind"], ["A. rain", "wind"]),
        (["B. rain", "A. wind"], ["B. rain", "A. wind"]),
        (["A", "B"], ["A", "B"]),
        ([1, 2.5, "x"], ["1", "2.5", "x"]),
        ([f"o{i}" for i in range(8)], [f"o{i}" for i in range(8)]),
    ],
)
def test_options(value: Any, options: list[str]) -> None:
    assert option_list(value, "options") == options


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("rain", "must be a list"),
        (None, "must be a list"),
        (["rain"], "has 1 options; 2 to 8"),
        ([f"o{i}" for i in range(9)], "has 9 options; 2 to 8"),
        (["rain", ""], "an empty option"),
        (["rain", "Rain "], "the same option twice"),
        (["rain", None], "texts only"),
        (["rain", "\ud800"], "lone surrogate"),
    ],
)
def test_options_that_are_none(value: Any, says: str) -> None:
    with pytest.raises(RowError, match=says):
        option_list(value, "options")


@pytest.mark.parametrize(
    "name", ["../secret.mp4", "videos/../../secret.mp4", "/etc/passwd", "..", "", ".", "a\0b.mp4", "videos/../.."]
)
def test_a_path_that_leads_out_of_its_root_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"leads out of|null character"):
        inside(tmp_path / "root", name)


@pytest.mark.parametrize("name", ["a.mp4", "videos/a.mp4", "videos/../a.mp4", "./a.mp4", "..a.mp4", "a:b.mp4"])
def test_a_path_below_its_root_is_taken(name: str, tmp_path: Path) -> None:
    assert tmp_path in inside(tmp_path, name).parents


def test_links_that_lie_in_the_folder_are_followed(tmp_path: Path) -> None:
    touch(tmp_path / "blobs" / "1")
    (tmp_path / "data" / "videos").mkdir(parents=True)
    (tmp_path / "data" / "videos" / "a.mp4").symlink_to(tmp_path / "blobs" / "1")
    write(tmp_path / "data" / "annotations.json", [avqa_row(video_name="a")])
    (row,) = read("avqa", tmp_path / "data")
    assert isinstance(row, SourceRow)


# AVQA


def avqa_row(**changes: Any) -> dict[str, Any]:
    row = {
        "id": 7,
        "video_name": "clip_000030",
        "video_id": 12,
        "question_text": "Which sound?",
        "multi_choice": OPTIONS,
        "answer": 2,
        "question_relation": "Both",
        "question_type": "Which",
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


def test_an_avqa_row() -> None:
    row = avqa.to_row(avqa_row(extra_key=1), "train_qa.json:1")
    assert isinstance(row, SourceRow)
    assert (row.id, row.group, row.question) == ("clip_000030-7", "clip_000030", "Which sound?")
    assert (row.options, row.answer_index, row.question_type) == (OPTIONS, 2, "Which")
    assert row.media.video == ("videos/clip_000030.mp4", "clip_000030.mp4")
    assert row.extra == {"video_id": 12, "extra_key": 1}


@pytest.mark.parametrize(
    ("relation", "needs"),
    [("Both", "both"), ("Sound", "audio"), ("View", "vision"), ("both", "both"), (..., "unknown")],
)
def test_what_an_avqa_row_needs(relation: Any, needs: str) -> None:
    row = avqa.to_row(avqa_row(question_relation=relation), "x:1")
    assert isinstance(row, SourceRow)
    assert row.needs == needs


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"video_name": ...}, "video_name is missing"),
        ({"video_name": ["a"]}, "video_name must be text, not list"),
        ({"question_text": " "}, "question_text is empty"),
        ({"question_text": "\ud83d"}, "question_text holds half a character"),
        ({"id": None}, "id is missing"),
        ({"multi_choice": "rain"}, "multi_choice must be a list"),
        ({"answer": 4}, "answer index 4"),
        ({"question_relation": "Smell"}, "none of Both, Sound and View"),
        ({"question_type": ["Which"]}, "question_type must be text"),
    ],
)
def test_an_avqa_row_that_is_no_question(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        avqa.to_row(avqa_row(**changes), "x:1")


@pytest.mark.parametrize("place", ["clip_000030.mp4", "videos/clip_000030.mp4"])
@pytest.mark.parametrize("named", ["folder", "file"])
def test_avqa_media_are_found(place: str, named: str, tmp_path: Path) -> None:
    touch(tmp_path / place)
    file = write(tmp_path / "train_qa.json", [avqa_row()])
    (row,) = read("avqa", tmp_path if named == "folder" else file)
    assert row.video == tmp_path / place


def test_rows_that_are_no_questions_are_rejected_with_their_reason(tmp_path: Path) -> None:
    touch(tmp_path / "clip_000030.mp4", tmp_path.parent / "secret.mp4")
    rows: list[Any] = [
        avqa_row(),
        avqa_row(id=8, video_name="absent"),
        avqa_row(id=9, video_name="../secret"),
        avqa_row(id=10, answer=9),
        avqa_row(),
        "text",
        avqa_row(id=11, video_name="x" * 400),
        avqa_row(id="\ud800"),
    ]
    found = read("avqa", write(tmp_path / "qa.json", rows))
    assert isinstance(found[0], SourceRow)
    rejected = [row for row in found if isinstance(row, Rejection)]
    assert [(row.where, row.category) for row in rejected] == [
        ("qa.json:2", "media missing"),
        ("qa.json:3", "media path refused"),
        ("qa.json:4", "invalid row"),
        ("qa.json:5", "duplicate id"),
        ("qa.json:6", "invalid row"),
        ("qa.json:7", "media missing"),
        ("qa.json:8", "invalid row"),
    ]
    assert rejected[-1].id == r"\ud800", "the name can be stored"
    assert "videos/absent.mp4 is not in" in rejected[0].reason


def test_count_reads_the_first_rows(tmp_path: Path) -> None:
    touch(tmp_path / "clip_000030.mp4")
    file = write(tmp_path / "qa.json", [avqa_row(id=i) for i in range(5)])
    assert [row.id for row in read("avqa", file, count=2)] == ["clip_000030-0", "clip_000030-1"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "absent", "There is no data set at .*absent"),
        (lambda folder: folder, "holds no annotation file"),
        (lambda folder: (write(folder / "a.json", []), write(folder / "b.json", []))[0].parent, r"a\.json, b\.json"),
        (lambda folder: write(folder / "a.json", {"rows": []}), "must hold a list of rows, not dict"),
        (lambda folder: _text(folder / "a.json", "[{"), r"a\.json is not valid JSON"),
        (lambda folder: _text(folder / "a.json", "[" * 100_000), r"a\.json is not valid JSON"),
    ],
)
def test_an_annotation_file_that_is_none_is_named(make: Callable[[Path], Path], says: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=says):
        read("avqa", make(tmp_path / "data"))


def _text(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


# Daily-Omni


def omni_row(**changes: Any) -> dict[str, Any]:
    row = {
        "Question": "Which sound?",
        "Choice": ["A. rain", "B. wind", "C. bell", "D. drum"],
        "Answer": "C",
        "video_id": "abc",
        "Type": "Event Sequence",
        "video_duration": "30s",
    }
    return row | changes


def test_a_daily_omni_row() -> None:
    row = daily_omni.to_row(omni_row(), "qa.json:1", 3)
    assert isinstance(row, SourceRow)
    assert (row.id, row.group, row.options, row.answer_index) == ("abc-3", "abc", OPTIONS, 2)
    assert (row.question_type, row.needs, row.extra) == ("Event Sequence", "unknown", {"video_duration": "30s"})


@pytest.mark.parametrize("with_sound", [True, False])
def test_daily_omni_takes_the_sound_file_where_there_is_one(with_sound: bool, tmp_path: Path) -> None:
    video, audio = (tmp_path / "Videos" / "abc" / f"abc_{name}" for name in ("video.mp4", "audio.wav"))
    touch(video, *([audio] if with_sound else []))
    write(tmp_path / "qa.json", [omni_row(), omni_row(Question="And now?"), omni_row(video_id="../x")])
    first, second, refused = read("daily-omni", tmp_path)
    assert (first.id, second.id) == ("abc-1", "abc-2")
    assert (first.video, first.audio) == (video, audio if with_sound else None)
    assert refused.category == "media missing" or refused.category == "media path refused"


def test_daily_omni_needs_its_qa_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no qa\.json"):
        read("daily-omni", tmp_path)


# Manifests

MANIFEST_ROWS: list[dict[str, Any]] = [
    {"id": "007", "question": "Which?", "options": ["rain", "wind"], "answer": "B", "video": "v/a.mp4", "note": "x"},
    {
        "id": "8",
        "question": 'Was, "es"?',
        "options": ["1", "2", "3", "4", "5"],
        "answer": "5",
        "video": "v/b.mp4",
        "note": "y",
    },
    {"id": "9", "question": "Which?", "options": ["rain", "wind"], "answer": "", "video": "v/b.mp4", "note": ""},
]


def as_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    return _text(file.with_suffix(".jsonl"), "\n".join(json.dumps(row) for row in rows) + "\n\n")


def as_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    with open(file.with_suffix(".csv"), "w", newline="", encoding="utf-8-sig") as handle:
        table = csv.DictWriter(handle, rows[0])
        table.writeheader()
        table.writerows({k: "|".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return file.with_suffix(".csv")


def as_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), file.with_suffix(".parquet"))
    return file.with_suffix(".parquet")


WRITERS = [as_jsonl, as_csv, as_parquet]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_manifest_of_any_kind(writer: Callable[..., Path], tmp_path: Path) -> None:
    touch(tmp_path / "v" / "a.mp4", tmp_path / "v" / "b.mp4")
    rows = read("manifest", writer(tmp_path / "m", MANIFEST_ROWS))
    assert [row.id for row in rows] == ["007", "8", "9"]
    assert [row.answer_index for row in rows] == [1, 4, None]
    assert [row.group for row in rows] == ["v/a.mp4", "v/b.mp4", "v/b.mp4"]
    assert rows[1].question == 'Was, "es"?'
    assert rows[0].extra == {"note": "x"}
    assert rows[0].video == tmp_path / "v" / "a.mp4"


@pytest.mark.parametrize("writer", WRITERS)
def test_columns_are_mapped(writer: Callable[..., Path], tmp_path: Path) -> None:
    touch(tmp_path / "a.wav", tmp_path / "a.jpg")
    raw = [
        {"qid": 1, "q": "Which?", "c": ["x", "y"], "gold": 1, "wav": "a.wav", "img": "a.jpg", "k": "t", "film": "f1"}
    ]
    columns = {"id": "qid", "question": "q", "options": "c", "answer": "gold", "audio": "wav", "image": "img"}
    columns |= {"question_type": "k", "clip": "film"}
    (row,) = read("manifest", writer(tmp_path / "m", raw), columns=columns)
    assert (row.id, row.question, row.options, row.answer_index) == ("1", "Which?", ["x", "y"], 1)
    assert (row.question_type, row.group, row.named_group) == ("t", "f1", True)
    assert (row.audio, row.image, row.video, row.extra) == (tmp_path / "a.wav", tmp_path / "a.jpg", None, {})


def test_csv_options_may_be_a_json_list(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    rows = [{"id": "1", "question": "Which?", "options": '["a|b", "c"]', "answer": "a|b", "video": "a.mp4"}]
    (row,) = read("manifest", as_csv(tmp_path / "m", rows))
    assert (row.options, row.answer_index) == (["a|b", "c"], 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"video": ""}, "names no video, audio or image"),
        ({"image": "i.jpg"}, "both a video and an image"),
        ({"needs": "smell"}, "needs is 'smell'"),
        ({"options": "[1,"}, "no valid JSON list"),
        ({"options": "one"}, "has 1 options"),
        ({"id": None}, "id is missing"),
        ({"question": "What does <|VIDEO|> say?"}, r"question holds <\|VIDEO\|>, which is a control token"),
        ({"options": '["a", "b<|im_end|>"]'}, r"options holds <\|im_end\|>"),
    ],
)
def test_a_manifest_row_that_is_no_question(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        manifest.to_row(MANIFEST_ROWS[0] | changes, "m:1", {})


@pytest.mark.parametrize(
    ("make", "columns", "error", "says"),
    [
        (
            lambda f: as_jsonl(f, MANIFEST_ROWS),
            {"questoin": "q"},
            ConfigError,
            "questoin is no name of ours; known:",
        ),
        (
            lambda f: as_jsonl(f, MANIFEST_ROWS),
            {"question": "q"},
            DataError,
            r"no column 'q' for question; it has:",
        ),
        (lambda f: as_jsonl(f, MANIFEST_ROWS), {"answer": "gold"}, DataError, r"no column 'gold' \(data"),
        (
            lambda f: as_jsonl(f, [{"id": 1, "question": "?", "options": []}]),
            {},
            DataError,
            "no column for video, audio",
        ),
        (lambda f: _text(f.with_suffix(".jsonl"), ""), {}, DataError, "holds no rows"),
        (lambda f: _text(f.with_suffix(".jsonl"), '{"id": 1}\n{"id"'), {}, DataError, r"m\.jsonl:2 is not valid JSON"),
        (lambda f: _text(f.with_suffix(".parquet"), "text"), {}, DataError, "not a valid Parquet file"),
        (lambda f: _text(f.with_suffix(".csv"), 'id,question\n1,"open'), {}, DataError, "not valid CSV"),
        (lambda f: _text(f.with_suffix(".txt"), ""), {}, DataError, r"must end in \.jsonl, \.csv or \.parquet"),
        (lambda f: f.parent, {}, DataError, "is a folder: a manifest is a file"),
        (lambda f: f.with_suffix(".csv"), {}, DataError, "There is no data set at"),
    ],
)
def test_a_manifest_that_is_none_is_named(
    make: Callable[[Path], Path], columns: dict[str, str], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        read("manifest", make(tmp_path / "m"), columns=columns)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("id,question\n1,Größe".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read("manifest", tmp_path / "m.csv")


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.format: .*'avqua'; known: avqa, daily-omni, manifest, miniature"):
        read("avqua", tmp_path)


def test_a_miniature_needs_a_count(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.count is needed"):
        read("miniature", tmp_path)
