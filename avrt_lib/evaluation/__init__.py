"""Evaluation: one model, greedy, on the held-out questions with all modalities and with one removed.

The model is asked through vLLM, as it will be served; validation questions (with all modalities) are what promotion
chooses by, test questions are what is reported.
"""

from __future__ import annotations

import multiprocessing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avrt_lib import compat, models
from avrt_lib.config import Config, EngineConfig
from avrt_lib.engine import factory
from avrt_lib.engine.lazy import LazyEngine
from avrt_lib.errors import EngineError, NothingAnsweredError, UsageError
from avrt_lib.evaluation.asking import CHUNKS_LEFT, ask, ask_in_child, build_engine, conditions_of
from avrt_lib.evaluation.metrics import summarise
from avrt_lib.evaluation.parity import parity as compare
from avrt_lib.records import Prediction, Sample
from avrt_lib.tables import MANIFEST, TableWriter, hash_folder, read_json, read_rows, write_json
from avrt_lib.workspace import Progress, Workspace

if TYPE_CHECKING:
    from multiprocessing.context import SpawnContext

    from avrt_lib.engine.vllm_engine import VllmEngine

ROLES = ("base", "sft", "grpo")
METRICS = "metrics.json"
PARITY = "parity.json"


def run(
    config: Config,
    *,
    workspace: Workspace,
    samples: Path,
    predictions: Path,
    role: str,
    model: Path | None = None,
) -> dict[str, Any]:
    """Ask one model all validation and test questions.

    Args:
        config: ``student``, ``evaluation``, ``seed``, ``data.frames`` and ``promotion.parity_samples`` are read.
        workspace: where progress is counted.
        samples: the samples table.
        predictions: the predictions table to write, with ``metrics.json`` beside it; chunks that it holds are kept.
        role: ``base``, ``sft`` or ``grpo``.
        model: the checkpoint; for the base it may be left out and is then ``evaluation.endpoint``, or where there is
            none, ``student.model``.

    Returns:
        What ``metrics.summarise`` gives, and ``parity`` (see ``avrt_lib.evaluation.parity``; None of an endpoint).

    Raises:
        UsageError: where the role is not known, or a trained one comes without its model.
        EngineError: where the model cannot be loaded or fails, or refuses every question of a condition.
    """
    if role not in ROLES:
        raise UsageError(f"There is no model role {role!r}: name one of {', '.join(ROLES)}.")
    if model is None and role != "base":
        raise UsageError(f"Evaluation of {role} needs the model folder that its training made.")
    if model is None and config.evaluation.endpoint is not None:
        return _endpoint(config, config.evaluation.endpoint, workspace, samples, predictions)
    folder = models.resolve(str(model or config.student.model))
    name = f"{role}@{_content(folder)[:12]}"
    writer = TableWriter(predictions, Prediction, {"step": "evaluation", "model": name})
    with LazyEngine(lambda: build_engine(config, folder, name), name) as engine:
        _ask_all(config, workspace, samples, folder, writer, engine)
        writer.finish()
        parity = _parity(config, samples, folder, predictions / PARITY, engine)
    return _facts(config, predictions, parity)


def _endpoint(
    config: Config, endpoint: EngineConfig, workspace: Workspace, samples: Path, predictions: Path
) -> dict[str, Any]:
    """Ask a served model in the base's place; it has its own limits, and no weights here to compare it with."""
    alone = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"processes": 1})})
    engine_config = endpoint.model_copy(update={"max_tokens": config.evaluation.max_tokens})
    name = f"base@{endpoint.model}"
    writer = TableWriter(predictions, Prediction, {"step": "evaluation", "model": name})
    with (
        LazyEngine(lambda: factory.build(engine_config, name=name), name) as engine,
        workspace.progress("answers", _count(config, samples)) as progress,
    ):
        ask(alone, samples, writer, progress, engine, 0)
    writer.finish()
    return _facts(config, predictions, None)


def _facts(config: Config, predictions: Path, parity: dict[str, Any] | None) -> dict[str, Any]:
    resamples = config.evaluation.bootstrap_samples
    facts = summarise(read_rows(predictions, Prediction), resamples=resamples, seed=config.seed)
    facts["parity"] = parity
    write_json(predictions / METRICS, facts)
    return facts


def _content(folder: Path) -> str:
    """The checkpoint's content hash, so that predictions of the same weights name the same model everywhere."""
    if (folder / MANIFEST).exists():
        return str(read_json(folder / MANIFEST).get("content_sha256") or hash_folder(folder))
    return hash_folder(folder)


def _ask_all(
    config: Config,
    workspace: Workspace,
    samples: Path,
    folder: Path,
    writer: TableWriter[Prediction],
    engine: LazyEngine[VllmEngine],
) -> None:
    """Share 0 is asked here, the other shares in processes beside this one; what a share leaves is judged with all."""
    processes = config.evaluation.processes
    compat.share_cores(processes)
    context: SpawnContext = multiprocessing.get_context("spawn")
    failures = context.Queue()
    children = [
        context.Process(
            target=ask_in_child,
            args=(config.to_json(), samples, folder, writer.folder, engine.model, share, failures),
            name=f"evaluation-{share}",
            daemon=True,
        )
        for share in range(1, processes)
    ]
    try:
        for child in children:
            child.start()
        with workspace.progress("answers", _count(config, samples)) as progress:
            try:
                ask(config, samples, writer, progress, engine, 0)
                left = False
            except NothingAnsweredError:
                if not children:
                    raise
                left = True
            for child in children:
                child.join()
                if child.exitcode == CHUNKS_LEFT:
                    left = True
                elif child.exitcode:
                    reason = failures.get(timeout=1) if not failures.empty() else f"exit code {child.exitcode}"
                    raise EngineError(f"An evaluation process of {engine.model} failed: {reason}")
            if left:
                ask(config, samples, writer, Progress(None, "answers", None), engine, None)
            progress.done = progress.total or progress.done
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
                child.join()


def _count(config: Config, samples: Path) -> int:
    columns = ["split", "media_kind"]
    return sum(
        len(conditions_of(config, row.split, picture=row.media_kind != "audio", sound=row.media_kind != "silent_video"))
        for row in read_rows(samples, Sample, columns=columns)
    )


def _parity(config: Config, samples: Path, folder: Path, path: Path, engine: LazyEngine[VllmEngine]) -> dict[str, Any]:
    if path.exists():
        return dict(read_json(path))
    wanted = config.promotion.parity_samples
    chosen = list(islice(read_rows(samples, Sample, split="validation"), wanted))
    found = compare(folder, chosen, config, engine=engine.get() if chosen else None)
    write_json(path, found)
    return found
