"""Any OpenAI-compatible server: a teacher behind KServe, the deployed champion, a hosted model."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self

from avrt_lib.config import EngineConfig
from avrt_lib.engine.base import ChatRequest, Completion
from avrt_lib.errors import ConfigError, EngineError
from avrt_lib.keys import header_key

log = logging.getLogger("avrt")

#: So many requests in a row that failed in all their tries open the circuit: the endpoint is taken to be down.
TRIP_AFTER = 3

_REFUSED = (401, 403, 404)


class EndpointEngine:
    """Chat completions over HTTP with bounded concurrency.

    One request is tried up to ``config.attempts`` times on 408, 409, 429, 5xx, timeouts and connection errors, with
    exponential back-off and jitter, or after as long as the server's Retry-After says (the openai client does this).
    A request that the server calls bad (other 4xx) comes back with ``error`` set. After ``TRIP_AFTER`` requests in a
    row that failed in all their tries, the circuit opens: what is queued is not sent, and ``chat`` raises, so that the
    chunk is asked again when the step is resumed instead of being filled with errors.

    Args:
        config: the endpoint's address, model name, key variable, concurrency, timeout and tries.
        name: what rows name as their model; the served model's name if not given.

    Raises:
        ConfigError: where the variable that should hold the key is not set, or holds what no key is.
        EngineError: where the openai package is missing.
    """

    def __init__(self, config: EngineConfig, *, name: str | None = None) -> None:
        key = "none"
        if config.api_key_env:
            key = header_key(os.environ.get(config.api_key_env, ""), config.api_key_env)
            if not key:
                raise ConfigError(
                    f"The environment variable {config.api_key_env} (api_key_env of {config.base_url}) is not set: "
                    "export the endpoint's key in it."
                )
        try:
            from openai import OpenAI
        except ImportError as error:
            raise EngineError("An endpoint engine needs the openai package: install the extra 'vllm'.") from error
        self._config = config
        self._name = name or config.model
        self._client = OpenAI(
            base_url=config.base_url, api_key=key, timeout=config.timeout_s, max_retries=config.attempts - 1
        )
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._open: str | None = None

    @property
    def model(self) -> str:
        """What the rows that this engine makes name as their model."""
        return self._name

    def chat(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """Answer every request, up to ``config.concurrency`` at a time, in their order.

        Raises:
            EngineError: where the endpoint refuses the key or the model, or stopped answering.
        """
        pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="endpoint")
        try:
            futures = [pool.submit(self._ask, request) for request in requests]
            wait(futures, return_when=FIRST_EXCEPTION)
            if self._open:
                raise EngineError(self._open)
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, request: ChatRequest) -> Completion:
        import openai

        if self._open:
            raise EngineError(self._open)
        settings: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p}
        if request.seed is not None:
            settings["seed"] = request.seed
        started = time.monotonic()
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self._config.model,
                messages=request.messages,  # type: ignore[arg-type]
                max_tokens=request.max_tokens,
                **settings,
            )
            answer = raw.parse()
            choice = answer.choices[0]
            text = _text(choice.message)
        except openai.APIStatusError as error:
            reason = _reason(error)
            if error.status_code in _REFUSED:
                self._trip(f"{self._config.base_url} refuses the model {self._config.model!r} or the key: {reason}.")
            if error.status_code >= 500 or error.status_code in (408, 409, 429):
                self._count_failure(reason)
                return self._failed(request, reason, started, self._config.attempts)
            self._failed_in_a_row = 0
            return self._failed(request, reason, started, 1)
        except openai.APIConnectionError as error:  # timeouts too
            reason = _reason(error)
            self._count_failure(reason)
            return self._failed(request, reason, started, self._config.attempts)
        except (openai.APIError, AttributeError, IndexError, TypeError, ValueError) as error:
            self._count_failure(reason := f"not a chat completion: {_reason(error)}")
            return self._failed(request, reason, started, 1)
        self._failed_in_a_row = 0
        usage = answer.usage
        return Completion(
            id=request.id,
            text=text,
            finish_reason=choice.finish_reason or "",
            tokens_in=usage.prompt_tokens if usage else 0,
            tokens_out=usage.completion_tokens if usage else 0,
            latency_s=time.monotonic() - started,
            attempts=raw.retries_taken + 1,
        )

    def _failed(self, request: ChatRequest, reason: str, started: float, attempts: int) -> Completion:
        log.warning("%s: request %s failed: %s", self._config.base_url, request.id, reason)
        return Completion(request.id, "", "error", 0, 0, time.monotonic() - started, attempts, error=reason)

    def _count_failure(self, reason: str) -> None:
        with self._lock:
            self._failed_in_a_row += 1
            failed = self._failed_in_a_row
        if failed >= TRIP_AFTER:
            self._trip(
                f"{self._config.base_url} stopped answering: {failed} requests in a row failed in each of "
                f"{self._config.attempts} tries; the last time: {reason}. Finished chunks are kept: start again with "
                "--resume when it is back."
            )

    def _trip(self, message: str) -> None:
        self._open = message
        raise EngineError(message)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _text(message: Any) -> str:
    """The message's text; a server that parses the reasoning away has it in a field of its own."""
    content: Any = message.content or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    reasoning = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None)
    text = f"<think>{reasoning}</think>{content}" if reasoning else str(content)
    return text.encode("utf-8", "replace").decode()  # no file can store half a character


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    cause = f" ({' '.join(str(error.__cause__).split())})" if error.__cause__ else ""
    return (text + cause)[:500]
