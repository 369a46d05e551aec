"""Licences of the models that this project's configurations name, and whether the user accepted the restricted ones.

The table states what the models' publishers said when it was written. Licences change, and a model's own card has the
last word: each entry links to it. This is no legal advice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from avrt_lib.config import HUB, Config, EngineConfig, StudentConfig
from avrt_lib.hub.folder import slug
from avrt_lib.models import BUILTIN
from avrt_lib.runs import has_step


@dataclass(frozen=True, slots=True)
class Licence:
    """What a model may be used for.

    Attributes:
        model: the hub's id.
        licence: its name; SPDX where there is one.
        commercial: ``yes``, ``no``, or ``conditions`` where it depends on terms that have to be read.
        note: what follows from it here.
    """

    model: str
    licence: str
    commercial: Literal["yes", "no", "conditions"]
    note: str = ""

    @property
    def card(self) -> str:
        """The address of the model's card, which has the last word."""
        return f"https://huggingface.co/{self.model}"


_NVIDIA = "NVIDIA OneWay Noncommercial License"
_QWEN = "Qwen Research License"
_TABLE = (
    Licence("moonshotai/Kimi-VL-A3B-Thinking", "MIT", "yes", "the paper's vision teacher"),
    Licence("nvidia/audio-flamingo-3", _NVIDIA, "no", "original layout, which no engine here loads"),
    Licence("nvidia/audio-flamingo-3-hf", _NVIDIA, "no", "the paper's audio teacher; research only"),
    Licence("Qwen/Qwen2.5-14B-Instruct", "Apache-2.0", "yes", "the paper's merger"),
    Licence("Qwen/Qwen2.5-14B-Instruct-AWQ", "Apache-2.0", "yes", "the merger with four-bit weights"),
    Licence("google/gemma-3-12b-it", "Gemma Terms of Use", "conditions", "the paper's other merger; gated"),
    Licence("Qwen/Qwen2.5-Omni-3B", _QWEN, "no", "the paper's student; what is trained from it inherits the licence"),
    Licence("Qwen/Qwen2.5-Omni-7B", "Apache-2.0", "yes", "the paper's student; also an audio teacher"),
    Licence("Qwen/Qwen2-Audio-7B-Instruct", "Apache-2.0", "yes", "an audio teacher"),
    Licence("Qwen/Qwen2.5-VL-7B-Instruct", "Apache-2.0", "yes", "a vision teacher"),
)
KNOWN: dict[str, Licence] = {licence.model: licence for licence in _TABLE}


def loaded_models(config: Config, components: Sequence[str] | None = None) -> dict[str, EngineConfig | StudentConfig]:
    """The parts of a configuration that load a model themselves, by their key; endpoints are left out.

    Args:
        config: the configuration.
        components: what the run's pipeline is made of; None: the whole path.
    """
    return {
        key: part
        for key, part in _models(config, components).items()
        if isinstance(part, StudentConfig) or part.kind == "vllm"
    }


def _models(config: Config, components: Sequence[str] | None) -> dict[str, EngineConfig | StudentConfig]:
    """The parts of a configuration that name a model which a step of the pipeline uses."""
    learns = ("sft",) if config.evaluation.endpoint else ("sft", "evaluation")
    users: dict[str, tuple[EngineConfig | StudentConfig, tuple[str, ...]]] = {
        "teachers.vision.engine": (config.teachers.vision.engine, ("vision_teacher",)),
        "teachers.audio.engine": (config.teachers.audio.engine, ("audio_teacher",)),
        "merger.engine": (config.merger.engine, ("merger",)),
        "student": (config.student, learns),
    }
    return {key: part for key, (part, steps) in users.items() if any(has_step(components, step) for step in steps)}


def find(reference: str) -> Licence | None:
    """The licence of a model reference, by its id or by the name under which ``avrt models`` publishes it.

    >>> find("hub:nvidia/audio-flamingo-3-hf/think").commercial
    'no'
    >>> find("/models/qwen2.5-omni-7b").licence
    'Apache-2.0'
    """
    if reference.startswith(HUB):
        return KNOWN.get("/".join(reference.removeprefix(HUB).split("/")[:2]))
    # As published: …/NAME/SHA256, where NAME may end in the adapter that was merged in.
    names = {part.lower().removesuffix("-think") for part in reference.split("/")}
    return next((licence for licence in _TABLE if slug(licence.model) in names), None)


def licences_of(config: Config, components: Sequence[str] | None = None) -> dict[str, Licence | None]:
    """The licence of each model that a configuration uses, endpoints' too; None where it is not known here.

    Args:
        config: the configuration.
        components: what the run's pipeline is made of; None: the whole path.
    """
    references = [part.model for part in _models(config, components).values()]
    return {reference: find(reference) for reference in references if not reference.startswith(BUILTIN)}
