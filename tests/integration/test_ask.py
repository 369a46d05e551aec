"""`avrt ask` against a real vLLM, and what vLLM says of media that it cannot take."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from avrt_lib import models
from avrt_lib.cli import main as cli
from avrt_lib.config import load
from avrt_lib.miniature import world
from avrt_lib.serving.server import ServedModel

pytestmark = pytest.mark.slow

CONFIG = load(Path(__file__).parents[2] / "configs/miniature.yaml")
NOISE = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    log = tmp_path_factory.mktemp("served") / "serving.log"
    model = models.resolve("builtin:student")
    with ServedModel(
        model, "some-student", student=CONFIG.student, frames=CONFIG.data.frames, log=log, start_timeout_s=1800
    ) as running:
        yield running


def clip(folder: Path) -> Path:
    path = folder / "clip.mp4"
    question = world.clip_question(1, 0)
    world.write_clip(path, 1, 0, question.sight, question.sound)
    return path


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["ask", "What?", *arguments])
    seen = capsys.readouterr()
    code = ended.value.code
    return code if isinstance(code, int) else 0, " ".join(seen.out.split()), " ".join(seen.err.split())


def test_a_remote_endpoint_is_asked_by_address_and_key(
    served: ServedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEY_OF_THE_ENDPOINT", served.api_key)
    question = ("-o", "one", "-o", "two", "--video", str(clip(tmp_path)), "--url", f"http://127.0.0.1:{served.port}")
    code, out, _ = ask(capsys, *question, "--api-key-env", "KEY_OF_THE_ENDPOINT")
    assert code == 0
    assert "nswer" in out  # "Answer: …", or why the untrained model's text holds none
    code, _, err = ask(capsys, *question, "--api-key", "wrong")
    assert (code, "refused the API key" in err) == (11, True)
    code, _, err = ask(capsys, *question, "--api-key", served.api_key, "--model", "another")
    assert (code, "answered 404: The model `another` does not exist" in err) == (11, True)


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def wav(seconds: float) -> bytes:
    target = io.BytesIO()
    soundfile.write(target, np.zeros(int(16_000 * seconds), dtype=np.int16), 16_000, format="WAV")
    return target.getvalue()


def part(kind: str, url: str) -> dict[str, Any]:
    return {"type": kind, kind: {"url": url}}


def test_media_that_cannot_be_taken_are_the_clients_fault_and_said(served: ServedModel, tmp_path: Path) -> None:
    """The server goes on to answer afterwards."""
    whole = clip(tmp_path).read_bytes()
    cases = {
        "noise as video": part("video_url", data_url("video/mp4", NOISE)),
        "cut video": part("video_url", data_url("video/mp4", whole[: len(whole) // 3])),
        "empty video": part("video_url", data_url("video/mp4", b"")),
        "noise as pre-sampled frames": part("video_url", data_url("video/jpeg", NOISE)),
        "noise as sound": part("audio_url", data_url("audio/wav", NOISE)),
        "noise as input_audio": {
            "type": "input_audio",
            "input_audio": {"data": base64.b64encode(NOISE).decode(), "format": "wav"},
        },
        "cut sound": part("audio_url", data_url("audio/wav", wav(1)[:20])),
        "no base64": part("audio_url", "data:audio/wav;base64,%%%"),
        "sound of ten minutes": part("audio_url", data_url("audio/wav", wav(600))),
        "picture that is none": part("image_url", data_url("image/png", NOISE)),
    }
    seen = {name: chat(served, media) for name, media in cases.items()}
    # vLLM 0.32 calls a WAV file that ends within its header its own fault.
    expected = dict.fromkeys(cases, 400) | {"cut sound": 500}
    assert {name: answer.status_code for name, answer in seen.items()} == expected
    for name, answer in seen.items():
        assert len(answer.json()["error"]["message"]) > 20, name
    assert chat(served, part("video_url", data_url("video/mp4", whole))).status_code == 200


def test_a_request_that_is_too_large_is_refused_before_it_is_read(served: ServedModel) -> None:
    answer = chat(served, part("audio_url", "data:audio/wav;base64," + "A" * (65 * 2**20)))
    assert answer.status_code == 413
    assert "64 MiB" in answer.json()["error"]["message"]


def chat(served: ServedModel, media: dict[str, Any]) -> httpx.Response:
    body = {
        "model": "some-student",
        "messages": [{"role": "user", "content": [media, {"type": "text", "text": "What is it?"}]}],
        "max_tokens": 4,
    }
    headers = {"Authorization": f"Bearer {served.api_key}"}
    return httpx.post(f"{served.base_url}/chat/completions", json=body, headers=headers, timeout=300, trust_env=False)
