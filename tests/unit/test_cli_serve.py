"""What ``avrt serve`` takes from its surroundings, and what ``avrt run`` says to type next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from avrt_lib import store
from avrt_lib.cli.console import program
from avrt_lib.cli.run import _example
from avrt_lib.cli.serve import _api_key, champion_folder, serve_model
from avrt_lib.config import StoreConfig
from avrt_lib.errors import UsageError
from avrt_lib.models import write_manifest
from avrt_lib.runs import RunFolder
from avrt_lib.tables import write_json


def test_the_key_is_that_of_the_environment_or_of_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, where = _api_key(tmp_path)
    assert (tmp_path / "api-key").read_text(encoding="utf-8").strip() == kept
    assert where == str(tmp_path / "api-key")
    monkeypatch.setenv("AVRT_API_KEY", "given")
    assert _api_key(tmp_path) == ("given", "AVRT_API_KEY")


def test_a_key_file_without_a_key_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVRT_API_KEY", "\n")
    (tmp_path / "api-key").touch()
    with pytest.raises(UsageError, match="api-key is empty: remove it"):
        _api_key(tmp_path)


def test_a_folder_without_a_model_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing is not a model folder \(it has no config\.json\)"):
        serve_model(tmp_path / "runs", run="latest", model=tmp_path / "nothing", host="127.0.0.1", port=8000)
    assert list(tmp_path.iterdir()) == []


def test_a_champion_that_is_here_needs_no_store(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_manifest(model, {})
    place = store.publish_model(model, "student", StoreConfig(kind="local"), tmp_path / "store")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    target = run.path / "champion" / place.sha256
    store.download_model(place.uri, target)
    champion = {"uri": f"s3://nowhere/models/student/{place.sha256}", "sha256": place.sha256}
    write_json(run.summary_file, {"champion": champion})
    assert champion_folder(run) == target


@pytest.mark.parametrize(
    ("called", "on_path", "typed"),
    [
        (".venv/bin/avrt", False, ".venv/bin/avrt"),
        (".venv/bin/avrt", True, "avrt"),
        ("pytest", False, "avrt"),
    ],
)
def test_the_program_is_named_as_it_can_be_called(
    called: str, on_path: bool, typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / ".venv" / "bin" / "avrt"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setenv("PATH", str(script.parent) if on_path else "/nowhere")
    assert program() == typed


def test_the_example_asks_about_a_clip_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "run")
    assert "clip.mp4" in _example(run)
    rendered = run.work / "scratch" / "ingest" / "key" / "rendered" / "test-2-7"
    rows = [
        {"video_name": f"test-{n}", "question_text": "Which one?", "multi_choice": ["a b", "c"], "question_type": kind}
        for n, kind in enumerate(("either", "both"))
    ]
    rendered.mkdir(parents=True)
    write_json(rendered / "annotations.json", rows)
    words = shlex.split(_example(run))
    assert words[0] == "--video"
    assert Path(words[1]) == (rendered / "videos" / "test-1.mp4").relative_to(tmp_path)
    assert words[2:] == ["Which one?", "--option", "a b", "--option", "c"]
