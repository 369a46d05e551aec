"""Reports of a run's steps in the object store, which make one summary of what ran in pods of their own.

``s3://BUCKET/runs/RUN/reports/INSTANCE.json`` holds the report of a step that ran. A step that the pipeline's cache
answers does not run, so each finished report is also kept under what the cache compares,
``reports/KEY/INSTANCE/CONTENT.json``, and taken from there where the run's other steps made what it took.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from avrt_lib import __version__
from avrt_lib.config import Config
from avrt_lib.errors import AvrtError
from avrt_lib.store.checkpoints import RUN_ID
from avrt_lib.store.objects import client, default_bucket, read_object, store_errors

if TYPE_CHECKING:
    from minio import Minio

log = logging.getLogger("avrt.store")

#: Set to ``store`` where steps run in pods of their own.
VARIABLE = "AVRT_RUN_REPORTS"
DATA_HASH = "AVRT_DATA_HASH"


def enabled() -> bool:
    """Whether this process's step tells the store how it ends."""
    return os.environ.get(VARIABLE) == "store" and bool(os.environ.get(RUN_ID))


def cache_key(config: Config) -> str:
    """What the pipeline's cache compares beside a step's inputs, as a hash.

    Args:
        config: what the step is given of the run's configuration.
    """
    parts = (config.to_json(), os.environ.get(DATA_HASH, ""), __version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def put(config: Config, instance: str, report: Mapping[str, Any]) -> None:
    """Keep a step's report. A store that is away costs the report, and not the step.

    Args:
        config: what the step was given of the run's configuration.
        instance: the step instance's name.
        report: how it ended; ``took`` and ``made`` list the identities of its inputs and outputs.
    """
    if not enabled():
        return
    document = json.dumps(dict(report), ensure_ascii=False).encode()
    places = [f"runs/{os.environ[RUN_ID]}/reports/{instance}.json"]
    if report.get("status") in ("succeeded", "skipped"):
        content = hashlib.sha256(json.dumps([report.get("took"), report.get("made")]).encode()).hexdigest()[:24]
        places.append(f"reports/{cache_key(config)}/{instance}/{content}.json")
    try:
        with store_errors(f"Keeping the report of {instance}"):
            connection, bucket = client(), default_bucket()
            if not connection.bucket_exists(bucket):
                connection.make_bucket(bucket)
            for place in places:
                connection.put_object(bucket, place, io.BytesIO(document), len(document), "application/json")
    except AvrtError as error:
        log.warning("%s", error)


def collect(parts: Mapping[str, Config | None]) -> dict[str, dict[str, Any]]:
    """The reports of this run's steps; those of steps that the cache answered say ``cached``.

    Args:
        parts: by step instance, in an order in which they can run: what it is given of the run's configuration, or
            None where no cache may answer for it.

    Raises:
        StoreError: where the store refuses.
    """
    reports: dict[str, dict[str, Any]] = {}
    made: set[str] = set()
    with store_errors("Reading the reports of the run"):
        connection, bucket = client(), default_bucket()
        for instance, part in parts.items():
            own = read_object(connection, bucket, f"runs/{os.environ[RUN_ID]}/reports/{instance}.json")
            if own is not None:
                found = [json.loads(own)]
            else:
                kept = _kept(connection, bucket, f"reports/{cache_key(part)}/{instance}/") if part else ()
                found = [{**report, "cached": True} for report in kept if made.issuperset(report.get("took") or ())]
            if found:
                reports[instance] = found[-1]
            made.update(output for report in found for output in report.get("made") or ())
    return reports


def _kept(connection: Minio, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """The reports below a prefix, oldest first."""
    for each in sorted(connection.list_objects(bucket, prefix=prefix), key=lambda each: each.last_modified):
        yield json.loads(read_object(connection, bucket, str(each.object_name)) or b"{}")


def put_document(name: str, document: bytes, kind: str) -> str:
    """Keep a document of the run, and return its address.

    Raises:
        StoreError: where the store refuses.
    """
    key = f"runs/{os.environ[RUN_ID]}/{name}"
    with store_errors(f"Keeping {name}"):
        bucket = default_bucket()
        client().put_object(bucket, key, io.BytesIO(document), len(document), kind)
    return f"s3://{bucket}/{key}"
