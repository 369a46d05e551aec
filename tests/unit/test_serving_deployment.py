"""What the deployment step makes of answers and of a decision, without a served model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.config import load
from avrt_lib.errors import DataError, ServingError, UsageError
from avrt_lib.records import Sample
from avrt_lib.serving import client, deployment
from avrt_lib.tables import read_json, write_table
from avrt_lib.workspace import Workspace

CONFIG = load(Path(__file__).parents[2] / "configs/miniature.yaml")
REFUSED = {"promoted": False, "uri": None, "sha256": None, "version": None, "reason": "Not promoted: chance."}


def reply(well_formed: bool = True, error: str | None = None, latency: float = 1.0) -> dict[str, Any]:
    return {"well_formed": well_formed and error is None, "error": error, "latency_s": latency}


@pytest.mark.parametrize(
    ("replies", "promoted", "ok"),
    [
        ([reply(), reply(), reply()], True, True),
        ([reply(), reply(), reply(False)], True, True),
        ([reply(), reply(False), reply(False)], True, False),
        ([reply(False)], True, False),
        ([reply(), reply(), reply(error="timed out")], True, False),
        ([reply(False), reply(False)], False, True),
        ([reply(False), reply(error="timed out")], False, False),
    ],
)
def test_judgement(replies: list[dict[str, Any]], promoted: bool, ok: bool) -> None:
    found = deployment.judge(CONFIG, replies, promoted=promoted)
    assert found["ok"] is ok
    assert (found["reason"] is None) is (ok and promoted)
    assert found["answers"] == len(replies)


def test_latencies_are_those_of_answers_that_came() -> None:
    found = deployment.judge(
        CONFIG,
        [reply(latency=3.0), reply(latency=1.0), reply(latency=2.0), reply(error="x", latency=60.0)],
        promoted=True,
    )
    assert found["latency_s"] == {"p50": 2.0, "max": 3.0}


def sample(name: str, *, split: str = "test", frames: bool = True, audio: bool = True) -> Sample:
    return Sample(
        id=name,
        source="t",
        split=split,
        question="What?",
        options=["a", "b"],
        answer_index=0,
        question_type="both",
        needs="both",
        media_kind="video",
        frames=[b"jpeg"] if frames else [],
        frame_times_s=[],
        audio=b"flac" if audio else None,
        duration_s=None,
        width=None,
        height=None,
        fps=None,
        media_sha256="",
        group=name,
    )


def test_only_test_questions_with_sound_and_picture_are_asked(tmp_path: Path) -> None:
    rows = [sample("train", split="train"), sample("deaf", audio=False), sample("blind", frames=False)]
    write_table(tmp_path / "some", Sample, [*rows, sample("one"), sample("two"), sample("three")])
    assert [s.id for s in deployment.probe_questions(tmp_path / "some", 2)] == ["one", "two"]
    write_table(tmp_path / "none", Sample, rows)
    with pytest.raises(DataError, match="no test question"):
        deployment.probe_questions(tmp_path / "none", 2)


def test_without_a_champion_the_step_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "champion").mkdir()
    (tmp_path / "champion/champion.json").write_text(json.dumps(REFUSED))
    facts = deployment.run(
        CONFIG,
        workspace=Workspace(tmp_path, "deployment", tmp_path / "scratch"),
        samples=tmp_path,
        champion=tmp_path / "champion",
        check=tmp_path / "check",
        grpo_model=tmp_path,
    )
    assert (facts["status"], facts["ok"], facts["latency_s"]) == ("skipped", None, None)
    assert "Not promoted: chance." in facts["reason"]
    assert read_json(tmp_path / "check/check.json")["status"] == "skipped"


def test_a_champion_that_fails_its_check_can_be_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def served(*_: object) -> Iterator[deployment.Endpoint]:
        yield deployment.Endpoint("http://127.0.0.1:9/v1", None, "m")

    def unanswered(*_: object, **__: object) -> None:
        raise ServingError("No server answers")

    monkeypatch.setattr(deployment, "_kserve", served)
    monkeypatch.setattr(deployment, "ask_sample", unanswered)
    (tmp_path / "champion").mkdir()
    decision = {"promoted": True, "uri": "s3://m", "sha256": "0", "version": 1, "reason": ""}
    (tmp_path / "champion/champion.json").write_text(json.dumps(decision))
    write_table(tmp_path / "samples", Sample, [sample("one")])
    with pytest.raises(
        ServingError, match=r"No server answers\. .*avrt serving rollback avrt-miniature --namespace avrt"
    ):
        deployment.run(
            CONFIG.model_copy(update={"deployment": CONFIG.deployment.model_copy(update={"target": "kserve"})}),
            workspace=Workspace(tmp_path, "deployment", tmp_path / "scratch"),
            samples=tmp_path / "samples",
            champion=tmp_path / "champion",
            check=tmp_path / "check",
        )


@pytest.mark.parametrize(
    ("options", "media"), [([], True), (["a"], True), ([str(i) for i in range(9)], True), (["a", "b"], False)]
)
def test_questions_that_cannot_be_asked(options: list[str], media: bool) -> None:
    with pytest.raises(UsageError):
        client.ask(
            "http://127.0.0.1:9/v1",
            None,
            "m",
            config=CONFIG,
            question="What?",
            options=options,
            video=Path("clip.mp4") if media else None,
        )


def test_a_server_that_is_not_there_is_said() -> None:
    with pytest.raises(ServingError, match="No server answers at"):
        client.served_model("http://127.0.0.1:9/v1", "k", "m", timeout_s=5)
