"""A cheap hash of what the data sources hold, for caches that know a pipeline's parameters and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from avrt_lib.config import DataConfig, SourceConfig
from avrt_lib.ingest.readers import MINIATURE, READERS, Rejection, check_format
from avrt_lib.ingest.readers.avqa import annotation_file
from avrt_lib.ingest.readers.base import source_path
from avrt_lib.tables import sha256_file


def fingerprint(data: DataConfig) -> str:
    """Hash of the sources' content: annotation bytes, and name and size of every media file that a row uses.

    Times and absolute places do not count, so that a moved or copied data set stays the same. Media bytes are not read;
    the samples hold their hashes.

    Raises:
        ConfigError: unknown format.
        DataError: where a source is missing or damaged.
    """
    digest = hashlib.sha256()
    for split in ("train", "validation", "test", "all"):
        source: SourceConfig | None = getattr(data, split)
        if source is not None:
            check_format(source, split)
            digest.update(f"{split}\0{source.format}\0{source.count}\0".encode())
            digest.update(_source(source))
    return digest.hexdigest()


def _source(source: SourceConfig) -> bytes:
    digest = hashlib.sha256()
    if source.format == MINIATURE:
        return hashlib.sha256(f"seed {source.seed}".encode()).digest()
    digest.update(json.dumps(source.columns, sort_keys=True).encode())
    file = _annotations(source)
    digest.update(sha256_file(file).encode())
    for row in READERS[source.format](source):
        if isinstance(row, Rejection):
            digest.update(f"{row.id}\0{row.category}\n".encode())
            continue
        for path in (row.video, row.audio, row.image):
            if path is not None:
                name = os.path.relpath(path, file.parent)
                digest.update(f"{name}\0{path.stat().st_size}\n".encode())
    return digest.digest()


def _annotations(source: SourceConfig) -> Path:
    place = source_path(source.path)
    if place.is_file():
        return place
    return place / "qa.json" if source.format == "daily-omni" else annotation_file(place)
