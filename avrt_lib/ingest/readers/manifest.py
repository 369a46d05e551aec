"""A user's own data: a JSONL, CSV or Parquet manifest whose columns are named in the configuration.

Our names are ``id``, ``question``, ``options``, ``answer``, ``video``, ``audio``, ``image``, ``question_type``,
``needs`` and ``clip``; ``data.SPLIT.columns`` maps them to the file's where they differ. Media paths are relative to
the manifest's folder.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from avrt_lib.config import SourceConfig
from avrt_lib.errors import ConfigError, DataError
from avrt_lib.ingest.readers.base import (
    Media,
    Parsed,
    RowError,
    SourceRow,
    answer_index,
    option_list,
    optional_text,
    parse_rows,
    source_path,
    text_field,
)

REQUIRED = ("id", "question", "options")
MEDIA = ("video", "audio", "image")
OPTIONAL = ("answer", "question_type", "needs", "clip")
_NEEDS = ("both", "audio", "vision", "unknown")


def to_row(raw: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Parsed:
    """One manifest row.

    Options are a list, or a text that holds a JSON list or options with ``|`` between them (CSV). The answer is a
    letter, an index from 0, or an option's text; an empty answer is a question without a label.

    Raises:
        RowError: why the row is no question.
    """
    row = {name: raw.get(columns.get(name, name)) for name in (*REQUIRED, *MEDIA, *OPTIONAL)}
    options = option_list(_options(row["options"]), "options")
    files = {kind: text_field(row, kind) for kind in MEDIA if row[kind] not in (None, "")}
    if not files:
        raise RowError("it names no video, audio or image")
    if "video" in files and "image" in files:
        raise RowError("it names both a video and an image; one of them can be shown")
    needs = optional_text(row, "needs").casefold()
    if needs not in _NEEDS:
        raise RowError(f"needs is {needs!r}, none of {', '.join(_NEEDS)}")
    clip = optional_text(row, "clip", "")
    used = {columns.get(name, name) for name in row}
    return SourceRow(
        id=text_field(row, "id"),
        where=where,
        question=text_field(row, "question"),
        options=options,
        answer_index=answer_index(row["answer"], options),
        question_type=optional_text(row, "question_type"),
        needs=needs,
        group=clip or files.get("video") or files.get("image") or files["audio"],
        media=Media(**{kind: (path,) for kind, path in files.items()}),
        named_group=bool(clip),
        extra={key: value for key, value in raw.items() if key not in used and key is not None},
    )


def _options(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError(f"options is no valid JSON list: {error}") from error
    return [part.strip() for part in text.split("|")]


def read(source: SourceConfig) -> list[Parsed]:
    """The rows of a manifest file, by its suffix.

    Raises:
        ConfigError: where ``columns`` has a name that is none of ours.
        DataError: where the file is absent, of another kind, damaged, or lacks a column.
    """
    known = (*REQUIRED, *MEDIA, *OPTIONAL)
    unknown = sorted(set(source.columns) - set(known))
    if unknown:
        raise ConfigError(f"data columns: {', '.join(unknown)} is no name of ours; known: {', '.join(known)}.")
    file = source_path(source.path)
    if file.is_dir():
        raise DataError(f"{file} is a folder: a manifest is a file that ends in .jsonl, .csv or .parquet.")
    loaders = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    load = loaders.get(file.suffix.lower())
    if load is None:
        raise DataError(f"{file} must end in .jsonl, .csv or .parquet, so that it is clear how to read it.")
    raw = load(file)
    _check_columns(file, raw, source.columns)
    return parse_rows(raw, file, file.parent, partial(to_row, columns=source.columns), source.count)


def _check_columns(file: Path, raw: list[Any], columns: Mapping[str, str]) -> None:
    """Say once which column is missing, rather than drop every row for it."""
    present = {key for row in raw if isinstance(row, Mapping) for key in row}
    if not present:
        raise DataError(f"{file} holds no rows.")
    shown = ", ".join(sorted(str(key) for key in present if key is not None))
    for name in REQUIRED:
        if columns.get(name, name) not in present:
            raise DataError(
                f"{file} has no column {columns.get(name, name)!r} for {name}; it has: {shown}. "
                f"Name it in data.SPLIT.columns.{name}."
            )
    if not any(columns.get(kind, kind) in present for kind in MEDIA):
        raise DataError(
            f"{file} has no column for video, audio or image; it has: {shown}. Name one in data.SPLIT.columns."
        )
    for name, column in columns.items():
        if column not in present:
            raise DataError(f"{file} has no column {column!r} (data.SPLIT.columns.{name}); it has: {shown}.")


def _jsonl(file: Path) -> list[Any]:
    rows: list[Any] = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except (ValueError, RecursionError) as error:
                        raise DataError(f"{file}:{number} is not valid JSON: {error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: save it as UTF-8.") from error
    return rows


def _csv(file: Path) -> list[Any]:
    # Not pyarrow's reader: it guesses types, and an id of 007 would become the number 7.
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: save it as UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{file} is not valid CSV: {error}.") from error


def _parquet(file: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Any] = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a valid Parquet file: {error}.") from error
    return rows
