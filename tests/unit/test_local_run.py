"""What the pipeline's process is given, without the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from avrt_lib import local_run, tracking
from avrt_lib.config import load
from avrt_lib.errors import ConfigError
from avrt_lib.runs import create

MINIATURE = Path(__file__).parents[2] / "configs" / "miniature.yaml"


def test_steps_keep_their_checkpoints_in_the_bucket_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(local_run, "_compile", lambda *_: None)
    monkeypatch.setattr(local_run, "_pipeline", lambda folder, environment, *_: seen.append(environment))
    monkeypatch.setattr(tracking, "start_parent", lambda *_, **__: {})
    monkeypatch.setenv("AVRT_S3_ENDPOINT", "store.example.com:9000")
    monkeypatch.delenv("AVRT_S3_BUCKET", raising=False)
    config = load(MINIATURE, {"store.bucket": "ours"})
    local_run.execute(create(tmp_path, config), config, "d", lambda: None)
    (environment,) = seen
    assert environment["AVRT_S3_BUCKET"] == "ours"
    assert environment["AVRT_S3_ENDPOINT"] == "store.example.com:9000"


def test_a_failed_compilation_has_the_code_of_what_failed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: Not A Name")
    with pytest.raises(ConfigError, match=r"could not be compiled: .*config\.yaml"):
        local_run.compile_to(tmp_path / "config.yaml", tmp_path / "pipeline.yaml")
