"""What every reader gives: typed source rows, and rejections with their reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from avrt_lib.errors import DataError
from avrt_lib.records import LETTERS

#: Reasons why a source row does not become a sample; a rejection's text is one of these, a colon and the details.
INVALID_ROW = "invalid row"
DUPLICATE_ID = "duplicate id"
MEDIA_MISSING = "media missing"
MEDIA_REFUSED = "media path refused"
MEDIA_INVALID = "media invalid"

#: As Qwen's, Kimi's and Llama's tokenizers read them out of plain text too: a place for media, or the end of a turn.
_CONTROL_TOKEN = re.compile(r"<\|[A-Za-z_]+\|>")
_LETTER_PREFIX = re.compile(r"\s*[(\[]?([A-Ha-h])[)\].:]\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Media:
    """Where a row's media may lie: relative paths, the first that exists counts; empty where it has none.

    ``optional_audio`` is taken where it is there, and otherwise the video's own sound track stands.
    """

    video: tuple[str, ...] = ()
    audio: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    optional_audio: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One question as its data set states it, checked, with its media found but not decoded.

    Attributes:
        id, question, options, answer_index, question_type, needs, group: as in ``avrt_lib.records.Sample``.
        where: file and row, as a message shows them.
        media: where its media may lie below ``root``.
        named_group: whether the clip's name identifies it everywhere, so that the same name in two files is one clip.
        extra: what else the row holds.
        video, audio, image: the files that were found.
    """

    id: str
    where: str
    question: str
    options: list[str]
    answer_index: int | None
    question_type: str
    needs: str
    group: str
    media: Media
    named_group: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    video: Path | None = None
    audio: Path | None = None
    image: Path | None = None


@dataclass(frozen=True, slots=True)
class Rejection:
    """A source row that is no question, and why; ``reason`` is a category, a colon and the details."""

    id: str
    where: str
    reason: str

    @classmethod
    def of(cls, row_id: str, where: str, category: str, details: str) -> Rejection:
        """A rejection of one category."""
        return cls(row_id, where, f"{category}: {details}")

    @property
    def category(self) -> str:
        """The reason without its details, for counting."""
        return self.reason.partition(": ")[0]


Parsed: TypeAlias = SourceRow | Rejection
#: A format's pure function: a raw row, where it stands, and the format's settings, to a source row or a rejection.
Parse: TypeAlias = Callable[[Mapping[str, Any], str], Parsed]


class RowError(ValueError):
    """Why a row is not valid; readers turn it into a rejection."""


def text_field(row: Mapping[str, Any], key: str) -> str:
    """A field that must hold text (numbers are taken as text).

    Raises:
        RowError: where it is absent, empty or of another type.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"{key} is missing" if value is None else f"{key} must be text, not {type(value).__name__}")
    text = _storable(str(value).strip(), key)
    if not text:
        raise RowError(f"{key} is empty")
    return text


def optional_text(row: Mapping[str, Any], key: str, default: str = "unknown") -> str:
    """A field that may be absent.

    Raises:
        RowError: where it is there and no text.
    """
    return default if row.get(key) in (None, "") else text_field(row, key)


def _storable(text: str, key: str) -> str:
    if token := _CONTROL_TOKEN.search(text):
        raise RowError(f"{key} holds {token[0]}, which is a control token to language models")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{key} holds half a character (a lone surrogate), which no file can store") from error
    return text


def option_list(value: Any, key: str) -> list[str]:
    """Two to eight different option texts, without letters.

    Letters in front (``A. rain``, ``(B) wind``) are taken off where every option has its own.

    Raises:
        RowError: where they are no list, too few, too many, empty or not different.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RowError(f"{key} must be a list of texts, not {type(value).__name__}")
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in value):
        raise RowError(f"{key} must hold texts only")
    options = [_storable(str(item).strip(), key) for item in value]
    if not 2 <= len(options) <= len(LETTERS):
        raise RowError(f"{key} has {len(options)} options; 2 to {len(LETTERS)} can be asked")
    matches = [_LETTER_PREFIX.fullmatch(option) for option in options]
    if all(m is not None and m[1].upper() == LETTERS[i] and m[2].strip() for i, m in enumerate(matches)):
        options = [m[2].strip() for m in matches if m is not None]
    if any(not option for option in options):
        raise RowError(f"{key} has an empty option")
    if len({" ".join(option.split()).casefold() for option in options}) < len(options):
        raise RowError(f"{key} has the same option twice")
    return options


def answer_index(value: Any, options: Sequence[str]) -> int | None:
    """The index of the right option from an index that counts from 0, a letter, or an option's text.

    Text wins over letter, and letter over index, where a value could be either (options that are numbers or letters).

    Returns:
        The index, or None where the value is absent or empty (a question without a label).

    Raises:
        RowError: where the value is none of the options.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"the answer must be an index, a letter or a text, not {type(value).__name__}")
    if isinstance(value, float) and not value.is_integer():
        raise RowError(f"the answer {value} is no index")
    if isinstance(value, int | float):
        index = int(value)
        if not 0 <= index < len(options):
            raise RowError(f"the answer index {index} is outside 0 to {len(options) - 1}")
        return index
    wanted = " ".join(value.split()).casefold()
    for i, option in enumerate(options):
        if " ".join(option.split()).casefold() == wanted:
            return i
    lettered = re.fullmatch(r"[(\[]?([a-h])(?:[)\].:]+\s*(.*))?", wanted, re.DOTALL)
    if lettered and LETTERS.lower().index(lettered[1]) < len(options):
        index = LETTERS.lower().index(lettered[1])
        if lettered[2] and lettered[2] != " ".join(options[index].split()).casefold():
            raise RowError(f"the answer {value!r} has the letter of another option than its text")
        return index
    if re.fullmatch(r"\d+(?:\.0+)?", wanted):
        # Python refuses to read a number of thousands of digits.
        return answer_index(int(wanted.partition(".")[0]) if len(wanted) < 10 else len(options), options)
    raise RowError(f"the answer {value!r} is none of the {len(options)} options")


def inside(root: Path, relative: str) -> Path:
    """The path that a row names, below its root.

    What counts is the name: links that lie in the folder are followed, since whoever set the folder up put them there
    (the caches of model hubs are made of links).

    Raises:
        RowError: where the name leads out of the root.
    """
    if "\0" in relative:
        raise RowError("a media path holds a null character")
    top = os.path.abspath(root)  # noqa: PTH100 - resolves `..` by name, and no links
    path = os.path.normpath(os.path.join(top, relative))  # noqa: PTH118
    if path == top or not PurePosixPath(path).is_relative_to(top):
        raise RowError(f"{relative!r} leads out of {root}: name a path below it")
    return Path(path)


def locate(row: SourceRow, root: Path) -> Parsed:
    """Find the media files of a row below ``root``; a row whose media are refused or missing becomes a rejection."""
    found: dict[str, Path] = {}
    for kind in ("video", "audio", "image", "optional_audio"):
        candidates: tuple[str, ...] = getattr(row.media, kind)
        try:
            paths = [inside(root, candidate) for candidate in candidates]
        except RowError as error:
            return Rejection.of(row.id, row.where, MEDIA_REFUSED, str(error))
        here = next((path for path in paths if os.path.isfile(path)), None)  # noqa: PTH113 - never raises
        if here is not None:
            found[kind] = here
        elif candidates and kind != "optional_audio":
            return Rejection.of(row.id, row.where, MEDIA_MISSING, f"{candidates[0]} is not in {root}")
    audio = found.get("audio") or found.get("optional_audio")
    return replace(row, video=found.get("video"), audio=audio, image=found.get("image"))


def parse_rows(raw: Sequence[Any], file: Path, root: Path, parse: Parse, count: int | None) -> list[Parsed]:
    """Parse, check and locate the first ``count`` raw rows of a file; a second row with an id is rejected."""
    rows: list[Parsed] = []
    seen: set[str] = set()
    for number, item in enumerate(raw[:count] if count is not None else raw):
        where = f"{file.name}:{number + 1}"
        fallback = f"row-{number + 1}"
        if not isinstance(item, Mapping):
            rows.append(Rejection.of(fallback, where, INVALID_ROW, "it is no object with fields"))
            continue
        try:
            row = parse(item, where)
        except RowError as error:
            named = str(item.get("id", fallback)).encode("utf-8", "backslashreplace").decode()
            row = Rejection.of(named, where, INVALID_ROW, str(error))
        if isinstance(row, SourceRow):
            if row.id in seen:
                row = Rejection.of(row.id, where, DUPLICATE_ID, f"an earlier row has the id {row.id}")
            else:
                seen.add(row.id)
                row = locate(row, root)
        rows.append(row)
    return rows


def read_json_rows(file: Path) -> list[Any]:
    """The list of rows that a JSON file holds.

    Raises:
        DataError: where it is absent, no JSON, or no list; the message names it.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"There is no annotation file {file}: check the path.") from error
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of too many digits
        raise DataError(f"{file} is not valid JSON: {error}.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    if not isinstance(document, list):
        raise DataError(f"{file} must hold a list of rows, not {type(document).__name__}.")
    return document


def source_path(path: str | None, key: str = "path") -> Path:
    """The existing file or folder that a source names.

    Raises:
        DataError: where none is named, or it does not exist.
    """
    if not path:
        raise DataError(f"This data format needs a {key}: name the folder or file of the data set.")
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"There is no data set at {place}: check the path.")
    return place
