"""The engine that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avrt_lib.config import EngineConfig
from avrt_lib.engine.base import Engine


def build(
    config: EngineConfig,
    *,
    limits: Mapping[str, int] | None = None,
    mm_kwargs: Mapping[str, Any] | None = None,
    media_io_kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Engine:
    """Build the engine of a configuration; a context manager that frees it again.

    Args:
        config: which engine, which model.
        limits: media items per request, by modality (``image``, ``video``, ``audio``); an endpoint has its own.
        mm_kwargs: keyword arguments of the model's processor; an endpoint has its own.
        media_io_kwargs: keyword arguments of vLLM's media loaders; an endpoint has its own.
        name: what rows name as their model; the configuration's reference if not given.

    Raises:
        EngineError: where the model cannot be loaded.
        ConfigError: where there is no such model, or an endpoint's key is not set.
    """
    if config.kind == "endpoint":
        from avrt_lib.engine.endpoint_engine import EndpointEngine

        return EndpointEngine(config, name=name)
    from avrt_lib.engine.vllm_engine import VllmEngine

    return VllmEngine(config, limits=limits, mm_kwargs=mm_kwargs, media_io_kwargs=media_io_kwargs, name=name)
