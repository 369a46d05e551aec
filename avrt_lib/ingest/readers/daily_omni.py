"""Daily-Omni: questions about everyday videos whose sound also lies in a file of its own.

Zhou et al., "Daily-Omni: Towards Audio-Visual Reasoning with Temporal Alignment across Modalities", 2025.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from avrt_lib.config import SourceConfig
from avrt_lib.errors import DataError
from avrt_lib.ingest.readers.base import (
    Media,
    Parsed,
    SourceRow,
    answer_index,
    option_list,
    optional_text,
    parse_rows,
    read_json_rows,
    source_path,
    text_field,
)

_KNOWN = frozenset(("Question", "Choice", "Answer", "video_id", "Type"))


def to_row(raw: Mapping[str, Any], where: str, number: int) -> Parsed:
    """One Daily-Omni row; ``number`` counts the questions about its clip, since the rows have no ids.

    Raises:
        RowError: why the row is no question.
    """
    clip = text_field(raw, "video_id")
    options = option_list(raw.get("Choice"), "Choice")
    return SourceRow(
        id=f"{clip}-{number}",
        where=where,
        question=text_field(raw, "Question"),
        options=options,
        answer_index=answer_index(raw.get("Answer"), options),
        question_type=optional_text(raw, "Type"),
        # The rows do not say which modality is needed.
        needs="unknown",
        group=clip,
        media=Media(video=(f"Videos/{clip}/{clip}_video.mp4",), optional_audio=(f"Videos/{clip}/{clip}_audio.wav",)),
        extra={key: value for key, value in raw.items() if key not in _KNOWN},
    )


def read(source: SourceConfig) -> list[Parsed]:
    """The rows of a folder with ``qa.json`` and ``Videos/ID/ID_video.mp4`` (and ``ID_audio.wav``).

    Raises:
        DataError: where the folder or its ``qa.json`` is missing.
    """
    place = source_path(source.path)
    file = place if place.is_file() else place / "qa.json"
    if not file.is_file():
        raise DataError(f"{place} holds no qa.json: name the folder that has it and the Videos folder.")
    numbers: Counter[str] = Counter()

    def numbered(raw: Mapping[str, Any], where: str) -> Parsed:
        clip = str(raw.get("video_id"))
        numbers[clip] += 1
        return to_row(raw, where, numbers[clip])

    return parse_rows(read_json_rows(file), file, file.parent, numbered, source.count)
