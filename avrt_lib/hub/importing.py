"""A model that came by disk: checked as a pull would check it, and published."""

from __future__ import annotations

import shutil
from pathlib import Path

from avrt_lib.hub import folder as folders
from avrt_lib.hub.folder import Published
from avrt_lib.hub.prepare import origin_of


def import_folder(source: Path, to: str, *, name: str | None = None, revision: str | None = None) -> Published:
    """Check a model folder, copy it and publish it. Links, as a hub's cache folder holds them, become files.

    Args:
        source: the folder; it stays as it is.
        to: ``s3://BUCKET``, or a folder.
        name: the model's id; by default what the folder's manifest says, or the folder's name.
        revision: its commit; by default what the folder's manifest says.

    Raises:
        DataError: a pickle, a missing or damaged file, or one that differs from the manifest or ``SHA256SUMS``.
        ConfigError: code of the model is missing or lies in another repository, or ``to`` is inside of the folder.
    """
    source = folders.source_folder(source, to)
    folders.check(source)
    compared = folders.verify_sums(source)
    code = folders.code_of(source)
    known_name, known_revision = origin_of(source)
    name, revision = name or known_name or source.name, revision or known_revision
    made_by = {"by": "avrt models import", "model": name, "revision": revision, "compared": compared, "code": code}
    with folders.staging(to, name) as staged:
        shutil.rmtree(staged)
        shutil.copytree(source, staged, ignore=shutil.ignore_patterns(".cache", ".git", folders.SUMS))
        address = folders.publish(staged, name, to, made_by)
    return Published(name, revision, address)
