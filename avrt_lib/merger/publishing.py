"""Publish merged traces, so that other runs can train on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from avrt_lib.config import Config
from avrt_lib.errors import ConfigError
from avrt_lib.records import Merged
from avrt_lib.store.folders import publish_table
from avrt_lib.tables import read_rows, write_json
from avrt_lib.workspace import Workspace

PLACE = "traces.json"


def run(config: Config, *, workspace: Workspace, merged: Path, published: Path) -> dict[str, Any]:
    """Put the merged table to the object store.

    Args:
        config: ``store`` is read.
        workspace: the step's scratch.
        merged: the merged table.
        published: gets ``traces.json``, the returned facts.

    Returns:
        ``uri`` (what ``--traces`` of a training run takes) and ``rows`` (with a reasoning).

    Raises:
        ConfigError: where there is no object store to publish to.
        StoreError: where the store refuses.
    """
    if config.store.kind != "s3":
        raise ConfigError("Traces are published to an object store: set store.kind=s3.")
    rows = sum(bool(row.reasoning) for row in read_rows(merged, Merged, columns=["reasoning"]))
    facts = {"uri": publish_table(merged, "traces", config.store.bucket), "rows": rows}
    published.mkdir(parents=True, exist_ok=True)
    write_json(published / PLACE, facts)
    return facts
