"""Published models on this machine: fetched once from the store, by the hash of their content."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avrt_lib.errors import ConfigError, DataError, DiskFullError, EnvironmentProblem, StoreError
from avrt_lib.models import check_names, content_sha256, read_manifest
from avrt_lib.store.objects import client, read_object, store_errors
from avrt_lib.tables import MANIFEST, locked, sha256_file, write_json

if TYPE_CHECKING:
    from minio import Minio

log = logging.getLogger("avrt.hub")

VARIABLE = "AVRT_MODEL_CACHE"
_ADDRESS = re.compile(r"s3://(?P<bucket>[^/]+)/(?P<key>.+/(?P<sha256>[0-9a-f]{64}))/?")
_CONNECTIONS = 4


def cache_folder() -> Path:
    """Where fetched models are kept: ``AVRT_MODEL_CACHE``, or this user's own folder among the temporary ones.

    Raises:
        EnvironmentProblem: where somebody else made the latter, who could change models after they were checked.
    """
    given = os.environ.get(VARIABLE)
    folder = Path(given or Path(tempfile.gettempdir()) / f"avrt-models-{os.getuid()}").absolute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not given and folder.stat().st_uid != os.getuid():
        raise EnvironmentProblem(f"{folder} belongs to another user: name a folder of your own with {VARIABLE}.")
    return folder


def fetch(uri: str) -> Path:
    """The local folder of a published model; the first call on a machine downloads it.

    Files are checked against the manifest, and the manifest against the address, before the folder appears. A download
    that was cut short goes on with the files that are missing. Several processes may ask at once: one downloads.

    Args:
        uri: ``s3://BUCKET/…/SHA256``.

    Raises:
        ConfigError: where the address does not end in a content hash.
        StoreError: where the model is not there, or is not what its address and manifest say.
        DiskFullError: where the cache's disk cannot hold it.
    """
    found = _ADDRESS.fullmatch(uri)
    if found is None:
        raise ConfigError(
            f"{uri} does not end in a content hash (64 hexadecimal digits), so what lies there may change: publish the "
            "model with `avrt models pull` or `avrt models import` and use the address that it prints."
        )
    cache, sha256 = cache_folder(), found["sha256"]
    target = cache / sha256
    with locked(target):
        if not _is_whole(target, sha256):
            with store_errors(f"Fetching {uri}"):
                _download(client(), found["bucket"], found["key"], sha256, target)
    return target


def _is_whole(folder: Path, sha256: str) -> bool:
    """Whether a folder that was checked when it was made still has its files; contents are not hashed again.

    One that is not whole becomes a download that was cut short.
    """
    if not folder.is_dir():
        return False
    try:
        manifest = read_manifest(folder)
        sizes = {folder / name: entry["bytes"] for name, entry in manifest["files"].items()}
        whole = manifest.get("content_sha256") == sha256 and all(
            path.is_file() and path.stat().st_size == size for path, size in sizes.items()
        )
    except DataError:  # the manifest is gone or damaged
        whole = False
    if not whole:
        log.warning("%s is not whole: what is missing is fetched again", folder)
        partial = _partial(folder)
        if partial.exists():
            shutil.rmtree(partial)
        folder.rename(partial)
    return whole


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _download(connection: Minio, bucket: str, key: str, sha256: str, target: Path) -> None:
    uri = f"s3://{bucket}/{key}"
    text = read_object(connection, bucket, f"{key}/{MANIFEST}")
    if text is None:
        raise StoreError(f"{uri} holds no model (it has no {MANIFEST}): publish it with `avrt models pull`.")
    manifest = json.loads(text)
    files: dict[str, dict[str, Any]] = manifest["files"]
    if content_sha256(files) != sha256:
        raise StoreError(f"{uri} lists other files than its address names: publish the model again.")
    try:
        check_names(files, uri)
    except DataError as error:
        raise StoreError(str(error)) from error
    partial = _partial(target)
    partial.mkdir(exist_ok=True, mode=0o700)
    for path in partial.rglob("*"):  # a loader takes every file of weights that it finds
        if path.is_file() and path.relative_to(partial).as_posix() not in files:
            path.unlink()
    left = {n: e for n, e in files.items() if not _matches(partial / n, e)}
    _require_space(target.parent, sum(entry["bytes"] for entry in left.values()), uri)

    def get(name: str) -> None:
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if files[name]["bytes"] == 0:
            path.touch()
        else:
            connection.fget_object(bucket, f"{key}/{name}", str(path))
        if not _matches(path, files[name]):
            path.unlink(missing_ok=True)
            raise StoreError(f"{uri}/{name} is not what the manifest says: publish the model again.")

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for done in [pool.submit(get, name) for name in left]:
            done.result()
    write_json(partial / MANIFEST, manifest)
    partial.rename(target)
    log.info("fetched %s to %s", uri, target)


def _matches(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]


def _require_space(folder: Path, size: int, uri: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DiskFullError(
            f"{uri} needs {size / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} are free: free some, or name "
            f"another folder with {VARIABLE}."
        )
