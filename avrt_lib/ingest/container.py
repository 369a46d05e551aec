"""Opening media files: what is refused unread, and FFmpeg's complaints as typed errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
import av.error

from avrt_lib.errors import MediaError

if TYPE_CHECKING:
    from av.container import InputContainer

#: How much of the promised length must be there. Muxers round, and encoders pad, by a few frames at most.
COMPLETE = 0.9
# Playlists (HLS, concat, DASH) name other files and addresses, so a "clip" of such a format could read anything that
# the process can read. Only containers that hold their own media are opened.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    "avi",
    "mpegts",
    "mpeg",
    "mpegvideo",
    "flv",
    "asf",
    "ogg",
    "wav",
    "w64",
    "mp3",
    "aac",
    "flac",
    "aiff",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a single media file may be at most; a clip beyond a limit is refused rather than decoded.

    Attributes:
        file_bytes: size of one file.
        duration_s: length of a clip.
        pixels: width times height of a picture (the default is 8K).
        aspect: longest side over shortest side; the students' processors refuse more than 200.
        decode_s: how long decoding may take.
    """

    file_bytes: int = 4 * 2**30
    duration_s: float = 4 * 3600.0
    pixels: int = 7680 * 4320
    aspect: float = 100.0
    decode_s: float = 600.0


def check_file(path: Path, limits: Limits) -> None:
    """Refuse what is no regular file, is empty, or is larger than the limit.

    Raises:
        MediaError: the message names the file and the mend.
    """
    if not path.is_file():
        raise MediaError(f"{path} is not there: put the file in place, or remove its rows.")
    size = path.stat().st_size
    if size == 0:
        raise MediaError(f"{path} is empty (0 bytes): fetch it again, or remove its rows.")
    if size > limits.file_bytes:
        raise MediaError(
            f"{path} has {size / 2**30:.1f} GiB, more than the {limits.file_bytes / 2**30:.1f} GiB that are read: "
            "cut it into clips first."
        )


@contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """The file as an open container; whatever FFmpeg says about it in the block becomes a ``MediaError``."""
    try:
        # An absolute path, so that a file name with a colon is not taken for a protocol.
        with av.open(
            str(path.absolute()), options={"format_whitelist": ",".join(_CONTAINERS)}, metadata_errors="replace"
        ) as container:
            yield container
    except (av.error.FFmpegError, ArithmeticError, ValueError, RuntimeError, MemoryError, EOFError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise MediaError(
            f"{path} cannot be decoded ({what}): it is damaged or no media file; fetch it again."
        ) from error
