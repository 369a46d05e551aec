"""Models that cannot be used as they are published.

Audio Flamingo 3 keeps its thinking mode beside the model: a folder ``think`` with a LoRA adapter and, as a pickle, the
other weights that were trained with it. Both are merged into the model's own tensors, under the names that the model's
files give them, since these are what vLLM reads. Kimi-VL brings Python of its own, which must lie in the folder as a
whole. Weights that are pickles are read by torch's unpickler for tensors alone (``weights_only``) and written as
safetensors.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avrt_lib.errors import ConfigError, DataError
from avrt_lib.hub import folder as folders
from avrt_lib.hub.folder import Published
from avrt_lib.tables import MANIFEST, read_json

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_WEIGHTS = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_PREFIX = "base_model.model."
#: How transformers names parts of Audio Flamingo 3 since its version 5, and how the model's files do.
_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
#: Settings of an adapter whose merging is another formula than the one here, and the value at which they say nothing.
_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "alpha_pattern": {},
}


def prepare(source: Path, to: str, *, name: str | None, revision: str | None, adapter: str | None) -> Published:
    """Prepare a model folder that came by disk, and publish it.

    Args:
        source: the folder; it stays as it is.
        to: ``s3://BUCKET``, or a folder.
        name: the model's id; by default what the folder's manifest says, or the folder's name.
        revision: its commit; by default what the folder's manifest says.
        adapter: folder of an adapter in it that is merged; None: none is.

    Raises:
        DataError: weights that are missing, damaged, or hold more than tensors, or differ from the manifest.
        ConfigError: an adapter that does not fit the model; code of the model that is missing; no revision for it.
    """
    source = folders.source_folder(source, to)
    if not (source / "config.json").is_file():
        raise DataError(f"{source} is not a model folder: it has no config.json.")
    known_name, known_revision = origin_of(source)
    name, revision = name or known_name or source.name, revision or known_revision
    published = f"{name}/{adapter}" if adapter and not name.endswith(f"/{adapter}") else name
    folders.verify_sums(source)
    made_by = {"by": "avrt models prepare", "model": published, "revision": revision}
    address = publish_prepared(source, published, to, made_by, adapter=adapter)
    return Published(published, revision, address)


def publish_prepared(source: Path, name: str, to: str, made_by: dict[str, Any], *, adapter: str | None) -> str:
    """Put the prepared model together beside its source, publish it, and return its address."""
    code = folders.code_of(source)
    if code and not made_by.get("revision"):
        raise ConfigError(
            f"{source} brings its own code ({', '.join(sorted(code))}): say with --revision which commit it is of."
        )
    made_by = {**made_by, "code": code}
    with folders.staging(to, f"{name}-prepared") as staged:
        shutil.rmtree(staged)
        staged.mkdir()
        for path in sorted(source.iterdir()):
            weights = path.suffix == folders.SAFETENSORS or path.name.endswith(".index.json")
            left = weights or path.suffix.lower() in folders.PICKLES or path.name in (MANIFEST, folders.SUMS)
            if path.is_file() and not left and not path.name.startswith("."):
                shutil.copyfile(path, staged / path.name)
        if adapter is None:
            _copy_weights(source, staged)
        elif any(source.glob(f"*{folders.SAFETENSORS}")):
            made_by["merged"] = merge_adapter(source, source / adapter, staged)
        else:
            with tempfile.TemporaryDirectory(".tmp", f".{staged.name}.", staged.parent) as converted:
                convert(source, Path(converted))
                made_by["merged"] = merge_adapter(Path(converted), source / adapter, staged)
        return folders.publish(staged, name, to, made_by)


def origin_of(folder: Path) -> tuple[str | None, str | None]:
    """The id and the commit that a folder's manifest gives."""
    made_by = read_json(folder / MANIFEST).get("made_by", {}) if (folder / MANIFEST).is_file() else {}
    return made_by.get("model"), made_by.get("revision")


def _copy_weights(source: Path, target: Path) -> None:
    """Copy safetensors; where there are none, convert pickles."""
    files = sorted(source.glob(f"*{folders.SAFETENSORS}"))
    if not files:
        convert(source, target)
        return
    for path in [*files, *sorted(source.glob(f"*{folders.INDEX}"))]:
        shutil.copyfile(path, target / path.name)


def convert(source: Path, target: Path) -> None:
    """Write a folder's ``pytorch_model*.bin`` (or its only ``*.pt``/``*.pth``) as safetensors; tied weights stay tied.

    Raises:
        DataError: where there are no weights, or a file holds more than tensors.
    """
    from huggingface_hub import save_torch_state_dict

    files = sorted(source.glob("pytorch_model*.bin")) or [
        path for path in sorted(source.iterdir()) if path.suffix in (".pt", ".pth", ".bin")
    ]
    if not files:
        raise DataError(f"{source} holds no weights: neither *.safetensors nor pytorch_model*.bin.")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state.update(load_tensors(file))
    save_torch_state_dict(state, target, max_shard_size="5GB", metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds nothing else.

    Raises:
        DataError: where it is damaged, or holds anything but tensors by name.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == folders.SAFETENSORS:
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors, and loading it would run its code: it is refused; get safetensors of "
            "this model, or convert it where you trust it."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged or cut short ({type(error).__name__}): copy it again.") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise DataError(f"{path} is no mapping of names to tensors: only weights can be converted.")
    return loaded


def merge_adapter(base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    """Write a base's safetensors with an adapter merged in: file by file, names, types and order kept.

    Args:
        base: a model folder of safetensors.
        adapter: a folder with ``adapter_config.json``, ``adapter_model.*`` and perhaps ``non_lora_trainables.*``.
        target: where the new files go.

    Returns:
        What was merged: ``adapter``, ``lora`` and ``replaced`` (counts of tensors).

    Raises:
        ConfigError: where the adapter is of a kind that is not supported, or a tensor of it has no place in the base.
        DataError: where a file is missing or damaged.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    names = {name for file in base.glob(f"*{folders.SAFETENSORS}") for name in folders.tensor_names(file)}
    deltas, replaced = read_adapter(adapter, names)
    left = set(deltas) | set(replaced)
    for file in sorted(base.glob(f"*{folders.SAFETENSORS}")):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {"format": "pt"}
            for name in handle.keys():  # noqa: SIM118 (not a dictionary)
                value = handle.get_tensor(name)
                if name in left:
                    value = _changed(name, value, deltas, replaced)
                    left.discard(name)
                tensors[name] = value
        save_file(tensors, target / file.name, metadata=metadata)
    if left:
        raise ConfigError(
            f"{adapter} has weights for {sorted(left)[0]} and {len(left) - 1} more that {base} does not have: the "
            "adapter belongs to another model, or to another layout of this one."
        )
    for index in sorted(base.glob(f"*{folders.INDEX}")):
        shutil.copyfile(index, target / index.name)
    return {"adapter": adapter.name, "lora": len(deltas), "replaced": len(replaced)}


def _changed(
    name: str,
    value: torch.Tensor,
    deltas: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]],
    replaced: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    import torch

    if name in replaced:
        if replaced[name].shape != value.shape:
            raise ConfigError(
                f"{name} has the shape {tuple(value.shape)} in the model and {tuple(replaced[name].shape)} beside the "
                "adapter: they are not of the same model."
            )
        value = replaced[name].to(value.dtype).contiguous()
    if name in deltas:
        down, up, scale = deltas[name]
        if (up.shape[0], down.shape[1]) != tuple(value.shape):
            raise ConfigError(f"The adapter's weights for {name} do not have the model's shape {tuple(value.shape)}.")
        value = (value.float() + scale * (up.float() @ down.float())).to(value.dtype)
    if not bool(torch.isfinite(value).all()):
        raise DataError(f"{name} is not finite after merging: the adapter or the model is damaged.")
    return value


def read_adapter(
    adapter: Path, names: Set[str]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor, float]], dict[str, torch.Tensor]]:
    """An adapter as changes of its base's tensors.

    Args:
        adapter: its folder.
        names: the base's tensors, as its files name them.

    Returns:
        By tensor name the two factors of what is added and their scale, and the tensors that replace the base's.

    Raises:
        ConfigError: where a setting of it is not supported.
        DataError: where a file is missing or damaged.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    for key, neutral in _UNSUPPORTED.items():
        if config.get(key, neutral) not in (neutral, None):
            raise ConfigError(f"{adapter / ADAPTER_CONFIG}: {key} = {json.dumps(config[key])} cannot be merged here.")
    if config.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"{adapter / ADAPTER_CONFIG}: only LoRA adapters are merged, not {config['peft_type']}.")
    weights = next((adapter / name for name in ADAPTER_WEIGHTS if (adapter / name).is_file()), None)
    if weights is None:
        raise DataError(f"{adapter} has no {' or '.join(ADAPTER_WEIGHTS)}.")
    downs: dict[str, torch.Tensor] = {}
    ups: dict[str, torch.Tensor] = {}
    replaced: dict[str, torch.Tensor] = {}
    for name, value in _plain_names(load_tensors(weights), names):
        if name.endswith(".lora_A.weight"):
            downs[name.removesuffix(".lora_A.weight") + ".weight"] = value
        elif name.endswith(".lora_B.weight"):
            ups[name.removesuffix(".lora_B.weight") + ".weight"] = value
        elif ".lora_" in name:
            raise ConfigError(f"{weights} holds {name}, an adapter of a layer that is not linear: it cannot be merged.")
        else:
            replaced[name] = value
    if downs.keys() != ups.keys():
        raise DataError(f"{weights} is not whole: some layers have one factor of two.")
    other = next((adapter / name for name in OTHER_WEIGHTS if (adapter / name).is_file()), None)
    if other is not None:
        replaced.update(_plain_names(load_tensors(other), names))
    alpha, stabilised = float(config["lora_alpha"]), bool(config.get("use_rslora"))
    deltas = {}
    for name, down in downs.items():
        rank = down.shape[0]
        deltas[name] = (down, ups[name], alpha / (math.sqrt(rank) if stabilised else rank))
    return deltas, replaced


def _plain_names(tensors: Mapping[str, torch.Tensor], names: Set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under the base's names, without what PEFT wraps around them."""
    for name, value in tensors.items():
        plain = name.removeprefix(_PREFIX)
        for wrapped in (".base_layer.", ".modules_to_save.default.", ".modules_to_save.", ".default."):
            plain = plain.replace(wrapped, ".")
        layer, mark, _ = plain.partition(".lora_")
        tensor = f"{layer}.weight" if mark else plain
        for newer, older in _RENAMED:
            if tensor not in names and tensor.startswith(newer) and older + tensor.removeprefix(newer) in names:
                plain = older + plain.removeprefix(newer)
                break
        yield plain, value
