"""Asking a served student: the same prompt, media budget and answer extractor as in training and evaluation."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from avrt_lib import answers
from avrt_lib.config import Config
from avrt_lib.engine import messages
from avrt_lib.errors import ServingError, UsageError
from avrt_lib.records import LETTERS, Sample


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
    model: str,
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
        model: the served model's name.
        config: the media budget (``data``), the prompt (``student``) and the answer's length (``evaluation``).
        question: the question without its options.
        options: two to eight option texts.
        video: a clip; its own sound is used unless ``audio`` is given.
        audio: a sound file.
        image: a still picture instead of a clip.
        timeout_s: None takes ``deployment.request_timeout_s``.

    Raises:
        UsageError: where the options are too few or too many, or no media is given.
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
    return ask_sample(base_url, api_key, model, sample, config=config, timeout_s=timeout_s)


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
    started = time.monotonic()
    document = _post(base_url, api_key, body, timeout_s or config.deployment.request_timeout_s)
    latency = time.monotonic() - started
    raw = document["choices"][0]["message"]["content"] or ""
    answer = answers.extract(raw, sample.options)
    return Reply(
        raw=raw,
        reasoning=answers.split_reasoning(raw)[0],
        letter=answer.letter,
        text=None if answer.index is None else sample.options[answer.index],
        invalid_reason=answer.reason,
        latency_s=latency,
        tokens_in=int(document["usage"]["prompt_tokens"]),
        tokens_out=int(document["usage"]["completion_tokens"]),
    )


def _post(base_url: str, api_key: str | None, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    url = f"{base_url.rstrip('/')}/chat/completions"
    try:
        # A proxy that is set for the outside world does not lead to this machine's loopback.
        with httpx.Client(timeout=timeout_s, trust_env=not _is_loopback(base_url)) as client:
            response = client.post(url, json=body, headers=headers)
    except httpx.TimeoutException as error:
        raise ServingError(f"{base_url} did not answer within {timeout_s:g} s.") from error
    except httpx.HTTPError as error:
        raise ServingError(f"No server answers at {base_url} ({error}): start one with `avrt serve`.") from error
    if response.status_code == 401:
        raise ServingError(f"{base_url} refused the API key: give the key that `avrt serve` showed.")
    if response.is_error:
        raise ServingError(f"{base_url} answered {response.status_code}: {' '.join(response.text.split())[:300]}")
    document: dict[str, Any] = response.json()
    return document


def _is_loopback(url: str) -> bool:
    host = urlparse(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
