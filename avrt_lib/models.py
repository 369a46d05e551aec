"""Model folders: where a reference points, and the manifest that names what a folder holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from avrt_lib.config import HUB
from avrt_lib.errors import ConfigError, DataError, StoreError
from avrt_lib.tables import MANIFEST, read_json, sha256_file, write_json

BUILTIN = "builtin:"
WEIGHTS = Path(__file__).parent / "miniature" / "weights"


def resolve(reference: str) -> Path:
    """The local folder of a model reference.

    Args:
        reference: ``builtin:NAME`` (a tiny model of this package), a folder, or ``s3://…/SHA256`` of a published model,
            which is fetched once into this machine's cache (``avrt_lib.hub.cache``).

    Raises:
        ConfigError: where there is no such model; the message lists what there is.
        StoreError: where a published model cannot be fetched, or is not what its address says.
    """
    if reference.startswith(HUB):
        name = reference.removeprefix(HUB)
        raise ConfigError(
            f"{reference} is not pinned: `avrt models pull {name} --to FOLDER` (or s3://BUCKET) fetches it once and "
            "writes models.lock, which belongs beside the configuration; a run itself never asks a hub."
        )
    if reference.startswith("s3://"):
        from avrt_lib.hub.cache import fetch

        return fetch(reference)
    if reference.startswith(BUILTIN):
        folder = WEIGHTS / reference.removeprefix(BUILTIN)
        if not (folder / "config.json").exists():
            known = sorted(p.parent.name for p in WEIGHTS.glob("*/config.json"))
            raise ConfigError(
                f"There is no built-in model {reference!r}; known: {', '.join(BUILTIN + k for k in known)}."
            )
        return folder
    folder = Path(reference).expanduser()
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"{reference} is not a model folder (it has no config.json): name a local folder, s3://… or builtin:NAME."
        )
    return folder


def write_manifest(folder: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """Write a model folder's manifest (SHA-256 and size of each file, what made it) and return it."""
    files = {
        str(path.relative_to(folder)): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = {"kind": "model", "content_sha256": content_sha256(files), "files": files, "made_by": made_by}
    write_json(folder / MANIFEST, manifest)
    return manifest


def content_sha256(files: dict[str, dict[str, Any]]) -> str:
    """The hash of a model's content: of its files' names and hashes, as a manifest lists them."""
    return hashlib.sha256(json.dumps({k: v["sha256"] for k, v in files.items()}, sort_keys=True).encode()).hexdigest()


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Check a model folder against its manifest: each file's content, no file besides, and the content hash itself.

    Raises:
        DataError: the message names the first file that differs.
    """
    manifest = read_manifest(folder)
    files: dict[str, dict[str, Any]] = manifest["files"]
    verify_files(folder, files)
    if manifest.get("content_sha256") != content_sha256(files):
        raise DataError(f"{folder / MANIFEST} does not fit its own list of files: copy the model again.")
    return manifest


def verify_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Check that a model folder holds the files of a manifest and none besides.

    Raises:
        DataError: the message names the first file that differs.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            raise DataError(f"{path} is not what its manifest says: publish or download the model again.")
    # A loader takes every file of weights that it finds.
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST and str(path.relative_to(folder)) not in files:
            raise DataError(f"{path} is not in the model's manifest: take it out, or publish the model again.")


def is_published(target: Path, manifest: dict[str, Any]) -> bool:
    """Whether a model is in its place already; it is checked, and gets back a manifest that it lost.

    Args:
        target: the place of the model's content hash.
        manifest: of the model that is to be there.

    Raises:
        StoreError: where the folder holds something else.
    """
    if not target.exists():
        return False
    try:
        if (target / MANIFEST).exists():
            verify_manifest(target)
        else:
            verify_files(target, manifest["files"])
            write_json(target / MANIFEST, manifest)
    except DataError as error:
        raise StoreError(
            f"{target} was published before but has changed: {error} Remove it to publish again."
        ) from error
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a model folder, which lists files and none outside of it.

    Raises:
        DataError: where there is none, or it is no such document.
    """
    if not (folder / MANIFEST).exists():
        raise DataError(
            f"{folder} has no {MANIFEST}, so nobody can tell whether it is whole: remove the folder, and publish or "
            "download the model again."
        )
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DataError(f"{folder / MANIFEST} is no manifest of a model: it lists no files.")
    check_names(manifest["files"], str(folder / MANIFEST))
    return manifest


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse names that lead out of a model's folder.

    Raises:
        DataError: the message names the first.
    """
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{where} names {name}, which lies outside the model.")
