"""The endpoint engine against a real HTTP server that misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from avrt_lib.config import EngineConfig
from avrt_lib.engine.base import ChatRequest
from avrt_lib.engine.factory import build
from avrt_lib.errors import ConfigError, EngineError

pytest.importorskip("openai")


class Server(ThreadingHTTPServer):
    """Answers with the last user text; ``script`` maps a text to the statuses that it gets first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: dict[str, list[int]] = {}
        self.replies: dict[str, bytes] = {}
        self.seen: list[dict] = []
        self.keys: set[str | None] = set()
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.barrier: threading.Barrier | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.seen.append(body)
            self.server.keys.add(self.headers["Authorization"])
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
            statuses = self.server.script.get(text, [])
            status = statuses.pop(0) if statuses else 200
        if self.server.barrier is not None:
            self.server.barrier.wait(10)
        with self.server.lock:
            self.server.running -= 1
        answer = {"error": {"message": f"no: {text}"}}
        if status == 200:
            message = {"role": "assistant", "content": f"echo {text}", "reasoning": body.get("seed") and "why"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            answer = {
                "id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage
            }  # fmt: skip
        payload = self.server.replies.get(text) or json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if status != 200:
            self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def config(server: Server | None = None, **changes: object) -> EngineConfig:
    port = server.server_address[1] if server else 9  # the discard port: nobody listens
    settings = {"kind": "endpoint", "model": "teacher", "base_url": f"http://127.0.0.1:{port}/v1", "attempts": 3}
    return EngineConfig.model_validate(settings | changes)


def requests(*texts: str, seed: int | None = None) -> list[ChatRequest]:
    return [ChatRequest(text, [{"role": "user", "content": text}], 16, 0.5, 0.9, seed) for text in texts]


def test_answers_come_back_in_order_with_their_counts(server: Server) -> None:
    with build(config(server)) as engine:
        found = engine.chat(requests(*"abcdefgh"))
    assert [(c.id, c.text) for c in found] == [(x, f"echo {x}") for x in "abcdefgh"]
    assert (found[0].tokens_in, found[0].tokens_out, found[0].finish_reason, found[0].attempts) == (7, 3, "stop", 1)
    body = server.seen[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("teacher", 16, 0.5, 0.9)
    assert "seed" not in body


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(server: Server, status: int) -> None:
    server.script["a"] = [status, status]
    with build(config(server)) as engine:
        (found,) = engine.chat(requests("a"))
    assert (found.text, found.attempts, found.error) == ("echo a", 3, None)


def test_a_request_that_keeps_failing_says_so_and_the_others_are_answered(server: Server) -> None:
    server.script["b"] = [500] * 3
    with build(config(server, concurrency=1)) as engine:
        found = engine.chat(requests("a", "b", "c"))
    assert [c.error is None for c in found] == [True, False, True]
    assert found[1].text == ""
    assert "no: b" in (found[1].error or "")
    assert found[1].attempts == 3


@pytest.mark.parametrize(
    "reply",
    [b"<html>log in</html>", b"[]", b'{"choices": [{"message": null}]}', b'{"choices": ["x"]}', b'{"choices": []}'],
)
def test_what_is_no_chat_completion_is_a_refused_request(server: Server, reply: bytes) -> None:
    server.replies["b"] = reply
    with build(config(server, concurrency=1)) as engine:
        found = engine.chat(requests("a", "b", "c"))
    assert [c.error is None for c in found] == [True, False, True]
    assert "not a chat completion" in (found[1].error or "")


@pytest.mark.parametrize(
    ("content", "text"),
    [('[{"type": "text", "text": "so"}, {"type": "text", "text": " B"}]', "so B"), ('"half \\ud800"', "half ?")],
)
def test_contents_of_other_forms_are_text(server: Server, content: str, text: str) -> None:
    server.replies["a"] = (
        '{"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": '
        f'[{{"index": 0, "finish_reason": "stop", "message": {{"role": "assistant", "content": {content}}}}}]}}'
    ).encode()
    with build(config(server)) as engine:
        (found,) = engine.chat(requests("a"))
    assert (found.text, found.error) == (text, None)


def test_a_bad_request_is_not_tried_again(server: Server) -> None:
    server.script["a"] = [400]
    with build(config(server)) as engine:
        (found,) = engine.chat(requests("a"))
    assert found.error
    assert len(server.seen) == 1


def test_the_circuit_opens_and_the_rest_is_not_sent(server: Server) -> None:
    texts = [str(i) for i in range(30)]
    server.script.update({text: [503] * 9 for text in texts})
    with build(config(server, concurrency=1, attempts=2)) as engine:
        with pytest.raises(EngineError, match=r"stopped answering.*--resume"):
            engine.chat(requests(*texts))
        assert len(server.seen) == 6  # three requests, two tries each
        with pytest.raises(EngineError):
            engine.chat(requests("x"))
        assert len(server.seen) == 6


def test_nobody_listens() -> None:
    with build(config(attempts=1, concurrency=1)) as engine, pytest.raises(EngineError, match="stopped answering"):
        engine.chat(requests(*"abcde"))


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_or_model_ends_it_at_once(server: Server, status: int) -> None:
    server.script["a"] = [status]
    with build(config(server, concurrency=1)) as engine, pytest.raises(EngineError, match="refuses"):
        engine.chat(requests("a", "b"))


def test_concurrency_is_used_and_bounded(server: Server) -> None:
    server.barrier = threading.Barrier(3)  # no answer before three are there
    with build(config(server, concurrency=3)) as engine:
        engine.chat(requests(*"abcdef"))
    assert server.most == 3


def test_key_seed_and_parsed_reasoning(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVRT_TEST_KEY", "secret")
    with build(config(server, api_key_env="AVRT_TEST_KEY")) as engine:
        (found,) = engine.chat(requests("a", seed=5))
    assert server.keys == {"Bearer secret"}
    assert server.seen[0]["seed"] == 5
    assert found.text == "<think>why</think>echo a"


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AVRT_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="AVRT_TEST_KEY"):
        build(config(api_key_env="AVRT_TEST_KEY"))
