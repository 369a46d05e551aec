"""The one interface of all engines: OpenAI chat messages in, completions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One chat request.

    Attributes:
        id: the caller's key; the completion carries it back.
        messages: OpenAI chat messages; media as data-URL parts (see ``avrt_lib.engine.messages``).
        seed: sampling seed of this request, so that a redone chunk samples the same; None for greedy decoding.
    """

    id: str
    messages: list[dict[str, Any]]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back for one request; ``error`` is set, and ``text`` empty, where the engine gave up on it."""

    id: str
    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    latency_s: float
    attempts: int = 1
    error: str | None = None


class Engine(Protocol):
    """An engine answers all requests of one call, in their order, and never drops one."""

    @property
    def model(self) -> str:
        """What the rows that this engine makes name as their model."""
        ...

    def chat(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """Answer every request; a request that cannot be answered comes back with ``error`` set."""
        ...

    def close(self) -> None:
        """Free the model's memory, processes and connections."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
