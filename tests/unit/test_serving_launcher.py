"""The launcher's options, without vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from avrt_lib.engine import student_media
from avrt_lib.errors import ConfigError, UsageError
from avrt_lib.serving import launcher


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def arguments(model: Path, *more: str, on_cpu: bool = True) -> list[str]:
    options = launcher.parser().parse_args([f"--model={model}", "--served-model-name=m", *more])
    return launcher.vllm_arguments(options, "/empty", on_cpu=on_cpu)


def value(given: list[str], name: str) -> str:
    return given[given.index(name) + 1]


def test_media_enter_as_in_training(model: Path) -> None:
    given = arguments(model, "--video-longest-side-px=28", "--frames=4")
    kwargs = json.loads(value(given, "--mm-processor-kwargs"))
    assert kwargs["videos_kwargs"]["size"]["longest_edge"] == 28 * 28
    assert json.loads(value(given, "--media-io-kwargs")) == student_media.media_io_kwargs(4)
    assert json.loads(value(given, "--limit-mm-per-prompt")) == {"image": 8, "video": 1, "audio": 1}


def test_nothing_is_fetched_and_the_key_is_not_shown(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVRT_API_KEY", "secret-key")
    given = arguments(model)
    assert value(given, "--allowed-media-domains").endswith(".invalid")
    assert value(given, "--allowed-local-media-path") == "/empty"
    assert "--api-key" not in given
    assert "secret-key" not in " ".join(given)


@pytest.mark.parametrize(("on_cpu", "expected"), [(True, True), (False, False)])
def test_only_a_cpu_runs_eagerly(model: Path, on_cpu: bool, expected: bool) -> None:
    assert ("--enforce-eager" in arguments(model, on_cpu=on_cpu)) is expected


@pytest.mark.parametrize(
    "option",
    [
        "--api-key",
        "--api-key=k",
        "--middleware",
        "--allowed-local-media-path=/",
        "--allowed-local=/",
        "--allowed_media_domains=h",
        "--uds",
        "--config=file.yaml",
    ],
)
def test_what_the_launcher_closes_stays_closed(model: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVRT_API_KEY", "k")
    with pytest.raises(UsageError, match="decided by the launcher"):
        launcher.main([f"--model={model}", "--served-model-name=m", option])


def test_a_key_is_needed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launcher.API_KEYS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="AVRT_API_KEY is not set"):
        launcher.main([f"--model={model}", "--served-model-name=m"])


@pytest.mark.parametrize("limit", ["", "0", "-1", "1.5", "64MiB"])
def test_a_limit_that_is_none_is_named_before_the_model_loads(
    model: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("AVRT_API_KEY", "k")
    monkeypatch.setenv("AVRT_MAX_REQUEST_MIB", limit)
    with pytest.raises(ConfigError, match=r"AVRT_MAX_REQUEST_MIB is .* a whole number of MiB"):
        launcher.main([f"--model={model}", "--served-model-name=m"])


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        launcher.main([f"--model={tmp_path}", "--served-model-name=m"])


def test_the_key_reaches_vllm_by_the_environment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVRT_API_KEY", "k\n")  # a secret that was made of a file
    monkeypatch.setenv("VLLM_API_KEY", "old")
    monkeypatch.setenv("AVRT_EXPOSE_METRICS", "1")
    launcher._set_environment(launcher.parser().parse_args([f"--model={model}", "--served-model-name=m"]))
    assert os.environ["VLLM_API_KEY"] == "k"
    assert os.environ["AVRT_EXPOSE_METRICS"] == "0"
