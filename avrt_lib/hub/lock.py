"""``models.lock``: the commit of each hub model that a configuration may name, and where its files lie.

A JSON document ``{"ORG/NAME": {"revision": commit, "model": address}}`` beside the configuration files. It is written
by ``avrt models`` and read by ``avrt_lib.config.load``, which puts the address in the place of ``hub:ORG/NAME``. Commit
it with the configuration: a run is then of the same bytes everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path

from avrt_lib.tables import read_json, write_json


def record(lock: Path, name: str, revision: str, model: str) -> None:
    """Write one model's entry; the others stay as they are.

    Args:
        lock: the file; made if absent.
        name: ``ORG/NAME``, or ``ORG/NAME/ADAPTER``.
        revision: the full commit hash.
        model: an address that ``avrt_lib.models.resolve`` takes.
    """
    entries = read_json(lock) if lock.is_file() else {}
    entries[name] = {"revision": revision, "model": model}
    write_json(lock, json.loads(json.dumps(entries, sort_keys=True)))
