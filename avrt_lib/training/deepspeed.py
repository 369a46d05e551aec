"""DeepSpeed ZeRO-2, with or without the optimizer's state in the host's memory, and starting it without a launcher."""

from __future__ import annotations

import os
import socket
from typing import Any

from avrt_lib.config import OptimizerConfig, StudentConfig


def config_for(section: OptimizerConfig, student: StudentConfig) -> dict[str, Any] | None:
    """DeepSpeed's configuration for a section's ``deepspeed`` key, or None for ``none``.

    Batch sizes, clipping and precision are ``auto``: transformers fills them from the trainer's arguments, so that they
    are said once. ``zero2`` splits gradients and optimizer state over the processes, ``zero2_offload`` also moves the
    state to the host's memory, as the paper does.
    """
    if section.deepspeed == "none":
        return None
    prepare_process()
    zero: dict[str, Any] = {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
    }
    if section.deepspeed == "zero2_offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


def prepare_process() -> None:
    """Set what DeepSpeed reads from the environment where no launcher has set it: one process on this machine."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
