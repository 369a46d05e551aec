"""Who is promoted, by which questions, and why not."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import promotion
from avrt_lib.config import Config, load
from avrt_lib.errors import ConfigError, DataError
from avrt_lib.models import write_manifest
from avrt_lib.promotion import manifest
from avrt_lib.records import Prediction
from avrt_lib.tables import read_json, write_json, write_table
from avrt_lib.workspace import Workspace

ROOT = Path(__file__).parents[2]
N = 40


def configured(**more: Any) -> Config:
    return load(ROOT / "configs/miniature.yaml", {"store.kind": "local", **more})


def prediction(number: int, correct: bool | None, *, split: str = "validation", condition: str = "av") -> Prediction:
    return Prediction(
        sample_id=f"{split}-{number}",
        split=split,
        group=str(number),
        question_type="both",
        model="m",
        condition=condition,
        raw_text="",
        answer_index=0,
        invalid_reason=None,
        correct_strict=correct,
        correct_official=correct,
        words=10,
        tokens_in=1,
        tokens_out=1,
        latency_s=0.1,
    )


def write_predictions(
    folder: Path, right: int, *, elsewhere: bool = False, parity: dict[str, Any] | None = None
) -> Path:
    """Validation answers of which the first ``right`` are correct; all others stand at ``elsewhere``."""
    rows = [prediction(i, i < right) for i in range(N)]
    rows += [prediction(i, elsewhere, split="test") for i in range(N)]
    rows += [prediction(i, elsewhere, condition="audio_only") for i in range(N)]
    write_table(folder, Prediction, rows)
    write_json(folder / "metrics.json", {"parity": parity})
    return folder


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(f'"{folder.name}"')
    write_manifest(folder, {"step": folder.name})
    return folder


def promote(tmp_path: Path, config: Config | None = None, **predictions: Path) -> dict[str, Any]:
    names = ("base", "sft", "grpo")
    given = {f"{name}_predictions": predictions[name] for name in names}
    return promotion.run(
        config or configured(),
        workspace=Workspace(tmp_path / "work", "promotion", tmp_path / "scratch"),
        sft_model=model(tmp_path / "sft_model"),
        grpo_model=model(tmp_path / "grpo_model"),
        champion=tmp_path / "champion",
        **given,
    )


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("AVRT_LOCAL_STORE", raising=False)


@pytest.mark.parametrize(
    ("base", "sft", "grpo", "parity", "said"),
    [
        (20, 10, 15, None, "no trained model is better"),
        (20, 20, 20, None, "no trained model is better"),
        (20, 20, 24, None, "may be chance"),
        (20, 30, 39, {"max_difference": 0.5, "n": 4, "argmax_equal": False}, "vLLM and transformers differ by 0.5"),
        (20, 30, 39, {"max_difference": None, "n": 4, "argmax_equal": False}, "not compared for grpo"),
        (20, 30, 39, {"max_difference": None, "n": 0, "argmax_equal": None}, "not compared for grpo"),
        (20, 30, 39, None, "not compared for grpo"),
    ],
)
def test_not_promoted_is_a_success_with_a_reason(
    base: int, sft: int, grpo: int, parity: dict[str, Any] | None, said: str, tmp_path: Path
) -> None:
    facts = promote(
        tmp_path,
        base=write_predictions(tmp_path / "b", base),
        sft=write_predictions(tmp_path / "s", sft),
        grpo=write_predictions(tmp_path / "g", grpo, parity=parity),
    )
    assert facts["promoted"] is False
    assert said in facts["reason"]
    assert (facts["model"], facts["uri"], facts["version"]) == (None, None, None)
    written = read_json(tmp_path / "champion/champion.json")
    assert (written["promoted"], written["reason"], written["isvc"]) == (False, facts["reason"], None)
    assert not (tmp_path / "work/store").exists()


@pytest.mark.parametrize(
    ("samples", "parity"), [(4, {"max_difference": 0.05, "n": 4, "argmax_equal": True}), (0, None)]
)
def test_what_agrees_is_promoted_and_what_need_not_agree(
    samples: int, parity: dict[str, Any] | None, tmp_path: Path
) -> None:
    facts = promote(
        tmp_path,
        configured(**{"promotion.parity_samples": samples}),
        base=write_predictions(tmp_path / "b", 20),
        sft=write_predictions(tmp_path / "s", 30),
        grpo=write_predictions(tmp_path / "g", 39, parity=parity),
    )
    assert (facts["promoted"], facts["model"]) == (True, "grpo")


def test_a_difference_that_is_no_number_is_not_within_the_tolerance() -> None:
    winner = promotion.Candidate("grpo", 1.0, 0, {})
    test = {"candidate_accuracy": 1.0, "base_accuracy": 0.5, "n": N, "p_value": 0.001, "wins": 20, "losses": 0}
    refused = promotion._refusal(configured(), winner, test, {"max_difference": math.nan, "n": 4})
    assert refused is not None
    assert "not numbers" in refused


@pytest.mark.parametrize(("sft", "grpo", "winner"), [(30, 39, "grpo"), (39, 30, "sft"), (35, 35, "grpo")])
def test_the_winner_is_chosen_on_validation_questions_alone(sft: int, grpo: int, winner: str, tmp_path: Path) -> None:
    write_predictions(tmp_path / "s", sft, elsewhere=winner == "grpo")
    write_predictions(tmp_path / "g", grpo, elsewhere=winner == "sft")
    candidates = [promotion.validation_answers(n, tmp_path / n[0]) for n in ("sft", "grpo")]
    assert promotion.choose(candidates).name == winner
    assert candidates[0].accuracy == sft / N


def test_the_exact_test_counts_wins_and_losses(tmp_path: Path) -> None:
    base = promotion.validation_answers("base", write_predictions(tmp_path / "b", 20))
    better = promotion.validation_answers("sft", write_predictions(tmp_path / "s", 28))
    found = promotion.compare(base, better)
    assert (found["wins"], found["losses"], found["n"]) == (8, 0, N)
    assert found["p_value"] == pytest.approx(2 / 2**8)


def test_unlabelled_questions_do_not_count(tmp_path: Path) -> None:
    write_table(tmp_path / "p", Prediction, [prediction(0, None), prediction(1, True)])
    assert promotion.validation_answers("base", tmp_path / "p").correct == {"validation-1": True}
    write_table(tmp_path / "q", Prediction, [prediction(0, None), prediction(1, True, split="test")])
    with pytest.raises(DataError, match="no labelled validation answers of base"):
        promotion.validation_answers("base", tmp_path / "q")


def test_different_questions_are_not_compared(tmp_path: Path) -> None:
    write_table(tmp_path / "p", Prediction, [prediction(0, True)])
    write_table(tmp_path / "q", Prediction, [prediction(1, True)])
    with pytest.raises(DataError, match="validation-0"):
        promotion.compare(
            promotion.validation_answers("base", tmp_path / "p"), promotion.validation_answers("sft", tmp_path / "q")
        )


@pytest.mark.parametrize(("target", "longest"), [("git", 32), ("kserve", 22)])  # kserve: a candidate's name is longer
def test_names_that_kserve_cannot_join_are_refused(target: str, longest: int) -> None:
    settings = {"promotion.model_name": "m" * 20, "deployment.target": target}
    settings["deployment.manifests_url"] = "https://git.example.com/models"
    manifest.check_names(configured(**settings | {"deployment.namespace": "n" * longest}))
    with pytest.raises(ConfigError, match="more than 52"):
        manifest.check_names(configured(**settings | {"deployment.namespace": "n" * (longest + 1)}))


def test_what_kserve_could_not_serve_is_not_published(tmp_path: Path) -> None:
    names = {"promotion.model_name": "m" * 20, "deployment.namespace": "n" * 33, "promotion.parity_samples": 0}
    predictions = {
        name: write_predictions(tmp_path / name, right) for name, right in (("base", 20), ("sft", 30), ("grpo", 39))
    }
    with pytest.raises(ConfigError, match="more than 52"):
        promote(tmp_path, configured(**names), **predictions)
    assert not (tmp_path / "work/store").exists()


def test_promotion_needs_no_torch() -> None:
    code = (
        "import sys, avrt_lib.promotion, avrt_lib.promotion.manifest, avrt_lib.evaluation.statistics, avrt_lib.store\n"
        "assert not {'torch', 'vllm', 'transformers', 'mlflow', 'kserve'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_manifest_can_be_made_under_any_command_line() -> None:
    code = """
import sys
sys.argv[1:] = ["step", "promotion", "--config", "x.yaml"]
from tests.unit.test_promotion import configured
from avrt_lib.promotion.manifest import inference_service
from avrt_lib.store import ModelPlace
inference_service(configured(), ModelPlace("s3://avrt/models/a/b", "b", 0), 1)
print(sys.argv[-1])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "x.yaml", done.stderr
