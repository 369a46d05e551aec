"""The procedural world: clips are rendered to files first, and then read as AVQA's are."""

from __future__ import annotations

from pathlib import Path

from avrt_lib.config import SourceConfig
from avrt_lib.errors import ConfigError
from avrt_lib.ingest.readers import avqa
from avrt_lib.ingest.readers.base import Parsed
from avrt_lib.workspace import Workspace


def read(source: SourceConfig, split: str, workspace: Workspace) -> list[Parsed]:
    """Render the split's clips into the step's scratch (those that are there stay), and read them.

    Raises:
        ConfigError: where the source does not say how many clips.
    """
    if source.count is None:
        raise ConfigError(f"data.{split}.count is needed: the miniature renders that many clips.")
    folder = rendered(source, split, workspace)
    if not (folder / "annotations.json").exists():
        # Only here, since real data sets need no renderer.
        from avrt_lib.miniature.world import render_dataset

        with workspace.progress(f"rendered {split} clips", source.count) as bar:
            render_dataset(folder, count=source.count, seed=source.seed, prefix=split, progress=bar.advance)
    return avqa.read(source.model_copy(update={"format": "avqa", "path": str(folder)}))


def rendered(source: SourceConfig, split: str, workspace: Workspace) -> Path:
    """Where a split's rendered clips lie: beside the step's output, so that they outlive a killed step."""
    return workspace.scratch / "rendered" / f"{split}-{source.count}-{source.seed}"
