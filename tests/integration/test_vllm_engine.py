"""vLLM in-process with tiny random models: the steps that ask it, resuming, and parity with transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from avrt_lib import evaluation
from avrt_lib.config import Config, EngineConfig, load
from avrt_lib.engine import messages, student_media
from avrt_lib.engine.base import ChatRequest
from avrt_lib.engine.vllm_engine import VllmEngine
from avrt_lib.errors import EngineError, NothingAnsweredError
from avrt_lib.records import Prediction, Sample
from avrt_lib.tables import MANIFEST, read_json, read_rows, write_table
from avrt_lib.workspace import Workspace
from tests import tiny_models

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "miniature.yaml"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_student(tmp_path_factory.mktemp("student") / "model")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six test questions (one without sound, one without pictures), three of validation, two of training."""
    folder = tmp_path_factory.mktemp("data") / "samples"
    rows = [tiny_models.sample(number, split="test") for number in range(4)]
    rows += [tiny_models.sample(4, split="test", seconds=0), tiny_models.sample(5, split="test", frames=0)]
    rows += [tiny_models.sample(number, split="validation") for number in range(6, 9)]
    rows += [tiny_models.sample(number, split="train") for number in range(9, 11)]
    write_table(folder, Sample, rows)
    return folder


def configuration(student: Path, **overrides: object) -> Config:
    return load(
        CONFIG,
        {
            "student.model": str(student),
            "evaluation.max_tokens": 12,
            "evaluation.chunk_rows": 6,
            "promotion.parity_samples": 2,
            **overrides,
        },
    )


def workspace(folder: Path) -> Workspace:
    return Workspace(folder, "evaluation-base", folder / "scratch")


def evaluate(config: Config, root: Path, samples: Path) -> tuple[dict, Path]:
    predictions = root / "predictions"
    facts = evaluation.run(config, workspace=workspace(root), samples=samples, predictions=predictions, role="base")
    return facts, predictions


@pytest.fixture(scope="module")
def evaluated(student: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    return evaluate(configuration(student), tmp_path_factory.mktemp("evaluation"), samples)


def test_every_question_is_asked_in_every_condition_that_leaves_it_a_modality(evaluated: tuple[dict, Path]) -> None:
    facts, predictions = evaluated
    rows = list(read_rows(predictions, Prediction))
    asked = sorted((row.split, row.condition) for row in rows)
    assert asked == sorted(
        [("test", "av")] * 6 + [("test", "audio_only")] * 5 + [("test", "vision_only")] * 5 + [("validation", "av")] * 3
    )
    assert not [row.error for row in rows if row.error]
    assert all(row.tokens_in > 0 and row.tokens_out > 0 for row in rows)
    assert facts["n"] == 6
    assert facts["validation"]["n"] == 3
    assert set(facts["conditions"]) == {"audio_only", "vision_only"}
    assert read_json(predictions / "metrics.json") == facts


def test_removing_a_modality_shortens_the_prompt(evaluated: tuple[dict, Path]) -> None:
    _, predictions = evaluated
    lengths = {
        row.condition: row.tokens_in for row in read_rows(predictions, Prediction) if row.sample_id == "test-0000"
    }
    assert lengths["av"] > lengths["audio_only"] > lengths["vision_only"]


def test_vllm_and_transformers_agree(evaluated: tuple[dict, Path]) -> None:
    facts, _ = evaluated
    assert facts["parity"]["n"] == 8
    assert facts["parity"]["argmax_equal"]
    assert facts["parity"]["max_difference"] < 1e-3


def test_a_resumed_evaluation_has_the_same_rows(
    evaluated: tuple[dict, Path], student: Path, samples: Path, tmp_path: Path
) -> None:
    facts, predictions = evaluated
    resumed = tmp_path / "predictions"
    resumed.mkdir()
    for name in ("part-00000.parquet", "part-00002.parquet"):  # the second chunk was killed
        (resumed / name).write_bytes((predictions / name).read_bytes())
    again, _ = evaluate(configuration(student), tmp_path, samples)
    assert read_json(resumed / MANIFEST)["content_sha256"] == read_json(predictions / MANIFEST)["content_sha256"]
    assert {k: v for k, v in again.items() if k != "parity"} == {k: v for k, v in facts.items() if k != "parity"}


def test_two_processes_make_the_same_table(
    evaluated: tuple[dict, Path], student: Path, samples: Path, tmp_path: Path
) -> None:
    _, predictions = evaluated
    config = configuration(student, **{"evaluation.processes": 2, "promotion.parity_samples": 0})
    _, both = evaluate(config, tmp_path, samples)
    assert read_json(both / MANIFEST)["content_sha256"] == read_json(predictions / MANIFEST)["content_sha256"]


def test_a_student_that_refuses_every_question_fails(student: Path, tmp_path: Path) -> None:
    rows = [tiny_models.sample(number, split="test") for number in range(4)]
    write_table(tmp_path / "samples", Sample, [dataclasses.replace(row, question="red " * 400) for row in rows])
    config = configuration(student, **{"evaluation.processes": 2, "student.max_model_len": 256})
    with pytest.raises(
        NothingAnsweredError, match=r"base@\w+ answered none of 4 requests \(condition av\).* 256 .*max_model_len"
    ):
        evaluate(config, tmp_path, tmp_path / "samples")
    assert not list((tmp_path / "predictions").iterdir())


def test_a_request_that_is_too_long_comes_back_with_its_error(student: Path) -> None:
    sample = tiny_models.sample(0)
    config = EngineConfig(model=str(student), dtype="float32", max_model_len=256, kv_cache_gib=0.25)
    settings = configuration(student).student
    asked = messages.student_messages("plain", sample)
    long = messages.student_messages("plain", dataclasses.replace(sample, question="red " * 400))
    assert asked is not None
    assert long is not None
    requests = [ChatRequest(str(i), m, 5, temperature=1.0, seed=3) for i, m in enumerate([asked, long, asked])]
    with VllmEngine(
        config,
        limits=student_media.limits(),
        mm_kwargs=student_media.processor_kwargs(settings),
        media_io_kwargs=student_media.media_io_kwargs(4),
    ) as engine:
        first, bad, last = engine.chat(requests)
        assert (first.error, last.error) == (None, None)
        assert first.text == last.text  # the same seed
        assert bad.error
        assert "256" in bad.error
        (after,) = engine.chat(requests[:1])  # a refused request leaves nothing behind
        assert (after.error, after.tokens_out > 0) == (None, True)
    with pytest.raises(EngineError, match="closed"):
        engine.chat(requests)


def test_a_broken_checkpoint_is_one_clear_error(student: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((student / "config.json").read_text())
    with pytest.raises(EngineError, match="could not load"):
        VllmEngine(EngineConfig(model=str(tmp_path), kv_cache_gib=0.25))
