"""An engine that is not built before it is asked: a step with nothing left to ask loads no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

from avrt_lib.engine.base import ChatRequest, Completion, Engine

E = TypeVar("E", bound=Engine)


class LazyEngine(Generic[E]):
    """Builds its engine at the first request and closes it when the block ends.

    Args:
        factory: builds the engine.
        name: what the rows name as their model.
    """

    def __init__(self, factory: Callable[[], E], name: str) -> None:
        self._factory = factory
        self._name = name
        self._engine: E | None = None

    @property
    def model(self) -> str:
        """What the rows that this engine makes name as their model."""
        return self._name

    def get(self) -> E:
        """The engine itself, built if need be."""
        if self._engine is None:
            self._engine = self._factory()
        return self._engine

    def chat(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """Answer every request; see ``Engine.chat``."""
        return self.get().chat(requests) if requests else []

    def close(self) -> None:
        """Close the engine, if one was built."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
