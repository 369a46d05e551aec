"""Readers: one module per data set format, each with a pure function from a raw row to a source row or a rejection."""

from __future__ import annotations

from collections.abc import Callable

from avrt_lib.config import SourceConfig
from avrt_lib.errors import ConfigError
from avrt_lib.ingest.readers import avqa, daily_omni, manifest, miniature
from avrt_lib.ingest.readers.base import Parsed, Rejection, SourceRow
from avrt_lib.workspace import Workspace

__all__ = ["FORMATS", "MINIATURE", "READERS", "Parsed", "Rejection", "SourceRow", "check_format", "read"]

MINIATURE = "miniature"
READERS: dict[str, Callable[[SourceConfig], list[Parsed]]] = {
    "avqa": avqa.read,
    "daily-omni": daily_omni.read,
    "manifest": manifest.read,
}
FORMATS = (*READERS, MINIATURE)


def check_format(source: SourceConfig, split: str) -> None:
    """Raise where no reader knows the format.

    Raises:
        ConfigError: the message lists the formats.
    """
    if source.format not in FORMATS:
        raise ConfigError(
            f"data.{split}.format: there is no data format {source.format!r}; known: {', '.join(FORMATS)}."
        )


def read(source: SourceConfig, split: str, workspace: Workspace) -> list[Parsed]:
    """All rows of a source, in its order; nothing is left out without a rejection.

    Raises:
        ConfigError: unknown format, or settings that it needs and lacks.
        DataError: where the source itself is missing or damaged.
    """
    check_format(source, split)
    if source.format == MINIATURE:
        return miniature.read(source, split, workspace)
    return READERS[source.format](source)
