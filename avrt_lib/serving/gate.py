"""What of vLLM's server the outside sees: the OpenAI routes, health, and metrics on request. Everything else is 404.

vLLM's own API key guards only some of its routes (``/invocations``, ``/tokenize`` and ``/metrics`` are open), its
health stays 200 while it drains, and it reads requests of any size into memory. The gate stands in front of all three.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from avrt_lib.errors import ConfigError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = "/health"
METRICS = "/metrics"
EXPOSE_METRICS = "AVRT_EXPOSE_METRICS"
MAX_REQUEST_MIB = "AVRT_MAX_REQUEST_MIB"
_DEFAULT_MIB = 64
ROUTES = {"/v1/models": "GET", "/v1/chat/completions": "POST", "/v1/completions": "POST", HEALTH: "GET"}


class Gate:
    """ASGI middleware; vLLM builds it from its name (``--middleware``), so its settings come from the environment.

    ``AVRT_EXPOSE_METRICS=1`` opens ``/metrics``, and a request of more than ``AVRT_MAX_REQUEST_MIB`` (64) gets 413.
    From the moment at which the engine is told to shut down, every new request (health included) gets 503, so that a
    load balancer looks elsewhere, while those in flight are finished.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._routes = dict(ROUTES)
        if os.environ.get(EXPOSE_METRICS) == "1":
            self._routes[METRICS] = "GET"
        self._limit = max_request_mib() * 2**20
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 404, 405, 413 or 503."""
        if scope["type"] == "lifespan":
            self._watch_shutdown(scope)
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif (method := self._routes.get(scope["path"])) is None:
            await _refuse(send, 404, f"There is no {scope['path']} here.")
        elif scope["method"] != method:
            await _refuse(send, 405, f"{scope['path']} takes {method}.")
        elif self.draining:
            await _refuse(send, 503, "This server is shutting down.")
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through as long as it is not too large, which its header says, or else its body shows."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        taken, too_large = 0, int(length) > self._limit

        async def counted() -> MutableMapping[str, Any]:
            nonlocal taken, too_large
            message = await receive()
            taken += len(message.get("body", b""))
            too_large = taken > self._limit
            return {"type": "http.disconnect"} if too_large else message

        async def sent(message: MutableMapping[str, Any]) -> None:
            if not too_large:
                await send(message)

        if not too_large:
            try:
                await self._app(scope, counted, sent)
            except Exception:
                if not too_large:  # otherwise it is what vLLM makes of a client that is gone
                    raise
        if too_large:
            await _refuse(send, 413, f"A request may have {self._limit >> 20} MiB: send a shorter or smaller clip.")

    def _watch_shutdown(self, scope: Scope) -> None:
        """Learn of the shutdown where it begins: with the call that tells the engine to drain."""
        engine = scope["app"].state.engine_client
        shutdown = engine.shutdown

        def drain(*args: Any, **kwargs: Any) -> Any:
            self.draining = True
            return shutdown(*args, **kwargs)

        engine.shutdown = drain


def max_request_mib() -> int:
    """The largest request, in MiB.

    Raises:
        ConfigError: where the environment has no whole number above 0.
    """
    text = os.environ.get(MAX_REQUEST_MIB, str(_DEFAULT_MIB)).strip()
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{MAX_REQUEST_MIB} is {text!r}: give a whole number of MiB, 1 or more.")
    return int(text)


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", b"5"))
    if status in (413, 503):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
