"""Checkpoints of a running training in the object store, so that another machine can go on from them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from avrt_lib.errors import ConfigError, StoreError
from avrt_lib.store.objects import client, default_bucket, describe_files, read_object, store_errors, upload_files
from avrt_lib.tables import MANIFEST, atomic_path, sha256_file

if TYPE_CHECKING:
    from minio import Minio

log = logging.getLogger("avrt.store")

RUN_ID = "AVRT_RUN_ID"
#: So many checkpoints of one training stay in the store.
_KEPT = 2


@dataclass(frozen=True, slots=True)
class CheckpointSink:
    """The checkpoints of one training of one run: ``s3://BUCKET/checkpoints/RUN/STEP/NAME/``.

    Attributes:
        bucket: the store's bucket.
        run_id: which run they belong to.
        step: the training step, and what tells one training of it from another (``sft/KEY``).
    """

    bucket: str
    run_id: str
    step: str

    def __call__(self, folder: Path, name: str) -> str:
        """Upload a checkpoint folder under a name (``checkpoint-50``), remove old ones, and return its address.

        Raises:
            StoreError: where the store refuses.
        """
        uri = push_checkpoint(folder, f"{self.step}/{name}", bucket=self.bucket, run_id=self.run_id)
        self._remove_older()
        return uri

    def latest(self, target: Path) -> Path | None:
        """Download the newest whole checkpoint below ``target``; None where the store has none."""
        return latest_checkpoint(self.step, target, bucket=self.bucket, run_id=self.run_id)

    def _remove_older(self) -> None:
        with store_errors(f"Removing old checkpoints of {self.step}"):
            connection = client()
            for prefix in _whole(connection, self.bucket, f"checkpoints/{self.run_id}/{self.step}/")[:-_KEPT]:
                _remove(connection, self.bucket, prefix)


def checkpoint_sink(step: str) -> CheckpointSink | None:
    """Where a training step saves its checkpoints; None where the environment names no store or no run."""
    run_id = os.environ.get(RUN_ID)
    if not run_id or not os.environ.get("AVRT_S3_ENDPOINT"):
        return None
    return CheckpointSink(default_bucket(), run_id, step)


def push_checkpoint(folder: Path, name: str, *, bucket: str | None = None, run_id: str | None = None) -> str:
    """Upload a training checkpoint to ``s3://BUCKET/checkpoints/RUN/NAME/``, its manifest last.

    A checkpoint of this name with the same content is left; one with another content is replaced (a resumed training
    writes the same step again).

    Args:
        folder: the checkpoint.
        name: its name in the run, such as ``grpo/checkpoint-40``.
        bucket: made if absent; None takes ``AVRT_S3_BUCKET``.
        run_id: the run; None reads ``AVRT_RUN_ID``.

    Raises:
        StoreError: where the store refuses.
    """
    bucket = bucket or default_bucket()
    key = f"checkpoints/{_run(run_id)}/{name}"
    files = describe_files(folder)
    document = json.dumps({"kind": "checkpoint", "files": files}, indent=2).encode()
    with store_errors(f"Saving the checkpoint s3://{bucket}/{key}"):
        connection = client()
        if not connection.bucket_exists(bucket):
            connection.make_bucket(bucket)
        if read_object(connection, bucket, f"{key}/{MANIFEST}") != document:
            _remove(connection, bucket, f"{key}/")
            upload_files(connection, bucket, key, folder, {path: entry["bytes"] for path, entry in files.items()})
            connection.put_object(bucket, f"{key}/{MANIFEST}", io.BytesIO(document), len(document))
    return f"s3://{bucket}/{key}"


def latest_checkpoint(step: str, target: Path, *, bucket: str | None = None, run_id: str | None = None) -> Path | None:
    """Download the newest whole checkpoint of a step, by the number at the end of its name.

    Args:
        step: what the names start with (``grpo`` for ``grpo/checkpoint-40``).
        target: the folder in which the checkpoint's own folder is made; one that differs is replaced.
        bucket, run_id: as for ``push_checkpoint``.

    Returns:
        The downloaded folder, or None where the run has no whole checkpoint of this step.

    Raises:
        StoreError: where the store refuses, or a file is not what the manifest says.
    """
    bucket = bucket or default_bucket()
    with store_errors(f"Fetching the last checkpoint of {step}"):
        connection = client()
        if not connection.bucket_exists(bucket):
            return None
        found = _whole(connection, bucket, f"checkpoints/{_run(run_id)}/{step}/")
        if not found:
            return None
        prefix = found[-1]
        document = read_object(connection, bucket, prefix + MANIFEST)
        if document is None:
            raise StoreError(f"s3://{bucket}/{prefix} lost its manifest while it was read.")
        files: dict[str, dict[str, Any]] = json.loads(document)["files"]
        folder = target / PurePosixPath(prefix).name
        if folder.is_dir() and describe_files(folder) == files:
            return folder
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for name, entry in files.items():
                path = temporary / name
                if not path.resolve().is_relative_to(temporary.resolve()):
                    raise StoreError(f"The manifest of s3://{bucket}/{prefix} names a file outside of it: {name}.")
                _download(connection, bucket, prefix + name, path, entry["sha256"])
            if folder.exists():  # a save that was cut short
                shutil.rmtree(folder)
    return folder


def _run(run_id: str | None) -> str:
    run = run_id or os.environ.get(RUN_ID)
    if not run:
        raise ConfigError(f"{RUN_ID} is not set: a checkpoint in the store belongs to a run.")
    return run


def _whole(connection: Minio, bucket: str, prefix: str) -> list[str]:
    """Prefixes of the checkpoints that have a manifest, oldest first; their names end in a number and hold no dots."""
    names = (str(o.object_name) for o in connection.list_objects(bucket, prefix=prefix, recursive=True))
    form = re.compile(rf"[\w-]*?(\d+)/{re.escape(MANIFEST)}", re.ASCII)
    found = ((name, form.fullmatch(name.removeprefix(prefix))) for name in names)
    numbers = {name.removesuffix(MANIFEST): int(match[1]) for name, match in found if match}
    return sorted(numbers, key=numbers.__getitem__)


def _remove(connection: Minio, bucket: str, prefix: str) -> None:
    # The manifest first: what has none does not count as a checkpoint.
    names = [str(o.object_name) for o in connection.list_objects(bucket, prefix=prefix, recursive=True)]
    for name in sorted(names, key=lambda name: name != prefix + MANIFEST):
        connection.remove_object(bucket, name)


def _download(connection: Minio, bucket: str, place: str, path: Path, sha256: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection.fget_object(bucket, place, str(path))
    if sha256_file(path) != sha256:
        raise StoreError(f"s3://{bucket}/{place} is not what its manifest says: remove it to go on from an older one.")
