"""The launcher, the client and the deployment step with a real vLLM and the miniature's base student."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from avrt_lib import models, prompts, store
from avrt_lib.child_servers import free_ports
from avrt_lib.config import Config, load
from avrt_lib.engine import messages
from avrt_lib.errors import PortInUseError, ServingError
from avrt_lib.ingest import media
from avrt_lib.miniature import world
from avrt_lib.records import Sample
from avrt_lib.serving import client, deployment
from avrt_lib.serving.server import ServedModel
from avrt_lib.tables import read_json, write_json, write_table
from avrt_lib.training.chat_template import with_instruction
from avrt_lib.workspace import Workspace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEXT = {"type": "text", "text": "What is it?"}


def configured(**more: Any) -> Config:
    return load(ROOT / "configs/miniature.yaml", {"store.kind": "local", **more})


CONFIG = configured()


def serve(log: Path, model: Path | None = None, **options: Any) -> ServedModel:
    folder = model or models.resolve("builtin:student")
    options.setdefault("start_timeout_s", 1800.0)  # several test processes may share two cores
    return ServedModel(folder, "student", student=CONFIG.student, frames=CONFIG.data.frames, log=log, **options)


def group_is_gone(group: int) -> bool:
    """Whether no process of the group runs; one that ended but is not yet reaped does not count."""
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return False
    return True


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    question = world.clip_question(1, 0)
    world.write_clip(path, 1, 0, question.sight, question.sound)
    return path


@pytest.fixture(scope="module")
def sample(clip: Path) -> Sample:
    found = media.load(media.Budget.of(CONFIG.data), video=clip)
    question = world.clip_question(1, 0)
    return Sample(
        id="test-0",
        source="test",
        split="test",
        question=question.text,
        options=list(question.options),
        answer_index=question.answer,
        question_type=question.kind,
        needs="both",
        media_kind=found.kind,
        frames=found.frames,
        frame_times_s=found.frame_times_s,
        audio=found.audio,
        duration_s=found.duration_s,
        width=found.width,
        height=found.height,
        fps=found.fps,
        media_sha256=found.sha256,
        group="0",
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with serve(tmp_path_factory.mktemp("served") / "serving.log") as running:
        yield running
        pid = running.pid
    assert group_is_gone(pid)


def request(served: ServedModel, method: str, path: str, key: str | None, body: Any = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"http://127.0.0.1:{served.port}{path}"
    return httpx.request(method, url, headers=headers, json=body, timeout=120, trust_env=False)


def chat(served: ServedModel, parts: list[dict[str, Any]], **more: Any) -> httpx.Response:
    body = {
        "model": "student",
        "messages": messages.chat("What is it?", parts),
        "max_tokens": 8,
        "temperature": 0,
        **more,
    }
    return request(served, "POST", "/v1/chat/completions", served.api_key, body)


@pytest.mark.parametrize(
    ("method", "path", "without_key", "with_key"),
    [
        ("GET", "/health", 200, 200),
        ("GET", "/v1/models", 401, 200),
        ("POST", "/v1/chat/completions", 401, 400),
        ("POST", "/v1/completions", 401, 400),
        *[
            (method, path, 404, 404)
            for method, path in [
                ("POST", "/invocations"),
                ("GET", "/ping"),
                ("POST", "/tokenize"),
                ("GET", "/metrics"),
                ("GET", "/version"),
                ("GET", "/openapi.json"),
                ("POST", "/v1/embeddings"),
                ("POST", "/v1/responses"),
            ]
        ],
    ],
)
def test_what_is_open(served: ServedModel, method: str, path: str, without_key: int, with_key: int) -> None:
    body = {} if method == "POST" else None
    assert request(served, method, path, None, body).status_code == without_key
    assert request(served, method, path, served.api_key, body).status_code == with_key
    assert request(served, method, path, "wrong", body).status_code == without_key


def test_the_key_is_on_no_command_line_and_in_no_log(served: ServedModel) -> None:
    assert served.api_key.encode() not in Path(f"/proc/{served.pid}/cmdline").read_bytes()
    assert served.api_key not in served.log.read_text()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/picture.jpg"}},
        {"type": "video_url", "video_url": {"url": "https://example.com/clip.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "ftp://example.com/sound.wav"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}},
    ],
)
def test_media_that_are_fetched_or_broken_are_the_clients_fault(served: ServedModel, part: dict[str, Any]) -> None:
    assert chat(served, [part]).status_code == 400


def test_limits_per_prompt(served: ServedModel, sample: Sample) -> None:
    video, images = messages.video_part(sample.frames), messages.image_parts(sample.frames * 3)
    assert chat(served, [video, video]).status_code == 400
    assert chat(served, images[:9]).status_code == 400
    assert chat(served, images[:8]).status_code == 200
    assert chat(served, [], mm_processor_kwargs={"fps": 1.0}).status_code == 400
    assert chat(served, [], max_tokens=100_000).status_code == 400


def test_a_users_own_clip_is_seen_and_heard(served: ServedModel, clip: Path, sample: Sample) -> None:
    reply = client.ask(
        served.base_url,
        served.api_key,
        "student",
        config=CONFIG,
        question=sample.question,
        options=sample.options,
        video=clip,
    )
    assert reply.letter in {"A", "B", "C", "D"}
    assert reply.text == sample.options["ABCD".index(reply.letter)]
    assert reply.latency_s < CONFIG.deployment.request_timeout_s
    whole = client.ask_sample(served.base_url, served.api_key, "student", sample, config=CONFIG)
    assert whole.raw == reply.raw
    parts = [messages.video_part(sample.frames), messages.audio_part(sample.audio or b"")]
    used = [chat(served, given).json()["usage"]["prompt_tokens"] for given in ([], parts[:1], parts[1:], parts)]
    text, seen, heard, both = used
    assert seen - text >= 4
    assert heard - text >= 25
    assert both - text == (seen - text) + (heard - text)


def test_errors_of_the_client(served: ServedModel, sample: Sample) -> None:
    with pytest.raises(ServingError, match="refused the API key"):
        client.ask_sample(served.base_url, "wrong", "student", sample, config=CONFIG)
    with pytest.raises(ServingError, match="answered 404"):
        client.ask_sample(served.base_url, served.api_key, "another", sample, config=CONFIG)
    with pytest.raises(ServingError, match=r"did not answer within 0\.001 s"):
        client.ask_sample(served.base_url, served.api_key, "student", sample, config=CONFIG, timeout_s=0.001)


def test_a_plain_question_gets_the_trained_instruction(served: ServedModel, sample: Sample, tmp_path: Path) -> None:
    """Seen in the length of the prompt: as long as that of a question that brings the instruction along."""
    instruction = prompts.instruction("reason")
    folder = shutil.copytree(models.resolve("builtin:student"), tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text(with_instruction(template.read_text(), instruction))

    def length(server: ServedModel, text: str) -> int:
        content = [messages.video_part(sample.frames), {"type": "text", "text": text}]
        answer = chat(server, [], messages=[{"role": "user", "content": content}])
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    plain, whole = "What is it?", f"What is it?\n{instruction}"
    with serve(tmp_path / "serving.log", folder) as taught:
        assert length(taught, plain) == length(taught, whole) == length(served, whole) > length(served, plain)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=str(port)), serve(tmp_path / "log", port=port):
            pass


def test_a_model_that_cannot_be_loaded_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    server = serve(tmp_path / "log", model=tmp_path)
    with pytest.raises(ServingError, match="ended while starting"), server:
        pass
    assert not server.running


def test_ctrl_c_while_starting_leaves_no_process(tmp_path: Path) -> None:
    seen: list[int] = []

    def interrupt(_waited: float) -> None:
        assert server._child is not None
        seen.append(server._child.pid)
        raise KeyboardInterrupt

    server = serve(tmp_path / "log", waiting=interrupt)
    with pytest.raises(KeyboardInterrupt), server:
        pass
    assert group_is_gone(seen[0])


def test_requests_in_flight_finish_while_new_ones_are_refused(tmp_path: Path) -> None:
    """Also: the port given is the port used, and nothing of the server is left."""
    (port,) = free_ports(1)
    with serve(tmp_path / "log", port=port, api_key="k") as served:
        pid = served.pid
        begun, lines = threading.Event(), []

        def write_much() -> None:
            body = {
                "model": "student",
                "messages": messages.chat("What is it?"),
                "max_tokens": 300,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            headers = {"Authorization": "Bearer k"}
            with httpx.stream(
                "POST", f"{served.base_url}/chat/completions", json=body, headers=headers, timeout=300
            ) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

        writer = threading.Thread(target=write_much)
        writer.start()
        assert begun.wait(120)
        os.kill(pid, 15)
        statuses = set()
        while writer.is_alive():
            with contextlib.suppress(httpx.HTTPError):
                statuses.add(request(served, "GET", "/health", None).status_code)
            writer.join(0.05)
        assert 503 in statuses
        sent = [line for line in lines if line]
        assert sent[-1] == "data: [DONE]"
        assert json.loads(sent[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 300
    assert group_is_gone(pid)


def test_the_champion_comes_from_the_store_and_passes_its_check(tmp_path: Path, sample: Sample) -> None:
    """The base answers without reasoning, so its form is the one of a model that was trained on bare answers."""
    config = configured(**{"sft.target": "answer", "deployment.start_timeout_s": 1800})
    place = store.publish_model(models.resolve("builtin:student"), "avrt-miniature", config.store, tmp_path / "store")
    decision = {"promoted": True, "reason": "better", "uri": place.uri, "sha256": place.sha256, "version": 1}
    write_json(tmp_path / "champion/champion.json", decision)
    write_table(tmp_path / "samples", Sample, [sample] * 3)
    workspace = Workspace(tmp_path / "work", "deployment", tmp_path / "work/scratch/deployment")
    facts = deployment.run(
        config,
        workspace=workspace,
        samples=tmp_path / "samples",
        champion=tmp_path / "champion",
        check=tmp_path / "check",
    )
    assert (facts["ok"], facts["status"], facts["answers"], facts["uri"]) == (True, "succeeded", 3, place.uri)
    assert 0 < facts["latency_s"]["p50"] <= facts["latency_s"]["max"]
    written = read_json(tmp_path / "check/check.json")
    assert [q["sample_id"] for q in written["questions"]] == ["test-0"] * 3
    assert all(q["letter"] and q["well_formed"] for q in written["questions"])
    assert list(workspace.scratch.iterdir()) == []
