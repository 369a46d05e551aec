"""Make the buckets that are absent, in the store that AVRT_S3_… names: a Job of manifests/components/external-s3."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from avrt_lib.errors import AvrtError
from avrt_lib.store.objects import S3Settings, store_errors

log = logging.getLogger("avrt.store")


def make_missing(names: Sequence[str]) -> list[str]:
    """Make the buckets that are not there.

    Returns:
        Those that were made.

    Raises:
        ConfigError: where the environment names no store.
        StoreError: where the store cannot be reached or refuses.
    """
    settings = S3Settings.from_environment()
    connection = settings.connect()
    made = []
    for name in names:
        with store_errors(f"Making the bucket {name} at {settings.endpoint}"):
            if not connection.bucket_exists(name):
                connection.make_bucket(name, location=settings.region)
                made.append(name)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is absent; the exit code of a store's error where that fails."""
    parser = argparse.ArgumentParser(prog="avrt-buckets", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="BUCKET")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        made = make_missing(options.names)
    except AvrtError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    log.info("made: %s", ", ".join(made) or "none, all are there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
