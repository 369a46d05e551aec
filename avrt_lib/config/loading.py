"""A configuration read from its YAML file with overrides and pinned models, or from the pipeline's parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError, create_model

from avrt_lib.config.errors import validation_message
from avrt_lib.config.sections import COMMIT, HUB, Config, Section
from avrt_lib.errors import ConfigError

#: Beside the configuration files: which commit of each hub model is meant, and where its files lie (``avrt models``).
MODELS_LOCK = "models.lock"

S = TypeVar("S", bound=Section)


def from_json(text: str) -> Config:
    """Read back what ``Config.to_json`` wrote, of a whole configuration or of a part."""
    document, where = json.loads(text), "the configuration parameter"
    fields = {name: (field.annotation, field) for name, field in Config.model_fields.items() if name in document}
    if len(fields) == len(Config.model_fields):
        return validated(document, where, Config)
    part = validated(document, where, create_model("Part", __base__=Section, **fields))  # type: ignore[call-overload]
    return Config.model_construct(**vars(part)).part(fields)


def load(path: Path, overrides: dict[str, Any] | None = None, *, pinned: bool = True) -> Config:
    """Load a configuration file, apply dotted overrides, and pin hub models by the lock file beside it.

    Args:
        path: the YAML file.
        overrides: ``{"grpo.learning_rate": 1e-4, …}``; values as YAML would read them.
        pinned: False leaves hub models as the file names them.

    Raises:
        ConfigError: the message names the file, the key and the mend.
    """
    document = read_mapping(path, "configuration file", "--config")
    for dotted, value in (overrides or {}).items():
        _assign(document, dotted, value)
    if pinned:
        _pin_models(document, path.parent / MODELS_LOCK)
    return validated(document, str(path), Config)


def read_mapping(path: Path, kind: str, option: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: the file.
        kind: what such a file is called.
        option: the command line's option that names one.

    Raises:
        ConfigError: where it is absent, is no YAML, or holds something else.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"There is no {kind} {path}: name one with {option}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping, not {type(document).__name__}.")
    return document


def validated(document: Any, where: str, model: type[S]) -> S:
    """A document as its strict schema.

    Raises:
        ConfigError: the message names where the document is from, and each key that is wrong.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{where}: {validation_message(error, model)}.") from error


def _pin_models(document: dict[str, Any], lock: Path) -> None:
    """Put the commit and the address that a lock file gives in the place of each hub model that it knows."""
    if not lock.is_file():
        return
    try:
        entries = json.loads(lock.read_text(encoding="utf-8"))
        pinned = {str(name): (entry["model"], entry["revision"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{lock} is damaged ({error}): remove it, and run `avrt models pull` again.") from error
    for dotted in ("teachers.vision.engine", "teachers.audio.engine", "merger.engine", "student"):
        section: Any = document
        for key in dotted.split("."):
            section = section.get(key) if isinstance(section, dict) else None
        name = section.get("model") if isinstance(section, dict) else None
        if not isinstance(name, str) or name.removeprefix(HUB) not in pinned or not name.startswith(HUB):
            continue
        model, revision = pinned[name.removeprefix(HUB)]
        wanted = section.get("revision")
        if isinstance(wanted, str) and COMMIT.fullmatch(wanted) and wanted != revision:
            raise ConfigError(
                f"{dotted}.revision is {wanted}, but {lock} has {revision}: run `avrt models pull` again, or correct "
                "one of them."
            )
        section.update(model=model, revision=revision)


def parse_set(items: list[str]) -> dict[str, Any]:
    """Turn ``["grpo.max_steps=20", …]`` into overrides; values are read as YAML.

    Raises:
        ConfigError: where an item has no ``=``.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set takes section.key=value, not {item!r}.")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key}: the value {value!r} is not valid YAML.") from error
    return overrides


def _assign(document: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node = document
    for parent in parents:
        child = node.get(parent)
        if child is None:  # also where the file says null, as the configuration of a run does of what is not set
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {dotted}: {parent} is a value, not a section.")
        node = child
    node[last] = value
