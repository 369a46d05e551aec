"""Memory of one GPU in each step: what must be there, and what remains for the cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avrt_lib.config import Config, EngineConfig, OptimizerConfig
from avrt_lib.planning.models import ModelSize

GIB = 2**30
#: Bytes that Adam keeps for a parameter trained in mixed precision: a float32 copy and two moments.
_OPTIMIZER_BYTES = 12.0
#: What ZeRO-2 keeps of it in the host's memory with offload: the same, and float32 gradients.
_OFFLOADED_BYTES = 16.0
#: GiB of a process that offloads, beside its weights and optimizer (measured: docs/models.md).
_OFFLOADING_PROCESS_GIB = 4.5


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB of one GPU, and of the host for a training step with all its processes.

    Attributes:
        gpu_gib: what the step needs.
        of_gib: what the GPU has.
        room_gib: what the step may use of it.
    """

    step: str
    parts: dict[str, float]
    gpu_gib: float
    of_gib: float
    room_gib: float
    host_gib: float = 0.0
    note: str = ""

    def warning(self) -> str | None:
        """What is to be said where the step does not fit."""
        if self.gpu_gib <= self.room_gib:
            return None
        share = f", {self.room_gib:.1f} with gpu_memory_utilization" if self.room_gib < self.of_gib else ""
        return f"{self.step} needs {self.gpu_gib:.1f} GiB of a GPU that has {self.of_gib:g}{share}."

    def to_json(self) -> dict[str, Any]:
        """Rounded for people."""
        return {
            "step": self.step,
            "gpu_gib": round(self.gpu_gib, 1),
            "of_gib": self.of_gib,
            "host_gib": round(self.host_gib, 1),
            "parts": {name: round(value, 1) for name, value in self.parts.items()},
            "note": self.note,
        }


def of_engine(step: str, engine: EngineConfig, size: ModelSize, gpu_gib: float, workspace_gib: float) -> Memory:
    """An engine takes its share of the GPU whatever the model; what the weights leave is the cache."""
    per_gpu = size.parameters * _engine_bytes(engine.dtype, size) / engine.tensor_parallel_size / GIB
    token = size.layers * size.kv_width * 2 / engine.tensor_parallel_size / GIB
    least = engine.max_model_len * token
    room = gpu_gib * engine.gpu_memory_utilization
    cache = room - per_gpu - workspace_gib
    requests = int(cache / least) if cache > 0 else 0
    note = f"cache for {requests} requests of full length" if requests else "no room for one request of full length"
    parts = {"weights": per_gpu, "workspace": workspace_gib, "cache": max(cache, 0.0)}
    return Memory(step, parts, per_gpu + workspace_gib + least, gpu_gib, room, note=note)


def of_training(
    step: str,
    config: Config,
    section: OptimizerConfig,
    size: ModelSize,
    gpu_gib: float,
    *,
    tokens: float,
    reference: bool,
    processes: int,
    workspace_gib: float,
) -> Memory:
    """Weights, gradients, optimizer and activations of one training process.

    Args:
        step: ``sft`` or ``grpo``.
        config: whose student is trained.
        section: of that step.
        size: of the student.
        gpu_gib: memory of one GPU.
        tokens: of one row, prompt and answer.
        reference: a second, frozen copy of the weights stands beside the trained one.
        processes: one for each GPU.
        workspace_gib: assumed for whatever is not counted.
    """
    lora = config.student.lora
    half = config.student.dtype == "bfloat16" and (section.deepspeed != "none" or lora is not None)
    weight = 2.0 if half else 4.0
    trained = size.adapter_parameters(lora.rank) if lora else size.language
    trained_weight = 4.0 if lora else weight
    shared = processes if section.deepspeed != "none" else 1
    optimizer = (_OPTIMIZER_BYTES if section.deepspeed != "none" else 8.0) * trained / shared
    offload = section.deepspeed == "zero2_offload"
    rows = section.per_device_batch * tokens
    layers = 1 if section.gradient_checkpointing else 16  # kept of each layer: its input alone, or all that is between
    parts = {
        "weights": size.parameters * weight,
        "reference": size.parameters * weight if reference else 0.0,
        "gradients": trained * trained_weight / shared,
        "optimizer": 0.0 if offload else optimizer,
        "activations": rows * size.hidden * size.layers * weight * layers,
    }
    in_gib = {name: value / GIB for name, value in parts.items() if value} | {"workspace": workspace_gib}
    loading = 4.0 if lora is None or config.student.dtype == "float32" else 2.0
    copies = 2 if reference else 1
    host = copies * loading * size.parameters * processes / GIB  # what is loaded stays in the host's memory, or may
    if offload:
        host += _OFFLOADED_BYTES * trained / GIB + _OFFLOADING_PROCESS_GIB * processes
    return Memory(step, in_gib, sum(in_gib.values()), gpu_gib, gpu_gib, host)


def _engine_bytes(dtype: str, size: ModelSize) -> float:
    return 4.0 if dtype == "float32" else size.weight_bytes
