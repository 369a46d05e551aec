"""Promotion: the winner on the validation questions becomes the champion, if it beats the base by a paired test."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avrt_lib.code_version import code_version
from avrt_lib.config import Config
from avrt_lib.errors import DataError
from avrt_lib.models import verify_manifest
from avrt_lib.records import Prediction
from avrt_lib.tables import MANIFEST, read_json, read_rows, write_json
from avrt_lib.workspace import Workspace

log = logging.getLogger("avrt.promotion")

CHAMPION = "champion.json"
INFERENCE_SERVICE = "inferenceservice.yaml"
_METRICS = "metrics.json"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trained model on the validation questions."""

    name: str
    accuracy: float
    invalid: int
    correct: dict[str, bool]


def run(
    config: Config,
    *,
    workspace: Workspace,
    base_predictions: Path,
    sft_predictions: Path,
    grpo_predictions: Path,
    sft_model: Path,
    grpo_model: Path,
    champion: Path,
) -> dict[str, Any]:
    """Choose, test, publish and register the champion.

    The winner among SFT and GRPO has the higher accuracy on the validation questions (all modalities given; at equal
    accuracy fewer invalid answers, then the later stage). It is promoted if the exact two-sided McNemar test against
    the base on the same questions is below ``promotion.alpha`` in its favour, and if vLLM and transformers agree about
    it (unless ``promotion.parity_samples`` is 0). Test questions play no part.

    Args:
        config: ``promotion``, ``deployment``, ``store``, ``student`` and ``data.frames`` are read.
        champion: gets ``champion.json``, and for a champion ``inferenceservice.yaml``.

    Returns:
        ``promoted``, ``reason``, ``model`` (``sft``, ``grpo`` or None), ``version``, ``uri``, ``sha256`` and ``test``
        {``p_value``, ``n``, ``candidate``, ``candidate_accuracy``, ``base_accuracy``, ``wins``, ``losses``}.

    Raises:
        DataError: where predictions do not fit together, or the model's files differ from its manifest.
        ConfigError: where the names are too long for KServe; nothing is published then.
        StoreError: where the store or the registry refuses.
    """
    base = validation_answers("base", base_predictions)
    candidates = [validation_answers("sft", sft_predictions), validation_answers("grpo", grpo_predictions)]
    winner = choose(candidates)
    test = compare(base, winner)
    parity = _parity({"sft": sft_predictions, "grpo": grpo_predictions}[winner.name])
    refusal = _refusal(config, winner, test, parity)
    champion.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "promoted": False,
        "reason": refusal,
        "model": None,
        "version": None,
        "uri": None,
        "sha256": None,
        "test": test,
        "parity": parity,
        "validation_accuracy": {c.name: c.accuracy for c in (base, *candidates)},
    }
    if refusal is None:
        model = {"sft": sft_model, "grpo": grpo_model}[winner.name]
        facts |= _promote(config, workspace, winner.name, model, champion, test)
    write_json(champion / CHAMPION, {**facts, "isvc": INFERENCE_SERVICE if facts["promoted"] else None})
    log.info("%s", facts["reason"])
    return facts


def validation_answers(name: str, predictions: Path) -> Candidate:
    """A model's answers to the validation questions, all modalities given; unlabelled questions are left out.

    Raises:
        DataError: where there is none.
    """
    correct: dict[str, bool] = {}
    invalid = 0
    for row in read_rows(predictions, Prediction, split="validation"):
        if row.condition != "av" or row.correct_strict is None:
            continue
        correct[row.sample_id] = row.correct_strict
        invalid += row.answer_index is None
    if not correct:
        raise DataError(f"{predictions} has no labelled validation answers of {name}: promotion chooses by them.")
    return Candidate(name, sum(correct.values()) / len(correct), invalid, correct)


def choose(candidates: list[Candidate]) -> Candidate:
    """The best candidate: accuracy, then fewer invalid answers, then the later in the list."""
    ranked = sorted(enumerate(candidates), key=lambda pair: (pair[1].accuracy, -pair[1].invalid, pair[0]))
    return ranked[-1][1]


def compare(base: Candidate, candidate: Candidate) -> dict[str, Any]:
    """The paired test of a candidate against the base.

    Raises:
        DataError: where the two did not answer the same questions.
    """
    from avrt_lib.evaluation.statistics import paired_test

    if base.correct.keys() != candidate.correct.keys():
        odd = sorted(base.correct.keys() ^ candidate.correct.keys())
        raise DataError(
            f"The base and {candidate.name} answered different validation questions (for example {odd[0]}): evaluate "
            "both on the same samples."
        )
    order = sorted(base.correct)
    found = paired_test([base.correct[key] for key in order], [candidate.correct[key] for key in order])
    return {
        "candidate": candidate.name,
        "p_value": found.p_value,
        "n": found.n,
        "candidate_accuracy": candidate.accuracy,
        "base_accuracy": base.accuracy,
        "wins": found.only_second,
        "losses": found.only_first,
    }


def _parity(predictions: Path) -> dict[str, Any] | None:
    path = predictions / _METRICS
    parity = read_json(path).get("parity") if path.exists() else None
    return parity if parity and parity.get("n") else None


def _refusal(config: Config, winner: Candidate, test: dict[str, Any], parity: dict[str, Any] | None) -> str | None:
    """Why the winner is not promoted, or None."""
    gain = f"{winner.name} {test['candidate_accuracy']:.1%} against base {test['base_accuracy']:.1%}"
    evidence = f"{gain} on {test['n']} validation questions, p = {test['p_value']:.3g}"
    if test["wins"] <= test["losses"]:
        return f"Not promoted: no trained model is better than the base ({evidence})."
    if test["p_value"] >= config.promotion.alpha:
        return f"Not promoted: the gain may be chance ({evidence}, needed below {config.promotion.alpha:g})."
    if parity is None and config.promotion.parity_samples == 0:
        return None
    tolerance = config.promotion.parity_tolerance
    difference = math.nan if parity is None or parity["max_difference"] is None else parity["max_difference"]
    if math.isnan(difference):
        return (
            f"Not promoted: vLLM and transformers were not compared for {winner.name} (promotion.parity_samples), or "
            "its log-probabilities are not numbers: evaluate it again."
        )
    if difference > tolerance:
        return (
            f"Not promoted: vLLM and transformers differ by {difference:.3g} in log-probability for {winner.name} "
            f"(tolerance {tolerance:g})."
        )
    return None


def _promote(
    config: Config, workspace: Workspace, name: str, model: Path, champion: Path, test: dict[str, Any]
) -> dict[str, Any]:
    from avrt_lib import store, tracking
    from avrt_lib.promotion.manifest import check_names, inference_service, to_yaml

    check_names(config)  # nothing may be published or registered that cannot be served
    verify_manifest(model)
    place = store.publish_model(model, config.promotion.model_name, config.store, store.local_root(workspace.root))
    tags = {
        "sha256": place.sha256,
        "stage": name,
        "data_hash": os.environ.get(tracking.DATA_HASH, ""),
        "config_hash": config.sha256,
        "code_version": code_version(),
        "base": config.student.model,
        "made_by": str(read_json(model / MANIFEST).get("made_by", {})),
    }
    version = tracking.register_champion(place.uri, config.promotion.model_name, {k: v for k, v in tags.items() if v})
    service = inference_service(config, place, version)
    (champion / INFERENCE_SERVICE).write_text(to_yaml(service), encoding="utf-8")
    return {
        "promoted": True,
        "reason": (
            f"{name} is promoted: {test['candidate_accuracy']:.1%} against {test['base_accuracy']:.1%} of the base on "
            f"{test['n']} validation questions, p = {test['p_value']:.3g}."
        ),
        "model": name,
        "version": version,
        "uri": place.uri,
        "sha256": place.sha256,
    }
