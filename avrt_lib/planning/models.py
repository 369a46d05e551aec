"""Sizes of models: of the ones that lie here by their files, of the known ones by their published architecture."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from avrt_lib import licences, models
from avrt_lib.errors import AvrtError
from avrt_lib.tables import read_json


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model weighs.

    Attributes:
        parameters: what an engine loads.
        language: those of the language model, which is what the student trains.
        layers, hidden, intermediate: of the language model.
        kv_width: keys and values of one token in one layer, together.
        weight_bytes: of one parameter as published.
        disk_bytes: of all files that are fetched.
        source: where this is from.
    """

    parameters: float
    language: float
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    weight_bytes: float = 2.0
    disk_bytes: float = 0.0
    source: str = "published architecture"

    def adapter_parameters(self, rank: int) -> float:
        """Of LoRA factors on all linear layers of the language model."""
        pairs = [
            (self.hidden, self.hidden),
            (self.hidden, self.kv_width // 2),
            (self.hidden, self.kv_width // 2),
            (self.hidden, self.hidden),
            *[(self.hidden, self.intermediate)] * 3,
        ]
        return float(rank * self.layers * sum(map(sum, pairs)))


_KIMI = ModelSize(16.4e9, 16.0e9, 27, 2048, 11264, 576, disk_bytes=32.8e9)
_FLAMINGO = ModelSize(8.3e9, 7.6e9, 28, 3584, 18944, 1024, disk_bytes=18.5e9)
_QWEN_14B = ModelSize(14.8e9, 14.8e9, 48, 5120, 13824, 2048, disk_bytes=29.6e9)
KNOWN: dict[str, ModelSize] = {
    "moonshotai/Kimi-VL-A3B-Thinking": _KIMI,
    "nvidia/audio-flamingo-3-hf": _FLAMINGO,
    "Qwen/Qwen2.5-14B-Instruct": _QWEN_14B,
    "Qwen/Qwen2.5-14B-Instruct-AWQ": replace(_QWEN_14B, weight_bytes=0.68, disk_bytes=10.0e9),
    "google/gemma-3-12b-it": ModelSize(12.2e9, 11.8e9, 48, 3840, 15360, 4096, disk_bytes=24.4e9),
    "Qwen/Qwen2.5-Omni-3B": ModelSize(4.7e9, 3.4e9, 36, 2048, 11008, 512, disk_bytes=12.0e9),
    "Qwen/Qwen2.5-Omni-7B": ModelSize(8.9e9, 7.6e9, 28, 3584, 18944, 1024, disk_bytes=22.4e9),
    "Qwen/Qwen2-Audio-7B-Instruct": ModelSize(8.4e9, 7.7e9, 32, 4096, 11008, 8192, disk_bytes=16.8e9),
    "Qwen/Qwen2.5-VL-7B-Instruct": ModelSize(8.3e9, 7.6e9, 28, 3584, 18944, 1024, disk_bytes=16.6e9),
}


def size_of(reference: str) -> ModelSize | None:
    """The size of a model; None where it neither lies here nor is known."""
    if not reference.startswith(("hub:", "s3://")):
        try:
            return _measured(models.resolve(reference))
        except AvrtError:
            pass
    licence = licences.find(reference)
    return KNOWN.get(licence.model) if licence else None


def _measured(folder: Path) -> ModelSize:
    """Count a folder's tensors by the headers of its safetensors, and read its shape from its configuration."""
    total = language = stored = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as handle:
            header = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
        for name, entry in header.items():
            if name == "__metadata__" or name.startswith(("talker.", "token2wav.")):
                continue
            count = prod(entry["shape"])
            total += count
            stored += entry["data_offsets"][1] - entry["data_offsets"][0]
            encoder = any(part in name for part in ("visual.", "audio_tower.", "vision_tower.", "projector."))
            language += 0 if encoder else count
    text = _text_config(read_json(folder / "config.json"))
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    head_dim = int(text.get("head_dim") or hidden // heads)
    return ModelSize(
        float(total),
        float(language),
        int(text["num_hidden_layers"]),
        hidden,
        int(text["intermediate_size"]),
        2 * int(text.get("num_key_value_heads", heads)) * head_dim,
        stored / max(1, total),
        float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())),
        "its files",
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration."""
    for key in ("thinker_config", "text_config", "llm_config"):
        if isinstance(config.get(key), dict):
            return _text_config(config[key])
    return config
