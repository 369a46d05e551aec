"""AVQA: a JSON list of questions about ten-second clips.

Yang et al., "AVQA: A Dataset for Audio-Visual Question Answering on Videos", ACM Multimedia 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avrt_lib.config import SourceConfig
from avrt_lib.errors import DataError
from avrt_lib.ingest.readers.base import (
    Media,
    Parsed,
    RowError,
    SourceRow,
    answer_index,
    option_list,
    optional_text,
    parse_rows,
    read_json_rows,
    source_path,
    text_field,
)

NEEDS = {"both": "both", "sound": "audio", "view": "vision"}
_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_KNOWN = frozenset(
    ("id", "video_name", "question_text", "multi_choice", "answer", "question_relation", "question_type")
)


def to_row(raw: Mapping[str, Any], where: str) -> Parsed:
    """One AVQA row; its clip is ``videos/NAME.mp4`` or ``NAME.mp4`` beside the annotation file.

    Raises:
        RowError: why the row is no question.
    """
    name = text_field(raw, "video_name")
    options = option_list(raw.get("multi_choice"), "multi_choice")
    relation = optional_text(raw, "question_relation").casefold()
    if relation not in NEEDS and relation != "unknown":
        raise RowError(f"question_relation {raw['question_relation']!r} is none of Both, Sound and View")
    stem, file = _names(name)
    return SourceRow(
        # AVQA's ids are numbers that each file counts anew.
        id=f"{stem}-{text_field(raw, 'id')}",
        where=where,
        question=text_field(raw, "question_text"),
        options=options,
        answer_index=answer_index(raw.get("answer"), options),
        question_type=optional_text(raw, "question_type"),
        needs=NEEDS.get(relation, "unknown"),
        group=stem,
        media=Media(video=(f"videos/{file}", file)),
        extra={key: value for key, value in raw.items() if key not in _KNOWN},
    )


def _names(name: str) -> tuple[str, str]:
    suffix = next((s for s in _SUFFIXES if name.lower().endswith(s)), None)
    return (name[: -len(suffix)], name) if suffix else (name, f"{name}.mp4")


def read(source: SourceConfig) -> list[Parsed]:
    """The rows of an annotation file, or of the one in a folder.

    Raises:
        DataError: where there is no such file, or several.
    """
    file = annotation_file(source_path(source.path))
    return parse_rows(read_json_rows(file), file, file.parent, to_row, source.count)


def annotation_file(place: Path) -> Path:
    """The annotation file itself, or a folder's ``annotations.json``, or its only JSON file.

    Raises:
        DataError: where the folder holds none or several; the message lists them.
    """
    if place.is_file():
        return place
    if (place / "annotations.json").is_file():
        return place / "annotations.json"
    found = sorted(path for path in place.glob("*.json") if path.is_file())
    if not found:
        raise DataError(f"{place} holds no annotation file: put the questions there as annotations.json.")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise DataError(f"{place} holds several annotation files ({names}): name the one to read.")
    return found[0]
