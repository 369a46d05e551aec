"""Models in the object store: a model's place is the hash of its content, and nothing there is ever overwritten."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from avrt_lib.config import StoreConfig
from avrt_lib.errors import ConfigError, DataError, StoreError
from avrt_lib.models import is_published, read_manifest, verify_manifest
from avrt_lib.tables import MANIFEST, atomic_path, locked, sha256_file

if TYPE_CHECKING:
    from minio import Minio

log = logging.getLogger("avrt.store")

_PART_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Where the store is and who we are there.

    Attributes:
        endpoint: ``host:port`` without a scheme.
        secure: TLS or not.
    """

    endpoint: str
    secure: bool
    access_key: str
    secret_key: str
    region: str

    @classmethod
    def from_environment(cls) -> S3Settings:
        """Read ``AVRT_S3_ENDPOINT``, ``_SECURE`` (0 or 1), ``_ACCESS_KEY``, ``_SECRET_KEY`` and ``_REGION``.

        Raises:
            ConfigError: the message names the variable that is missing.
        """
        # A line break of the file that a key was kept in is no part of it, and no header may hold it.
        values = {key: os.environ.get(f"AVRT_S3_{key}", "").strip() for key in ("ENDPOINT", "ACCESS_KEY", "SECRET_KEY")}
        for key, value in values.items():
            if not value:
                raise ConfigError(f"AVRT_S3_{key} is not set: name the object store, or set store.kind=local.")
        if "://" in values["ENDPOINT"]:
            raise ConfigError("AVRT_S3_ENDPOINT is host:port without a scheme; AVRT_S3_SECURE=1 turns TLS on.")
        return cls(
            values["ENDPOINT"],
            os.environ.get("AVRT_S3_SECURE", "1") != "0",
            values["ACCESS_KEY"],
            values["SECRET_KEY"],
            os.environ.get("AVRT_S3_REGION", "us-east-1"),
        )

    def environment(self) -> dict[str, str]:
        """The variables that ``from_environment`` reads."""
        return {
            "AVRT_S3_ENDPOINT": self.endpoint,
            "AVRT_S3_SECURE": "1" if self.secure else "0",
            "AVRT_S3_ACCESS_KEY": self.access_key,
            "AVRT_S3_SECRET_KEY": self.secret_key,
            "AVRT_S3_REGION": self.region,
        }

    def connect(self, *, attempts: int = 5, timeout_s: float = 60.0) -> Minio:
        """A client of this store."""
        import certifi
        import urllib3
        from minio import Minio

        pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=min(timeout_s, 10.0), read=timeout_s),
            cert_reqs="CERT_REQUIRED",
            ca_certs=os.environ.get("AVRT_S3_CA_FILE") or os.environ.get("SSL_CERT_FILE") or certifi.where(),
            retries=urllib3.Retry(total=attempts - 1, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
        )
        return Minio(
            self.endpoint,
            access_key=self.access_key,
            secret_key=self.secret_key,
            secure=self.secure,
            region=self.region,
            http_client=pool,
        )


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """A published model: its address, the hash of its content, and how many files it has (manifest left out)."""

    uri: str
    sha256: str
    files: int


def client() -> Minio:
    """A client of the store that the environment names.

    Raises:
        ConfigError: where the environment does not name one.
    """
    return S3Settings.from_environment().connect()


def reachable(settings: S3Settings) -> bool:
    """Whether the store answers these credentials just now."""
    import urllib3
    from minio.error import MinioException

    try:
        settings.connect(attempts=1, timeout_s=2.0).list_buckets()
    except (MinioException, urllib3.exceptions.HTTPError):
        return False
    return True


@contextlib.contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Turn what the client raises into a ``StoreError`` that says what was being done."""
    import urllib3
    from minio.error import MinioException

    try:
        yield
    except (MinioException, urllib3.exceptions.HTTPError) as error:
        raise StoreError(f"{doing} failed: {' '.join(str(error).split())}.") from error


def default_bucket() -> str:
    """The bucket that the environment names (``AVRT_S3_BUCKET``)."""
    return os.environ.get("AVRT_S3_BUCKET", "avrt")


def local_root(work: Path) -> Path:
    """Where ``store.kind=local`` keeps models: ``AVRT_LOCAL_STORE``, or ``store`` in a work folder."""
    return Path(os.environ.get("AVRT_LOCAL_STORE") or work / "store").absolute()


def publish_model(folder: Path, name: str, store: StoreConfig, local_root: Path | None = None) -> ModelPlace:
    """Publish a model folder under its name and content hash.

    A model that is there already is checked and left as it is. ``manifest.json`` is written last, so a model with a
    manifest is whole.

    Args:
        folder: a model with a manifest.
        name: the registered model's name.
        store: kind ``s3`` puts it to ``s3://BUCKET/models/NAME/SHA256/``; kind ``local`` copies it to
            ``LOCAL_ROOT/models/NAME/SHA256``.
        local_root: for kind ``local``.

    Raises:
        DataError: where the folder is not what its manifest says.
        StoreError: where the store refuses, or holds something else at this place.
    """
    manifest = verify_manifest(folder)
    sha256, files = str(manifest["content_sha256"]), dict(manifest["files"])
    key = f"models/{name}/{sha256}"
    if store.kind == "local":
        if local_root is None:
            raise ConfigError("store.kind=local needs a folder to publish to.")
        target = local_root.absolute() / key
        with locked(target):
            if not is_published(target, manifest):
                with atomic_path(target) as temporary:
                    shutil.copytree(folder, temporary)
        return ModelPlace(target.as_uri(), sha256, len(files))
    with store_errors(f"Publishing {name} to s3://{store.bucket}/{key}"):
        connection = client()
        if not connection.bucket_exists(store.bucket):
            connection.make_bucket(store.bucket)
        upload_files(connection, store.bucket, key, folder, {path: entry["bytes"] for path, entry in files.items()})
        _put_manifest(connection, store.bucket, f"{key}/{MANIFEST}", folder / MANIFEST, sha256)
    return ModelPlace(f"s3://{store.bucket}/{key}", sha256, len(files))


def upload_files(connection: Minio, bucket: str, key: str, folder: Path, sizes: dict[str, int]) -> None:
    """Put the files that are not below ``key`` yet.

    Raises:
        StoreError: where an object of another size stands in a file's place; it is not overwritten.
    """
    there = {o.object_name: o.size for o in connection.list_objects(bucket, prefix=f"{key}/", recursive=True)}
    for path, size in sizes.items():
        place = f"{key}/{path}"
        if place in there:
            if there[place] != size:
                raise StoreError(
                    f"s3://{bucket}/{place} holds {there[place]} bytes where {size} are expected; published models are "
                    "never overwritten: remove the object to publish again."
                )
            continue
        connection.fput_object(bucket, place, str(folder / path), part_size=_PART_BYTES)
        log.info("uploaded %s (%d bytes)", place, size)


def _put_manifest(connection: Minio, bucket: str, place: str, path: Path, sha256: str) -> None:
    present = read_object(connection, bucket, place)
    if present is None:
        connection.fput_object(bucket, place, str(path), content_type="application/json")
    elif json.loads(present).get("content_sha256") != sha256:
        raise StoreError(f"s3://{bucket}/{place} names another content than {sha256}: remove it to publish again.")


def read_object(connection: Minio, bucket: str, place: str) -> bytes | None:
    """The bytes of a small object, or None where there is none."""
    from minio.error import S3Error

    try:
        response = connection.get_object(bucket, place)
    except S3Error as error:
        if error.code in ("NoSuchKey", "NoSuchBucket"):
            return None
        raise
    try:
        return bytes(response.read())
    finally:
        response.close()
        response.release_conn()


def download_model(uri: str, target: Path) -> dict[str, Any]:
    """Fetch a published model with KServe's own storage library, as its storage initializer does on a cluster.

    Args:
        uri: ``s3://BUCKET/models/NAME/SHA256`` or ``file://…``; the last part is the content hash.
        target: the folder to make. One that holds this very model already is left as it is.

    Returns:
        The manifest.

    Raises:
        StoreError: where the model cannot be fetched, or is not what its address and manifest say.
    """
    expected = PurePosixPath(urlparse(uri).path).name
    with contextlib.nullcontext() if target.exists() else locked(target):
        if target.exists():
            manifest = verify_manifest(target)
            if manifest["content_sha256"] != expected:
                raise StoreError(
                    f"{target} holds model {manifest['content_sha256']}, not {expected}: choose another folder."
                )
            return manifest
        with atomic_path(target) as temporary:
            temporary.mkdir()
            _fetch(uri, temporary)
            try:
                _restore_empty_files(temporary)
                manifest = verify_manifest(temporary)
            except DataError as error:
                raise StoreError(f"{uri} is not whole: {error}") from error
            if manifest["content_sha256"] != expected:
                raise StoreError(f"{uri} holds model {manifest['content_sha256']}: its address names another content.")
    return manifest


def _fetch(uri: str, folder: Path) -> None:
    import boto3  # type: ignore[import-untyped]
    from kserve_storage import Storage  # type: ignore[import-untyped]

    scheme = urlparse(uri).scheme
    if scheme == "s3":
        variables = _aws_environment(S3Settings.from_environment())
    elif scheme == "file":
        variables, uri = {}, f"file://{unquote(urlparse(uri).path)}"
    else:
        raise StoreError(f"{uri}: only s3:// and file:// models can be fetched.")
    try:
        with _environment(variables), _fresh_session(boto3):
            Storage.download(uri, str(folder))
    # The library raises bare Exception and RuntimeError next to botocore's errors, and no common class.
    except Exception as error:
        raise StoreError(f"{uri} cannot be fetched: {' '.join(str(error).split())}.") from error


@contextlib.contextmanager
def _fresh_session(boto3: Any) -> Iterator[None]:
    """Keep boto3's default session, which remembers the first credentials it saw, out of the block."""
    session, boto3.DEFAULT_SESSION = boto3.DEFAULT_SESSION, None
    try:
        yield
    finally:
        boto3.DEFAULT_SESSION = session


def _restore_empty_files(folder: Path) -> None:
    """KServe's library leaves out objects of no bytes; a model's empty files are part of its content."""
    for name, entry in read_manifest(folder)["files"].items():
        if entry["bytes"] == 0 and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()


def _aws_environment(settings: S3Settings) -> dict[str, str | None]:
    host = settings.endpoint.rpartition(":")[0] or settings.endpoint
    bypass = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), host)))
    return {
        "AWS_ENDPOINT_URL": f"http{'s' if settings.secure else ''}://{settings.endpoint}",
        "AWS_ACCESS_KEY_ID": settings.access_key,
        "AWS_SECRET_ACCESS_KEY": settings.secret_key,
        "AWS_DEFAULT_REGION": settings.region,
        "AWS_EC2_METADATA_DISABLED": "true",
        # These would win over the four above, or point elsewhere.
        "AWS_ENDPOINT_URL_S3": None,
        "AWS_SESSION_TOKEN": None,
        "AWS_PROFILE": None,
        "awsAnonymousCredential": None,
        "S3_USER_VIRTUAL_BUCKET": None,
        "NO_PROXY": bypass,
        "no_proxy": bypass,
    }


@contextlib.contextmanager
def _environment(variables: dict[str, str | None]) -> Iterator[None]:
    """Set (or with None unset) variables for the block only."""
    before = {name: os.environ.get(name) for name in variables}
    _apply(variables)
    try:
        yield
    finally:
        _apply(before)


def _apply(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file below a folder, a manifest at its top left out."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
