"""A trained thinker as a folder that vLLM serves: the base's files and layout with the new weights in them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open

from avrt_lib.errors import TrainingError
from avrt_lib.models import write_manifest
from avrt_lib.tables import MANIFEST, atomic_path, read_json
from avrt_lib.training.chat_template import with_instruction
from avrt_lib.training.student import Student, merged_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

PREFIX = "thinker."
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
CHAT_TEMPLATE = "chat_template.jinja"
#: The same in an older form; of a folder with both it is not said which one counts.
_OLD_CHAT_TEMPLATE = "chat_template.json"
#: Weights in formats that can hold code, and other weight files, stay behind.
_LEFT_BEHIND = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(frozen=True)
class Change:
    """How far trained weights are from those of the base: ||w − w₀|| / ||w₀|| over what was trained."""

    relative_l2: float


def base_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names (without ``thinker.``) and values of the thinker's tensors in a model folder in the full Omni layout."""
    files = [folder / WEIGHTS]
    if (folder / INDEX).exists():
        files = [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dictionary)
                if name.startswith(PREFIX):
                    yield name.removeprefix(PREFIX), handle.get_tensor(name)


def export(student: Student, target: Path, *, dtype: torch.dtype, instruction: str, made_by: dict[str, Any]) -> Change:
    """Write the student as a model folder beside its base's other files, atomically.

    The tensors are those that the base's own files name, so that tied weights are stored as the base stores them. The
    frozen modules are compared bit by bit with the base.

    Args:
        student: the trained student; ``student.folder`` is its base.
        target: the folder to write; replaced if it is there.
        dtype: of the written floating-point tensors.
        instruction: what the chat template adds to a plain question (``prompts.instruction``).
        made_by: for the manifest.

    Returns:
        How far the trained weights moved.

    Raises:
        TrainingError: where a tensor is missing, has another shape, is not finite, or a frozen one differs.
    """
    trained = merged_state(student.model)
    state: dict[str, torch.Tensor] = {}
    squared_change = squared_base = 0.0
    for name, base in base_tensors(student.folder):
        if name not in trained or trained[name].shape != base.shape:
            raise TrainingError(f"The trained model has no tensor {name} of shape {tuple(base.shape)} as its base has.")
        value = trained[name].detach().cpu()
        kind = dtype if value.is_floating_point() else value.dtype
        # Under ZeRO all parameters are views of one buffer, which would be taken for weights that are tied.
        written = value.to(kind).clone(memory_format=torch.contiguous_format)
        if not bool(torch.isfinite(written).all()):
            raise TrainingError(f"{name} holds values that are not finite: lower the learning rate.")
        if name.split(".")[0] in student.freeze:
            if not torch.equal(written, base.to(kind)):
                raise TrainingError(f"{name} belongs to a frozen module but differs from the base in {student.folder}.")
        elif value.is_floating_point():
            squared_change += float((value.double() - base.double()).square().sum())
            squared_base += float(base.double().square().sum())
        state[PREFIX + name] = written
    with _replacing(target) as folder:
        _save_weights(state, folder)
        _copy_files(student.folder, folder, dtype)
        _set_chat_template(folder, student.processor, instruction)
        write_manifest(folder, made_by)
    return Change(math.sqrt(squared_change / squared_base) if squared_base else 0.0)


def export_thinker(thinker: PreTrainedModel, processor: ProcessorMixin, target: Path) -> None:
    """Write a thinker that has no base folder (a newly built one) in the full Omni layout, atomically.

    Args:
        thinker: a ``Qwen2_5OmniThinkerForConditionalGeneration``.
        processor: its processor, saved beside it.
        target: the folder to write; replaced if it is there. It gets no manifest.
    """
    tied = set(getattr(thinker, "all_tied_weights_keys", {}) or {})
    state = {
        PREFIX + name: value.detach().cpu().contiguous()
        for name, value in thinker.state_dict().items()
        if name not in tied
    }
    inner = {**thinker.config.to_dict(), "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"]}
    version = inner.pop("transformers_version", None)
    name = str(thinker.dtype).removeprefix("torch.")
    _set_dtype(inner, name)
    config = {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": False,
        "dtype": name,
        "thinker_config": inner,
        "transformers_version": version,
    }
    with _replacing(target) as folder:
        _save_weights(state, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        thinker.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    if target.exists():
        shutil.rmtree(target)
    with atomic_path(target) as folder:
        folder.mkdir()
        yield folder


def _save_weights(state: dict[str, torch.Tensor], folder: Path) -> None:
    save_torch_state_dict(state, folder, max_shard_size="4GB", safe_serialization=True, metadata={"format": "pt"})


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Set the type in a configuration and in the sections of it that name one."""
    for section in [config, *config.values()]:
        if isinstance(section, dict) and ("dtype" in section or "torch_dtype" in section):
            section.pop("torch_dtype", None)
            section["dtype"] = name


def _copy_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    for path in sorted(source.iterdir()):
        skipped = path.suffix in _LEFT_BEHIND or path.name.endswith(".index.json") or path.name == MANIFEST
        if path.is_dir() or skipped or path.name == "config.json":
            continue
        shutil.copyfile(path, target / path.name)
    config = read_json(source / "config.json")
    name = str(dtype).removeprefix("torch.")
    # Only the thinker is here: without its weights a talker must not be built.
    config.update(dtype=name, enable_audio_output=False)
    config.pop("torch_dtype", None)
    _set_dtype(config["thinker_config"], name)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _set_chat_template(folder: Path, processor: Any, instruction: str) -> None:
    if instruction:
        template = with_instruction(processor.chat_template, instruction)
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        (folder / _OLD_CHAT_TEMPLATE).unlink(missing_ok=True)


def export_dtype(name: str) -> torch.dtype:
    """The type of exported weights for ``student.dtype``."""
    return torch.float32 if name == "float32" else torch.bfloat16
