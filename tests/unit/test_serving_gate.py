"""The gate in front of vLLM's routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from avrt_lib.serving.gate import Gate


class Behind:
    """An ASGI application that answers 200 to everything and remembers what reached it."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope.get("path", scope["type"]))
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})


def call(gate: Gate, scope: dict[str, Any]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    asyncio.run(gate(scope, receive, send))
    return sent


def status(gate: Gate, method: str, path: str) -> int:
    return int(call(gate, {"type": "http", "method": method, "path": path, "headers": []})[0]["status"])


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/health", 200),
        ("GET", "/v1/models", 200),
        ("POST", "/v1/chat/completions", 200),
        ("POST", "/v1/completions", 200),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/models", 405),  # vLLM asks no key of OPTIONS
        ("POST", "/health", 405),
        ("GET", "/metrics", 404),
        ("POST", "/invocations", 404),
        ("POST", "/tokenize", 404),
        ("GET", "/docs", 404),
        ("GET", "/", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "//v1/models", 404),
    ],
)
def test_routes(method: str, path: str, expected: int) -> None:
    behind = Behind()
    assert status(Gate(behind), method, path) == expected
    assert behind.reached == ([path] if expected == 200 else [])


def test_metrics_are_opened_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVRT_EXPOSE_METRICS", "1")
    assert status(Gate(Behind()), "GET", "/metrics") == 200


def test_websockets_are_closed() -> None:
    behind = Behind()
    sent = call(Gate(behind), {"type": "websocket", "path": "/v1/realtime"})
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert behind.reached == []


def test_new_requests_get_503_from_the_moment_the_engine_drains() -> None:
    told: list[float] = []
    engine = SimpleNamespace(shutdown=lambda timeout: told.append(timeout))
    gate = Gate(Behind())
    application = SimpleNamespace(state=SimpleNamespace(engine_client=engine))
    call(gate, {"type": "lifespan", "app": application})
    assert status(gate, "GET", "/health") == 200
    engine.shutdown(timeout=30)
    assert told == [30]
    assert status(gate, "GET", "/health") == 503
    assert status(gate, "POST", "/v1/chat/completions") == 503
    assert status(gate, "GET", "/metrics") == 404


def post(sizes: Sequence[int], length: int | None) -> tuple[list[dict[str, Any]], list[int]]:
    """Send a body in parts to an application that reads it; returns what is answered, and the parts that it got."""
    got: list[int] = []

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client is gone")
            got.append(len(message["body"]))
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    left = list(sizes)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        size = left.pop(0)
        return {"type": "http.request", "body": bytes(size), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    asyncio.run(Gate(reads)(scope, receive, send))
    return sent, got


MIB = 2**20


@pytest.mark.parametrize(
    ("sizes", "length", "status", "got"),
    [
        ([MIB, MIB], 2 * MIB, 200, [MIB, MIB]),
        ([MIB, MIB], None, 200, [MIB, MIB]),
        ([MIB, MIB, 1], 2 * MIB + 1, 413, []),
        ([MIB, MIB, 1], None, 413, [MIB, MIB]),
    ],
)
def test_requests_that_are_too_large_are_refused(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], length: int | None, status: int, got: list[int]
) -> None:
    monkeypatch.setenv("AVRT_MAX_REQUEST_MIB", "2")
    sent, read = post(sizes, length)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == status
    assert read == got
    if status == 413:
        assert "2 MiB" in json.loads(sent[1]["body"])["error"]["message"]


def test_a_fault_of_the_application_stays_its_own() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        status(Gate(fails), "POST", "/v1/chat/completions")
