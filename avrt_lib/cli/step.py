"""``avrt step``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from avrt_lib.config import Config
from avrt_lib.errors import UsageError
from avrt_lib.steps import STEPS, run_step

#: Inputs that take one table for each shard.
LISTS = frozenset({"vision_traces", "audio_traces"})
#: Inputs and parameters that a step does without.
OPTIONAL = frozenset({"model", "data_hash", "components"})
#: Parameters that are numbers; the others are texts, whatever they look like.
NUMBERS = frozenset({"shard"})


def run_one(
    name: str, config: Config, *, inputs: list[str], outputs: list[str], params: list[str], work: Path | None
) -> None:
    """Run a step and print its facts.

    Raises:
        UsageError: unknown step, or inputs, outputs and parameters that are not the step's.
    """
    if name not in STEPS:
        raise UsageError(f"There is no step {name!r}; the steps are {', '.join(STEPS)}.")
    step = STEPS[name]
    given: dict[str, Any] = {}
    for key, value in _pairs("--input", inputs, step.inputs):
        if not Path(value).is_dir():
            raise UsageError(f"--input {key}={value}: there is no such folder.")
        if key in LISTS:
            given.setdefault(key, []).append(value)
        else:
            given[key] = value
    placed = dict(_pairs("--output", outputs, step.outputs))
    plain: dict[str, Any] = {
        key: _number(key, value) if key in NUMBERS else value for key, value in _pairs("--param", params, step.params)
    }
    _complete("--input", name, step.inputs, given)
    _complete("--output", name, step.outputs, placed)
    _complete("--param", name, step.params, plain)
    if "data_hash" in step.params and "data_hash" not in plain:
        from avrt_lib.ingest.fingerprint import fingerprint

        # Without it a result that is kept in --work would stand for other data of the same path.
        plain["data_hash"] = fingerprint(config.data)
    facts = run_step(name, config=config, inputs=given, outputs=placed, work=work, params=plain)
    print(json.dumps(facts, indent=2, ensure_ascii=False))


def _pairs(option: str, items: list[str], known: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            takes = f"takes {', '.join(f'{name}=…' for name in known)}" if known else "is not taken by this step"
            raise UsageError(f"{option} {takes}, not {item!r}.")
        if key not in LISTS and key in dict(pairs):
            raise UsageError(f"{option} {key} is given twice, but the step takes one.")
        pairs.append((key, value))
    return pairs


def _number(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UsageError(f"--param {key} takes a whole number, not {value!r}.") from error


def _complete(option: str, step: str, known: tuple[str, ...], given: dict[str, Any]) -> None:
    missing = [name for name in known if name not in given and name not in OPTIONAL]
    if missing:
        raise UsageError(f"{step} needs {' '.join(f'{option} {name}=…' for name in missing)}.")
