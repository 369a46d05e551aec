"""Folders of Parquet parts: atomic, checksummed, resumable.

A table is a folder with ``part-KEY.parquet`` files and, once it is complete, a ``manifest.json`` (schema version, kind,
rows, SHA-256 of each file, what made it). A part appears by rename, so a killed writer leaves whole parts only, and a
second writer on the same folder skips the keys that are there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic

import pyarrow as pa
import pyarrow.parquet as pq

from avrt_lib.errors import DataError, DiskFullError, EnvironmentProblem
from avrt_lib.records import MEASURED, SCHEMA_VERSION, SCHEMAS, R, to_row

MANIFEST = "manifest.json"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that becomes it when the block ends well, and goes away when it does not.

    Raises:
        DiskFullError: where the disk has no space left; what was there before stays as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    _discard(temporary)  # of a killed process whose number this one has got
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, target)
    except OSError as error:
        _discard(temporary)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"No space left on the disk that holds {target.parent}: free some, then start again with --resume."
            ) from error
        raise
    except BaseException:
        _discard(temporary)
        raise


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Let one writer at a time make ``target``, and remove what killed ones left of it: they hold the lock no more.

    Writers wait for each other across processes, containers and machines, as far as the file system's locks reach. The
    lock's file stays: a second one of its name could be held while the first one is.

    Raises:
        EnvironmentProblem: where the file system has no locks.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise EnvironmentProblem(
                f"The file system of {target.parent} has no locks ({error.strerror}): mount it with locks (flock), or "
                "name a folder on another one."
            ) from error
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            if "." not in left.name.removeprefix(f".{target.name}.").removesuffix(".tmp"):  # not of a longer name
                _discard(left)
        yield


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically, with its keys in the order given and a final newline."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Raises:
        DataError: where the file is absent or is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error


class TableWriter(Generic[R]):
    """Writes one table part by part.

    Args:
        folder: where the table lives; made if absent.
        kind: the record class of its rows.
        made_by: what to say in the manifest about the maker (step, model, configuration hash …).
    """

    def __init__(self, folder: Path, kind: type[R], made_by: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.kind: type[R] = kind
        self.made_by = made_by or {}
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, key: str) -> Path:
        """The path of the part with this key."""
        return self.folder / f"part-{key}.parquet"

    def has(self, key: str) -> bool:
        """Whether this part is committed."""
        return self.part(key).exists()

    def commit(self, key: str, rows: Iterable[R]) -> None:
        """Write the part, or replace it; it is there whole or not at all."""
        table = pa.Table.from_pylist([to_row(row) for row in rows], schema=SCHEMAS[self.kind])
        with atomic_path(self.part(key)) as temporary:
            pq.write_table(table, temporary, compression="zstd", store_schema=False)

    def finish(self) -> dict[str, Any]:
        """Write the manifest, which makes the table complete, and return it."""
        # What killed writers left: never read, but it would travel with the folder.
        for leftover in self.folder.glob(".part-*.tmp"):
            leftover.unlink(missing_ok=True)
        files = {
            path.name: {"sha256": sha256_file(path), "rows": pq.read_metadata(path).num_rows}
            for path in sorted(self.folder.glob("part-*.parquet"))
        }
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind.__name__.lower(),
            "rows": sum(entry["rows"] for entry in files.values()),
            "content_sha256": content_hash(self.folder, self.kind),
            "files": files,
            "made_by": self.made_by,
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest


def write_table(
    folder: Path, kind: type[R], rows: Iterable[R], made_by: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write a whole table of one part and return its manifest."""
    writer = TableWriter(folder, kind, made_by)
    writer.commit("00000", rows)
    return writer.finish()


def read_rows(
    folder: Path, kind: type[R], *, columns: list[str] | None = None, split: str | None = None
) -> Iterator[R]:
    """The records of a table, in the order of its parts.

    Args:
        folder: the table.
        kind: the record class; columns that are not read are left at an empty value of their type.
        columns: read these columns only (media are large).
        split: only the rows of this split (tables with a ``split`` column).

    Raises:
        DataError: where the table is incomplete, or a part does not have the columns of ``kind``.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != kind.__name__.lower():
        raise DataError(f"{folder} holds {manifest.get('kind')} rows, not {kind.__name__.lower()} rows.")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{folder} was written with schema version {manifest.get('schema_version')}, and this is {SCHEMA_VERSION}: "
            "make the table again."
        )
    schema = SCHEMAS[kind]
    wanted = list(columns or schema.names)
    if split is not None and "split" not in wanted:
        wanted.append("split")
    for name in manifest["files"]:
        file = folder / name
        if not file.exists():
            raise DataError(f"{file} is named in the manifest but missing: make the table again.")
        for row in _part_rows(file, wanted):
            if split is not None and row["split"] != split:
                continue
            if columns is not None:
                row = {f.name: row[f.name] if f.name in columns else _empty(f.type) for f in schema}
            yield kind(**row)


def _part_rows(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of one part; whatever is wrong with the file becomes a ``DataError`` that names it."""
    try:
        with pq.ParquetFile(file) as parquet:
            missing = [name for name in columns if name not in parquet.schema_arrow.names]
            if missing:
                raise DataError(f"{file} has no column {missing[0]!r}: make the table again.")
            for batch in parquet.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read ({error}): it was changed or cut short; make the table again."
        ) from error


def _empty(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return []
    return "" if pa.types.is_string(kind) else None


def verify(folder: Path) -> dict[str, Any]:
    """Check each file of a table against its manifest and return the manifest.

    Raises:
        DataError: the message names the first file that is missing or changed.
    """
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.exists():
            raise DataError(f"{file} is named in the manifest but missing.")
        if sha256_file(file) != entry["sha256"]:
            raise DataError(f"{file} does not have the SHA-256 of its manifest: it was changed or cut short.")
    return manifest


def content_hash(folder: Path, kind: type[R]) -> str:
    """SHA-256 over the rows of a table, measured columns left out; parts and their order do not matter."""
    digests: list[bytes] = []
    columns = [name for name in SCHEMAS[kind].names if name not in MEASURED]
    for file in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    digests.append(hashlib.sha256(repr(sorted(row.items())).encode()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def hash_folder(folder: Path) -> str:
    """SHA-256 over the relative names and bytes of every file below a folder (manifests of models, cache keys)."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(b"\0")
        digest.update(sha256_file(path).encode())
    return digest.hexdigest()


def place_folder(source: Path, target: Path) -> None:
    """Make ``target`` a copy of ``source`` (hard links where the file system allows), whole or not at all.

    What was there before is moved away just before the copy takes its place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        shutil.copytree(source, temporary / "new", copy_function=_link_or_copy)
        if target.exists():
            os.replace(target, temporary / "old")
        os.replace(temporary / "new", target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"No space left on the disk that holds {target.parent}: free some and try again."
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
        return target
    except OSError:
        return str(shutil.copy2(source, target))
