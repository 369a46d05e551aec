"""The deployment step: bring the champion up at the configured target, and ask it held-out questions.

Targets share one result: ``local`` serves with vLLM here and stops again, ``kserve`` rolls the model out on the cluster
(a candidate is asked the same questions before the champion changes), ``git`` commits the manifest for a cluster that
follows a repository.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avrt_lib import answers, tracking
from avrt_lib.config import Config
from avrt_lib.errors import DataError, ServingError
from avrt_lib.promotion import CHAMPION, INFERENCE_SERVICE
from avrt_lib.records import Sample
from avrt_lib.serving.client import Reply, ask_sample, served_model
from avrt_lib.tables import read_json, read_rows, write_json
from avrt_lib.workspace import Progress, Workspace

if TYPE_CHECKING:
    from avrt_lib.serving.inference_service import Status

log = logging.getLogger("avrt.serving")

CHECK = "check.json"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the served model can be asked."""

    base_url: str
    api_key: str | None
    model: str


def run(
    config: Config,
    *,
    workspace: Workspace,
    samples: Path,
    champion: Path,
    check: Path,
    grpo_model: Path | None = None,
) -> dict[str, Any]:
    """Deploy the champion and check it.

    Without a champion the step is skipped, unless ``deployment.serve_unpromoted`` asks (target ``local`` only) for the
    last trained model to be served for the check alone.

    Args:
        config: ``deployment``, ``student``, ``evaluation`` and ``data`` are read.
        samples: held-out test questions that have sound and picture are asked.
        champion: promotion's folder.
        check: gets ``check.json``: the result with every question and answer.
        grpo_model: the last trained model.

    Returns:
        ``ok``, ``status`` (``succeeded`` or ``skipped``), ``reason``, ``target``, ``commit`` and ``pull_request``
        (target ``git``), ``uri``, ``promoted``, ``answers`` (how many were asked), ``well_formed`` and ``latency_s``
        {``p50``, ``max``}, or None where nothing was asked.

    Raises:
        ServingError: where the model does not come up, or a champion's answers fail the check; ``facts`` holds them.
    """
    decision = read_json(champion / CHAMPION)
    target = config.deployment.target
    facts: dict[str, Any] = {
        "ok": None,
        "status": "succeeded",
        "reason": None,
        "target": target,
        "commit": None,
        "pull_request": None,
        "uri": decision["uri"],
        "promoted": decision["promoted"],
        "answers": 0,
        "well_formed": 0,
        "latency_s": None,
    }
    replies: list[dict[str, Any]] = []
    check.mkdir(parents=True, exist_ok=True)
    if not decision["promoted"] and not (config.deployment.serve_unpromoted and target == "local" and grpo_model):
        facts |= {"status": "skipped", "reason": f"Nothing is deployed. {decision['reason']}"}
    elif target == "git":
        from avrt_lib.serving.gitops import commit_manifest

        change = commit_manifest(config, champion / INFERENCE_SERVICE, decision)
        facts |= {
            "ok": True,
            "commit": change.commit,
            "pull_request": change.pull_request,
            "reason": f"The manifest is in {config.deployment.manifests_url} at {change}.",
        }
    else:
        questions = probe_questions(samples, config.deployment.probe_questions)
        with workspace.progress("questions", len(questions)) as progress:
            opened = (
                _local(config, workspace, decision, grpo_model, progress)
                if target == "local"
                else _kserve(config, decision, questions, progress)
            )
            with opened as endpoint:
                for sample in questions:
                    replies.append(_asked(config, endpoint, sample))
                    progress.advance()
        facts |= judge(config, replies, promoted=decision["promoted"])
    write_json(check / CHECK, {**facts, "questions": replies})
    if facts["ok"] is False:
        mend = ""
        if target == "kserve":  # the candidate had passed: what has changed is the champion, or the way to it
            place = f"{config.promotion.model_name} --namespace {config.deployment.namespace}"
            mend = f" The champion serves it by now: avrt serving rollback {place} takes it back."
        failure = ServingError(f"The served model failed its check: {facts['reason'].rstrip('.')}.{mend}")
        failure.facts = facts  # type: ignore[attr-defined]
        raise failure
    return facts


def probe_questions(samples: Path, count: int) -> list[Sample]:
    """The first held-out test questions that have sound and picture.

    Raises:
        DataError: where there is none.
    """
    found: list[Sample] = []
    for sample in read_rows(samples, Sample, split="test"):
        if sample.frames and sample.audio is not None:
            found.append(sample)
            if len(found) == count:
                break
    if not found:
        raise DataError(f"{samples} has no test question with sound and picture to ask the served model.")
    return found


def judge(config: Config, replies: list[dict[str, Any]], *, promoted: bool) -> dict[str, Any]:
    """Whether the answers pass.

    All must arrive in time. Of a champion's, at most one in three may lack the form that it was trained to: a model is
    promoted with a few invalid answers in a hundred, and one of them among three questions says nothing.
    """
    latencies = [r["latency_s"] for r in replies if r["error"] is None]
    errors = [r["error"] for r in replies if r["error"] is not None]
    well_formed = sum(r["well_formed"] for r in replies)
    reason = None
    if errors:
        reason = f"{len(errors)} of {len(replies)} questions were not answered: {errors[0]}"
    elif promoted and 3 * (len(replies) - well_formed) > len(replies):
        reason = f"only {well_formed} of {len(replies)} answers have the asked form"
    elif not promoted:
        reason = "Served for the check alone: the model was not promoted."
    return {
        "ok": not errors and (not promoted or reason is None),
        "reason": reason,
        "answers": len(replies),
        "well_formed": well_formed,
        "latency_s": {"p50": statistics.median(latencies), "max": max(latencies)} if latencies else None,
    }


def _asked(config: Config, endpoint: Endpoint, sample: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {"sample_id": sample.id, "question": sample.question, "options": sample.options}
    try:
        reply = ask_sample(endpoint.base_url, endpoint.api_key, endpoint.model, sample, config=config)
    except ServingError as error:
        row |= {"error": str(error), "well_formed": False, "correct": None}
    else:
        correct = None if sample.answer_index is None else reply.letter == sample.answer_letter
        row |= {**dataclasses.asdict(reply), "error": None, "well_formed": _has_form(config, reply), "correct": correct}
    return row


def _has_form(config: Config, reply: Reply) -> bool:
    """A student that was trained on bare answers has no think section to show."""
    if config.sft.target == "answer":
        return reply.letter is not None
    return answers.well_formed(reply.raw) and reply.letter is not None


@contextmanager
def _local(
    config: Config, workspace: Workspace, decision: dict[str, Any], grpo_model: Path | None, progress: Progress
) -> Iterator[Endpoint]:
    from avrt_lib.serving.server import ServedModel
    from avrt_lib.store import download_model

    def waiting(seconds: float) -> None:
        progress.advance(0, f"starting vLLM, {seconds:.0f} s")

    workspace.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace.scratch) as temporary:
        folder = Path(temporary) / "model"
        if decision["promoted"]:
            download_model(decision["uri"], folder)
        else:
            assert grpo_model is not None
            folder = grpo_model
        with ServedModel(
            folder,
            config.promotion.model_name,
            student=config.student,
            frames=config.data.frames,
            log=workspace.root / "logs" / "serving.log",
            start_timeout_s=config.deployment.start_timeout_s,
            waiting=waiting,
        ) as served:
            yield Endpoint(served.base_url, served.api_key, served.name)


@contextmanager
def _kserve(
    config: Config, decision: dict[str, Any], questions: list[Sample], progress: Progress
) -> Iterator[Endpoint]:
    from avrt_lib.promotion.manifest import inference_service, to_dict
    from avrt_lib.serving.cluster import Cluster
    from avrt_lib.serving.reach import reached
    from avrt_lib.serving.rollout import of_manifest, rollout
    from avrt_lib.serving.route import Split
    from avrt_lib.store import ModelPlace

    service = inference_service(config, ModelPlace(decision["uri"], decision["sha256"], 0), decision["version"])
    wanted = of_manifest(to_dict(service), Split.of(config.deployment))

    def told(line: str) -> None:
        log.info("%s", line)
        progress.advance(0, line)

    def check(candidate: Status) -> None:
        check_candidate(config, candidate, questions, wanted.served_as)

    champion = rollout(
        Cluster(config.deployment.namespace),
        wanted,
        check=check,
        timeout_s=config.deployment.start_timeout_s,
        told=told,
    )
    place = f"{champion.namespace}/{champion.name}"
    tracking.tag_version(config.promotion.model_name, decision["version"], {"inference_service": place})
    with reached(champion) as base_url:
        yield Endpoint(base_url, os.environ.get("AVRT_API_KEY"), champion.name)


def check_candidate(config: Config, candidate: Status, questions: list[Sample], model: str) -> dict[str, Any]:
    """Ask a served candidate held-out questions, after a glance at whether it is there and takes the key.

    Args:
        model: the name that it is to be served under.

    Returns:
        What ``judge`` says.

    Raises:
        ServingError: where it does not answer, or its answers do not do.
    """
    from avrt_lib.serving.reach import reached

    with reached(candidate) as base_url:
        endpoint = Endpoint(base_url, os.environ.get("AVRT_API_KEY"), model)
        name = served_model(base_url, endpoint.api_key, model)
        if name != model:
            raise ServingError(f"{base_url} serves {name}, not {model}.")
        found = judge(config, [_asked(config, endpoint, sample) for sample in questions], promoted=True)
    log.info("the candidate %s: %s", candidate.name, found)
    if not found["ok"]:
        raise ServingError(f"{candidate.name} failed its check: {found['reason']}")
    return found
