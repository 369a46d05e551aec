"""From command-line options to a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import avrt_lib
from avrt_lib.config import Config, load, parse_set
from avrt_lib.errors import ConfigError, UsageError
from avrt_lib.licences import loaded_models
from avrt_lib.runs import RunFolder, sources

DEFAULT_CONFIG = Path("configs/miniature.yaml")
SPLITS = ("train", "validation", "test")

#: What --unfiltered sets: nothing is filtered, the gate lets it through, and the last model is served for the check.
UNFILTERED: dict[str, Any] = {
    "merger.keep": "all",
    "validation.max_flagged_share": 1.0,
    "validation.minimum_rows": 1,
    "validation.max_letter_share": 1.0,
    "deployment.serve_unpromoted": True,
}


def find_config(path: Path) -> Path:
    """A configuration file as given, or of this name among those that come with the package.

    Raises:
        ConfigError: where there is none; the message lists those that come with the package.
    """
    if path.is_file():
        return path
    package = Path(avrt_lib.__file__).parent
    shipped = [folder for folder in (package.parent / "configs", package / "configs") if folder.is_dir()]
    if not path.is_absolute():
        for folder in shipped:
            for candidate in (folder / path.name, folder / f"{path.name}.yaml"):
                if candidate.is_file() and path.parent.name in ("", "configs"):
                    return candidate
    known = ", ".join(sorted(f"configs/{file.name}" for folder in shipped for file in folder.glob("*.yaml")))
    raise ConfigError(f"There is no configuration file {path}; name one with --config (there are {known or 'none'}).")


def dataset_overrides(items: list[str]) -> dict[str, Any]:
    """Overrides for ``--dataset FORMAT:PATH`` (split by clip) or ``--dataset train=FORMAT:PATH`` and so on.

    >>> dataset_overrides(["daily-omni:/data/omni"])["data.all"]
    {'format': 'daily-omni', 'path': '/data/omni'}

    Raises:
        UsageError: where an item is malformed, a split stands twice, or both ways are mixed.
    """
    found: dict[str, dict[str, str]] = {}
    for item in items:
        name, equals, rest = item.partition("=")
        split, text = (name, rest) if equals and name in SPLITS else ("all", item)
        form, colon, place = text.partition(":")
        if not colon or not form or not place:
            raise UsageError(
                f"--dataset takes FORMAT:PATH or train=FORMAT:PATH (also validation=, test=), not {item!r}; "
                "for example daily-omni:/data/daily_omni."
            )
        if split in found:
            what = f"for {split} " if split != "all" else "without a split "
            raise UsageError(f"--dataset is given twice {what}: give train=, validation= and test= once each.")
        found[split] = {"format": form, "path": _absolute(place)}
    if not found:
        return {}
    if "all" in found:
        if len(found) > 1:
            raise UsageError("--dataset takes either one FORMAT:PATH, which is split by clip, or splits one by one.")
        return {"data.all": found["all"], **{f"data.{split}": None for split in SPLITS}}
    return {"data.all": None, **{f"data.{split}": source for split, source in found.items()}}


def overrides(
    *, settings: list[str], dataset: list[str], unfiltered: bool, overlap_splits: bool, seed: int | None
) -> dict[str, Any]:
    """All overrides of one command line; ``--set`` has the last word."""
    found = dataset_overrides(dataset)
    if unfiltered:
        found |= UNFILTERED
    if overlap_splits:
        found["data.overlap_splits"] = True
    if seed is not None:
        found["seed"] = seed
    return found | parse_set(settings)


def resolve(path: Path, changes: dict[str, Any]) -> Config:
    """Load a configuration with overrides, its paths of data and models made absolute from the working folder.

    Raises:
        ConfigError: where it is not valid, or mixes rendered clips with a data set that was named for other splits.
    """
    config = load(path, changes)
    absolute: dict[str, Any] = {
        f"data.{name}.path": _absolute(source.path)
        for name, source in sources(config).items()
        if source.path is not None
    }
    folders = {key: part.model for key, part in loaded_models(config).items() if ":" not in part.model}
    absolute |= {f"{key}.model": _absolute(folder) for key, folder in folders.items()}
    if folders:  # a licence may be accepted by the reference as it was given
        absolute["accepted_licences"] = [
            _absolute(model) if model in folders.values() else model for model in config.accepted_licences
        ]
    named = {key.removeprefix("data.") for key in changes if key in {f"data.{split}" for split in SPLITS}}
    left = [split for split, source in sources(config).items() if split not in named and source.format == "miniature"]
    if named and left and config.data.all is None:
        wanted = " and ".join(f"{split}=FORMAT:PATH" for split in left)
        raise ConfigError(
            f"--dataset names {' and '.join(sorted(named))}, but {' and '.join(left)} would still be rendered clips of "
            f"the miniature: give {wanted} too, or one data set to be split."
        )
    return load(path, changes | absolute) if absolute else config


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def resumed(folder: RunFolder, path: Path | None, changes: dict[str, Any]) -> Config:
    """The configuration of a run that goes on, which must be the one that it was started with.

    Raises:
        UsageError: where the options would change it; the message names the keys.
    """
    stored = folder.config()
    if path is None and not changes:
        return stored
    wanted = resolve(find_config(path) if path else folder.config_file, changes)
    if wanted.sha256 != stored.sha256:
        keys = ", ".join(differences(stored.model_dump(mode="json"), wanted.model_dump(mode="json"))[:5])
        raise UsageError(
            f"The run {folder.path.name} was started with other settings ({keys}): resume it without options, or start "
            "a new run."
        )
    return stored


def differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in which two documents differ."""
    found: list[str] = []
    for key in sorted(left.keys() | right.keys()):
        one, other = left.get(key), right.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key}")
    return found
