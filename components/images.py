"""The container images that the components run in, named in one place.

Three images follow from the dependencies: ``pipeline`` has no torch, ``train`` has torch and TRL, ``vllm`` has vLLM.
The local runner ignores them. ``make images`` builds them and writes build/images.json, which ``built`` reads: its tags
hold a hash of the contents, so a changed image is a changed parameter for KFP's cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from avrt_lib import __version__
from avrt_lib.errors import ConfigError

#: What ``make images`` writes in the repository.
BUILT = Path(__file__).resolve().parent.parent / "build" / "images.json"


@dataclass(frozen=True)
class Images:
    """References of the three images; with a content tag or a digest a moved tag cannot change a run."""

    pipeline: str = f"avrt/pipeline:{__version__}"
    train: str = f"avrt/train:{__version__}"
    vllm: str = f"avrt/vllm:{__version__}"

    def at(self, registry: str | None) -> Images:
        """The same ones, from a registry."""
        prefix = f"{registry.rstrip('/')}/" if registry else ""
        return Images(prefix + self.pipeline, prefix + self.train, prefix + self.vllm)


DEFAULT = Images()


def built(path: Path = BUILT, *, registry: str | None = None, variant: str | None = None) -> Images | None:
    """The images that were built.

    Args:
        path: build/images.json.
        registry: the prefix that the cluster takes images from. What was pushed there is named by its digest; what was
            not, by its content tag. None: the names as they were built.
        variant: ``cpu`` or ``cuda``, what the cluster needs; None: any.

    Returns:
        None where nothing was built.

    Raises:
        ConfigError: where the file is damaged, an image is missing in it, or another variant was built.
    """
    if not path.exists():
        return None
    try:
        return _read(path, registry, variant)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it, then make images"
        ) from error


def _read(path: Path, registry: str | None, variant: str | None) -> Images:
    entries = json.loads(path.read_text(encoding="utf-8"))["images"]
    found = {}
    for name in ("pipeline", "train", "vllm"):
        if name not in entries:
            raise ConfigError(f"{path} has no image {name}: make images")
        entry = entries[name]
        if variant is not None and entry["variant"] != variant:
            raise ConfigError(f"{path} holds {entry['variant']} images: make images VARIANT={variant}")
        found[name] = entry["reference"]
        if registry is not None:
            prefix = registry.rstrip("/")
            found[name] = entry.get("pushed", {}).get(prefix, f"{prefix}/{entry['reference']}")
    return Images(**found)
