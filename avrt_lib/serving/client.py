"""Asking a served student: the same prompt, media budget and answer extractor as in training and evaluation."""

from __future__ import annotations

import ipaddress
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from avrt_lib import answers
from avrt_lib.config import Config
from avrt_lib.engine import messages
from avrt_lib.errors import ServingError, UsageError
from avrt_lib.keys import header_key
from avrt_lib.records import LETTERS, Sample

if TYPE_CHECKING:
    import httpx

_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a served student answered.

    Attributes:
        raw: its whole text.
        reasoning: the think section without tags; empty for a model that answers directly.
        letter: the option's letter, or None where the text has no valid answer (then ``invalid_reason`` says why).
        text: the option's text, or None.
        latency_s: from sending the request to having the whole answer.
    """

    raw: str
    reasoning: str
    letter: str | None
    text: str | None
    invalid_reason: str | None
    latency_s: float
    tokens_in: int
    tokens_out: int


def ask(
    base_url: str,
    api_key: str | None,
    model: str | None,
    *,
    config: Config,
    question: str,
    options: Sequence[str],
    video: Path | None = None,
    audio: Path | None = None,
    image: Path | None = None,
    timeout_s: float | None = None,
) -> Reply:
    """Ask about the user's own clip.

    Args:
        base_url: the OpenAI address, ending in ``/v1``.
        api_key: the server's key, if it wants one.
        model: the served model's name; None asks the server (``served_model``).
        config: the media budget (``data``), the prompt (``student``) and the answer's length (``evaluation``).
        question: the question without its options.
        options: two to eight option texts.
        video: a clip; its own sound is used unless ``audio`` is given.
        audio: a sound file.
        image: a still picture instead of a clip.
        timeout_s: None takes ``deployment.request_timeout_s``.

    Raises:
        UsageError: where the options are too few or too many, no media is given, or several models are served.
        ConfigError: where the key is none that can be sent.
        MediaError: where a file cannot be decoded; the message names it.
        ServingError: where the server does not answer, or refuses.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise UsageError(f"A question needs two to {len(LETTERS)} options, not {len(options)}.")
    if video is None and audio is None and image is None:
        raise UsageError("Name a clip, a sound or a picture to ask about.")
    from avrt_lib.ingest import media

    found = media.load(media.Budget.of(config.data), video=video, audio=audio, image=image)
    sample = Sample(
        id="asked",
        source="ask",
        split="test",
        question=question,
        options=list(options),
        answer_index=None,
        question_type="",
        needs="unknown",
        media_kind=found.kind,
        frames=found.frames,
        frame_times_s=found.frame_times_s,
        audio=found.audio,
        duration_s=found.duration_s,
        width=found.width,
        height=found.height,
        fps=found.fps,
        media_sha256=found.sha256,
        group="asked",
    )
    name = model or served_model(base_url, api_key, config.promotion.model_name)
    return ask_sample(base_url, api_key, name, sample, config=config, timeout_s=timeout_s)


def ask_sample(
    base_url: str,
    api_key: str | None,
    model: str,
    sample: Sample,
    *,
    config: Config,
    timeout_s: float | None = None,
) -> Reply:
    """Ask about media that are decoded already; otherwise as ``ask``."""
    asked = messages.student_messages(config.student.prompt, sample)
    if asked is None:
        raise UsageError(f"The sample {sample.id} has neither pictures nor sound to ask about.")
    body = {"model": model, "messages": asked, "max_tokens": config.evaluation.max_tokens, "temperature": 0.0}
    wait_s = timeout_s or config.deployment.request_timeout_s
    started = time.monotonic()
    document = _request("POST", base_url, "/chat/completions", api_key, wait_s, body)
    latency = time.monotonic() - started
    usage = document.get("usage") or {}
    try:
        raw = document["choices"][0]["message"]["content"] or ""
        tokens_in, tokens_out = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _no_api(base_url, str(document)) from error
    if not isinstance(raw, str):
        raise _no_api(base_url, str(document))
    answer = answers.extract(raw, sample.options)
    return Reply(
        raw=raw,
        reasoning=answers.split_reasoning(raw)[0],
        letter=answer.letter,
        text=None if answer.index is None else sample.options[answer.index],
        invalid_reason=answer.reason,
        latency_s=latency,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
    )


def api_address(url: str) -> str:
    """The OpenAI address that a user means: with ``/v1``, without what clients add to it.

    >>> api_address("https://models.example.com/"), api_address("http://h:8000/v1/chat/completions")
    ('https://models.example.com/v1', 'http://h:8000/v1')

    Raises:
        UsageError: where it is no address of the web, or holds a password.
    """
    try:
        parts = urlsplit(url.strip())
        host = parts.hostname
        parts.port  # noqa: B018  (a bad one raises)
    except ValueError as error:
        raise UsageError(f"The server's address is not valid ({error}): give one like https://HOST/v1.") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"{url!r} is no address of a server: give one like https://HOST/v1.")
    if parts.username or parts.password:
        raise UsageError("The server's address holds a password: give the API key with --api-key-env instead.")
    path = parts.path.rstrip("/")
    for known in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(known)
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))


def served_model(base_url: str, api_key: str | None, wanted: str, *, timeout_s: float = 30.0) -> str:
    """The name of the served model.

    Args:
        base_url: the OpenAI address, ending in ``/v1``.
        api_key: the server's key, if it wants one.
        wanted: taken where the server has it, and needed where it has several.

    Raises:
        UsageError: where it serves several models and none is the wanted one.
        ServingError: where the server does not answer, or refuses.
    """
    document = _request("GET", base_url, "/models", api_key, timeout_s)
    try:
        names = [str(entry["id"]) for entry in document["data"]]
    except (KeyError, TypeError) as error:
        raise _no_api(base_url, str(document)) from error
    if wanted in names:
        return wanted
    if len(names) == 1:
        return names[0]
    if not names:
        raise ServingError(f"{base_url} serves no model.")
    raise UsageError(f"{base_url} serves {', '.join(names[:8])}: say which one with --model.")


def is_loopback(url: str) -> bool:
    """Whether an address leads to this machine itself."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _request(
    method: str, base_url: str, path: str, api_key: str | None, timeout_s: float, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    import httpx

    key = header_key(api_key or "", "The API key")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connect_s = min(timeout_s, _CONNECT_S)
    try:
        with httpx.Client(
            # A proxy that is set for the outside world does not lead to this machine's loopback.
            trust_env=not is_loopback(base_url),
            verify=httpx.create_ssl_context(),  # SSL_CERT_FILE and SSL_CERT_DIR hold everywhere
            timeout=httpx.Timeout(timeout_s, connect=connect_s),
        ) as client:
            response = client.request(method, f"{base_url.rstrip('/')}{path}", json=body, headers=headers)
    except httpx.TimeoutException as error:
        waited_s = connect_s if isinstance(error, httpx.ConnectTimeout) else timeout_s
        raise ServingError(f"{base_url} did not answer within {waited_s:g} s.") from error
    except httpx.ConnectError as error:
        mend = _connection_mend(base_url, str(error))
        raise ServingError(f"No server answers at {base_url} ({error}): {mend}.") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        # OSError: certificates that cannot be read.
        raise ServingError(f"The connection to {base_url} failed ({type(error).__name__}: {error}).") from error
    if not response.is_success:
        raise ServingError(f"{base_url} {_refusal(response)}.")
    try:
        document = response.json()
    except ValueError as error:
        raise _no_api(base_url, response.text) from error
    if not isinstance(document, dict):
        raise _no_api(base_url, response.text)
    return document


def _refusal(response: httpx.Response) -> str:
    status, said = response.status_code, _said(response.text)
    detail = f": {said}" if said else ""
    if status == 401:
        return f"refused the API key{detail} (give the server's own in AVRT_API_KEY)"
    if status == 403:
        return f"answered 403, the API key may not be used{detail}"
    if 300 <= status < 400:
        return f"answered {status}: give the address that it leads to, {response.headers.get('location', 'unknown')}"
    if status == 404:
        return (
            f"answered 404{detail} (is the address that of the API, which ends in /v1, and is the model's name right?)"
        )
    if status == 413:
        return f"answered 413, the clip is too large for it{detail} (give a shorter one)"
    if status == 429 or status >= 500:
        wait = response.headers.get("retry-after", "")
        return f"answered {status}{detail} (try again {f'in {wait} s' if wait.isdecimal() else 'later'})"
    return f"answered {status}{detail}"


def _said(text: str) -> str:
    """The message in an error's JSON body, or the first words of another body."""
    try:
        document = json.loads(text)
    except ValueError:
        return " ".join(re.sub(r"<[^>]*>", " ", text).split())[:200]
    error = document.get("error", document) if isinstance(document, dict) else document
    message = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:400].rstrip(".")


def _connection_mend(base_url: str, said: str) -> str:
    if "CERTIFICATE" in said:
        return "name its certificate authority in SSL_CERT_FILE"
    if "SSL" in said:
        return "does it speak https"
    return "start one with `avrt serve`" if is_loopback(base_url) else "correct the address, or the proxy"


def _no_api(base_url: str, said: str) -> ServingError:
    return ServingError(
        f"{base_url} does not answer as an OpenAI-compatible server ({' '.join(said.split())[:100]}): give the address "
        "that ends in /v1."
    )
