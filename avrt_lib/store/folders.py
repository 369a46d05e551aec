"""Tables in the object store: a table's place is the hash of its content, and nothing there is ever overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from urllib.parse import urlparse

from avrt_lib.errors import ConfigError, StoreError
from avrt_lib.store.objects import client, describe_files, read_object, store_errors, upload_files
from avrt_lib.tables import MANIFEST, atomic_path, sha256_file, verify


def publish_table(folder: Path, name: str, bucket: str) -> str:
    """Put a finished table to ``s3://BUCKET/NAME/SHA256/``, its manifest last, and return that address.

    One that is there already is left: the same rows may lie in other parts.

    Raises:
        DataError: where the table was changed after it was written.
        StoreError: where the store refuses.
    """
    manifest = verify(folder)
    key = f"{name}/{manifest['content_sha256']}"
    with store_errors(f"Publishing {folder.name} to s3://{bucket}/{key}"):
        connection = client()
        if not connection.bucket_exists(bucket):
            connection.make_bucket(bucket)
        if read_object(connection, bucket, f"{key}/{MANIFEST}") is not None:
            return f"s3://{bucket}/{key}"
        sizes = {path: entry["bytes"] for path, entry in describe_files(folder).items()}
        upload_files(connection, bucket, key, folder, sizes)
        connection.fput_object(bucket, f"{key}/{MANIFEST}", str(folder / MANIFEST), content_type="application/json")
    return f"s3://{bucket}/{key}"


def fetch_table(uri: str, target: Path) -> None:
    """Download a published table and check it against its manifest.

    Raises:
        ConfigError: where the address is not one of a table.
        StoreError: where it is not there or not whole.
    """
    parts = urlparse(uri)
    bucket, key = parts.netloc, parts.path.strip("/")
    if parts.scheme != "s3" or not bucket or not key:
        raise ConfigError(f"{uri} is no address of a published table: it has the form s3://BUCKET/NAME/SHA256.")
    with store_errors(f"Fetching {uri}"):
        connection = client()
        document = read_object(connection, bucket, f"{key}/{MANIFEST}")
        if document is None:
            raise StoreError(f"{uri} has no {MANIFEST}: it is not there, or was not published as a whole.")
        manifest = json.loads(document)
        if manifest.get("content_sha256") != key.rpartition("/")[2]:
            raise StoreError(f"{uri} holds another table than its address names: publish it anew.")
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed before it was done
        with atomic_path(target) as temporary:
            temporary.mkdir()
            for name, entry in manifest["files"].items():
                path = temporary / name
                if not path.resolve().is_relative_to(temporary.resolve()):
                    raise StoreError(f"The manifest of {uri} names a file outside of the table: {name}.")
                path.parent.mkdir(parents=True, exist_ok=True)
                connection.fget_object(bucket, f"{key}/{name}", str(path))
                if sha256_file(path) != entry["sha256"]:
                    raise StoreError(f"s3://{bucket}/{key}/{name} is not what its manifest says.")
            (temporary / MANIFEST).write_bytes(document)
