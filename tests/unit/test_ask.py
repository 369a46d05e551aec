"""`avrt ask` and its client where the server is elsewhere: what it sends, and what it says of what comes back.

The server here gives the answers that vLLM and proxies in front of it give; with a real model: tests/integration.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from avrt_lib.cli import main as cli
from avrt_lib.errors import UsageError
from avrt_lib.miniature import world
from avrt_lib.serving import client
from tests.git_https import write_certificate

ANSWER = "<think>It barks.</think><answer>B. a dog</answer>"
COMPLETION = {
    "choices": [{"message": {"content": ANSWER}}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 5},
}


@dataclass
class Answering:
    """A server whose answers a test sets, by path; it keeps what it was asked."""

    models: tuple[str, ...] = ("avrt-student",)
    chat: tuple[int, Any] = (200, COMPLETION)
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str | None, Any]] = field(default_factory=list)
    delay_s: float = 0.0
    url: str = ""


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Answering]:
    answering = Answering()

    class Handler(BaseHTTPRequestHandler):
        protocol_version: ClassVar[str] = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, {"object": "list", "data": [{"id": name} for name in answering.models]}, None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(*answering.chat, body)

        def _answer(self, status: int, document: Any, body: Any) -> None:
            answering.asked.append((self.path, self.headers["Authorization"], body))
            time.sleep(answering.delay_s)
            text = document if isinstance(document, str) else json.dumps(document)
            self.send_response(status)
            for name, value in {**answering.headers, "Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            with contextlib.suppress(OSError):  # who asked may have given up
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scheme = getattr(request, "param", "http")
    if scheme == "https":
        certificate, key = write_certificate(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    answering.url = f"{scheme}://127.0.0.1:{http.server_port}"
    yield answering
    http.shutdown()
    thread.join(10)
    http.server_close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    question = world.clip_question(1, 0)
    world.write_clip(path, 1, 0, question.sight, question.sound)
    return path


@pytest.fixture
def ask(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: Path, server: Answering
) -> Any:
    """Calls `avrt ask` in an empty folder; returns the exit code and both outputs, each as one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVRT_DEBUG", "")

    def call(*more: str, url: str | None = None) -> tuple[int, str, str]:
        question = ("What?", "-o", "a cat", "-o", "a dog", "--video", str(clip))
        with pytest.raises(SystemExit) as ended:
            cli.main(["ask", *question, "--url", server.url if url is None else url, *more])
        seen = capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, " ".join(seen.out.split()), " ".join(seen.err.split())

    return call


def test_a_remote_model_is_found_by_its_address_alone(ask: Any, server: Answering) -> None:
    code, out, err = ask()
    assert (code, "It barks." in out, "Answer: B. a dog" in out) == (0, True, True)
    assert "9 tokens in, 5 out" in err
    (listed, key, _), (chat, _, body) = server.asked
    assert (listed, chat, key) == ("/v1/models", "/v1/chat/completions", None)
    assert body["model"] == "avrt-student"
    kinds = [part["type"] for part in body["messages"][-1]["content"]]
    assert kinds == ["video_url", "input_audio", "text"]


def test_the_key_comes_from_a_variable_or_an_option(
    ask: Any, server: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVRT_API_KEY", "of-avrt")
    monkeypatch.setenv("OTHER_KEY", "of-other")
    for options in ((), ("--api-key", "given"), ("--api-key-env", "OTHER_KEY")):
        assert ask(*options)[0] == 0
    assert [key for path, key, _ in server.asked if path.endswith("completions")] == [
        "Bearer of-avrt",
        "Bearer given",
        "Bearer of-other",
    ]
    code, _, err = ask("--api-key-env", "NO_SUCH_KEY")
    assert (code, "NO_SUCH_KEY (--api-key-env) is not set" in err) == (2, True)


def test_a_key_that_no_header_may_hold_is_not_shown(
    ask: Any, server: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVRT_API_KEY", "s3cret\n")  # as from a file
    assert ask()[0] == 0
    assert server.asked[-1][1] == "Bearer s3cret"
    for key in ("s3cret\nsecond", "s3crét"):
        monkeypatch.setenv("AVRT_API_KEY", key)
        code, out, err = ask()
        assert (code, "The API key holds a line break or a character outside ASCII" in err) == (3, True)
        assert "s3cr" not in out + err


def test_the_key_of_this_machine_stays_on_it(
    ask: Any, server: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/api-key").write_text("local\n")
    assert ask()[0] == 0
    assert {key for _, key, _ in server.asked} == {"Bearer local"}
    server.asked.clear()
    # the same server by a name that is not known to be loopback
    monkeypatch.setattr(client, "is_loopback", lambda _url: False)
    assert ask()[0] == 0
    assert {key for _, key, _ in server.asked} == {None}
    assert "unencrypted" in ask("--api-key", "k")[2]


def test_of_several_models_one_must_be_named(ask: Any, server: Answering) -> None:
    server.models = ("one", "two")
    code, _, err = ask()
    assert (code, "serves one, two: say which one with --model" in err) == (2, True)
    assert ask("--model", "two")[0] == 0
    assert server.asked[-1][2]["model"] == "two"
    server.models = ("one", "avrt-miniature")
    assert ask()[0] == 0
    assert server.asked[-1][2]["model"] == "avrt-miniature"


def vllm_error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, vllm_error(400, "The decoder prompt is too long."), "answered 400: The decoder prompt is too long."),
        (
            401,
            {"error": "Unauthorized"},
            "refused the API key: Unauthorized (give the server's own in AVRT_API_KEY)",
        ),
        (403, "RBAC: access denied", "answered 403, the API key may not be used: RBAC: access denied"),
        (404, vllm_error(404, "The model `x` does not exist."), "answered 404: The model `x` does not exist (is the"),
        (413, "<html><h1>413 Request Entity Too Large</h1></html>", "413, the clip is too large for it: 413 Request"),
        (429, {"detail": "slow down"}, "answered 429: slow down (try again in 7 s)"),
        (502, "<html><body>Bad Gateway</body></html>", "answered 502: Bad Gateway (try again in 7 s)"),
        (503, "no healthy upstream", "answered 503: no healthy upstream (try again in 7 s)"),
        (301, "", "answered 301: give the address that it leads to, https://models.example.com/v1"),
        (200, "<html>Welcome</html>", "does not answer as an OpenAI-compatible server (<html>Welcome</html>)"),
        (200, {"object": "error"}, "does not answer as an OpenAI-compatible server"),
        (200, {"choices": []}, "does not answer as an OpenAI-compatible server"),
        (
            200,
            {"choices": [{"message": {"content": [{"type": "text", "text": ANSWER}]}}]},
            "does not answer as an OpenAI-compatible server",
        ),
        (200, {**COMPLETION, "usage": [9, 5]}, "does not answer as an OpenAI-compatible server"),
        (200, {**COMPLETION, "usage": {"prompt_tokens": "many"}}, "does not answer as an OpenAI-compatible server"),
    ],
)
def test_what_a_server_refuses_is_one_line_with_the_mend(
    ask: Any, server: Answering, status: int, body: Any, said: str
) -> None:
    server.chat = (status, body)
    server.headers = {"Retry-After": "7", "Location": "https://models.example.com/v1"}
    code, _, err = ask("--api-key", "s3cret")
    assert said in err
    assert code == 11
    assert err.count("avrt: error: ") == 1
    assert "s3cret" not in err


def test_an_answer_without_token_counts_is_an_answer(ask: Any, server: Answering) -> None:
    server.chat = (200, {"choices": [{"message": {"content": ANSWER}}]})
    assert "Answer: B. a dog" in ask()[1]


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("http://127.0.0.1:1", 11, "No server answers at http://127.0.0.1:1/v1"),
        ("http://nowhere.invalid/v1", 11, "correct the address, or the proxy"),
        ("models.example.com", 2, "'models.example.com' is no address of a server"),
        ("ftp://models.example.com", 2, "is no address of a server"),
        ("http://h:port/v1", 2, "is not valid"),
        ("https://user:s3cret@models.example.com", 2, "holds a password"),
    ],
)
def test_wrong_addresses(ask: Any, url: str, code: int, said: str) -> None:
    found, _, err = ask(url=url)
    assert said in err
    assert found == code
    assert "s3cret" not in err


@pytest.mark.parametrize("server", ["https"], indirect=True)
def test_https_with_an_authority_of_ones_own(
    ask: Any, server: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = ask()
    assert (code, "name its certificate authority in SSL_CERT_FILE" in err) == (11, True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert ask()[0] == 0
    code, _, err = ask(url=server.url.replace("https", "http"))
    assert (code, err.count("avrt: error: ")) == (11, 1)


def test_plain_http_where_https_is_asked_for(ask: Any, server: Answering) -> None:
    code, _, err = ask(url=server.url.replace("http", "https"))
    assert (code, "does it speak https" in err) == (11, True)


def test_a_server_that_is_slow_is_not_waited_for(ask: Any, server: Answering) -> None:
    server.delay_s = 3.0
    code, _, err = ask("--timeout", "0.5", "--model", "m")
    assert (code, "did not answer within 0.5 s" in err) == (11, True)


def test_a_broken_clip_is_named_before_anything_is_sent(ask: Any, server: Answering, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    code, _, err = ask("--video", str(tmp_path / "broken.mp4"))
    assert (code, "broken.mp4" in err) == (4, True)
    assert server.asked == []


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h", "http://h/v1"),
        ("http://h:8000/v1/", "http://h:8000/v1"),
        ("https://h/v1/chat/completions", "https://h/v1"),
        ("https://h/v1/models", "https://h/v1"),
        ("https://h/serving/avrt/v1", "https://h/serving/avrt/v1"),
    ],
)
def test_the_address_that_is_meant(given: str, meant: str) -> None:
    assert client.api_address(given) == meant


def test_no_address_at_all() -> None:
    with pytest.raises(UsageError, match="no address"):
        client.api_address("")
